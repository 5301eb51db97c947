//! The paged KV cache: memory for keys and values in blocks of [`BLOCK`] positions.

use std::marker::PhantomData;

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::base::ModelConfig;
use crate::base::simd::{self, Group, LANES, Simd};

/// Positions a block holds. On the CPU a block of keys is one panel of the matrix kernels.
pub const BLOCK: usize = LANES;

/// Keys and values of one layer.
pub(super) enum LayerCache {
    /// Keys `[block][kv_head][head_dim][BLOCK]`, values `[block][kv_head][value_width / LANES][BLOCK][LANES]`: both in panels of
    /// the matrix kernels.
    Cpu { keys: Numbers, values: Numbers },
    /// Keys and values `[positions, kv_heads * head_dim]`.
    Tensor { keys: Tensor, values: Tensor },
}

/// Keys or values on the CPU.
pub(super) enum Numbers {
    F32(Vec<f32>),
    /// Bits. What is larger than f16's numbers becomes the largest.
    F16(Vec<u16>),
}

impl Numbers {
    fn new(count: usize, in_f16: bool) -> Self {
        if in_f16 { Numbers::F16(vec![0; count]) } else { Numbers::F32(vec![0.0; count]) }
    }

    /// For tasks that write and read different numbers at the same time.
    pub fn split(&mut self) -> Split<'_> {
        let (start, len) = match self {
            Numbers::F32(numbers) => (Start::F32(numbers.as_mut_ptr()), numbers.len()),
            Numbers::F16(bits) => (Start::F16(bits.as_mut_ptr()), bits.len()),
        };
        Split { start, len, numbers: PhantomData }
    }
}

/// [`Numbers`] that tasks have parts of.
pub(super) struct Split<'a> {
    start: Start,
    len: usize,
    numbers: PhantomData<&'a mut Numbers>,
}

enum Start {
    F32(*mut f32),
    F16(*mut u16),
}

// SAFETY: tasks touch different numbers, as they promise.
unsafe impl Sync for Split<'_> {}

impl Split<'_> {
    /// `k` rows of [`LANES`] numbers, from `at` on.
    ///
    /// # Safety
    /// Nobody writes these numbers meanwhile.
    ///
    /// # Panics
    /// If there are not so many.
    pub unsafe fn group(&self, at: usize, k: usize) -> Group<'_> {
        assert!(at + k * LANES <= self.len);
        // SAFETY: the assert, and the caller's promise.
        unsafe {
            match self.start {
                Start::F32(start) => Group::F32(std::slice::from_raw_parts(start.add(at), k * LANES)),
                Start::F16(start) => Group::F16(std::slice::from_raw_parts(start.add(at), k * LANES)),
            }
        }
    }

    /// Has the `count` numbers from `at` on, as far as there are so many, on their way to a near cache.
    pub fn fetch(&self, at: usize, count: usize) {
        let count = count.min(self.len.saturating_sub(at));
        match self.start {
            Start::F32(start) => simd::fetch(std::ptr::slice_from_raw_parts(start.wrapping_add(at), count)),
            Start::F16(start) => simd::fetch(std::ptr::slice_from_raw_parts(start.wrapping_add(at), count)),
        }
    }

    /// Writes `x` from `at` on, `stride` apart.
    ///
    /// # Safety
    /// Nobody else reads or writes these numbers meanwhile.
    ///
    /// # Panics
    /// If there are not so many.
    pub unsafe fn write(&self, simd: Simd, at: usize, stride: usize, x: &[f32]) {
        assert!(x.is_empty() || at + (x.len() - 1) * stride < self.len);
        // SAFETY: the assert, and the caller's promise.
        match self.start {
            Start::F32(start) => {
                x.iter().enumerate().for_each(|(i, &x)| unsafe { *start.add(at + i * stride) = x });
            }
            Start::F16(start) => {
                const CHUNK: usize = 64;
                let mut bits = [0; CHUNK];
                for (i, x) in x.chunks(CHUNK).enumerate() {
                    let bits = &mut bits[..x.len()];
                    simd::to_f16(simd, x, bits);
                    for (j, bits) in bits.iter().enumerate() {
                        unsafe { *start.add(at + (i * CHUNK + j) * stride) = *bits };
                    }
                }
            }
        }
    }
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
    pub(super) fn packed(config: &ModelConfig, blocks: usize, in_f16: bool) -> Self {
        let heads = blocks * config.kv_heads * BLOCK;
        let layer = |_| LayerCache::Cpu {
            keys: Numbers::new(heads * config.head_dim, in_f16),
            values: Numbers::new(heads * value_width(config), in_f16),
        };
        KvCache { layers: (0..config.layers).map(layer).collect(), blocks }
    }

    /// For candle's operations: `blocks` of so many positions in all.
    pub(super) fn tensors(
        config: &ModelConfig,
        blocks: usize,
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = (positions, config.kv_heads * config.head_dim);
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
