//! The whole engine on a model that is all bookkeeping: its logits are a hash of what it finds in its KV memory, so any
//! block mixed up, shared wrongly or written twice changes what comes out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::{Duration, Instant};

use candle_core::Device;
use proptest::prelude::*;
use tokio::sync::mpsc::UnboundedReceiver;

use super::continuation::Continuation;
use super::grammar::tests::compile;
use super::*;
use crate::adapter::{Adapter, Generation};
use crate::base::Head;
use crate::base::testing::{decoder, options};
use crate::base::{Architecture, Decoder, Family, Kernels, ModelConfig, Rope};
use crate::lora::PackedAdapter;
use crate::metrics::Metrics;
use crate::{Error, ErrorKind, Result};

const VOCAB: usize = 64;
const EOS: u32 = 0;

fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: VOCAB,
        hidden_size: 4,
        intermediate_size: 4,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        norm_eps: 1e-5,
        rope: Some(Rope::plain(1e4, 2)),
        windows: vec![],
        architecture: Architecture::of(Family::Llama),
        context: 256,
        tie_word_embeddings: true,
        predicts: true,
        bos_token: None,
        eos_tokens: vec![EOS],
    }
}

/// An adapter without pairs; with a head if `labels` is not 0.
pub fn adapter(generation: &str, labels: usize) -> Arc<PackedAdapter> {
    let head = (labels > 0).then(|| Head {
        weight: vec![0.0; labels * 4],
        bias: None,
        labels: (0..labels).map(|l| format!("label {l}")).collect(),
    });
    static BASE: LazyLock<Decoder> =
        LazyLock::new(|| decoder(&config(), options(Kernels::for_device(&Device::Cpu)), 1));
    let adapter = Adapter { head, ..Adapter::new(Generation::new(generation)) };
    Arc::new(PackedAdapter::new(adapter, &BASE).unwrap())
}

fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a ^ b.rotate_left(32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn salt(adapter: Option<&PackedAdapter>) -> u64 {
    adapter.map_or(1, |a| a.generation.as_str().bytes().fold(2, |h, b| mix(h, b.into())))
}

/// Key and value of one position: all that the model keeps of it. Depends on the adapter, as with LoRA on k and v.
fn key_value(salt: u64, token: u32, position: usize) -> u64 {
    mix(mix(salt, token.into()), position as u64)
}

/// `n` numbers in -4 to 4, a function of all keys and values up to the row's position.
fn row(salt: u64, keys: impl Iterator<Item = u64>, n: usize) -> Vec<f32> {
    let state = keys.fold(salt, mix);
    (0..n as u64).map(|i| (mix(state, i) >> 40) as f32 / (1u64 << 21) as f32 - 4.0).collect()
}

/// Lets a test hold a step until it says so, break it, and count steps.
#[derive(Default)]
struct Control {
    held: Mutex<bool>,
    release: Condvar,
    steps: AtomicUsize,
    fail: AtomicBool,
    panic: AtomicBool,
    /// A token at which the logits are NaN, plus one.
    nan_after: AtomicUsize,
    /// The step, counted from 1, from which on to hold.
    hold_at: AtomicUsize,
}

impl Control {
    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.release.notify_all();
    }
}

struct Fake {
    block_size: usize,
    memory: Vec<u64>,
    draws: bool,
    control: Arc<Control>,
}

impl Model for Fake {
    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn classes(&self) -> usize {
        0
    }
    fn predicts(&self) -> bool {
        true
    }
    fn context(&self) -> usize {
        256
    }
    fn block_size(&self) -> usize {
        self.block_size
    }
    fn blocks(&self) -> usize {
        self.memory.len() / self.block_size
    }
    fn draws(&self) -> bool {
        self.draws
    }
    fn step_and_draw(&mut self, work: &[Work], draws: &[Option<Draw>]) -> Result<Vec<Computed>> {
        let results = self.step(work)?.into_iter().zip(work.iter().zip(draws));
        let draw = |(mut numbers, (work, draw)): (Vec<f32>, (&Work, &Option<Draw>))| match draw {
            None => Ok(Computed::Numbers(numbers)),
            Some(draw) => {
                assert!(self.draws && work.output == Output::LastLogits && draw.typical_p >= 1.0);
                Ok(Computed::Token(draw.token(&mut numbers, &mut vec![]).ok()))
            }
        };
        results.map(draw).collect()
    }
    fn step(&mut self, work: &[Work]) -> Result<Vec<Vec<f32>>> {
        let mut held = self.control.held.lock().unwrap();
        let number = 1 + self.control.steps.fetch_add(1, Ordering::SeqCst);
        *held |= number == self.control.hold_at.load(Ordering::SeqCst);
        while *held {
            held = self.control.release.wait(held).unwrap();
        }
        drop(held);
        if self.control.fail.swap(false, Ordering::SeqCst) {
            return Err(Error::internal("out of memory"));
        }
        if self.control.panic.swap(false, Ordering::SeqCst) {
            panic!("index out of bounds");
        }
        let slot = |w: &Work, p: usize| w.blocks[p / self.block_size] as usize * self.block_size + p % self.block_size;
        // All writes come first, as in a model that runs layer by layer: what one sequence writes, another may read.
        for w in work {
            for (i, &token) in w.tokens.iter().enumerate() {
                let p = w.start + i;
                self.memory[slot(w, p)] = key_value(salt(w.adapter.as_deref()), token, p);
            }
        }
        let nan_after = self.control.nan_after.load(Ordering::SeqCst);
        let results = work.iter().map(|w| {
            let end = w.start + w.tokens.len();
            let salt = salt(w.adapter.as_deref());
            let row = |p: usize, n: usize| row(salt, (0..=p).map(|p| self.memory[slot(w, p)]), n);
            match w.output {
                Output::None => vec![],
                Output::LastLogits if nan_after > 0 && w.tokens.contains(&(nan_after as u32 - 1)) => {
                    vec![f32::NAN; VOCAB]
                }
                Output::LastLogits => row(end - 1, VOCAB),
                Output::Logits(n) => (end - n..end).flat_map(|p| row(p, VOCAB)).collect(),
                Output::Head => row(end - 1, w.adapter.as_ref().unwrap().labels.as_ref().unwrap().len()),
            }
        });
        Ok(results.collect())
    }
}

