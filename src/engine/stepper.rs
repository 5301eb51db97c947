//! The engine's thread: requests in, steps of the model, events out.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::base::parallel;
use crate::engine::continuation::Continuation;
use crate::engine::engine::{InFlight, QueueSlot, Shared};
use crate::engine::reply::Reply;
use crate::engine::sampler::logprob;
use crate::engine::scheduler::{Order, Part, Rows, Scheduler, SchedulerOptions, Sequence};
use crate::engine::{
    Choice, Computed, Draw, EngineOptions, Event, Generate, Model, Output, Request, Task, TokenLogprob, Usage,
    Vocabulary, Work,
};
use crate::metrics::Metrics;
use crate::{Error, Result};

/// Logits that scoring may take of a step: 64 MiB of f32.
pub const MAX_SCORE_LOGITS: usize = 1 << 24;
/// Vocabularies from this size on are worth sampling on several threads.
const PARALLEL_VOCABULARY: usize = 4096;

/// A request on its way to the thread.
pub struct Submitted {
    pub request: Request,
    pub reply: Reply,
    pub seed: u64,
    pub arrived: Instant,
    pub slot: QueueSlot,
    pub in_flight: InFlight,
}

/// A request not yet answered.
struct Active {
    reply: Reply,
    /// The adapter's name.
    adapter: Option<Arc<str>>,
    /// Its label in the metrics.
    label: String,
    arrived: Instant,
    /// Held until the request first runs.
    slot: Option<QueueSlot>,
    /// Sequences still to end.
    left: usize,
    usage: Usage,
    /// The choices after the first and their seed. They start when the first has its prompt computed, for then they find
    /// it in the cache.
    others: Option<(Arc<Generate>, u64)>,
    _in_flight: InFlight,
}

/// What a sequence is for.
enum Job {
    Generate {
        continuation: Box<Continuation>,
        last_token: Option<Instant>,
    },
    Classify,
    /// Log-probabilities so far, each with so many likeliest tokens.
    Score(Vec<TokenLogprob>, usize),
}

/// What a step did to a sequence.
enum Outcome {
    Nothing,
    Drawn {
        choice: Choice,
        /// Since the sequence's token before.
        elapsed: Option<Duration>,
    },
    Classified(Vec<f32>),
    Scored(Vec<TokenLogprob>),
    Failed(Error),
}

pub struct Stepper {
    model: Box<dyn Model>,
    vocabulary: Arc<dyn Vocabulary>,
    options: EngineOptions,
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    scheduler: Scheduler<Job>,
    active: HashMap<u64, Active>,
    /// Number of the next request.
    next: u64,
    /// Longest sequence, prompt and drawn tokens together.
    max_tokens: usize,
    /// Some sequence came, began to run, ended, or was put back since the last report.
    changed: bool,
    admissions: u64,
    preemptions: u64,
    yields: u64,
    lora_requests: (Vec<Arc<str>>, Vec<Arc<str>>),
}

impl Stepper {
    pub fn new(
        model: Box<dyn Model>,
        vocabulary: Arc<dyn Vocabulary>,
        options: EngineOptions,
        metrics: Arc<Metrics>,
        shared: Arc<Shared>,
        max_tokens: usize,
    ) -> Self {
        let (block_size, blocks) = (model.block_size(), model.blocks());
        metrics.vllm_cache_config.with_label_values(&[block_size.to_string(), blocks.to_string()]).set(1);
        metrics.set_lora_requests(options.max_sequences, &[], &[]);
        let scheduler = Scheduler::new(SchedulerOptions {
            max_sequences: options.max_sequences,
            max_batch_tokens: options.max_batch_tokens,
            max_prefill_tokens: options.max_prefill_tokens,
            max_rows: (MAX_SCORE_LOGITS / model.vocab_size()).max(1),
            block_size,
            blocks,
            slowdown: options.tenant_slowdown,
        });
        Stepper {
            model,
            vocabulary,
            options,
            metrics,
            shared,
            scheduler,
            active: HashMap::new(),
            next: 0,
            max_tokens,
            changed: true,
            admissions: 0,
            preemptions: 0,
            yields: 0,
            lora_requests: Default::default(),
        }
    }

