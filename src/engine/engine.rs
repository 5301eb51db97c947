//! The handle that the server holds, and the thread behind it that steps the model.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::engine::limits::Limits;
use crate::engine::reply::Reply;
use crate::engine::stepper::{Stepper, Submitted};
use crate::engine::{Choice, Client, Event, FinishReason, Model, Request, Task, Usage, Vocabulary};
use crate::metrics::Metrics;
use crate::{Error, ErrorKind, Result};

#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Sequences in a step at most.
    pub max_sequences: usize,
    /// Tokens in a step at most, prefill chunks and decode tokens together.
    pub max_batch_tokens: usize,
    /// Of these, prefill at most where a sequence that generates is not alone.
    pub max_prefill_tokens: usize,
    /// Requests that wait at most; one more is refused with [`crate::ErrorKind::QueueFull`].
    pub max_queue: usize,
    /// How many times as long a step for tenants within their share may take because of others that want more than theirs;
    /// at least 1, infinite is any.
    pub tenant_slowdown: f64,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
}

/// What the handles and the thread both see.
#[derive(Default)]
pub(super) struct Shared {
    max_queue: usize,
    /// Requests that have not started to run.
    queued: AtomicUsize,
    /// As many of each tenant.
    queued_by: Mutex<HashMap<Arc<str>, usize>>,
    /// Sequences that run.
    pub running: AtomicUsize,
    /// Requests not yet answered.
    in_flight: AtomicUsize,
    draining: AtomicBool,
    /// What still runs is to fail.
    given_up: AtomicBool,
    /// The thread has ended.
    dead: AtomicBool,
    seeds_drawn: AtomicUsize,
    pace: Mutex<Pace>,
    /// Told when `in_flight` becomes 0.
    idle: Notify,
}

impl Shared {
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::SeqCst)
    }

    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }
}

/// Tells of the thread's end when dropped, so also after a panic.
struct Life(Arc<Shared>);

impl Drop for Life {
    fn drop(&mut self) {
        self.0.dead.store(true, Ordering::SeqCst);
    }
}

/// A place in the queue, given back when dropped.
pub struct QueueSlot {
    shared: Arc<Shared>,
    tenant: Option<Arc<str>>,
}

impl QueueSlot {
    /// A tenant may have no more places than are left for the others, so that one that sends without end leaves some.
    fn take(shared: &Arc<Shared>, tenant: Option<Arc<str>>) -> Result<Self> {
        let max = shared.max_queue;
        let mut by = shared.queued_by.lock().unwrap_or_else(PoisonError::into_inner);
        let own = tenant.as_ref().map(|tenant| by.get(tenant).copied().unwrap_or(0));
        let more = |queued: usize| (queued < max && own.is_none_or(|own| own < max - queued)).then_some(queued + 1);
        match shared.queued.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more) {
            Ok(_) => {
                tenant.iter().for_each(|tenant| *by.entry(tenant.clone()).or_default() += 1);
                Ok(QueueSlot { shared: shared.clone(), tenant })
            }
            Err(queued) => {
                let wait = shared.pace.lock().unwrap_or_else(PoisonError::into_inner).wait(queued);
                let whose = match own.filter(|_| queued < max) {
                    Some(own) => format!("{own} of your requests wait already, as many as others have room for"),
                    None => format!("{max} requests wait already"),
                };
                let message = format!("{whose}; try again in {wait} s");
                Err(Error::new(ErrorKind::QueueFull, message).retry_after(wait))
            }
        }
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        if let Some(tenant) = &self.tenant {
            let mut by = self.shared.queued_by.lock().unwrap_or_else(PoisonError::into_inner);
            match by.get_mut(tenant) {
                Some(own) if *own > 1 => *own -= 1,
                _ => drop(by.remove(tenant)),
            }
        }
        let others = self.shared.queued.fetch_sub(1, Ordering::SeqCst) > 1;
        self.shared.pace.lock().unwrap_or_else(PoisonError::into_inner).left(Instant::now(), others);
    }
}

/// How fast requests leave the queue.
#[derive(Default)]
struct Pace {
    /// When one left while others waited on: until the next one leaves, it is the engine that is waited for.
    last: Option<Instant>,
    /// Seconds between two that leave, a running mean.
    interval: f64,
}

impl Pace {
    /// Share of the mean that one interval is.
    const WEIGHT: f64 = 0.1;
    /// Longer waits are not foretold.
    const LONGEST: f64 = 60.0;

