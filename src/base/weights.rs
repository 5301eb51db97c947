//! Weights by their Hugging Face names, from safetensors or GGUF, memory-mapped.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::gguf::Gguf;
use crate::{Error, Result};

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    F32,
    F16,
    Bf16,
    /// A GGUF block format.
    Ggml(GgmlDType),
}

/// A tensor as it lies in the file.
pub struct RawTensor<'a> {
    /// Row-major, outermost first: `[out_features, in_features]` for a linear layer.
    pub shape: Vec<usize>,
    pub stored: Stored,
    /// Little-endian; borrowed from the memory map unless rows had to be put in another order.
    pub bytes: Cow<'a, [u8]>,
}

impl RawTensor<'_> {
    /// All numbers as f32, row-major.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let b = &self.bytes;
        Ok(match self.stored {
            Stored::F32 => b.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Stored::F16 => b.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Stored::Bf16 => b.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Stored::Ggml(dtype) => {
                // The copy is aligned; the map need not be.
                let storage = QStorage::from_data(Cow::Owned(b.to_vec()), &Device::Cpu, dtype)?;
                let tensor = QTensor::new(storage, self.shape.as_slice())?.dequantize(&Device::Cpu)?;
                tensor.flatten_all()?.to_vec1()?
            }
        })
    }
}

struct Place {
    file: usize,
    shape: Vec<usize>,
    stored: Stored,
    bytes: Range<usize>,
    /// Heads whose rows lie in the order of interleaved rope.
    interleaved_heads: Option<usize>,
}

/// A model's tensors by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
/// For a `llama` GGUF the rows of q and k are put back into Hugging Face's order.
pub struct Weights {
    files: Vec<Mmap>,
    places: HashMap<String, Place>,
}

/// Maps a file of weights.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let named = |e: std::io::Error| Error::unprocessable(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(named)?;
    // SAFETY: the map is only read. A model file that is changed in place while it is served gives wrong numbers, as it
    // would with any program that maps its weights; replacing the file by renaming does not.
    unsafe { Mmap::map(&file) }.map_err(named)
}

impl Weights {
    /// `model.safetensors` of a Hugging Face directory, or the shards that `model.safetensors.index.json` lists.
    pub fn open_directory(directory: &Path) -> Result<Self> {
        let index = directory.join("model.safetensors.index.json");
        let single = directory.join("model.safetensors");
        let mut names = vec!["model.safetensors".to_string()];
        if !single.exists() && index.exists() {
            let wrong = |what: String| Error::unprocessable(format!("{}: {what}", index.display()));
            let text = std::fs::read(&index).map_err(|e| wrong(e.to_string()))?;
            let json: Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
            let map = json["weight_map"].as_object().ok_or_else(|| wrong("it has no weight_map".into()))?;
            names = map.values().filter_map(Value::as_str).map(str::to_string).collect();
            names.sort();
            names.dedup();
            if let Some(name) = names.iter().find(|n| n.contains(['/', '\\']) || n.starts_with('.')) {
                return Err(wrong(format!("{name:?} is not the name of a file beside it")));
            }
        }
        let mut weights = Weights { files: vec![], places: HashMap::new() };
        for name in names {
            let path = directory.join(&name);
            weights.add_safetensors(&path).map_err(|e| e.context(path.display()))?;
        }
        Ok(weights)
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<()> {
        let map = map(path)?;
        let wrong = |what: String| Error::unprocessable(format!("not a whole safetensors file: {what}"));
        let tensors = SafeTensors::deserialize(&map).map_err(|e| wrong(e.to_string()))?;
        for (name, view) in tensors.iter() {
            let stored = match view.dtype() {
                Dtype::F32 => Stored::F32,
                Dtype::F16 => Stored::F16,
                Dtype::BF16 => Stored::Bf16,
                other => {
                    return Err(wrong(format!("{name} has dtype {other:?}; supported: F32, F16, BF16")));
                }
            };
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let place = Place {
                file: self.files.len(),
                shape: view.shape().to_vec(),
                stored,
                bytes: start..start + view.data().len(),
                interleaved_heads: None,
            };
            self.places.insert(name.to_string(), place);
        }
        self.files.push(map);
        Ok(())
    }

    /// The tensors of a GGUF file that has been read from `map`.
    pub(super) fn from_gguf(map: Mmap, gguf: &Gguf, heads: usize, kv_heads: usize) -> Self {
        let mut places = HashMap::new();
        for (name, place) in &gguf.tensors {
            let Some(name) = hugging_face_name(name) else { continue };
            let interleaved_heads = match () {
                _ if name.ends_with("q_proj.weight") => Some(heads),
                _ if name.ends_with("k_proj.weight") => Some(kv_heads),
                _ => None,
            };
            let stored = match place.dtype {
                GgmlDType::F32 => Stored::F32,
                GgmlDType::F16 => Stored::F16,
                GgmlDType::BF16 => Stored::Bf16,
                block => Stored::Ggml(block),
            };
            let (shape, bytes) = (place.shape.clone(), place.bytes.clone());
            places.insert(name, Place { file: 0, shape, stored, bytes, interleaved_heads });
        }
        Weights { files: vec![map], places }
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.places.keys().cloned().collect();
        names.sort();
        names
    }

    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Errors name the tensor.
    pub fn get(&self, name: &str) -> Result<RawTensor<'_>> {
        let missing = || Error::unprocessable(format!("base weights: the file has no tensor {name}"));
        let place = self.places.get(name).ok_or_else(missing)?;
        let bytes = &self.files[place.file][place.bytes.clone()];
        let bytes = match place.interleaved_heads {
            None => Cow::Borrowed(bytes),
            Some(heads) => {
                let rows = place.shape.first().copied().unwrap_or(0);
                if rows == 0 || rows % (2 * heads) != 0 {
                    let what =
                        format!("base weights: {name} has {rows} rows, which are not {heads} heads of even width");
                    return Err(Error::unprocessable(what));
                }
                Cow::Owned(split_halves(bytes, rows, heads))
            }
        };
        Ok(RawTensor { shape: place.shape.clone(), stored: place.stored, bytes })
    }
}

