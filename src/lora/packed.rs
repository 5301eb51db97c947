//! An adapter laid out for the kernels, ready for a batch.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::dora;
use super::pool::{Block, Blocks, Layout, Pages, Pool};
use super::table::{Embedding, LmHead};
use crate::adapter::{Adapter, Generation, LoraPair, OwnNorm};
use crate::base::matmul::{Format, PackedMatrix};
use crate::base::simd;
use crate::base::{Decoder, DecoderOptions, Head, Kernels, Language, Module, Norm, NormSite, Site};
use crate::{Error, Result};

/// What is changed of one fused linear layer.
#[derive(Debug)]
pub(super) struct PackedSite {
    /// The stacked A factors; `None` where there are no pairs.
    pub a: Option<Factor>,
    pub parts: Vec<Part>,
    pub finishes: Vec<Finish>,
    /// Outputs of the fused layer.
    pub width: usize,
}

/// The fused layers that an adapter changes.
#[derive(Debug, Default)]
pub(super) struct Sites(Vec<Option<PackedSite>>);

impl Sites {
    /// In the order in which a step comes to them.
    fn index(layer: usize, site: Site) -> usize {
        layer * Site::ALL.len() + site as usize
    }

    pub fn get(&self, layer: usize, site: Site) -> Option<&PackedSite> {
        self.0.get(Self::index(layer, site))?.as_ref()
    }

    fn insert(&mut self, layer: usize, site: Site, packed: PackedSite) {
        let index = Self::index(layer, site);
        self.0.resize_with(self.0.len().max(index + 1), || None);
        self.0[index] = Some(packed);
    }

    /// Layers and sites with something, in ascending order.
    #[cfg(feature = "cuda")]
    pub fn places(&self) -> impl Iterator<Item = (usize, Site)> {
        let there = self.0.iter().enumerate().filter(|(_, site)| site.is_some());
        there.map(|(index, _)| (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]))
    }

    fn values(&self) -> impl Iterator<Item = &PackedSite> {
        self.0.iter().flatten()
    }

    fn values_mut(&mut self) -> impl Iterator<Item = &mut PackedSite> {
        self.0.iter_mut().flatten()
    }

    /// Has what tells of the next one on its way: between two steps' looks at it, all adapters' numbers have passed.
    pub fn fetch_next(&self, layer: usize, site: Site) {
        let next = match site {
            Site::Down => Self::index(layer + 1, Site::Qkv),
            _ => Self::index(layer, site) + 1,
        };
        if let Some(next) = self.0.get(next) {
            simd::fetch(std::slice::from_ref(next));
        }
    }
}

impl PackedSite {
    /// What of it is on pages.
    pub fn blocks(&mut self) -> impl Iterator<Item = &mut Block> {
        let factors = self.a.iter_mut().chain(self.parts.iter_mut().map(|part| &mut part.b));
        let vectors = self.finishes.iter_mut().flat_map(|f| f.gain.iter_mut().chain(&mut f.shift));
        let blocks = factors.flat_map(|factor| match factor {
            Factor::Paged { blocks, .. } => blocks.as_mut_slice(),
            _ => &mut [],
        });
        blocks.chain(vectors.filter_map(|vector| match vector {
            Vector::Paged(block) => Some(block),
            _ => None,
        }))
    }
}

/// What follows the products with a projection's weights and pair: `y = gain * y + shift`. The base's bias comes after it,
/// so a bias of the adapter's own is the difference.
#[derive(Debug)]
pub(super) struct Finish {
    /// Outputs of the fused layer.
    pub columns: Range<usize>,
    pub gain: Option<Vector>,
    pub shift: Option<Vector>,
}

/// The pair of one projection of the fused layer.
#[derive(Debug)]
pub(super) struct Part {
    pub b: Factor,
    /// First of this projection's ranks among those of the site.
    pub rank_start: usize,
    /// First of this projection's outputs among those of the fused layer.
    pub column: usize,
    pub scale: f32,
}

#[derive(Debug)]
pub(super) enum Factor {
    Packed(PackedMatrix),
    /// `[out_features, in_features]`, in the decoder's numbers.
    Tensor(Tensor),
    /// On pages of a GPU, for the kernels there.
    Paged {
        blocks: Vec<Block>,
        n: usize,
        k: usize,
    },
}

impl Factor {
    /// Packed as `format`, where there is one and it fits.
    pub fn new(rows: &[f32], n: usize, k: usize, base: &DecoderOptions, format: Option<Format>) -> Result<Self> {
        Ok(match base.kernels {
            Kernels::Packed(_) => Factor::Packed(match format {
                Some(Format::Int4) if Format::Int8.fits(k) => PackedMatrix::pack_int4(rows, n, k),
                Some(Format::Int8) if Format::Int8.fits(k) => PackedMatrix::pack_int8(rows, n, k),
                _ => PackedMatrix::pack_exactly(rows, n, k),
            }),
            Kernels::Tensor => Factor::Tensor(tensor(rows, (n, k), base)?),
        })
    }

