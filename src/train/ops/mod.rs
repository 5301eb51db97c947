//! Differentiable operations on rows of packed sequences.
//!
//! Sequences lie one after the other in the rows, without padding. On a CPU the operations are plain functions on f32, a
//! forward and a backward one each, from which [`super::layer`] is put together; on other devices, and in other numbers, they
//! are made of candle's operations, whose gradients candle knows.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod loss;
pub mod norm;
mod rope;
pub mod swiglu;

pub use attention::{Heads, attention};
pub use loss::{Targets, cross_entropy, linear_cross_entropy};
pub use norm::rms_norm;
pub use rope::{Rope, rope};

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Whether the functions on f32 here are for it; candle's operations are for other numbers and devices.
pub fn is_plain_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// The numbers of a contiguous f32 tensor in memory.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        (CpuStorage::F32(_), None) => bail!("a contiguous tensor was expected"),
        _ => bail!("an f32 tensor was expected"),
    }
}

/// The numbers of a contiguous f32 tensor in memory, to be changed.
pub fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        (CpuStorage::F32(_), None) => bail!("a contiguous tensor was expected"),
        _ => bail!("an f32 tensor was expected"),
    }
}

/// The numbers of a contiguous f32 tensor in memory, borrowed.
pub fn numbers(tensor: &Tensor) -> Result<impl Deref<Target = [f32]>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a contiguous tensor was expected") };
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        bail!("a tensor of f32 in memory was expected");
    }
    Ok(Numbers { storage, range: start..end })
}

/// A guard of a tensor's storage, and where its numbers are.
struct Numbers<G> {
    storage: G,
    range: Range<usize>,
}

impl<G: Deref<Target = Storage>> Deref for Numbers<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            _ => &[],
        }
    }
}

/// A matrix in memory, with the distances of its rows and of its columns.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub column: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `width` numbers, one after the other.
    pub fn rows(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: width, column: 1 }
    }

    /// The transpose of rows of `width` numbers.
    pub fn columns(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: 1, column: width }
    }

    fn covers(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.data.len()
    }
}

/// Rows of results, `stride` apart; they are added to what is there, or replace it.
pub struct Target<'a> {
    pub data: &'a mut [f32],
    pub stride: usize,
    pub add: bool,
}

impl<'a> Target<'a> {
    /// Results are added to rows of `width` numbers.
    pub fn sum(data: &'a mut [f32], width: usize) -> Self {
        Target { data, stride: width, add: true }
    }
}

/// `out (+)= alpha * a b` for `a` of `m` by `k` and `b` of `k` by `n`. The order of the sums does not depend on the number of
/// threads, so results repeat to the last bit.
///
/// # Panics
/// If a slice is too short.
pub fn multiply((m, n, k): (usize, usize, usize), a: Matrix, b: Matrix, alpha: f32, out: Target, parallel: bool) {
    assert!(a.covers(m, k) && b.covers(k, n) && m > 0 && n > 0);
    assert!((m - 1) * out.stride + n <= out.data.len());
    #[cfg(target_arch = "x86_64")]
    if amx::suits((m, n, k), &a, &b) {
        return amx::multiply((m, n, k), a, b, alpha, out, parallel);
    }
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the asserts keep every access inside the slices; `out` is borrowed for writing.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.data.as_mut_ptr(),
            1,
            out.stride as isize,
            out.add,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            1.0f32,
            alpha,
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(test)]
pub mod testing {
    use candle_core::{Device, Result, Tensor, Var};

