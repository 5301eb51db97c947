//! The loop: batches in a random order, steps of the optimiser, evaluations, checkpoints.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Tensor, Var};
use clap::ValueEnum;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::examples::{Example, Goal};
use super::gradients;
use super::metrics::Confusion;
use super::network::{Batch, Multiplied, Network, Passed, Purpose};
use super::ops::Targets;
use super::optimizer::{AdamW, AdamWOptions};
use super::random;
use super::schedule::{Decay, factor};
use super::stopwatch::Stopwatch;
use crate::{Error, Result};

/// Tokens that are worth a pass of their own through the network.
const SHARE: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    Accuracy,
    MacroF1,
    Loss,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TrainerOptions {
    pub epochs: usize,
    /// Examples of an optimiser's step.
    pub batch_size: usize,
    /// Tokens computed at a time; a step of more is done in parts that add up to the same.
    pub max_batch_tokens: usize,
    pub learning_rate: f64,
    pub decay: Decay,
    /// Share of the steps in which the rate goes up.
    pub warmup: f64,
    pub adamw: AdamWOptions,
    /// Largest norm of a step's gradient; 0 is any.
    pub max_norm: f64,
    pub smoothing: f32,
    /// A weight for each class; empty is 1 for all.
    pub class_weights: Vec<f32>,
    /// What decides which evaluation is the best.
    pub metric: Metric,
    /// Steps between evaluations; 0 is one after each epoch.
    pub eval_every: usize,
    /// Ends after so many evaluations without a better one; 0 never does.
    pub patience: usize,
    /// Steps between checkpoints; 0 writes one only when interrupted.
    pub checkpoint_every: usize,
    pub checkpoint: PathBuf,
    /// What must be the same for a run to be resumed.
    pub fingerprint: String,
    pub seed: u64,
}

/// What an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: usize,
    /// Mean over examples of a classification, over tokens of texts.
    pub loss: f64,
    /// Of a classification.
    pub confusion: Option<Confusion>,
    /// `History::seconds`, `cpu_seconds` and `tokens` until then; evaluations take no part of the time.
    #[serde(default)]
    pub seconds: f64,
    #[serde(default)]
    pub cpu_seconds: Option<f64>,
    #[serde(default)]
    pub tokens: usize,
}

impl Evaluation {
    /// The larger the better.
    fn score(&self, metric: Metric) -> f64 {
        match (metric, &self.confusion) {
            (Metric::Accuracy, Some(c)) => c.accuracy(),
            (Metric::MacroF1, Some(c)) => c.macro_f1(),
            _ => -self.loss,
        }
    }
}

/// What a run has come to; all that a checkpoint keeps beside the numbers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Steps taken.
    pub step: usize,
    /// Each step's loss.
    pub losses: Vec<f32>,
    pub evaluations: Vec<Evaluation>,
    /// The index in `evaluations` of the best.
    pub best: Option<usize>,
    /// Seconds spent in steps, and before them in the base where nothing but the head is trained, of all parts of an
    /// interrupted run.
    pub seconds: f64,
    /// Of all threads in that time. `None` where the system does not tell.
    #[serde(default)]
    pub cpu_seconds: Option<f64>,
    /// Tokens trained on.
    pub tokens: usize,
}

impl History {
    fn spent(&mut self, seconds: f64, cpu_seconds: Option<f64>) {
        // Before anything was spent, no time is not an unknown one.
        let before = if self.seconds == 0.0 { Some(0.0) } else { self.cpu_seconds };
        self.cpu_seconds = before.zip(cpu_seconds).map(|(before, now)| before + now);
        self.seconds += seconds;
    }
}

/// What is known of a finished run; its `history.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Account {
    #[serde(flatten)]
    pub history: History,
    /// Numbers that were trained, and all of the model with them.
    pub trained: usize,
    pub parameters: usize,
    pub multiplied: Multiplied,
    /// Tokens of the examples, each counted once.
    pub example_tokens: usize,
}

/// For whoever watches.
pub enum Event<'a> {
    Step { step: usize, loss: f32, tokens: usize },
    Evaluated(&'a Evaluation),
    Saved,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Done,
    /// No better evaluation for as long as the patience lasts.
    Early,
    /// Asked to stop; a checkpoint has been written.
    Interrupted,
}

pub struct Trainer<'a> {
    network: &'a Network,
    options: TrainerOptions,
    train: &'a [Example],
    eval: &'a [Example],
    /// States before the head, where nothing but the head is trained: `[examples, hidden]`.
    pooled: Option<(Tensor, Tensor)>,
    variables: Vec<Var>,
    optimizer: AdamW,
    history: History,
    /// The variables at the best evaluation.
    best: Option<Vec<Tensor>>,
}

