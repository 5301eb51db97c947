//! The decoder: token ids in, hidden states and logits out, for any mix of sequences.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::base::attention::{self, Rope, SequenceRows};
use crate::base::kv::KvCache;
use crate::base::matmul::{self, Format, PackedMatrix, Product};
use crate::base::simd::{self, Simd};
use crate::base::{ModelConfig, Projection, Weights};
use crate::{Error, Result};

/// The linear layers of a block after fusion. An adapter's delta is added at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Site {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Site {
    pub const ALL: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

    /// The projections whose outputs lie side by side in this layer's output.
    pub fn projections(self) -> &'static [Projection] {
        match self {
            Site::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Site::O => &[Projection::O],
            Site::GateUp => &[Projection::Gate, Projection::Up],
            Site::Down => &[Projection::Down],
        }
    }
}

/// What is added to the output of the base's linear layers: the adapters' part of a step.
pub trait Delta {
    /// `y += delta(x)`; `x` is `[rows, in_features]`, `y` is `[rows, out_features]`, both row-major.
    fn add(&self, layer: usize, site: Site, x: &[f32], y: &mut [f32], rows: usize);
    /// The same for tensors on a device.
    fn add_tensor(&self, layer: usize, site: Site, x: &Tensor, y: Tensor) -> Result<Tensor>;
}

/// The base alone.
pub struct NoDelta;

impl Delta for NoDelta {
    fn add(&self, _: usize, _: Site, _: &[f32], _: &mut [f32], _: usize) {}
    fn add_tensor(&self, _: usize, _: Site, _: &Tensor, y: Tensor) -> Result<Tensor> {
        Ok(y)
    }
}

/// Which implementation computes the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Our own loops over packed weights, on the CPU.
    Packed(Simd),
    /// candle's operations, on any device.
    Tensor,
}

impl Kernels {
    pub fn for_device(device: &Device) -> Self {
        if device.is_cpu() { Kernels::Packed(Simd::detect()) } else { Kernels::Tensor }
    }
}

/// How to hold the weights.
#[derive(Debug, Clone)]
pub struct DecoderOptions {
    pub device: Device,
    pub kernels: Kernels,
    /// Format of the matrices for [`Kernels::Packed`]; `None` keeps what the file holds.
    pub format: Option<Format>,
    /// Numbers of [`Kernels::Tensor`].
    pub dtype: DType,
}

/// One or more matrices with the same input, their outputs side by side.
enum Linear {
    Packed(Vec<PackedMatrix>),
    /// `[out_features, in_features]`.
    Tensor(Tensor),
}

/// Rows of activations.
enum Rows {
    Host { data: Vec<f32>, width: usize },
    Device(Tensor),
}

struct Layer {
    input_norm: Norm,
    qkv: Linear,
    o: Linear,
    post_norm: Norm,
    gate_up: Linear,
    down: Linear,
}

struct Norm {
    weight: Vec<f32>,
    tensor: Option<Tensor>,
}

pub struct Decoder {
    config: ModelConfig,
    options: DecoderOptions,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Norm,
    /// `None` where it is the embedding.
    lm_head: Option<Linear>,
}

struct Loader<'a> {
    weights: &'a Weights,
    options: &'a DecoderOptions,
}

