//! Weights by their Hugging Face names, from safetensors or GGUF, memory-mapped.

use std::borrow::Cow;

use crate::Result;

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    F32,
    F16,
    Bf16,
    /// A GGUF block format, by candle's name for it.
    Ggml(candle_core::quantized::GgmlDType),
}

/// A tensor as it lies in the file.
pub struct RawTensor<'a> {
    /// Row-major, outermost first: `[out_features, in_features]` for a linear layer.
    pub shape: Vec<usize>,
    pub stored: Stored,
    /// Little-endian; borrowed from the memory map unless rows had to be put in another order.
    pub bytes: Cow<'a, [u8]>,
}

impl RawTensor<'_> {
    /// All numbers as f32, row-major.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        todo!()
    }
}

/// A model's tensors by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
/// For a `llama` GGUF the rows of q and k are put back into Hugging Face's order.
pub struct Weights {}

impl Weights {
    pub fn names(&self) -> Vec<String> {
        todo!()
    }
    pub fn contains(&self, _name: &str) -> bool {
        todo!()
    }
    /// Errors name the tensor.
    pub fn get(&self, _name: &str) -> Result<RawTensor<'_>> {
        todo!()
    }
}