/// Bytes of every kind: letters, halves of characters, nothing.
struct Toy(Vec<Vec<u8>>);

impl Toy {
    fn new() -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..VOCAB as u8).map(|i| vec![b'A' + i % 26]).collect();
        tokens[1] = b"\xc3".to_vec();
        tokens[2] = b"\xa9".to_vec();
        tokens[3] = "😀 ok".into();
        tokens[4] = vec![];
        Toy(tokens)
    }
}

impl Vocabulary for Toy {
    fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.get(id as usize).map_or(&[], Vec::as_slice)
    }
    fn is_special(&self, id: u32) -> bool {
        id == EOS
    }
}

/// Grammars that [`Toy`] can spell, each beside what its complete texts match.
static GRAMMARS: LazyLock<Vec<(Grammar, regex::Regex)>> = LazyLock::new(|| {
    let nested = "start: \"A\" start \"B\" | \"C\" start \"D\" | /[X-Z]+/".to_string();
    [
        (Constraint::Regex("[A-M]{3,30}".into()), "[A-M]{3,30}"),
        (Constraint::Regex("(é|😀 ok|[N-Z])+".into()), "(é|😀 ok|[N-Z])+"),
        (Constraint::Choice(["ABBA", "AB", "é", "QUITE"].map(String::from).into()), "ABBA|AB|é|QUITE"),
        // Of the nesting, what a regular expression can say.
        (Constraint::Lark(nested), "[AC]*[X-Z]+[BD]*"),
    ]
    .map(|(constraint, matches)| {
        let grammar = compile(&Toy::new(), VOCAB, &[EOS], &constraint).unwrap();
        (grammar, regex::Regex::new(&format!("^(?:{matches})$")).unwrap())
    })
    .into()
});

struct Bench {
    engine: Engine,
    metrics: Arc<Metrics>,
    control: Arc<Control>,
    blocks: usize,
}

#[derive(Debug, Clone)]
struct Sizes {
    block_size: usize,
    blocks: usize,
    max_sequences: usize,
    max_batch_tokens: usize,
    max_prefill_tokens: usize,
    max_queue: usize,
    /// Whether the model draws tokens itself.
    draws: bool,
}

const ROOMY: Sizes = Sizes {
    block_size: 4,
    blocks: 1000,
    max_sequences: 32,
    max_batch_tokens: 64,
    max_prefill_tokens: 64,
    max_queue: 1000,
    draws: false,
};

fn bench(sizes: &Sizes) -> Bench {
    bench_with(sizes, Toy::new())
}

fn bench_with(sizes: &Sizes, vocabulary: Toy) -> Bench {
    let metrics = Arc::new(Metrics::new());
    let control = Arc::new(Control::default());
    let memory = vec![0xdead; sizes.blocks * sizes.block_size];
    let model = Fake { block_size: sizes.block_size, memory, draws: sizes.draws, control: control.clone() };
    let options = EngineOptions {
        max_sequences: sizes.max_sequences,
        max_batch_tokens: sizes.max_batch_tokens,
        max_prefill_tokens: sizes.max_prefill_tokens,
        max_queue: sizes.max_queue,
        tenant_slowdown: 1.0,
        eos_tokens: vec![EOS],
    };
    let engine = Engine::start(Box::new(model), Arc::new(vocabulary), options, metrics.clone()).unwrap();
    Bench { engine, metrics, control, blocks: sizes.blocks }
}

impl Bench {
    fn used_blocks(&self) -> i64 {
        self.metrics.kv_blocks.with_label_values(&["used"]).get()
    }