    /// The same, but a tensor's numbers lie column by column: neighbours are what neighbouring output features have of one
    /// input feature, which the kernels of a GPU read together.
    pub fn by_columns(rows: &[f32], n: usize, k: usize, base: &DecoderOptions, format: Option<Format>) -> Result<Self> {
        match base.kernels {
            Kernels::Packed(_) => Factor::new(rows, n, k, base, format),
            Kernels::Tensor => {
                let turned: Vec<f32> = (0..k).flat_map(|i| (0..n).map(move |j| rows[j * k + i])).collect();
                Ok(Factor::Tensor(tensor(&turned, (k, n), base)?.t()?))
            }
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Factor::Packed(m) => m.bytes(),
            Factor::Tensor(t) => t.elem_count() * t.dtype().size_in_bytes(),
            Factor::Paged { .. } => unreachable!("pages are counted whole"),
        }
    }

    /// Output features.
    pub fn n(&self) -> usize {
        match self {
            Factor::Packed(m) => m.n(),
            Factor::Tensor(t) => t.dims()[0],
            Factor::Paged { n, .. } => *n,
        }
    }

    /// Input features.
    pub fn k(&self) -> usize {
        match self {
            Factor::Packed(m) => m.k(),
            Factor::Tensor(t) => t.dims()[1],
            Factor::Paged { k, .. } => *k,
        }
    }

    pub fn packed(&self) -> &PackedMatrix {
        match self {
            Factor::Packed(m) => m,
            _ => unreachable!("adapters are packed for the base's kernels"),
        }
    }

    pub fn tensor(&self) -> &Tensor {
        match self {
            Factor::Tensor(t) => t,
            _ => unreachable!("adapters are packed for the base's kernels"),
        }
    }
}

/// A number for each output feature.
#[derive(Debug)]
pub(super) enum Vector {
    Host(Vec<f32>),
    /// `[1, out_features]`, in the decoder's numbers.
    Tensor(Tensor),
    /// On a page of a GPU.
    Paged(Block),
}

impl Vector {
    pub fn new(numbers: Vec<f32>, base: &DecoderOptions) -> Result<Self> {
        Ok(match base.kernels {
            Kernels::Packed(_) => Vector::Host(numbers),
            Kernels::Tensor => Vector::Tensor(tensor(&numbers, (1, numbers.len()), base)?),
        })
    }

    pub fn bytes(&self) -> usize {
        match self {
            Vector::Host(numbers) => 4 * numbers.len(),
            Vector::Tensor(t) => t.elem_count() * t.dtype().size_in_bytes(),
            Vector::Paged(_) => unreachable!("pages are counted whole"),
        }
    }

    pub fn host(&self) -> &[f32] {
        match self {
            Vector::Host(numbers) => numbers,
            _ => unreachable!("adapters are packed for the base's kernels"),
        }
    }

    pub fn tensor(&self) -> &Tensor {
        match self {
            Vector::Tensor(t) => t,
            _ => unreachable!("adapters are packed for the base's kernels"),
        }
    }
}

fn tensor(numbers: &[f32], shape: (usize, usize), base: &DecoderOptions) -> Result<Tensor> {
    Ok(Tensor::from_slice(numbers, shape, &Device::Cpu)?.to_dtype(base.dtype)?.to_device(&base.device)?)
}

/// A pair's factors, `[rank, in_features]` and `[out_features, rank]`, and their rank: the least that the base's format has,
/// the ranks more being 0.
fn widened<'a>(pair: &'a LoraPair, base: &DecoderOptions) -> (Cow<'a, [f32]>, Cow<'a, [f32]>, usize) {
    let rank = match (base.kernels, base.format) {
        (Kernels::Packed(_), Some(Format::Int8 | Format::Int4)) if pair.rank > 0 => {
            (pair.rank..).find(|&rank| Format::Int8.fits(rank))
        }
        _ => None,
    };
    let Some(rank) = rank.filter(|&rank| rank > pair.rank) else {
        return (Cow::from(&pair.a), Cow::from(&pair.b), pair.rank);
    };
    let mut a = pair.a.clone();
    a.resize(pair.a.len() / pair.rank * rank, 0.0);
    let mut b = vec![0.0; pair.b.len() / pair.rank * rank];
    b.chunks_exact_mut(rank)
        .zip(pair.b.chunks_exact(pair.rank))
        .for_each(|(b, own)| b[..own.len()].copy_from_slice(own));
    (Cow::from(a), Cow::from(b), rank)
}

