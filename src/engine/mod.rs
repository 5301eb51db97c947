//! The engine: a queue of requests, a scheduler that packs them into steps, a sampler. One thread owns the model.

mod blocks;
mod continuation;
mod cost;
mod detokenizer;
mod draw;
mod draws;
#[allow(clippy::module_inception)]
mod engine;
mod grammar;
mod limits;
mod model;
mod queue;
mod recent;
mod reply;
mod request;
mod runner;
mod sampler;
mod scheduler;
mod shares;
mod stepper;
mod stop;
#[cfg(test)]
mod tests;

pub use detokenizer::{Detokenizer, Vocabulary};
pub use draw::{Draw, Edit};
pub use engine::{Engine, EngineOptions, QueueSlot};
pub use grammar::{Constraint, Grammar, Grammars};
pub use model::{Computed, Model, Output, Work};
pub use request::{Choice, Client, Event, FinishReason, Generate, Request, Sampling, Task, TokenLogprob, Usage};
pub use runner::Runner;
pub use stepper::MAX_SCORE_LOGITS;