/// Puts the rows of each head from the order of interleaved rope (0, h/2, 1, h/2 + 1, ...) back into that of split
/// halves (0, 1, ..., h/2, h/2 + 1, ...). A row is a run of bytes in any format.
fn split_halves(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row, width) = (bytes.len() / rows, rows / heads);
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(row * width) {
        for half in 0..2 {
            for i in 0..width / 2 {
                out.extend_from_slice(&head[(2 * i + half) * row..][..row]);
            }
        }
    }
    out
}

/// The Hugging Face name of a tensor of a `llama` GGUF.
fn hugging_face_name(name: &str) -> Option<String> {
    let whole = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => {
            let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let rest = match rest {
                "attn_norm.weight" => "input_layernorm.weight",
                "ffn_norm.weight" => "post_attention_layernorm.weight",
                "attn_q.weight" => "self_attn.q_proj.weight",
                "attn_k.weight" => "self_attn.k_proj.weight",
                "attn_v.weight" => "self_attn.v_proj.weight",
                "attn_output.weight" => "self_attn.o_proj.weight",
                "ffn_gate.weight" => "mlp.gate_proj.weight",
                "ffn_up.weight" => "mlp.up_proj.weight",
                "ffn_down.weight" => "mlp.down_proj.weight",
                _ => return None,
            };
            return Some(format!("model.layers.{layer}.{rest}"));
        }
    };
    Some(whole.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::gguf::tests::write;
    use super::*;

    fn tiny() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama/base")
    }

    /// The order that llama.cpp's converter gives the rows of q and k.
    fn interleave(rows: &[f32], heads: usize, n: usize) -> Vec<f32> {
        let (row, width) = (rows.len() / n, n / heads);
        (0..n)
            .flat_map(|i| {
                let (head, j) = (i / width, i % width);
                let from = head * width + (j % 2) * (width / 2) + j / 2;
                rows[from * row..][..row].to_vec()
            })
            .collect()
    }

    #[test]
    fn gguf_and_shards_give_the_same_numbers_by_the_same_names() {
        let whole = Weights::open_directory(&tiny()).unwrap();
        let folder = tempfile::tempdir().unwrap();

        let gguf_name = |name: &str| {
            let swaps = [
                ("model.embed_tokens", "token_embd"),
                ("model.norm", "output_norm"),
                ("model.layers", "blk"),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("self_attn.q_proj", "attn_q"),
                ("self_attn.k_proj", "attn_k"),
                ("self_attn.v_proj", "attn_v"),
                ("self_attn.o_proj", "attn_output"),
                ("mlp.gate_proj", "ffn_gate"),
                ("mlp.up_proj", "ffn_up"),
                ("mlp.down_proj", "ffn_down"),
            ];
            swaps.iter().fold(name.to_string(), |n, (from, to)| n.replace(from, to))
        };
        let names = whole.names();
        let gguf_names: Vec<String> = names.iter().map(|n| gguf_name(n)).collect();
        let tensors: Vec<_> = names
            .iter()
            .zip(&gguf_names)
            .map(|(name, gguf_name)| {
                let raw = whole.get(name).unwrap();
                let mut data = raw.to_f32().unwrap();
                let heads = if name.contains("q_proj") { 4 } else { 2 };
                if name.contains("q_proj") || name.contains("k_proj") {
                    data = interleave(&data, heads, raw.shape[0]);
                }
                (gguf_name.as_str(), raw.shape.clone(), data)
            })
            .collect();
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, write(&[], &tensors)).unwrap();
        let map = map(&path).unwrap();
        let gguf = Gguf::read(&map).unwrap();
        let from_gguf = Weights::from_gguf(map, &gguf, 4, 2);

        let (mut index, mut shards) = (serde_json::Map::new(), [vec![], vec![]]);
        for (i, name) in names.iter().enumerate() {
            index.insert(name.clone(), format!("model-{}.safetensors", i % 2).into());
            shards[i % 2].push((name.clone(), whole.get(name).unwrap()));
        }
        for (i, shard) in shards.iter().enumerate() {
            let views = shard.iter().map(|(name, raw)| {
                (name, safetensors::tensor::TensorView::new(Dtype::F32, raw.shape.clone(), &raw.bytes).unwrap())
            });
            let path = folder.path().join(format!("model-{i}.safetensors"));
            std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
        }
        let index = serde_json::json!({ "weight_map": index });
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let sharded = Weights::open_directory(folder.path()).unwrap();

        for other in [from_gguf, sharded] {
            assert_eq!(other.names(), names);
            for name in &names {
                let (a, b) = (whole.get(name).unwrap(), other.get(name).unwrap());
                assert_eq!((a.shape.clone(), a.to_f32().unwrap()), (b.shape.clone(), b.to_f32().unwrap()), "{name}");
            }
        }
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(tiny().join("model.safetensors")).unwrap();
        for end in [0, 7, 100, bytes.len() - 1] {
            std::fs::write(folder.path().join("model.safetensors"), &bytes[..end]).unwrap();
            let error = Weights::open_directory(folder.path()).err().unwrap();
            assert!(error.message.contains("model.safetensors"), "{error}");
        }
    }
}
