//! What the tests share.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device};
use loramux::base::matmul::Format;
use loramux::base::simd::Simd;
use loramux::base::{BLOCK, Base, Decoder, DecoderOptions, Kernels};
use loramux::engine::{
    Choice, Computed, Draw, Engine, EngineOptions, Event, Generate, Model, Output, Request, Runner, Sampling, Task,
    Work,
};
use loramux::lora::PackedAdapter;
use loramux::metrics::Metrics;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The real model as the fixtures were made with: the package's file, also where the hub has the unquantised one.
pub fn packaged() -> String {
    loramux::base::packaged().unwrap().to_str().unwrap().to_string()
}

/// Every implementation of the layers that this machine can run.
pub fn all_kernels() -> Vec<Kernels> {
    Simd::all().into_iter().map(Kernels::Packed).chain([Kernels::Tensor]).collect()
}

pub fn decoder(base: &Base, kernels: Kernels, format: Option<Format>) -> Decoder {
    Decoder::load(&base.config, &base.weights, options(kernels, format)).unwrap()
}

fn options(kernels: Kernels, format: Option<Format>) -> DecoderOptions {
    DecoderOptions { device: Device::Cpu, kernels, format, dtype: DType::F32 }
}

pub fn adapter(base: &Base, directory: &Path, kernels: Kernels) -> Arc<PackedAdapter> {
    adapter_for(base, directory, &decoder(base, kernels, None))
}

/// In the numbers of `decoder`.
pub fn adapter_for(base: &Base, directory: &Path, decoder: &Decoder) -> Arc<PackedAdapter> {
    let adapter = loramux::adapter::load(directory, &base.config, &base.id).unwrap().adapter;
    Arc::new(PackedAdapter::new(adapter, decoder).unwrap())
}

/// One decoder for one engine after another. Each engine begins with nothing in its cache, and with whatever the one before
/// left in the cache's memory.
#[derive(Clone)]
pub struct SharedRunner(Arc<Mutex<Runner>>);

impl SharedRunner {
    pub fn new(decoder: Decoder, kv_bytes: usize) -> Self {
        Runner::new(decoder, kv_bytes).unwrap().into()
    }
}

impl From<Runner> for SharedRunner {
    fn from(runner: Runner) -> Self {
        SharedRunner(Arc::new(Mutex::new(runner)))
    }
}

impl Model for SharedRunner {
    fn vocab_size(&self) -> usize {
        self.0.lock().unwrap().vocab_size()
    }
    fn classes(&self) -> usize {
        self.0.lock().unwrap().classes()
    }
    fn predicts(&self) -> bool {
        self.0.lock().unwrap().predicts()
    }
    fn is_encoder(&self) -> bool {
        self.0.lock().unwrap().is_encoder()
    }
    fn context(&self) -> usize {
        self.0.lock().unwrap().context()
    }
    fn block_size(&self) -> usize {
        self.0.lock().unwrap().block_size()
    }
    fn blocks(&self) -> usize {
        self.0.lock().unwrap().blocks()
    }
    fn step(&mut self, work: &[Work]) -> loramux::Result<Vec<Vec<f32>>> {
        self.0.lock().unwrap().step(work)
    }
    fn draws(&self) -> bool {
        self.0.lock().unwrap().draws()
    }
    fn step_and_draw(&mut self, work: &[Work], draws: &[Option<Draw>]) -> loramux::Result<Vec<Computed>> {
        self.0.lock().unwrap().step_and_draw(work, draws)
    }
}

pub fn engine(base: &Base, runner: &SharedRunner, max_batch_tokens: usize) -> Engine {
    let options = EngineOptions {
        max_sequences: 64,
        max_batch_tokens,
        max_prefill_tokens: max_batch_tokens,
        max_queue: 10_000,
        tenant_slowdown: f64::INFINITY,
        eos_tokens: base.config.eos_tokens.clone(),
    };
    Engine::start(Box::new(runner.clone()), base.tokenizer.clone(), options, Arc::new(Metrics::new())).unwrap()
}

