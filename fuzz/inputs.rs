//! What the fuzz targets do with bytes, and the test that replays their seeds: anything may be refused, nothing may panic. Each
//! says whether the bytes were taken.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device};
use loramux::adapter::{Upload, inspect, load};
use loramux::base::simd::Simd;
use loramux::base::{Base, Decoder, DecoderOptions, Kernels, ModelConfig};

/// Longest archive when unpacked.
const UNPACKED: u64 = 1 << 20;

/// The base that adapters are checked against.
fn base() -> &'static ModelConfig {
    static BASE: OnceLock<ModelConfig> = OnceLock::new();
    let text = include_str!("../tests/fixtures/tiny/llama/base/config.json");
    BASE.get_or_init(|| ModelConfig::from_json(text).expect("the fixture is a configuration"))
}

fn is_taken(folder: &Path) -> bool {
    let _ = inspect(folder, Some(base()));
    load(folder, base(), "base").is_ok()
}

/// `adapter_config.json`, whose length stands in the first two bytes, and after it `adapter_model.safetensors`.
pub fn adapter(data: &[u8]) -> bool {
    let [low, high, rest @ ..] = data else { return false };
    let (config, weights) = rest.split_at(rest.len().min(u16::from_le_bytes([*low, *high]).into()));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).expect("room for a file");
    write("adapter_config.json", config);
    write("adapter_model.safetensors", weights);
    is_taken(folder.path())
}

/// A base in a GGUF file, and the same bytes as an adapter's.
pub fn gguf(data: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    fs::write(&path, data).expect("room for a file");
    let base = Base::open(&path.to_string_lossy());
    if let Ok(base) = &base {
        let kernels = Kernels::Packed(Simd::detect());
        let options = DecoderOptions { device: Device::Cpu, kernels, format: None, dtype: DType::F32 };
        let _ = Decoder::load(&base.config, &base.weights, options);
        let _ = base.tokenizer.encode("a text", true);
    }
    is_taken(folder.path()) || base.is_ok()
}

/// An archive of an adapter's files.
pub fn archive(data: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("archive");
    fs::write(&file, data).expect("room for a file");
    let upload = Upload::new(tempfile::tempdir().expect("a temporary folder"), UNPACKED);
    upload.unpack(&file).is_ok() && is_taken(upload.path())
}
