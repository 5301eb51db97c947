//! The decoder: token ids in, hidden states and logits out, for any mix of sequences.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::base::attention::{self, Rope, SequenceRows};
use crate::base::kv::KvCache;
use crate::base::matmul::{self, Format, PackedMatrix, Product};
use crate::base::simd::{self, Simd};
use crate::base::{ModelConfig, Module, NormSite, Projection, Weights};
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

    /// The layer that a projection is a part of.
    pub fn of(projection: Projection) -> Self {
        match projection {
            Projection::Q | Projection::K | Projection::V => Site::Qkv,
            Projection::O => Site::O,
            Projection::Gate | Projection::Up => Site::GateUp,
            Projection::Down => Site::Down,
        }
    }

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

/// What the adapters of some rows change. Rows that no adapter changes keep the base's result.
pub trait Delta {
    /// `y += delta(x)`; `x` is `[rows, in_features]`, `y` is `[rows, out_features]`, both row-major.
    fn add(&self, layer: usize, site: Site, x: &[f32], y: &mut [f32], rows: usize);
    /// The same for tensors on a device.
    fn add_tensor(&self, layer: usize, site: Site, x: &Tensor, y: Tensor) -> Result<Tensor>;

    /// Rows whose adapter has its own weights for a norm.
    fn norms(&self, site: NormSite) -> Vec<(Range<usize>, &Norm)>;

    /// Changes the embeddings `x`, `[rows, hidden_size]`. A token that the base does not know is the adapter's to write.
    fn embed(&self, tokens: &[u32], x: &mut [f32]);
    fn embed_tensor(&self, tokens: &[u32], x: Tensor) -> Result<Tensor>;

    /// The largest vocabulary of the rows' adapters.
    fn vocab_size(&self) -> usize;
    /// Rows whose logits begin with the base's; the others' are the adapter's alone.
    fn base_logits(&self, rows: usize) -> Vec<Range<usize>>;
    /// Changes the logits `y`, `[rows, width]`, of final states `x`, `[rows, hidden_size]`.
    fn logits(&self, x: &[f32], y: &mut [f32], rows: usize);
    fn logits_tensor(&self, x: &Tensor, y: Tensor) -> Result<Tensor>;
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

/// The weights of a norm, for the decoder's kernels.
#[derive(Debug)]
pub struct Norm {
    weight: Vec<f32>,
    tensor: Option<Tensor>,
}

impl Norm {
    pub fn new(weight: Vec<f32>, options: &DecoderOptions) -> Result<Self> {
        let tensor = match options.kernels {
            Kernels::Packed(_) => None,
            Kernels::Tensor => Some(Tensor::new(weight.as_slice(), &options.device)?.to_dtype(options.dtype)?),
        };
        Ok(Norm { weight, tensor })
    }

    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        4 * self.weight.len() + self.tensor.as_ref().map_or(0, |t| t.elem_count() * t.dtype().size_in_bytes())
    }
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
        Norm::new(raw.to_f32()?, self.options)
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
        let norm = |site: NormSite| loader.norm(&format!("{}.weight", site.name()), c.hidden_size);
        let vocabulary = (c.vocab_size, c.hidden_size);
        let layer = |l: usize| -> Result<Layer> {
            Ok(Layer {
                input_norm: norm(NormSite::Input(l))?,
                qkv: site(l, Site::Qkv)?,
                o: site(l, Site::O)?,
                post_norm: norm(NormSite::PostAttention(l))?,
                gate_up: site(l, Site::GateUp)?,
                down: site(l, Site::Down)?,
            })
        };
        let embedding = loader.linear(&[("model.embed_tokens.weight".into(), vocabulary)])?;
        let layers = (0..c.layers).map(layer).collect::<Result<_>>()?;
        let norm = norm(NormSite::Final)?;
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

