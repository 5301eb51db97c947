//! The CPU's kernels one by one: products with packed weights, the adapters' delta, attention over the paged cache. Rates
//! are in multiply-adds.
//!
//!     cargo bench --bench kernels                          # all, some four minutes
//!     cargo bench --bench kernels -- product/int8          # names are matched with a regular expression
//!     cargo bench --bench kernels -- 'attention/.*/1024'
//!
//! A kernel is called again and again with the same numbers, so what fits the caches comes from there. In a step of a model it
//! comes from memory: few rows are faster here than in `decode`.

use std::cell::{LazyCell, RefCell};
use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use half::bf16;
use loramux::adapter::{Adapter, Generation, LoraPair};
use loramux::base::attention::{self, Rotation};
use loramux::base::matmul::{Format, PackedMatrix};
use loramux::base::products::{self, Batch, Product};
use loramux::base::simd::Simd;
use loramux::base::{
    Architecture, BLOCK, Decoder, DecoderOptions, Delta, Family, Kernels, KvCache, ModelConfig, Projection, Rope,
    SequenceRows, Site, TargetModule, Weights,
};
use loramux::lora::{BatchDelta, PackedAdapter, Segment};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand_chacha::ChaCha8Rng;
use rand_distr::Normal;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

fn numbers(seed: u64, count: usize, deviation: f32) -> Vec<f32> {
    let normal = Normal::new(0.0, deviation).expect("a deviation");
    normal.sample_iter(ChaCha8Rng::seed_from_u64(seed)).take(count).collect()
}

/// `[out_features, in_features]` and the rows of each product: SmolLM2-135M's layers and its output layer, which few rows
/// of a step pass, and one of a Llama of 1B.
const SHAPES: [((usize, usize), &[usize]); 5] = [
    ((576, 576), &[1, 8, 32, 512]),
    ((576, 1536), &[1, 8, 32, 512]),
    ((1536, 576), &[1, 8, 32, 512]),
    ((49152, 576), &[1, 8, 32]),
    ((2048, 8192), &[1, 8, 32, 512]),
];

const FORMATS: [(&str, Format); 7] = [
    ("f32", Format::F32),
    ("bf16", Format::Bf16),
    ("f16", Format::F16),
    ("q8", Format::Q8),
    ("q4", Format::Q4),
    ("int8", Format::Int8),
    ("int4", Format::Int4),
];

/// `product/FORMAT/OUTxIN/ROWS`
fn products(criterion: &mut Criterion) {
    let simd = Simd::detect();
    for ((n, k), row_counts) in SHAPES {
        let weights = LazyCell::new(|| numbers(1, n * k, 0.02));
        for (name, format) in FORMATS {
            let matrix = LazyCell::new(|| PackedMatrix::pack(&weights, n, k, format));
            let mut group = criterion.benchmark_group(format!("product/{name}"));
            group.sampling_mode(SamplingMode::Flat);
            for &rows in row_counts {
                group.throughput(Throughput::Elements((rows * n * k) as u64));
                let input = LazyCell::new(|| numbers(2, rows * k, 1.0));
                let mut y = vec![0.0; rows * n];
                group.bench_function(BenchmarkId::new(format!("{n}x{k}"), rows), |bench| {
                    let product = Product { matrix: &matrix, rows: 0..rows, x_column: 0, y_column: 0, scale: 1.0 };
                    let x = &input[..];
                    bench.iter(|| {
                        let products = std::slice::from_ref(&product);
                        let batch = Batch { products, y: &mut y, y_stride: n, add: false };
                        products::multiply(simd, black_box(x), k, batch);
                    });
                });
            }
            group.finish();
        }
    }
}

/// A layer of SmolLM2-135M and next to no vocabulary.
fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: 16,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 1,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        norm_eps: 1e-5,
        rope: Some(Rope::plain(1e5, 64)),
        windows: vec![],
        architecture: Architecture::of(Family::Llama),
        context: 8192,
        tie_word_embeddings: true,
        predicts: true,
        bos_token: None,
        eos_tokens: vec![],
    }
}

