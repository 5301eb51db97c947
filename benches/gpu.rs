//! What a GPU gives of what it has, by models of random weights: each line beside a floor or a baseline of the same run.
//!
//!     cargo bench --features cuda --bench gpu -- 1b 8b          # in bf16
//!     cargo bench --bench gpu -- tiny device=cpu dtype=f32      # whether this program works
//!
//! Lines of Markdown: shape, what, measured, against what, share of it.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use loramux::adapter::{Adapter, Generation, LoraPair};
use loramux::base::simd::Simd;
use loramux::base::{Decoder, DecoderOptions, Delta, Family, Kernels, ModelConfig, Projection, Site, Weights, device};
use loramux::engine::{Draw, Model, Output, Runner, Work};
use loramux::lora::{BatchDelta, PackedAdapter, Pool, Segment};
use serde_json::json;

/// Sizes of a Llama.
struct Shape {
    name: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    vocab: usize,
    ties: bool,
}

/// As Llama 3.2 1B and Llama 3.1 8B are.
const SHAPES: [Shape; 3] = [
    Shape { name: "tiny", hidden: 64, layers: 2, heads: 4, kv_heads: 2, ffn: 128, vocab: 512, ties: true },
    Shape { name: "1b", hidden: 2048, layers: 16, heads: 32, kv_heads: 8, ffn: 8192, vocab: 128_256, ties: true },
    Shape { name: "8b", hidden: 4096, layers: 32, heads: 32, kv_heads: 8, ffn: 14_336, vocab: 128_256, ties: false },
];

const RANK: usize = 16;
/// Sequences of the mixed step, an adapter each.
const MANY: usize = 64;
/// Adapters that have to be resident at once.
const RESIDENT: usize = 1000;
/// Position of decode steps.
const START: usize = 128;
const PROMPT: usize = 2048;
const STEPS: usize = 50;

fn value(name: &str) -> Option<String> {
    std::env::args().find_map(|argument| Some(argument.strip_prefix(name)?.strip_prefix('=')?.to_string()))
}

/// Seconds of each call, in ascending order, after some that are not counted.
fn times(calls: usize, mut call: impl FnMut()) -> Vec<f64> {
    (0..calls.min(3)).for_each(|_| call());
    let mut seconds: Vec<f64> = (0..calls)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

fn median(calls: usize, call: impl FnMut()) -> f64 {
    quantile(&times(calls, call), 0.5)
}

/// Uniform in -1 to 1.
fn noise(mut state: u64) -> impl FnMut() -> f32 {
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

impl Shape {
    fn config(&self) -> ModelConfig {
        let json = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden / self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.ties,
            "torch_dtype": "bfloat16",
        });
        ModelConfig::from_json(&json.to_string()).expect("a config")
    }

    /// Writes `model.safetensors` with random bf16 numbers, such that sums of a matrix's row are about as large as its inputs.
    fn write(&self, config: &ModelConfig, folder: &Path) {
        let linears = config.target_modules().into_iter().map(|m| (m.name, vec![m.out_features, m.in_features]));
        let norms = config.norms().into_iter().map(|(_, name, width)| (name, vec![width]));
        let tables = [("model.embed_tokens", true), ("lm_head", !self.ties)];
        let tables = tables.into_iter().filter(|(_, there)| *there);
        let tables = tables.map(|(name, _)| (name.to_string(), vec![self.vocab, self.hidden]));
        let tensors: Vec<(String, Vec<usize>)> = linears.chain(norms).chain(tables).collect();
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in &tensors {
            let bytes = 2 * shape.iter().product::<usize>();
            let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes] });
            header.insert(format!("{name}.weight"), entry);
            end += bytes;
        }
        let mut header = serde_json::Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let file = std::fs::File::create(folder.join("model.safetensors")).expect("a file");
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&(header.len() as u64).to_le_bytes()).expect("room");
        file.write_all(header.as_bytes()).expect("room");
        let mut next = noise(1);
        // One period for all: what the numbers are is of no matter to how long their product takes.
        let unit: Vec<f32> = (0..1 << 20).map(|_| next()).collect();
        for (_, shape) in &tensors {
            let count: usize = shape.iter().product();
            let size = if shape.len() == 1 { 0.0 } else { (3.0 / shape[1] as f32).sqrt() };
            let number = |x: &f32| half::bf16::from_f32(if size == 0.0 { 1.0 } else { size * x }).to_le_bytes();
            let bytes: Vec<u8> = unit.iter().flat_map(number).collect();
            for start in (0..count).step_by(unit.len()) {
                file.write_all(&bytes[..2 * (count - start).min(unit.len())]).expect("room");
            }
        }
        file.flush().expect("room");
    }
}