    /// The numbers of a matrix as they are served, `[out_features, in_features]`; of the embedding
    /// `[vocab_size, hidden_size]`.
    pub fn weights(&self, module: Module) -> Result<Vec<f32>> {
        let c = &self.config;
        // The matrix, those before it in the same layer, its shape.
        let (linear, before, (n, k)) = match module {
            Module::Linear(l, projection) => {
                let (layer, site) = (&self.layers[l], Site::of(projection));
                let linear = match site {
                    Site::Qkv => &layer.qkv,
                    Site::O => &layer.o,
                    Site::GateUp => &layer.gate_up,
                    Site::Down => &layer.down,
                };
                let before = site.projections().iter().take_while(|&&p| p != projection);
                (linear, before.copied().collect::<Vec<_>>(), c.shape(projection))
            }
            Module::Embedding => (&self.embedding, vec![], (c.vocab_size, c.hidden_size)),
            Module::LmHead => (self.lm_head.as_ref().unwrap_or(&self.embedding), vec![], (c.vocab_size, c.hidden_size)),
        };
        match linear {
            Linear::Packed(parts) => {
                let mut rows = vec![0.0; n * k];
                let part = &parts[before.len()];
                rows.par_chunks_exact_mut(k).enumerate().for_each(|(row, out)| part.row(row, out));
                Ok(rows)
            }
            Linear::Tensor(t) => {
                let first = before.iter().map(|&p| c.shape(p).0).sum();
                Ok(t.narrow(0, first, n)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
            }
        }
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
    /// positions are in `cache` already, those of its rows are written to it. `wanted` is in ascending order.
    pub fn forward(
        &self,
        tokens: &[u32],
        sequences: &[SequenceRows],
        cache: &mut KvCache,
        delta: &dyn Delta,
        wanted: &[usize],
    ) -> Result<Vec<f32>> {
        let rope = Rope::new(&self.config, sequences);
        let mut x = self.embed(tokens, delta)?;
        for (l, layer) in self.layers.iter().enumerate() {
            let h = self.norm(&x, &layer.input_norm, &delta.norms(NormSite::Input(l)))?;
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
            let h = self.norm(&x, &layer.post_norm, &delta.norms(NormSite::PostAttention(l)))?;
            let gate_up = self.linear(&layer.gate_up, l, Site::GateUp, &h, delta)?;
            let h = self.silu_mul(gate_up)?;
            add(&mut x, self.linear(&layer.down, l, Site::Down, &h, delta)?)?;
        }
        if wanted.is_empty() {
            return Ok(vec![]);
        }
        let place = |row: usize| wanted.partition_point(|&w| w < row);
        let own: Vec<_> = delta.norms(NormSite::Final);
        let own: Vec<_> = own.into_iter().map(|(rows, norm)| (place(rows.start)..place(rows.end), norm)).collect();
        let x = self.norm(&select(x, wanted)?, &self.norm, &own)?;
        match x {
            Rows::Host { data, .. } => Ok(data),
            Rows::Device(t) => Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?),
        }
    }

    /// Logits `[rows, width]` of final hidden states `[rows, hidden_size]`, `width` being the largest vocabulary among
    /// the base's and those of the rows' adapters. What a row has beyond its own vocabulary means nothing.
    pub fn logits(&self, hidden: &[f32], delta: &dyn Delta) -> Result<Vec<f32>> {
        let (k, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let (rows, width) = (hidden.len() / k, vocab.max(delta.vocab_size()));
        match (self.lm_head.as_ref().unwrap_or(&self.embedding), self.options.kernels) {
            (Linear::Packed(parts), Kernels::Packed(simd)) => {
                let mut y = vec![0.0; rows * width];
                let base = delta.base_logits(rows).into_iter();
                let product = |rows| Product { matrix: &parts[0], rows, x_column: 0, y_column: 0, scale: 1.0 };
                matmul::multiply(simd, &base.map(product).collect::<Vec<_>>(), hidden, k, &mut y, width);
                delta.logits(hidden, &mut y, rows);
                Ok(y)
            }
            (Linear::Tensor(w), _) => {
                let x = Tensor::from_slice(hidden, (rows, k), &self.options.device)?.to_dtype(self.options.dtype)?;
                let y = x.matmul(&w.t()?)?.pad_with_zeros(1, 0, width - vocab)?;
                let y = delta.logits_tensor(&x, y)?;
                Ok(y.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
            }
            _ => unreachable!("packed weights are for packed kernels"),
        }
    }

    fn embed(&self, tokens: &[u32], delta: &dyn Delta) -> Result<Rows> {
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        match &self.embedding {
            Linear::Packed(parts) => {
                let mut data = vec![0.0; tokens.len() * width];
                for (row, &token) in data.chunks_exact_mut(width).zip(tokens) {
                    if (token as usize) < vocab {
                        parts[0].row(token as usize, row);
                    }
                }
                delta.embed(tokens, &mut data);
                Ok(Rows::Host { data, width })
            }
            Linear::Tensor(t) => {
                let known: Vec<u32> = tokens.iter().map(|&token| token.min(vocab as u32 - 1)).collect();
                let x = t.index_select(&Tensor::new(known, t.device())?, 0)?;
                Ok(Rows::Device(delta.embed_tensor(tokens, x)?))
            }
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

    /// A norm of all rows; those with weights of their own go by these.
    fn norm(&self, x: &Rows, base: &Norm, own: &[(Range<usize>, &Norm)]) -> Result<Rows> {
        let mut out = self.rms_norm(x, base)?;
        for (rows, norm) in own.iter().filter(|(rows, _)| !rows.is_empty()) {
            let part = self.rms_norm(&x.narrow(rows)?, norm)?;
            out.replace(rows, part)?;
        }
        Ok(out)
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

impl Rows {
    fn narrow(&self, rows: &Range<usize>) -> Result<Rows> {
        Ok(match self {
            Rows::Host { data, width } => {
                Rows::Host { data: data[rows.start * width..rows.end * width].to_vec(), width: *width }
            }
            Rows::Device(t) => Rows::Device(t.narrow(0, rows.start, rows.len())?),
        })
    }

    fn replace(&mut self, rows: &Range<usize>, with: Rows) -> Result<()> {
        match (self, with) {
            (Rows::Host { data, width }, Rows::Host { data: with, .. }) => {
                data[rows.start * *width..rows.end * *width].copy_from_slice(&with);
            }
            (Rows::Device(t), Rows::Device(with)) => *t = t.slice_assign(&[rows.clone(), 0..t.dims()[1]], &with)?,
            _ => unreachable!("rows are where the weights are"),
        }
        Ok(())
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