/// The format of the factors of a fused layer's pairs, where they need not be exact: as coarse as the layer, beside which reading
/// them is what an adapter costs.
fn coarseness(base: &Decoder, layer: usize, site: Site) -> Option<Format> {
    let is_coarse = |&projection: &_| base.format(layer, projection) == Some(Format::Int4);
    let projections = site.projections(base.config().family);
    match base.options().format {
        Some(Format::Int8 | Format::Int4) if projections.iter().all(is_coarse) => Some(Format::Int4),
        format => format,
    }
}

/// Where that of an adapter goes which the kernels of linear layers read.
struct Linears<'a> {
    base: &'a DecoderOptions,
    /// For a GPU with pages.
    blocks: Option<Blocks>,
}

impl Linears<'_> {
    fn by_rows(&mut self, rows: &[f32], n: usize, k: usize, format: Option<Format>) -> Result<Factor> {
        match &mut self.blocks {
            Some(blocks) => Ok(Factor::Paged { blocks: blocks.by_rows(rows, n, k)?, n, k }),
            None => Factor::new(rows, n, k, self.base, format),
        }
    }

    fn by_columns(&mut self, rows: &[f32], n: usize, k: usize, format: Option<Format>) -> Result<Factor> {
        match &mut self.blocks {
            Some(blocks) => Ok(Factor::Paged { blocks: blocks.by_columns(rows, n, k)?, n, k }),
            None => Factor::by_columns(rows, n, k, self.base, format),
        }
    }

    fn vector(&mut self, numbers: Option<Vec<f32>>) -> Result<Option<Vector>> {
        let Some(numbers) = numbers else { return Ok(None) };
        Ok(Some(match &mut self.blocks {
            Some(blocks) => Vector::Paged(blocks.vector(&numbers)?),
            None => Vector::new(numbers, self.base)?,
        }))
    }
}

/// Whether an adapter's linear layers are on pages of a GPU.
#[derive(Debug)]
enum Paging {
    /// They are elsewhere.
    None,
    /// Not yet.
    Staged(Layout),
    Placed {
        _pages: Pages,
    },
}

/// An adapter on the device, in the layout that the delta kernels read.
///
/// The A factors of projections that share an input (q, k, v; gate, up) are stacked, so that a fused layer costs one
/// product with A, and one with each B.
#[derive(Debug)]
pub struct PackedAdapter {
    pub generation: Generation,
    /// Names of the classes of the head; `None` where the adapter has no head.
    pub labels: Option<Vec<String>>,
    /// Memory it takes.
    pub bytes: usize,
    /// Tokens it knows, the base's and its own.
    pub vocab_size: usize,
    pub(super) sites: Sites,
    pub(super) norms: HashMap<NormSite, Norm>,
    pub(super) embedding: Option<Embedding>,
    pub(super) lm_head: Option<LmHead>,
    head: Option<Head>,
    paging: Paging,
    /// Bytes on the device that are on no page, where there are pages.
    outside: u64,
    /// Its own tokenizer, chat template and end tokens, where they are not the base's.
    pub language: Option<Language>,
}

impl PackedAdapter {
    /// For the kernels and the numbers of `base`. Each pair is freed as soon as it is packed, so that an adapter is not
    /// twice in memory.
    ///
    /// Errors: `Unprocessable` where DoRA's numbers and the base's weights have no finite quotient.
    pub fn new(adapter: Adapter, base: &Decoder) -> Result<Self> {
        Self::pack(adapter, base, None)
    }

    /// For [`Self::place`] on a pool's pages; until then no step takes it.
    pub fn for_pages(adapter: Adapter, base: &Decoder, pool: &Pool) -> Result<Self> {
        Self::pack(adapter, base, Some(pool.page()))
    }

    /// On pages where there is a pool. For those who do not evict.
    pub fn on(adapter: Adapter, base: &Decoder, pool: Option<&Arc<Pool>>) -> Result<Self> {
        let Some(pool) = pool else { return Self::new(adapter, base) };
        let mut packed = Self::for_pages(adapter, base, pool)?;
        match packed.place(pool)? {
            true => Ok(packed),
            false => Err(Error::unavailable("the adapters' pages on the GPU are all in use")),
        }
    }