impl<'a> Trainer<'a> {
    pub fn new(
        network: &'a Network,
        options: TrainerOptions,
        train: &'a [Example],
        eval: &'a [Example],
    ) -> Result<Self> {
        let variables: Vec<Var> = network.trained().into_iter().map(|(_, v)| v.clone()).collect();
        let optimizer = AdamW::new(variables.clone(), options.adamw.clone())?;
        let mut trainer = Trainer {
            network,
            options,
            train,
            eval,
            pooled: None,
            variables,
            optimizer,
            history: History::default(),
            best: None,
        };
        let head_alone =
            trainer.variables.len() == 1 && matches!(train.first(), Some(Example { goal: Goal::Class(_), .. }));
        if head_alone {
            let watch = Stopwatch::start();
            let states = trainer.pool(train)?;
            trainer.history.spent(watch.seconds(), watch.cpu_seconds());
            trainer.pooled = Some((states, trainer.pool(eval)?));
        }
        Ok(trainer)
    }

    fn pool(&self, examples: &[Example]) -> Result<Tensor> {
        let all: Vec<usize> = (0..examples.len()).collect();
        let mut rows = Vec::new();
        for part in parts(&all, examples, self.options.max_batch_tokens) {
            rows.push(self.network.pooled(&batch(part, examples), Purpose::Evaluate)?.output);
        }
        Ok(match rows.is_empty() {
            true => {
                Tensor::zeros((0, self.network.config().hidden_size), candle_core::DType::F32, self.network.device())?
            }
            false => Tensor::cat(&rows, 0)?,
        })
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> usize {
        self.options.epochs * self.train.len().div_ceil(self.options.batch_size)
    }

    /// Goes on from a checkpoint. False where there is none.
    pub fn resume(&mut self) -> Result<bool> {
        let Some(saved) = Checkpoint::read(&self.options.checkpoint, &self.options.fingerprint, &self.variables)?
        else {
            return Ok(false);
        };
        for (var, numbers) in self.variables.iter().zip(&saved.numbers) {
            var.set(numbers)?;
        }
        self.optimizer.restore(saved.moments, saved.history.step)?;
        let History { seconds, cpu_seconds, .. } = self.history;
        (self.best, self.history) = (saved.best, saved.history);
        if seconds > 0.0 {
            self.history.spent(seconds, cpu_seconds);
        }
        Ok(true)
    }

    fn save(&self) -> Result<()> {
        let numbers = self.variables.iter().map(|v| v.as_tensor().clone()).collect();
        let (moments, best) = (self.optimizer.moments()?, self.best.clone());
        let checkpoint = Checkpoint { numbers, moments, best, history: self.history.clone() };
        checkpoint.write(&self.options.checkpoint, &self.options.fingerprint)
    }

    /// Trains to the end, or until `stop` is set. The network then has the numbers of the best evaluation, if there was
    /// one.
    pub fn run(&mut self, stop: &AtomicBool, watch: &mut dyn FnMut(Event)) -> Result<Ended> {
        let (steps, per_epoch) = (self.steps(), self.train.len().div_ceil(self.options.batch_size));
        let every = if self.options.eval_every > 0 { self.options.eval_every } else { per_epoch };
        let mut order: (usize, Vec<usize>) = (usize::MAX, vec![]);
        let texts = matches!(self.eval.first(), Some(Example { goal: Goal::Tokens(_), .. }));
        if texts && self.history.step == 0 {
            // What the base says of texts is what training is measured by; of classes it knows nothing.
            self.evaluated(watch)?;
        }
        while self.history.step < steps {
            let step = self.history.step;
            if order.0 != step / per_epoch {
                let mut all: Vec<usize> = (0..self.train.len()).collect();
                all.shuffle(&mut random(self.options.seed, "order", step / per_epoch));
                order = (step / per_epoch, all);
            }
            let first = step % per_epoch * self.options.batch_size;
            let chosen = &order.1[first..(first + self.options.batch_size).min(order.1.len())];
            let stopwatch = Stopwatch::start();
            let (loss, tokens) = self.step(step, steps, chosen)?;
            if !loss.is_finite() {
                return Err(Error::bad_request(format!(
                    "the loss of step {} is {loss}: training has diverged; try a lower --learning-rate",
                    step + 1
                )));
            }
            self.history.spent(stopwatch.seconds(), stopwatch.cpu_seconds());
            self.history.tokens += tokens;
            self.history.losses.push(loss);
            self.history.step += 1;
            watch(Event::Step { step: step + 1, loss, tokens });
            let done = self.history.step == steps;
            if !self.eval.is_empty() && (done || self.history.step.is_multiple_of(every)) && self.evaluated(watch)? {
                self.take_best()?;
                return Ok(Ended::Early);
            }
            let due =
                self.options.checkpoint_every > 0 && self.history.step.is_multiple_of(self.options.checkpoint_every);
            let interrupted = stop.load(Ordering::Relaxed) && !done;
            if (due || interrupted) && !done {
                self.save()?;
                watch(Event::Saved);
            }
            if interrupted {
                return Ok(Ended::Interrupted);
            }
        }
        self.take_best()?;
        Ok(Ended::Done)
    }

    /// Evaluates and says whether the patience has run out.
    fn evaluated(&mut self, watch: &mut dyn FnMut(Event)) -> Result<bool> {
        let evaluation = self.evaluate()?;
        watch(Event::Evaluated(&evaluation));
        let metric = self.options.metric;
        let best = self.history.best.map(|b| self.history.evaluations[b].score(metric));
        self.history.evaluations.push(evaluation);
        let last = self.history.evaluations.len() - 1;
        if best.is_none_or(|best| self.history.evaluations[last].score(metric) > best) {
            self.history.best = Some(last);
            self.best = Some(self.variables.iter().map(|v| v.as_tensor().copy()).collect::<Result<_, _>>()?);
        }
        let waited = last - self.history.best.unwrap_or(last);
        Ok(self.options.patience > 0 && waited >= self.options.patience)
    }

    fn take_best(&mut self) -> Result<()> {
        for (var, numbers) in self.variables.iter().zip(self.best.iter().flatten()) {
            var.set(numbers)?;
        }
        Ok(())
    }

    /// Returns the loss and how many tokens were computed.
    fn step(&mut self, step: usize, steps: usize, chosen: &[usize]) -> Result<(f32, usize)> {
        let mut gradients: Vec<Option<Tensor>> = vec![None; self.variables.len()];
        let (mut loss, mut tokens) = (0.0, 0);
        let total = self.total_weight(self.train, chosen);
        let mut noise = random(self.options.seed, "noise", step);
        for part in parts(chosen, self.train, self.options.max_batch_tokens) {
            tokens += part.iter().map(|&i| self.train[i].tokens.len()).sum::<usize>();
            let shares: Vec<(Vec<usize>, u64)> = self.shares(part).into_iter().map(|s| (s, noise.random())).collect();
            let one = |(share, seed): &(Vec<usize>, u64)| -> Result<_> {
                let pooled = self.pooled.as_ref().map(|(train, _)| train);
                let purpose = Purpose::Train(&mut ChaCha8Rng::seed_from_u64(*seed));
                let value = self.loss(self.train, share, total, pooled, purpose)?;
                Ok((value.output.to_scalar::<f32>()?, self.network.gradients(&value)?))
            };
            for result in shares.par_iter().map(one).collect::<Vec<_>>() {
                let (share, of_share) = result?;
                loss += share;
                for (sum, gradient) in gradients.iter_mut().zip(of_share) {
                    *sum = match (sum.take(), gradient) {
                        (Some(sum), Some(gradient)) => Some(gradients::add(sum, &gradient)?),
                        (sum, gradient) => sum.or(gradient),
                    };
                }
            }
        }
        let warmup = (steps as f64 * self.options.warmup).round() as usize;
        let rate = self.options.learning_rate * factor(self.options.decay, step, steps, warmup);
        self.optimizer.step(&gradients, rate, self.options.max_norm)?;
        Ok((loss, tokens))
    }

    /// Shares of a part for passes of their own, at the same time. A thread that goes through the whole network by itself
    /// waits for no other after each product; but each pass has gradients of its own, so those of whole weights are
    /// computed in one.
    fn shares(&self, part: &[usize]) -> Vec<Vec<usize>> {
        let tokens: usize = part.iter().map(|&i| self.train[i].tokens.len()).sum();
        let alone = self.pooled.is_some() || self.network.trains_weights() || !self.network.device().is_cpu();
        deal(part, self.train, if alone { 1 } else { tokens.div_ceil(SHARE) })
    }

    fn weight(&self, class: u32) -> f32 {
        self.options.class_weights.get(class as usize).copied().unwrap_or(1.0)
    }

    /// What the losses of these examples are divided by.
    fn total_weight(&self, examples: &[Example], chosen: &[usize]) -> f32 {
        let of = |i: &usize| match &examples[*i].goal {
            Goal::Class(class) => self.weight(*class),
            Goal::Tokens(ranges) => ranges.iter().map(ExactSizeIterator::len).sum::<usize>() as f32,
        };
        chosen.iter().map(of).sum()
    }

    /// The weighted sum of the losses over `total`.
    fn loss(
        &self,
        examples: &[Example],
        part: &[usize],
        total: f32,
        pooled: Option<&Tensor>,
        purpose: Purpose,
    ) -> Result<Passed> {
        let smoothing = if let Purpose::Train(_) = purpose { self.options.smoothing } else { 0.0 };
        let mut targets = Targets { classes: vec![], weights: vec![], smoothing };
        let batch = batch(part, examples);
        let (mut rows, mut start) = (vec![], 0u32);
        for &i in part {
            let example = &examples[i];
            match &example.goal {
                Goal::Class(class) => {
                    targets.classes.push(*class);
                    targets.weights.push(self.weight(*class) / total);
                }
                Goal::Tokens(ranges) => {
                    for at in ranges.iter().cloned().flatten() {
                        rows.push(start + at as u32 - 1);
                        targets.classes.push(example.tokens[at]);
                        targets.weights.push(1.0 / total);
                    }
                }
            }
            start += example.tokens.len() as u32;
        }
        if !rows.is_empty() {
            return self.network.language_loss(&batch, &rows, &targets, purpose);
        }
        let pooled = self.pooled(&batch, part, pooled, purpose)?;
        pooled.then(|pooled| self.network.classification_loss(&pooled, &targets))
    }

    /// The pooled states of a part: of `kept`, those of all examples, where these do not change.
    fn pooled(&self, batch: &Batch, part: &[usize], kept: Option<&Tensor>, purpose: Purpose) -> Result<Passed> {
        let Some(kept) = kept else { return self.network.pooled(batch, purpose) };
        let index: Vec<u32> = part.iter().map(|&i| i as u32).collect();
        Ok(kept.index_select(&Tensor::new(index, kept.device())?, 0)?.into())
    }

    /// How good the network is on the examples held out.
    pub fn evaluate(&self) -> Result<Evaluation> {
        // By length, so that a part's sequences are about as long; none is padded anyway.
        let mut all: Vec<usize> = (0..self.eval.len()).collect();
        all.sort_by_key(|&i| self.eval[i].tokens.len());
        let (mut loss, mut confusion) = (0.0, None);
        let total = self.total_weight(self.eval, &all);
        for part in parts(&all, self.eval, self.options.max_batch_tokens) {
            let pooled = self.pooled.as_ref().map(|(_, eval)| eval);
            if let Goal::Tokens(_) = self.eval[part[0]].goal {
                loss += self.loss(self.eval, part, total, None, Purpose::Evaluate)?.output.to_scalar::<f32>()? as f64;
                continue;
            }
            let rows = self.pooled(&batch(part, self.eval), part, pooled, Purpose::Evaluate)?;
            let logits = self.network.logits(&rows.output)?.to_vec2::<f32>()?;
            for (&i, logits) in part.iter().zip(&logits) {
                let Goal::Class(class) = self.eval[i].goal else { continue };
                let confusion = confusion.get_or_insert_with(|| Confusion::new(logits.len()));
                let best = (0..logits.len()).fold(0, |b, c| if logits[c] > logits[b] { c } else { b });
                confusion.add(class as usize, best);
                let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l)) as f64;
                let sum: f64 = logits.iter().map(|&l| (l as f64 - max).exp()).sum();
                let own = max + sum.ln() - logits[class as usize] as f64;
                loss += own * (self.weight(class) / total) as f64;
            }
        }
        let History { step, seconds, cpu_seconds, tokens, .. } = self.history;
        Ok(Evaluation { step, loss: kept(loss), confusion, seconds, cpu_seconds, tokens })
    }
}