/// With random weights, held as `format` says; `None` is f32.
fn decoder(format: Option<Format>) -> Decoder {
    let config = config();
    let matrices = config.target_modules().into_iter().map(|m| (m.name, vec![m.out_features, m.in_features]));
    let norms = config.norms().into_iter().map(|(_, name, width)| (name, vec![width]));
    let embedding = (config.family.names().embedding.to_string(), vec![config.vocab_size, config.hidden_size]);
    let shapes: Vec<(String, Vec<usize>)> = matrices.chain(norms).chain([embedding]).collect();
    let bytes = |shape: &[usize]| -> Vec<u8> {
        numbers(3, shape.iter().product(), 0.02).into_iter().flat_map(f32::to_le_bytes).collect()
    };
    let tensors: Vec<_> = shapes.iter().map(|(name, shape)| (format!("{name}.weight"), shape, bytes(shape))).collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("as many bytes as the shape needs"))
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = safetensors::serialize(views, None).expect("tensors");
    std::fs::write(folder.path().join("model.safetensors"), file).expect("a file");
    let weights = Weights::open_directory(folder.path(), config.family).expect("weights");
    let kernels = Kernels::for_device(&Device::Cpu);
    let options = DecoderOptions { device: Device::Cpu, kernels, format, dtype: DType::F32 };
    Decoder::load(&config, &weights, options).expect("a decoder")
}

const SITES: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

/// Width of what goes into a fused layer, and of what comes out.
fn widths(config: &ModelConfig, site: Site) -> (usize, usize) {
    let shapes = site.projections(config.family).iter().map(|&p| config.shape(p));
    shapes.fold((0, 0), |(_, out), (n, k)| (k, out + n))
}

/// Rows of a decode step with adapters.
const ROWS: usize = 32;

fn adapter(base: &Decoder, rank: usize, targets: &[TargetModule], seed: usize) -> PackedAdapter {
    let mut adapter = Adapter::new(Generation::new(seed.to_string()));
    for (i, module) in targets.iter().enumerate() {
        let factor = |which: usize, width: usize| {
            let seed = 100 * seed + 2 * i + which;
            numbers(seed as u64, rank * width, 0.02).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
        };
        let (a, b) = (factor(0, module.in_features), factor(1, module.out_features));
        let pair = LoraPair { rank, scale: 1.0, a, b, ..LoraPair::default() };
        adapter.pairs.insert((module.layer, module.projection), pair);
    }
    PackedAdapter::new(adapter, base).expect("an adapter of these shapes")
}

/// `delta/NUMBERS/TARGETS/RANKS/ADAPTERS`: a layer's for 32 rows, with the factors in bf16, as adapters are saved, and in 8
/// bits, as `--quantize q8` has them.
fn deltas(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let config = config();
    let inputs = SITES.map(|site| numbers(4, ROWS * widths(&config, site).0, 1.0));
    let mut outputs = SITES.map(|site| vec![0.0; ROWS * widths(&config, site).1]);
    let mut h = vec![];
    let all = config.target_modules();
    let some = all.iter().filter(|m| matches!(m.projection, Projection::Q | Projection::V)).cloned().collect();
    let ranks = [("r8", &[8][..]), ("r16", &[16]), ("mixed", &[8, 16, 32, 64])];
    for (name, format) in [("bf16", None), ("int8", Some(Format::Int8))] {
        let base = LazyCell::new(|| decoder(format));
        let mut group = criterion.benchmark_group(format!("delta/{name}"));
        group.sampling_mode(SamplingMode::Flat);
        for (targets_name, targets) in [("q,v", &some), ("all-linear", &all)] {
            let per_rank: usize = targets.iter().map(|m| m.in_features + m.out_features).sum();
            for (ranks_name, ranks) in ranks {
                for count in [1, 8, 32].into_iter().filter(|&count| count >= ranks.len()) {
                    let rank = |i: usize| ranks[i % ranks.len()];
                    let each = ROWS / count;
                    let multiply_adds = each * (0..count).map(rank).sum::<usize>() * per_rank;
                    group.throughput(Throughput::Elements(multiply_adds as u64));
                    let adapters: LazyCell<Vec<_>, _> =
                        LazyCell::new(|| (0..count).map(|i| adapter(&base, rank(i), targets, i)).collect());
                    group.bench_function(BenchmarkId::new(format!("{targets_name}/{ranks_name}"), count), |bench| {
                        let segment = |(i, adapter)| Segment { rows: i * each..(i + 1) * each, adapter };
                        let delta = BatchDelta::new(simd, adapters.iter().enumerate().map(segment).collect());
                        bench.iter(|| {
                            for (site, (x, y)) in SITES.into_iter().zip(inputs.iter().zip(&mut outputs)) {
                                let (products, width) = delta.down(0, site);
                                h.resize(ROWS * width, 0.0);
                                if width > 0 {
                                    let batch = Batch { products: &products, y: &mut h, y_stride: width, add: false };
                                    products::multiply(simd, black_box(x), x.len() / ROWS, batch);
                                    let (products, y_stride) = (delta.up(0, site), y.len() / ROWS);
                                    products::multiply(
                                        simd,
                                        &h,
                                        width,
                                        Batch { products: &products, y: &mut y[..], y_stride, add: true },
                                    );
                                }
                            }
                        });
                    });
                }
            }
        }
        group.finish();
    }
}