struct Bench {
    shape: &'static Shape,
    config: ModelConfig,
    decoder: Arc<Decoder>,
    runner: Runner,
    /// Bytes a second that the device reads and writes, and operations a second of a product.
    bandwidth: f64,
    rate: f64,
}

impl Bench {
    fn line(&self, what: &str, measured: &str, against: &str, share: f64) {
        println!("| {} | {what} | {measured} | {against} | {share:.2} |", self.shape.name);
    }

    /// Weights that a decode step reads.
    fn weights(&self) -> f64 {
        let table = self.config.vocab_size * self.config.hidden_size * self.decoder.options().dtype.size_in_bytes();
        // The embedding is looked up; where it is the output layer too, it is read as that.
        self.decoder.bytes() as f64 - if self.shape.ties { 0.0 } else { table as f64 }
    }

    fn adapter(&self, name: usize, pairs: &BTreeMap<(usize, Projection), LoraPair>) -> Adapter {
        Adapter { pairs: pairs.clone(), ..Adapter::new(Generation::new(name.to_string())) }
    }

    fn pairs(&self, only: &[Projection]) -> BTreeMap<(usize, Projection), LoraPair> {
        let mut next = noise(7);
        let modules = self.config.target_modules().into_iter();
        let modules = modules.filter(|m| only.is_empty() || only.contains(&m.projection));
        let mut numbers = |n: usize| (0..n).map(|_| half::bf16::from_f32(0.01 * next()).to_f32()).collect::<Vec<f32>>();
        modules
            .map(|m| {
                let (a, b) = (numbers(RANK * m.in_features), numbers(RANK * m.out_features));
                ((m.layer, m.projection), LoraPair { rank: RANK, scale: 1.0, a, b, ..LoraPair::default() })
            })
            .collect()
    }

    fn on_pages(&self, count: usize, only: &[Projection], pool: Option<&Arc<Pool>>) -> Vec<Arc<PackedAdapter>> {
        let pairs = self.pairs(only);
        let pack = |i| PackedAdapter::on(self.adapter(i, &pairs), &self.decoder, pool);
        // What does not fit any more is not there.
        (0..count).map_while(|i| pack(i).ok()).map(Arc::new).collect()
    }

    fn decoding(&self, rows: usize, adapters: &[Arc<PackedAdapter>]) -> Vec<Work> {
        let blocks = (START + 1).div_ceil(self.runner.block_size());
        let work = |i: usize| Work {
            tokens: vec![(100 + i) as u32],
            start: START,
            blocks: (i * blocks..(i + 1) * blocks).map(|block| block as u32).collect(),
            adapter: adapters.get(i).cloned(),
            output: Output::LastLogits,
        };
        (0..rows).map(work).collect()
    }

    /// A step whose tokens are drawn, greedily, as a server's are.
    fn step(&mut self, work: &[Work]) {
        let greedy = Draw { temperature: 0.0, ..Draw::default() };
        self.runner.step_and_draw(work, &vec![Some(greedy); work.len()]).expect("a step");
    }

    fn decode(&mut self) {
        let work = self.decoding(1, &[]);
        let seconds = median(STEPS, || self.step(&work));
        let floor = self.weights() / self.bandwidth;
        let (ms, floor_ms) = (format!("{:.2} ms", seconds * 1e3), format!("{:.2} ms to read the weights", floor * 1e3));
        self.line("decode, 1 sequence", &ms, &floor_ms, floor / seconds);
    }

    fn mixed(&mut self, adapters: &[Arc<PackedAdapter>]) {
        for rows in [MANY / 2, MANY] {
            let (alone, mixed) = (self.decoding(rows, &[]), self.decoding(rows, adapters));
            let base = median(STEPS, || self.step(&alone));
            let with = median(STEPS, || self.step(&mixed));
            let rate = |seconds: f64| format!("{:.0} tokens/s", rows as f64 / seconds);
            let what = format!("decode, {rows} sequences, as many adapters (rank {RANK}, all linear layers)");
            self.line(&what, &rate(with), &format!("{} of the base", rate(base)), base / with);
        }
    }

