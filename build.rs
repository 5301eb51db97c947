//! Compiles the CUDA kernels to PTX where the feature `cuda` is on. Nothing else needs a build script.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What they run on at least: bf16 on tensor cores. A driver makes code for its own GPU of it.
const ARCHITECTURE: &str = "compute_80";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/cuda/kernels");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let nvcc = nvcc();
    for name in ["lora", "attention", "layer", "sampler"] {
        let source = format!("src/cuda/kernels/{name}.cu");
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "--ptx", &format!("-arch={ARCHITECTURE}"), "-o"]);
        command.arg(out.join(format!("{name}.ptx"))).arg(source);
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(status) => panic!("{command:?} ended with {status}"),
            Err(e) => {
                panic!("{command:?}: {e}; the feature cuda needs nvcc: on the PATH, in CUDA_HOME, or named by NVCC")
            }
        }
    }
}

fn nvcc() -> PathBuf {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(env::var_os);
    let found = homes.map(|home| Path::new(&home).join("bin/nvcc")).find(|path| path.exists());
    found.unwrap_or_else(|| "nvcc".into())
}
