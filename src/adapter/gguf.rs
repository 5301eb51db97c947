//! A LoRA adapter in a GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it.
//!
//! The file is read whole: its tensors lie in any order, and adapters are small.

use std::borrow::Cow;
use std::io::Read;
use std::path::Path;

use crate::adapter::config::MAX_RANK;
use crate::adapter::files::{GGUF, adapter_files, open_at};
use crate::adapter::generation::GenerationHasher;
use crate::adapter::tensors::{PREFIX, TensorInfo, check_finite};
use crate::base::{Family, Gguf, Meta, Projection, RawTensor, Stored, hugging_face_name, split_halves};
use crate::error::shorten;
use crate::{Error, Result};

/// Most metadata values and tensors of a file: more than two a linear layer of the largest models.
const MAX_VALUES: u64 = 1 << 16;
/// Largest file that is read.
const MAX_FILE: u64 = 4 << 30;

/// A pair's module and rank.
pub(super) struct Pair {
    pub module: String,
    pub rank: usize,
}

pub(super) struct GgufFile {
    bytes: Vec<u8>,
    /// `general.architecture`.
    pub architecture: Family,
    /// `adapter.lora.alpha`; 0 stands for a scale of 1.
    pub alpha: f64,
    pub pairs: Vec<Pair>,
    /// Modules whose own weights are in the file.
    pub saved: Vec<String>,
    tensors: Vec<Tensor>,
}

struct Tensor {
    info: TensorInfo,
    /// Of the embedding, llama.cpp has A by tokens.
    transposed: bool,
    projection: Option<Projection>,
    /// Whether it is a B.
    is_b: bool,
    raw: (Vec<usize>, Stored, std::ops::Range<usize>),
}

