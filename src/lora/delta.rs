//! The delta of a step: rows grouped by adapter, each group's through its own factors.

use std::ops::Range;
#[cfg(feature = "cuda")]
use std::sync::OnceLock;

use candle_core::Tensor;
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, DType, Device};

use super::op::AddDelta;
use super::packed::{Factor, Finish, PackedAdapter, PackedSite, Part};
use super::table::{self, Embedding, LmHead, finish};
#[cfg(feature = "cuda")]
use super::tiles::StepTiles;
use crate::Result;
use crate::base::products::Product;
use crate::base::simd::{self, Simd};
use crate::base::{Delta, Norm, NormSite, Site};
#[cfg(feature = "cuda")]
use crate::cuda::gpu::{GpuMemory, tensor_address};
#[cfg(feature = "cuda")]
use crate::cuda::{Machine, Memory};

/// Rows of a step that use one adapter.
pub struct Segment<'a> {
    pub rows: Range<usize>,
    pub adapter: &'a PackedAdapter,
}

/// `y += scale * (x Aᵀ) Bᵀ` (arXiv 2106.09685) for every segment, and what else its adapter changes; rows of no segment
/// keep the base's result.
///
/// The A factors of all segments share a parallel region, and so do the B factors: the cost of many adapters in a step is that
/// of reading their factors, not of starting work for each.
pub struct BatchDelta<'a> {
    simd: Simd,
    /// In ascending order of rows.
    segments: Vec<Segment<'a>>,
    #[cfg(feature = "cuda")]
    on_gpu: OnceLock<(StepTiles, GpuMemory)>,
}

impl<'a> BatchDelta<'a> {
    /// `segments` in ascending order of rows, without overlap.
    pub fn new(simd: Simd, segments: Vec<Segment<'a>>) -> Self {
        debug_assert!(segments.windows(2).all(|s| s[0].rows.end <= s[1].rows.start));
        BatchDelta {
            simd,
            segments,
            #[cfg(feature = "cuda")]
            on_gpu: OnceLock::new(),
        }
    }

    /// The segments whose adapter has a part of this kind.
    fn with<T>(&self, part: impl Fn(&'a PackedAdapter) -> Option<&'a T>) -> Vec<(&Range<usize>, &'a T)> {
        self.segments.iter().filter_map(|s| Some((&s.rows, part(s.adapter)?))).collect()
    }

    /// The segments whose adapter changes the layer, and how.
    fn sites(&self, layer: usize, site: Site) -> impl Iterator<Item = (&Range<usize>, &'a PackedSite)> + Clone {
        self.segments.iter().filter_map(move |s| Some((&s.rows, s.adapter.sites.get(layer, site)?)))
    }

    /// The launches of all layers, laid out and uploaded when the first one asks.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self, device: &CudaDevice, dtype: DType) -> Result<&(StepTiles, GpuMemory)> {
        if let Some(there) = self.on_gpu.get() {
            return Ok(there);
        }
        if self.segments.iter().any(|s| !s.adapter.is_placed()) {
            return Err(crate::Error::internal("an adapter whose pages are not written yet"));
        }
        let mut step = StepTiles::default();
        let mut places: Vec<_> = self.segments.iter().flat_map(|s| s.adapter.sites.places()).collect();
        places.sort_unstable();
        places.dedup();
        for (layer, site) in places {
            let sites: Vec<_> = self.sites(layer, site).collect();
            step.add((layer, site), &sites, dtype, &mut tensor_address)?;
        }
        let words = device.upload(&step.words)?;
        Ok(self.on_gpu.get_or_init(|| (step, words)))
    }

    fn embeddings(&self) -> Vec<(&Range<usize>, &Embedding)> {
        self.with(|adapter| adapter.embedding.as_ref())
    }

    fn lm_heads(&self) -> Vec<(&Range<usize>, &LmHead)> {
        self.with(|adapter| adapter.lm_head.as_ref())
    }
}

