//! The decoder, which is an encoder as well: token ids in, hidden states and logits out, for any mix of sequences.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::base::attention::{self, Attention, Rotation, SequenceRows, StepTensors};
use crate::base::buffer::Buffer;
use crate::base::flash;
#[cfg(feature = "cuda")]
use crate::base::fused;
use crate::base::kv::{BLOCK, KvCache};
use crate::base::matmul::{Format, PackedMatrix};
use crate::base::parallel;
use crate::base::products::{self, Batch, Product, Rest};
use crate::base::simd::{self, Simd};
use crate::base::{Activation, LM_HEAD, ModelConfig, Module, NormKind, NormSite, Projection, RawTensor, Site, Weights};
use crate::{Error, Result};

/// What the adapters of some rows change. Rows that no adapter changes keep the base's result.
pub trait Delta {
    /// Products of a fused layer's input that the delta begins with, and the width of their rows.
    fn down(&self, layer: usize, site: Site) -> (Vec<Product<'_>>, usize);
    /// Products of what came of [`Delta::down`], to be added to the layer's outputs.
    fn up(&self, layer: usize, site: Site) -> Vec<Product<'_>>;
    /// Whether [`Delta::finish`] changes anything.
    fn finishes(&self, layer: usize, site: Site) -> bool;
    /// Changes the outputs `y`, `[rows, out_features]`, when both are in them; the base's bias, if there is one, is added
    /// afterwards.
    fn finish(&self, layer: usize, site: Site, y: &mut [f32], rows: usize);
    /// `y += delta(x)` for tensors on a device: `x` is `[rows, in_features]`, `y` is `[rows, out_features]`.
    fn add_tensor(&self, layer: usize, site: Site, x: &Tensor, y: Tensor) -> Result<Tensor>;

    /// The delta of some rows of the step, in ascending order.
    fn only(&self, rows: &[usize]) -> Box<dyn Delta + '_>;

    /// Rows whose adapter has its own weights for a norm.
    fn norms(&self, site: NormSite) -> Vec<(Range<usize>, &Norm)>;

    /// Changes the embeddings `x`, `[rows, hidden_size]`, before they are scaled. A token that the base does not know is
    /// the adapter's to write.
    fn embed(&self, tokens: &[u32], x: &mut [f32]);
    fn embed_tensor(&self, tokens: &[u32], x: Tensor) -> Result<Tensor>;

    /// The largest vocabulary of the rows' adapters.
    fn vocab_size(&self) -> usize;
    /// Rows whose logits begin with the base's; the others' are the adapter's alone.
    fn base_logits(&self, rows: usize) -> Vec<Range<usize>>;
    /// Changes the logits `y`, `[rows, width]`, of final states `x`, `[rows, hidden_size]`, before they are capped.
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
enum Matrices {
    Packed(Vec<PackedMatrix>),
    /// `[out_features, in_features]`.
    Tensor(Tensor),
}

/// Numbers that are the same for every row.
#[derive(Debug)]
enum Vector {
    Host(Vec<f32>),
    Device(Tensor),
}

struct Linear {
    matrices: Matrices,
    /// Of all outputs.
    bias: Option<Vector>,
}

/// Rows of activations, or of logits, where they were computed.
pub enum Rows {
    Host { data: Buffer, width: usize },
    Device(Tensor),
}

/// What a linear layer gives, but for the rest.
struct Outputs<'a> {
    rows: Rows,
    /// Numbers of a row; on the host others may follow, which mean nothing.
    width: usize,
    rest: Option<Rest<'a>>,
}

impl Outputs<'_> {
    fn whole(self) -> Rows {
        let Outputs { mut rows, width, rest } = self;
        if let (Some(rest), Rows::Host { data, .. }) = (rest, &mut rows) {
            rest.add_all(data);
        }
        match rows {
            Rows::Host { data, width: stride } if stride > width => {
                let mut close = Buffer::new(data.len() / stride * width);
                let rows = close.chunks_exact_mut(width).zip(data.chunks_exact(stride));
                rows.for_each(|(close, row)| close.copy_from_slice(&row[..width]));
                Rows::Host { data: close, width }
            }
            rows => rows,
        }
    }
}

impl From<Rows> for Outputs<'_> {
    fn from(rows: Rows) -> Self {
        let width = match &rows {
            Rows::Host { width, .. } => *width,
            Rows::Device(t) => t.dims()[1],
        };
        Outputs { rows, width, rest: None }
    }
}

/// A norm's weights, for the decoder's kernels.
#[derive(Debug)]
pub struct Norm {
    kind: NormKind,
    eps: f32,
    weight: Vector,
    bias: Option<Vector>,
}

struct Layer {
    attention_norm: Norm,
    /// Of q and of k.
    head_norms: Option<[Norm; 2]>,
    qkv: Linear,
    o: Linear,
    attention_post_norm: Option<Norm>,
    mlp_norm: Norm,
    gate_up: Linear,
    down: Linear,
    mlp_post_norm: Option<Norm>,
}

impl Layer {
    fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    fn norms(&self) -> impl Iterator<Item = &Norm> {
        let always = [&self.attention_norm, &self.mlp_norm];
        let post = self.attention_post_norm.iter().chain(&self.mlp_post_norm);
        always.into_iter().chain(post).chain(self.head_norms.iter().flatten())
    }
}

