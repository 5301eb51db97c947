//! LoRA adapters: PEFT files read and validated, the registry of them, the store on disk, and places elsewhere.
//!
//! Owns everything between bytes from users and an [`Adapter`] whose every number is known to fit the base. Never runs
//! a model.

// The layer is named after what it is about.
#[allow(clippy::module_inception)]
mod adapter;
mod archive;
mod blend;
mod cache;
mod config;
mod connector;
mod files;
mod generation;
mod gguf;
mod inspection;
mod name;
mod peft;
mod places;
mod registry;
mod remote;
mod repositories;
mod store;
mod tensors;
#[cfg(test)]
pub mod testing;
mod texts;
mod upload;

pub use adapter::{Adapter, Generation, LoraPair, OwnNorm, OwnRows, TableChange};
pub use blend::{Blend, Merge};
pub use config::Modules;
pub use files::{adapter_files, is_adapter, kept_name};
pub use generation::generation_of;
pub(crate) use generation::hex;
pub use inspection::{Inspection, TensorSummary, inspect};
pub use name::{BASE_NAME, OWNER, check_name, check_tenant, check_whole_name};
pub use peft::{Loaded, Summary, language, load};
pub use registry::{AdapterInfo, Condition, Published, Registry, RegistryOptions, Source, Tier};
pub use remote::Remote;
pub use upload::Upload;
