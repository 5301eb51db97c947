//! The engine: a queue of requests, a scheduler that packs them into steps, a sampler. One thread owns the model.

mod engine;
mod model;
mod request;
mod runner;

pub use engine::{Engine, EngineOptions};
pub use model::{Model, Output, Work};
pub use request::{Choice, Event, FinishReason, Generate, Request, Sampling, Task, TokenLogprob, Usage};
pub use runner::Runner;