pub struct Decoder {
    config: ModelConfig,
    options: DecoderOptions,
    embedding: Linear,
    /// Learned positions, added to the embedding.
    positions: Option<Linear>,
    layers: Vec<Layer>,
    norm: Norm,
    /// `None` where it is the embedding.
    lm_head: Option<Linear>,
    pooler: Option<Linear>,
}

impl Vector {
    fn new(data: Vec<f32>, dtype: DType, options: &DecoderOptions) -> Result<Self> {
        Ok(match options.kernels {
            Kernels::Packed(_) => Vector::Host(data),
            Kernels::Tensor => Vector::Device(Tensor::new(data, &options.device)?.to_dtype(dtype)?),
        })
    }

    fn to_f32(&self) -> Result<Vec<f32>> {
        match self {
            Vector::Host(data) => Ok(data.clone()),
            Vector::Device(t) => Ok(t.to_dtype(DType::F32)?.to_vec1()?),
        }
    }

    #[cfg(feature = "cuda")]
    fn tensor(&self) -> &Tensor {
        match self {
            Vector::Device(t) => t,
            Vector::Host(_) => unreachable!("rows are where the weights are"),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Vector::Host(data) => 4 * data.len(),
            Vector::Device(t) => t.elem_count() * t.dtype().size_in_bytes(),
        }
    }
}

impl Linear {
    fn bytes(&self) -> usize {
        let matrices = match &self.matrices {
            Matrices::Packed(parts) => parts.iter().map(PackedMatrix::bytes).sum(),
            Matrices::Tensor(t) => t.elem_count() * t.dtype().size_in_bytes(),
        };
        matrices + self.bias.as_ref().map_or(0, Vector::bytes)
    }
}

impl Norm {
    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_ref().map_or(0, Vector::bytes)
    }

    pub(super) fn row(&self, simd: Simd, x: &[f32], out: &mut [f32]) {
        match (self.kind, &self.weight, &self.bias) {
            (NormKind::Rms, Vector::Host(weight), _) => simd::rms_norm(simd, x, weight, self.eps, out),
            (NormKind::Layer, Vector::Host(weight), Some(Vector::Host(bias))) => {
                simd::layer_norm(simd, x, weight, bias, self.eps, out)
            }
            _ => unreachable!("host rows are for packed kernels, and layer norms have a bias"),
        }
    }

    /// Each row of `x`.
    fn tensor(&self, x: &Tensor) -> Result<Tensor> {
        let (Vector::Device(weight), dtype) = (&self.weight, x.dtype()) else {
            unreachable!("rows are where the weights are")
        };
        let x = x.to_dtype(weight.dtype())?.contiguous()?;
        let y = match (self.kind, &self.bias) {
            (NormKind::Rms, _) => candle_nn::ops::rms_norm(&x, weight, self.eps)?,
            (NormKind::Layer, Some(Vector::Device(bias))) => candle_nn::ops::layer_norm(&x, weight, bias, self.eps)?,
            _ => unreachable!("layer norms have a bias"),
        };
        Ok(y.to_dtype(dtype)?)
    }
}

/// A norm of a step's rows: the base's, but for rows whose adapter has its own.
pub(super) struct RowNorm<'a> {
    base: &'a Norm,
    own: Vec<(Range<usize>, &'a Norm)>,
}

impl<'a> RowNorm<'a> {
    fn new(base: &'a Norm, site: NormSite, delta: &'a dyn Delta) -> Self {
        RowNorm { base, own: delta.norms(site) }
    }

    /// The weights, in numbers of `dtype`, and what is added to the mean square, where all rows have the same such norm.
    #[cfg(feature = "cuda")]
    pub fn plain(&self, dtype: DType) -> Option<(&'a Tensor, f32)> {
        let is_plain = self.own.is_empty() && self.base.kind == NormKind::Rms;
        let weight = self.base.weight.tensor();
        (is_plain && weight.dtype() == dtype).then_some((weight, self.base.eps))
    }

    pub fn of_row(&self, row: usize) -> &'a Norm {
        self.own.iter().find(|(rows, _)| rows.contains(&row)).map_or(self.base, |(_, norm)| norm)
    }

    /// Each row of `x`, `parts` of which are one of the step's.
    pub fn tensor(&self, x: &Tensor, parts: usize) -> Result<Tensor> {
        let mut y = self.base.tensor(x)?;
        for (rows, norm) in self.own.iter().filter(|(rows, _)| !rows.is_empty()) {
            let rows = rows.start * parts..rows.end * parts;
            let own = norm.tensor(&x.narrow(0, rows.start, rows.len())?)?;
            y = y.slice_assign(&[rows, 0..y.dims()[1]], &own)?;
        }
        Ok(y)
    }
}

struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    options: &'a DecoderOptions,
}

