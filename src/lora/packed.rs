//! An adapter laid out for the kernels, ready for a batch.

use crate::Result;
use crate::adapter::{Adapter, Generation};
use crate::base::ModelConfig;

/// An adapter on the device, in the layout that the delta kernels read.
#[derive(Debug)]
pub struct PackedAdapter {
    pub generation: Generation,
    /// Names of the classes of the head; `None` where the adapter has no head.
    pub labels: Option<Vec<String>>,
    /// Memory it takes.
    pub bytes: usize,
}

impl PackedAdapter {
    pub fn new(adapter: &Adapter, _config: &ModelConfig, _device: &candle_core::Device) -> Result<Self> {
        Ok(PackedAdapter {
            generation: adapter.generation.clone(),
            labels: adapter.head.as_ref().map(|h| h.labels.clone()),
            bytes: 4 * adapter.parameters(),
        })
    }

    pub fn has_head(&self) -> bool {
        self.labels.is_some()
    }
}
