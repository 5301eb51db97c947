//! What a sequence draws its tokens by: its parameters, its random numbers, and what it has drawn.

use std::collections::{HashMap, HashSet};

use crate::Result;
use crate::engine::draw::{Draw, Edit, argmax};
use crate::engine::{Sampling, TokenLogprob};

/// SplitMix64 (Steele, Lea and Flood 2014) as a counter: draw `i` is a function of the seed and `i` alone.
#[derive(Debug, Clone)]
struct Rng {
    seed: u64,
    draws: u64,
}

impl Rng {
    fn next(&mut self) -> u64 {
        self.draws += 1;
        let mut z = self.seed.wrapping_add(self.draws.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform below 2^53.
    fn place(&mut self) -> u64 {
        self.next() >> 11
    }
}

/// The state of one sequence's sampling: what it has drawn, and its own random numbers.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: Rng,
    /// Distinct tokens of prompt and text; kept only for a repetition penalty.
    seen: HashSet<u32>,
    /// How often each token was drawn; kept only for a frequency or presence penalty.
    drawn: HashMap<u32, u32>,
    /// Kept for its memory.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// `seed` takes the place of `sampling.seed`.
    pub fn new(sampling: Sampling, prompt: &[u32], seed: u64) -> Self {
        let seen = if sampling.repetition_penalty == 1.0 { HashSet::new() } else { prompt.iter().copied().collect() };
        let rng = Rng { seed, draws: 0 };
        Sampler { sampling, rng, seen, drawn: HashMap::new(), candidates: vec![] }
    }

    /// Draws a token from `logits`, `[vocab_size]`, which it overwrites; none of `refused`.
    ///
    /// Errors: `Internal` if a logit is NaN or the largest is not finite.
    pub fn sample(&mut self, logits: &mut [f32], refused: &[u32]) -> Result<u32> {
        let token = self.draw(refused).token(logits, &mut self.candidates)?;
        self.take(token);
        Ok(token)
    }

    /// The next draw, for whoever has the logits; [`Sampler::take`] has to follow.
    pub fn draw(&mut self, refused: &[u32]) -> Draw {
        let s = &self.sampling;
        Draw {
            edits: self.edits(refused),
            repetition_penalty: s.repetition_penalty,
            temperature: s.temperature,
            min_p: s.min_p,
            top_k: s.top_k,
            top_p: s.top_p,
            typical_p: s.typical_p,
            place: if s.temperature == 0.0 { 0 } else { self.rng.place() },
        }
    }

    /// Takes note of a token that was drawn.
    pub fn take(&mut self, token: u32) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
        if self.sampling.frequency_penalty != 0.0 || self.sampling.presence_penalty != 0.0 {
            *self.drawn.entry(token).or_default() += 1;
        }
    }

    /// A change for each token that is refused, has a bias, was seen or was drawn.
    fn edits(&self, refused: &[u32]) -> Vec<Edit> {
        let s = &self.sampling;
        let edit = |&token: &u32, seen: bool| {
            // Most maps have nothing in them.
            let bias = if s.logit_bias.is_empty() { None } else { s.logit_bias.get(&token) };
            let bias = if refused.contains(&token) { Some(&f32::NEG_INFINITY) } else { bias };
            let count = if self.drawn.is_empty() { None } else { self.drawn.get(&token) };
            let penalty = count.map_or(0.0, |&count| count as f32 * s.frequency_penalty + s.presence_penalty);
            Edit { token, bias: bias.copied().unwrap_or(0.0), seen, penalty }
        };
        let seen = self.seen.iter().map(|token| edit(token, true));
        let drawn = self.drawn.keys().filter(|token| !self.seen.contains(token));
        let is_new = |token: &&u32| !self.seen.contains(token) && !self.drawn.contains_key(token);
        let biased = s.logit_bias.keys().filter(is_new);
        let refused = refused.iter().filter(is_new).filter(|token| !s.logit_bias.contains_key(token));
        seen.chain(drawn.chain(biased).chain(refused).map(|token| edit(token, false))).collect()
    }
}

/// Logarithm of the sum of exponentials: subtracted from a logit it gives the log-probability.
///
/// Errors: `Internal` if a logit is NaN or the largest is not finite.
fn log_sum_exp(logits: &[f32]) -> Result<f32> {
    let max = logits[argmax(logits)? as usize];
    let sum: f64 = logits.iter().map(|l| f64::from((l - max).exp())).sum();
    Ok((f64::from(max) + sum.ln()) as f32)
}

/// The log-probability of a token by the logits of its place, and those of the `top` likeliest.
///
/// Errors: as [`log_sum_exp`].
pub fn logprob(token: u32, logits: &[f32], top: usize) -> Result<TokenLogprob> {
    let lse = log_sum_exp(logits)?;
    let top = likeliest(logits, top).into_iter().map(|(token, logit)| (token, logit - lse)).collect();
    Ok(TokenLogprob { token, logprob: logits[token as usize] - lse, top })
}