    /// Waits until nothing runs, then checks that every block came back.
    fn settle(&self) {
        wait_until(|| self.engine.load() == (0, 0) && self.used_blocks() == 0);
        let count = |state| self.metrics.kv_blocks.with_label_values(&[state]).get();
        assert_eq!(count("cached") + count("free"), self.blocks as i64);
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn generate(max_tokens: usize) -> Generate {
    Generate {
        max_tokens,
        min_tokens: 0,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stop: vec![],
        stop_tokens: vec![],
        include_stop: false,
        ignore_eos: false,
        logprobs: None,
        n: 1,
        grammar: None,
    }
}

fn request(adapter: Option<(&str, Arc<PackedAdapter>)>, prompt: Vec<u32>, task: Task) -> Request {
    Request {
        client: Client::default(),
        adapter: adapter.map(|(name, packed)| (Arc::from(name), packed)),
        prompt,
        task,
    }
}

/// All that came out of a request, in the form that must not depend on what else ran.
#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Choices(Vec<Choice>, Usage),
    Classified(Vec<f32>),
    Scored(Vec<TokenLogprob>),
    Failed(ErrorKind, String),
}

/// Joins what one step added to a choice to what came before.
fn join(whole: &mut Choice, part: Choice) {
    assert!(whole.finish.is_none(), "an event after the last");
    assert!(!part.tokens.is_empty() || part.finish.is_some(), "an empty event");
    whole.index = part.index;
    whole.tokens.extend(part.tokens);
    whole.text.push_str(&part.text);
    whole.logprobs.extend(part.logprobs);
    (whole.finish, whole.matched_stop, whole.end) = (part.finish, part.matched_stop, part.end);
}

fn collect(mut events: UnboundedReceiver<Event>) -> Answer {
    let mut choices: BTreeMap<usize, Choice> = BTreeMap::new();
    loop {
        match events.blocking_recv().expect("a last event") {
            Event::Progress(part) => join(choices.entry(part.index).or_default(), part),
            Event::Done(usage) => {
                assert!(choices.values().all(|c| c.finish.is_some()));
                return Answer::Choices(choices.into_values().collect(), Usage { cached_tokens: 0, ..usage });
            }
            Event::Classified { logits, .. } => return Answer::Classified(logits),
            Event::Scored { logprobs, .. } => return Answer::Scored(logprobs),
            Event::Failed(e) => return Answer::Failed(e.kind, e.message),
        }
    }
}

/// The answer by definition: no engine, no blocks, no batch.
fn expected(request: &Request, max_tokens: usize) -> Answer {
    let packed = request.adapter.as_ref().map(|(_, a)| &**a);
    let salt = salt(packed);
    let row = |tokens: &[u32], n| row(salt, tokens.iter().enumerate().map(|(p, &t)| key_value(salt, t, p)), n);
    match &request.task {
        Task::Generate(generate) => {
            let mut usage = Usage { prompt_tokens: request.prompt.len(), ..Usage::default() };
            let choices = (0..generate.n).map(|index| {
                let seed = generate.sampling.seed.unwrap_or(0);
                let mut continuation = Continuation::new(index, Arc::new(generate.clone()), &request.prompt, seed);
                let (mut tokens, mut whole) = (request.prompt.clone(), Choice::default());
                while whole.finish.is_none() {
                    let room = max_tokens - tokens.len();
                    let logits = row(&tokens, VOCAB);
                    let choice = continuation.advance(Computed::Numbers(logits), room, &Toy::new(), &[EOS]).unwrap();
                    tokens.extend(&choice.tokens);
                    usage.completion_tokens += 1;
                    join(&mut whole, choice);
                }
                whole
            });
            let choices = choices.collect();
            Answer::Choices(choices, usage)
        }
        Task::Classify => Answer::Classified(row(&request.prompt, packed.unwrap().labels.as_ref().unwrap().len())),
        Task::Score { from, top } => Answer::Scored(
            (*from..request.prompt.len())
                .map(|p| sampler::logprob(request.prompt[p], &row(&request.prompt[..p], VOCAB), *top).unwrap())
                .collect(),
        ),
    }
}

fn any_request() -> impl Strategy<Value = Request> {
    let sampling = (prop_oneof![Just(0.0f32), 0.5f32..1.5], 0usize..12, 0.3f32..1.0, 0u64..4, prop::bool::ANY);
    let least = prop_oneof![Just(0usize), 1usize..30];
    let choices = (1usize..30, least, 1usize..4, prop::option::of(0usize..4), 0u8..3, prop::bool::ANY);
    // Prompts are beginnings of few texts, so that prefixes are shared, also between adapters.
    let task = (0u8..6, prop::option::of(0..GRAMMARS.len()));
    (0usize..4, 0u32..3, 1usize..40, 0usize..40, sampling, choices, task).prop_map(
        |(
            which,
            base,
            length,
            fork,
            (temperature, top_k, top_p, seed, penalties),
            (max, least, n, logprobs, stop, eos),
            (task, grammar),
        )| {
            let names = ["", "a", "b", "c"];
            let adapter = (which > 0).then(|| (names[which], adapter(names[which], which)));
            let prompt: Vec<u32> = (0..length as u32)
                .map(|i| (i * 7 + if (i as usize) < fork { 0 } else { base }) % VOCAB as u32)
                .collect();
            let task = match task {
                0 if which > 0 => Task::Classify,
                1 if length > 1 => Task::Score { from: 1 + fork % (length - 1), top: logprobs.unwrap_or(0) },
                _ => {
                    let mut generate = generate(max);
                    let penalty = if penalties { 0.7 } else { 0.0 };
                    generate.sampling = Sampling {
                        temperature,
                        top_k,
                        top_p,
                        seed: Some(seed),
                        repetition_penalty: 1.0 + penalty,
                        frequency_penalty: penalty,
                        presence_penalty: penalty,
                        ..Sampling::default()
                    };
                    (generate.n, generate.logprobs, generate.ignore_eos) = (n, logprobs, eos);
                    generate.stop =
                        [vec![], vec!["QX".to_string()], vec!["B".into(), "éC".into()]][stop as usize].clone();
                    generate.stop_tokens = if stop == 2 { vec![] } else { vec![9] };
                    // Text before it may have stop strings.
                    generate.min_tokens = if stop == 0 { least.min(max) } else { 0 };
                    generate.grammar = grammar.map(|i| GRAMMARS[i].0.clone());
                    Task::Generate(generate)
                }
            };
            request(adapter, prompt, task)
        },
    )
}

fn any_sizes() -> impl Strategy<Value = Sizes> {
    let sizes = (1usize..9, 0usize..40, 1usize..33, (1usize..64, 1usize..64), any::<bool>());
    sizes.prop_map(|(block_size, spare, max_sequences, (max_batch_tokens, max_prefill_tokens), draws)| {
        // Room for the longest request, 39 prompt tokens and 29 drawn, and little more: preemption is common.
        let blocks = 68usize.div_ceil(block_size) + spare;
        Sizes { block_size, blocks, max_sequences, max_batch_tokens, max_prefill_tokens, max_queue: 1000, draws }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The heart: alone, by definition, or among 31 others with other adapters, however blocks and steps are cut.
    #[test]
    fn an_answer_does_not_depend_on_what_else_runs(
        requests in prop::collection::vec((any_request(), 0u64..300), 1..32),
        cancelled in prop::collection::vec((any_request(), 0u64..300), 0..6),
        sizes in any_sizes(),
    ) {
        let bench = bench(&sizes);
        let max_tokens = (sizes.blocks * sizes.block_size).min(256);
        std::thread::scope(|scope| {
            for (request, pause) in &cancelled {
                let engine = bench.engine.clone();
                scope.spawn(move || {
                    let mut events = engine.submit(request.clone()).unwrap();
                    std::thread::sleep(Duration::from_micros(*pause));
                    let _ = events.try_recv();
                });
            }
            let running: Vec<_> = requests.iter().map(|(request, pause)| {
                let engine = bench.engine.clone();
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_micros(*pause));
                    collect(engine.submit(request.clone()).unwrap())
                })
            }).collect();
            for ((request, _), answer) in requests.iter().zip(running) {
                assert_eq!(answer.join().unwrap(), expected(request, max_tokens), "{request:?}");
            }
        });
        bench.settle();
    }
}

