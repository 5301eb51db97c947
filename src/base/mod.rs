//! The frozen base model: where it comes from, its configuration, weights, tokenizer, chat template and decoder.

mod chat;
mod config;
mod source;
mod tokenizer;
mod weights;

pub use chat::ChatTemplate;
pub use config::{ModelConfig, Projection, TargetModule};
pub use source::{Base, DEFAULT_MODEL, fetch};
pub use tokenizer::Tokenizer;
pub use weights::{RawTensor, Stored, Weights};