    /// Runs until all senders of `inbox` are gone.
    pub fn run(mut self, inbox: Receiver<Submitted>) {
        self.report();
        loop {
            if self.active.is_empty() {
                match inbox.recv() {
                    Ok(submitted) => self.accept(submitted),
                    Err(mpsc::RecvError) => return,
                }
            }
            loop {
                match inbox.try_recv() {
                    Ok(submitted) => self.accept(submitted),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.fail_all(&Error::unavailable("the engine was stopped"));
                        self.report();
                        return;
                    }
                }
            }
            if self.shared.is_given_up() {
                self.fail_all(&Error::unavailable("the server stops and waits no longer; the request was given up"));
            }
            self.drop_cancelled();
            self.step();
            self.report();
        }
    }

    fn accept(&mut self, submitted: Submitted) {
        let Submitted { request, reply, seed, arrived, slot, in_flight } = submitted;
        let number = self.next;
        self.next += 1;
        let (adapter, packed) = request.adapter.unzip();
        let (mut left, mut others) = (1, None);
        let (rows, job) = match request.task {
            Task::Generate(generate) => {
                let generate = Arc::new(generate);
                left = generate.n;
                others = (left > 1).then(|| (generate.clone(), seed));
                (Rows::Last, Job::generate(0, generate, &request.prompt, seed))
            }
            Task::Classify => (if self.model.is_encoder() { Rows::Whole } else { Rows::Head }, Job::Classify),
            // The row before a token has its logits.
            Task::Score { from, top } => (Rows::From(from - 1), Job::Score(vec![], top)),
        };
        let active = Active {
            reply,
            label: self.metrics.adapter_label(adapter.as_deref()).to_string(),
            adapter,
            arrived,
            slot: Some(slot),
            left,
            usage: Usage { prompt_tokens: request.prompt.len(), ..Usage::default() },
            others,
            _in_flight: in_flight,
        };
        self.active.insert(number, active);
        self.scheduler.add(Sequence::new((number, 0), request.prompt, packed, rows, job).of(request.client));
        self.changed = true;
    }

    fn drop_cancelled(&mut self) {
        let gone: HashSet<u64> = self.active.iter().filter(|(_, a)| a.reply.is_closed()).map(|(n, _)| *n).collect();
        if !gone.is_empty() {
            self.active.retain(|number, _| !gone.contains(number));
            self.scheduler.remove(|s| gone.contains(&s.order.0));
            self.changed = true;
        }
    }

    fn fail_all(&mut self, error: &Error) {
        self.fail(&self.active.keys().copied().collect(), error);
    }

    fn fail(&mut self, requests: &HashSet<u64>, error: &Error) {
        for number in requests {
            if let Some(mut active) = self.active.remove(number) {
                active.reply.send(Event::Failed(error.clone()));
            }
        }
        self.scheduler.remove(|s| requests.contains(&s.order.0));
        self.changed = true;
    }

    fn step(&mut self) {
        let step = self.scheduler.schedule();
        if step.is_empty() {
            if !self.active.is_empty() {
                // The scheduler promises that this cannot be; a request that waits forever would be worse than a failed one.
                tracing::error!("no step for {} requests", self.active.len());
                self.fail_all(&Error::internal("the scheduler found no way to run the request"));
            }
            return;
        }
        self.note_started();
        let work: Vec<Work> = step.iter().map(|part| self.scheduler.work(part)).collect();
        let adapters: HashSet<_> = work.iter().map(|w| w.adapter.as_ref().map(|a| &a.generation)).collect();
        self.metrics.batch_sequences.observe(work.len() as f64);
        self.metrics.batch_adapters.observe(adapters.len() as f64);
        let draws = self.draws(&step);
        let start = Instant::now();
        match self.compute(&work, &draws) {
            Ok(results) => {
                self.scheduler.observe(&step, start.elapsed());
                self.scheduler.complete(&step);
                let outcomes = self.digest(&step, results);
                self.answer(outcomes);
            }
            Err(e) => {
                tracing::error!("a step of {} sequences failed: {e}", step.len());
                let requests = step.iter().map(|part| self.scheduler.running()[part.index].order.0).collect();
                self.fail(&requests, &e);
            }
        }
    }

    /// Takes requests that run for the first time off the queue's count.
    fn note_started(&mut self) {
        for sequence in self.scheduler.running() {
            if let Some(active) = self.active.get_mut(&sequence.order.0)
                && active.slot.take().is_some()
            {
                let tokens = active.usage.prompt_tokens as u64;
                self.metrics.prompt_tokens.with_label_values(&[&active.label]).inc_by(tokens);
            }
        }
    }

    /// What the model draws of the step itself.
    fn draws(&mut self, step: &[Part]) -> Vec<Option<Draw>> {
        if !self.model.draws() {
            return vec![None; step.len()];
        }
        let mut parts = step.iter().peekable();
        let mut items = Vec::with_capacity(step.len());
        for (index, sequence) in self.scheduler.running_mut().iter_mut().enumerate() {
            if let Some(part) = parts.next_if(|part| part.index == index) {
                items.push((sequence, part.output));
            }
        }
        let eos_tokens = &self.options.eos_tokens;
        let draw = |(sequence, output): (&mut Sequence<Job>, Output)| match &mut sequence.payload {
            Job::Generate { continuation, .. } if output == Output::LastLogits => {
                let own = sequence.adapter.as_ref().and_then(|a| a.language.as_ref());
                continuation.draw(own.map_or(eos_tokens, |own| &own.eos_tokens))
            }
            _ => None,
        };
        // Penalties look at all that a sequence has so far.
        if items.len() > 1 { parallel::map(items, draw) } else { items.into_iter().map(draw).collect() }
    }

    fn compute(&mut self, work: &[Work], draws: &[Option<Draw>]) -> Result<Vec<Computed>> {
        let results =
            catch_unwind(AssertUnwindSafe(|| self.model.step_and_draw(work, draws))).unwrap_or_else(|panic| {
                let message =
                    panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
                Err(Error::internal(format!("the model panicked: {}", message.unwrap_or("no message"))))
            });
        // Whatever kind the model gave its error: it is no fault of the request.
        let results = results.map_err(|e| Error::internal(e.message))?;
        if results.len() != work.len() {
            let (found, expected) = (results.len(), work.len());
            return Err(Error::internal(format!("the model gave {found} results for {expected} sequences")));
        }
        Ok(results)
    }

    /// Turns what the model computed into tokens, text and scores; each sequence by itself, on all cores.
    fn digest(&mut self, step: &[Part], results: Vec<Computed>) -> Vec<(Order, usize, Outcome)> {
        let now = Instant::now();
        let (vocab_size, classes) = (self.model.vocab_size(), self.model.classes());
        let (vocabulary, eos_tokens, max_tokens) = (&*self.vocabulary, &self.options.eos_tokens, self.max_tokens);
        let mut parts = step.iter().zip(results).peekable();
        let mut items = Vec::with_capacity(step.len());
        for (index, sequence) in self.scheduler.running_mut().iter_mut().enumerate() {
            if let Some((part, result)) = parts.next_if(|(part, _)| part.index == index) {
                items.push((sequence, part.output, result));
            }
        }
        let digest = |(sequence, output, result): (&mut Sequence<Job>, Output, Computed)| {
            let adapter = sequence.adapter.clone();
            let vocab_size = adapter.as_ref().map_or(vocab_size, |a| a.vocab_size);
            let (vocabulary, eos_tokens) = match adapter.as_ref().and_then(|a| a.language.as_ref()) {
                Some(own) => (&*own.tokenizer as &dyn Vocabulary, &own.eos_tokens),
                None => (vocabulary, eos_tokens),
            };
            let outcome = check_length(sequence, output, &result, vocab_size, classes).and_then(|()| match output {
                Output::None => Ok(Outcome::Nothing),
                _ => sequence.digest(result, vocab_size, max_tokens, vocabulary, eos_tokens, now),
            });
            (sequence.order, sequence.cached, outcome.unwrap_or_else(Outcome::Failed))
        };
        if items.len() > 1 && vocab_size >= PARALLEL_VOCABULARY {
            parallel::map(items, digest)
        } else {
            items.into_iter().map(digest).collect()
        }
    }

    fn answer(&mut self, outcomes: Vec<(Order, usize, Outcome)>) {
        let (mut ended, mut failed) = (HashSet::new(), vec![]);
        for (order, cached, outcome) in outcomes {
            let Some(active) = self.active.get_mut(&order.0) else { continue };
            if order.1 == 0 {
                active.usage.cached_tokens = cached;
            }
            match outcome {
                Outcome::Nothing => continue,
                Outcome::Failed(e) => {
                    failed.push((order.0, e));
                    continue;
                }
                Outcome::Drawn { choice, elapsed } => {
                    active.usage.completion_tokens += 1;
                    self.metrics.generated_tokens.with_label_values(&[&active.label]).inc();
                    if active.usage.completion_tokens == 1 {
                        self.metrics.ttft_seconds.observe(active.arrived.elapsed().as_secs_f64());
                    }
                    if let Some(elapsed) = elapsed {
                        self.metrics.token_seconds.observe(elapsed.as_secs_f64());
                    }
                    let finished = choice.finish.is_some();
                    active.reply.send(Event::Progress(choice));
                    if let Some((generate, seed)) = active.others.take() {
                        self.start_others(order, generate, seed);
                    }
                    if !finished {
                        continue;
                    }
                }
                Outcome::Classified(logits) => {
                    active.reply.send(Event::Classified { logits, usage: active.usage });
                }
                Outcome::Scored(logprobs) => {
                    active.reply.send(Event::Scored { logprobs, usage: active.usage });
                }
            }
            ended.insert(order);
        }
        if !ended.is_empty() {
            self.scheduler.remove_running(|s| ended.contains(&s.order));
            self.changed = true;
        }
        for (number, _) in ended {
            if let Some(active) = self.active.get_mut(&number) {
                active.left -= 1;
                if active.left == 0
                    && let Some(mut active) = self.active.remove(&number)
                    && !active.reply.is_answered()
                {
                    active.reply.send(Event::Done(active.usage));
                }
            }
        }
        for (number, e) in failed {
            tracing::error!("request {number} failed: {e}");
            self.fail(&HashSet::from([number]), &e);
        }
    }

    /// Queues the choices after the first, `first`, whose sequence runs and has its prompt computed.
    fn start_others(&mut self, first: Order, generate: Arc<Generate>, seed: u64) {
        let Some(sequence) = self.scheduler.running().iter().find(|s| s.order == first) else { return };
        let prompt_tokens = self.active.get(&first.0).map_or(0, |a| a.usage.prompt_tokens);
        let prompt = sequence.tokens[..prompt_tokens].to_vec();
        let (adapter, client) = (sequence.adapter.clone(), sequence.client.clone());
        for index in 1..generate.n {
            let job = Job::generate(index, generate.clone(), &prompt, seed);
            let order = (first.0, index);
            let sequence = Sequence::new(order, prompt.clone(), adapter.clone(), Rows::Last, job);
            self.scheduler.add(sequence.of(client.clone()));
        }
        self.changed = true;
    }

    fn report(&mut self) {
        let running = self.scheduler.running().len();
        self.shared.running.store(running, Ordering::SeqCst);
        let blocks = self.scheduler.block_counts();
        let metrics = &self.metrics;
        for (state, count) in [("used", blocks.used), ("cached", blocks.cached), ("free", blocks.free)] {
            metrics.kv_blocks.with_label_values(&[state]).set(count as i64);
        }
        metrics.vllm_kv_usage.set(blocks.used as f64 / (blocks.used + blocks.cached + blocks.free) as f64);
        let queued = self.shared.queued();
        metrics.queue_length.set(queued as i64);
        metrics.vllm_running.set(running as i64);
        // Requests for adapters that are not there yet have places in the queue as well, and are counted by themselves. Those
        // put back wait too, but were taken off the queue when they first ran.
        let new = self.active.values().filter(|active| active.slot.is_some()).count();
        let put_back = self.scheduler.waiting().filter(|s| self.started(s)).count();
        metrics.set_waiting(new + put_back);
        let scheduler = &self.scheduler;
        let (admissions, preemptions, yields) = (scheduler.admissions(), scheduler.preemptions(), scheduler.yields());
        self.changed |= (admissions, preemptions, yields) != (self.admissions, self.preemptions, self.yields);
        metrics.preemptions.inc_by(preemptions - self.preemptions);
        metrics.yields.inc_by(yields - self.yields);
        (self.admissions, self.preemptions, self.yields) = (admissions, preemptions, yields);
        if std::mem::take(&mut self.changed) {
            self.report_adapters();
        }
    }

    fn started(&self, sequence: &Sequence<Job>) -> bool {
        self.active.get(&sequence.order.0).is_some_and(|a| a.slot.is_none())
    }

    fn report_adapters(&mut self) {
        let name = |s: &Sequence<Job>| self.active.get(&s.order.0).and_then(|a| a.adapter.clone());
        let running: BTreeSet<Arc<str>> = self.scheduler.running().iter().filter_map(name).collect();
        let waiting: BTreeSet<Arc<str>> = self.scheduler.waiting().filter_map(name).collect();
        let now = (Vec::from_iter(running), Vec::from_iter(waiting));
        if now != self.lora_requests {
            let running: Vec<&str> = now.0.iter().map(|n| &**n).collect();
            let waiting: Vec<&str> = now.1.iter().map(|n| &**n).collect();
            self.metrics.set_lora_requests(self.options.max_sequences, &running, &waiting);
            self.lora_requests = now;
        }
    }
}