impl Loader<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'_>> {
        let raw = self.weights.get(name)?;
        if raw.shape != shape {
            return Err(Error::unprocessable(format!(
                "base weights: {name} has shape {:?}, the config says {shape:?}",
                raw.shape
            )));
        }
        Ok(raw)
    }

    fn vector(&self, data: Vec<f32>, dtype: DType) -> Result<Vector> {
        Vector::new(data, dtype, self.options)
    }

    /// Modules with matrices `[out_features, in_features]` and one input.
    fn linear(&self, modules: &[(String, (usize, usize))], has_bias: bool) -> Result<Linear> {
        let (mut packed, mut tensors, mut bias) = (Vec::new(), Vec::new(), Vec::new());
        for (module, (n, k)) in modules {
            let name = format!("{module}.weight");
            let raw = self.get(&name, &[*n, *k])?;
            let named = |e: Error| e.context(format!("base weights: {name}"));
            match self.options.kernels {
                Kernels::Packed(_) => packed.push(PackedMatrix::from_raw(&raw, self.options.format).map_err(named)?),
                Kernels::Tensor => {
                    let t = Tensor::from_vec(raw.to_f32().map_err(named)?, (*n, *k), &Device::Cpu)?;
                    tensors.push(t.to_dtype(self.options.dtype)?.to_device(&self.options.device)?);
                }
            }
            if has_bias {
                bias.extend(self.get(&format!("{module}.bias"), &[*n])?.to_f32()?);
            }
        }
        let matrices = match self.options.kernels {
            Kernels::Packed(_) => Matrices::Packed(packed),
            Kernels::Tensor => Matrices::Tensor(Tensor::cat(&tensors, 0)?),
        };
        let bias = has_bias.then(|| self.vector(bias, self.options.dtype)).transpose()?;
        Ok(Linear { matrices, bias })
    }

    fn site(&self, layer: usize, site: Site) -> Result<Linear> {
        let c = self.config;
        let projections = site.projections(c.family);
        let module = |&p| (c.module(layer, p), c.shape(p));
        let modules: Vec<_> = projections.iter().map(module).collect();
        self.linear(&modules, c.architecture.has_bias(projections[0]))
    }

    /// Learned positions. What every token's type adds is a part of them.
    fn positions(&self, module: &str) -> Result<Linear> {
        let c = self.config;
        let Some(types) = c.family.names().token_types else {
            return self.table(module, c.context);
        };
        let name = format!("{module}.weight");
        let mut rows = self.get(&name, &[c.context, c.hidden_size])?.to_f32().map_err(|e| e.context(name))?;
        let name = format!("{types}.weight");
        let types = self.weights.get(&name)?;
        if types.shape.len() != 2 || types.shape[0] == 0 || types.shape[1] != c.hidden_size {
            let (found, expected) = (types.shape, c.hidden_size);
            return Err(Error::unprocessable(format!(
                "base weights: {name} has shape {found:?}; expected [types, {expected}]"
            )));
        }
        let types = types.to_f32().map_err(|e| e.context(name))?;
        rows.chunks_exact_mut(c.hidden_size).for_each(|row| row.iter_mut().zip(&types).for_each(|(x, t)| *x += t));
        let matrices = match self.options.kernels {
            Kernels::Packed(_) => Matrices::Packed(vec![PackedMatrix::pack_exactly(&rows, c.context, c.hidden_size)]),
            Kernels::Tensor => {
                let t = Tensor::from_vec(rows, (c.context, c.hidden_size), &Device::Cpu)?;
                Matrices::Tensor(t.to_dtype(self.options.dtype)?.to_device(&self.options.device)?)
            }
        };
        Ok(Linear { matrices, bias: None })
    }

    /// A matrix with a row a token, or a position.
    fn table(&self, module: &str, rows: usize) -> Result<Linear> {
        self.linear(&[(module.into(), (rows, self.config.hidden_size))], false)
    }

    /// `None` where the model has no such norm.
    fn norm(&self, site: NormSite) -> Result<Option<Norm>> {
        let Some((module, width)) = self.config.norm(site) else { return Ok(None) };
        let kind = self.config.architecture.norm;
        let dtype = norm_dtype(self.config, self.options);
        let read = |part: &str| self.vector(self.get(&format!("{module}.{part}"), &[width])?.to_f32()?, dtype);
        let bias = (kind == NormKind::Layer).then(|| read("bias")).transpose()?;
        Ok(Some(Norm { kind, eps: self.config.norm_eps as f32, weight: read("weight")?, bias }))
    }

    /// A norm that every model has.
    fn usual_norm(&self, site: NormSite) -> Result<Norm> {
        self.norm(site)?.ok_or_else(|| Error::internal(format!("the family has no norm {site:?}")))
    }

    fn layer(&self, layer: usize) -> Result<Layer> {
        Ok(Layer {
            attention_norm: self.usual_norm(NormSite::Attention(layer))?,
            head_norms: self.norm(NormSite::Query(layer))?.zip(self.norm(NormSite::Key(layer))?).map(Into::into),
            qkv: self.site(layer, Site::Qkv)?,
            o: self.site(layer, Site::O)?,
            attention_post_norm: self.norm(NormSite::AttentionPost(layer))?,
            mlp_norm: self.usual_norm(NormSite::Mlp(layer))?,
            gate_up: self.site(layer, Site::GateUp)?,
            down: self.site(layer, Site::Down)?,
            mlp_post_norm: self.norm(NormSite::MlpPost(layer))?,
        })
    }
}

/// Gemma's weights are near 0 in its files and 1 more here: f16 and bf16 would keep too little of them.
fn norm_dtype(config: &ModelConfig, options: &DecoderOptions) -> DType {
    if config.family.offsets_norms() { DType::F32 } else { options.dtype }
}

