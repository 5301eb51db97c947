//! Small adapters made in code, for the tests of this layer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::base::{Architecture, Family, ModelConfig, Projection, Rope};

/// A decoder of two layers: q is 12×8, k and v are 6×8, o is 8×12, gate and up are 10×8, down is 8×10.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: 32,
        hidden_size: 8,
        intermediate_size: 10,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 6,
        norm_eps: 1e-5,
        rope: Some(Rope::plain(10_000.0, 6)),
        windows: vec![],
        architecture: Architecture::of(Family::Llama),
        context: 64,
        tie_word_embeddings: true,
        predicts: true,
        bos_token: None,
        eos_tokens: vec![],
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: impl Fn(usize) -> f32) -> Self {
        let bytes = (0..shape.iter().product()).flat_map(|i| values(i).to_le_bytes()).collect();
        Tensor { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }
}

/// A PEFT directory under construction.
#[derive(Clone)]
pub struct Files {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

/// Rank 2 on q and v of both layers; `seed` makes the numbers, and so the generation.
pub fn adapter(seed: usize) -> Files {
    adapter_of_rank(seed, 2)
}

pub fn adapter_of_rank(seed: usize, rank: usize) -> Files {
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
    });
    let mut files = Files { config, tensors: BTreeMap::new() };
    let base = tiny();
    for layer in 0..base.layers {
        for projection in [Projection::Q, Projection::V] {
            let (outputs, inputs) = base.shape(projection);
            let module = format!("base_model.model.model.layers.{layer}.{}", base.family.path(projection));
            let value = move |i| (seed * 1000 + layer * 100 + i) as f32 / 8.0;
            files.tensors.insert(format!("{module}.lora_A.weight"), Tensor::f32(&[rank, inputs], value));
            files.tensors.insert(format!("{module}.lora_B.weight"), Tensor::f32(&[outputs, rank], value));
        }
    }
    files
}

/// The same with a head of three classes.
pub fn classifier(seed: usize) -> Files {
    let mut files = adapter(seed);
    files.config["task_type"] = json!("SEQ_CLS");
    files.config["modules_to_save"] = json!(["classifier", "score"]);
    files.tensors.insert("base_model.model.score.weight".into(), Tensor::f32(&[3, 8], |i| i as f32));
    files
}

impl Files {
    pub fn weights(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, t)| (name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    pub fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("adapter_config.json"), self.config.to_string()).unwrap();
        std::fs::write(directory.join("adapter_model.safetensors"), self.weights()).unwrap();
    }

    /// The same with the weights in two shards.
    pub fn sharded(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("adapter_config.json"), self.config.to_string()).unwrap();
        let (mut map, half) = (serde_json::Map::new(), self.tensors.len() / 2);
        for (number, shard) in ["00001-of-00002", "00002-of-00002"].iter().enumerate() {
            let name = format!("adapter_model-{shard}.safetensors");
            let tensors = self.tensors.iter().enumerate().filter(|(i, _)| (*i >= half) == (number == 1));
            let tensors: BTreeMap<_, _> = tensors.map(|(_, (name, t))| (name.clone(), t.clone())).collect();
            map.extend(tensors.keys().map(|tensor| (tensor.clone(), json!(name))));
            let files = Files { tensors, ..self.clone() };
            std::fs::write(folder.path().join(name), files.weights()).unwrap();
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(folder.path().join("adapter_model.safetensors.index.json"), index.to_string()).unwrap();
        folder
    }

    pub fn folder(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        folder
    }
}