impl Job {
    fn generate(index: usize, generate: Arc<Generate>, prompt: &[u32], seed: u64) -> Self {
        let continuation = Box::new(Continuation::new(index, generate, prompt, seed));
        Job::Generate { continuation, last_token: None }
    }
}

/// `classes` are those of the base's own head.
fn check_length(
    sequence: &Sequence<Job>,
    output: Output,
    result: &Computed,
    vocab_size: usize,
    classes: usize,
) -> Result<()> {
    let numbers = match result {
        Computed::Numbers(numbers) => numbers.len(),
        Computed::Token(token) => {
            let is_one = token.is_none_or(|token| (token as usize) < vocab_size);
            let what = || Error::internal(format!("the model gave token {token:?} of {vocab_size} for {output:?}"));
            return if is_one && output == Output::LastLogits { Ok(()) } else { Err(what()) };
        }
    };
    let expected = match output {
        Output::None => return Ok(()),
        Output::LastLogits => vocab_size,
        Output::Logits(rows) => rows * vocab_size,
        Output::Head => sequence.adapter.as_ref().and_then(|a| a.labels.as_ref()).map_or(classes, Vec::len),
    };
    if numbers == expected {
        return Ok(());
    }
    Err(Error::internal(format!("the model gave {numbers} numbers for {output:?}; expected {expected}")))
}