impl Decoder {
    pub fn load(config: &ModelConfig, weights: &Weights, options: DecoderOptions) -> Result<Self> {
        #[cfg(feature = "flash-attn")]
        if flash::attends(config, &options.device, options.dtype) {
            flash::tensors::check(&options.device)?;
        }
        let loader = Loader { config, weights, options: &options };
        let names = config.family.names();
        let embedding = loader.table(names.embedding, config.vocab_size)?;
        let positions = names.positions.map(|module| loader.positions(module)).transpose()?;
        let layers = (0..config.layers).map(|l| loader.layer(l)).collect::<Result<_>>()?;
        let norm = loader.usual_norm(NormSite::Final)?;
        let lm_head = match config.tie_word_embeddings || !config.predicts {
            true => None,
            false => Some(loader.table(LM_HEAD, config.vocab_size)?),
        };
        let pooler = names.pooler.map(|_| loader.site(0, Site::Pooler)).transpose()?;
        Ok(Decoder { config: config.clone(), embedding, positions, layers, norm, lm_head, pooler, options })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn options(&self) -> &DecoderOptions {
        &self.options
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let tables = [&self.embedding].into_iter().chain(&self.positions).chain(&self.lm_head).chain(&self.pooler);
        self.layers.iter().flat_map(Layer::linears).chain(tables)
    }

    /// Memory of the weights.
    pub fn bytes(&self) -> usize {
        let norms = self.layers.iter().flat_map(Layer::norms).chain([&self.norm]);
        self.linears().map(Linear::bytes).sum::<usize>() + norms.map(Norm::bytes).sum::<usize>()
    }

    /// The numbers of a matrix as they are served, `[out_features, in_features]`; of the embedding
    /// `[vocab_size, hidden_size]`.
    pub fn weights(&self, module: Module) -> Result<Vec<f32>> {
        let c = &self.config;
        let (linear, before, n) = match module {
            Module::Linear(l, projection) => {
                let (linear, before) = self.part(l, projection);
                (linear, before, c.shape(projection).0)
            }
            Module::Embedding => (&self.embedding, &[][..], c.vocab_size),
            Module::LmHead => (self.lm_head.as_ref().unwrap_or(&self.embedding), &[][..], c.vocab_size),
        };
        match &linear.matrices {
            Matrices::Packed(parts) => Ok(parts[before.len()].rows()),
            Matrices::Tensor(t) => {
                let first = before.iter().map(|&p| c.shape(p).0).sum();
                Ok(t.narrow(0, first, n)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
            }
        }
    }

    /// The bias of a projection as it is served; `None` where it has none.
    pub fn bias(&self, layer: usize, projection: Projection) -> Result<Option<Vec<f32>>> {
        let (linear, before) = self.part(layer, projection);
        let Some(bias) = &linear.bias else { return Ok(None) };
        let first: usize = before.iter().map(|&p| self.config.shape(p).0).sum();
        Ok(Some(bias.to_f32()?[first..][..self.config.shape(projection).0].to_vec()))
    }

    /// The format that a projection's matrix is packed as; `None` where it is a tensor.
    pub fn format(&self, layer: usize, projection: Projection) -> Option<Format> {
        let (linear, before) = self.part(layer, projection);
        match &linear.matrices {
            Matrices::Packed(parts) => Some(parts[before.len()].format()),
            Matrices::Tensor(_) => None,
        }
    }

    /// The layer that a projection is a part of, and the parts before it.
    fn part(&self, layer: usize, projection: Projection) -> (&Linear, &'static [Projection]) {
        let (layer, site) = (&self.layers[layer], Site::of(projection));
        let linear = match site {
            Site::Qkv => &layer.qkv,
            Site::O => &layer.o,
            Site::GateUp => &layer.gate_up,
            Site::Down => &layer.down,
            Site::Pooler => self.pooler.as_ref().expect("the projections of a family are there"),
        };
        let parts = site.projections(self.config.family);
        (linear, &parts[..parts.iter().take_while(|&&p| p != projection).count()])
    }

    /// A norm with an adapter's weights in Hugging Face's form; what it lacks is the base's. `None` where the base has no
    /// such norm.
    pub fn own_norm(&self, site: NormSite, weight: Option<Vec<f32>>, bias: Option<Vec<f32>>) -> Result<Option<Norm>> {
        let layer = |l: usize| self.layers.get(l);
        let head = |l: usize, which: usize| Some(&layer(l)?.head_norms.as_ref()?[which]);
        let base = match site {
            NormSite::Attention(l) => layer(l).map(|layer| &layer.attention_norm),
            NormSite::Query(l) => head(l, 0),
            NormSite::Key(l) => head(l, 1),
            NormSite::AttentionPost(l) => layer(l).and_then(|layer| layer.attention_post_norm.as_ref()),
            NormSite::Mlp(l) => layer(l).map(|layer| &layer.mlp_norm),
            NormSite::MlpPost(l) => layer(l).and_then(|layer| layer.mlp_post_norm.as_ref()),
            NormSite::Final => Some(&self.norm),
        };
        let Some(base) = base else { return Ok(None) };
        let offset = if self.config.family.offsets_norms() { 1.0 } else { 0.0 };
        let weight = match weight {
            Some(weight) => weight.into_iter().map(|w| w + offset).collect(),
            None => base.weight.to_f32()?,
        };
        let bias = match bias {
            Some(bias) => Some(bias),
            None => base.bias.as_ref().map(Vector::to_f32).transpose()?,
        };
        let vector = |data| Vector::new(data, norm_dtype(&self.config, &self.options), &self.options);
        let (weight, bias) = (vector(weight)?, bias.map(vector).transpose()?);
        Ok(Some(Norm { kind: base.kind, eps: base.eps, weight, bias }))
    }

    /// The formats that the packed matrices have, for people.
    pub fn stored_as(&self) -> String {
        let mut names = Vec::new();
        for linear in self.linears() {
            if let Matrices::Packed(parts) = &linear.matrices {
                names.extend(parts.iter().map(|m| format!("{:?}", m.format()).to_lowercase()));
            }
        }
        names.sort();
        names.dedup();
        names.join("+")
    }

    /// A cache of as many blocks as fit into `bytes`, at least one.
    pub fn cache(&self, bytes: usize) -> Result<KvCache> {
        let blocks = (bytes / self.kv_block_bytes()).max(1);
        match (self.options.kernels, self.kv_dtype()) {
            (Kernels::Packed(_), dtype) => Ok(KvCache::packed(&self.config, blocks, dtype == DType::F16)),
            (Kernels::Tensor, dtype) => {
                let positions = blocks * self.kv_block_size();
                KvCache::tensors(&self.config, blocks, positions, dtype, &self.options.device)
            }
        }
    }

    /// Bytes of a block of the KV cache in all layers.
    pub fn kv_block_bytes(&self) -> usize {
        let bytes = KvCache::block_bytes(&self.config, self.options.kernels == Kernels::Tensor, self.kv_dtype());
        bytes * self.kv_block_size() / BLOCK
    }

    /// Positions of a block of the KV cache.
    pub fn kv_block_size(&self) -> usize {
        let DecoderOptions { device, dtype, .. } = &self.options;
        if flash::attends(&self.config, device, *dtype) { flash::PAGE } else { BLOCK }
    }

    /// The [`BLOCK`]s of a sequence's blocks.
    pub fn blocks<'a>(&self, blocks: &'a [u32]) -> Cow<'a, [u32]> {
        flash::parts(blocks, self.kv_block_size() / BLOCK)
    }