impl Loader<'_> {
    /// Several matrices `[out_features, in_features]` with one input.
    fn linear(&self, parts: &[(String, (usize, usize))]) -> Result<Linear> {
        let mut packed = Vec::new();
        let mut tensors = Vec::new();
        for (name, (n, k)) in parts {
            let raw = self.weights.get(name)?;
            if raw.shape != [*n, *k] {
                return Err(Error::unprocessable(format!(
                    "base weights: {name} has shape {:?}, the config says [{n}, {k}]",
                    raw.shape
                )));
            }
            let named = |e: Error| e.context(format!("base weights: {name}"));
            match self.options.kernels {
                Kernels::Packed(_) => packed.push(PackedMatrix::from_raw(&raw, self.options.format).map_err(named)?),
                Kernels::Tensor => {
                    let t = Tensor::from_vec(raw.to_f32().map_err(named)?, (*n, *k), &Device::Cpu)?;
                    tensors.push(t.to_dtype(self.options.dtype)?.to_device(&self.options.device)?);
                }
            }
        }
        Ok(match self.options.kernels {
            Kernels::Packed(_) => Linear::Packed(packed),
            Kernels::Tensor => Linear::Tensor(Tensor::cat(&tensors, 0)?),
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let raw = self.weights.get(name)?;
        if raw.shape != [width] {
            return Err(Error::unprocessable(format!(
                "base weights: {name} has shape {:?}, the config says [{width}]",
                raw.shape
            )));
        }
        let weight = raw.to_f32()?;
        let tensor = match self.options.kernels {
            Kernels::Packed(_) => None,
            Kernels::Tensor => {
                Some(Tensor::new(weight.as_slice(), &self.options.device)?.to_dtype(self.options.dtype)?)
            }
        };
        Ok(Norm { weight, tensor })
    }
}

impl Decoder {
    pub fn load(config: &ModelConfig, weights: &Weights, options: DecoderOptions) -> Result<Self> {
        let loader = Loader { weights, options: &options };
        let c = config;
        let site = |layer: usize, site: Site| {
            let parts = site.projections().iter();
            let parts: Vec<_> =
                parts.map(|&p| (format!("model.layers.{layer}.{}.weight", p.path()), c.shape(p))).collect();
            loader.linear(&parts)
        };
        let vocabulary = (c.vocab_size, c.hidden_size);
        let layer = |l: usize| -> Result<Layer> {
            Ok(Layer {
                input_norm: loader.norm(&format!("model.layers.{l}.input_layernorm.weight"), c.hidden_size)?,
                qkv: site(l, Site::Qkv)?,
                o: site(l, Site::O)?,
                post_norm: loader.norm(&format!("model.layers.{l}.post_attention_layernorm.weight"), c.hidden_size)?,
                gate_up: site(l, Site::GateUp)?,
                down: site(l, Site::Down)?,
            })
        };
        let embedding = loader.linear(&[("model.embed_tokens.weight".into(), vocabulary)])?;
        let layers = (0..c.layers).map(layer).collect::<Result<_>>()?;
        let norm = loader.norm("model.norm.weight", c.hidden_size)?;
        let lm_head = match c.tie_word_embeddings {
            true => None,
            false => Some(loader.linear(&[("lm_head.weight".into(), vocabulary)])?),
        };
        Ok(Decoder { config: config.clone(), embedding, layers, norm, lm_head, options })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn options(&self) -> &DecoderOptions {
        &self.options
    }

    /// Memory of the weights.
    pub fn bytes(&self) -> usize {
        let linear = |l: &Linear| match l {
            Linear::Packed(parts) => parts.iter().map(PackedMatrix::bytes).sum(),
            Linear::Tensor(t) => t.elem_count() * t.dtype().size_in_bytes(),
        };
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        let norms = (2 * self.layers.len() + 1) * 4 * self.config.hidden_size;
        layers.chain([&self.embedding]).chain(&self.lm_head).map(linear).sum::<usize>() + norms
    }

    /// The formats that the packed matrices have, for people.
    pub fn stored_as(&self) -> String {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        let mut names = Vec::new();
        for linear in layers.chain([&self.embedding]).chain(&self.lm_head) {
            if let Linear::Packed(parts) = linear {
                names.extend(parts.iter().map(|m| format!("{:?}", m.format()).to_lowercase()));
            }
        }
        names.sort();
        names.dedup();
        names.join("+")
    }

    /// A cache of as many blocks as fit into `bytes`, at least one.
    pub fn cache(&self, bytes: usize) -> Result<KvCache> {
        let (plain, dtype) = match self.options.kernels {
            Kernels::Packed(_) => (false, DType::F32),
            Kernels::Tensor => (true, self.options.dtype),
        };
        let blocks = (bytes / KvCache::block_bytes(&self.config, plain, dtype)).max(1);
        match self.options.kernels {
            Kernels::Packed(_) => Ok(KvCache::packed(&self.config, blocks)),
            Kernels::Tensor => KvCache::tensors(&self.config, blocks, dtype, &self.options.device),
        }
    }

    /// Computes one step and returns the final hidden states of the rows in `wanted`: `[wanted, hidden_size]`.
    ///
    /// `tokens` holds one id per row; `sequences` cover all rows; the keys and values of each sequence's earlier
    /// positions are in `cache` already, those of its rows are written to it.
    pub fn forward(
        &self,
        tokens: &[u32],
        sequences: &[SequenceRows],
        cache: &mut KvCache,
        delta: &dyn Delta,
        wanted: &[usize],
    ) -> Result<Vec<f32>> {
        let rope = Rope::new(&self.config, sequences);
        let mut x = self.embed(tokens)?;
        for (l, layer) in self.layers.iter().enumerate() {
            let h = self.rms_norm(&x, &layer.input_norm)?;
            let qkv = self.linear(&layer.qkv, l, Site::Qkv, &h, delta)?;
            let cache = &mut cache.layers[l];
            let h = match (&qkv, self.options.kernels) {
                (Rows::Host { data, .. }, Kernels::Packed(simd)) => {
                    let data = attention::packed(simd, &self.config, &rope, sequences, data, cache);
                    Rows::Host { data, width: self.config.heads * self.config.head_dim }
                }
                (Rows::Device(qkv), _) => Rows::Device(attention::tensors(&self.config, &rope, sequences, qkv, cache)?),
                _ => unreachable!("host rows are made by the packed kernels"),
            };
            add(&mut x, self.linear(&layer.o, l, Site::O, &h, delta)?)?;
            let h = self.rms_norm(&x, &layer.post_norm)?;
            let gate_up = self.linear(&layer.gate_up, l, Site::GateUp, &h, delta)?;
            let h = self.silu_mul(gate_up)?;
            add(&mut x, self.linear(&layer.down, l, Site::Down, &h, delta)?)?;
        }
        if wanted.is_empty() {
            return Ok(vec![]);
        }
        let x = self.rms_norm(&select(x, wanted)?, &self.norm)?;
        match x {
            Rows::Host { data, .. } => Ok(data),
            Rows::Device(t) => Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?),
        }
    }

    /// Logits `[rows, vocab_size]` of final hidden states `[rows, hidden_size]`.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let width = self.config.hidden_size;
        let x = match self.options.kernels {
            Kernels::Packed(_) => Rows::Host { data: hidden.to_vec(), width },
            Kernels::Tensor => {
                let t = Tensor::from_slice(hidden, (hidden.len() / width, width), &self.options.device)?;
                Rows::Device(t.to_dtype(self.options.dtype)?)
            }
        };
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        match self.linear(head, 0, Site::O, &x, &NoDelta)? {
            Rows::Host { data, .. } => Ok(data),
            Rows::Device(t) => Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?),
        }
    }

    fn embed(&self, tokens: &[u32]) -> Result<Rows> {
        let width = self.config.hidden_size;
        match &self.embedding {
            Linear::Packed(parts) => {
                let mut data = vec![0.0; tokens.len() * width];
                for (row, &token) in data.chunks_exact_mut(width).zip(tokens) {
                    parts[0].row(token as usize, row);
                }
                Ok(Rows::Host { data, width })
            }
            Linear::Tensor(t) => Ok(Rows::Device(t.index_select(&Tensor::new(tokens, t.device())?, 0)?)),
        }
    }

    fn linear(&self, linear: &Linear, layer: usize, site: Site, x: &Rows, delta: &dyn Delta) -> Result<Rows> {
        match (linear, x, self.options.kernels) {
            (Linear::Packed(parts), Rows::Host { data: x, width: k }, Kernels::Packed(simd)) => {
                let (rows, n) = (x.len() / k, parts.iter().map(PackedMatrix::n).sum());
                let mut y = vec![0.0; rows * n];
                let mut y_column = 0;
                let mut products = Vec::with_capacity(parts.len());
                for matrix in parts {
                    products.push(Product { matrix, rows: 0..rows, x_column: 0, y_column, scale: 1.0 });
                    y_column += matrix.n();
                }
                matmul::multiply(simd, &products, x, *k, &mut y, n);
                delta.add(layer, site, x, &mut y, rows);
                Ok(Rows::Host { data: y, width: n })
            }
            (Linear::Tensor(w), Rows::Device(x), _) => {
                Ok(Rows::Device(delta.add_tensor(layer, site, x, x.matmul(&w.t()?)?)?))
            }
            _ => unreachable!("rows are where the weights are"),
        }
    }

    /// `x / sqrt(mean(x²) + eps) * weight` (arXiv 1910.07467), row by row.
    fn rms_norm(&self, x: &Rows, norm: &Norm) -> Result<Rows> {
        match (x, &norm.tensor) {
            (Rows::Host { data, width }, _) => {
                let Kernels::Packed(simd) = self.options.kernels else {
                    unreachable!("host rows are for packed kernels")
                };
                let mut out = vec![0.0; data.len()];
                for (out, x) in out.chunks_exact_mut(*width).zip(data.chunks_exact(*width)) {
                    simd::rms_norm(simd, x, &norm.weight, self.config.rms_norm_eps as f32, out);
                }
                Ok(Rows::Host { data: out, width: *width })
            }
            (Rows::Device(x), Some(w)) => {
                Ok(Rows::Device(candle_nn::ops::rms_norm(&x.contiguous()?, w, self.config.rms_norm_eps as f32)?))
            }
            _ => unreachable!("rows are where the weights are"),
        }
    }

    fn silu_mul(&self, gate_up: Rows) -> Result<Rows> {
        let width = self.config.intermediate_size;
        match (gate_up, self.options.kernels) {
            (Rows::Host { data, .. }, Kernels::Packed(simd)) => {
                let mut out = vec![0.0; data.len() / 2];
                let row = |(out, x): (&mut [f32], &[f32])| simd::silu_mul(simd, &x[..width], &x[width..], out);
                if out.len() < 1 << 15 {
                    out.chunks_exact_mut(width).zip(data.chunks_exact(2 * width)).for_each(row);
                } else {
                    out.par_chunks_exact_mut(width).zip(data.par_chunks_exact(2 * width)).for_each(row);
                }
                Ok(Rows::Host { data: out, width })
            }
            (Rows::Device(t), _) => {
                let (gate, up) = (t.narrow(1, 0, width)?.contiguous()?, t.narrow(1, width, width)?.contiguous()?);
                Ok(Rows::Device((gate.silu()? * up)?))
            }
            _ => unreachable!("host rows are made by the packed kernels"),
        }
    }
}

/// `x += y`.
fn add(x: &mut Rows, y: Rows) -> Result<()> {
    match (x, y) {
        (Rows::Host { data: x, .. }, Rows::Host { data: y, .. }) => x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
        (Rows::Device(x), Rows::Device(y)) => *x = (&*x + y)?,
        _ => unreachable!("rows are where the weights are"),
    }
    Ok(())
}

fn select(x: Rows, wanted: &[usize]) -> Result<Rows> {
    match x {
        Rows::Host { data, width } => {
            let data = wanted.iter().flat_map(|&row| &data[row * width..][..width]).copied().collect();
            Ok(Rows::Host { data, width })
        }
        Rows::Device(t) => {
            let index: Vec<u32> = wanted.iter().map(|&row| row as u32).collect();
            let index = Tensor::new(index, t.device())?;
            Ok(Rows::Device(t.index_select(&index, 0)?))
        }
    }
}
