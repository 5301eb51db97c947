//! What the engine asks of a model.

use std::sync::Arc;

use crate::engine::Draw;
use crate::lora::PackedAdapter;
use crate::{Error, Result};

/// What a [`Work`] wants back from a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Nothing: a prefill chunk that is not the last.
    None,
    /// Logits over the adapter's vocabulary of the last row: `[vocab_size]`.
    LastLogits,
    /// Logits over the adapter's vocabulary of the last `n` rows: `[n * vocab_size]`, row-major.
    Logits(usize),
    /// Logits of the adapter's classification head, or of the base's own, for the sequence up to the last row: `[labels]`.
    Head,
}

/// What a step made of a [`Work`].
#[derive(Debug, Clone, PartialEq)]
pub enum Computed {
    Numbers(Vec<f32>),
    /// `None` where a logit is NaN or the largest is not finite.
    Token(Option<u32>),
}

impl Computed {
    /// Errors: `Internal` if it is a token.
    pub fn into_numbers(self) -> Result<Vec<f32>> {
        match self {
            Computed::Numbers(numbers) => Ok(numbers),
            Computed::Token(token) => {
                Err(Error::internal(format!("the model drew token {token:?}, which nobody asked for")))
            }
        }
    }
}

/// The part of one sequence that a step computes: `tokens` at positions `start..start + tokens.len()`.
#[derive(Debug, Clone)]
pub struct Work {
    pub tokens: Vec<u32>,
    /// Position of the first of `tokens`. Keys and values of all earlier positions are in `blocks` already.
    pub start: usize,
    /// The sequence's block table. Position `p` lives in slot `p % block_size` of `blocks[p / block_size]`.
    /// It covers at least `start + tokens.len()` positions.
    pub blocks: Vec<u32>,
    /// `None` is the base.
    pub adapter: Option<Arc<PackedAdapter>>,
    pub output: Output,
}

/// A model that computes one step for any mix of sequences, adapters, prefill chunks and decode tokens.
///
/// The result for one [`Work`] must not depend on what else is in the step, nor on how a prompt was cut into chunks.
pub trait Model: Send {
    /// Tokens of the base, and of adapters that bring none of their own.
    fn vocab_size(&self) -> usize;
    /// Classes of the base's own head; 0 where it has none.
    fn classes(&self) -> usize;
    /// Whether the base predicts tokens.
    fn predicts(&self) -> bool;
    /// Whether a sequence has to be computed in one step, its tokens depending on later ones.
    fn is_encoder(&self) -> bool {
        false
    }
    /// Longest sequence in tokens.
    fn context(&self) -> usize;
    /// Tokens a block of the KV cache holds.
    fn block_size(&self) -> usize;
    /// Blocks in the KV cache.
    fn blocks(&self) -> usize;
    /// Computes a step and returns one vector per work, in order; its length is as [`Output`] says.
    fn step(&mut self, work: &[Work]) -> Result<Vec<Vec<f32>>>;
    /// Whether the model draws tokens itself, so that logits need not leave where they are.
    fn draws(&self) -> bool {
        false
    }
    /// As [`Model::step`], but with a token in place of the logits where there is a draw: only where the model draws, for
    /// [`Output::LastLogits`], and by no typical-p.
    fn step_and_draw(&mut self, work: &[Work], draws: &[Option<Draw>]) -> Result<Vec<Computed>> {
        debug_assert!(draws.iter().all(Option::is_none));
        Ok(self.step(work)?.into_iter().map(Computed::Numbers).collect())
    }
}
