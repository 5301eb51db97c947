//! The paged KV cache: memory for keys and values in blocks of [`BLOCK`] positions.

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::base::ModelConfig;
use crate::base::simd::LANES;

/// Positions a block holds. On the CPU a block of keys is one panel of the matrix kernels.
pub const BLOCK: usize = LANES;

/// Keys and values of one layer.
pub(super) enum LayerCache {
    /// Keys `[block][kv_head][head_dim][BLOCK]`, values `[block][kv_head][BLOCK][value_width]`.
    Cpu { keys: Vec<f32>, values: Vec<f32> },
    /// Keys and values `[blocks * BLOCK, kv_heads * head_dim]`.
    Tensor { keys: Tensor, values: Tensor },
}

pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
    blocks: usize,
}

/// Width of a value row on the CPU: `head_dim` in whole panels.
pub(super) fn value_width(config: &ModelConfig) -> usize {
    config.head_dim.next_multiple_of(LANES)
}

impl KvCache {
    /// Bytes that a block takes in all layers.
    pub fn block_bytes(config: &ModelConfig, plain: bool, dtype: DType) -> usize {
        let per_slot = if plain { 2 * config.head_dim } else { config.head_dim + value_width(config) };
        config.layers * config.kv_heads * BLOCK * per_slot * dtype.size_in_bytes()
    }

    /// For the decoder's own kernels on the CPU. The system hands the memory out as it is first written.
    pub(super) fn packed(config: &ModelConfig, blocks: usize) -> Self {
        let heads = blocks * config.kv_heads * BLOCK;
        let layer = |_| LayerCache::Cpu {
            keys: vec![0.0; heads * config.head_dim],
            values: vec![0.0; heads * value_width(config)],
        };
        KvCache { layers: (0..config.layers).map(layer).collect(), blocks }
    }

    /// For candle's operations.
    pub(super) fn tensors(config: &ModelConfig, blocks: usize, dtype: DType, device: &Device) -> Result<Self> {
        let shape = (blocks * BLOCK, config.kv_heads * config.head_dim);
        let layer = |_| -> Result<LayerCache> {
            let (keys, values) = (Tensor::zeros(shape, dtype, device)?, Tensor::zeros(shape, dtype, device)?);
            Ok(LayerCache::Tensor { keys, values })
        };
        Ok(KvCache { layers: (0..config.layers).map(layer).collect::<Result<_>>()?, blocks })
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }
}