/// Sequences that share a step, each with blocks of its own.
struct Sequences {
    blocks: Vec<Vec<u32>>,
}

impl Sequences {
    fn new(count: usize, positions: usize) -> Self {
        let each = positions.div_ceil(BLOCK);
        Sequences { blocks: (0..count).map(|i| (i * each..(i + 1) * each).map(|b| b as u32).collect()).collect() }
    }

    /// `rows` of each, from position `start` on.
    fn step(&self, rows: usize, start: usize) -> Vec<SequenceRows<'_>> {
        let of = |(i, blocks)| SequenceRows { rows: i * rows..(i + 1) * rows, start, blocks };
        self.blocks.iter().map(Vec::as_slice).enumerate().map(of).collect()
    }
}

/// `attention/NUMBERS/decode/ROWS/POSITION`, a row of each sequence, and `attention/NUMBERS/prefill/TOKENS`, a sequence from
/// its start: of a layer, with keys and values in f32 and, as with `--quantize q8`, in f16.
fn attentions(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let config = config();
    let width = (config.heads + 2 * config.kv_heads) * config.head_dim;
    // Of a row that sees so many positions: scores, and sums of values.
    let multiply_adds = |seen: usize| (2 * config.heads * config.head_dim * seen) as u64;
    for (name, format) in [("f32", None), ("f16", Some(Format::Int8))] {
        let base = LazyCell::new(|| decoder(format));
        let cache = |sequences: &Sequences| {
            let blocks = sequences.blocks.iter().map(Vec::len).sum::<usize>();
            base.cache(blocks * KvCache::block_bytes(&config, false, DType::F32)).expect("a cache")
        };
        let attend = |steps: &[SequenceRows], rotation: &Rotation, qkv: &mut [f32], cache: &mut KvCache| {
            black_box(attention::alone(&config, simd, rotation, steps, black_box(qkv), cache));
        };
        let mut group = criterion.benchmark_group(format!("attention/{name}"));
        group.sampling_mode(SamplingMode::Flat);
        for rows in [1, 8, 32] {
            for position in [128, 1024] {
                let sequences = Sequences::new(rows, position + 1);
                let mut qkv = numbers(5, rows * width, 1.0);
                let steps = sequences.step(1, position);
                let rotation = Rotation::new(&config, &steps);
                let filled = LazyCell::new(|| {
                    let mut cache = cache(&sequences);
                    let steps = sequences.step(position, 0);
                    let mut earlier = numbers(6, rows * position * width, 1.0);
                    attend(&steps, &Rotation::new(&config, &steps), &mut earlier, &mut cache);
                    RefCell::new(cache)
                });
                group.throughput(Throughput::Elements(rows as u64 * multiply_adds(position + 1)));
                group.bench_function(BenchmarkId::new(format!("decode/{rows}"), position), |bench| {
                    let mut cache = filled.borrow_mut();
                    bench.iter(|| attend(&steps, &rotation, &mut qkv, &mut cache));
                });
            }
        }
        for tokens in [128, 512, 2048] {
            let sequences = Sequences::new(1, tokens);
            let mut qkv = numbers(5, tokens * width, 1.0);
            let steps = sequences.step(tokens, 0);
            let rotation = Rotation::new(&config, &steps);
            let empty = LazyCell::new(|| RefCell::new(cache(&sequences)));
            group.throughput(Throughput::Elements((1..=tokens).map(multiply_adds).sum()));
            group.bench_function(BenchmarkId::new("prefill", tokens), |bench| {
                let mut cache = empty.borrow_mut();
                bench.iter(|| attend(&steps, &rotation, &mut qkv, &mut cache));
            });
        }
        group.finish();
    }
}

fn main() {
    loramux::memory::keep(64 << 20);
    let (warm_up, measured) = (Duration::from_millis(200), Duration::from_millis(600));
    let criterion = Criterion::default().sample_size(10).nresamples(2000);
    let mut criterion = criterion.warm_up_time(warm_up).measurement_time(measured).configure_from_args();
    products(&mut criterion);
    deltas(&mut criterion);
    attentions(&mut criterion);
    criterion.final_summary();
}