    fn kv_dtype(&self) -> DType {
        match self.options.kernels {
            // Beside products of rounded numbers it loses nothing, and reading it is a large part of a step of many rows.
            Kernels::Packed(_) if self.options.format == Some(Format::Int8) => DType::F16,
            Kernels::Packed(_) => DType::F32,
            Kernels::Tensor => self.options.dtype,
        }
    }

    /// Computes one step and returns the final hidden states of the rows in `wanted`: `[wanted, hidden_size]`.
    ///
    /// An encoder's sequences are there as a whole, from position 0 on.
    /// `tokens` holds one id per row; `sequences` cover all rows, with the blocks of [`BLOCK`] positions that
    /// [`Decoder::blocks`] gives; the keys and values of each sequence's earlier positions are in `cache` already, those of
    /// its rows are written to it. `wanted` is in ascending order.
    pub fn forward(
        &self,
        tokens: &[u32],
        sequences: &[SequenceRows],
        cache: &mut KvCache,
        delta: &dyn Delta,
        wanted: &[usize],
    ) -> Result<Rows> {
        let rotation = Rotation::new(&self.config, sequences);
        let DecoderOptions { device, dtype, .. } = &self.options;
        let step = match self.options.kernels {
            Kernels::Packed(_) => None,
            Kernels::Tensor => Some(StepTensors::new(&rotation, sequences, *dtype, device)?),
        };
        let mut x = self.embed(tokens, sequences, delta)?;
        // What is left to do of the last layer once keys and values are written: that of some rows.
        let only = (wanted.len() < tokens.len() && step.is_none()).then(|| delta.only(wanted));
        let (mut delta, mut are_only) = (delta, false);
        // What is added to `x` before its next norm.
        let mut more = None;
        for (l, layer) in self.layers.iter().enumerate() {
            let h = self.add_and_norm(
                &mut x,
                more.take(),
                &RowNorm::new(&layer.attention_norm, NormSite::Attention(l), delta),
            )?;
            let mut qkv = self.outputs(&layer.qkv, l, Site::Qkv, &h, delta)?;
            if self.config.family.norms_stream() {
                x = h;
            }
            let head_norms = layer.head_norms.as_ref();
            let head_norms = head_norms
                .map(|[q, k]| [RowNorm::new(q, NormSite::Query(l), delta), RowNorm::new(k, NormSite::Key(l), delta)]);
            let config = &self.config;
            let attention = Attention { config, layer: l, head_norms, rotation: &rotation, sequences };
            let cache = &mut cache.layers[l];
            let mut h = match (&mut qkv.rows, self.options.kernels, &step) {
                (Rows::Host { data, width }, Kernels::Packed(simd), _) => {
                    let data = attention::packed(&attention, simd, (data, *width), qkv.rest, cache);
                    Rows::Host { data, width: config.heads * config.head_dim }
                }
                (Rows::Device(qkv), _, Some(step)) => Rows::Device(attention::tensors(&attention, qkv, step, cache)?),
                _ => unreachable!("host rows are made by the packed kernels"),
            };
            if let Some(only) = only.as_deref().filter(|_| l + 1 == self.layers.len()) {
                if wanted.is_empty() {
                    break;
                }
                (x, h) = (x.select(wanted)?, h.select(wanted)?);
                (delta, are_only) = (only, true);
            }
            let h = self.outputs(&layer.o, l, Site::O, &h, delta)?;
            let post =
                layer.attention_post_norm.as_ref().map(|base| RowNorm::new(base, NormSite::AttentionPost(l), delta));
            let h = self.post_norm(h, post)?;
            let h = self.add_and_norm(&mut x, Some(h), &RowNorm::new(&layer.mlp_norm, NormSite::Mlp(l), delta))?;
            let up = self.gate_up(&layer.gate_up, l, &h, delta)?;
            if self.config.family.norms_stream() {
                x = h;
            }
            let h = self.outputs(&layer.down, l, Site::Down, &up, delta)?;
            let post = layer.mlp_post_norm.as_ref().map(|base| RowNorm::new(base, NormSite::MlpPost(l), delta));
            more = Some(self.post_norm(h, post)?);
        }
        if wanted.is_empty() {
            return Ok(Rows::Host { data: Buffer::new(0), width: self.config.hidden_size });
        }
        let mut last = RowNorm::new(&self.norm, NormSite::Final, delta);
        if !are_only {
            let place = |row: usize| wanted.partition_point(|&w| w < row);
            last.own.iter_mut().for_each(|(rows, _)| *rows = place(rows.start)..place(rows.end));
            let more_of = |more: Outputs| Ok::<_, Error>(more.whole().select(wanted)?.into());
            (x, more) = (x.select(wanted)?, more.map(more_of).transpose()?);
        }
        self.add_and_norm(&mut x, more, &last)
    }

