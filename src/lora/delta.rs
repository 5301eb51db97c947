//! The delta of a step: rows grouped by adapter, each group's through its own factors.

use std::ops::Range;

use candle_core::Tensor;

use super::packed::{Factor, PackedAdapter, PackedSite};
use crate::Result;
use crate::base::matmul::{self, Product};
use crate::base::simd::Simd;
use crate::base::{Delta, Site};

/// Rows of a step that use one adapter.
pub struct Segment<'a> {
    pub rows: Range<usize>,
    pub adapter: &'a PackedAdapter,
}

/// `y += scale * (x Aᵀ) Bᵀ` (arXiv 2106.09685) for every segment; rows of no segment keep the base's result.
///
/// All segments go through two parallel regions per fused layer, one for the A factors and one for the B factors, so
/// the cost of many adapters in a step is that of reading their factors, not of starting work for each.
pub struct BatchDelta<'a> {
    simd: Simd,
    /// In ascending order of rows.
    segments: Vec<Segment<'a>>,
}

impl<'a> BatchDelta<'a> {
    /// `segments` in ascending order of rows, without overlap.
    pub fn new(simd: Simd, segments: Vec<Segment<'a>>) -> Self {
        debug_assert!(segments.windows(2).all(|s| s[0].rows.end <= s[1].rows.start));
        BatchDelta { simd, segments }
    }

    fn sites(&self, layer: usize, site: Site) -> Vec<(&Range<usize>, &PackedSite)> {
        self.segments.iter().filter_map(|s| Some((&s.rows, s.adapter.sites.get(&(layer, site))?))).collect()
    }
}

