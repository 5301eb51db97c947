//! Weights by their Hugging Face names, from safetensors or GGUF, memory-mapped.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::config::ModelConfig;
use super::family::{Family, LM_HEAD, NormKind, Projection};
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

impl From<GgmlDType> for Stored {
    fn from(dtype: GgmlDType) -> Self {
        match dtype {
            GgmlDType::F32 => Stored::F32,
            GgmlDType::F16 => Stored::F16,
            GgmlDType::BF16 => Stored::Bf16,
            block => Stored::Ggml(block),
        }
    }
}

impl Stored {
    /// Bytes that a tensor of `shape` takes; `None` where its rows are not whole blocks, or for an absurd shape.
    fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (block, size) = match self {
            Stored::F32 => (1, 4),
            Stored::F16 | Stored::Bf16 => (1, 2),
            Stored::Ggml(dtype) => (dtype.block_size(), dtype.type_size()),
        };
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let whole = shape.last().is_none_or(|row| row % block == 0);
        (elements / block).checked_mul(size).filter(|_| whole)
    }
}

/// A tensor as it lies in the file.
pub struct RawTensor<'a> {
    /// Row-major, outermost first: `[out_features, in_features]` for a linear layer.
    pub shape: Vec<usize>,
    pub stored: Stored,
    /// Little-endian; borrowed from the memory map unless the numbers had to be put in another form.
    pub bytes: Cow<'a, [u8]>,
}

impl RawTensor<'_> {
    /// All numbers as f32, row-major. An error if the bytes are not as many as the shape needs.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let b = &self.bytes;
        if self.stored.bytes(&self.shape) != Some(b.len()) {
            let what = format!("{} bytes do not hold shape {:?} stored as {:?}", b.len(), self.shape, self.stored);
            return Err(Error::unprocessable(what));
        }
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
    /// As [`Weights`] gives it out.
    shape: Vec<usize>,
    stored: Stored,
    bytes: Range<usize>,
    layout: Layout,
}

/// How a tensor of the file differs from the one that is given out.
#[derive(Clone, Copy)]
enum Layout {
    Same,
    /// The rows of so many heads lie in the order of interleaved rope.
    Interleaved(usize),
    /// `[in_features, out_features]`.
    Transposed,
    /// Less 1.
    LessOne,
}

/// A model's tensors by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them, and in
/// one form, however the file holds them: linear layers are `[out_features, in_features]`, the rows of q and k in the order
/// of split halves, norms are multiplied with as they are.
pub struct Weights {
    files: Vec<Mmap>,
    places: HashMap<String, Place>,
    /// Tensors whose numbers are of a kind that is not read. Some files have such beside the weights.
    unreadable: HashMap<String, Dtype>,
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
    pub fn open_directory(directory: &Path, family: Family) -> Result<Self> {
        let index = directory.join("model.safetensors.index.json");
        let single = directory.join("model.safetensors");
        let mut names = vec!["model.safetensors".to_string()];
        let mut listed = vec![];
        if !single.exists() && index.exists() {
            let wrong = |what: String| Error::unprocessable(format!("{}: {what}", index.display()));
            let text = std::fs::read(&index).map_err(|e| wrong(e.to_string()))?;
            let json: Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
            let map = json["weight_map"].as_object().ok_or_else(|| wrong("it has no weight_map".into()))?;
            listed = map.keys().cloned().collect();
            names = map.values().filter_map(Value::as_str).map(str::to_string).collect();
            names.sort();
            names.dedup();
            if let Some(name) = names.iter().find(|n| n.contains(['/', '\\']) || n.starts_with('.')) {
                return Err(wrong(format!("{name:?} is not the name of a file beside it")));
            }
        }
        let mut weights = Weights { files: vec![], places: HashMap::new(), unreadable: HashMap::new() };
        for name in names {
            let path = directory.join(&name);
            weights.add_safetensors(&path).map_err(|e| e.context(path.display()))?;
        }
        if let Some(name) = listed.iter().find(|n| !weights.contains(n) && !weights.unreadable.contains_key(*n)) {
            let what = format!("{}: no shard holds {name}, which it lists", index.display());
            return Err(Error::unprocessable(what));
        }
        Ok(weights.in_form_of(family))
    }