    /// What a classification head reads of final hidden states `[rows, hidden_size]`, in the same shape: they themselves, or
    /// what the pooler makes of them.
    pub fn pooled(&self, states: Rows, delta: &dyn Delta) -> Result<Vec<f32>> {
        let Some(pooler) = &self.pooler else { return states.into_f32() };
        let mut y = self.linear(pooler, 0, Site::Pooler, &states, delta)?.into_f32()?;
        y.iter_mut().for_each(|y| *y = y.tanh());
        Ok(y)
    }

    /// Logits `[rows, width]` of final hidden states `[rows, hidden_size]`, `width` being the largest vocabulary among
    /// the base's and those of the rows' adapters. What a row has beyond its own vocabulary means nothing.
    pub fn logits(&self, states: &Rows, delta: &dyn Delta) -> Result<Rows> {
        let vocab = self.config.vocab_size;
        let width = vocab.max(delta.vocab_size());
        let cap = self.config.architecture.logit_softcap;
        match (&self.lm_head.as_ref().unwrap_or(&self.embedding).matrices, states, self.options.kernels) {
            (Matrices::Packed(parts), Rows::Host { data: hidden, width: k }, Kernels::Packed(simd)) => {
                let (k, rows) = (*k, hidden.len() / k);
                let mut y = Buffer::new(rows * width);
                let base = delta.base_logits(rows);
                // What the base does not write begins with 0.
                for (row, y) in y.chunks_exact_mut(width).enumerate() {
                    let of_base = if base.iter().any(|rows| rows.contains(&row)) { vocab } else { 0 };
                    y[of_base..].fill(0.0);
                }
                let product = |rows| Product { matrix: &parts[0], rows, x_column: 0, y_column: 0, scale: 1.0 };
                let products: Vec<_> = base.into_iter().map(product).collect();
                let batch = Batch { products: &products, y: &mut y, y_stride: width, add: false };
                products::multiply(simd, hidden, k, batch);
                delta.logits(hidden, &mut y, rows);
                if let Some(cap) = cap {
                    simd::softcap(simd, &mut y, cap as f32);
                }
                Ok(Rows::Host { data: y, width })
            }
            (Matrices::Tensor(w), Rows::Device(x), _) => {
                let mut y = x.matmul(&w.t()?)?;
                if width > vocab {
                    y = y.pad_with_zeros(1, 0, width - vocab)?;
                }
                let y = delta.logits_tensor(x, y)?;
                Ok(Rows::Device(cap.map_or(Ok(y.clone()), |cap| attention::softcap(&y, cap))?))
            }
            _ => unreachable!("rows are where the weights are"),
        }
    }

    fn embed(&self, tokens: &[u32], sequences: &[SequenceRows], delta: &dyn Delta) -> Result<Rows> {
        let width = self.config.hidden_size;
        let scale = self.config.architecture.scales_embedding.then(|| (width as f64).sqrt());
        let mut positions = vec![0u32; tokens.len()];
        for s in sequences {
            s.rows.clone().enumerate().for_each(|(i, row)| positions[row] = (s.start + i) as u32);
        }
        let look_up = |table: &Linear, ids: &[u32]| match &table.matrices {
            Matrices::Packed(parts) => {
                let mut data = Buffer::new(ids.len() * width);
                for (row, &id) in data.chunks_exact_mut(width).zip(ids) {
                    parts[0].row(id as usize, row);
                }
                Ok(Rows::Host { data, width })
            }
            Matrices::Tensor(t) => Ok::<_, Error>(Rows::Device(t.index_select(&Tensor::new(ids, t.device())?, 0)?)),
        };
        // In place of a token that only an adapter knows stands another, until the adapter writes its own.
        let known: Vec<u32> = tokens.iter().map(|&t| t.min(self.config.vocab_size as u32 - 1)).collect();
        let mut x = match look_up(&self.embedding, &known)? {
            Rows::Host { mut data, width } => {
                delta.embed(tokens, &mut data);
                Rows::Host { data, width }
            }
            Rows::Device(x) => Rows::Device(delta.embed_tensor(tokens, x)?),
        };
        if let Some(scale) = scale {
            match &mut x {
                Rows::Host { data, .. } => data.iter_mut().for_each(|x| *x *= scale as f32),
                Rows::Device(t) => *t = (&*t * scale)?,
            }
        }
        if let Some(table) = &self.positions {
            add(&mut x, look_up(table, &positions)?)?;
        }
        Ok(x)
    }

    fn linear(&self, linear: &Linear, layer: usize, site: Site, x: &Rows, delta: &dyn Delta) -> Result<Rows> {
        Ok(self.outputs(linear, layer, site, x, delta)?.whole())
    }

