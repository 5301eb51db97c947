//! Which sequences run, and what part of each the next step computes.
//!
//! Every step takes first one token of each sequence that is decoding, then chunks of prompts. Half of what remains of
//! the step goes to the oldest prompt, so that it always advances; the other half to the prompts with the least left to
//! do, so that a short prompt does not wait for a long one. Beside a sequence that generates, prompts have less of the step:
//! its reader waits for all of it (Sarathi-Serve, arXiv 2403.02310), and of many prompts at once the first are done sooner.
//! Which of those that wait runs next, [`Queue`] decides.
//!
//! Where tenants share the engine, one that wants more than its share neither keeps others from their places nor makes their
//! steps much longer: see [`Scheduler::admit`] and [`Bound`].
//!
//! The scheduler never sees logits or text; what belongs to them travels in [`Sequence::payload`].

use std::sync::Arc;
use std::time::Duration;

use crate::engine::blocks::{BlockCounts, BlockPool, Key};
use crate::engine::cost::StepCost;
use crate::engine::queue::{DRAWN, Queue, Tenant};
use crate::engine::recent::Recent;
use crate::engine::shares::Shares;
use crate::engine::{Client, Output, Work};
use crate::lora::PackedAdapter;

/// Tokens that a step may have in any case while a request is expected: one shorter costs almost as much.
const LEAST: usize = 32;

/// Place in the order of arrival: the request's number, then the choice's.
pub type Order = (u64, usize);

/// For which positions of a sequence the caller needs the model's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// The logits of the last token.
    Last,
    /// The classification head's logits of the last token.
    Head,
    /// The classification head's logits of a sequence that is computed in one step.
    Whole,
    /// The logits of every position from this one to the last but one. The last token itself is not computed.
    From(usize),
}

/// One list of tokens on its way through the model.
#[derive(Debug)]
pub struct Sequence<P> {
    pub order: Order,
    pub client: Client,
    /// Prompt and drawn tokens.
    pub tokens: Vec<u32>,
    pub adapter: Option<Arc<PackedAdapter>>,
    pub rows: Rows,
    /// Tokens found in the cache when the sequence ran first.
    pub cached: usize,
    pub payload: P,
    /// Leading tokens whose keys and values are in `table`.
    computed: usize,
    table: Vec<u32>,
    root: Key,
    /// Keys of the leading full blocks, as far as they were needed.
    keys: Vec<Key>,
    /// Leading blocks of `table` that others can find.
    published: usize,
    preempted: bool,
    /// Place in the order in which the running had their last parts in a step.
    advanced: u64,
}

impl<P> Sequence<P> {
    pub fn new(order: Order, tokens: Vec<u32>, adapter: Option<Arc<PackedAdapter>>, rows: Rows, payload: P) -> Self {
        Sequence {
            order,
            client: Client::default(),
            root: Key::root(None, adapter.as_ref().map(|a| &a.generation)),
            tokens,
            adapter,
            rows,
            cached: 0,
            payload,
            computed: 0,
            table: vec![],
            keys: vec![],
            published: 0,
            preempted: false,
            advanced: 0,
        }
    }

    /// On behalf of `client` instead of nobody's.
    pub fn of(mut self, client: Client) -> Self {
        self.root = Key::root(client.tenant.as_deref(), self.adapter.as_ref().map(|a| &a.generation));
        self.client = client;
        self
    }

    /// Leading tokens to compute before the caller has all it needs for now.
    fn target(&self) -> usize {
        match self.rows {
            Rows::Last | Rows::Head | Rows::Whole => self.tokens.len(),
            Rows::From(_) => self.tokens.len() - 1,
        }
    }

    fn remaining(&self) -> usize {
        self.target() - self.computed
    }

    /// All it still has to compute is the token drawn last.
    fn decodes(&self) -> bool {
        self.remaining() == 1 && self.rows == Rows::Last
    }

    /// Leading tokens that may come from the cache: rows the caller needs must be computed.
    fn reusable(&self) -> usize {
        match self.rows {
            Rows::Last | Rows::Head => self.tokens.len() - 1,
            Rows::Whole => 0,
            Rows::From(first) => first,
        }
    }

    fn key(&mut self, block: usize, block_size: usize) -> Key {
        while self.keys.len() <= block {
            let i = self.keys.len();
            let parent = self.keys.last().unwrap_or(&self.root);
            self.keys.push(parent.child(&self.tokens[i * block_size..(i + 1) * block_size]));
        }
        self.keys[block]
    }

    /// What the model is asked for when the next `count` tokens are computed.
    fn output(&self, count: usize) -> Output {
        let end = self.computed + count;
        match self.rows {
            Rows::Last if end == self.target() => Output::LastLogits,
            Rows::Head | Rows::Whole if end == self.target() => Output::Head,
            Rows::From(first) if end > first => Output::Logits(end - first.max(self.computed)),
            _ => Output::None,
        }
    }
}

/// A running sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Index into [`Scheduler::running`].
    pub index: usize,
    pub tokens: usize,
    pub output: Output,
}