    /// Gives Hugging Face's tensors the names and the form that are given out.
    fn in_form_of(mut self, family: Family) -> Self {
        // A model saved without its output layer lacks the first part of the names.
        let names = family.names();
        let root = format!("{}.", names.root);
        if !self.places.keys().any(|name| name.starts_with(&root)) {
            let outside = |name: &str| name.starts_with(LM_HEAD) || name.starts_with(names.head);
            let named = |name: String| if outside(&name) { name } else { format!("{root}{name}") };
            self.places = self.places.into_iter().map(|(name, place)| (named(name), place)).collect();
            self.unreadable = self.unreadable.into_iter().map(|(name, dtype)| (named(name), dtype)).collect();
        }
        // What the norms of the first BERT models, converted from TensorFlow, call theirs.
        for (old, new) in [(".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")] {
            let named = |name: String| name.strip_suffix(old).map(|module| format!("{module}{new}")).unwrap_or(name);
            self.places = self.places.into_iter().map(|(name, place)| (named(name), place)).collect();
        }
        for (name, place) in &mut self.places {
            let Some(module) = name.strip_suffix(".weight") else { continue };
            let is_linear = || names.projections.iter().any(|(_, path)| module.ends_with(path));
            if family.transposes_linear() && place.shape.len() == 2 && is_linear() {
                place.shape.reverse();
                place.layout = Layout::Transposed;
            }
            if family.offsets_norms() && module.ends_with("norm") {
                place.layout = Layout::LessOne;
            }
        }
        self
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
                    self.unreadable.insert(name.to_string(), other);
                    continue;
                }
            };
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let place = Place {
                file: self.files.len(),
                shape: view.shape().to_vec(),
                stored,
                bytes: start..start + view.data().len(),
                layout: Layout::Same,
            };
            if self.places.insert(name.to_string(), place).is_some() {
                return Err(wrong(format!("{name} is in another shard too")));
            }
        }
        self.files.push(map);
        Ok(())
    }

    /// The tensors of a GGUF file that has been read from `map`.
    pub(super) fn from_gguf(map: Mmap, gguf: &Gguf, config: &ModelConfig) -> Result<Self> {
        let mut places = HashMap::new();
        for (name, place) in &gguf.tensors {
            let Some((name, projection)) = hugging_face_name(name, config.family)? else { continue };
            // llama.cpp turns neighbouring numbers for this family, and others in halves.
            let layout = match projection {
                Some(Projection::Q) if config.family == Family::Llama => Layout::Interleaved(config.heads),
                Some(Projection::K) if config.family == Family::Llama => Layout::Interleaved(config.kv_heads),
                _ => Layout::Same,
            };
            let (shape, bytes) = (place.shape.clone(), place.bytes.clone());
            let twice = Error::unprocessable(format!("GGUF: two tensors stand for {name}"));
            let place = Place { file: 0, shape, stored: place.dtype.into(), bytes, layout };
            if places.insert(name, place).is_some() {
                return Err(twice);
            }
        }
        Ok(Weights { files: vec![map], places, unreadable: HashMap::new() })
    }

    #[cfg(test)]
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.places.keys().cloned().collect();
        names.sort();
        names
    }

    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Checks that every tensor the decoder needs is there in the shape that `config` gives it, without reading it, and that
    /// none of its modules has a bias that the decoder would leave out.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let expected = tensors(config);
        for (name, shape) in &expected {
            match self.places.get(name) {
                None => return Err(self.missing(name)),
                Some(place) if place.shape != *shape => {
                    return Err(Error::unprocessable(format!(
                        "base weights: {name} has shape {:?}, the configuration says {shape:?}",
                        place.shape
                    )));
                }
                Some(_) => {}
            }
        }
        let extra = |name: &&String| {
            let Some(module) = name.strip_suffix(".bias") else { return false };
            let is_used = module == LM_HEAD || expected.contains_key(&format!("{module}.weight"));
            is_used && !expected.contains_key(*name)
        };
        match self.places.keys().find(extra) {
            Some(name) => Err(Error::unprocessable(format!(
                "base weights: {name} is there, and a {} of this configuration has no such bias",
                config.family
            ))),
            None => Ok(()),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::unprocessable(match self.unreadable.get(name) {
            Some(dtype) => format!("base weights: {name} has dtype {dtype:?}; supported: F32, F16, BF16"),
            None => format!("base weights: the file has no tensor {name}"),
        })
    }

    /// A tensor that may not be there.
    pub fn find(&self, name: &str) -> Result<Option<RawTensor<'_>>> {
        match self.places.contains_key(name) || self.unreadable.contains_key(name) {
            true => self.get(name).map(Some),
            false => Ok(None),
        }
    }

    /// Errors name the tensor.
    pub fn get(&self, name: &str) -> Result<RawTensor<'_>> {
        let place = self.places.get(name).ok_or_else(|| self.missing(name))?;
        let bytes = &self.files[place.file][place.bytes.clone()];
        let (shape, stored) = (place.shape.clone(), place.stored);
        let same = RawTensor { shape, stored, bytes: Cow::Borrowed(bytes) };
        Ok(match place.layout {
            Layout::Same => same,
            Layout::Interleaved(heads) => {
                let rows = place.shape.first().copied().unwrap_or(0);
                // A row of a bias is a number, which in a block format has no bytes of its own.
                let whole = rows != 0 && bytes.len().is_multiple_of(rows);
                if place.shape.len() > 2 || !whole || rows % (2 * heads) != 0 {
                    let what = format!(
                        "base weights: {name} of shape {:?} ({stored:?}) is not {heads} heads of even width",
                        place.shape
                    );
                    return Err(Error::unprocessable(what));
                }
                RawTensor { bytes: Cow::Owned(split_halves(bytes, rows, heads)), ..same }
            }
            Layout::Transposed => {
                let (rows, columns) = (place.shape[0], place.shape[1]);
                RawTensor { bytes: Cow::Owned(transpose(bytes, rows, columns)), ..same }
            }
            Layout::LessOne => {
                let numbers = same.to_f32().map_err(|e| e.context(name))?;
                let bytes = numbers.iter().flat_map(|x| (x + 1.0).to_le_bytes()).collect();
                RawTensor { shape: same.shape, stored: Stored::F32, bytes: Cow::Owned(bytes) }
            }
        })
    }
}

