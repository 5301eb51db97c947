//! The device that a model is on: opened by name, and whether what is asked of it has room.

use candle_core::{DType, Device};

use crate::base::ModelConfig;
use crate::{Error, Result};

/// What the kernels of a GPU need: bf16 on tensor cores. `build.rs` compiles them for this.
#[cfg(any(feature = "cuda", test))]
const CAPABILITY: (i32, i32) = (8, 0);
/// What a GPU's memory must have beside weights, cache and adapters: cuBLAS's workspaces, a step's activations and logits.
#[cfg(any(feature = "cuda", test))]
const STEP: u64 = 1 << 30;

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

/// Whether a GPU has room for a model in numbers of `dtype`, its cache and its adapters, and heads that the kernels take; a
/// CPU is not asked. Told before anything is loaded, with what would fit.
pub fn check(device: &Device, config: &ModelConfig, dtype: DType, kv_memory: u64, adapter_memory: u64) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        if config.head_dim > crate::base::paged::tiles::MAX_HEAD_DIM {
            let most = crate::base::paged::tiles::MAX_HEAD_DIM;
            let found = config.head_dim;
            return Err(Error::unprocessable(format!("heads of {found} numbers; on a GPU they have at most {most}")));
        }
        let told = |e| Error::internal(format!("{e:?}"));
        let (free, _) = device.cuda_stream().context().mem_get_info().map_err(told)?;
        let weights = weights(config) * dtype.size_in_bytes() as u64;
        return fits(free as u64, weights, kv_memory, adapter_memory);
    }
    let _ = (device, config, dtype, kv_memory, adapter_memory);
    Ok(())
}

/// Numbers of a model's matrices.
#[cfg(feature = "cuda")]
fn weights(config: &ModelConfig) -> u64 {
    let linears: usize = config.target_modules().iter().map(|m| m.out_features * m.in_features).sum();
    let tables = if config.tie_word_embeddings || !config.predicts { 1 } else { 2 };
    (linears + tables * config.vocab_size * config.hidden_size) as u64
}

#[cfg(any(feature = "cuda", test))]
fn fits(free: u64, weights: u64, kv: u64, adapters: u64) -> Result<()> {
    if weights + kv + adapters + STEP <= free {
        return Ok(());
    }
    // In tenths, rounded so that what is said to fit does.
    let size = |bytes: u64| format!("{:.1}GiB", bytes as f64 / (1u64 << 30) as f64);
    let floor = |bytes: u64| format!("{:.1}GiB", (bytes as f64 / (1u64 << 30) as f64 * 10.0).floor() / 10.0);
    let parts = format!("weights {}, --kv-memory {}, --adapter-memory {}", size(weights), size(kv), size(adapters));
    let left = free.saturating_sub(weights + STEP);
    let tenth = (1u64 << 30) / 10;
    let advice = if left > adapters + tenth {
        format!("--kv-memory {} would fit", floor(left - adapters))
    } else if left > 2 * tenth {
        format!("--kv-memory {0} --adapter-memory {0} would fit", floor(left / 2))
    } else {
        "the weights alone leave no room; it takes a larger GPU or a smaller model".into()
    };
    let (free, step) = (floor(free), size(STEP));
    Err(Error::bad_request(format!("the GPU has {free} free, of which a step takes {step}: {parts}; {advice}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_would_fit_is_said_and_fits() {
        assert!(fits(24 * GIB, 16 * GIB, 6 * GIB, GIB).is_ok());
        let message = |free: u64, kv: u64| fits(free, 16 * GIB, kv, GIB).unwrap_err().message;
        let error = message(24 * GIB, 40 * GIB);
        assert!(error.contains("24.0GiB free") && error.contains("weights 16.0GiB"), "{error}");
        assert!(error.ends_with("--kv-memory 6.0GiB would fit"), "{error}");
        let error = message(17 * GIB + GIB / 2, GIB);
        assert!(error.ends_with("--kv-memory 0.2GiB --adapter-memory 0.2GiB would fit"), "{error}");
        assert!(fits(17 * GIB + GIB / 2, 16 * GIB, GIB / 5, GIB / 5).is_ok());
        let error = message(16 * GIB, GIB);
        assert!(error.ends_with("a larger GPU or a smaller model"), "{error}");
    }

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