    /// Numbers in -1..1, the same for the same seed.
    pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2) | 1;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    pub fn var(seed: u64, shape: &[usize]) -> Var {
        let tensor = Tensor::from_vec(numbers(seed, shape.iter().product()), shape, &Device::Cpu).unwrap();
        Var::from_tensor(&tensor).unwrap()
    }

    /// Compares an operation's gradients with difference quotients and with candle's gradients of `plain`, the same made of
    /// candle's operations. `inputs` are seeds and shapes of random inputs, `dy` the gradient of the output.
    pub fn check<const N: usize>(
        inputs: [(u64, &[usize]); N],
        dy: &[f32],
        forward: impl Fn([&[f32]; N]) -> Vec<f32>,
        backward: impl Fn([&[f32]; N]) -> [Vec<f32>; N],
        plain: impl Fn([&Tensor; N]) -> Result<Tensor>,
    ) {
        let vars = inputs.map(|(seed, shape)| var(seed, shape));
        let mut x = inputs.map(|(seed, shape)| numbers(seed, shape.iter().product()));
        let near = |a: f32, b: f32, tolerance: f32, what: &str| {
            assert!((a - b).abs() < tolerance * (1.0 + b.abs()), "{what}: {a}, not {b}");
        };
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let y = plain(vars.each_ref().map(Var::as_tensor)).unwrap();
        let got = forward(x.each_ref().map(Vec::as_slice));
        got.iter().zip(flat(&y)).for_each(|(g, w)| near(*g, w, 1e-4, "output"));
        let weights = Tensor::from_slice(dy, y.shape(), &Device::Cpu).unwrap();
        let by_candle = (y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let gradients = backward(x.each_ref().map(Vec::as_slice));
        for i in 0..N {
            let want = flat(by_candle.get(&vars[i]).unwrap());
            assert_eq!(gradients[i].len(), want.len());
            for at in 0..want.len() {
                let what = format!("input {i}, {at}");
                near(gradients[i][at], want[at], 1e-4, &what);
                let (before, step) = (x[i][at], 1e-2);
                let mut moved = |by: f32| {
                    x[i][at] = before + by;
                    let y = forward(x.each_ref().map(Vec::as_slice));
                    y.iter().zip(dy).map(|(y, d)| (y * d) as f64).sum::<f64>()
                };
                let quotient = ((moved(step) - moved(-step)) / (2.0 * step as f64)) as f32;
                x[i][at] = before;
                near(gradients[i][at], quotient, 2e-2, &what);
            }
        }
    }

    /// Compares the gradients of `f`, a scalar, at `vars` with differences quotients, and `f` with `plain`, which is made
    /// of candle's own operations.
    pub fn check_graph(vars: &[Var], f: impl Fn() -> Result<Tensor>, plain: impl Fn() -> Result<Tensor>) {
        let value = |t: Result<Tensor>| t.unwrap().to_scalar::<f32>().unwrap();
        let (got, want) = (value(f()), value(plain()));
        assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{got}, not {want}");
        let (grads, plain_grads) = (f().unwrap().backward().unwrap(), plain().unwrap().backward().unwrap());
        for (v, var) in vars.iter().enumerate() {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let got = flat(grads.get(var).unwrap_or_else(|| panic!("variable {v} has no gradient")));
            let by_candle = flat(plain_grads.get(var).unwrap());
            let at = flat(var.as_tensor());
            let set = |numbers: Vec<f32>| {
                var.set(&Tensor::from_vec(numbers, var.shape(), &Device::Cpu).unwrap()).unwrap();
            };
            for i in 0..at.len() {
                let step = 1e-2;
                let moved = |by: f32| {
                    let mut numbers = at.clone();
                    numbers[i] += by;
                    set(numbers);
                    value(f())
                };
                let quotient = (moved(step) - moved(-step)) / (2.0 * step);
                set(at.clone());
                assert!(
                    (got[i] - by_candle[i]).abs() < 1e-4 * (1.0 + by_candle[i].abs()),
                    "variable {v}, {i}: {} {}",
                    got[i],
                    by_candle[i]
                );
                assert!(
                    (got[i] - quotient).abs() < 2e-2 * (1.0 + quotient.abs()),
                    "variable {v}, {i}: {} {quotient}",
                    got[i]
                );
            }
        }
    }
}