/// The `count` likeliest tokens and their logits, likeliest first, the lower token first among equals.
fn likeliest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (&logit, token) in logits.iter().zip(0..) {
        if top.len() < count || top.last().is_some_and(|last| logit > last.1) {
            let at = top.partition_point(|other| other.1 >= logit);
            top.insert(at, (token, logit));
            top.truncate(count);
        }
    }
    top
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Probabilities after all steps, by full sorts in f64, straight from the definitions.
    fn reference(s: &Sampling, prompt: &[u32], drawn: &[u32], logits: &[f32]) -> Vec<f64> {
        let mut l: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        for (l, token) in l.iter_mut().zip(0u32..) {
            *l += f64::from(s.logit_bias.get(&token).copied().unwrap_or(0.0));
            if prompt.contains(&token) || drawn.contains(&token) {
                let p = f64::from(s.repetition_penalty);
                *l = if *l > 0.0 { *l / p } else { *l * p };
            }
            let count = drawn.iter().filter(|&&t| t == token).count();
            *l -= count as f64 * f64::from(s.frequency_penalty);
            *l -= if count > 0 { f64::from(s.presence_penalty) } else { 0.0 };
        }
        let softmax = |l: &[f64]| {
            let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = l.iter().map(|l| (l - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|e| e / sum).collect::<Vec<_>>()
        };
        let sorted = |l: &[f64]| {
            let mut order: Vec<usize> = (0..l.len()).collect();
            order.sort_by(|&a, &b| l[b].total_cmp(&l[a]));
            order
        };
        if s.temperature == 0.0 {
            let best = sorted(&l)[0];
            return (0..l.len()).map(|i| if i == best { 1.0 } else { 0.0 }).collect();
        }
        for l in &mut l {
            *l /= f64::from(s.temperature);
        }
        let p = softmax(&l);
        let max = p.iter().copied().fold(0.0, f64::max);
        for i in 0..l.len() {
            if p[i] < f64::from(s.min_p) * max {
                l[i] = f64::NEG_INFINITY;
            }
        }
        if s.top_k > 0 {
            for &i in sorted(&l).iter().skip(s.top_k) {
                l[i] = f64::NEG_INFINITY;
            }
        }
        let p = softmax(&l);
        let mut before = 0.0;
        for (rank, &i) in sorted(&l).iter().enumerate() {
            if rank > 0 && before >= f64::from(s.top_p) {
                l[i] = f64::NEG_INFINITY;
            }
            before += p[i];
        }
        if s.typical_p < 1.0 {
            let p = softmax(&l);
            let entropy: f64 = p.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
            let distances: Vec<f64> = p.iter().map(|p| (-p.ln() - entropy).abs()).collect();
            let mut order: Vec<usize> = (0..l.len()).collect();
            order.sort_by(|&a, &b| distances[a].total_cmp(&distances[b]));
            let mut before = 0.0;
            for (rank, &i) in order.iter().enumerate() {
                if rank > 0 && before >= f64::from(s.typical_p) {
                    l[i] = f64::NEG_INFINITY;
                }
                before += p[i];
            }
        }
        softmax(&l)
    }

    fn sampling() -> impl Strategy<Value = Sampling> {
        (
            prop_oneof![Just(0.0f32), 0.1f32..2.0],
            prop_oneof![Just(0usize), 1usize..30],
            prop_oneof![Just(1.0f32), 0.0f32..1.0],
            prop_oneof![Just(0.0f32), 0.0f32..1.0],
            prop_oneof![Just(1.0f32), 0.5f32..2.0],
            -2.0f32..2.0,
            -2.0f32..2.0,
            prop::collection::hash_map(0u32..200, -5.0f32..5.0, 0..3),
            prop_oneof![Just(1.0f32), 0.0f32..1.0],
        )
            .prop_map(
                |(temperature, top_k, top_p, min_p, repetition_penalty, frequency, presence, logit_bias, typical_p)| {
                    Sampling {
                        temperature,
                        top_k,
                        top_p,
                        typical_p,
                        min_p,
                        repetition_penalty,
                        frequency_penalty: frequency,
                        presence_penalty: presence,
                        logit_bias,
                        seed: None,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn the_token_is_the_one_the_definitions_give(
            sampling in sampling(),
            logits in prop::collection::vec(-8.0f32..8.0, 1..200),
            prompt in prop::collection::vec(0u32..200, 0..10),
            seed: u64,
        ) {
            let mut sampler = Sampler::new(sampling.clone(), &prompt, seed);
            let mut drawn = vec![];
            for _ in 0..5 {
                let p = reference(&sampling, &prompt, &drawn, &logits);
                let token = sampler.sample(&mut logits.clone(), &[]).unwrap();
                // A token at the edge of a threshold may fall to either side by rounding; such edges are rare enough
                // among random numbers never to be met.
                prop_assert!(p[token as usize] > 0.0, "drew {token}, of probability 0");
                drawn.push(token);
            }
            let again: Vec<u32> = {
                let mut sampler = Sampler::new(sampling, &prompt, seed);
                (0..5).map(|_| sampler.sample(&mut logits.clone(), &[]).unwrap()).collect()
            };
            prop_assert_eq!(again, drawn);
        }

        #[test]
        fn likeliest_is_the_head_of_a_stable_sort(logits in prop::collection::vec((-5i8..5).prop_map(f32::from), 1..60), n in 0usize..21) {
            let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
            sorted.truncate(n);
            prop_assert_eq!(likeliest(&logits, n), sorted);
        }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_their_probabilities_say() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let plain = Sampling::default();
        for s in [
            plain.clone(),
            Sampling { temperature: 0.7, ..plain.clone() },
            Sampling { top_k: 5, ..plain.clone() },
            Sampling { top_p: 0.3, ..plain.clone() },
            Sampling { top_p: 0.95, ..plain.clone() },
            Sampling { min_p: 0.5, ..plain.clone() },
            Sampling { typical_p: 0.6, ..plain.clone() },
            Sampling { typical_p: 0.95, top_p: 0.9, top_k: 50, temperature: 0.8, ..plain.clone() },
            Sampling { min_p: 0.1, top_k: 40, top_p: 0.8, temperature: 1.3, ..plain },
        ] {
            let p = reference(&s, &[], &[], &logits);
            let draws = 20_000;
            let mut counts = vec![0u32; logits.len()];
            let mut sampler = Sampler::new(s.clone(), &[], 7);
            for _ in 0..draws {
                counts[sampler.sample(&mut logits.clone(), &[]).unwrap() as usize] += 1;
            }
            let (mut chi2, mut cells) = (0.0, 0.0);
            for (&p, &count) in p.iter().zip(&counts) {
                let expected = p * f64::from(draws);
                if p == 0.0 {
                    assert_eq!(count, 0, "{s:?}");
                } else {
                    chi2 += (f64::from(count) - expected).powi(2) / expected;
                    cells += 1.0;
                }
            }
            // Mean `cells - 1`, variance twice that: five standard deviations.
            let freedom: f64 = cells - 1.0;
            assert!(chi2 < freedom + 5.0 * (2.0 * freedom).sqrt() + 1e-9, "chi² {chi2} of {freedom}: {s:?}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, &[], 0);
        assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0, 2.0], &[]).unwrap(), 1);
    }

    #[test]
    fn a_bias_counts_before_the_penalties() {
        // Token 0: (1 + 3) / 2 = 2 < 3. The penalty first would give 1 / 2 + 3 = 3.5 > 3.
        let sampling = Sampling {
            temperature: 0.0,
            repetition_penalty: 2.0,
            logit_bias: [(0, 3.0)].into(),
            ..Sampling::default()
        };
        assert_eq!(Sampler::new(sampling, &[0], 0).sample(&mut [1.0, 3.0], &[]).unwrap(), 1);
    }

    #[test]
    fn the_lower_of_tokens_that_tie_with_the_last_stay() {
        for cut in [Sampling { top_k: 3, ..Sampling::default() }, Sampling { top_p: 0.4, ..Sampling::default() }] {
            let mut sampler = Sampler::new(cut, &[], 11);
            // Each has a probability of 0.2, and f32's 0.4 is a little more than two of them.
            let drawn: HashSet<u32> = (0..500).map(|_| sampler.sample(&mut [0.0; 5], &[]).unwrap()).collect();
            assert!(drawn.iter().all(|&token| token < 3), "{drawn:?}");
        }
    }

    /// The likeliest token is not drawn where it surprises too little.
    #[test]
    fn what_is_typical_is_not_the_likeliest() {
        // Of 0.4, 0.3, 0.2 and 0.1 the expected surprise is 1.28, and their own 0.92, 1.20, 1.61 and 2.30.
        let mut sampler = Sampler::new(Sampling { typical_p: 0.25, ..Sampling::default() }, &[], 5);
        let mut logits = [0.4f32, 0.3, 0.2, 0.1, 0.0].map(f32::ln);
        assert_eq!(sampler.sample(&mut logits, &[]).unwrap(), 1);
    }

    #[test]
    fn logits_that_are_not_numbers_are_errors() {
        let mut sampler = Sampler::new(Sampling::default(), &[], 0);
        for logits in [vec![0.0, f32::NAN, 1.0], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 3], vec![]] {
            assert!(sampler.sample(&mut logits.clone(), &[]).is_err(), "{logits:?}");
            assert!(log_sum_exp(&logits).is_err(), "{logits:?}");
        }
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -3.0], &[]).unwrap(), 1);
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        let mut sampler = Sampler::new(Sampling { temperature: 1e-40, ..Sampling::default() }, &[], 3);
        assert_eq!(sampler.sample(&mut [1.0, 1.5, 1.25], &[]).unwrap(), 1);
    }

    #[test]
    fn log_probabilities_add_up_to_one() {
        let logits = [0.5, -2.0, 30.0, 29.0];
        let lse = log_sum_exp(&logits).unwrap();
        let sum: f32 = logits.iter().map(|l| (l - lse).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    }
}