impl Sequence<Job> {
    /// `result` has the length that the output asks for.
    fn digest(
        &mut self,
        result: Computed,
        vocab_size: usize,
        max_tokens: usize,
        vocabulary: &dyn Vocabulary,
        eos_tokens: &[u32],
        now: Instant,
    ) -> Result<Outcome> {
        match &mut self.payload {
            Job::Generate { continuation, last_token } => {
                let room = max_tokens - self.tokens.len();
                let choice = continuation.advance(result, room, vocabulary, eos_tokens)?;
                if choice.finish.is_none() {
                    self.tokens.extend(&choice.tokens);
                }
                let elapsed = last_token.replace(now).map(|last| now - last);
                Ok(Outcome::Drawn { choice, elapsed })
            }
            Job::Classify => {
                let numbers = result.into_numbers()?;
                match numbers.iter().position(|l| !l.is_finite()) {
                    None => Ok(Outcome::Classified(numbers)),
                    Some(label) => Err(Error::internal(format!(
                        "the head's logit of label {label} is {}, not finite",
                        numbers[label]
                    ))),
                }
            }
            Job::Score(logprobs, top) => {
                let Rows::From(first) = self.rows else { return Ok(Outcome::Nothing) };
                let numbers = result.into_numbers()?;
                let rows = numbers.chunks_exact(vocab_size);
                let next = first + rows.len();
                for (row, token) in rows.zip(&self.tokens[first + 1..]) {
                    logprobs.push(logprob(*token, row, *top)?);
                }
                self.rows = Rows::From(next);
                if next < self.tokens.len() - 1 {
                    return Ok(Outcome::Nothing);
                }
                Ok(Outcome::Scored(std::mem::take(logprobs)))
            }
        }
    }
}
