//! Decoders with random weights, for the tests of the layers above.

use candle_core::{DType, Device};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::base::{Decoder, DecoderOptions, Kernels, LM_HEAD, ModelConfig, Weights};

/// Uniform in -1 to 1.
pub fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// On the CPU, in f32.
pub fn options(kernels: Kernels) -> DecoderOptions {
    DecoderOptions { device: Device::Cpu, kernels, format: None, dtype: DType::F32 }
}

pub fn decoder(config: &ModelConfig, options: DecoderOptions, seed: u64) -> Decoder {
    let modules = config.target_modules();
    let biased = modules.iter().filter(|m| config.architecture.has_bias(m.projection));
    let biases: Vec<_> = biased.map(|m| (format!("{}.bias", m.name), vec![m.out_features])).collect();
    let matrices = modules.into_iter().map(|m| (format!("{}.weight", m.name), vec![m.out_features, m.in_features]));
    let norms = config.norms().into_iter().map(|(_, name, width)| (format!("{name}.weight"), vec![width]));
    let embedding = config.family.names().embedding;
    let tables =
        [embedding, LM_HEAD].map(|name| (format!("{name}.weight"), vec![config.vocab_size, config.hidden_size]));
    let mut next = noise(seed);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = matrices
        .chain(biases)
        .chain(norms)
        .chain(tables)
        .map(|(name, shape)| {
            let bytes = (0..shape.iter().product()).flat_map(|_| next().to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    Decoder::load(config, &Weights::open_directory(folder.path(), config.family).unwrap(), options).unwrap()
}
