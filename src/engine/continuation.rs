//! One choice of a generation: from logits to tokens and text, until it ends.

use std::sync::Arc;

use crate::engine::detokenizer::{Detokenizer, Vocabulary};
use crate::engine::grammar::Matcher;
use crate::engine::sampler::{Sampler, logprob};
use crate::engine::stop::StopMatcher;
use crate::engine::{Choice, Computed, Draw, FinishReason, Generate, Grammar, TokenLogprob};
use crate::{Error, Result};

/// Everything of a choice that goes on from step to step, but its tokens. It does not change when the sequence is
/// preempted and computed again, so neither does what comes out.
#[derive(Debug)]
pub struct Continuation {
    index: usize,
    generate: Arc<Generate>,
    /// Where the text is in its grammar; there from the first token on, for copying the grammar's state takes a while.
    matcher: Option<Matcher>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Tokens drawn, an end token included.
    drawn: usize,
}

impl Continuation {
    /// Choice `index` draws with `seed + index`.
    pub fn new(index: usize, generate: Arc<Generate>, prompt: &[u32], seed: u64) -> Self {
        let seed = seed.wrapping_add(index as u64);
        Continuation {
            index,
            matcher: None,
            sampler: Sampler::new(generate.sampling.clone(), prompt, seed),
            detokenizer: Detokenizer::default(),
            stop: StopMatcher::new(&generate.stop, generate.include_stop),
            generate,
            drawn: 0,
        }
    }

    /// The next draw, where a model makes it as well (see [`Model::step_and_draw`]): the text has no grammar, and nobody asks
    /// for log-probabilities. Its token has to go to [`Continuation::advance`].
    ///
    /// [`Model::step_and_draw`]: crate::engine::Model::step_and_draw
    pub fn draw(&mut self, eos_tokens: &[u32]) -> Option<Draw> {
        let Generate { grammar, logprobs, sampling, .. } = &*self.generate;
        let simple = grammar.is_none() && logprobs.is_none() && sampling.typical_p >= 1.0;
        if !simple {
            return None;
        }
        let refused = self.early_ends(eos_tokens);
        Some(self.sampler.draw(&refused))
    }

    /// The tokens that would end the text before it may end, each once.
    fn early_ends(&self, eos_tokens: &[u32]) -> Vec<u32> {
        let Generate { min_tokens, ignore_eos, stop_tokens, .. } = &*self.generate;
        if self.drawn >= *min_tokens {
            return vec![];
        }
        let eos_tokens = if *ignore_eos { &[] } else { eos_tokens };
        let mut ends = [eos_tokens, stop_tokens].concat();
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// Draws a token from the model's logits, `[vocab_size]`, or takes the one that it drew. `room` is how many tokens the
    /// sequence can grow by, this one included. Where the text ends without a token because its grammar lets nothing follow,
    /// or with an end or stop token, the choice has none.
    ///
    /// Errors: `Internal` if the logits are not numbers; `BadRequest` if the grammar asks for what the vocabulary cannot
    /// spell, or has become too complex.
    pub fn advance(
        &mut self,
        computed: Computed,
        room: usize,
        vocabulary: &dyn Vocabulary,
        eos_tokens: &[u32],
    ) -> Result<Choice> {
        let mut choice = Choice { index: self.index, ..Choice::default() };
        let (token, raw) = match computed {
            Computed::Token(token) => {
                let what = "a logit of the model is NaN, or the largest is not finite";
                let token = token.ok_or_else(|| Error::internal(what))?;
                self.sampler.take(token);
                (Some(token), None)
            }
            Computed::Numbers(mut logits) => {
                let raw = self.generate.logprobs.map(|_| logits.clone());
                (self.sample(&mut logits, eos_tokens)?, raw)
            }
        };
        self.drawn += 1;
        let Some(token) = token else {
            self.finish(FinishReason::Stop, &mut choice);
            return Ok(choice);
        };
        let end = !self.generate.ignore_eos && eos_tokens.contains(&token);
        if end || self.generate.stop_tokens.contains(&token) {
            if !end {
                choice.matched_stop = Some(token.to_string());
            }
            choice.end = raw.map(|raw| self.logprob(token, &raw)).transpose()?;
            self.finish(FinishReason::Stop, &mut choice);
            return Ok(choice);
        }
        choice.tokens.push(token);
        if let Some(raw) = raw {
            choice.logprobs.push(self.logprob(token, &raw)?);
        }
        let complete = self.matcher.as_mut().map(|matcher| matcher.take(token)).transpose()?.unwrap_or(false);
        if !vocabulary.is_special(token) {
            let mut piece = String::new();
            self.detokenizer.push(vocabulary.token_bytes(token), &mut piece);
            if self.drawn > self.generate.min_tokens {
                choice.matched_stop = self.stop.push(&piece, &mut choice.text);
            } else {
                self.stop.pass(&piece, &mut choice.text);
            }
        }
        if choice.matched_stop.is_some() {
            choice.finish = Some(FinishReason::Stop);
        } else if complete {
            self.finish(FinishReason::Stop, &mut choice);
        } else if self.drawn >= self.generate.max_tokens || room <= 1 {
            self.finish(FinishReason::Length, &mut choice);
        }
        Ok(choice)
    }

    /// Overwrites `logits`. `None` where the grammar lets nothing follow.
    fn sample(&mut self, logits: &mut [f32], eos_tokens: &[u32]) -> Result<Option<u32>> {
        if self.drawn == 0 {
            self.matcher = self.generate.grammar.as_ref().map(Grammar::matcher);
        }
        let mut refused = self.early_ends(eos_tokens);
        if let Some(matcher) = &mut self.matcher {
            if self.generate.ignore_eos {
                refused.extend(eos_tokens);
            }
            if !matcher.mask(logits, &refused)? {
                return Ok(None);
            }
        }
        self.sampler.sample(logits, &refused).map(Some)
    }

    /// Of the logits as the model gave them, as vLLM does: neither penalties nor temperature are in, nor the grammar's mask. So
    /// they tell what the model would have liked, and all are finite.
    fn logprob(&self, token: u32, raw: &[f32]) -> Result<TokenLogprob> {
        logprob(token, raw, self.generate.logprobs.unwrap_or(0))
    }

    /// Lets out the text that waited.
    fn finish(&mut self, reason: FinishReason, choice: &mut Choice) {
        choice.finish = Some(reason);
        let mut piece = String::new();
        self.detokenizer.finish(&mut piece);
        if let Some(stop) = self.stop.push(&piece, &mut choice.text) {
            choice.finish = Some(FinishReason::Stop);
            choice.matched_stop = Some(stop);
        }
        self.stop.finish(&mut choice.text);
    }
}