/// A whole prompt, its adapter, and what is asked for.
pub type Prompt<'a> = (&'a [u32], Option<Arc<PackedAdapter>>, Output);

/// Logits of one step that takes whole prompts, each with blocks of its own.
pub fn logits(runner: &mut Runner, prompts: &[Prompt]) -> Vec<Vec<f32>> {
    let mut next_block = 0;
    let work: Vec<Work> = prompts
        .iter()
        .map(|(tokens, adapter, output)| {
            let blocks = tokens.len().div_ceil(BLOCK) as u32;
            next_block += blocks;
            Work {
                tokens: tokens.to_vec(),
                start: 0,
                blocks: (next_block - blocks..next_block).collect(),
                adapter: adapter.clone(),
                output: *output,
            }
        })
        .collect();
    assert!(next_block as usize <= runner.blocks());
    runner.step(&work).unwrap()
}

pub fn greedy(max_tokens: usize) -> Generate {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Generate {
        max_tokens,
        min_tokens: 0,
        sampling,
        stop: vec![],
        stop_tokens: vec![],
        include_stop: false,
        ignore_eos: true,
        logprobs: None,
        n: 1,
        grammar: None,
    }
}

/// Everything a request was answered with.
#[derive(Debug, Default)]
pub struct Answer {
    pub choices: Vec<Choice>,
    pub logits: Vec<f32>,
    /// Prompt tokens that came from the cache.
    pub cached: usize,
}

impl Answer {
    /// All that must not depend on what else runs.
    pub fn content(&self) -> (&[Choice], &[f32]) {
        (&self.choices, &self.logits)
    }

    pub fn tokens(&self) -> &[u32] {
        &self.choices[0].tokens
    }
}

/// Submits all requests at once and waits for all answers.
pub async fn answers(engine: &Engine, requests: Vec<(Vec<u32>, Option<Arc<PackedAdapter>>, Task)>) -> Vec<Answer> {
    let submit = |(prompt, adapter, task): (Vec<u32>, Option<Arc<PackedAdapter>>, Task)| {
        let adapter = adapter.map(|a| (a.generation.as_str().into(), a));
        engine.submit(Request { client: Default::default(), adapter, prompt, task }).unwrap()
    };
    let receivers: Vec<_> = requests.into_iter().map(submit).collect();
    let mut all = Vec::new();
    for mut events in receivers {
        let mut answer = Answer::default();
        while let Some(event) = events.recv().await {
            match event {
                Event::Progress(c) => {
                    if answer.choices.len() <= c.index {
                        answer.choices.resize(c.index + 1, Choice::default());
                    }
                    let choice = &mut answer.choices[c.index];
                    choice.index = c.index;
                    choice.tokens.extend(c.tokens);
                    choice.text.push_str(&c.text);
                    choice.logprobs.extend(c.logprobs);
                    choice.finish = c.finish;
                }
                Event::Classified { logits, usage } => (answer.logits, answer.cached) = (logits, usage.cached_tokens),
                Event::Scored { logprobs, usage } => {
                    answer.logits = logprobs.iter().map(|entry| entry.logprob).collect();
                    answer.cached = usage.cached_tokens;
                }
                Event::Done(usage) => answer.cached = usage.cached_tokens,
                Event::Failed(e) => panic!("{e}"),
            }
        }
        all.push(answer);
    }
    all
}

/// A request's answer from an engine that has seen no other.
pub async fn answer_alone(
    base: &Base,
    runner: &SharedRunner,
    request: (Vec<u32>, Option<Arc<PackedAdapter>>, Task),
) -> Answer {
    let answer = answers(&engine(base, runner, 512), vec![request]).await.remove(0);
    assert_eq!(answer.cached, 0);
    answer
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