    fn pack(mut adapter: Adapter, base: &Decoder, page: Option<usize>) -> Result<Self> {
        let (config, options) = (base.config(), base.options());
        let mut linears = Linears { base: options, blocks: page.map(|page| Blocks::new(options.dtype, page)) };
        let mut sites = Sites::default();
        for layer in 0..config.layers {
            for site in Site::ALL {
                let (mut a, mut parts, mut finishes, mut ranks, mut column, mut width) =
                    (Vec::new(), Vec::new(), Vec::new(), 0, 0, 0);
                let format = coarseness(base, layer, site);
                for &projection in site.projections(config.family) {
                    let (n, k) = config.shape(projection);
                    let (mut gain, mut shift) = (None, None);
                    let named = |e: Error| e.context(config.module(layer, projection));
                    if let Some(pair) = adapter.pairs.remove(&(layer, projection)) {
                        if pair.magnitude.is_some() {
                            let weights = base.weights(Module::Linear(layer, projection))?;
                            gain = dora::gains(&weights, &pair).map_err(named)?;
                        }
                        shift =
                            pair.bias.as_ref().map(|bias| bias.iter().map(|b| pair.scale * b).collect::<Vec<f32>>());
                        let (own_a, b, rank) = widened(&pair, options);
                        a.extend_from_slice(&own_a);
                        let b = linears.by_columns(&b, n, rank, format).map_err(named)?;
                        parts.push(Part { b, rank_start: ranks, column, scale: pair.scale });
                        ranks += rank;
                    }
                    if let Some(own) = adapter.biases.get(&(layer, projection))
                        && let Some(served) = base.bias(layer, projection)?
                    {
                        let shift = shift.get_or_insert_with(|| vec![0.0; n]);
                        shift.iter_mut().zip(own.iter().zip(served)).for_each(|(s, (own, base))| *s += own - base);
                    }
                    if gain.is_some() || shift.is_some() {
                        let columns = column..column + n;
                        let mut vector = |numbers| linears.vector(numbers).map_err(named);
                        finishes.push(Finish { columns, gain: vector(gain)?, shift: vector(shift)? });
                    }
                    (column, width) = (column + n, k);
                }
                if !(parts.is_empty() && finishes.is_empty()) {
                    let a = (ranks > 0).then(|| linears.by_rows(&a, ranks, width, format)).transpose()?;
                    sites.insert(layer, site, PackedSite { a, parts, finishes, width: column });
                }
            }
        }
        let mut norms = HashMap::new();
        for (site, OwnNorm { weight, bias }) in std::mem::take(&mut adapter.norms) {
            if let Some(norm) = base.own_norm(site, weight, bias)? {
                norms.insert(site, norm);
            }
        }
        let vocab_size = adapter.vocab_size.unwrap_or(config.vocab_size);
        let (embedding, lm_head) = super::table::pack(adapter.embedding, adapter.lm_head, vocab_size, base)?;
        let head = adapter.head;

        let vector = |v: &Option<Vector>| v.as_ref().map_or(0, Vector::bytes);
        let site = |s: &PackedSite| {
            let factors = s.parts.iter().map(|p| &p.b).chain(&s.a).map(Factor::bytes).sum::<usize>();
            factors + s.finishes.iter().map(|f| vector(&f.gain) + vector(&f.shift)).sum::<usize>()
        };
        let (sites_bytes, paging) = match linears.blocks.map(|blocks| (blocks.page(), blocks.into_layout())) {
            Some((page, layout)) => (page * layout.pages(), Paging::Staged(layout)),
            None => (sites.values().map(site).sum(), Paging::None),
        };
        let norm_bytes: usize = norms.values().map(Norm::bytes).sum();
        let head_bytes = head.as_ref().map_or(0, |h| 4 * (h.weight.len() + h.bias.as_ref().map_or(0, Vec::len)));
        let outside = norm_bytes + super::table::bytes(&embedding, &lm_head);
        Ok(PackedAdapter {
            generation: adapter.generation,
            labels: head.as_ref().map(|h| h.labels.clone()),
            bytes: sites_bytes + head_bytes + outside,
            vocab_size,
            sites,
            norms,
            embedding,
            lm_head,
            head,
            paging,
            outside: outside as u64,
            language: None,
        })
    }

    /// Puts it on pages, if it is to be there. `false` where too few are free now.
    ///
    /// Errors: `TooLarge` where it would not fit if all were.
    pub fn place(&mut self, pool: &Arc<Pool>) -> Result<bool> {
        let Paging::Staged(layout) = &self.paging else { return Ok(true) };
        let Some((pages, addresses)) = pool.place(layout, self.outside)? else { return Ok(false) };
        for site in self.sites.values_mut() {
            site.blocks().for_each(|block| block.at = addresses[block.at as usize]);
        }
        self.paging = Paging::Placed { _pages: pages };
        Ok(true)
    }

    /// Whether the kernels find all of it.
    pub fn is_placed(&self) -> bool {
        !matches!(self.paging, Paging::Staged(_))
    }

    /// The adapter with a language of its own, and what that takes in memory.
    pub fn with_language(mut self, own: Option<(Language, usize)>) -> Self {
        if let Some((language, bytes)) = own {
            self.language = Some(language);
            self.bytes += bytes;
        }
        self
    }

    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }
}