/// Of a loss as many digits as are read from a checkpoint as they were written, so that a resumed run ends with the same
/// numbers: reading may miss the last of an f64's 17.
fn kept(loss: f64) -> f64 {
    (loss * 1e9).round() / 1e9
}

fn batch(part: &[usize], examples: &[Example]) -> Batch {
    let mut batch = Batch::default();
    part.iter().for_each(|&i| batch.push(&examples[i].tokens));
    batch
}

/// Cuts `chosen` in runs of at most `max_tokens` tokens, but of one example at least.
fn parts<'b>(chosen: &'b [usize], examples: &[Example], max_tokens: usize) -> Vec<&'b [usize]> {
    let (mut parts, mut start, mut tokens) = (vec![], 0, 0);
    for (at, &i) in chosen.iter().enumerate() {
        let length = examples[i].tokens.len();
        if at > start && tokens + length > max_tokens {
            parts.push(&chosen[start..at]);
            (start, tokens) = (at, 0);
        }
        tokens += length;
    }
    if start < chosen.len() {
        parts.push(&chosen[start..]);
    }
    parts
}

/// Deals examples out to `count` shares of about as many tokens, or to as many as there are examples. It does not depend on
/// the number of threads, so that sums over the shares repeat to the last bit.
fn deal(chosen: &[usize], examples: &[Example], count: usize) -> Vec<Vec<usize>> {
    let tokens = |i: usize| examples[i].tokens.len();
    let count = count.clamp(1, chosen.len().max(1));
    let (mut shares, mut sums) = (vec![vec![]; count], vec![0; count]);
    let mut longest_first = chosen.to_vec();
    longest_first.sort_by_key(|&i| std::cmp::Reverse(tokens(i)));
    for i in longest_first {
        let least = (0..count).min_by_key(|&s| sums[s]).unwrap_or(0);
        shares[least].push(i);
        sums[least] += tokens(i);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Base;
    use crate::train::network::{Held, Method};

    fn options() -> TrainerOptions {
        TrainerOptions {
            epochs: 1,
            batch_size: 1,
            max_batch_tokens: 8,
            learning_rate: 1e-3,
            decay: Decay::Constant,
            warmup: 0.0,
            adamw: AdamWOptions::default(),
            max_norm: 0.0,
            smoothing: 0.0,
            class_weights: vec![],
            metric: Metric::Loss,
            eval_every: 0,
            patience: 0,
            checkpoint_every: 0,
            checkpoint: PathBuf::new(),
            fingerprint: String::new(),
            seed: 0,
        }
    }

    /// The base's pass over the texts is most of the work, and no step.
    #[test]
    fn the_time_of_a_head_has_the_bases() {
        let base = Base::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama/base")).unwrap();
        let spent = |method: &Method| {
            let network = Network::new(&base, method, Some(2), &Held::CPU, &mut random(0, "test", 0)).unwrap();
            let examples = [Example { tokens: vec![5, 6], goal: Goal::Class(1) }];
            let History { seconds, cpu_seconds, .. } =
                *Trainer::new(&network, options(), &examples, &[]).unwrap().history();
            (seconds, cpu_seconds)
        };
        let (seconds, cpu_seconds) = spent(&Method::Head);
        assert!(seconds > 0.0);
        assert_eq!(cpu_seconds.is_some_and(|cpu| cpu > 0.0), cfg!(all(target_os = "linux", target_env = "gnu")));
        assert_eq!(spent(&Method::Full), (0.0, None));
    }

    #[test]
    fn a_loss_is_read_from_a_checkpoint_as_it_was_written() {
        let read = |loss: f64| serde_json::from_str::<f64>(&serde_json::to_string(&loss).unwrap()).unwrap();
        let losses = [51.248178375505404, 97.45365320034685, 0.1 + 0.2, 11_000.0 / 7.0];
        assert!(losses.into_iter().chain((1..2000).map(|i| 7.0 / i as f64)).all(|loss| read(kept(loss)) == kept(loss)));
        assert!((kept(losses[0]) - losses[0]).abs() < 1e-9);
    }

    #[test]
    fn parts_hold_what_fits() {
        let examples: Vec<Example> = [3, 4, 9, 1].map(|n| Example { tokens: vec![0; n], goal: Goal::Class(0) }).into();
        assert_eq!(parts(&[0, 1, 2, 3], &examples, 7), [&[0, 1][..], &[2], &[3]]);
        assert_eq!(parts(&[3, 0], &examples, 1), [&[3][..], &[0]]);
        assert!(parts(&[], &examples, 1).is_empty());
    }
    #[test]
    fn shares_are_about_as_long() {
        let examples: Vec<Example> =
            [3, 4, 9, 1, 5].map(|n| Example { tokens: vec![0; n], goal: Goal::Class(0) }).into();
        assert_eq!(deal(&[0, 1, 2, 3, 4], &examples, 2), [vec![2, 0], vec![4, 1, 3]]);
        assert_eq!(deal(&[3, 0], &examples, 5), [[0], [3]]);
        assert_eq!(deal(&[1, 2], &examples, 0), [[2, 1]]);
    }
}
