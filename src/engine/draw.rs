//! One draw of a token from logits: the definition, and what a GPU's kernel is measured by.

use std::cmp::Ordering;

use crate::{Error, Result};

/// How a token is drawn, random number included.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// At most one a token. Those of tokens that there are no logits of have no effect.
    pub edits: Vec<Edit>,
    pub repetition_penalty: f32,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    pub min_p: f32,
    /// 0 keeps all.
    pub top_k: usize,
    pub top_p: f32,
    pub typical_p: f32,
    /// Of 2^53: where among the tokens' probabilities, one after the other, the one drawn lies.
    pub place: u64,
}

/// By the model's probabilities alone, the first token of those that have one.
impl Default for Draw {
    fn default() -> Self {
        Draw {
            edits: vec![],
            repetition_penalty: 1.0,
            temperature: 1.0,
            min_p: 0.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            place: 0,
        }
    }
}

/// A change of a token's logit, made in this order.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Edit {
    pub token: u32,
    /// Is added.
    pub bias: f32,
    /// Whether the repetition penalty is for it.
    pub seen: bool,
    /// Is subtracted.
    pub penalty: f32,
}

impl Draw {
    /// Draws a token from `logits`, `[vocab_size]`, which it overwrites. `candidates` is memory, kept from draw to draw.
    ///
    /// Errors: `Internal` if a logit is NaN or the largest is not finite.
    pub fn token(&self, logits: &mut [f32], candidates: &mut Vec<(f32, u32)>) -> Result<u32> {
        self.adjust(logits);
        let best = argmax(logits)?;
        Ok(if self.temperature == 0.0 { best } else { self.choose(logits, logits[best as usize], candidates) })
    }

    /// Bias, then the repetition penalty, then the other two: vLLM's order, which matters because the repetition penalty
    /// scales a logit.
    fn adjust(&self, logits: &mut [f32]) {
        for &Edit { token, bias, seen, penalty } in &self.edits {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
                if seen {
                    let p = self.repetition_penalty;
                    *logit = if *logit > 0.0 { *logit / p } else { *logit * p };
                }
                *logit -= penalty;
            }
        }
    }

    /// What `logit - max` over the temperature is at least of a token that min-p keeps: the likeliest token has 0.
    pub fn floor(&self) -> f32 {
        if self.min_p > 0.0 { self.min_p.ln() } else { f32::NEG_INFINITY }
    }

    fn uniform(&self) -> f64 {
        self.place as f64 / (1u64 << 53) as f64
    }

    /// Temperature, min-p, top-k, top-p, typical-p, then a token by its probability among those left, which are in the order
    /// of their numbers. `max` is the largest logit. Where tokens are equally likely at the edge of top-k, top-p or typical-p,
    /// the lower ones stay, so that the same logits always leave the same tokens; vLLM keeps all that tie with the k-th.
    fn choose(&self, logits: &mut [f32], max: f32, candidates: &mut Vec<(f32, u32)>) -> u32 {
        for logit in logits.iter_mut() {
            *logit = (*logit - max) / self.temperature;
        }
        // A probability is `exp(logit)` over a common sum.
        let floor = self.floor();
        let all_k = self.top_k == 0 || self.top_k >= logits.len();
        if all_k && self.top_p >= 1.0 && self.typical_p >= 1.0 {
            let mut sum = 0.0;
            for logit in logits.iter_mut() {
                *logit = if *logit >= floor { logit.exp() } else { 0.0 };
                sum += f64::from(*logit);
            }
            return pick(self.uniform() * sum, logits.iter().copied().zip(0..));
        }
        candidates.clear();
        candidates.extend(logits.iter().copied().zip(0..).filter(|(logit, _)| *logit >= floor));
        if !all_k && self.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.top_k - 1, likelier);
            candidates.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            keep_top_p(candidates, self.top_p);
        }
        if self.typical_p < 1.0 {
            keep_typical(candidates, self.typical_p);
        }
        candidates.sort_unstable_by_key(|&(_, token)| token);
        let mut sum = 0.0;
        for (logit, _) in candidates.iter_mut() {
            *logit = logit.exp();
            sum += f64::from(*logit);
        }
        pick(self.uniform() * sum, candidates.iter().copied())
    }
}

/// Likelier first, then the lower token. Logits must not be NaN.
fn likelier(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// Keeps the likeliest tokens up to the one with which their probabilities reach `top_p`, at least one.
fn keep_top_p(candidates: &mut Vec<(f32, u32)>, top_p: f32) {
    let sum: f64 = candidates.iter().map(|(logit, _)| f64::from(logit.exp())).sum();
    let wanted = f64::from(top_p) * sum;
    // Few tokens usually do, so sort few, and more only if those are not enough.
    let mut sorted = 64;
    loop {
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted - 1, likelier);
        }
        let end = sorted.min(candidates.len());
        candidates[..end].sort_unstable_by(likelier);
        let mut reached = 0.0;
        for i in 0..end {
            reached += f64::from(candidates[i].0.exp());
            if reached >= wanted {
                candidates.truncate(i + 1);
                return;
            }
        }
        if end == candidates.len() {
            return;
        }
        sorted *= 8;
    }
}

/// Keeps the most typical tokens up to the one with which their probabilities reach `mass`, at least one.
fn keep_typical(candidates: &mut Vec<(f32, u32)>, mass: f32) {
    let weight = |logit: f32| f64::from(logit.exp());
    let sum: f64 = candidates.iter().map(|(logit, _)| weight(*logit)).sum();
    let surprise = |logit: f32| sum.ln() - f64::from(logit);
    // What is masked has no probability, and an infinite surprise.
    let entropy: f64 = candidates.iter().filter(|c| c.0.is_finite()).map(|c| weight(c.0) / sum * surprise(c.0)).sum();
    let distance = |c: &(f32, u32)| (surprise(c.0) - entropy).abs();
    candidates.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.1.cmp(&b.1)));
    let (wanted, mut reached) = (f64::from(mass) * sum, 0.0);
    let last = candidates.iter().position(|(logit, _)| {
        reached += weight(*logit);
        reached >= wanted
    });
    candidates.truncate(last.map_or(candidates.len(), |last| last + 1));
}

/// The first token at which the weights add up to more than `at`.
fn pick(at: f64, weights: impl Iterator<Item = (f32, u32)>) -> u32 {
    let (mut reached, mut last) = (0.0, 0);
    for (weight, token) in weights {
        if weight > 0.0 {
            reached += f64::from(weight);
            last = token;
            if reached > at {
                break;
            }
        }
    }
    last
}

/// The lowest of the likeliest tokens.
pub(super) fn argmax(logits: &[f32]) -> Result<u32> {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > max || logit.is_nan() {
            if logit.is_nan() {
                return Err(Error::internal(format!("the model's logit of token {i} is NaN")));
            }
            (best, max) = (i, logit);
        }
    }
    if max.is_finite() {
        Ok(best as u32)
    } else {
        Err(Error::internal(format!("the model's largest logit is {max}, not finite")))
    }
}
