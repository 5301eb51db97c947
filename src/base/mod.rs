//! The frozen base model: where it comes from, its configuration, weights, tokenizer, chat template and decoder.

#[cfg(target_arch = "x86_64")]
#[macro_use]
mod unrolled;

pub mod attention;
pub mod budget;
pub(crate) mod buffer;
mod chat;
mod config;
mod decoder;
pub mod device;
mod family;
mod fetch;
mod flash;
#[cfg(any(feature = "cuda", test))]
mod fused;
mod gguf;
mod head;
pub mod hub;
pub mod int8;
mod jinja;
mod kv;
pub(crate) mod labels;
mod language;
pub mod matmul;
mod paged;
pub mod parallel;
mod plain;
pub mod products;
mod rope;
pub mod simd;
mod source;
#[cfg(test)]
pub mod testing;
pub mod tiled;
#[cfg(target_arch = "x86_64")]
pub mod tiles;
mod tokenizer;
mod weights;

pub use attention::SequenceRows;
pub use chat::ChatTemplate;
pub use config::{ModelConfig, TargetModule};
pub use decoder::{Decoder, DecoderOptions, Delta, Kernels, Norm, Rows};
pub use family::{Activation, Architecture, Family, LM_HEAD, Module, Names, NormKind, NormSite, Projection, Site};
pub use fetch::{fetch, packaged};
pub(crate) use gguf::{Gguf, Meta};
pub use head::Head;
pub use kv::{BLOCK, KvCache};
pub use language::{Language, MAX_NEW_TOKENS, OwnLanguage};
pub use rope::Rope;
pub use source::{Base, DEFAULT_MODEL};
pub use tokenizer::Tokenizer;
pub use weights::{RawTensor, Stored, Weights};
pub(crate) use weights::{hugging_face_name, split_halves, tensors};