/// A choice by itself: its text is what its tokens spell up to a stop string, its log-probabilities are those of its tokens,
/// and it ended for the reason it gives.
fn check_choice(prompt: &[u32], generate: &Generate, choice: &Choice, salt: u64) {
    let Choice { tokens, logprobs, matched_stop, .. } = choice;
    let toy = Toy::new();
    let spelled = |tokens: &[u32]| {
        let spoken = tokens.iter().filter(|&&t| !toy.is_special(t));
        let bytes: Vec<u8> = spoken.flat_map(|&t| toy.token_bytes(t)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let text = spelled(tokens);
    let stops = |text: &str| generate.stop.iter().any(|stop| text.contains(stop));
    match (choice.finish, matched_stop.as_ref().and_then(|stop| text.find(stop))) {
        (Some(FinishReason::Stop), Some(at)) => {
            assert_eq!(choice.text, text[..at]);
            assert!(!stops(&spelled(&tokens[..tokens.len() - 1])), "the last token completes the stop string");
        }
        (Some(FinishReason::Stop), None) => {
            assert_eq!(choice.text, text);
            // Else it was an end token, or the grammar's end.
            let may_end = !generate.ignore_eos || generate.grammar.is_some();
            assert!(matched_stop.as_ref().map_or(may_end, |token| token == "9"), "{choice:?}");
        }
        (Some(FinishReason::Length), _) => {
            assert_eq!((&choice.text, tokens.len(), matched_stop), (&text, generate.max_tokens, &None));
        }
        (None, _) => panic!("it has not ended"),
    }
    let whole = generate.grammar.as_ref().and_then(|own| GRAMMARS.iter().find(|(grammar, _)| grammar == own));
    if let (Some((_, whole)), Some(FinishReason::Stop), None) = (whole, choice.finish, matched_stop) {
        assert!(whole.is_match(&choice.text), "{:?} is not {whole}", choice.text);
    }
    assert!(!stops(&choice.text) && !tokens.iter().any(|t| generate.stop_tokens.contains(t)));
    assert!(generate.ignore_eos || !tokens.contains(&EOS));
    assert!(tokens.len() >= generate.min_tokens || generate.grammar.is_some(), "{} tokens", tokens.len());
    assert_eq!(logprobs.len(), generate.logprobs.map_or(0, |_| tokens.len()));
    for (i, entry) in logprobs.iter().enumerate() {
        let before = prompt.iter().chain(&tokens[..i]).enumerate();
        let logits = row(salt, before.map(|(p, &t)| key_value(salt, t, p)), VOCAB);
        let lse = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        let mut sorted: Vec<u32> = (0..VOCAB as u32).collect();
        sorted.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let top: Vec<u32> = entry.top.iter().map(|(token, _)| *token).collect();
        assert_eq!((entry.token, top.as_slice()), (tokens[i], &sorted[..generate.logprobs.unwrap()]));
        for (token, logprob) in entry.top.iter().copied().chain([(entry.token, entry.logprob)]) {
            assert!((f64::from(logits[token as usize]) - lse - f64::from(logprob)).abs() < 1e-4, "token {i}: {token}");
        }
    }
}

proptest! {
    #[test]
    fn text_and_log_probabilities_belong_to_the_tokens(request in any_request()) {
        if let Task::Generate(generate) = &request.task {
            let bench = bench(&ROOMY);
            let Answer::Choices(choices, _) = collect(bench.engine.submit(request.clone()).unwrap()) else { panic!() };
            assert_eq!(choices.len(), generate.n);
            let salt = salt(request.adapter.as_ref().map(|(_, a)| &**a));
            choices.iter().for_each(|choice| check_choice(&request.prompt, generate, choice, salt));
        }
    }
}

/// 32 requests at once in a pool that holds few of them, so that preemption surely happens.
#[test]
fn preemption_changes_nothing() {
    let bench =
        bench(&Sizes { block_size: 4, blocks: 16, max_sequences: 8, max_batch_tokens: 16, max_queue: 100, ..ROOMY });
    let requests: Vec<Request> = (0..32u32)
        .map(|i| {
            let mut generate = generate(40);
            generate.ignore_eos = true;
            generate.sampling = Sampling { seed: Some(i.into()), repetition_penalty: 1.3, ..Sampling::default() };
            // One that goes on, so that it is put back in the middle.
            generate.grammar = (i % 2 == 1).then(|| GRAMMARS[1].0.clone());
            let name = ["a", "b", "c"][i as usize % 3];
            request(
                Some((name, adapter(name, 0))),
                (0..10).map(|t| (t + i / 8) % 64).collect(),
                Task::Generate(generate),
            )
        })
        .collect();
    let events: Vec<_> = requests.iter().map(|r| bench.engine.submit(r.clone()).unwrap()).collect();
    for (request, events) in requests.iter().zip(events) {
        assert_eq!(collect(events), expected(request, 64));
    }
    bench.settle();
    assert!(bench.metrics.preemptions.get() > 0);
}

#[test]
fn a_sequence_ends_where_the_cache_or_the_context_ends() {
    let small = bench(&Sizes { block_size: 4, blocks: 3, ..ROOMY });
    let mut generate = generate(1000);
    generate.ignore_eos = true;
    let request = request(None, vec![5; 5], Task::Generate(generate));
    let Answer::Choices(choices, usage) = collect(small.engine.submit(request.clone()).unwrap()) else { panic!() };
    assert_eq!((usage.completion_tokens, choices[0].finish), (7, Some(FinishReason::Length)));
    let Answer::Choices(_, usage) = collect(bench(&ROOMY).engine.submit(request).unwrap()) else { panic!() };
    assert_eq!(usage.completion_tokens, 251);
    small.settle();
}

#[test]
fn choices_share_the_prompt_and_differ_by_seed() {
    let bench = bench(&ROOMY);
    let mut g = generate(6);
    (g.n, g.ignore_eos) = (8, true);
    g.sampling = Sampling { seed: Some(5), ..Sampling::default() };
    let r = request(None, (0..33).collect(), Task::Generate(g.clone()));
    let Answer::Choices(choices, usage) = collect(bench.engine.submit(r).unwrap()) else { panic!() };
    assert_eq!((choices.len(), usage.prompt_tokens, usage.completion_tokens), (8, 33, 48));
    // Choice 3 is what a request with seed 5 + 3 gives.
    (g.n, g.sampling.seed) = (1, Some(8));
    let mut events = bench.engine.submit(request(None, (0..33).collect(), Task::Generate(g))).unwrap();
    let (mut tokens, mut cached) = (vec![], 0);
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Progress(c) => tokens.extend(c.tokens),
            Event::Done(usage) => cached = usage.cached_tokens,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(tokens, choices[3].tokens);
    assert_eq!(cached, 32, "the prompt's full blocks are in the cache");
    bench.settle();
}

#[test]
fn the_queue_holds_what_it_should_and_one_more_is_refused() {
    let bench = bench(&Sizes { max_sequences: 1, max_queue: 3, ..ROOMY });
    bench.control.hold(true);
    let submit = || bench.engine.submit(request(None, vec![1, 2], Task::Generate(generate(2))));
    let first = submit().unwrap();
    wait_until(|| bench.engine.load().0 == 0);
    let admitted = AtomicUsize::new(0);
    let others = Mutex::new(vec![first]);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| match submit() {
                Ok(events) => {
                    admitted.fetch_add(1, Ordering::SeqCst);
                    others.lock().unwrap().push(events);
                }
                Err(e) => assert_eq!(e.kind, ErrorKind::QueueFull),
            });
        }
    });
    assert_eq!((admitted.into_inner(), bench.engine.load().0), (3, 3));
    bench.control.hold(false);
    for events in others.into_inner().unwrap() {
        assert!(matches!(collect(events), Answer::Choices(..)));
    }
    bench.settle();
    assert!(submit().is_ok());
}