    fn outputs<'a>(
        &self,
        linear: &'a Linear,
        layer: usize,
        site: Site,
        x: &Rows,
        delta: &'a dyn Delta,
    ) -> Result<Outputs<'a>> {
        match (&linear.matrices, x, self.options.kernels) {
            (Matrices::Packed(parts), Rows::Host { data: x, width: k }, Kernels::Packed(simd)) => {
                let (rows, n) = (x.len() / k, parts.iter().map(PackedMatrix::n).sum());
                let ((down, width), up) = (delta.down(layer, site), || delta.up(layer, site));
                let products = products::Layer { k: *k, matrices: parts, down, width, up };
                if linear.bias.is_none() && !delta.finishes(layer, site) {
                    let stride = products.stride();
                    let mut y = Buffer::new(rows * stride);
                    let rest = products.begin(simd, x, &mut y);
                    return Ok(Outputs { rows: Rows::Host { data: y, width: stride }, width: n, rest });
                }
                let mut y = Buffer::new(rows * n);
                products.multiply(simd, x, &mut y);
                delta.finish(layer, site, &mut y, rows);
                if let Some(Vector::Host(bias)) = &linear.bias {
                    y.chunks_exact_mut(n).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
                }
                Ok(Rows::Host { data: y, width: n }.into())
            }
            (Matrices::Tensor(w), Rows::Device(x), _) => {
                let mut y = delta.add_tensor(layer, site, x, x.matmul(&w.t()?)?)?;
                if let Some(Vector::Device(bias)) = &linear.bias {
                    y = y.broadcast_add(bias)?;
                }
                Ok(Rows::Device(y).into())
            }
            _ => unreachable!("rows are where the weights are"),
        }
    }

    /// The activated outputs of [`Site::GateUp`], which a family without a gate has as well.
    fn gate_up(&self, linear: &Linear, layer: usize, x: &Rows, delta: &dyn Delta) -> Result<Rows> {
        let (site, activation) = (Site::GateUp, self.config.architecture.activation);
        match (&linear.matrices, x, self.options.kernels) {
            // Outputs that nothing else changes before they are activated need not be written to memory.
            (Matrices::Packed(parts), Rows::Host { data: x, width: k }, Kernels::Packed(simd))
                if self.config.family.is_gated()
                    && parts.len() == 2
                    && linear.bias.is_none()
                    && !delta.finishes(layer, site) =>
            {
                let width = self.config.intermediate_size;
                let mut y = Buffer::new(x.len() / k * width);
                let ((down, h_width), up) = (delta.down(layer, site), || delta.up(layer, site));
                let products = products::Layer { k: *k, matrices: parts, down, width: h_width, up };
                let gate = |first: &[f32], up: &[f32], out: &mut [f32]| gate(simd, activation, first, up, out);
                products.gated(simd, x, &mut y, &gate);
                Ok(Rows::Host { data: y, width })
            }
            _ => self.activate(self.linear(linear, layer, site, x, delta)?),
        }
    }

    /// Row by row.
    fn norm(&self, x: &Rows, norm: &RowNorm) -> Result<Rows> {
        match (x, self.options.kernels) {
            (Rows::Host { data, width }, Kernels::Packed(simd)) => {
                let mut out = Buffer::new(data.len());
                let of_row = |row: usize, out: &mut [f32]| {
                    norm.of_row(row).row(simd, &data[row * width..][..*width], out);
                };
                if data.len() < PARALLEL {
                    out.chunks_exact_mut(*width).enumerate().for_each(|(row, out)| of_row(row, out));
                } else {
                    parallel::chunks(&mut out, *width, of_row);
                }
                Ok(Rows::Host { data: out, width: *width })
            }
            (Rows::Device(x), _) => Ok(Rows::Device(norm.tensor(x, 1)?)),
            _ => unreachable!("host rows are made by the packed kernels"),
        }
    }

    /// `x += h`, where there is `h`, and the norm of `x`.
    fn add_and_norm(&self, x: &mut Rows, h: Option<Outputs>, norm: &RowNorm) -> Result<Rows> {
        #[cfg(feature = "cuda")]
        if let Rows::Device(sum) = &*x
            && let Some(device) = fused::tensors::device(sum)
            && norm.own.is_empty()
        {
            let h = match &h {
                Some(Outputs { rows: Rows::Device(h), .. }) => Some(h),
                _ => None,
            };
            let Norm { kind, eps, weight, bias } = norm.base;
            let bias = bias.as_ref().map(Vector::tensor);
            let (sum, normed) = fused::tensors::add_norm(device, sum, h, (*kind, *eps), weight.tensor(), bias)?;
            *x = Rows::Device(sum);
            return Ok(Rows::Device(normed));
        }
        let h = match (&mut *x, h, self.options.kernels) {
            (
                Rows::Host { data: x, width },
                Some(Outputs { rows: Rows::Host { data: mut h, width: stride }, rest, .. }),
                Kernels::Packed(simd),
            ) => {
                let (width, mut out) = (*width, Buffer::new(x.len()));
                // Neighbouring rows, which the rest is added to at once.
                let of_rows = |rows: Range<usize>, [x, h, out]: [&mut [f32]; 3]| {
                    if let Some(rest) = &rest {
                        rest.add(rows.clone(), h);
                    }
                    let parts = x.chunks_exact_mut(width).zip(h.chunks_exact(stride)).zip(out.chunks_exact_mut(width));
                    for (row, ((x, h), out)) in rows.zip(parts) {
                        simd::add(simd, x, &h[..width]);
                        norm.of_row(row).row(simd, x, out);
                    }
                };
                let data = [(&mut x[..], width), (&mut h[..], stride), (&mut out[..], width)];
                products::by_rows(rest.as_ref(), NORM * width, data, of_rows);
                return Ok(Rows::Host { data: out, width });
            }
            (_, h, _) => h.map(Outputs::whole),
        };
        if let Some(h) = h {
            add(x, h)?;
        }
        self.norm(x, norm)
    }

    fn post_norm<'a>(&self, x: Outputs<'a>, norm: Option<RowNorm>) -> Result<Outputs<'a>> {
        if let Some(norm) = norm { Ok(self.norm(&x.whole(), &norm)?.into()) } else { Ok(x) }
    }

    /// `activation(gate) * up`, or `activation(up)` where the family has no gate.
    fn activate(&self, x: Rows) -> Result<Rows> {
        let (activation, width) = (self.config.architecture.activation, self.config.intermediate_size);
        let gated = self.config.family.is_gated();
        match (x, self.options.kernels) {
            (Rows::Host { data, .. }, Kernels::Packed(simd)) => {
                let from = if gated { 2 * width } else { width };
                let mut out = Buffer::new(data.len() / from * width);
                parallel::chunks(&mut out, width, |row, out| {
                    let (first, up) = data[row * from..][..from].split_at(width);
                    match gated {
                        true => gate(simd, activation, first, up, out),
                        false => simd::activate(simd, activation, first, out),
                    }
                });
                Ok(Rows::Host { data: out, width })
            }
            (Rows::Device(t), _) => {
                #[cfg(feature = "cuda")]
                if let Some(device) = fused::tensors::device(&t) {
                    return Ok(Rows::Device(fused::tensors::activate(device, &t, activation, gated, width)?));
                }
                let first = t.narrow(1, 0, width)?.contiguous()?;
                let first = match activation {
                    Activation::Silu => first.silu()?,
                    Activation::Gelu => first.gelu_erf()?,
                    Activation::GeluTanh => first.gelu()?,
                    Activation::Relu => first.relu()?,
                };
                Ok(Rows::Device(if gated { (first * t.narrow(1, width, width)?)? } else { first }))
            }
            _ => unreachable!("host rows are made by the packed kernels"),
        }
    }
}

