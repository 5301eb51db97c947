//! Names to generations: which adapters exist, which are in memory, which are in use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use serde::Serialize;

use crate::Result;
use crate::adapter::Generation;
use crate::base::ModelConfig;
use crate::lora::PackedAdapter;
use crate::metrics::Metrics;

pub struct RegistryOptions {
    pub config: ModelConfig,
    /// The base's id, to tell an adapter for another base by its `base_model_name_or_path` in messages.
    pub base: String,
    pub device: Device,
    /// Folders of adapters, one folder each, only read. An earlier one wins a name.
    pub directories: Vec<PathBuf>,
    /// Where uploads live. A stored adapter hides one of the same name in `directories`.
    pub store: PathBuf,
    /// Bytes of packed adapters kept in the top tier.
    pub memory: usize,
    /// Longest upload in bytes, also after unpacking.
    pub max_upload: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Packed for the kernels.
    Device,
    /// On disk only.
    Disk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A read-only folder given at start.
    Directory,
    /// Uploaded.
    Store,
}

/// What `GET /v1/adapters` tells about an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterInfo {
    pub name: String,
    pub generation: String,
    pub source: Source,
    pub tier: Tier,
    /// Largest rank of its pairs.
    pub rank: usize,
    pub lora_alpha: f64,
    /// Short names of the projections it changes, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    /// Class names, if it has a head.
    pub labels: Option<Vec<String>>,
    pub parameters: usize,
    /// Size of its files.
    pub bytes: u64,
    /// Requests that hold this generation now.
    pub in_flight: usize,
    /// Unix seconds at which this generation was published.
    pub created: u64,
}

/// What must hold for a change to be made, else [`crate::ErrorKind::Conflict`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    Always,
    /// The name is not taken.
    Absent,
    /// The name stands for this generation.
    Is(Generation),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Created,
    Replaced,
    /// The same content was there already.
    Unchanged,
}

/// An adapter's files on their way in: a private folder in the store that is deleted if it is not published.
pub struct Upload {
    // private: temporary directory
}

impl Upload {
    /// The folder to write `adapter_config.json`, `adapter_model.safetensors` and `labels.json`/`labels.txt` into.
    pub fn path(&self) -> &Path {
        todo!()
    }
    /// Unpacks a `.tar`, `.tar.gz` or `.zip` (told apart by content) that was written to `file`, then deletes it.
    pub fn unpack(&self, _file: &Path) -> Result<()> {
        todo!()
    }
}

pub struct Registry {}

impl Registry {
    pub fn open(_options: RegistryOptions, _metrics: Arc<Metrics>) -> Result<Arc<Self>> {
        todo!()
    }
    pub fn max_upload(&self) -> u64 {
        todo!()
    }
    pub fn list(&self) -> Vec<AdapterInfo> {
        todo!()
    }
    pub fn get(&self, _name: &str) -> Result<AdapterInfo> {
        todo!()
    }
    /// The generation that `name` stands for now, loaded. Holding the `Arc` pins it. Waits while it is read from disk
    /// (one read however many wait); other adapters' requests do not wait for it.
    pub async fn acquire(&self, _name: &str) -> Result<Arc<PackedAdapter>> {
        todo!()
    }
    pub fn upload(&self) -> Result<Upload> {
        todo!()
    }
    /// An upload that is a copy of a local directory.
    pub fn upload_from(&self, _directory: &Path) -> Result<Upload> {
        todo!()
    }
    /// Validates the files against the base, then publishes them under `name`, atomically and durably.
    pub async fn publish(&self, _name: &str, _upload: Upload, _when: Condition) -> Result<(AdapterInfo, Published)> {
        todo!()
    }
    /// Requests in flight finish on the generation they hold.
    pub async fn remove(&self, _name: &str, _when: Condition) -> Result<AdapterInfo> {
        todo!()
    }
}