    /// The kernels of the delta alone, for all layers of a decode step.
    fn delta(&self, adapters: &[Arc<PackedAdapter>]) {
        let dtype = self.decoder.options().dtype;
        let device = &self.decoder.options().device;
        let rows = adapters.len();
        let segments = adapters.iter().enumerate().map(|(i, adapter)| Segment { rows: i..i + 1, adapter });
        let delta = BatchDelta::new(Simd::detect(), segments.collect());
        let (mut bytes, mut sites) = (0, vec![]);
        for site in [Site::Qkv, Site::O, Site::GateUp, Site::Down] {
            let projections = site.projections(Family::Llama);
            let k = self.config.shape(projections[0]).1;
            let n: usize = projections.iter().map(|&p| self.config.shape(p).0).sum();
            let random = |width| Tensor::randn(0f32, 1.0, (rows, width), device).and_then(|t| t.to_dtype(dtype));
            sites.push((site, random(k).expect("x"), random(n).expect("y")));
            let factors: usize = projections.iter().map(|_| RANK * k).sum::<usize>() + RANK * n;
            bytes += (factors * rows + rows * (k + 2 * n)) * dtype.size_in_bytes();
        }
        let layers = self.config.layers;
        let all = || {
            for layer in 0..layers {
                for (site, x, y) in &sites {
                    delta.add_tensor(layer, *site, x, y.clone()).expect("a delta");
                }
            }
            device.synchronize().expect("a device");
        };
        let seconds = median(STEPS, all);
        let floor = (bytes * layers) as f64 / self.bandwidth;
        let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
        let what = format!("kernels of the delta, {rows} rows and adapters, all layers");
        self.line(&what, &ms(seconds), &format!("{} to read and write it", ms(floor)), floor / seconds);
    }

    fn prefill(&mut self) {
        let tokens = PROMPT.min(self.config.context);
        let blocks = tokens.div_ceil(self.runner.block_size()) as u32;
        let tokens: Vec<u32> = (0..tokens as u32).map(|i| i % self.config.vocab_size as u32).collect();
        let count = tokens.len();
        let work = Work { tokens, start: 0, blocks: (0..blocks).collect(), adapter: None, output: Output::LastLogits };
        let seconds = median(10, || self.step(std::slice::from_ref(&work)));
        let linears: usize = self.config.target_modules().iter().map(|m| m.out_features * m.in_features).sum();
        // Pairs of a position and one that it sees, twice: scores and sums.
        let attended = self.config.layers * self.config.heads * self.config.head_dim * count * (count + 1);
        let operations = 2.0 * (linears * count + attended) as f64;
        let (got, rate) = (operations / seconds / 1e12, self.rate / 1e12);
        let what = format!("prompt of {count} tokens: {:.0} tokens/s", count as f64 / seconds);
        self.line(&what, &format!("{got:.1} Tflop/s"), &format!("{rate:.1} of a product of 8192"), got / rate);
    }

    /// Adapters go to pages while steps run.
    fn uploads(&mut self, adapters: &[Arc<PackedAdapter>], pool: &Arc<Pool>) {
        let work = self.decoding(adapters.len().min(MANY / 2), adapters);
        let alone = times(4 * STEPS, || self.step(&work));
        let pairs = self.pairs(&[]);
        let packed = PackedAdapter::for_pages(self.adapter(MANY, &pairs), &self.decoder, pool);
        let mut packed = packed.expect("an adapter");
        let (is_done, uploaded) = (AtomicBool::new(false), std::sync::atomic::AtomicUsize::new(0));
        let (decoder, bytes) = (self.decoder.clone(), packed.bytes);
        let beside = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::SeqCst) {
                    assert!(packed.place(pool).expect("pages"));
                    uploaded.fetch_add(1, Ordering::SeqCst);
                    let adapter = Adapter { pairs: pairs.clone(), ..Adapter::new(Generation::new("again")) };
                    packed = PackedAdapter::for_pages(adapter, &decoder, pool).expect("an adapter");
                }
            });
            let beside = times(4 * STEPS, || self.step(&work));
            is_done.store(true, Ordering::SeqCst);
            beside
        });
        let ms = |times: &[f64]| quantile(times, 0.99) * 1e3;
        let (count, size) = (uploaded.load(Ordering::SeqCst), bytes as f64 / 1e6);
        let what = format!("time between tokens (p99) while {count} adapters of {size:.0} MB are uploaded");
        let added = format!("{:.2} ms more", ms(&beside) - ms(&alone));
        self.line(
            &what,
            &format!("{:.2} ms", ms(&beside)),
            &format!("{:.2} ms without: {added}", ms(&alone)),
            ms(&alone) / ms(&beside),
        );
    }
}

