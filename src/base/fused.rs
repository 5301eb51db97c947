//! What of a layer is neither a product nor attention, on a GPU: in decoding the launch of a kernel takes longer than what it
//! computes, so operations that follow each other are one (`src/cuda/kernels/layer.cu`). Elsewhere they are candle's, which the
//! kernels are held to.

use candle_core::{DType, Result, bail};

use crate::base::{Activation, NormKind};
use crate::cuda::{self, Argument, Launch, Machine, Module};

const NORM_THREADS: u32 = 256;
const ROTATE_THREADS: u32 = 128;
const ACTIVATE_THREADS: u32 = 256;
const WARP: usize = 32;
/// Numbers of a thread.
const EIGHT: usize = 8;
pub(super) const MAX_HEAD_DIM: usize = 256;

/// `sums = x + h`, and the norm of its rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct AddNorm {
    pub kind: NormKind,
    pub eps: f32,
    pub rows: usize,
    pub width: usize,
    pub dtype: DType,
    /// Of weight and bias.
    pub weight_dtype: DType,
    /// Not used without `h`.
    pub sums: u64,
    pub y: u64,
    pub x: u64,
    pub h: Option<u64>,
    pub weight: u64,
    pub bias: Option<u64>,
}

impl AddNorm {
    /// # Safety
    /// At the addresses are `[rows, width]` numbers, and weights of a row.
    pub unsafe fn launch<M: Machine>(&self, machine: &M) -> Result<()> {
        let own = [self.sums, self.y, self.x, self.h.unwrap_or(0)];
        let of_row = [self.weight, self.bias.unwrap_or(0)];
        let vector = self.width.is_multiple_of(EIGHT) && own.iter().chain(&of_row).all(|a| a.is_multiple_of(16));
        let (Some(suffix), Some(number)) = (cuda::suffix(self.weight_dtype, vector), cuda::number(self.dtype)) else {
            bail!("no kernels for {:?} and {:?}", self.dtype, self.weight_dtype)
        };
        if self.bias.is_some() != (self.kind == NormKind::Layer) {
            bail!("a layer norm has a bias, and no other");
        }
        let mut arguments: Vec<_> = own.into_iter().chain(of_row).map(Argument::Address).collect();
        arguments.extend([Argument::Word(self.width as u32), Argument::Float(self.eps)]);
        let kernel = &format!("add_norm_{number}_{suffix}");
        // SAFETY: these are the parameters of the kernel in layer.cu; the rest is the caller's promise.
        unsafe { launch(machine, kernel, [self.rows, 1], NORM_THREADS, &arguments) }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct HeadSizes {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Pairs that are turned.
    pub half: usize,
    /// Of the norms of heads.
    pub eps: f32,
}

/// Queries, keys and values of rows `[heads + 2 kv_heads, head_dim]`: those of q and k normed and turned, those of k and v
/// written to the cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotate {
    pub sizes: HeadSizes,
    pub rows: usize,
    pub dtype: DType,
    pub q: u64,
    pub keys: u64,
    pub values: u64,
    pub qkv: u64,
    /// Of rows of `half` numbers.
    pub cosines: u64,
    pub sines: u64,
    /// Of a word a row.
    pub slots: u64,
    /// Of the norms of q's heads and of k's, by the root of their mean square.
    pub norms: Option<[u64; 2]>,
}

impl Rotate {
    /// # Safety
    /// At the addresses are as many numbers as the sizes say, and the slots are in the cache.
    pub unsafe fn launch<M: Machine>(&self, machine: &M) -> Result<()> {
        let Some(number) = cuda::number(self.dtype) else { bail!("no kernels for {:?}", self.dtype) };
        let HeadSizes { heads, kv_heads, head_dim, half, eps } = self.sizes;
        if head_dim > MAX_HEAD_DIM || 2 * half > head_dim {
            bail!("heads of {head_dim} numbers, {half} pairs turned; the kernel takes up to {MAX_HEAD_DIM}");
        }
        let norms = self.norms.unwrap_or_default();
        let addresses = [self.q, self.keys, self.values, self.qkv, self.cosines, self.sines, self.slots];
        let sizes = [heads, kv_heads, head_dim, half].map(|size| Argument::Word(size as u32));
        let mut arguments: Vec<_> = addresses.into_iter().chain(norms).map(Argument::Address).collect();
        arguments.extend(sizes);
        arguments.push(Argument::Float(eps));
        let runs = (heads + 2 * kv_heads).div_ceil(ROTATE_THREADS as usize / WARP);
        // SAFETY: as in `AddNorm::launch`.
        unsafe { launch(machine, &format!("rotate_{number}"), [self.rows, runs], ROTATE_THREADS, &arguments) }
    }
}

/// `activation(gate) * up` of rows `[gate, up]`, or `activation(up)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activate {
    pub activation: Activation,
    pub is_gated: bool,
    pub rows: usize,
    pub width: usize,
    pub dtype: DType,
    pub y: u64,
    pub x: u64,
}