impl<'a> Delta for BatchDelta<'a> {
    fn down(&self, layer: usize, site: Site) -> (Vec<Product<'_>>, usize) {
        let (mut products, mut width) = (Vec::with_capacity(self.segments.len()), 0);
        for (rows, site) in self.sites(layer, site) {
            // For `up`.
            simd::fetch(site.parts.as_slice());
            if let Some(matrix) = site.a.as_ref().map(Factor::packed) {
                width = width.max(matrix.n());
                products.push(Product { matrix, rows: rows.clone(), x_column: 0, y_column: 0, scale: 1.0 });
            }
        }
        (products, width)
    }

    fn up(&self, layer: usize, place: Site) -> Vec<Product<'_>> {
        let sites = self.sites(layer, place);
        let mut products = Vec::with_capacity(sites.clone().map(|(_, site)| site.parts.len()).sum());
        for (rows, site) in sites {
            for Part { b, rank_start, column, scale } in &site.parts {
                let (x_column, y_column) = (*rank_start, *column);
                products.push(Product { matrix: b.packed(), rows: rows.clone(), x_column, y_column, scale: *scale });
            }
        }
        self.segments.iter().for_each(|s| s.adapter.sites.fetch_next(layer, place));
        products
    }

    fn finishes(&self, layer: usize, site: Site) -> bool {
        self.sites(layer, site).any(|(_, site)| !site.finishes.is_empty())
    }

    fn finish(&self, layer: usize, site: Site, y: &mut [f32], rows: usize) {
        let y_stride = y.len() / rows;
        for (rows, site) in self.sites(layer, site) {
            for Finish { columns, gain, shift } in &site.finishes {
                finish(gain, shift, &mut y[rows.start * y_stride..rows.end * y_stride], y_stride, columns.start);
            }
        }
    }

    fn add_tensor(&self, layer: usize, site: Site, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let sites: Vec<_> = self.sites(layer, site).collect();
        if sites.is_empty() {
            return Ok(y);
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = x.device() {
            let (step, words) = self.on_gpu(device, x.dtype())?;
            let tiles = &step.sites[&(layer, site)];
            y.inplace_op2(&x.contiguous()?, &AddDelta::on_gpu((tiles, words.address())))?;
            return Ok(y);
        }
        y.inplace_op2(&x.contiguous()?, &AddDelta::plain(sites))?;
        Ok(y)
    }

    fn only(&self, rows: &[usize]) -> Box<dyn Delta + '_> {
        let place = |row: usize| rows.partition_point(|&wanted| wanted < row);
        let segment = |s: &Segment<'a>| Segment { rows: place(s.rows.start)..place(s.rows.end), adapter: s.adapter };
        let segments = self.segments.iter().map(segment).filter(|s| !s.rows.is_empty());
        Box::new(BatchDelta::new(self.simd, segments.collect()))
    }

    fn norms(&self, site: NormSite) -> Vec<(Range<usize>, &Norm)> {
        let own = self.with(|adapter| adapter.norms.get(&site));
        own.into_iter().map(|(rows, norm)| (rows.clone(), norm)).collect()
    }

    fn embed(&self, tokens: &[u32], x: &mut [f32]) {
        table::embed(self.simd, &self.embeddings(), tokens, x);
    }

    fn embed_tensor(&self, tokens: &[u32], x: Tensor) -> Result<Tensor> {
        table::embed_tensor(&self.embeddings(), tokens, x)
    }

    fn vocab_size(&self) -> usize {
        self.segments.iter().map(|s| s.adapter.vocab_size).max().unwrap_or(0)
    }

    fn base_logits(&self, rows: usize) -> Vec<Range<usize>> {
        let (mut ranges, mut next) = (vec![], 0);
        for (own, _) in self.lm_heads().into_iter().filter(|(_, head)| head.is_whole()) {
            ranges.push(next..own.start);
            next = own.end;
        }
        ranges.push(next..rows);
        ranges.retain(|range| !range.is_empty());
        ranges
    }

    fn logits(&self, x: &[f32], y: &mut [f32], rows: usize) {
        table::logits(self.simd, &self.lm_heads(), x, y, rows);
    }

    fn logits_tensor(&self, x: &Tensor, y: Tensor) -> Result<Tensor> {
        table::logits_tensor(&self.lm_heads(), x, y)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::adapter::{Adapter, Generation, LoraPair};
    use crate::base::matmul::Format;
    use crate::base::products::{self, Batch};
    use crate::base::testing::{decoder, noise, options};
    use crate::base::{Architecture, DecoderOptions, Family, Kernels, ModelConfig, Module, Rope};
    use crate::engine::{Model, Output, Runner, Work};

    fn config(heads: usize, kv_heads: usize, head_dim: usize, hidden: usize, ffn: usize) -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            vocab_size: 8,
            hidden_size: hidden,
            intermediate_size: ffn,
            layers: 1,
            heads,
            kv_heads,
            head_dim,
            norm_eps: 1e-5,
            rope: Some(Rope::plain(1e4, head_dim)),
            windows: vec![],
            architecture: Architecture { qkv_bias: true, mlp_bias: true, ..Architecture::of(Family::Llama) },
            context: 8,
            tie_word_embeddings: true,
            predicts: true,
            bos_token: None,
            eos_tokens: vec![],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_the_plain_formula(
            (kv_heads, group, half) in (1usize..4, 1usize..4, 1usize..12),
            (hidden, ffn) in (1usize..80, 1usize..100),
            // Rows without an adapter before each segment, rows of the segment, its rank, which projections it has, and
            // of these, which have a magnitude and which a bias.
            segments in prop::collection::vec(
                (0usize..3, 1usize..6, 1usize..40, 1u8..128, any::<(bool, u8, u8)>()), 1..6),
            // As the base is served on the CPU: magnitudes are over the norms of these numbers.
            format in prop::option::of(prop::sample::select(vec![Format::Q4, Format::Q8, Format::Bf16])),
            seed in any::<u64>(),
        ) {
            let config = config(kv_heads * group, kv_heads, 2 * half, hidden, ffn);
            let mut next = noise(seed);
            let adapters: Vec<Adapter> = segments.iter().map(|&(_, _, rank, which, (bf16, magnitudes, biases))| {
                let (mut pairs, mut own_biases) = (BTreeMap::new(), BTreeMap::new());
                for (i, module) in config.target_modules().into_iter().enumerate() {
                    let (n, k) = (module.out_features, module.in_features);
                    // Also where there is no pair.
                    if (biases ^ magnitudes) & (1 << i) != 0 {
                        own_biases.insert((0, module.projection), (0..n).map(|_| next()).collect());
                    }
                    if which & (1 << i) == 0 { continue }
                    // Projections of one adapter may differ in rank, as `rank_pattern` allows.
                    let rank = 1 + (rank + i) % 39;
                    let mut weights = |n: usize| -> Vec<f32> {
                        let number = |x: f32| if bf16 { half::bf16::from_f32(x).to_f32() } else { x };
                        (0..n).map(|_| number(next())).collect()
                    };
                    let (a, b) = (weights(rank * k), weights(rank * n));
                    let bias = (biases & (1 << i) != 0).then(|| weights(n));
                    // The few weights of a short row may cancel almost to nothing, and a quotient by that is noise in f32.
                    let magnitude = (magnitudes & (1 << i) != 0 && k >= 8).then(|| weights(n));
                    let scale = 0.5 + i as f32;
                    pairs.insert((0, module.projection), LoraPair { rank, scale, a, b, bias, magnitude });
                }
                Adapter { pairs, biases: own_biases, ..Adapter::new(Generation::new("g")) }
            }).collect();
            let (mut rows, mut ranges) = (0, vec![]);
            for &(gap, len, ..) in &segments {
                ranges.push(rows + gap..rows + gap + len);
                rows += gap + len;
            }
            for kernels in Simd::all().into_iter().map(Kernels::Packed).chain([Kernels::Tensor]) {
                let base = decoder(&config, DecoderOptions { format, ..options(kernels) }, seed);
                let packed: Vec<_> = adapters.iter().map(|a| PackedAdapter::new(a.clone(), &base).unwrap()).collect();
                let simd = if let Kernels::Packed(simd) = kernels { simd } else { Simd::Portable };
                let segments = ranges.iter().zip(&packed).map(|(r, adapter)| Segment { rows: r.clone(), adapter });
                let delta = BatchDelta::new(simd, segments.collect());
                for site in Site::ALL.into_iter().filter(|site| !site.projections(config.family).is_empty()) {
                    let k = config.shape(site.projections(config.family)[0]).1;
                    let n: usize = site.projections(config.family).iter().map(|&p| config.shape(p).0).sum();
                    let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
                    let y: Vec<f32> = (0..rows * n).map(|_| next()).collect();
                    let mut got = y.clone();
                    match kernels {
                        Kernels::Packed(_) => {
                            let (products, width) = delta.down(0, site);
                            let mut h = vec![f32::NAN; rows * width];
                            let batch = Batch { products: &products, y: &mut h, y_stride: width, add: false };
                            products::multiply(simd, &x, k, batch);
                            let products = delta.up(0, site);
                            let batch = Batch { products: &products, y: &mut got, y_stride: n, add: true };
                            products::multiply(simd, &h, width, batch);
                            delta.finish(0, site, &mut got, rows);
                        }
                        Kernels::Tensor => {
                            let x = Tensor::from_slice(&x, (rows, k), &Device::Cpu).unwrap();
                            let y = Tensor::from_slice(&y, (rows, n), &Device::Cpu).unwrap();
                            got = delta.add_tensor(0, site, &x, y).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                        }
                    }
                    let mut want: Vec<f64> = y.iter().map(|&y| y as f64).collect();
                    for (range, adapter) in ranges.iter().zip(&adapters) {
                        let mut column = 0;
                        for &p in site.projections(config.family) {
                            let out = config.shape(p).0;
                            // The base's own bias comes after the delta.
                            let own = adapter.biases.get(&(0, p));
                            let replaced: Vec<f64> = match (own, base.bias(0, p).unwrap()) {
                                (Some(own), Some(base)) => {
                                    own.iter().zip(base).map(|(&own, base)| own as f64 - base as f64).collect()
                                }
                                _ => vec![0.0; out],
                            };
                            if let Some(pair) = adapter.pairs.get(&(0, p)) {
                                let weights = base.weights(Module::Linear(0, p)).unwrap();
                                let product = |j: usize, i: usize| -> f64 {
                                    let ba = (0..pair.rank).map(|r| {
                                        pair.b[j * pair.rank + r] as f64 * pair.a[r * k + i] as f64
                                    });
                                    pair.scale as f64 * ba.sum::<f64>()
                                };
                                for j in 0..out {
                                    let ba: Vec<f64> = (0..k).map(|i| product(j, i)).collect();
                                    let changed = ba.iter().zip(&weights[j * k..]).map(|(d, &w)| d + w as f64);
                                    let norm = changed.map(|w| w * w).sum::<f64>().sqrt();
                                    let gain = pair.magnitude.as_ref().map_or(1.0, |m| m[j] as f64 / norm);
                                    let shift = pair.bias.as_ref().map_or(0.0, |b| pair.scale as f64 * b[j] as f64);
                                    for row in range.clone() {
                                        let x = &x[row * k..][..k];
                                        let delta: f64 = ba.iter().zip(x).map(|(d, &x)| d * x as f64).sum();
                                        let want = &mut want[row * n + column + j];
                                        *want = gain * (*want + delta) + shift;
                                    }
                                }
                            }
                            for row in range.clone() {
                                let row = &mut want[row * n + column..][..out];
                                row.iter_mut().zip(&replaced).for_each(|(want, shift)| *want += shift);
                            }
                            column += out;
                        }
                    }
                    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                        prop_assert!((*g as f64 - w).abs() <= 3e-4 * (1.0 + w.abs()), "{kernels:?} {site:?} {i}: {g} {w}");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever its rank.
        #[test]
        fn beside_a_base_in_whole_numbers_an_adapter_is_too(
            ranks in prop::collection::vec(1usize..80, 3), rows in 1usize..20, four in any::<bool>(), seed in any::<u64>()
        ) {
            let config = config(2, 1, 32, 64, 32);
            let kernels = Kernels::for_device(&Device::Cpu);
            let format = if four { Format::Int4 } else { Format::Int8 };
            let base = decoder(&config, DecoderOptions { format: Some(format), ..options(kernels) }, seed);
            let mut next = noise(seed);
            let site = Site::Qkv.projections(config.family);
            let pairs: BTreeMap<_, _> = site.iter().zip(&ranks).map(|(&projection, &rank)| {
                let (n, k) = config.shape(projection);
                let mut numbers = |n: usize| (0..n).map(|_| next()).collect();
                let (a, b) = (numbers(rank * k), numbers(n * rank));
                ((0, projection), LoraPair { rank, scale: 2.0, a, b, ..LoraPair::default() })
            }).collect();
            let adapter = Adapter { pairs: pairs.clone(), ..Adapter::new(Generation::new("g")) };
            let packed = PackedAdapter::new(adapter, &base).unwrap();
            for part in &packed.sites.get(0, Site::Qkv).unwrap().parts {
                // Ranks of 4 bits are in eights.
                let format = if part.b.k().is_multiple_of(8) { format } else { Format::Int8 };
                prop_assert_eq!(part.b.packed().format(), format);
            }
            let Kernels::Packed(simd) = kernels else { unreachable!("these are a CPU's") };
            let delta = BatchDelta::new(simd, vec![Segment { rows: 0..rows, adapter: &packed }]);
            let (k, n) = (64, site.iter().map(|&p| config.shape(p).0).sum::<usize>());
            let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
            let (products, width) = delta.down(0, Site::Qkv);
            let (mut h, mut got) = (vec![f32::NAN; rows * width], vec![0.0; rows * n]);
            products::multiply(simd, &x, k, Batch { products: &products, y: &mut h, y_stride: width, add: false });
            let products = delta.up(0, Site::Qkv);
            products::multiply(simd, &h, width, Batch { products: &products, y: &mut got, y_stride: n, add: true });
            let (mut off, mut size) = (0.0, 0.0);
            for (x, got) in x.chunks_exact(k).zip(got.chunks_exact(n)) {
                let mut got = got.iter();
                for &projection in site {
                    let LoraPair { rank, a, b, .. } = &pairs[&(0, projection)];
                    let dot = |a: &[f32], x: &[f32]| a.iter().zip(x).map(|(a, x)| a * x).sum::<f32>();
                    let h: Vec<f32> = a.chunks_exact(k).map(|a| dot(a, x)).collect();
                    for (b, got) in b.chunks_exact(*rank).zip(got.by_ref()) {
                        let want = 2.0 * dot(b, &h);
                        (off, size) = (off + (want - got).powi(2), size + want.powi(2));
                    }
                }
            }
            let most = if four { 0.2f32 } else { 0.01 };
            prop_assert!(off <= most.powi(2) * size, "off by {} of it", (off / size).sqrt());
        }
    }

    /// Also where a layer's outputs are so wide that rows of them are not one behind the other.
    #[test]
    fn a_step_gives_each_sequence_what_it_has_alone() {
        let config = ModelConfig {
            layers: 2,
            architecture: Architecture::of(Family::Llama),
            context: 32,
            ..config(4, 2, 64, 512, 256)
        };
        let mut next = noise(7);
        let adapters: Vec<Adapter> = (0..9)
            .map(|i| {
                let mut pairs = BTreeMap::new();
                for module in config.target_modules() {
                    let (n, k, rank) = (module.out_features, module.in_features, 3 + 5 * i);
                    let mut weights = |n: usize| (0..n).map(|_| next() / 8.0).collect();
                    let (a, b) = (weights(rank * k), weights(n * rank));
                    let pair = LoraPair { rank, scale: 0.5, a, b, ..LoraPair::default() };
                    pairs.insert((module.layer, module.projection), pair);
                }
                Adapter { pairs, ..Adapter::new(Generation::new(i.to_string())) }
            })
            .collect();
        let plain = Kernels::Tensor;
        let packed = Simd::all().into_iter().map(Kernels::Packed);
        let mut want: Option<Vec<Vec<f32>>> = None;
        let kinds = std::iter::once((plain, None)).chain(packed.flat_map(|k| [(k, None), (k, Some(Format::Int8))]));
        for (kernels, format) in kinds {
            let base = Arc::new(decoder(&config, DecoderOptions { format, ..options(kernels) }, 3));
            let packed: Vec<_> =
                adapters.iter().map(|a| Arc::new(PackedAdapter::new(a.clone(), &base).unwrap())).collect();
            let mut runner = Runner::new(base, 1 << 20).unwrap();
            let work = |i: usize| Work {
                tokens: (0..if i == 4 { 20 } else { 1 }).map(|j| (i + j) as u32 % 8).collect(),
                start: 0,
                blocks: vec![2 * i as u32, 2 * i as u32 + 1],
                // One without.
                adapter: packed.get(i).cloned(),
                output: Output::LastLogits,
            };
            let works: Vec<Work> = (0..10).map(work).collect();
            let got = runner.step(&works).unwrap();
            for (i, work) in works.iter().enumerate() {
                let alone = runner.step(std::slice::from_ref(work)).unwrap();
                assert!(kernels == plain || alone[0] == got[i], "{kernels:?} {format:?}: sequence {i}");
            }
            let want = want.get_or_insert_with(|| got.clone());
            let most = if format.is_some() { 0.2 } else { 1e-3 };
            for (got, want) in got.iter().zip(&*want) {
                let size = want.iter().map(|w| w.abs()).fold(0.0, f32::max);
                let off = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
                assert!(off <= most * size, "{kernels:?} {format:?}: {off} of {size}");
            }
        }
    }

    #[test]
    fn factors_are_in_the_numbers_of_the_base() {
        let config = config(1, 1, 2, 4, 4);
        let pair = LoraPair { rank: 1, scale: 1.0, a: vec![1.0; 4], b: vec![1.0; 2], ..LoraPair::default() };
        let pairs = BTreeMap::from([((0, config.target_modules()[0].projection), pair)]);
        let adapter = Adapter { pairs, ..Adapter::new(Generation::new("g")) };
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let base = DecoderOptions { dtype, ..options(Kernels::Tensor) };
            let packed = PackedAdapter::new(adapter.clone(), &decoder(&config, base, 1)).unwrap();
            assert_eq!(packed.bytes, 6 * dtype.size_in_bytes());
            let site = packed.sites.get(0, Site::Qkv).unwrap();
            for factor in [site.a.as_ref().unwrap(), &site.parts[0].b] {
                assert!(matches!(factor, Factor::Tensor(t) if t.dtype() == dtype), "{factor:?}");
            }
        }
    }

    #[test]
    fn a_magnitude_over_nothing_is_refused() {
        // The pair takes all of the first output's weights away.
        let config = config(1, 1, 2, 1, 1);
        let base = decoder(&config, options(Kernels::for_device(&Device::Cpu)), 1);
        let q = config.target_modules()[0].projection;
        let weights = base.weights(Module::Linear(0, q)).unwrap();
        let pair = LoraPair {
            rank: 1,
            scale: 1.0,
            a: vec![1.0],
            b: vec![-weights[0], 0.0],
            magnitude: Some(vec![1.0; 2]),
            ..LoraPair::default()
        };
        let adapter = Adapter { pairs: BTreeMap::from([((0, q), pair)]), ..Adapter::new(Generation::new("g")) };
        let error = PackedAdapter::new(adapter, &base).unwrap_err();
        assert!(error.message.contains("model.layers.0.self_attn.q_proj: DoRA: the magnitude of output 0"), "{error}");
    }
}