impl Delta for BatchDelta<'_> {
    fn add(&self, layer: usize, site: Site, x: &[f32], y: &mut [f32], rows: usize) {
        let sites = self.sites(layer, site);
        let Some(width) = sites.iter().map(|(_, s)| s.a.n()).max() else { return };
        let (x_stride, y_stride) = (x.len() / rows, y.len() / rows);
        let mut down = Vec::with_capacity(sites.len());
        let mut up = Vec::with_capacity(3 * sites.len());
        for (rows, site) in &sites {
            let Factor::Packed(matrix) = &site.a else { unreachable!("adapters are packed for the base's kernels") };
            down.push(Product { matrix, rows: (*rows).clone(), x_column: 0, y_column: 0, scale: 1.0 });
            for part in &site.parts {
                let Factor::Packed(matrix) = &part.b else { unreachable!("both factors are packed alike") };
                let (x_column, y_column) = (part.rank_start, part.column);
                up.push(Product { matrix, rows: (*rows).clone(), x_column, y_column, scale: part.scale });
            }
        }
        let mut h = vec![0.0; rows * width];
        matmul::multiply(self.simd, &down, x, x_stride, &mut h, width);
        matmul::multiply(self.simd, &up, &h, width, y, y_stride);
    }

    fn add_tensor(&self, layer: usize, site: Site, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let mut y = y;
        for (rows, site) in self.sites(layer, site) {
            let rows_of = |t: &Tensor| t.narrow(0, rows.start, rows.len());
            let tensor = |factor: &Factor| match factor {
                Factor::Tensor(t) => t.t(),
                Factor::Packed(_) => unreachable!("adapters are packed for the base's kernels"),
            };
            let h = rows_of(x)?.matmul(&tensor(&site.a)?)?;
            let mut part_of_y = rows_of(&y)?;
            for part in &site.parts {
                let b = tensor(&part.b)?;
                let (rank, n) = b.dims2()?;
                let h = h.narrow(1, part.rank_start, rank)?.contiguous()?;
                let delta = (h.matmul(&b)? * part.scale as f64)?;
                let sum = (part_of_y.narrow(1, part.column, n)? + delta)?;
                part_of_y = part_of_y.slice_assign(&[0..rows.len(), part.column..part.column + n], &sum)?;
            }
            let width = part_of_y.dims()[1];
            y = y.slice_assign(&[rows.clone(), 0..width], &part_of_y)?;
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::adapter::{Adapter, Generation, LoraPair};
    use crate::base::{Architecture, DecoderOptions, Family, Kernels, ModelConfig, Rope};

    fn numbers(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed | 1;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

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
            architecture: Architecture::of(Family::Llama),
            context: 8,
            tie_word_embeddings: true,
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
            // Rows without an adapter before each segment, rows of the segment, its rank, which projections it has.
            segments in prop::collection::vec((0usize..3, 1usize..6, 1usize..40, 1u8..128, any::<bool>()), 1..6),
            seed in any::<u64>(),
        ) {
            let config = config(kv_heads * group, kv_heads, 2 * half, hidden, ffn);
            let mut next = numbers(seed);
            let adapters: Vec<Adapter> = segments.iter().map(|&(_, _, rank, which, bf16)| {
                let mut pairs = BTreeMap::new();
                for (i, module) in config.target_modules().into_iter().enumerate() {
                    if which & (1 << i) == 0 { continue }
                    // Projections of one adapter may differ in rank, as `rank_pattern` allows.
                    let rank = 1 + (rank + i) % 39;
                    let mut weight = || if bf16 { half::bf16::from_f32(next()).to_f32() } else { next() };
                    let a = (0..rank * module.in_features).map(|_| weight()).collect();
                    let b = (0..rank * module.out_features).map(|_| weight()).collect();
                    pairs.insert((0, module.projection), LoraPair { rank, scale: 0.5 + i as f32, a, b });
                }
                Adapter { generation: Generation::new("g"), pairs, head: None }
            }).collect();
            let (mut rows, mut ranges) = (0, vec![]);
            for &(gap, len, ..) in &segments {
                ranges.push(rows + gap..rows + gap + len);
                rows += gap + len;
            }
            for kernels in Simd::all().into_iter().map(Kernels::Packed).chain([Kernels::Tensor]) {
                let base = DecoderOptions { device: Device::Cpu, kernels, format: None, dtype: DType::F32 };
                let packed: Vec<_> =
                    adapters.iter().map(|a| PackedAdapter::new(a.clone(), &config, &base).unwrap()).collect();
                let simd = if let Kernels::Packed(simd) = kernels { simd } else { Simd::Portable };
                let segments = ranges.iter().zip(&packed).map(|(r, adapter)| Segment { rows: r.clone(), adapter });
                let delta = BatchDelta::new(simd, segments.collect());
                for site in Site::ALL {
                    let k = config.shape(site.projections(config.family)[0]).1;
                    let n: usize = site.projections(config.family).iter().map(|&p| config.shape(p).0).sum();
                    let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
                    let y: Vec<f32> = (0..rows * n).map(|_| next()).collect();
                    let mut got = y.clone();
                    match kernels {
                        Kernels::Packed(_) => delta.add(0, site, &x, &mut got, rows),
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
                            if let Some(pair) = adapter.pairs.get(&(0, p)) {
                                for row in range.clone() {
                                    for r in 0..pair.rank {
                                        let h: f64 = (0..k)
                                            .map(|i| x[row * k + i] as f64 * pair.a[r * k + i] as f64).sum();
                                        for j in 0..out {
                                            want[row * n + column + j] +=
                                                pair.scale as f64 * h * pair.b[j * pair.rank + r] as f64;
                                        }
                                    }
                                }
                            }
                            column += out;
                        }
                    }
                    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                        prop_assert!((*g as f64 - w).abs() <= 2e-4 * (1.0 + w.abs()), "{kernels:?} {site:?} {i}: {g} {w}");
                    }
                }
            }
        }
    }

    #[test]
    fn factors_are_in_the_numbers_of_the_base() {
        let config = config(1, 1, 2, 4, 4);
        let pair = LoraPair { rank: 1, scale: 1.0, a: vec![1.0; 4], b: vec![1.0; 2] };
        let pairs = BTreeMap::from([((0, config.target_modules()[0].projection), pair)]);
        let adapter = Adapter { generation: Generation::new("g"), pairs, head: None };
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let base = DecoderOptions { device: Device::Cpu, kernels: Kernels::Tensor, format: None, dtype };
            let packed = PackedAdapter::new(adapter.clone(), &config, &base).unwrap();
            assert_eq!(packed.bytes, 6 * dtype.size_in_bytes());
            let site = &packed.sites[&(0, Site::Qkv)];
            for factor in [&site.a, &site.parts[0].b] {
                assert!(matches!(factor, Factor::Tensor(t) if t.dtype() == dtype), "{factor:?}");
            }
        }
    }
}
