//! The handle that the server holds, and the thread behind it that steps the model.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::Result;
use crate::base::Tokenizer;
use crate::engine::{Event, Model, Request};
use crate::metrics::Metrics;

#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Sequences in a step at most.
    pub max_sequences: usize,
    /// Tokens in a step at most, prefill chunks and decode tokens together.
    pub max_batch_tokens: usize,
    /// Requests that wait at most; one more is refused with [`crate::ErrorKind::QueueFull`].
    pub max_queue: usize,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
}

/// Cheap to clone. The engine stops when `shutdown` is called or the last handle is dropped.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    pub fn start(
        _model: Box<dyn Model>,
        _tokenizer: Arc<Tokenizer>,
        _options: EngineOptions,
        _metrics: Arc<Metrics>,
    ) -> Result<Self> {
        todo!()
    }
    /// Queues a request. Dropping the receiver cancels it at the next step.
    ///
    /// Errors: `BadRequest` for an empty prompt, one longer than the context or than the KV cache holds, values out of
    /// range; `QueueFull`; `Unavailable` while draining.
    pub fn submit(&self, _request: Request) -> Result<UnboundedReceiver<Event>> {
        todo!()
    }
    /// Requests that wait and sequences that run.
    pub fn load(&self) -> (usize, usize) {
        todo!()
    }
    /// Refuses new requests, finishes those in flight, then returns.
    pub async fn drain(&self) {
        todo!()
    }
}
