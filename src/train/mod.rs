//! The trainer: adapters, partial and full fine-tunes of a base, from real data.
//!
//! - [`table`], [`examples`]: files to records to sequences with what is to be learned from them
//! - [`pretrain`]: a new base with a tokenizer made from the data
//! - [`network`]: the base with what is trained in it, made of a [`stack`] of [`layer`]s of the differentiable
//!   operations in [`ops`]
//! - [`trainer`]: the loop, with [`optimizer`], [`schedule`], [`metrics`] and [`checkpoint`]
//! - [`memory`]: what the loop frees is kept for its next step
//! - [`export`]: a trained network to a directory that PEFT or transformers opens
//! - [`push`]: a finished adapter to a running server
//! - [`command`]: the `loramux-train` program

mod args;
mod card;
mod checkpoint;
pub mod command;
mod examples;
mod export;
mod gradients;
mod layer;
mod linear;
mod metrics;
mod network;
mod ops;
mod optimizer;
mod parquet;
mod pretrain;
mod push;
mod schedule;
mod stack;
mod stopwatch;
pub(crate) mod table;
mod trainer;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

pub use examples::{Example, Goal};
pub(crate) use export::write_model;
pub use network::{Batch, Held, LoraOptions, Method, Multiplied, Network, Passed, Purpose};
pub use ops::Targets;
pub(crate) use trainer::{Account, Evaluation};
#[cfg(test)]
pub(crate) use {metrics::Confusion, trainer::History};

/// Random numbers for one purpose and one of its turns: a resumed run draws what an unbroken one does.
pub fn random(seed: u64, purpose: &str, turn: usize) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update((turn as u64).to_le_bytes());
    hash.update(purpose);
    ChaCha8Rng::from_seed(hash.finalize().into())
}
