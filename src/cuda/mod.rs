//! Kernels of our own for NVIDIA GPUs (`kernels/`), and what launches them.
//!
//! The layers above lay out launches for any [`Machine`]: a GPU, or in tests an emulator that runs the same kernels on the
//! host. So all but the launch itself is tested where there is no GPU.

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
pub mod emulator;
#[cfg(feature = "cuda")]
pub mod gpu;

use candle_core::{DType, Result};

/// A source file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    Lora,
    Attention,
    Layer,
    Sampler,
}

#[derive(Debug, Clone, Copy)]
pub enum Argument {
    Address(u64),
    Word(u32),
    Float(f32),
}

#[derive(Debug)]
pub struct Launch<'a> {
    pub module: Module,
    pub kernel: &'a str,
    pub grid: [usize; 3],
    /// Threads of a block.
    pub threads: u32,
    pub arguments: &'a [Argument],
}

/// What has memory and runs kernels on it, one after the other.
pub trait Machine {
    type Memory: Memory;
    /// A copy of `words` there.
    fn upload(&self, words: &[u32]) -> Result<Self::Memory>;
    /// Memory for so many f32, which hold anything.
    fn reserve(&self, floats: usize) -> Result<Self::Memory>;
    /// # Safety
    /// The arguments are the kernel's, and what it reads and writes by them is there.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
}

/// Memory that is written beside the steps, in a stream of its own.
pub trait Uploads {
    /// Its address.
    fn start(&self) -> u64;
    /// What is written from now on is written when all launches so far have ended.
    fn after_launches(&mut self) -> Result<()>;
    /// Begins to write `bytes` bytes to an address. `fill` makes them, in memory that holds anything.
    ///
    /// # Safety
    /// They are inside the memory, and no launch since the last [`Uploads::after_launches`] reads or writes them before
    /// [`Uploads::finish`] has returned.
    unsafe fn write(&mut self, to: u64, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()>;
    /// Waits until all is written.
    fn finish(&mut self) -> Result<()>;
}

pub trait Memory {
    fn address(&self) -> u64;
}

/// The end of a kernel's name: its numbers, and how they are read. `None` for numbers that there are no kernels for.
pub fn suffix(dtype: DType, vector: bool) -> Option<String> {
    Some(format!("{}_{}", number(dtype)?, if vector { "vector" } else { "scalar" }))
}

pub fn number(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("f32"),
        DType::F16 => Some("f16"),
        DType::BF16 => Some("bf16"),
        _ => None,
    }
}

/// Tiles among the words that a step uploads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tiles {
    /// First word.
    first: usize,
    pub count: usize,
}

impl Tiles {
    /// Appends tiles to `words`. A tile is a multiple of 8 bytes, which its addresses need.
    pub fn append<const N: usize>(words: &mut Vec<u32>, tiles: &[[u32; N]]) -> Self {
        const { assert!(N.is_multiple_of(2)) };
        let first = words.len();
        words.extend(tiles.iter().flatten());
        Tiles { first, count: tiles.len() }
    }

    /// Their address, where the words lie at `words`.
    pub fn address(&self, words: u64) -> Argument {
        Argument::Address(words + 4 * self.first as u64)
    }
}

/// Both words of an address.
pub fn words(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}