impl Activate {
    /// # Safety
    /// At the addresses are as many numbers as the sizes say.
    pub unsafe fn launch<M: Machine>(&self, machine: &M) -> Result<()> {
        let vector = self.width.is_multiple_of(EIGHT) && [self.x, self.y].iter().all(|a| a.is_multiple_of(16));
        let Some(suffix) = cuda::suffix(self.dtype, vector) else { bail!("no kernels for {:?}", self.dtype) };
        let activation = match self.activation {
            Activation::Silu => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::Relu => 3,
        };
        let words = [self.width as u32, u32::from(self.is_gated), activation].map(Argument::Word);
        let mut arguments = vec![Argument::Address(self.y), Argument::Address(self.x)];
        arguments.extend(words);
        let runs = self.width.div_ceil(ACTIVATE_THREADS as usize * EIGHT);
        // SAFETY: as in `AddNorm::launch`.
        unsafe { launch(machine, &format!("activate_{suffix}"), [self.rows, runs], ACTIVATE_THREADS, &arguments) }
    }
}

/// # Safety
/// The arguments are the kernel's, and what it reads and writes by them is there.
unsafe fn launch<M: Machine>(
    machine: &M,
    kernel: &str,
    [x, y]: [usize; 2],
    threads: u32,
    arguments: &[Argument],
) -> Result<()> {
    if x == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { machine.launch(&Launch { module: Module::Layer, kernel, grid: [x, y, 1], threads, arguments }) }
}

/// The same for tensors on a GPU; they are in one piece.
#[cfg(feature = "cuda")]
pub(super) mod tensors {
    use candle_core::{CudaDevice, Device, Tensor};

    use super::*;
    use crate::cuda::gpu::tensor_address;

    /// A tensor that a kernel writes all of.
    fn unwritten(shape: (usize, usize), like: &Tensor) -> Result<Tensor> {
        // SAFETY: the kernel writes it before anything reads it, as all is in one stream.
        unsafe { Tensor::empty(shape, like.dtype(), like.device()) }
    }