/// What the decoder reads, by name, with its shape.
pub fn tensors(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let (names, a, hidden) = (config.family.names(), &config.architecture, config.hidden_size);
    let mut tensors = BTreeMap::new();
    let mut add = |module: &str, shape: &[usize], bias: bool| {
        tensors.insert(format!("{module}.weight"), shape.to_vec());
        if bias {
            tensors.insert(format!("{module}.bias"), shape[..1].to_vec());
        }
    };
    let norm_bias = a.norm == NormKind::Layer;
    add(names.embedding, &[config.vocab_size, hidden], false);
    if let Some(positions) = names.positions {
        add(positions, &[config.context, hidden], false);
    }
    for (_, module, width) in config.norms() {
        add(&module, &[width], norm_bias);
    }
    for module in config.target_modules() {
        add(&module.name, &[module.out_features, module.in_features], a.has_bias(module.projection));
    }
    if config.predicts && !config.tie_word_embeddings {
        add(LM_HEAD, &[config.vocab_size, hidden], false);
    }
    tensors
}

/// The rows of a matrix `[rows, columns]` that lies by columns.
fn transpose(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let size = bytes.len() / (rows * columns).max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        for column in 0..columns {
            out.extend_from_slice(&bytes[(column * rows + row) * size..][..size]);
        }
    }
    out
}