#[test]
fn hanging_up_frees_the_place_and_the_blocks() {
    let bench = bench(&Sizes { max_sequences: 2, ..ROOMY });
    bench.control.hold(true);
    let mut endless = generate(200);
    endless.ignore_eos = true;
    let submit = || bench.engine.submit(request(None, vec![3; 40], Task::Generate(endless.clone()))).unwrap();
    let running = [submit(), submit()];
    let waiting = [submit(), submit()];
    wait_until(|| bench.control.steps.load(Ordering::SeqCst) > 0);
    drop((running, waiting));
    bench.control.hold(false);
    bench.settle();
    let steps = bench.control.steps.load(Ordering::SeqCst);
    assert!(steps <= 4, "{steps} steps for requests that hung up");
}

#[test]
fn a_failed_step_fails_its_requests_and_no_others() {
    let bench = bench(&ROOMY);
    let r = request(None, vec![1, 2, 3], Task::Generate(generate(5)));
    for (flag, word) in [(&bench.control.fail, "out of memory"), (&bench.control.panic, "index out of bounds")] {
        flag.store(true, Ordering::SeqCst);
        let Answer::Failed(kind, message) = collect(bench.engine.submit(r.clone()).unwrap()) else { panic!() };
        assert!(kind == ErrorKind::Internal && message.contains(word), "{message}");
        assert_eq!(collect(bench.engine.submit(r.clone()).unwrap()), expected(&r, 256));
        bench.settle();
    }
}

#[test]
fn logits_that_are_nan_fail_their_request_alone() {
    for draws in [false, true] {
        let bench = bench(&Sizes { draws, ..ROOMY });
        bench.control.nan_after.store(1 + 50, Ordering::SeqCst);
        bench.control.hold(true);
        let mut g = generate(8);
        g.sampling.logit_bias = [(50, -100.0)].into();
        let [good, bad] = [vec![1, 2], vec![1, 50]].map(|prompt| request(None, prompt, Task::Generate(g.clone())));
        let events = [&good, &bad].map(|r| bench.engine.submit(r.clone()).unwrap());
        bench.control.hold(false);
        let [good_answer, bad_answer] = events.map(collect);
        assert_eq!(good_answer, expected(&good, 256));
        assert!(matches!(bad_answer, Answer::Failed(ErrorKind::Internal, m) if m.contains("NaN")));
        bench.settle();
    }
}

#[test]
fn what_needs_no_computing_is_answered_at_once() {
    let bench = bench(&ROOMY);
    let mut g = generate(0);
    g.n = 2;
    let Answer::Choices(choices, usage) =
        collect(bench.engine.submit(request(None, vec![1; 256], Task::Generate(g))).unwrap())
    else {
        panic!()
    };
    assert!(
        choices.len() == 2 && choices.iter().all(|c| c.finish == Some(FinishReason::Length) && c.tokens.is_empty())
    );
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (256, 0));
    assert_eq!(
        collect(bench.engine.submit(request(None, vec![1; 3], Task::Score { from: 3, top: 0 })).unwrap()),
        Answer::Scored(vec![])
    );
    assert_eq!(bench.control.steps.load(Ordering::SeqCst), 0);
}

