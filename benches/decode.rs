//! Steps of the default model, or of another: prompts, then decode steps; of the base alone, and with different adapters.
//!
//!     cargo bench --bench decode            # the weights as the file has them
//!     cargo bench --bench decode -- int8    # as `--quantize q8` has them
//!     cargo bench --bench decode -- int8 model=llama-1b.gguf   # see serve/shape.py
//!     cargo bench --bench decode -- 8 32 steps=300 only=base   # only so many rows, longer, without adapters: to profile
//!     cargo bench --bench decode -- int8 rank=8 targets=q,v    # other adapters than those of all linear layers
//!     cargo bench --bench decode -- prompt=512 threads=4 json   # one prompt of so many tokens; a JSON object a line
//!     cargo bench --features cuda --bench decode -- device=cuda dtype=bf16

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::DType;
use loramux::adapter::{Adapter, Generation, LoraPair};
use loramux::base::matmul::Format;
use loramux::base::{Base, DEFAULT_MODEL, Decoder, DecoderOptions, Kernels, device, parallel};
use loramux::engine::{Draw, Model, Output, Runner, Work};
use loramux::lora::{PackedAdapter, Pool};
use serde_json::json;

const RANK: usize = 16;
const ADAPTERS: usize = 32;
/// Position of the rows of decode steps.
const START: usize = 100;

/// What follows `NAME=` among the arguments.
fn value(name: &str) -> Option<String> {
    std::env::args().find_map(|argument| Some(argument.strip_prefix(name)?.strip_prefix('=')?.to_string()))
}

/// Seconds that a call takes.
fn median<T>(calls: usize, mut call: impl FnMut() -> T) -> f64 {
    let mut seconds: Vec<f64> = (0..calls)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[calls / 2]
}

/// [`median`] of calls without adapters and with them; NaN for those that `only=base` or `only=adapters` leaves out.
fn medians<T>(calls: usize, mut call: impl FnMut(bool) -> T) -> [f64; 2] {
    let only = value("only");
    [("base", false), ("adapters", true)].map(|(name, with)| match &only {
        Some(only) if only != name => f64::NAN,
        _ => median(calls, || call(with)),
    })
}

/// Seconds of steps of the base alone, and with an adapter for each sequence.
struct Pair {
    base: f64,
    adapters: f64,
    /// Of a step.
    tokens: usize,
}

impl Pair {
    fn rate(&self, seconds: f64) -> f64 {
        self.tokens as f64 / seconds
    }

    /// `what`, and tokens a second of both.
    fn print_json(&self, mut what: serde_json::Value) {
        (what["base"], what["adapters"]) = (self.rate(self.base).into(), self.rate(self.adapters).into());
        println!("{what}");
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (base, adapters) = (self.base, self.adapters);
        write!(f, "{:7.1}  {:5.0}  | ", base * 1e3, self.rate(base))?;
        write!(f, "{:7.1}  {:5.0}  {:.2}", adapters * 1e3, self.rate(adapters), base / adapters)
    }
}