#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Sequences that run at most.
    pub max_sequences: usize,
    /// Tokens in a step at most.
    pub max_batch_tokens: usize,
    /// Of these, tokens of prompts at most where a sequence that generates is not alone: it waits for what a step computes
    /// beside its own tokens.
    pub max_prefill_tokens: usize,
    /// Rows of logits that [`Rows::From`] sequences may ask for in a step, all together.
    pub max_rows: usize,
    pub block_size: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// How many times as long a step of tenants within their share may take because of those beyond theirs; infinite is
    /// any.
    pub slowdown: f64,
}

/// What a step may do for tenants that want more than their share, while the step also works for others who do not, or would
/// keep one waiting that is expected to ask. The others' steps are then longer by [`SchedulerOptions::slowdown`] at most, as
/// far as [`StepCost`] can tell.
#[derive(Default)]
struct Bound {
    /// Which of the running are of such tenants. None, where it is empty.
    beyond: Vec<bool>,
    /// How many of those may decode.
    decoding: usize,
    /// Tokens of their prompts.
    prompts: usize,
}

impl Bound {
    fn holds(&self, index: usize) -> bool {
        self.beyond.get(index).copied().unwrap_or(false)
    }
}

pub struct Scheduler<P> {
    options: SchedulerOptions,
    pool: BlockPool,
    /// In order of arrival.
    running: Vec<Sequence<P>>,
    waiting: Queue<P>,
    admissions: u64,
    preemptions: u64,
    yields: u64,
    /// Steps completed, and their parts.
    steps: u64,
    parts: u64,
    cost: StepCost,
    recent: Recent,
    /// Tokens of prompts that bounds allowed and that were not used, for a sequence that must be computed in one step.
    saved: usize,
}

impl<P> Scheduler<P> {
    /// All options must be at least 1. Every sequence must fit the pool alone: at most `blocks * block_size` tokens.
    pub fn new(mut options: SchedulerOptions) -> Self {
        // Each running sequence can then have a token in every step.
        options.max_sequences = options.max_sequences.min(options.max_batch_tokens);
        let pool = BlockPool::new(options.blocks);
        Scheduler {
            options,
            pool,
            running: vec![],
            waiting: Queue::default(),
            admissions: 0,
            preemptions: 0,
            yields: 0,
            steps: 0,
            parts: 0,
            cost: StepCost::default(),
            recent: Recent::default(),
            saved: 0,
        }
    }

    /// Queues a sequence. It must have tokens to compute.
    pub fn add(&mut self, sequence: Sequence<P>) {
        debug_assert!(sequence.target() > 0);
        self.waiting.add(sequence);
    }

    pub fn running(&self) -> &[Sequence<P>] {
        &self.running
    }
    pub fn running_mut(&mut self) -> &mut [Sequence<P>] {
        &mut self.running
    }
    pub fn waiting(&self) -> impl Iterator<Item = &Sequence<P>> {
        self.waiting.iter()
    }
    pub fn block_counts(&self) -> BlockCounts {
        self.pool.counts()
    }
    /// Sequences taken from the queue to run, since the start; one that was put back counts again.
    pub fn admissions(&self) -> u64 {
        self.admissions
    }
    /// Sequences put back into the queue for want of blocks, since the start.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }
    /// Sequences put back into the queue to make room for another tenant's, since the start.
    pub fn yields(&self) -> u64 {
        self.yields
    }

    /// Forgets the sequences of which `gone` says so, and frees their blocks.
    pub fn remove(&mut self, gone: impl Fn(&Sequence<P>) -> bool) {
        // Those that wait hold no blocks.
        self.waiting.retain(|sequence| !gone(sequence));
        self.remove_running(gone);
    }

    /// [`remove`](Self::remove) for sequences known to run.
    pub fn remove_running(&mut self, gone: impl Fn(&Sequence<P>) -> bool) {
        let pool = &mut self.pool;
        self.running.retain_mut(|sequence| {
            let gone = gone(sequence);
            if gone {
                pool.release(&mut sequence.table);
            }
            !gone
        });
    }

    /// Decides the next step and allocates its blocks. It is empty only if there are no sequences.
    pub fn schedule(&mut self) -> Vec<Part> {
        self.admit();
        let mut step = self.fill(&self.bound());
        if step.is_empty() {
            // Those within their share found no blocks; those who have them go on.
            step = self.fill(&Bound::default());
        }
        while step.is_empty() && !self.running.is_empty() {
            // Prompts alone fill the pool and none can go on.
            self.preempt_last();
            self.prefill(self.options.max_batch_tokens, &Bound::default(), &mut step);
        }
        step.sort_unstable_by_key(|part| part.index);
        step
    }

    fn fill(&mut self, bound: &Bound) -> Vec<Part> {
        let mut held: Vec<usize> = (0..self.running.len()).filter(|&i| bound.holds(i) && self.decoding(i)).collect();
        if !held.is_empty() {
            // In turns.
            held.sort_unstable_by_key(|&i| self.running[i].advanced);
            held.drain(..bound.decoding.min(held.len()));
            held.sort_unstable();
        }
        let mut step = vec![];
        let mut i = 0;
        while i < self.running.len() {
            if self.decoding(i) && held.binary_search(&i).is_err() {
                while self.take(i, 1, 0) == 0 {
                    self.preempt_last();
                    if i == self.running.len() {
                        break; // It was the last one itself.
                    }
                }
                if let Some(sequence) = self.running.get(i) {
                    step.push(Part { index: i, tokens: 1, output: sequence.output(1) });
                }
            }
            i += 1;
        }
        let mut budget = self.options.max_batch_tokens - step.len();
        if self.running.len() > 1 && self.running.iter().any(|sequence| sequence.rows == Rows::Last) {
            budget = budget.min(self.options.max_prefill_tokens);
        }
        self.prefill(budget, bound, &mut step);
        step
    }