fn main() {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let shapes: Vec<&Shape> = SHAPES.iter().filter(|shape| names.iter().any(|name| name == shape.name)).collect();
    if shapes.is_empty() {
        return println!("name shapes: tiny, 1b, 8b");
    }
    let device = device::open(value("device").as_deref().unwrap_or("cuda")).expect("a device");
    let dtype: DType = value("dtype").as_deref().unwrap_or("bf16").parse().expect("numbers that candle has");
    // What the device has: a copy reads and writes, a product multiplies and adds.
    let (copied, side) = if device.is_cpu() { (1 << 22, 256) } else { (1 << 30, 8192) };
    let large = Tensor::zeros(copied, DType::F32, &device).expect("memory");
    let sync = || device.synchronize().expect("a device");
    let seconds = median(10, || {
        let _copy = large.copy().expect("a copy");
        sync();
    });
    let bandwidth = 8.0 * copied as f64 / seconds;
    drop(large);
    let square = Tensor::randn(0f32, 1.0, (side, side), &device).and_then(|t| t.to_dtype(dtype)).expect("memory");
    let seconds = median(10, || {
        let _product = square.matmul(&square).expect("a product");
        sync();
    });
    let rate = 2.0 * (side as f64).powi(3) / seconds;
    drop(square);
    println!("| shape | what | measured | against | share |\n|---|---|--:|--:|--:|");
    println!("| | the device | {:.0} GB/s copied, {:.1} Tflop/s in {dtype:?} | | |", bandwidth / 1e9, rate / 1e12);
    for shape in shapes {
        run(shape, &device, dtype, bandwidth, rate);
    }
}

fn run(shape: &'static Shape, device: &Device, dtype: DType, bandwidth: f64, rate: f64) {
    let config = shape.config();
    let folder = tempfile::tempdir().expect("a folder");
    shape.write(&config, folder.path());
    let weights = Weights::open_directory(folder.path(), Family::Llama).expect("weights");
    let options = DecoderOptions { device: device.clone(), kernels: Kernels::Tensor, format: None, dtype };
    let start = Instant::now();
    let decoder = Arc::new(Decoder::load(&config, &weights, options).expect("weights"));
    eprintln!("{} loaded in {:.1} s", shape.name, start.elapsed().as_secs_f64());
    drop((weights, folder));
    let positions = PROMPT.max(MANY * (START + 1).next_multiple_of(decoder.kv_block_size()));
    let blocks = positions.div_ceil(decoder.kv_block_size());
    let runner = Runner::new(decoder.clone(), blocks * decoder.kv_block_bytes()).expect("cache");
    let mut bench = Bench { shape, config, decoder: decoder.clone(), runner, bandwidth, rate };
    bench.decode();
    bench.prefill();
    let sizes: usize = bench.config.target_modules().iter().map(|m| m.out_features + m.in_features).sum();
    let room = (RANK * sizes * dtype.size_in_bytes() * (MANY + 4)) as u64;
    {
        // Blocks leave some of a page empty, and a part is for what is on no page.
        let pool = Pool::open(&decoder, room + room / 2).expect("pages");
        let adapters = bench.on_pages(MANY, &[], pool.as_ref());
        assert_eq!(adapters.len(), MANY, "pages for all adapters");
        bench.mixed(&adapters);
        bench.delta(&adapters);
        if let Some(pool) = &pool {
            bench.uploads(&adapters, pool);
        }
    }
    let Ok(Some(memory)) = device::memory(device) else { return };
    let only = [Projection::Q, Projection::V];
    let pool = Pool::open(&decoder, memory.free.saturating_sub(2 << 30)).expect("pages");
    let start = Instant::now();
    let adapters = bench.on_pages(RESIDENT + MANY, &only, pool.as_ref());
    let (count, bytes) = (adapters.len(), adapters.first().map_or(0, |adapter| adapter.bytes) as f64 / 1e6);
    let loaded = start.elapsed().as_secs_f64();
    // The last ones, so that what came late is there.
    let work = bench.decoding(MANY, &adapters[count.saturating_sub(MANY)..]);
    bench.step(&work);
    let what = format!("adapters resident (rank {RANK}, q and v, {bytes:.1} MB each), loaded in {loaded:.0} s");
    bench.line(&what, &count.to_string(), &RESIDENT.to_string(), count as f64 / RESIDENT as f64);
}