fn main() {
    loramux::memory::keep(64 << 20);
    let has = |word: &str| std::env::args().any(|argument| argument == word);
    let number = |name: &str| -> Option<usize> { value(name)?.parse().ok() };
    if let Some(threads) = number("threads") {
        parallel::set_threads(threads);
    }
    let steps = number("steps").unwrap_or(15);
    let other = value("model");
    let json = has("json");
    let base = Base::open(other.as_deref().unwrap_or(DEFAULT_MODEL)).expect("a model");
    let device = device::open(value("device").as_deref().unwrap_or("cpu")).expect("a device");
    let kernels = Kernels::for_device(&device);
    let format = has("int8").then_some(Format::Int8);
    let dtype = value("dtype").map_or(DType::F32, |name| name.parse().expect("numbers that candle has"));
    let options = DecoderOptions { device, kernels, format, dtype };
    let decoder = Arc::new(Decoder::load(&base.config, &base.weights, options).expect("weights"));
    let mut runner = Runner::new(decoder.clone(), 256 << 20).expect("cache");
    let rank = number("rank").unwrap_or(RANK);
    let mut modules = base.config.target_modules();
    if let Some(targets) = value("targets") {
        let has = |name: &str| targets.split(',').any(|target| name.starts_with(&format!("{target}_")));
        modules.retain(|m| has(base.config.module(m.layer, m.projection).rsplit('.').next().unwrap_or_default()));
        assert!(!modules.is_empty(), "there are no targets {targets}");
    }
    // On a GPU adapters are on pages, of which a few blocks' worth is empty.
    let numbers: usize = modules.iter().map(|m| rank * (m.out_features + m.in_features)).sum();
    let room = (ADAPTERS * numbers * dtype.size_in_bytes()) as u64;
    let pool = Pool::open(&decoder, 3 * room + (64 << 20)).expect("pages");
    let adapter = |i: usize| {
        let weight = |j: usize| half::bf16::from_f32(((i * 31 + j) % 17) as f32 / 1e3).to_f32();
        let pair = |n: usize, k: usize| LoraPair {
            rank,
            scale: 1.0,
            a: (0..rank * k).map(weight).collect(),
            b: (0..rank * n).map(weight).collect(),
            ..LoraPair::default()
        };
        let pairs: BTreeMap<_, _> =
            modules.iter().map(|m| ((m.layer, m.projection), pair(m.out_features, m.in_features))).collect();
        Adapter { pairs, ..Adapter::new(Generation::new(i.to_string())) }
    };
    let pack = |i| Arc::new(PackedAdapter::on(adapter(i), &decoder, pool.as_ref()).expect("packed"));
    let adapters: Vec<_> = (0..ADAPTERS).map(pack).collect();
    // Prompts in one step, with nothing in the cache.
    if !json {
        println!("prompts  base ms  tok/s  | {rank}-rank adapter each: ms  tok/s  of base");
    }
    let asked: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let usual = if asked.is_empty() { vec![(1, 128), (1, 512), (8, 64)] } else { vec![] };
    let prompts = number("prompt").map_or(usual, |tokens| vec![(1, tokens)]);
    for (prompts, tokens) in prompts {
        let blocks = tokens.div_ceil(runner.block_size());
        let [base, adapters] = medians(if value("steps").is_some() { steps } else { 5 }, |with| {
            let work = |i: usize| Work {
                tokens: (0..tokens).map(|j| 100 + (i * tokens + j) as u32).collect(),
                start: 0,
                blocks: (i * blocks..(i + 1) * blocks).map(|block| block as u32).collect(),
                adapter: with.then(|| adapters[i].clone()),
                output: Output::LastLogits,
            };
            step(&mut runner, &(0..prompts).map(work).collect::<Vec<Work>>())
        });
        let pair = Pair { base, adapters, tokens: prompts * tokens };
        match json {
            true => pair.print_json(json!({ "prompts": prompts, "tokens": tokens })),
            false => println!("{prompts} x {tokens:3}  {pair}"),
        }
    }
    if !json {
        println!("rows  start  base ms  tok/s  | {rank}-rank adapter each: ms  tok/s  of base");
    }
    for rows in if asked.is_empty() { vec![1, 2, 4, 8, 16, 32] } else { asked } {
        assert!(rows * 8 <= runner.blocks() && START < 8 * runner.block_size());
        let [base, adapters] = medians(steps, |with| step(&mut runner, &decoding(rows, with.then_some(&adapters))));
        let pair = Pair { base, adapters, tokens: rows };
        match json {
            true => pair.print_json(json!({ "rows": rows, "start": START })),
            false => println!("{rows:4}    {START}  {pair}"),
        }
    }
    let Some(pool) = pool else { return };
    // Others go to pages meanwhile.
    let work = decoding(ADAPTERS, Some(&adapters));
    let alone = median(steps, || step(&mut runner, &work));
    let load = |i| PackedAdapter::for_pages(adapter(i), &decoder, &pool).expect("packed");
    let mut loaded: Vec<_> = (0..ADAPTERS).map(load).collect();
    let bytes: usize = loaded.iter().map(|adapter| adapter.bytes).sum();
    let is_done = AtomicBool::new(false);
    let (seconds, steps, all) = std::thread::scope(|scope| {
        let uploads = scope.spawn(|| {
            let start = Instant::now();
            assert!(loaded.iter_mut().all(|adapter| adapter.place(&pool).expect("pages")));
            is_done.store(true, Ordering::SeqCst);
            start.elapsed().as_secs_f64()
        });
        let (start, mut steps) = (Instant::now(), 0);
        while !is_done.load(Ordering::SeqCst) || steps == 0 {
            step(&mut runner, &work);
            steps += 1;
        }
        (uploads.join().expect("uploads"), steps, start.elapsed().as_secs_f64())
    });
    let (rate, alone) = (bytes as f64 / seconds / 1e9, ADAPTERS as f64 / alone);
    let meanwhile = (ADAPTERS * steps) as f64 / all;
    match json {
        true => println!("{}", json!({ "uploads": rate, "base": alone, "adapters": meanwhile })),
        false => println!("uploads {rate:.1} GB/s; meanwhile {meanwhile:.0} tok/s of {alone:.0}"),
    }
}

/// A step whose tokens are drawn, greedily, as a server's are.
fn step(runner: &mut Runner, work: &[Work]) {
    let greedy = Draw { temperature: 0.0, ..Draw::default() };
    runner.step_and_draw(work, &vec![Some(greedy); work.len()]).expect("a step");
}

/// A row for each of so many sequences, each with an adapter of its own.
fn decoding(rows: usize, adapters: Option<&Vec<Arc<PackedAdapter>>>) -> Vec<Work> {
    let work = |i: usize| Work {
        tokens: vec![100 + i as u32],
        start: START,
        blocks: (0..8).map(|b| (i * 8 + b) as u32).collect(),
        adapter: adapters.map(|adapters| adapters[i].clone()),
        output: Output::LastLogits,
    };
    (0..rows).map(work).collect()
}