    fn left(&mut self, now: Instant, others_wait: bool) {
        let last = std::mem::replace(&mut self.last, others_wait.then_some(now));
        if let Some(last) = last {
            let interval = now.saturating_duration_since(last).as_secs_f64().min(Self::LONGEST);
            let weight = if self.interval == 0.0 { 1.0 } else { Self::WEIGHT };
            self.interval += weight * (interval - self.interval);
        }
    }

    /// Whole seconds until as many as wait now have left, 1 or more.
    fn wait(&self, queued: usize) -> u64 {
        (self.interval * queued as f64).clamp(1.0, Self::LONGEST).ceil() as u64
    }
}

/// A request not yet answered, until dropped.
pub(super) struct InFlight(Arc<Shared>);

impl InFlight {
    fn enter(shared: &Arc<Shared>) -> Result<Self> {
        shared.in_flight.fetch_add(1, Ordering::SeqCst);
        let guard = InFlight(shared.clone());
        // Looked at after the count went up: `drain` either sees this request or is seen by it.
        match shared.draining.load(Ordering::SeqCst) {
            false => Ok(guard),
            true => Err(Error::unavailable("the server is shutting down and takes no new requests")),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

/// Cheap to clone. The engine stops when the last handle is dropped: requests in flight then fail with `Unavailable`.
#[derive(Clone)]
pub struct Engine {
    inbox: mpsc::Sender<Submitted>,
    shared: Arc<Shared>,
    limits: Limits,
    /// For requests without a seed.
    seeds: RandomState,
}

impl Engine {
    /// Starts the thread that owns `model`.
    ///
    /// Errors: `BadRequest` for limits of 0 in `options` or a model with an empty KV cache.
    pub fn start(
        model: Box<dyn Model>,
        vocabulary: Arc<dyn Vocabulary>,
        options: EngineOptions,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let sizes = [
            ("max_sequences", options.max_sequences),
            ("max_batch_tokens", options.max_batch_tokens),
            ("max_prefill_tokens", options.max_prefill_tokens),
            ("max_queue", options.max_queue),
            ("the vocabulary's size", model.vocab_size()),
            ("the model's context", model.context()),
            ("the KV cache's block size", model.block_size()),
            ("the KV cache's number of blocks", model.blocks()),
        ];
        for (name, size) in sizes {
            if size == 0 || size >= u32::MAX as usize {
                return Err(Error::bad_request(format!("{name} is {size}; it must be 1 to {}", u32::MAX - 1)));
            }
        }
        if options.tenant_slowdown.is_nan() || options.tenant_slowdown < 1.0 {
            return Err(Error::bad_request(format!(
                "the tenants' slowdown is {}; it must be at least 1",
                options.tenant_slowdown
            )));
        }
        let limits = Limits {
            vocab_size: model.vocab_size(),
            classifies: model.classes() > 0,
            predicts: model.predicts(),
            context: model.context(),
            cache: model.blocks().saturating_mul(model.block_size()),
        };
        let shared = Arc::new(Shared { max_queue: options.max_queue, ..Shared::default() });
        let (inbox, outbox) = mpsc::channel();
        let stepper = Stepper::new(model, vocabulary, options, metrics, shared.clone(), limits.tokens());
        let life = Life(shared.clone());
        let run = move || {
            let _life = life;
            stepper.run(outbox);
        };
        std::thread::Builder::new().name("engine".into()).spawn(run)?;
        Ok(Engine { inbox, shared, limits, seeds: RandomState::new() })
    }

    /// What [`Engine::submit`] would refuse whatever the load. Errors: `BadRequest`.
    pub fn check(&self, request: &Request) -> Result<()> {
        self.limits.check(request)
    }

    /// Queues a request. Dropping the receiver cancels it at the next step.
    ///
    /// Errors: `BadRequest` for an empty prompt, one longer than the context or than the KV cache holds, values out of
    /// range; `QueueFull`; `Unavailable` while draining.
    pub fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>> {
        self.submit_at(request, None)
    }

    /// A place in the queue for a request of `client` that is not ready yet. Errors: `QueueFull`.
    pub fn place(&self, client: Client) -> Result<QueueSlot> {
        QueueSlot::take(&self.shared, client.tenant)
    }

    /// [`submit`](Self::submit) at a place that the request has already, if it has.
    pub fn submit_at(&self, request: Request, place: Option<QueueSlot>) -> Result<UnboundedReceiver<Event>> {
        self.limits.check(&request)?;
        let in_flight = InFlight::enter(&self.shared)?;
        let (sender, receiver) = unbounded_channel();
        let mut reply = Reply::new(sender);
        if answer_at_once(&request, &mut reply) {
            return Ok(receiver);
        }
        let slot = place.map_or_else(|| self.place(request.client.clone()), Ok)?;
        let arrived = Instant::now();
        let seed = match &request.task {
            Task::Generate(generate) => generate.sampling.seed,
            _ => None,
        }
        .unwrap_or_else(|| self.seeds.hash_one(self.shared.seeds_drawn.fetch_add(1, Ordering::Relaxed)));
        self.inbox
            .send(Submitted { request, reply, seed, arrived, slot, in_flight })
            .map_err(|_| Error::unavailable("the engine has stopped"))?;
        Ok(receiver)
    }

    /// Requests that wait and sequences that run.
    pub fn load(&self) -> (usize, usize) {
        (self.shared.queued(), self.shared.running.load(Ordering::SeqCst))
    }

    /// Whether the thread runs. A dead engine answers nothing any more.
    pub fn is_alive(&self) -> bool {
        !self.shared.dead.load(Ordering::SeqCst)
    }

    /// Fails, with `Unavailable`, what is in flight. For the end of a [`Engine::drain`] that takes too long.
    pub fn give_up(&self) {
        self.shared.given_up.store(true, Ordering::SeqCst);
    }

    /// Refuses new requests, finishes those in flight, then returns.
    pub async fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        loop {
            let idle = self.shared.idle.notified();
            tokio::pin!(idle);
            // Listens before looking, so that the last one's end is not missed in between.
            idle.as_mut().enable();
            if self.shared.in_flight.load(Ordering::SeqCst) == 0 {
                return;
            }
            idle.await;
        }
    }
}

/// Answers a request that needs nothing computed.
fn answer_at_once(request: &Request, reply: &mut Reply) -> bool {
    let usage = Usage { prompt_tokens: request.prompt.len(), ..Usage::default() };
    match &request.task {
        Task::Generate(generate) if generate.max_tokens == 0 => {
            for index in 0..generate.n {
                let finish = Some(FinishReason::Length);
                reply.send(Event::Progress(Choice { index, finish, ..Choice::default() }));
            }
            reply.send(Event::Done(usage));
            true
        }
        Task::Score { from, .. } if *from == request.prompt.len() => {
            reply.send(Event::Scored { logprobs: vec![], usage });
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_tenant_leaves_room_in_the_queue() {
        let shared = Arc::new(Shared { max_queue: 8, ..Shared::default() });
        let take = |tenant: Option<&str>| QueueSlot::take(&shared, tenant.map(Arc::from));
        let mut flood: Vec<QueueSlot> = (0..4).map(|_| take(Some("a")).unwrap()).collect();
        let Err(refused) = take(Some("a")) else { panic!("half of the queue is a's") };
        assert!(refused.kind == ErrorKind::QueueFull && refused.message.starts_with("4 of your"), "{refused}");
        let others = [take(Some("b")).unwrap(), take(Some("b")).unwrap(), take(None).unwrap(), take(None).unwrap()];
        let Err(full) = take(None) else { panic!("the queue is full") };
        assert!(full.message.starts_with("8 requests"), "{full}");
        drop(others);
        flood.pop();
        assert_eq!(shared.queued(), 3);
        flood.push(take(Some("a")).unwrap());
        drop(flood);
        assert!(shared.queued_by.lock().unwrap().is_empty() && shared.queued() == 0);
    }

    #[test]
    fn a_wait_is_foretold_from_the_pace() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(pace.wait(100), 1);
        // One every quarter of a second while others wait, then an hour in which nobody does.
        for i in 0..40 {
            pace.left(start + Duration::from_millis(250 * i), i < 39);
        }
        pace.left(start + Duration::from_secs(3600), true);
        assert_eq!([1, 40, 42, 100_000].map(|queued| pace.wait(queued)), [1, 10, 11, 60]);
        for i in 1..100 {
            pace.left(start + Duration::from_secs(3600 + i), true);
        }
        assert_eq!(pace.wait(20), 20);
    }
}