    /// The sum of `x` and `h`, which is `x` without `h`, and its norm.
    pub fn add_norm(
        device: &CudaDevice,
        x: &Tensor,
        h: Option<&Tensor>,
        (kind, eps): (NormKind, f32),
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, width) = x.dims2()?;
        let (x, h) = (x.contiguous()?, h.map(Tensor::contiguous).transpose()?);
        let sums = if h.is_some() { unwritten((rows, width), &x)? } else { x.clone() };
        let y = unwritten((rows, width), &x)?;
        let address = |t: Option<&Tensor>| t.map(tensor_address).transpose();
        let add_norm = AddNorm {
            kind,
            eps,
            rows,
            width,
            dtype: x.dtype(),
            weight_dtype: weight.dtype(),
            sums: tensor_address(&sums)?,
            y: tensor_address(&y)?,
            x: tensor_address(&x)?,
            h: address(h.as_ref())?,
            weight: tensor_address(weight)?,
            bias: address(bias)?,
        };
        // SAFETY: the tensors have these sizes.
        unsafe { add_norm.launch(device) }?;
        Ok((sums, y))
    }

    pub fn activate(
        device: &CudaDevice,
        x: &Tensor,
        activation: Activation,
        is_gated: bool,
        width: usize,
    ) -> Result<Tensor> {
        let rows = x.dims2()?.0;
        let (x, y) = (x.contiguous()?, unwritten((rows, width), x)?);
        let (from, to) = (tensor_address(&x)?, tensor_address(&y)?);
        let activate = Activate { activation, is_gated, rows, width, dtype: x.dtype(), y: to, x: from };
        // SAFETY: the tensors have these sizes.
        unsafe { activate.launch(device) }?;
        Ok(y)
    }

    /// The queries; keys and values are in the cache then.
    pub fn rotate(
        device: &CudaDevice,
        sizes: HeadSizes,
        qkv: &Tensor,
        [keys, values]: [&Tensor; 2],
        rotation: Option<&[Tensor; 2]>,
        slots: &Tensor,
        norms: Option<[&Tensor; 2]>,
    ) -> Result<Tensor> {
        let qkv = qkv.contiguous()?;
        let rows = qkv.dims2()?.0;
        let q = unwritten((rows, sizes.heads * sizes.head_dim), &qkv)?;
        let [cosines, sines] = match rotation {
            Some([cosines, sines]) => [tensor_address(cosines)?, tensor_address(sines)?],
            None => [0, 0],
        };
        let norms = match norms {
            Some([q, k]) => Some([tensor_address(q)?, tensor_address(k)?]),
            None => None,
        };
        let rotate = Rotate {
            sizes,
            rows,
            dtype: qkv.dtype(),
            q: tensor_address(&q)?,
            keys: tensor_address(keys)?,
            values: tensor_address(values)?,
            qkv: tensor_address(&qkv)?,
            cosines,
            sines,
            slots: tensor_address(slots)?,
            norms,
        };
        // SAFETY: the tensors have these sizes, and the slots are the step's.
        unsafe { rotate.launch(device) }?;
        Ok(q)
    }

    /// `None` for a CPU.
    pub fn device(x: &Tensor) -> Option<&CudaDevice> {
        match x.device() {
            Device::Cuda(device) => Some(device),
            _ => None,
        }
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;

    use super::*;
    use crate::base::testing::noise;
    use crate::cuda::emulator::{Emulator, LAYER};

    fn tensor(next: &mut impl FnMut() -> f32, shape: &[usize], dtype: DType) -> Tensor {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| 2.0 * next()).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    fn f32s(t: &Tensor) -> Tensor {
        t.to_dtype(DType::F32).unwrap()
    }

    fn numbers(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The largest difference, over what rounding to numbers of `dtype` allows.
    fn worst(got: &[f32], want: &[f32], dtype: DType) -> f32 {
        assert_eq!(got.len(), want.len());
        let unit = match dtype {
            DType::BF16 => 2f32.powi(-7),
            DType::F16 => 2f32.powi(-10),
            _ => 0.0,
        };
        let of = |(got, want): (&f32, &f32)| match got.is_finite() {
            true => (got - want).abs() / (unit * want.abs() + 2e-5),
            false => f32::INFINITY,
        };
        got.iter().zip(want).map(of).fold(0.0, f32::max)
    }

    struct Norms {
        kind: NormKind,
        shape: (usize, usize),
        dtypes: (DType, DType),
        adds: bool,
        seed: u64,
    }

    impl Norms {
        fn worst(&self, machine: &Emulator) -> Result<f32> {
            let (&Norms { kind, shape: (rows, width), dtypes: (dtype, weight_dtype), adds, seed }, eps) = (self, 1e-5);
            let mut next = noise(seed);
            let (x, h) = (tensor(&mut next, &[rows, width], dtype), tensor(&mut next, &[rows, width], dtype));
            let weight = tensor(&mut next, &[width], weight_dtype);
            let bias = (kind == NormKind::Layer).then(|| tensor(&mut next, &[width], weight_dtype));
            let nothing = Tensor::zeros((rows, width), dtype, &Device::Cpu)?;
            let (sums, y) = (machine.copy(&nothing)?, machine.copy(&nothing)?);
            let add_norm = AddNorm {
                kind,
                eps,
                rows,
                width,
                dtype,
                weight_dtype,
                sums,
                y,
                x: machine.copy(&x)?,
                h: adds.then(|| machine.copy(&h)).transpose()?,
                weight: machine.copy(&weight)?,
                bias: bias.as_ref().map(|bias| machine.copy(bias)).transpose()?,
            };
            // SAFETY: all of it is there.
            unsafe { add_norm.launch(machine) }?;
            let sum = if adds { (&f32s(&x) + &f32s(&h))?.to_dtype(dtype)? } else { x };
            let want = match &bias {
                None => candle_nn::ops::rms_norm(&f32s(&sum), &f32s(&weight), eps)?,
                Some(bias) => candle_nn::ops::layer_norm_slow(&f32s(&sum), &f32s(&weight), &f32s(bias), eps)?,
            };
            let of_sums = if adds { worst(&machine.read(sums, &sum), &numbers(&f32s(&sum)), dtype) } else { 0.0 };
            Ok(of_sums.max(worst(&machine.read(y, &sum), &numbers(&want), dtype)))
        }
    }

    struct Heads {
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        half: usize,
        rows: usize,
        dtype: DType,
        normed: bool,
        seed: u64,
    }

    impl Heads {
        fn worst(&self, machine: &Emulator) -> Result<f32> {
            let &Heads { heads, kv_heads, head_dim, half, rows, dtype, normed, seed } = self;
            let (mut next, eps) = (noise(seed), 1e-5);
            let all = heads + 2 * kv_heads;
            let qkv = tensor(&mut next, &[rows, all * head_dim], dtype);
            let tables = [0, 1].map(|_| tensor(&mut next, &[rows, half], dtype));
            let weights = [0, 1].map(|_| tensor(&mut next, &[head_dim], dtype));
            // Other slots keep what they have.
            let slots: Vec<u32> = (0..rows as u32).map(|row| (row * 7 + 3) % (2 * rows as u32 + 9)).collect();
            let cache = [0, 1].map(|_| tensor(&mut next, &[2 * rows + 9, kv_heads * head_dim], dtype));
            let words = machine.upload(&slots)?;
            let q = tensor(&mut next, &[rows, heads * head_dim], dtype);
            let [keys, values] = [machine.copy(&cache[0])?, machine.copy(&cache[1])?];
            let [cosines, sines] = [machine.copy(&tables[0])?, machine.copy(&tables[1])?];
            let rotate = Rotate {
                sizes: HeadSizes { heads, kv_heads, head_dim, half, eps },
                rows,
                dtype,
                q: machine.copy(&q)?,
                keys,
                values,
                qkv: machine.copy(&qkv)?,
                cosines,
                sines,
                slots: crate::cuda::Memory::address(&words),
                norms: if normed { Some([machine.copy(&weights[0])?, machine.copy(&weights[1])?]) } else { None },
            };
            // SAFETY: all of it is there.
            unsafe { rotate.launch(machine) }?;

            let heads_of = |first: usize, count: usize, which: Option<usize>| -> Result<Tensor> {
                let own = f32s(&qkv).narrow(1, first * head_dim, count * head_dim)?;
                let mut own = own.reshape((rows, count, head_dim))?;
                let Some(which) = which else { return own.reshape((rows, count * head_dim)) };
                if normed {
                    own = candle_nn::ops::rms_norm(&own.contiguous()?, &f32s(&weights[which]), eps)?;
                }
                if half > 0 {
                    let turned = own.narrow(2, 0, 2 * half)?.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
                    let turned = candle_nn::rotary_emb::rope(&turned, &f32s(&tables[0]), &f32s(&tables[1]))?;
                    let turned = turned.squeeze(0)?.transpose(0, 1)?;
                    own = Tensor::cat(&[turned, own.narrow(2, 2 * half, head_dim - 2 * half)?], 2)?;
                }
                own.reshape((rows, count * head_dim))
            };
            let want = numbers(&heads_of(0, heads, Some(0))?);
            let mut off = worst(&machine.read(rotate.q, &q), &want, dtype);
            for (which, first, at) in [(Some(1), heads, keys), (None, heads + kv_heads, values)] {
                let mut want = numbers(&f32s(&cache[usize::from(which.is_none())]));
                let (width, own) = (kv_heads * head_dim, numbers(&heads_of(first, kv_heads, which)?));
                for (row, &slot) in own.chunks_exact(width).zip(&slots) {
                    want[slot as usize * width..][..width].copy_from_slice(row);
                }
                off = off.max(worst(&machine.read(at, &q), &want, dtype));
            }
            Ok(off)
        }
    }

    fn activation_is_off_by(
        (activation, is_gated): (Activation, bool),
        (rows, width): (usize, usize),
        dtype: DType,
        seed: u64,
    ) -> Result<f32> {
        let machine = Emulator::new(LAYER, seed);
        let mut next = noise(seed);
        let x = tensor(&mut next, &[rows, width * if is_gated { 2 } else { 1 }], dtype);
        let y = machine.copy(&Tensor::zeros((rows, width), dtype, &Device::Cpu)?)?;
        let activate = Activate { activation, is_gated, rows, width, dtype, y, x: machine.copy(&x)? };
        // SAFETY: all of it is there.
        unsafe { activate.launch(&machine) }?;
        let first = f32s(&x).narrow(1, 0, width)?;
        let mut want = match activation {
            Activation::Silu => first.silu()?,
            Activation::Gelu => first.gelu_erf()?,
            Activation::GeluTanh => first.gelu()?,
            Activation::Relu => first.relu()?,
        };
        if is_gated {
            want = (want * f32s(&x).narrow(1, width, width)?)?;
        }
        Ok(worst(&machine.read(y, &x), &numbers(&want), dtype))
    }

    fn dtypes() -> impl Strategy<Value = DType> {
        prop::sample::select(vec![DType::F32, DType::F16, DType::BF16])
    }

    fn width() -> impl Strategy<Value = usize> {
        prop_oneof![1usize..300, (1usize..60).prop_map(|w| 8 * w), Just(2056usize)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn emulated_norms_equal_the_plain_formula(
            is_layer: bool,
            (rows, width, dtype, in_f32, adds, seed) in (1usize..4, width(), dtypes(), any::<bool>(), any::<bool>(), any::<u64>()),
        ) {
            let kind = if is_layer { NormKind::Layer } else { NormKind::Rms };
            // A variance of one number is nothing, and its norm anything.
            let width = if is_layer { width.max(3) } else { width };
            let dtypes = (dtype, if in_f32 { DType::F32 } else { dtype });
            let worst = Norms { kind, shape: (rows, width), dtypes, adds, seed }.worst(&Emulator::new(LAYER, seed)).unwrap();
            prop_assert!(worst <= 1.0, "off by {worst} times what rounding allows");
        }

        #[test]
        fn emulated_heads_equal_the_plain_formula(
            (heads, kv_heads, rows) in (1usize..7, 1usize..4, 1usize..5),
            (head_dim, turned) in (1usize..130).prop_flat_map(|half| (Just(2 * half), 0..=half)),
            (dtype, normed, seed) in (dtypes(), any::<bool>(), any::<u64>()),
        ) {
            let head_dim = head_dim.min(MAX_HEAD_DIM);
            let half = turned.min(head_dim / 2);
            let case = Heads { heads, kv_heads, head_dim, half, rows, dtype, normed, seed };
            let worst = case.worst(&Emulator::new(LAYER, seed)).unwrap();
            prop_assert!(worst <= 1.0, "off by {worst} times what rounding allows");
        }

        #[test]
        fn emulated_activations_equal_the_plain_formula(
            activation in prop::sample::select(vec![
                Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu]),
            (is_gated, rows, width, dtype, seed) in (any::<bool>(), 1usize..4, width(), dtypes(), any::<u64>()),
        ) {
            let worst = activation_is_off_by((activation, is_gated), (rows, width), dtype, seed).unwrap();
            prop_assert!(worst <= 1.0, "off by {worst} times what rounding allows");
        }
    }

    #[test]
    fn mistakes_in_kernels_are_found() {
        let norms = |machine: &Emulator| {
            Norms { kind: NormKind::Layer, shape: (2, 2056), dtypes: (DType::BF16, DType::F32), adds: true, seed: 5 }
                .worst(machine)
        };
        let heads = |machine: &Emulator| {
            let (head_dim, half, dtype) = (80, 30, DType::F32);
            Heads { heads: 3, kv_heads: 2, head_dim, half, rows: 3, dtype, normed: true, seed: 5 }.worst(machine)
        };
        let right = Emulator::new(LAYER, 1);
        assert!(norms(&right).unwrap() <= 1.0 && heads(&right).unwrap() <= 1.0);
        for (from, to) in [
            ("  __syncthreads();  // All have read the sums before.\n", ""),
            ("  __syncthreads();  // All warps' are there.\n", ""),
            ("if (e < count) squares +=", "squares = "),
            ("    x = sums;\n", ""),
            ("  __syncthreads();  // The other half of each pair is there.\n", ""),
            ("own[i + half] * to_float(sine[i])", "own[i + half] * to_float(sine[0])"),
            ("? keys + (slot * kv_heads + head - heads)", "? keys + (slot * kv_heads)"),
        ] {
            let machine = Emulator::mistaken(LAYER, &[(from, to)]);
            let worst = norms(&machine).and_then(|norms| Ok(norms.max(heads(&machine)?)));
            assert!(
                worst.as_ref().map_or(true, |&worst| worst > 1.0),
                "{from:?} became {to:?}, and nobody noticed: {worst:?}"
            );
        }
    }

    #[test]
    fn sizes_are_those_of_the_kernels() {
        for (name, size) in [
            ("NORM_THREADS", NORM_THREADS as usize),
            ("ROTATE_THREADS", ROTATE_THREADS as usize),
            ("ACTIVATE_THREADS", ACTIVATE_THREADS as usize),
            ("MAX_HEAD_DIM", MAX_HEAD_DIM),
        ] {
            assert!(LAYER.contains(&format!("constexpr unsigned {name} = {size};")), "{name}");
        }
    }
}
