//! LoRA adapters: PEFT files read and validated, the registry of them, and the store on disk.

mod adapter;
mod registry;

pub use adapter::{Adapter, Generation, Head, LoraPair};
pub use registry::{AdapterInfo, Condition, Published, Registry, RegistryOptions, Source, Tier, Upload};
