//! The device that a model is on: opened by name, and what memory it has.

use candle_core::{DType, Device};

use crate::base::ModelConfig;
use crate::{Error, Result};

/// What the kernels of a GPU need: bf16 on tensor cores. `build.rs` compiles them for this.
#[cfg(any(feature = "cuda", test))]
const CAPABILITY: (i32, i32) = (8, 0);

/// The device of a name in `--device`: `auto`, `cpu`, `cuda` or `cuda:N`.
pub fn open(name: &str) -> Result<Device> {
    let named = |e: Error| Error::bad_request(format!("--device {name}: {}", e.message));
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        None if name == "cuda" => gpu(0).map_err(named),
        None if name == "auto" && cfg!(feature = "cuda") => gpu(0).or_else(|e| {
            tracing::warn!("no GPU is used: {}", e.message);
            Ok(Device::Cpu)
        }),
        None if name == "auto" => Ok(Device::Cpu),
        Some(("cuda", n)) if n.parse::<usize>().is_ok() => gpu(n.parse().unwrap_or(0)).map_err(named),
        _ => Err(Error::bad_request(format!("--device is {name:?}; expected auto, cpu, cuda or cuda:N"))),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> Result<Device> {
    Err(Error::bad_request("this program has no CUDA in it; build it with `cargo build --release --features cuda`"))
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize) -> Result<Device> {
    let device = crate::cuda::gpu::open(ordinal)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context();
    let told = |e| Error::internal(format!("{e:?}"));
    let (name, capability) = (context.name().map_err(told)?, context.compute_capability().map_err(told)?);
    capable(&name, capability)?;
    Ok(device)
}

#[cfg(any(feature = "cuda", test))]
fn capable(name: &str, capability: (i32, i32)) -> Result<()> {
    if capability >= CAPABILITY {
        return Ok(());
    }
    let ((major, minor), (least, _)) = (capability, CAPABILITY);
    Err(Error::bad_request(format!(
        "{name} has compute capability {major}.{minor}; the kernels need {least}.0 or more (A100, A10, RTX 30 and later)"
    )))
}

/// Bytes of a GPU.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    pub total: u64,
    /// What nobody has, when all that was asked for is done.
    pub free: u64,
}

/// `None` for a CPU.
pub fn memory(device: &Device) -> Result<Option<Memory>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let told = |e| Error::internal(format!("{e:?}"));
        let stream = device.cuda_stream();
        stream.synchronize().map_err(told)?;
        crate::cuda::gpu::trim(device)?;
        let (free, total) = stream.context().mem_get_info().map_err(told)?;
        return Ok(Some(Memory { total: total as u64, free: free as u64 }));
    }
    let _ = device;
    Ok(None)
}

/// Whether a model's heads are such that the kernels of a GPU take them.
pub fn check_heads(config: &ModelConfig) -> Result<()> {
    #[cfg(feature = "cuda")]
    if config.head_dim > crate::base::paged::tiles::MAX_HEAD_DIM {
        let most = crate::base::paged::tiles::MAX_HEAD_DIM;
        let found = config.head_dim;
        return Err(Error::unprocessable(format!("heads of {found} numbers; on a GPU they have at most {most}")));
    }
    let _ = config;
    Ok(())
}

/// Bytes of a model's matrices in numbers of `dtype`.
pub fn weights(config: &ModelConfig, dtype: DType) -> u64 {
    let linears: usize = config.target_modules().iter().map(|m| m.out_features * m.in_features).sum();
    let tables = if config.tie_word_embeddings || !config.predicts { 1 } else { 2 };
    ((linears + tables * config.vocab_size * config.hidden_size) * dtype.size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_gpus_and_unknown_names_are_refused() {
        assert!(capable("NVIDIA H100 80GB HBM3", (9, 0)).is_ok());
        let error = capable("Tesla T4", (7, 5)).unwrap_err().message;
        assert!(error.contains("Tesla T4 has compute capability 7.5") && error.contains("8.0"), "{error}");
        let error = open("gpu").unwrap_err().message;
        assert_eq!(error, "--device is \"gpu\"; expected auto, cpu, cuda or cuda:N");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_program_without_cuda_says_how_to_get_it() {
        let error = open("cuda:1").unwrap_err().message;
        assert!(error.starts_with("--device cuda:1: ") && error.contains("--features cuda"), "{error}");
        assert!(open("auto").unwrap().is_cpu());
    }
}