    fn shares(&self) -> Shares<'_> {
        let running = self.running.iter().map(|sequence| &sequence.client);
        Shares::new(self.options.max_sequences, running, self.waiting.clients())
    }

    fn bound(&self) -> Bound {
        let shares = self.shares();
        let beyond: Vec<bool> = self.running.iter().map(|s| !shares.is_modest(&s.client.tenant)).collect();
        let within = self.running.iter().zip(&beyond).filter(|(_, beyond)| !**beyond);
        let tokens: usize = within.map(|(sequence, _)| sequence.remaining()).sum();
        if tokens == 0 || !beyond.contains(&true) {
            return self.bound_of_expected().unwrap_or_default();
        }
        let tokens = tokens.min(self.options.max_batch_tokens);
        let Some(allowed) = self.cost.beside(tokens, self.options.slowdown) else { return Bound::default() };
        self.bound_to(beyond, allowed)
    }

    /// Where another tenant asked lately and, counted with it, all that runs is of tenants beyond their share: its next request
    /// has to wait for the end of the step, which is no longer for it than the request's own first step may be.
    fn bound_of_expected(&self) -> Option<Bound> {
        let is_here = |client: &Client| {
            let mut here =
                self.running.iter().map(|s| &s.client).chain(self.waiting.clients().map(|(client, _)| client));
            here.any(|other| other.tenant == client.tenant)
        };
        let expected = || self.recent.clients().filter(|(client, _)| !is_here(client));
        let first = expected().map(|(_, tokens)| tokens).min()?;
        let running = self.running.iter().map(|sequence| &sequence.client);
        let waiting = self.waiting.clients().chain(expected().map(|(client, _)| (client, 0)));
        let shares = Shares::new(self.options.max_sequences, running, waiting);
        if self.running.iter().any(|s| shares.is_modest(&s.client.tenant)) {
            return None;
        }
        let first = first.max(LEAST).min(self.options.max_batch_tokens);
        let allowed = first + self.cost.beside(first, self.options.slowdown)?;
        let mut bound = self.bound_to(vec![true; self.running.len()], allowed);
        // What must be computed in one step is, as nobody else would be in it.
        let oldest = self.running.iter().find(|sequence| !sequence.decodes());
        if let Some(whole) = oldest.filter(|sequence| sequence.rows == Rows::Whole) {
            bound.prompts = bound.prompts.max(whole.remaining());
        }
        Some(bound)
    }

    /// `allowed` tokens for those of the running that are `beyond` their share, one at least.
    fn bound_to(&self, beyond: Vec<bool>, allowed: usize) -> Bound {
        let allowed = allowed.max(1);
        let held = || self.running.iter().zip(&beyond).filter(|(_, beyond)| **beyond).map(|(sequence, _)| sequence);
        let decoding = held().filter(|sequence| sequence.decodes()).count();
        let prompts = held().count() - decoding;
        // Prompts go on beside, in turns where there is one token for both.
        let decoding = decoding.min(match allowed {
            _ if prompts == 0 => allowed,
            1 => (self.steps % 2) as usize,
            _ => allowed.div_ceil(2),
        });
        Bound { beyond, decoding, prompts: allowed - decoding + self.saved }
    }

    /// The model's input for a part of the step.
    pub fn work(&self, part: &Part) -> Work {
        let sequence = &self.running[part.index];
        let start = sequence.computed;
        Work {
            tokens: sequence.tokens[start..start + part.tokens].to_vec(),
            start,
            blocks: sequence.table.clone(),
            adapter: sequence.adapter.clone(),
            output: part.output,
        }
    }

    /// Takes note that the step has been computed. Blocks that it filled can be shared from now on.
    pub fn complete(&mut self, step: &[Part]) {
        let size = self.options.block_size;
        self.steps += 1;
        let mut turns: Vec<usize> = step.iter().map(|part| part.index).collect();
        turns.sort_unstable_by_key(|&i| self.running[i].advanced);
        for i in turns {
            self.parts += 1;
            self.running[i].advanced = self.parts;
        }
        for part in step {
            let sequence = &mut self.running[part.index];
            sequence.computed += part.tokens;
            if part.output == Output::LastLogits {
                self.waiting.charge(&sequence.client, DRAWN);
            }
            if sequence.rows == Rows::Whole {
                continue;
            }
            for block in sequence.published..sequence.computed / size {
                let key = sequence.key(block, size);
                self.pool.publish(sequence.table[block], key);
                sequence.published = block + 1;
            }
        }
    }

    /// Takes note of how long a step took.
    pub fn observe(&mut self, step: &[Part], time: Duration) {
        self.cost.observe(step.iter().map(|part| part.tokens).sum(), time.as_secs_f64());
        self.recent.pass(time.as_secs_f64());
    }

    fn decoding(&self, i: usize) -> bool {
        self.running[i].decodes()
    }

    /// Lets waiting sequences run, in the queue's order, as far as they would not take the blocks that those running need
    /// soon. Where there is no room for one of a tenant that has less than its share, others who have more than theirs make
    /// room; what they had computed stays in the cache for as long as nobody needs the blocks.
    fn admit(&mut self) {
        loop {
            let shares = self.shares();
            let turn = self.waiting.turn(|tenant| shares.is_modest(tenant)).cloned();
            drop(shares);
            let Some(tenant) = turn else { return };
            while !self.start(&tenant) {
                if !self.make_way(&tenant) {
                    return;
                }
            }
        }
    }

    /// Lets the tenant's oldest waiting sequence run, if there is room.
    fn start(&mut self, tenant: &Tenant) -> bool {
        let size = self.options.block_size;
        let lacking = |s: &Sequence<P>| s.target().div_ceil(size) - s.table.len();
        // Each running sequence will go on to its next block before long.
        let reserve = self.running.iter().map(lacking).sum::<usize>() + self.running.len();
        if self.running.len() == self.options.max_sequences || self.pool.available() <= reserve {
            return false;
        }
        let Some(mut sequence) = self.waiting.pop(tenant) else { return false };
        Self::reuse(&mut self.pool, &mut sequence, size);
        if self.pool.available() < reserve + lacking(&sequence) {
            self.put_back(sequence);
            return false;
        }
        self.admissions += 1;
        if !sequence.preempted {
            // At once, so that the next one in this step may be another's.
            self.waiting.charge(&sequence.client, sequence.remaining() as f64);
            self.recent.note(&sequence.client, sequence.remaining());
        }
        let at = self.running.partition_point(|s| s.order < sequence.order);
        self.running.insert(at, sequence);
        true
    }

    /// Puts back the latest sequence of the tenant that is furthest beyond its share, if there is one and `tenant` is within
    /// its own.
    fn make_way(&mut self, tenant: &Tenant) -> bool {
        let Some(other) = self.shares().gives_way(tenant).cloned() else { return false };
        let Some(latest) = self.running.iter().rposition(|sequence| sequence.client.tenant == other) else {
            return false;
        };
        self.yields += 1;
        self.preempt(latest);
        true
    }

    /// Adds chunks of prompts to the step, `budget` tokens at most.
    fn prefill(&mut self, mut budget: usize, bound: &Bound, step: &mut Vec<Part>) {
        self.saved = 0;
        let mut prompts: Vec<usize> = (0..self.running.len()).filter(|&i| !self.decoding(i)).collect();
        let Some(&oldest) = prompts.first() else { return };
        let mut given = vec![0; prompts.len()];
        let mut allowed = bound.prompts;
        if prompts.len() > 1 {
            let first = match (bound.holds(oldest), self.running[oldest].rows) {
                (false, _) => budget.div_ceil(2),
                (true, Rows::Whole) => allowed.min(budget),
                (true, _) => allowed.min(budget).div_ceil(2),
            };
            given[0] = self.running[oldest].remaining().min(first);
            budget -= given[0];
            if bound.holds(oldest) {
                allowed -= given[0];
            }
        }
        let mut by_remaining: Vec<usize> = (0..prompts.len()).collect();
        by_remaining.sort_by_key(|&p| self.running[prompts[p]].remaining());
        for p in by_remaining {
            let held = bound.holds(prompts[p]);
            let most = if held { budget.min(allowed) } else { budget };
            let more = (self.running[prompts[p]].remaining() - given[p]).min(most);
            given[p] += more;
            budget -= more;
            if held {
                allowed -= more;
            }
        }
        // Blocks and rows are dealt out in order of arrival, again so that the oldest advances.
        let mut rows = self.options.max_rows;
        let (mut spent, mut refused) = (0, false);
        for (p, index) in prompts.drain(..).enumerate() {
            let (is_whole, remaining) = (self.running[index].rows == Rows::Whole, self.running[index].remaining());
            if is_whole && given[p] < remaining {
                if bound.holds(index) && bound.prompts - spent < remaining {
                    refused = true;
                    continue;
                }
                // The oldest goes on in any case, be it longer than a step.
                given[p] = if step.is_empty() || bound.holds(index) { remaining } else { 0 };
            }
            let tokens = self.take(index, given[p], rows);
            if tokens == 0 || is_whole && tokens < remaining {
                continue;
            }
            let output = self.running[index].output(tokens);
            if let Output::Logits(n) = output {
                rows -= n;
            }
            if bound.holds(index) {
                spent += tokens;
            }
            step.push(Part { index, tokens, output });
        }
        if refused {
            // It adds up until it is enough.
            self.saved = bound.prompts.saturating_sub(spent);
        }
    }

    /// Makes room for up to `count` more tokens of a running sequence that ask for up to `rows` rows of
    /// [`Output::Logits`]; returns for how many there was room.
    fn take(&mut self, index: usize, mut count: usize, rows: usize) -> usize {
        let size = self.options.block_size;
        let sequence = &mut self.running[index];
        if count > 0 {
            // Others may have computed the same prefix meanwhile.
            Self::reuse(&mut self.pool, sequence, size);
        }
        let start = sequence.computed;
        count = count.min(sequence.remaining());
        if let Rows::From(first) = sequence.rows {
            count = count.min(first.max(start) + rows - start);
        }
        count = count.min((sequence.table.len() + self.pool.available()) * size - start);
        while sequence.table.len() * size < start + count {
            let Some(block) = self.pool.allocate() else { break };
            sequence.table.push(block);
        }
        count
    }

    /// Replaces computing by blocks of the cache, where a sequence stands at the end of a block.
    fn reuse(pool: &mut BlockPool, sequence: &mut Sequence<P>, size: usize) {
        while sequence.computed == sequence.table.len() * size && sequence.computed + size <= sequence.reusable() {
            let key = sequence.key(sequence.table.len(), size);
            let Some(block) = pool.acquire(&key) else { return };
            sequence.table.push(block);
            sequence.published = sequence.table.len();
            sequence.computed += size;
            if !sequence.preempted {
                sequence.cached += size;
            }
        }
    }

    /// Puts the running sequence that arrived last back into the queue.
    fn preempt_last(&mut self) {
        if let Some(last) = self.running.len().checked_sub(1) {
            self.preemptions += 1;
            self.preempt(last);
        }
    }

    /// Puts a running sequence back into the queue. Its tokens are computed again later.
    fn preempt(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        sequence.preempted = true;
        self.put_back(sequence);
    }

    fn put_back(&mut self, mut sequence: Sequence<P>) {
        self.pool.release(&mut sequence.table);
        (sequence.computed, sequence.published) = (0, 0);
        if !sequence.preempted {
            sequence.cached = 0;
        }
        self.waiting.put_back(sequence);
    }

    #[cfg(test)]
    pub fn check(&self) {
        self.pool.check(self.running.iter().map(|s| s.table.as_slice()));
        assert!(self.waiting.iter().all(|s| s.table.is_empty()));
        assert!(self.running.len() <= self.options.max_sequences);
        assert!(self.running.is_sorted_by_key(|s| s.order));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::tests::adapter;

    fn scheduler(max_sequences: usize, max_batch_tokens: usize, block_size: usize, blocks: usize) -> Scheduler<()> {
        bounded(max_sequences, max_batch_tokens, block_size, blocks, f64::INFINITY)
    }

    fn bounded(
        max_sequences: usize,
        max_batch_tokens: usize,
        block_size: usize,
        blocks: usize,
        slowdown: f64,
    ) -> Scheduler<()> {
        Scheduler::new(SchedulerOptions {
            max_sequences,
            max_batch_tokens,
            max_prefill_tokens: max_batch_tokens,
            max_rows: 5,
            block_size,
            blocks,
            slowdown,
        })
    }

    fn prompt(number: u64, length: usize) -> Sequence<()> {
        let tokens = (0..length as u32).map(|t| t + 1000 * number as u32).collect();
        Sequence::new((number, 0), tokens, None, Rows::Last, ())
    }

    /// Computes the step, draws a token where there are logits, and says which sequences advanced by how much.
    fn run(scheduler: &mut Scheduler<()>) -> Vec<(u64, usize)> {
        let step = scheduler.schedule();
        scheduler.complete(&step);
        for part in &step {
            if part.output == Output::LastLogits {
                scheduler.running_mut()[part.index].tokens.push(7);
            }
        }
        scheduler.check();
        step.iter().map(|p| (scheduler.running()[p.index].order.0, p.tokens)).collect()
    }

    #[test]
    fn a_long_prompt_stalls_neither_decoding_nor_short_prompts() {
        let mut scheduler = scheduler(8, 20, 4, 1000);
        scheduler.add(prompt(0, 3));
        assert_eq!(run(&mut scheduler), [(0, 3)]);
        scheduler.add(prompt(1, 500));
        scheduler.add(prompt(2, 400));
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 10), (2, 9)]);
        scheduler.add(prompt(3, 6));
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 10), (2, 3), (3, 6)]);
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 9), (2, 9), (3, 1)]);
    }

    #[test]
    fn prompts_beside_one_that_generates_have_a_part_of_the_step() {
        let mut scheduler = scheduler(8, 100, 4, 1000);
        scheduler.options.max_prefill_tokens = 6;
        scheduler.add(prompt(0, 30));
        assert_eq!(run(&mut scheduler), [(0, 30)], "nobody waits for this step");
        scheduler.add(prompt(1, 8));
        scheduler.add(prompt(2, 9));
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 6)]);
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 2), (2, 4)]);
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 1), (2, 5)]);
        scheduler.add(prompt(3, 50));
        scheduler.remove(|s| s.order.0 < 3);
        assert_eq!(run(&mut scheduler), [(3, 50)]);
        scheduler.remove(|_| true);
        // Also where none has its first token yet, but not where no tokens are asked for.
        (4..6).for_each(|i| scheduler.add(prompt(i, 20)));
        assert_eq!(run(&mut scheduler), [(4, 6)]);
        scheduler.remove(|_| true);
        (6..8).for_each(|i| scheduler.add(Sequence { rows: Rows::Head, ..prompt(i, 20) }));
        assert_eq!(run(&mut scheduler), [(6, 20), (7, 20)]);
    }

    #[test]
    fn a_prefix_is_shared_but_the_last_token_is_computed() {
        let mut scheduler = scheduler(8, 100, 4, 10);
        scheduler.add(prompt(0, 8));
        run(&mut scheduler);
        scheduler.add(Sequence { order: (1, 0), ..prompt(0, 8) });
        scheduler.add(Sequence { order: (2, 0), ..prompt(0, 9) });
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 4), (2, 1)]);
        assert_eq!(scheduler.running().iter().map(|s| s.cached).collect::<Vec<_>>(), [0, 4, 8]);
        assert_eq!(scheduler.block_counts().used, 3 + 1 + 1);
    }

    #[test]
    fn the_latest_gives_way_when_blocks_run_out() {
        let mut scheduler = scheduler(8, 100, 2, 5);
        scheduler.add(prompt(0, 4));
        run(&mut scheduler);
        scheduler.add(prompt(1, 2));
        // One block is left for it and none for its next token, which the older one needs too.
        let mut seen = vec![];
        for _ in 0..6 {
            seen.push(run(&mut scheduler));
        }
        assert!(seen.iter().all(|step| step.first() == Some(&(0, 1))), "the oldest goes on: {seen:?}");
    }

    fn of(tenant: &str, sequence: Sequence<()>) -> Sequence<()> {
        sequence.of(Client { tenant: Some(tenant.into()), share: 1.0 })
    }

    /// Steps of 6 ms and 1 ms a token, as far as the scheduler has seen.
    fn teach(scheduler: &mut Scheduler<()>) {
        for tokens in (1..20).cycle().take(100) {
            scheduler.cost.observe(tokens, 6e-3 + 1e-3 * tokens as f64);
        }
    }

    #[test]
    fn a_tenant_within_its_share_does_not_wait_for_places_that_another_has_taken() {
        let mut scheduler = scheduler(4, 100, 4, 1000);
        (0..20).for_each(|i| scheduler.add(of("flood", prompt(i, 9))));
        run(&mut scheduler);
        run(&mut scheduler);
        scheduler.add(of("quiet", prompt(20, 6)));
        let numbers = |scheduler: &mut Scheduler<()>| run(scheduler).iter().map(|(n, _)| *n).collect::<Vec<_>>();
        assert_eq!(numbers(&mut scheduler), [0, 1, 2, 20]);
        // Not even when it has had more than the flood, for these places are its own.
        scheduler.waiting.charge(&scheduler.running[3].client.clone(), 1e6);
        scheduler.add(of("quiet", prompt(21, 6)));
        assert_eq!(numbers(&mut scheduler), [0, 1, 20, 21]);
        // Half of the places, not more.
        (22..24).for_each(|i| scheduler.add(of("quiet", prompt(i, 6))));
        assert_eq!([numbers(&mut scheduler), numbers(&mut scheduler)], [[0, 1, 20, 21], [0, 1, 20, 21]]);
        assert_eq!((scheduler.yields(), scheduler.preemptions()), (2, 0));
        // What was put back goes on where it was, but for a block that was not full.
        scheduler.remove(|s| s.client.tenant.as_deref() == Some("quiet"));
        assert_eq!(run(&mut scheduler), [(0, 1), (1, 1), (2, 4), (3, 3)]);
    }

    #[test]
    fn steps_of_a_tenant_within_its_share_are_not_made_longer_than_allowed() {
        let mut scheduler = bounded(6, 100, 4, 1000, 1.501);
        (0..9).for_each(|i| scheduler.add(of("flood", prompt(i, 3))));
        assert_eq!(run(&mut scheduler).len(), 6);
        scheduler.add(of("quiet", prompt(9, 3)));
        scheduler.add(of("quiet", prompt(10, 3)));
        run(&mut scheduler);
        assert_eq!(run(&mut scheduler).len(), 6, "nothing is known of what a step takes");
        teach(&mut scheduler);
        // A step of both alone takes 8 ms; half of it are 4 tokens.
        assert_eq!(run(&mut scheduler).iter().map(|(_, n)| n).sum::<usize>(), 6);
        scheduler.remove(|s| s.order.0 == 10);
        // 7 ms, so three of five, in turns.
        let mut seen = vec![0; 11];
        for _ in 0..10 {
            let step = run(&mut scheduler);
            assert_eq!(step.iter().map(|(_, n)| n).sum::<usize>(), 4, "{step:?}");
            step.iter().for_each(|(number, _)| seen[*number as usize] += 1);
        }
        assert!(seen[9] == 10 && seen[..5].iter().all(|n| (5..=7).contains(n)), "{seen:?}");
        // Prompts of the flood have half of what it may.
        scheduler.remove(|s| s.order.0 < 5);
        scheduler.add(of("flood", prompt(20, 40)));
        let step = run(&mut scheduler);
        assert_eq!(step.iter().map(|(_, n)| n).sum::<usize>(), 4, "{step:?}");
        // Alone it has the whole machine again.
        scheduler.remove(|s| s.order.0 == 9);
        assert!(run(&mut scheduler).iter().map(|(_, n)| n).sum::<usize>() > 30);
    }

    #[test]
    fn prompts_beyond_a_share_go_on_even_where_one_token_is_allowed() {
        let mut scheduler = bounded(6, 100, 4, 1000, 1.1501);
        (0..4).for_each(|i| scheduler.add(of("flood", prompt(i, 3))));
        run(&mut scheduler);
        scheduler.add(of("quiet", prompt(9, 3)));
        run(&mut scheduler);
        teach(&mut scheduler);
        scheduler.add(of("flood", prompt(20, 12)));
        let seen: Vec<u64> = (0..40).flat_map(|_| run(&mut scheduler)).map(|(number, _)| number).collect();
        let times = |number: u64| seen.iter().filter(|&&n| n == number).count();
        // 7 ms alone, so one token beside; the prompt's 12 tokens have every other one.
        assert_eq!((seen.len(), times(9)), (80, 40), "{seen:?}");
        assert!(times(20) >= 12, "{seen:?}");
    }

    #[test]
    fn a_tenant_that_asked_lately_does_not_find_a_long_step_before_its_next_request() {
        let mut scheduler = bounded(4, 100, 4, 1000, 1.501);
        let sum = |step: Vec<(u64, usize)>| step.iter().map(|(_, tokens)| tokens).sum::<usize>();
        scheduler.add(of("quiet", prompt(0, 40)));
        run(&mut scheduler);
        scheduler.remove(|_| true);
        (1..9).for_each(|i| scheduler.add(of("flood", prompt(i, 1000))));
        assert_eq!(sum(run(&mut scheduler)), 100, "nothing is known of what a step takes");
        teach(&mut scheduler);
        // 40 tokens take 46 ms; half of it are 23 more.
        assert_eq!(sum(run(&mut scheduler)), 63);
        // When it is there, what counts is what it has to do.
        scheduler.add(of("quiet", prompt(9, 80)));
        assert_eq!(sum(run(&mut scheduler)), 100);
        scheduler.remove(|s| s.order.0 == 9);
        assert_eq!(sum(run(&mut scheduler)), 100);
        // The shortest prompt of all that are expected counts, but not as if it were nothing: 32 and 19.
        scheduler.add(of("brief", prompt(10, 1)));
        run(&mut scheduler);
        scheduler.remove(|s| s.order.0 == 10);
        assert_eq!(sum(run(&mut scheduler)), 51);
        // Who has no more than its places has whole steps, as everyone has when the others stay away.
        scheduler.remove(|s| s.order.0 > 1);
        assert_eq!(sum(run(&mut scheduler)), 100);
        (11..19).for_each(|i| scheduler.add(of("flood", prompt(i, 1000))));
        assert_eq!(sum(run(&mut scheduler)), 51);
        scheduler.recent.pass(10.0);
        assert_eq!(sum(run(&mut scheduler)), 100);
    }

    #[test]
    fn while_a_request_is_expected_what_must_be_computed_in_one_step_is() {
        let mut scheduler = bounded(4, 200, 4, 1000, 1.501);
        scheduler.add(of("quiet", prompt(0, 2)));
        run(&mut scheduler);
        scheduler.remove(|_| true);
        teach(&mut scheduler);
        (1..9).for_each(|i| scheduler.add(of("flood", Sequence { rows: Rows::Whole, ..prompt(i, 60) })));
        for i in 1..6 {
            assert_eq!(run(&mut scheduler), [(i, 60)]);
            scheduler.remove_running(|s| s.order.0 == i);
        }
    }

    #[test]
    fn what_must_be_computed_in_one_step_waits_until_it_was_allowed_enough() {
        let mut scheduler = bounded(4, 16, 4, 1000, 1.5001);
        teach(&mut scheduler);
        let whole = |number| Sequence { rows: Rows::Whole, ..prompt(number, 12) };
        (0..5).for_each(|i| scheduler.add(of("flood", whole(i))));
        scheduler.add(of("quiet", prompt(9, 3)));
        let mut went = vec![];
        for step in 0..30 {
            let parts = run(&mut scheduler);
            let done: Vec<u64> = parts.iter().filter(|(_, n)| *n == 12).map(|(number, _)| *number).collect();
            assert!(parts.iter().any(|(number, _)| *number == 9), "{parts:?}");
            went.extend(done.iter().map(|number| (step, *number)));
            scheduler.remove_running(|s| done.contains(&s.order.0));
        }
        let numbers: Vec<u64> = went.iter().map(|(_, number)| *number).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4], "{went:?}");
        // 3 tokens a step and 12 each, until the last two are within the share.
        let steps: Vec<usize> = went.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert_eq!(steps, [4, 4, 1, 1], "{went:?}");
    }

    #[derive(Debug, Clone)]
    enum Op {
        Add { adapter: usize, length: usize, fork: usize, rows: u8, tenant: usize },
        Step,
        Cancel(usize),
        Preempt,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (0usize..3, 1usize..24, 0usize..24, 0u8..5, 0usize..3)
                .prop_map(|(adapter, length, fork, rows, tenant)| Op::Add { adapter, length, fork, rows, tenant }),
            8 => Just(Op::Step),
            1 => (0usize..8).prop_map(Op::Cancel),
            1 => Just(Op::Preempt),
        ]
    }

    proptest! {
        /// Each slot of the cache remembers what was written: the adapter and all tokens up to there. Every sequence must
        /// find in its blocks what it would have written itself.
        #[test]
        fn every_sequence_finds_its_own_prefix_in_its_blocks(
            ops in prop::collection::vec(op(), 1..120),
            max_sequences in 1usize..6,
            (max_batch_tokens, max_prefill_tokens) in (1usize..20, 1usize..20),
            block_size in 1usize..5,
            spare in 0usize..12,
            slowdown in 1.0f64..3.0,
        ) {
            // The longest sequence fits alone: 24 tokens of a prompt and 8 drawn.
            let blocks = 32usize.div_ceil(block_size) + spare;
            let mut scheduler = bounded(max_sequences, max_batch_tokens, block_size, blocks, slowdown);
            scheduler.options.max_prefill_tokens = max_prefill_tokens;
            let clients = [1.0, 2.0, 0.5].map(|share| Client { tenant: Some(share.to_string().into()), share });
            let adapters = [None, Some(adapter("a", 0)), Some(adapter("b", 0))];
            let mut memory: Vec<(usize, Vec<u32>)> = vec![(9, vec![]); blocks * block_size];
            let which = |s: &Sequence<()>| adapters.iter().position(|a| {
                a.as_ref().map(|a| &a.generation) == s.adapter.as_ref().map(|a| &a.generation)
            }).unwrap();
            let (mut next, mut added, mut ended) = (0, 0, 0);
            let step = |scheduler: &mut Scheduler<()>, memory: &mut Vec<(usize, Vec<u32>)>| {
                let decoding: Vec<Order> = scheduler.running().iter().filter(|s| s.decodes()).map(|s| s.order).collect();
                let step = scheduler.schedule();
                scheduler.check();
                let tokens = step.iter().map(|p| p.tokens).sum::<usize>();
                // What must be computed in one step may be longer.
                let whole = step.iter().any(|p| scheduler.running()[p.index].rows == Rows::Whole);
                assert!(tokens <= max_batch_tokens || whole);
                // Of one token may also be what is left of a prompt.
                let prompts = step.iter().map(|p| p.tokens).filter(|&tokens| tokens > 1).sum::<usize>();
                let waits = step.iter().any(|p| decoding.contains(&scheduler.running()[p.index].order));
                assert!(!waits || whole || prompts <= max_prefill_tokens);
                scheduler.observe(&step, Duration::from_millis(3 + tokens as u64));
                for part in &step {
                    let work = scheduler.work(part);
                    let sequence = &scheduler.running()[part.index];
                    for p in work.start..work.start + part.tokens {
                        let slot = work.blocks[p / block_size] as usize * block_size + p % block_size;
                        memory[slot] = (which(sequence), sequence.tokens[..=p].to_vec());
                    }
                }
                scheduler.complete(&step);
                for s in scheduler.running() {
                    for p in 0..s.computed {
                        let slot = s.table[p / block_size] as usize * block_size + p % block_size;
                        assert_eq!(&memory[slot], &(which(s), s.tokens[..=p].to_vec()), "position {p} of {:?}", s.order);
                    }
                }
                let mut done = vec![];
                for part in &step {
                    let s = &mut scheduler.running_mut()[part.index];
                    match (s.rows, part.output) {
                        (Rows::Last, Output::LastLogits) => {
                            let drawn = s.tokens.len() as u32 % 3;
                            s.tokens.push(drawn);
                            if s.tokens.len() >= 32 || (s.order.0 + s.tokens.len() as u64).is_multiple_of(9) {
                                done.push(s.order);
                            }
                        }
                        (Rows::Head | Rows::Whole, Output::Head) => done.push(s.order),
                        (Rows::From(first), Output::Logits(n)) => {
                            assert_eq!(first + n, s.computed);
                            s.rows = Rows::From(first + n);
                            if first + n == s.tokens.len() - 1 {
                                done.push(s.order);
                            }
                        }
                        (_, Output::None) => {}
                        other => panic!("{other:?}"),
                    }
                }
                scheduler.remove_running(|s| done.contains(&s.order));
                scheduler.check();
                (step.len(), done.len())
            };
            for op in ops {
                match op {
                    Op::Add { adapter, length, fork, rows, tenant } => {
                        // Equal beginnings are common.
                        let tokens: Vec<u32> = (0..length).map(|i| if i < fork { i as u32 % 3 } else { 3 }).collect();
                        let rows = match rows {
                            0 => Rows::Head,
                            4 => Rows::Whole,
                            1 if length > 1 => Rows::From(fork % (length - 1)),
                            _ => Rows::Last,
                        };
                        let sequence = Sequence::new((next, 0), tokens, adapters[adapter].clone(), rows, ());
                        scheduler.add(sequence.of(clients[tenant].clone()));
                        next += 1;
                        added += 1;
                    }
                    Op::Step => ended += step(&mut scheduler, &mut memory).1,
                    Op::Cancel(n) => {
                        let orders: Vec<Order> = scheduler.running().iter().chain(scheduler.waiting()).map(|s| s.order).collect();
                        if let Some(&gone) = orders.get(n) {
                            scheduler.remove(|s| s.order == gone);
                            added -= 1;
                        }
                    }
                    Op::Preempt => scheduler.preempt_last(),
                }
                scheduler.check();
            }
            // Whatever is left comes to its end.
            for _ in 0..100_000 {
                if added == ended {
                    break;
                }
                let (parts, done) = step(&mut scheduler, &mut memory);
                assert!(parts > 0, "a step must advance something");
                ended += done;
            }
            assert_eq!(added, ended);
            assert_eq!(scheduler.block_counts().used, 0);
        }
    }
}