/// Puts the rows of each head from the order of interleaved rope (0, h/2, 1, h/2 + 1, ...) back into that of split
/// halves (0, 1, ..., h/2, h/2 + 1, ...). A row is a run of bytes in any format, or of numbers.
pub fn split_halves<T: Copy>(bytes: &[T], rows: usize, heads: usize) -> Vec<T> {
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

/// The Hugging Face name of a GGUF tensor, and which linear layer it is of; `None` for what is no weight of the decoder.
pub fn hugging_face_name(name: &str, family: Family) -> Result<Option<(String, Option<Projection>)>> {
    let names = family.names();
    let unknown = || {
        Error::unprocessable(format!("GGUF: {name} belongs to no model of the architecture {family} that is supported"))
    };
    // What becomes of rope, which is read with the configuration.
    if matches!(name, "rope_freqs.weight" | "rope_factors_short.weight" | "rope_factors_long.weight") {
        return Ok(None);
    }
    let (module, kind) =
        name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias")).ok_or_else(unknown)?;
    let Some((layer, module)) = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        let module = match module {
            "token_embd" => names.embedding,
            "position_embd" => names.positions.ok_or_else(unknown)?,
            "output_norm" => names.norm,
            "output" => LM_HEAD,
            _ => return Err(unknown()),
        };
        return Ok(Some((format!("{module}.{kind}"), None)));
    };
    let [q_norm, k_norm] = names.head_norms.map_or([None, None], |names| names.map(Some));
    let projections = match module {
        "attn_q" => &[Projection::Q][..],
        "attn_k" => &[Projection::K],
        "attn_v" => &[Projection::V],
        "attn_qkv" => &[Projection::Qkv],
        "attn_output" => &[Projection::O],
        "ffn_gate" => &[Projection::Gate],
        "ffn_up" => &[Projection::Up, Projection::GateUp],
        "ffn_down" => &[Projection::Down],
        _ => &[],
    };
    let found = names.projections.iter().find(|(projection, _)| projections.contains(projection));
    let path = match module {
        "attn_norm" => Some(names.attention_norm),
        "post_attention_norm" => names.attention_post_norm,
        "ffn_norm" => Some(names.mlp_norm),
        "post_ffw_norm" => names.mlp_post_norm,
        "attn_q_norm" => q_norm,
        "attn_k_norm" => k_norm,
        // Frequencies of rope, which follow from the metadata.
        "attn_rot_embd" => return Ok(None),
        _ => found.map(|(_, path)| *path),
    };
    let layer: usize = layer.parse().map_err(|_| unknown())?;
    let name = format!("{}.{layer}.{}", names.layers, path.ok_or_else(unknown)?);
    Ok(Some((format!("{name}.{kind}"), found.map(|(projection, _)| *projection))))
}