#[test]
fn draining_finishes_what_runs_and_takes_no_more() {
    let bench = bench(&ROOMY);
    bench.control.hold(true);
    let r = request(None, vec![1, 2, 3], Task::Generate(generate(9)));
    let events = bench.engine.submit(r.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let drain = bench.engine.drain();
        tokio::pin!(drain);
        assert!(tokio::time::timeout(Duration::from_millis(20), drain.as_mut()).await.is_err());
        assert_eq!(bench.engine.submit(r.clone()).unwrap_err().kind, ErrorKind::Unavailable);
        bench.control.hold(false);
        drain.await;
        bench.engine.drain().await;
    });
    assert_eq!(collect(events), expected(&r, 256));
}

#[test]
fn the_thread_ends_with_the_last_handle() {
    let Bench { engine, control, .. } = bench(&ROOMY);
    control.hold(true);
    let events = engine.submit(request(None, vec![1, 2], Task::Generate(generate(200)))).unwrap();
    wait_until(|| control.steps.load(Ordering::SeqCst) > 0);
    drop(engine);
    control.hold(false);
    // The model, and with it its share of `control`, is dropped by the thread.
    assert!(matches!(collect(events), Answer::Failed(ErrorKind::Unavailable, _)));
    wait_until(|| Arc::strong_count(&control) == 1);
}