impl GgufFile {
    /// `None` where the directory has no GGUF file for an adapter.
    pub fn open(directory: &Path) -> Result<Option<Self>> {
        let files = adapter_files(directory)?;
        let Some(path) = files.get(GGUF) else { return Ok(None) };
        let Some((file, length)) = open_at(path, GGUF)? else { return Ok(None) };
        if length > MAX_FILE {
            return Err(bad(format!("it has {length} bytes; at most {MAX_FILE} are read")));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::internal(format!("{GGUF} could not be read: {e}")))?;
        Self::parse(bytes).map(Some)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self> {
        let gguf = Gguf::read_up_to(&bytes, MAX_VALUES).map_err(|e| bad(e.message))?;
        let text = |key: &str| gguf.meta.get(key).and_then(Meta::as_str);
        for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
            if text(key) != Some(expected) {
                let found = gguf.meta.get(key).map_or("missing".into(), |found| format!("{found}"));
                return Err(bad(format!("{key} is {}; expected {expected:?}", shorten(&found, 100))));
            }
        }
        if gguf.meta.contains_key("adapter.alora.invocation_tokens") {
            return Err(bad("adapter.alora.invocation_tokens is set: activated LoRA is not supported"));
        }
        let name = text("general.architecture").unwrap_or_default();
        let known = || Family::all_in_gguf().map(Family::name).collect::<Vec<_>>().join(", ");
        let architecture = Family::all_in_gguf()
            .find(|family| family.name() == name)
            .ok_or_else(|| bad(format!("general.architecture is {:?}; supported: {}", shorten(name, 100), known())))?;
        if architecture.transposes_linear() {
            // Its matrices lie the other way round, and the converter turns the pairs with them.
            return Err(bad(format!("general.architecture is {name:?}, for which only PEFT's files are supported")));
        }
        let alpha = gguf.meta.get("adapter.lora.alpha").and_then(Meta::as_f64).filter(|alpha| alpha.is_finite());
        let alpha = alpha.ok_or_else(|| bad("adapter.lora.alpha is missing or no finite number"))?;
        let mut file = GgufFile { bytes: vec![], architecture, alpha, pairs: vec![], saved: vec![], tensors: vec![] };
        let mut places: Vec<_> = gguf.tensors.into_iter().collect();
        places.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, place) in places {
            let (module, ending) = match name.strip_suffix(".lora_a") {
                Some(whole) => (whole, Some(false)),
                None => name.strip_suffix(".lora_b").map_or((name.as_str(), None), |whole| (whole, Some(true))),
            };
            let shown = shorten(&name, 200);
            let (weight, projection) = hugging_face_name(module, architecture)
                .map_err(|e| bad(e.message))?
                .ok_or_else(|| bad(format!("the tensor {shown} is none of an adapter for {architecture}")))?;
            let module = weight.strip_suffix(".weight").unwrap_or(&weight).to_string();
            let is_embedding = module == architecture.names().embedding;
            let (ending, transposed) = match ending {
                None => ("weight", false),
                Some(false) if is_embedding => ("lora_embedding_A", true),
                Some(true) if is_embedding => ("lora_embedding_B", false),
                Some(false) => ("lora_A.weight", false),
                Some(true) => ("lora_B.weight", false),
            };
            let is_b = name.ends_with(".lora_b");
            if ending != "weight" && place.shape.len() != 2 {
                return Err(bad(format!("the tensor {shown} has shape {:?}; expected two dimensions", place.shape)));
            }
            match (ending, is_b) {
                ("weight", _) => file.saved.push(module.clone()),
                (_, true) if place.shape[1] > MAX_RANK => {
                    return Err(bad(format!("{shown} has the rank {}; at most {MAX_RANK}", place.shape[1])));
                }
                (_, true) => file.pairs.push(Pair { module: module.clone(), rank: place.shape[1] }),
                (_, false) => {}
            }
            let mut shape = place.shape.clone();
            if transposed {
                shape.reverse();
            }
            let (name, dtype) = (format!("{PREFIX}{module}.{ending}"), format!("{:?}", place.dtype));
            let raw = (place.shape, Stored::from(place.dtype), place.bytes);
            file.tensors.push(Tensor { info: TensorInfo { name, shape, dtype }, transposed, projection, is_b, raw });
        }
        if file.pairs.is_empty() {
            return Err(bad("it has no tensor that ends in .lora_b"));
        }
        file.bytes = bytes;
        Ok(file)
    }

    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors.iter().map(|tensor| tensor.info.clone()).collect()
    }

    /// Whether an adapter for this architecture is one for a base of `family`.
    pub fn is_for(&self, family: Family) -> bool {
        family.in_gguf() == Some(self.architecture)
    }

    /// Hands every tensor's numbers to `each`, in PEFT's order, and the file's bytes to `hasher`. `heads` are those of q
    /// and of k, whose rows a llama file holds in the order of interleaved rope, and are left in without.
    pub fn read(
        self,
        heads: Option<[usize; 2]>,
        hasher: &mut GenerationHasher,
        mut each: impl FnMut(&str, Vec<f32>),
    ) -> Result<()> {
        self.hash(hasher);
        for Tensor { info, transposed, projection, is_b, raw: (shape, stored, bytes) } in &self.tensors {
            let raw =
                RawTensor { shape: shape.clone(), stored: *stored, bytes: Cow::Borrowed(&self.bytes[bytes.clone()]) };
            let mut values = raw.to_f32().map_err(|e| e.context(&info.name))?;
            check_finite(&info.name, &values, 0, shape)?;
            let heads = match (projection, heads) {
                (Some(Projection::Q), Some([heads, _])) | (Some(Projection::K), Some([_, heads])) => Some(heads),
                _ => None,
            };
            if let (Some(heads), true, Family::Llama) = (heads, is_b, self.architecture) {
                if !shape[0].is_multiple_of(2 * heads) {
                    let what =
                        format!("{} has {} rows, which are not {heads} heads of even width", info.name, shape[0]);
                    return Err(bad(what));
                }
                values = split_halves(&values, shape[0], heads);
            }
            if info.name.ends_with("norm.weight") && self.architecture.offsets_norms() {
                // These are written with the 1 that Hugging Face's lack.
                values.iter_mut().for_each(|w| *w -= 1.0);
            }
            if *transposed {
                let (rows, columns) = (shape[0], shape[1]);
                values = (0..columns)
                    .flat_map(|c| (0..rows).map(move |r| (r, c)))
                    .map(|(r, c)| values[r * columns + c])
                    .collect();
            }
            each(&info.name, values);
        }
        Ok(())
    }

    /// Hands the file's bytes to `hasher`.
    pub fn hash(&self, hasher: &mut GenerationHasher) {
        hasher.file(GGUF, self.len());
        hasher.update(&self.bytes);
    }
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::unprocessable(shorten(&format!("{GGUF}: {what}"), 1000))
}
