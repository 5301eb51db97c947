//! loramux serves one frozen base model with many LoRA adapters beside it.
//!
//! The layers, each knowing only the ones below it:
//!
//! - [`cli`]: the program: options, one-shot commands, the load benchmark
//! - [`hosting`]: what hosting costs, measured on servers of their own processes
//! - [`server`]: HTTP dialects into one internal request, events back out
//! - [`engine`]: scheduler, paged KV cache blocks, sampler; one thread steps the model
//! - [`adapter`]: PEFT files to validated adapters, the registry of them, the store on disk
//! - [`lora`]: the batched low-rank delta for rows grouped by adapter
//! - [`train`]: makes adapters and fine-tuned models of a base; beside the layers that serve
//! - [`hosting`]: the cost of hosting and of training, measured; beside the layers that serve
//! - [`memory`]: what is kept of freed memory
//! - `output`: what the programs print
//! - [`base`]: configuration, weights, tokenizer, chat template and the decoder
//! - `cuda`: kernels of our own for NVIDIA GPUs, with the feature of that name

pub mod adapter;
pub mod base;
pub mod cli;
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))]
mod cuda;
pub mod engine;
pub mod error;
pub mod hosting;
mod large_pages;
pub mod lora;
pub mod memory;
pub mod metrics;
mod output;
pub mod server;
mod signals;
pub mod train;

pub use error::{Error, ErrorKind, Result};