#[cfg(test)]
mod tests {
    use super::super::family::Architecture;
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
    fn a_bias_in_blocks_is_an_error() {
        for (dtype, size) in [(GgmlDType::Q4_0, 18), (GgmlDType::Q8_0, 34)] {
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, &vec![0; size]).unwrap();
            // SAFETY: nobody else has the file.
            let map = unsafe { Mmap::map(&file) }.unwrap();
            let place = Place {
                file: 0,
                shape: vec![32],
                stored: dtype.into(),
                bytes: 0..size,
                layout: Layout::Interleaved(2),
            };
            let places = HashMap::from([("bias".to_string(), place)]);
            let weights = Weights { files: vec![map], places, unreadable: HashMap::new() };
            assert!(weights.get("bias").err().unwrap().message.contains("not 2 heads"), "{dtype:?}");
        }
    }

    #[test]
    fn names_of_gguf_tensors_that_nobody_reads_are_refused() {
        let named = |name| hugging_face_name(name, Family::Llama);
        assert!(named("rope_freqs.weight").unwrap().is_none());
        for name in ["blk.0.attn_q.scale", "cls.weight", "blk.0.attn_sinks.weight", "token_embd"] {
            assert!(named(name).unwrap_err().message.contains(name));
        }
    }

    #[test]
    fn gguf_and_shards_give_the_same_numbers_by_the_same_names() {
        let whole = Weights::open_directory(&tiny(), Family::Llama).unwrap();
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
        let text = std::fs::read_to_string(tiny().join("config.json")).unwrap();
        let from_gguf = Weights::from_gguf(map, &gguf, &ModelConfig::from_json(&text).unwrap()).unwrap();

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
        let sharded = Weights::open_directory(folder.path(), Family::Llama).unwrap();

        for other in [from_gguf, sharded] {
            assert_eq!(other.names(), names);
            for name in &names {
                let (a, b) = (whole.get(name).unwrap(), other.get(name).unwrap());
                assert_eq!((a.shape.clone(), a.to_f32().unwrap()), (b.shape.clone(), b.to_f32().unwrap()), "{name}");
            }
        }
    }

    #[test]
    fn tensors_that_are_missing_or_of_another_shape_are_named() {
        let text = std::fs::read_to_string(tiny().join("config.json")).unwrap();
        let config = ModelConfig::from_json(&text).unwrap();
        let weights = Weights::open_directory(&tiny(), Family::Llama).unwrap();
        weights.check(&config).unwrap();
        for (wrong, name) in [
            (ModelConfig { layers: 3, ..config.clone() }, "no tensor model.layers.2.input_layernorm.weight"),
            (ModelConfig { vocab_size: 257, ..config.clone() }, "model.embed_tokens.weight has shape [256, 64]"),
            (
                ModelConfig { kv_heads: 4, ..config.clone() },
                "model.layers.0.self_attn.k_proj.weight has shape [32, 64]",
            ),
            (ModelConfig { tie_word_embeddings: false, ..config.clone() }, "no tensor lm_head.weight"),
        ] {
            let error = weights.check(&wrong).unwrap_err().message;
            assert!(error.contains(name), "{error}");
        }
    }

    /// Writes f32 tensors, and one of booleans, and opens them.
    fn written(family: Family, tensors: &[(&str, &[usize], &[f32])]) -> Weights {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(_, _, data)| data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let view =
            |dtype, shape: &[usize], bytes| safetensors::tensor::TensorView::new(dtype, shape.into(), bytes).unwrap();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), b)| (*name, view(Dtype::F32, shape, b)));
        let views = views.chain([("h.0.attn.bias", view(Dtype::BOOL, &[2], &[0, 1]))]);
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        Weights::open_directory(folder.path(), family).unwrap()
    }

    #[test]
    fn gpt2s_weights_are_turned_and_named_in_full() {
        let tensors: [(&str, &[usize], &[f32]); 3] = [
            ("h.0.mlp.c_fc.weight", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            ("h.0.ln_1.weight", &[2], &[7.0, 8.0]),
            ("wte.weight", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ];
        let weights = written(Family::Gpt2, &tensors);
        let get = |name: &str| {
            weights.get(&format!("transformer.{name}")).map(|raw| (raw.shape.clone(), raw.to_f32().unwrap()))
        };
        assert_eq!(get("h.0.mlp.c_fc.weight").unwrap(), (vec![3, 2], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        assert_eq!(get("h.0.ln_1.weight").unwrap(), (vec![2], vec![7.0, 8.0]));
        assert_eq!(get("wte.weight").unwrap(), (vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        // A mask that some files hold is no obstacle, until somebody wants it.
        let error = get("h.0.attn.bias").err().unwrap().message;
        assert!(error.contains("transformer.h.0.attn.bias has dtype BOOL"), "{error}");
    }

    #[test]
    fn gemmas_norms_are_given_out_with_the_one_that_they_lack() {
        let weights =
            written(Family::Gemma2, &[("model.norm.weight", &[2], &[-0.5, 0.25]), ("lm_head.weight", &[1, 1], &[2.0])]);
        assert_eq!(weights.get("model.norm.weight").unwrap().to_f32().unwrap(), [0.5, 1.25]);
        assert_eq!(weights.get("lm_head.weight").unwrap().to_f32().unwrap(), [2.0]);
    }

    #[test]
    fn a_bias_that_would_be_left_out_is_refused() {
        let text = std::fs::read_to_string(tiny().join("config.json")).unwrap();
        let config = ModelConfig::from_json(&text).unwrap();
        let mut weights = Weights::open_directory(&tiny(), Family::Llama).unwrap();
        for module in ["model.layers.1.mlp.up_proj", "model.layers.0.input_layernorm", "lm_head"] {
            let place = Place { file: 0, shape: vec![1], stored: Stored::F32, bytes: 0..4, layout: Layout::Same };
            let name = format!("{module}.bias");
            weights.places.insert(name.clone(), place);
            let error = weights.check(&config).unwrap_err().message;
            assert!(error.contains(&name) && error.contains("no such bias"), "{error}");
            weights.places.remove(&name);
        }
        let biased =
            ModelConfig { architecture: Architecture { qkv_bias: true, ..config.architecture.clone() }, ..config };
        let error = weights.check(&biased).unwrap_err().message;
        assert!(error.contains("no tensor model.layers.0.self_attn.k_proj.bias"), "{error}");
    }

    #[test]
    fn every_block_format_gives_back_what_was_quantised() {
        let values: Vec<f32> = (0..512).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let tensor = candle_core::Tensor::from_slice(&values, (2, 256), &Device::Cpu).unwrap();
        use GgmlDType::*;
        let bits = [
            (Q4_0, 4),
            (Q4_1, 4),
            (Q5_0, 5),
            (Q5_1, 5),
            (Q8_0, 8),
            (Q2K, 2),
            (Q3K, 3),
            (Q4K, 4),
            (Q5K, 5),
            (Q6K, 6),
            (Q8K, 8),
        ];
        for (dtype, bits) in bits {
            let quantised = QTensor::quantize(&tensor, dtype).unwrap();
            let raw = |bytes: &[u8]| RawTensor {
                shape: vec![2, 256],
                stored: Stored::Ggml(dtype),
                bytes: Cow::Owned(bytes.to_vec()),
            };
            let bytes = quantised.data().unwrap().into_owned();
            let error = raw(&bytes[1..]).to_f32().unwrap_err().message;
            assert!(error.contains("[2, 256]"), "{error}");
            let got = raw(&bytes).to_f32().unwrap();
            let worst = got.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // The range is -1 to 1. Formats without an offset clip one end by up to a step.
            let step = 2.0 / ((1 << bits) - 1) as f32;
            assert!(got.len() == 512 && worst < 1.1 * step, "{dtype:?}: {worst}, step {step}");
        }
    }

    #[test]
    fn shards_that_lack_or_repeat_a_tensor_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let shard = |file: &str, name: &str| {
            let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
            std::fs::write(folder.path().join(file), safetensors::serialize([(name, view)], None).unwrap()).unwrap();
        };
        let refusal = |map: Value| {
            let index = serde_json::json!({ "weight_map": map }).to_string();
            std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
            Weights::open_directory(folder.path(), Family::Llama).err().unwrap().message
        };
        shard("1.safetensors", "a");
        shard("2.safetensors", "a");
        let map = serde_json::json!({ "a": "1.safetensors", "b": "1.safetensors" });
        assert!(refusal(map).contains("no shard holds b"));
        let map = serde_json::json!({ "a": "1.safetensors", "b": "2.safetensors" });
        assert!(refusal(map).contains("a is in another shard too"));
        let map = serde_json::json!({ "a": "../1.safetensors" });
        assert!(refusal(map).contains("../1.safetensors"));
        assert!(refusal(serde_json::json!({ "a": "3.safetensors" })).contains("3.safetensors"));
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(tiny().join("model.safetensors")).unwrap();
        for end in [0, 7, 100, bytes.len() - 1] {
            std::fs::write(folder.path().join("model.safetensors"), &bytes[..end]).unwrap();
            let error = Weights::open_directory(folder.path(), Family::Llama).err().unwrap();
            assert!(error.message.contains("model.safetensors"), "{error}");
        }
    }
}