impl Rows {
    /// From the host to where `options` say; `[rows, width]`.
    #[cfg(test)]
    pub(crate) fn from_f32(rows: &[f32], width: usize, options: &DecoderOptions) -> Result<Self> {
        Ok(match options.kernels {
            Kernels::Packed(_) => Rows::Host { data: rows.to_vec().into(), width },
            Kernels::Tensor => {
                let t = Tensor::from_slice(rows, (rows.len() / width, width), &options.device)?;
                Rows::Device(t.to_dtype(options.dtype)?)
            }
        })
    }

    /// The numbers on the host.
    pub fn into_buffer(self) -> Result<Buffer> {
        match self {
            Rows::Host { data, .. } => Ok(data),
            rows => Ok(rows.into_f32()?.into()),
        }
    }

    pub fn into_f32(self) -> Result<Vec<f32>> {
        match self {
            Rows::Host { data, .. } => Ok(data.into()),
            Rows::Device(t) => Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?),
        }
    }

    /// Some of the rows, in the order of `wanted`.
    pub fn select(&self, wanted: &[usize]) -> Result<Rows> {
        match self {
            &Rows::Host { ref data, width } => {
                let mut chosen = Buffer::new(wanted.len() * width);
                for (out, &row) in chosen.chunks_exact_mut(width).zip(wanted) {
                    out.copy_from_slice(&data[row * width..][..width]);
                }
                Ok(Rows::Host { data: chosen, width })
            }
            // All of them, as where all sequences decode.
            Rows::Device(t) if wanted.iter().copied().eq(0..t.dims()[0]) => Ok(Rows::Device(t.clone())),
            Rows::Device(t) => {
                let index: Vec<u32> = wanted.iter().map(|&row| row as u32).collect();
                let index = Tensor::new(index, t.device())?;
                Ok(Rows::Device(t.index_select(&index, 0)?))
            }
        }
    }
}

/// `activation(first) * up`.
fn gate(simd: Simd, activation: Activation, first: &[f32], up: &[f32], out: &mut [f32]) {
    match activation {
        Activation::Silu => simd::silu_mul(simd, first, up, out),
        _ => {
            simd::activate(simd, activation, first, out);
            out.iter_mut().zip(up).for_each(|(o, up)| *o *= up);
        }
    }
}

/// `x += y`.
fn add(x: &mut Rows, y: Rows) -> Result<()> {
    match (x, y) {
        (Rows::Host { data: x, width }, Rows::Host { data: y, .. }) => {
            let of_row = |row: usize, x: &mut [f32]| {
                x.iter_mut().zip(&y[row * *width..]).for_each(|(x, y)| *x += y);
            };
            if y.len() < PARALLEL {
                x.chunks_exact_mut(*width).enumerate().for_each(|(row, x)| of_row(row, x));
            } else {
                parallel::chunks(x, *width, of_row);
            }
        }
        (Rows::Device(x), Rows::Device(y)) => *x = (&*x + y)?,
        _ => unreachable!("rows are where the weights are"),
    }
    Ok(())
}

/// What takes as long as to add a number and to norm it, in multiply-adds.
const NORM: usize = 16;
/// Numbers of which a cheap operation is worth a parallel region.
const PARALLEL: usize = 1 << 12;