#[test]
fn metrics_tell_what_runs_and_what_it_did() {
    let bench = bench(&Sizes { max_sequences: 1, ..ROOMY });
    bench.control.hold(true);
    let submit = |name: &str| {
        let mut g = generate(3);
        g.ignore_eos = true;
        bench.engine.submit(request(Some((name, adapter(name, 0))), vec![1; 5], Task::Generate(g))).unwrap()
    };
    let first = submit("x");
    wait_until(|| bench.control.steps.load(Ordering::SeqCst) > 0);
    let second = submit("y");
    bench.control.hold(false);
    collect(first);
    collect(second);
    bench.settle();
    let text = bench.metrics.render();
    for line in [
        "loramux_prompt_tokens_total{adapter=\"x\"} 5",
        "loramux_generated_tokens_total{adapter=\"y\"} 3",
        "loramux_ttft_seconds_count 2",
        "loramux_token_seconds_count 4",
        "loramux_batch_sequences_sum 6",
        "vllm:cache_config_info{block_size=\"4\",num_gpu_blocks=\"1000\"} 1",
        "vllm:num_requests_running 0",
        "vllm:lora_requests_info{max_lora=\"1\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

/// A vocabulary that breaks where nothing catches a panic.
struct Broken;

impl Vocabulary for Broken {
    fn token_bytes(&self, _: u32) -> &[u8] {
        panic!("no such token");
    }
    fn is_special(&self, _: u32) -> bool {
        false
    }
}

#[test]
fn a_panic_of_the_thread_ends_what_runs_and_is_told() {
    let model = Fake { block_size: 4, memory: vec![0; 400], draws: false, control: Arc::default() };
    let options = EngineOptions {
        max_sequences: 4,
        max_batch_tokens: 8,
        max_prefill_tokens: 8,
        max_queue: 4,
        tenant_slowdown: 1.0,
        eos_tokens: vec![EOS],
    };
    let engine = Engine::start(Box::new(model), Arc::new(Broken), options, Arc::new(Metrics::new())).unwrap();
    assert!(engine.is_alive());
    let ask = || engine.submit(request(None, vec![5, 6], Task::Generate(generate(4))));
    let Answer::Failed(kind, message) = collect(ask().unwrap()) else { panic!("an answer") };
    assert_eq!(kind, ErrorKind::Internal, "{message}");
    wait_until(|| !engine.is_alive());
    assert_eq!(ask().unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(engine.load(), (0, 0));
}

#[test]
fn a_drain_can_be_cut_short() {
    let bench = bench(&ROOMY);
    bench.control.hold(true);
    let task = Generate { ignore_eos: true, ..generate(200) };
    let events = bench.engine.submit(request(None, vec![5, 6], Task::Generate(task))).unwrap();
    wait_until(|| bench.control.steps.load(Ordering::SeqCst) > 0);
    bench.engine.give_up();
    bench.control.hold(false);
    let Answer::Failed(kind, message) = collect(events) else { panic!("the request went on") };
    assert_eq!(kind, ErrorKind::Unavailable, "{message}");
    tokio::runtime::Runtime::new().unwrap().block_on(bench.engine.drain());
    bench.settle();
}

#[test]
fn an_end_token_comes_with_its_log_probability() {
    let bench = bench(&ROOMY);
    let mut task = Generate { logprobs: Some(1), ..generate(9) };
    task.sampling.logit_bias = [(EOS, 100.0)].into();
    let ask = |task: Generate| collect(bench.engine.submit(request(None, vec![5], Task::Generate(task))).unwrap());
    let Answer::Choices(choices, usage) = ask(task.clone()) else { panic!("a failure") };
    let end = choices[0].end.as_ref().unwrap();
    assert!(end.token == EOS && end.logprob < 0.0 && end.top.len() == 1, "{end:?}");
    assert_eq!((choices[0].logprobs.len(), usage.completion_tokens), (0, 1));
    task.logprobs = None;
    let Answer::Choices(choices, _) = ask(task) else { panic!("a failure") };
    assert_eq!(choices[0].end, None);
}

#[test]
fn an_adapter_whose_request_was_preempted_is_listed_as_running_again() {
    let bench = bench(&Sizes { block_size: 4, blocks: 6, ..ROOMY });
    let submit = |name: &str, prompt: u32, max_tokens| {
        let mut g = generate(max_tokens);
        g.ignore_eos = true;
        bench.engine.submit(request(Some((name, adapter(name, 0))), vec![prompt; 8], Task::Generate(g))).unwrap()
    };
    // The first takes a fourth block in step 6, for which the second gives its three back. It ends in step 8, the second
    // runs again from step 9.
    bench.control.hold(true);
    let first = submit("x", 1, 8);
    wait_until(|| bench.control.steps.load(Ordering::SeqCst) == 1);
    let second = submit("y", 2, 14);
    let listed = |step: usize, running: &str, waiting: &str| {
        bench.control.hold_at.store(step, Ordering::SeqCst);
        bench.control.hold(false);
        wait_until(|| bench.control.steps.load(Ordering::SeqCst) == step);
        let adapters = format!("running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"");
        let text = bench.metrics.render();
        assert!(text.contains(&adapters), "at step {step} {adapters} is not in\n{text}");
    };
    listed(4, "x,y", "");
    listed(8, "x", "y");
    listed(11, "y", "");
    assert_eq!(bench.metrics.preemptions.get(), 1);
    bench.control.hold(false);
    collect(first);
    collect(second);
    bench.settle();
}

/// A vocabulary that spells JSON a byte at a time, and some of it faster.
fn json_toy() -> Toy {
    let mut tokens: Vec<Vec<u8>> = vec![b"</s>".to_vec()];
    tokens.extend(b"0123456789{}[]\":,.-+ \n\tabcdefghijklmnopqrstuvwxyz\\_E".iter().map(|&byte| vec![byte]));
    let longer = ["true", "false", "null", "\":", "\",\"", "[]", "  ", "\n\n\n\n"];
    tokens.extend(longer.iter().map(|text| text.as_bytes().to_vec()));
    tokens.resize(VOCAB, vec![]);
    Toy(tokens)
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Pet {
    name: String,
    age: u8,
    kind: Kind,
    tags: Vec<bool>,
    at: Option<Point>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Cat,
    Dog,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Point {
    x: i32,
}

fn pet_schema() -> serde_json::Value {
    serde_json::json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "minLength": 1, "maxLength": 8 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "kind": { "enum": ["cat", "dog"] },
            "tags": { "type": "array", "items": { "type": "boolean" }, "minItems": 1, "maxItems": 3 },
            "at": { "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/point" }] },
        },
        "required": ["name", "age", "kind", "tags", "at"],
        "additionalProperties": false,
        "$defs": { "point": {
            "type": "object",
            "properties": { "x": { "type": "integer", "minimum": -99, "maximum": 99 } },
            "required": ["x"],
            "additionalProperties": false,
        } },
    })
}

/// The weights know nothing of JSON. What does not ask for it is not changed by its neighbours.
#[test]
fn json_is_what_its_schema_says_and_leaves_others_alone() {
    let grammar = compile(&json_toy(), VOCAB, &[EOS], &Constraint::Json(pet_schema())).unwrap();
    let task = |seed: u64, grammar: Option<Grammar>| {
        let mut g = generate(200);
        g.sampling = Sampling { seed: Some(seed), ..Sampling::default() };
        if grammar.is_some() {
            // Random choices of space would use up the context.
            let spaces = json_toy().0.into_iter().zip(0..).filter(|(t, _)| !t.is_empty() && t.trim_ascii().is_empty());
            g.sampling.logit_bias = spaces.map(|(_, id)| (id, -5.0)).collect();
        }
        (g.n, g.grammar) = (3, grammar);
        request(None, vec![seed as u32 + 1, 7, 8], Task::Generate(g))
    };
    let bench = || bench_with(&ROOMY, json_toy());
    let submit = |bench: &Bench, request: &Request| bench.engine.submit(request.clone()).unwrap();
    let alone: Vec<Answer> = (0..4).map(|seed| collect(submit(&bench(), &task(seed, None)))).collect();
    let mixed = bench();
    mixed.control.hold(true);
    let plain: Vec<_> = (0..4).map(|seed| submit(&mixed, &task(seed, None))).collect();
    let constrained: Vec<_> = (0..12).map(|seed| submit(&mixed, &task(seed, Some(grammar.clone())))).collect();
    mixed.control.hold(false);
    let mut texts = BTreeMap::new();
    for events in constrained {
        let Answer::Choices(choices, _) = collect(events) else { panic!() };
        for choice in choices {
            assert_eq!(choice.finish, Some(FinishReason::Stop), "{choice:?}");
            let pet: Pet = serde_json::from_str(&choice.text).unwrap_or_else(|e| panic!("{e}: {}", choice.text));
            let in_range =
                pet.age <= 150 && (1..=3).contains(&pet.tags.len()) && pet.at.is_none_or(|p| p.x.abs() < 100);
            assert!(in_range && (1..=8).contains(&pet.name.chars().count()), "{}", choice.text);
            texts.insert(choice.text, ());
        }
    }
    assert!(texts.len() > 30, "36 seeds, {} texts", texts.len());
    assert_eq!(plain.into_iter().map(collect).collect::<Vec<_>>(), alone);
    mixed.settle();
}

#[test]
fn a_text_ends_where_its_grammar_does() {
    let bench = bench(&ROOMY);
    let ask = |constraint: &str, change: &dyn Fn(&mut Generate)| {
        let grammar = compile(&Toy::new(), VOCAB, &[EOS], &Constraint::Regex(constraint.into())).unwrap();
        let mut g = Generate { grammar: Some(grammar), ..generate(40) };
        change(&mut g);
        let Answer::Choices(mut choices, _) =
            collect(bench.engine.submit(request(None, vec![5, 6], Task::Generate(g))).unwrap())
        else {
            panic!("a failure")
        };
        let choice = choices.remove(0);
        (choice.text.clone(), choice)
    };
    let stop = Some(FinishReason::Stop);
    // Without an end token, for nothing can follow; with one that is not wanted; and cut by the other limits.
    let (text, whole) = ask("ABCD", &|_| {});
    assert_eq!((text.as_str(), whole.finish, whole.tokens.len()), ("ABCD", stop, 4));
    let (text, whole) = ask("ABCD", &|g| (g.max_tokens, g.ignore_eos) = (4, true));
    assert_eq!((text.as_str(), whole.finish), ("ABCD", stop), "complete with the last token");
    let (text, cut) = ask("ABCD", &|g| g.max_tokens = 3);
    assert_eq!((text.as_str(), cut.finish), ("ABC", Some(FinishReason::Length)));
    let (text, stopped) = ask("ABCD", &|g| g.stop = vec!["C".into()]);
    assert_eq!((text.as_str(), stopped.finish, stopped.matched_stop.as_deref()), ("AB", stop, Some("C")));
    let (text, _) = ask("ABCD", &|g| (g.stop, g.include_stop) = (vec!["C".into()], true));
    assert_eq!(text, "ABC");
    // What could become a stop string comes out at the end.
    assert_eq!(ask("ABCD", &|g| g.stop = vec!["CDE".into()]).0, "ABCD");
    // An end token is drawn where the text is complete, and only there.
    let eager = |g: &mut Generate| g.sampling.logit_bias = [(EOS, 100.0)].into();
    let (text, ended) = ask("[A-Z]{3}[A-Z]*", &|g| {
        eager(g);
        g.logprobs = Some(2);
    });
    assert_eq!((text.len(), ended.finish, ended.end.as_ref().unwrap().token), (3, stop, EOS));
    assert!(ended.logprobs.iter().flat_map(|l| l.top.iter().map(|t| t.1).chain([l.logprob])).all(f32::is_finite));
    let (text, ignored) = ask("[A-Z]{3}[A-Z]*", &|g| {
        eager(g);
        g.ignore_eos = true;
    });
    assert_eq!((text.len(), ignored.finish), (40, Some(FinishReason::Length)));
    // Nothing is all there is.
    let (text, nothing) = ask("", &|g| g.ignore_eos = true);
    assert_eq!((text.as_str(), nothing.finish, nothing.tokens.len()), ("", stop, 0));
    bench.settle();
}

#[test]
fn a_text_goes_on_until_it_may_end() {
    for draws in [false, true] {
        let bench = bench(&Sizes { draws, ..ROOMY });
        let ask = |least: usize, likely: &[(u32, f32)], change: &dyn Fn(&mut Generate)| {
            let mut g = Generate { min_tokens: least, ..generate(8) };
            g.sampling.logit_bias = likely.iter().copied().collect();
            change(&mut g);
            let events = bench.engine.submit(request(None, vec![5, 6], Task::Generate(g))).unwrap();
            let Answer::Choices(mut choices, _) = collect(events) else { panic!("a failure") };
            choices.remove(0)
        };
        let stop = Some(FinishReason::Stop);
        for least in [0, 1, 3, 7] {
            let choice = ask(least, &[(EOS, 100.0)], &|_| {});
            assert_eq!((choice.tokens.len(), choice.finish), (least, stop));
            // Two that end it, one of which the penalties are for, too.
            let choice = ask(least, &[(9, 100.0), (6, 100.0)], &|g| {
                g.stop_tokens = vec![9, 6, 9];
                g.sampling.repetition_penalty = 1.2;
            });
            assert_eq!((choice.tokens.len(), choice.finish), (least, stop));
            assert!(["9", "6"].contains(&choice.matched_stop.as_deref().unwrap()));
        }
        assert_eq!(ask(8, &[(EOS, 100.0)], &|_| {}).finish, Some(FinishReason::Length));
        let eager = ask(3, &[(EOS, 100.0)], &|g| g.ignore_eos = true);
        assert_eq!((eager.tokens, eager.finish), (vec![EOS; 8], Some(FinishReason::Length)));
        // The stop string that is complete after it, where it may have begun before, not those complete before.
        let b = (0..VOCAB as u32).find(|&t| t != EOS && Toy::new().token_bytes(t) == b"B").unwrap();
        let choice = ask(3, &[(b, 100.0)], &|g| g.stop = vec!["B".into()]);
        assert_eq!((choice.text.as_str(), choice.tokens.len(), choice.finish), ("BBB", 4, stop));
        let choice = ask(3, &[(b, 100.0)], &|g| g.stop = vec!["BB".into()]);
        assert_eq!((choice.text.as_str(), choice.tokens.len(), choice.finish), ("BB", 4, stop));
        // A grammar lets nothing follow.
        let choice = ask(6, &[], &|g| {
            let constraint = Constraint::Regex("ABCD".into());
            g.grammar = Some(compile(&Toy::new(), VOCAB, &[EOS], &constraint).unwrap());
        });
        assert_eq!((choice.text.as_str(), choice.finish), ("ABCD", stop));
        bench.settle();
    }
}

#[test]
fn a_grammar_that_the_vocabulary_cannot_spell_fails_its_request_alone() {
    let bench = bench(&ROOMY);
    let constraint = Constraint::Choice(vec!["AAAz".into(), "AAAy".into()]);
    let mut g = Generate { grammar: Some(compile(&Toy::new(), VOCAB, &[EOS], &constraint).unwrap()), ..generate(9) };
    let bad = request(None, vec![1, 2], Task::Generate(g.clone()));
    g.grammar = Some(GRAMMARS[0].0.clone());
    let good = request(None, vec![1, 2], Task::Generate(g));
    bench.control.hold(true);
    let events = [&good, &bad].map(|r| bench.engine.submit(r.clone()).unwrap());
    bench.control.hold(false);
    let [good_answer, bad_answer] = events.map(collect);
    assert_eq!(good_answer, expected(&good, 256));
    assert!(matches!(bad_answer, Answer::Failed(ErrorKind::BadRequest, m) if m.contains("no token")));
    bench.settle();
    assert!(compile(&Toy::new(), VOCAB, &[EOS], &Constraint::Regex("z".into())).is_err());
}
