//! Reads a PEFT directory (`adapter_config.json` + `adapter_model.safetensors`) into a checked [`Adapter`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::Serialize;

use crate::adapter::config::{HEADS, LoraConfig, Modules, Target};
use crate::adapter::files::{CONFIG, PICKLE, read_optional, shorten, steady};
use crate::adapter::generation::GenerationHasher;
use crate::adapter::labels::{self, LABELS_JSON, LABELS_TEXT};
use crate::adapter::tensors::{TensorFile, check_dtype};
use crate::adapter::{Adapter, Generation, Head, LoraPair};
use crate::base::{ModelConfig, Projection};
use crate::{Error, Result};

/// What PEFT puts in front of every module's path.
const PREFIX: &str = "base_model.model.";
/// Most classes of a head.
const MAX_LABELS: usize = 1 << 16;

/// An adapter and what its files said about it.
#[derive(Debug)]
pub struct Loaded {
    pub adapter: Adapter,
    pub summary: Summary,
}

/// What is known of an adapter without its numbers.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Largest rank of its pairs.
    pub rank: usize,
    pub lora_alpha: f64,
    /// Short names of the projections it changes, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    /// Class names, if it has a head.
    pub labels: Option<Vec<String>>,
    /// Trained numbers in it, the head included.
    pub parameters: usize,
    /// Size of the files that matter.
    pub bytes: u64,
}

/// Reads the adapter in `directory` and checks it against the base: every tensor belongs to a module that the base has
/// and the configuration targets, every targeted module has its pair, shapes and dtypes fit, all numbers are finite.
///
/// The weights are read once, a piece at a time; the generation is the hash of exactly the bytes that were read.
/// `base_id` is only used in messages.
pub fn load(directory: &Path, base: &ModelConfig, base_id: &str) -> Result<Loaded> {
    steady(directory, || {
        let fitted = Files::open(directory)?.fit(base, base_id)?;
        let summary = fitted.summary();
        Ok(Loaded { adapter: fitted.read()?, summary })
    })
}

/// Checks all that [`load`] checks but the numbers, which are not read.
pub(super) fn survey(directory: &Path, base: &ModelConfig, base_id: &str) -> Result<Summary> {
    steady(directory, || Ok(Files::open(directory)?.fit(base, base_id)?.summary()))
}

/// The same with the generation, for which the numbers are hashed but not looked at.
pub(super) fn identify(directory: &Path, base: &ModelConfig, base_id: &str) -> Result<(Summary, Generation)> {
    steady(directory, || {
        let fitted = Files::open(directory)?.fit(base, base_id)?;
        let Files { texts, tensors, .. } = fitted.files;
        Ok((fitted.summary, texts.generation(|hasher| tensors.hash(hasher))?))
    })
}

/// An adapter's files with the weights' header read, the weights themselves not.
struct Files {
    texts: Texts,
    config: LoraConfig,
    tensors: TensorFile,
}

/// Files that fit a base, as far as can be told without the weights.
struct Fitted {
    files: Files,
    targets: Vec<Target>,
    /// By tensor name.
    parts: HashMap<String, Part>,
    summary: Summary,
}

impl Files {
    fn open(directory: &Path) -> Result<Self> {
        let texts = Texts::read(directory)?;
        let config = LoraConfig::parse(&texts.config)?;
        Ok(Files { texts, config, tensors: TensorFile::open(directory)? })
    }

    fn bytes(&self) -> u64 {
        self.tensors.len() + self.texts.len()
    }

    fn labels(&self, head_rows: Option<usize>) -> Result<Option<Vec<String>>> {
        match head_rows {
            Some(rows) => self.texts.labels(&self.config, rows).map(Some),
            None => self.texts.refuse_labels().map(|()| None),
        }
    }

    fn fit(self, base: &ModelConfig, base_id: &str) -> Result<Fitted> {
        let places = Places::assign(&self.config, self.tensors.tensors())?;
        let fitting = self.config.targets(base).and_then(|targets| {
            let parts = places.fit(&self.config, &targets, base)?;
            Ok((targets, parts))
        });
        let (targets, parts) = fitting.map_err(|e| explain_base(e, &self.config, base_id))?;
        let changed = |p: &Projection| targets.iter().any(|t| t.module.projection == *p);
        // GPT-2 has two modules of one name.
        let mut names: Vec<String> = vec![];
        for projection in base.family.projections().filter(changed) {
            let name = base.family.short_name(projection);
            if !names.iter().any(|n| n == name) {
                names.push(name.into());
            }
        }
        let summary = Summary {
            rank: targets.iter().map(|t| t.rank).max().unwrap_or(0),
            lora_alpha: self.config.lora_alpha,
            target_modules: names,
            labels: self.labels(places.head_rows()?)?,
            parameters: self.tensors.numbers(),
            bytes: self.bytes(),
        };
        Ok(Fitted { files: self, targets, parts, summary })
    }
}

impl Fitted {
    fn summary(&self) -> Summary {
        self.summary.clone()
    }

    /// Reads the numbers.
    fn read(mut self) -> Result<Adapter> {
        let mut values = HashMap::new();
        let Files { texts, tensors, .. } = self.files;
        let generation = texts.generation(|hasher| {
            tensors.read(hasher, |name, numbers| {
                if let Some(part) = self.parts.remove(name) {
                    values.insert(part, numbers);
                }
            })
        })?;
        let mut take =
            |part: Part| values.remove(&part).ok_or_else(|| Error::internal(format!("{part:?} was not read")));
        let mut pairs = BTreeMap::new();
        for (index, Target { module, rank, scale }) in self.targets.iter().enumerate() {
            let (a, b) = (take(Part::A(index))?, take(Part::B(index))?);
            pairs.insert((module.layer, module.projection), LoraPair { rank: *rank, scale: *scale, a, b });
        }
        let head = match self.summary.labels {
            Some(labels) => Some(Head { weight: take(Part::HeadWeight)?, bias: take(Part::HeadBias).ok(), labels }),
            None => None,
        };
        Ok(Adapter { generation, pairs, head })
    }
}

/// The small files of an adapter.
struct Texts {
    config: Vec<u8>,
    labels_json: Option<Vec<u8>>,
    labels_text: Option<Vec<u8>>,
}

impl Texts {
    fn read(directory: &Path) -> Result<Self> {
        let missing = || {
            let pickle = if directory.join(PICKLE).exists() { " (a pickle alone is not enough)" } else { "" };
            Error::unprocessable(format!("{CONFIG} is missing{pickle}"))
        };
        Ok(Texts {
            config: read_optional(directory, CONFIG)?.ok_or_else(missing)?,
            labels_json: read_optional(directory, LABELS_JSON)?,
            labels_text: read_optional(directory, LABELS_TEXT)?,
        })
    }

    fn len(&self) -> u64 {
        let labels = [&self.labels_json, &self.labels_text].into_iter().flatten().map(Vec::len).sum::<usize>();
        (self.config.len() + labels) as u64
    }

    /// The generation of these texts with the weights that `weights` hands over.
    fn generation(&self, weights: impl FnOnce(&mut GenerationHasher) -> Result<()>) -> Result<Generation> {
        let mut weights = Some(weights);
        GenerationHasher::over_files(|name, hasher| {
            let content = match name {
                CONFIG => Some(&self.config),
                LABELS_JSON => self.labels_json.as_ref(),
                LABELS_TEXT => self.labels_text.as_ref(),
                _ => return weights.take().map_or(Ok(()), |weights| weights(hasher)),
            };
            if let Some(content) = content {
                hasher.file(name, content.len() as u64);
                hasher.update(content);
            }
            Ok(())
        })
    }

    /// The class names of a head of `rows` classes: from a labels file, else `id2label`, else made up.
    fn labels(&self, config: &LoraConfig, rows: usize) -> Result<Vec<String>> {
        let (source, names) = match (&self.labels_json, &self.labels_text) {
            (Some(_), Some(_)) => {
                return Err(Error::unprocessable(format!("both {LABELS_JSON} and {LABELS_TEXT} name the classes")));
            }
            (Some(json), None) => (LABELS_JSON, labels::from_json_file(json)?),
            (None, Some(text)) => (LABELS_TEXT, labels::from_text_file(text)?),
            (None, None) => match &config.id2label {
                Some(names) => ("id2label in adapter_config.json", names.clone()),
                None => return Ok(labels::default_names(rows)),
            },
        };
        if names.len() != rows {
            return Err(Error::unprocessable(format!(
                "{source} names {} classes but the head has {rows} rows",
                names.len()
            )));
        }
        Ok(names)
    }

    fn refuse_labels(&self) -> Result<()> {
        for (name, content) in [(LABELS_JSON, &self.labels_json), (LABELS_TEXT, &self.labels_text)] {
            if content.is_some() {
                return Err(Error::unprocessable(format!(
                    "{name} names classes but the adapter has no classification head (score.weight)"
                )));
            }
        }
        Ok(())
    }
}

/// Where a tensor belongs. The numbers are indices of targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    A(usize),
    B(usize),
    HeadWeight,
    HeadBias,
}

/// What a tensor's name says.
#[derive(Debug, PartialEq)]
enum Name<'a> {
    A(&'a str),
    B(&'a str),
    /// The head's name, and whether it is the bias.
    Head(&'a str, bool),
    Other(&'a str),
}

impl<'a> Name<'a> {
    fn parse(name: &'a str) -> Result<Self> {
        let path = name.strip_prefix(PREFIX).ok_or_else(|| {
            Error::unprocessable(format!("tensor {name}: its name does not begin with \"{PREFIX}\", as PEFT's do"))
        })?;
        // PEFT leaves out the adapter's name, `default`; exports of a raw state dict keep it.
        for (matrix, make) in [("lora_A", Name::A as fn(&'a str) -> Name<'a>), ("lora_B", Name::B)] {
            for ending in ["weight", "default.weight"] {
                let module =
                    path.strip_suffix(ending).and_then(|p| p.strip_suffix('.')).and_then(|p| p.strip_suffix(matrix));
                if let Some(module) = module.and_then(|p| p.strip_suffix('.')) {
                    return Ok(make(module));
                }
            }
        }
        for head in HEADS {
            if let Some(rest) = path.strip_prefix(head).and_then(|p| p.strip_prefix('.')) {
                match rest.strip_prefix("modules_to_save.default.").unwrap_or(rest) {
                    "weight" => return Ok(Name::Head(head, false)),
                    "bias" => return Ok(Name::Head(head, true)),
                    _ => {}
                }
            }
        }
        Ok(Name::Other(path))
    }
}

/// A tensor of the file and its name.
type Named<'a> = (&'a str, &'a TensorInfo);

/// What the tensors are by their names, whatever the base.
#[derive(Default)]
struct Places<'a> {
    /// A and B by the module's name.
    pairs: BTreeMap<&'a str, [Option<Named<'a>>; 2]>,
    /// The head's weight and bias.
    head: [Option<Named<'a>>; 2],
}

impl<'a> Places<'a> {
    fn assign(config: &LoraConfig, tensors: impl Iterator<Item = Named<'a>>) -> Result<Self> {
        let mut places = Places::default();
        let mut head_name: Option<&str> = None;
        for (name, info) in tensors {
            let place = match Name::parse(name)? {
                Name::A(module) => &mut places.pairs.entry(module).or_default()[0],
                Name::B(module) => &mut places.pairs.entry(module).or_default()[1],
                Name::Head(head, bias) => {
                    if !config.saves_head(head) {
                        return Err(Error::unprocessable(format!(
                            "tensor {name} is a classification head, but {CONFIG} has neither {head:?} in \
                             modules_to_save nor task_type \"SEQ_CLS\""
                        )));
                    }
                    if let Some(other) = head_name.replace(head).filter(|other| *other != head) {
                        return Err(Error::unprocessable(format!(
                            "tensor {name}: there are two classification heads, {other:?} and {head:?}; expected one"
                        )));
                    }
                    &mut places.head[bias as usize]
                }
                Name::Other(path) => return Err(unknown(name, path)),
            };
            check_dtype(name, info.dtype)?;
            if let Some((other, _)) = place.replace((name, info)) {
                return Err(Error::unprocessable(format!(
                    "tensors {other} and {name} are the same one under two names"
                )));
            }
        }
        match places.head {
            [None, Some((name, _))] => {
                Err(Error::unprocessable(format!("tensor {name}: the head has a bias but no weight")))
            }
            [None, None] if config.is_sequence_classification() => Err(Error::unprocessable(format!(
                "task_type is \"SEQ_CLS\" but the file has no classification head; expected the tensor \
                 {PREFIX}score.weight"
            ))),
            _ => Ok(places),
        }
    }

    /// Gives every tensor its part in the targets, by names and shapes alone.
    fn fit(&self, config: &LoraConfig, targets: &[Target], base: &ModelConfig) -> Result<HashMap<String, Part>> {
        let mut parts = HashMap::new();
        let targeted: HashSet<&str> = targets.iter().map(|t| t.module.name.as_str()).collect();
        if let Some((module, pair)) = self.pairs.iter().find(|(module, _)| !targeted.contains(*module)) {
            let name = pair.iter().flatten().next().map_or(*module, |(name, _)| name);
            return Err(stray(name, module, config, base));
        }
        for (index, Target { module, rank, .. }) in targets.iter().enumerate() {
            let because = format!(
                "rank {rank}, the module {} maps {} to {}",
                module.name, module.in_features, module.out_features
            );
            let [a, b] = self.pairs.get(module.name.as_str()).copied().unwrap_or_default();
            for (found, part, matrix, expected) in [
                (a, Part::A(index), "lora_A", [*rank, module.in_features]),
                (b, Part::B(index), "lora_B", [module.out_features, *rank]),
            ] {
                let Some((name, info)) = found else {
                    return Err(Error::unprocessable(format!(
                        "tensor {PREFIX}{}.{matrix}.weight is missing; {CONFIG} targets this module ({because})",
                        module.name
                    )));
                };
                check_shape(name, &info.shape, &expected, &because)?;
                parts.insert(name.to_string(), part);
            }
        }
        if let (Some(rows), [Some((name, info)), bias]) = (self.head_rows()?, self.head) {
            check_shape(name, &info.shape, &[rows, base.hidden_size], "classes × the base's hidden size")?;
            parts.insert(name.to_string(), Part::HeadWeight);
            if let Some((name, _)) = bias {
                parts.insert(name.to_string(), Part::HeadBias);
            }
        }
        Ok(parts)
    }

    /// Refuses pairs that fit no base: both matrices are there, and their ranks agree.
    fn check_pairs(&self) -> Result<()> {
        for (module, pair) in &self.pairs {
            let (a, b) = match pair {
                [Some(a), Some(b)] => (a, b),
                [a, b] => {
                    let missing = if a.is_none() { "lora_A" } else { "lora_B" };
                    let there = a.or(*b).map_or("", |(name, _)| name);
                    return Err(Error::unprocessable(format!(
                        "tensor {PREFIX}{module}.{missing}.weight is missing, but {there} is there"
                    )));
                }
            };
            match (&a.1.shape[..], &b.1.shape[..]) {
                ([rank, _], [_, other]) if rank == other => {}
                (found, other) => {
                    return Err(Error::unprocessable(format!(
                        "tensor {} has shape {found:?} and {} has shape {other:?}; expected [rank, inputs] and \
                         [outputs, rank]",
                        a.0, b.0
                    )));
                }
            }
        }
        Ok(())
    }

    /// Classes of the head, if there is one.
    fn head_rows(&self) -> Result<Option<usize>> {
        let [Some((name, info)), bias] = self.head else { return Ok(None) };
        let rows = info.shape.first().copied().unwrap_or(0);
        if rows == 1 {
            return Err(Error::unprocessable(format!(
                "tensor {name} has one row: a head for regression or a reward model, which is not supported; expected \
                 a row for each of two classes or more"
            )));
        }
        if !(2..=MAX_LABELS).contains(&rows) || info.shape.len() != 2 {
            return Err(Error::unprocessable(format!(
                "tensor {name} has shape {:?}; expected [2 to {MAX_LABELS} classes, the base's hidden size]",
                info.shape
            )));
        }
        if let Some((name, info)) = bias {
            check_shape(name, &info.shape, &[rows], "one a class")?;
        }
        Ok(Some(rows))
    }
}

fn check_shape(name: &str, found: &[usize], expected: &[usize], because: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::unprocessable(format!("tensor {name} has shape {found:?}; expected {expected:?} ({because})")))
}

/// A LoRA tensor of a module that is not targeted.
fn stray(name: &str, module: &str, config: &LoraConfig, base: &ModelConfig) -> Error {
    let layer =
        module.strip_prefix(base.family.names().layers).and_then(|rest| rest.split('.').nth(1)?.parse::<usize>().ok());
    Error::unprocessable(match layer {
        Some(layer) if layer >= base.layers => {
            format!("tensor {name} belongs to layer {layer}, but the base has the layers 0 to {}", base.layers - 1)
        }
        _ if base.target_modules().iter().any(|m| m.name == module) => format!(
            "tensor {name} is for a module that {CONFIG} does not target (target_modules {})",
            config.target_modules
        ),
        _ => format!(
            "tensor {name} is for the module {module}, which is not a linear layer of the base's decoder layers"
        ),
    })
}

/// A tensor that is neither of a LoRA pair nor of a head.
fn unknown(name: &str, path: &str) -> Error {
    let what = if path.contains("lora_magnitude_vector") {
        "DoRA is not supported"
    } else if path.contains(".lora_") && path.ends_with(".bias") {
        "a bias of a LoRA matrix (lora_bias) is not supported"
    } else if path.contains("lora_embedding") || path.contains("embed_tokens") || path.contains("lm_head") {
        "changed embeddings are not supported"
    } else {
        "expected only lora_A and lora_B weights and a classification head"
    };
    Error::unprocessable(format!("tensor {name}: {what}"))
}

/// Tells of the other base where the adapter names one. Names differ for good reasons, so alone that is no error.
fn explain_base(error: Error, config: &LoraConfig, base_id: &str) -> Error {
    let Some(made_for) = config.base_model.as_deref().filter(|name| !base_id.is_empty() && *name != base_id) else {
        return error;
    };
    let made_for = shorten(made_for, 200);
    let message = format!("{} (the adapter was made for {made_for:?}; the base is {base_id:?})", error.message);
    Error { message, ..error }
}

/// What an adapter's files say, for people.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    pub generation: Generation,
    /// Size of the files that matter.
    pub bytes: u64,
    pub base_model: Option<String>,
    pub task_type: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    pub use_rslora: bool,
    pub target_modules: Modules,
    /// Class names, if it has a head.
    pub labels: Option<Vec<String>>,
    pub parameters: usize,
    pub tensors: Vec<TensorSummary>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorSummary {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
}

/// Looks at the adapter in `directory`. With a base it is fully checked against it; without, everything is checked that
/// does not depend on the base.
pub fn inspect(directory: &Path, base: Option<&ModelConfig>) -> Result<Inspection> {
    steady(directory, || {
        let files = Files::open(directory)?;
        let (files, labels) = match base {
            Some(base) => {
                let fitted = files.fit(base, "")?;
                (fitted.files, fitted.summary.labels)
            }
            None => {
                let places = Places::assign(&files.config, files.tensors.tensors())?;
                places.check_pairs()?;
                let labels = files.labels(places.head_rows()?)?;
                (files, labels)
            }
        };
        let summaries = files.tensors.tensors().map(|(name, info)| TensorSummary {
            name: name.to_string(),
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
        });
        let (summaries, parameters, bytes) = (summaries.collect(), files.tensors.numbers(), files.bytes());
        let Files { texts, config, tensors } = files;
        Ok(Inspection {
            generation: texts.generation(|hasher| tensors.read(hasher, |_, _| {}))?,
            bytes,
            base_model: config.base_model,
            task_type: config.task_type,
            r: config.r,
            lora_alpha: config.lora_alpha,
            use_rslora: config.use_rslora,
            target_modules: config.target_modules,
            labels,
            parameters,
            tensors: summaries,
        })
    })
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use serde_json::json;

    use super::*;
    use crate::ErrorKind;
    use crate::adapter::files::WEIGHTS;
    use crate::adapter::testing::{Files, Tensor, adapter, classifier, fixtures, tiny};
    use crate::adapter::{Adapter, generation_of};

    fn read(files: &Files) -> Result<Loaded> {
        load(files.folder().path(), &tiny(), "tiny")
    }

    /// The message of an adapter that must be refused.
    fn refused(files: &Files) -> String {
        let error = read(files).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unprocessable, "{error}");
        error.message
    }

    fn name(rest: &str) -> String {
        format!("base_model.model.model.layers.{rest}")
    }

    #[test]
    fn numbers_shapes_and_scale_arrive() {
        let files = adapter(1);
        let folder = files.folder();
        let loaded = load(folder.path(), &tiny(), "tiny").unwrap();
        let Adapter { generation, pairs, head } = &loaded.adapter;
        assert_eq!(*generation, generation_of(folder.path()).unwrap());
        assert!(head.is_none());
        assert_eq!(
            pairs.keys().copied().collect::<Vec<_>>(),
            [(0, Projection::Q), (0, Projection::V), (1, Projection::Q), (1, Projection::V)]
        );
        let pair = &pairs[&(1, Projection::V)];
        assert_eq!((pair.rank, pair.scale, pair.a.len(), pair.b.len()), (2, 2.0, 16, 12));
        assert_eq!((pair.a[3], pair.b[11]), (1103.0 / 8.0, 1111.0 / 8.0));
        assert_eq!(
            (loaded.summary.rank, loaded.summary.target_modules),
            (2, vec!["q_proj".to_string(), "v_proj".into()])
        );
        let size: u64 = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(loaded.summary.bytes, size);
    }

    #[test]
    fn half_precision_is_widened_and_other_dtypes_are_named() {
        let key = name("0.self_attn.q_proj.lora_A.weight");
        for (dtype, one) in [(Dtype::F16, [0x00, 0x3c]), (Dtype::BF16, [0x80, 0x3f])] {
            let mut files = adapter(1);
            files.tensors.insert(key.clone(), Tensor { dtype, shape: vec![2, 8], bytes: one.repeat(16) });
            assert_eq!(read(&files).unwrap().adapter.pairs[&(0, Projection::Q)].a, vec![1.0; 16]);
        }
        let mut files = adapter(1);
        files.tensors.insert(key.clone(), Tensor { dtype: Dtype::F64, shape: vec![2, 8], bytes: vec![0; 128] });
        let message = refused(&files);
        assert!(message.contains(&key) && message.contains("F64") && message.contains("BF16"), "{message}");
    }

    #[test]
    fn tensors_larger_than_a_piece_are_read_whole() {
        let base = ModelConfig { hidden_size: 40_000, ..tiny() };
        let mut files = adapter(1);
        files.config["target_modules"] = json!(["layers.0.self_attn.q_proj"]);
        files.tensors.clear();
        let a = Tensor::f32(&[2, 40_000], |i| i as f32);
        files.tensors.insert(name("0.self_attn.q_proj.lora_A.weight"), a);
        files.tensors.insert(name("0.self_attn.q_proj.lora_B.weight"), Tensor::f32(&[12, 2], |_| 1.0));
        let folder = files.folder();
        let loaded = load(folder.path(), &base, "tiny").unwrap();
        let expected: Vec<f32> = (0..80_000).map(|i| i as f32).collect();
        assert_eq!(loaded.adapter.pairs[&(0, Projection::Q)].a, expected);
        assert_eq!(loaded.adapter.generation, generation_of(folder.path()).unwrap());
    }

    #[test]
    fn ranks_and_alphas_by_pattern_decide_shapes_and_scales() {
        let mut files = adapter(1);
        files.config["rank_pattern"] = json!({"v_proj": 3});
        files.config["alpha_pattern"] = json!({"layers.1.self_attn.v_proj": 6});
        let message = refused(&files);
        assert!(message.contains("v_proj.lora_A.weight has shape [2, 8]; expected [3, 8]"), "{message}");
        for layer in 0..2 {
            let module = name(&format!("{layer}.self_attn.v_proj"));
            files.tensors.insert(format!("{module}.lora_A.weight"), Tensor::f32(&[3, 8], |i| i as f32));
            files.tensors.insert(format!("{module}.lora_B.weight"), Tensor::f32(&[6, 3], |i| i as f32));
        }
        let pairs = read(&files).unwrap().adapter.pairs;
        let found: Vec<(usize, f32)> = pairs.values().map(|p| (p.rank, p.scale)).collect();
        assert_eq!(found, [(2, 2.0), (3, 4.0 / 3.0), (2, 2.0), (3, 2.0)]);
    }

    #[test]
    fn a_head_travels_with_its_labels() {
        let head = |files: &Files| read(files).unwrap().adapter.head.unwrap();
        let mut files = classifier(1);
        let found = head(&files);
        assert_eq!(found.labels, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        assert_eq!((found.weight.len(), found.weight[23], found.bias), (24, 23.0, None));

        files.config["id2label"] = json!({"0": "a", "1": "b", "2": "c"});
        files.tensors.insert("base_model.model.score.bias".into(), Tensor::f32(&[3], |i| i as f32));
        let found = head(&files);
        assert_eq!((found.labels, found.bias), (vec!["a".into(), "b".into(), "c".into()], Some(vec![0.0, 1.0, 2.0])));

        let folder = files.folder();
        std::fs::write(folder.path().join("labels.txt"), "x\ny\nz\n").unwrap();
        let loaded = load(folder.path(), &tiny(), "tiny").unwrap();
        assert_eq!(loaded.adapter.head.unwrap().labels, ["x", "y", "z"]);
        assert_eq!(loaded.adapter.generation, generation_of(folder.path()).unwrap());
        std::fs::write(folder.path().join("labels.txt"), "x\ny\n").unwrap();
        let message = load(folder.path(), &tiny(), "tiny").unwrap_err().message;
        assert!(message.contains("labels.txt names 2 classes but the head has 3 rows"), "{message}");
        std::fs::write(folder.path().join("labels.json"), "[]").unwrap();
        let message = load(folder.path(), &tiny(), "tiny").unwrap_err().message;
        assert!(message.contains("both labels.json and labels.txt"), "{message}");
    }

    #[test]
    fn names_of_a_raw_state_dict_and_of_older_versions_are_read() {
        let mut files = classifier(1);
        files.config["modules_to_save"] = json!(null);
        files.tensors = files
            .tensors
            .into_iter()
            .map(|(name, t)| {
                let name = name.replace("lora_A.weight", "lora_A.default.weight");
                (name.replace("score.weight", "classifier.modules_to_save.default.weight"), t)
            })
            .collect();
        assert_eq!(read(&files).unwrap().adapter.pairs.len(), 4);
    }

    #[test]
    fn heads_that_do_not_fit_are_refused() {
        let score = "base_model.model.score.weight".to_string();
        let with = |tensor: Tensor| {
            let mut files = classifier(1);
            files.tensors.insert(score.clone(), tensor);
            refused(&files)
        };
        assert!(with(Tensor::f32(&[3, 9], |_| 0.0)).contains("has shape [3, 9]; expected [3, 8]"));
        assert!(with(Tensor::f32(&[24], |_| 0.0)).contains("has shape [24]; expected [2 to"));
        assert!(with(Tensor::f32(&[0, 8], |_| 0.0)).contains("has shape [0, 8]"));
        // The probability of one class is always 1.
        let message = with(Tensor::f32(&[1, 8], |_| 0.0));
        assert!(message.contains("score.weight has one row") && message.contains("not supported"), "{message}");
        let mut files = classifier(1);
        files.tensors.insert("base_model.model.score.bias".into(), Tensor::f32(&[2], |_| 0.0));
        assert!(refused(&files).contains("score.bias has shape [2]; expected [3]"));
        let head = files.tensors.remove(&score).unwrap();
        assert!(refused(&files).contains("bias but no weight"));
        files.tensors.remove("base_model.model.score.bias");
        assert!(refused(&files).contains("SEQ_CLS"));
        files.tensors.insert(score.clone(), head.clone());
        files.tensors.insert("base_model.model.classifier.weight".into(), head.clone());
        assert!(refused(&files).contains("two classification heads"));
        let mut files = adapter(1);
        files.tensors.insert(score, head);
        assert!(refused(&files).contains("modules_to_save"));
        let folder = adapter(1).folder();
        std::fs::write(folder.path().join("labels.json"), r#"["a"]"#).unwrap();
        assert!(load(folder.path(), &tiny(), "").unwrap_err().message.contains("no classification head"));
    }

    #[test]
    fn tensors_that_do_not_belong_are_named() {
        let tensor = Tensor::f32(&[2, 8], |_| 0.0);
        for (tensor_name, expected) in [
            (name("2.self_attn.q_proj.lora_A.weight"), "layer 2, but the base has the layers 0 to 1"),
            (name("0.self_attn.k_proj.lora_A.weight"), "does not target"),
            (name("0.self_attn.qkv_proj.lora_A.weight"), "not a linear layer"),
            ("base_model.model.lm_head.lora_A.weight".into(), "not a linear layer"),
            (name("0.self_attn.q_proj.lora_magnitude_vector"), "DoRA"),
            (name("0.self_attn.q_proj.lora_B.bias"), "bias"),
            ("base_model.model.model.embed_tokens.lora_embedding_A".into(), "embeddings"),
            ("base_model.model.model.norm.weight".into(), "expected only"),
            ("model.layers.0.self_attn.q_proj.lora_A.weight".into(), "does not begin with"),
            (name("0.self_attn.q_proj.lora_A.default.weight"), "under two names"),
        ] {
            let mut files = adapter(1);
            files.tensors.insert(tensor_name.clone(), tensor.clone());
            let message = refused(&files);
            assert!(message.contains(&tensor_name) && message.contains(expected), "{message}");
        }
    }

    #[test]
    fn missing_tensors_and_wrong_ranks_are_named() {
        let key = name("1.self_attn.v_proj.lora_B.weight");
        let mut files = adapter(1);
        files.tensors.remove(&key);
        assert!(refused(&files).contains(&format!("tensor {key} is missing")));
        let mut files = adapter(1);
        files.config["target_modules"] = json!(["q_proj", "v_proj", "k_proj"]);
        assert!(refused(&files).contains("layers.0.self_attn.k_proj.lora_A.weight is missing"));
        let mut files = adapter(1);
        files.config["r"] = json!(4);
        let message = refused(&files);
        assert!(message.contains("q_proj.lora_A.weight has shape [2, 8]; expected [4, 8] (rank 4"), "{message}");
    }

    #[test]
    fn the_other_base_is_told_when_something_does_not_fit() {
        let mut files = adapter(1);
        files.config["base_model_name_or_path"] = json!("big/model");
        read(&files).unwrap();
        files.config["r"] = json!(4);
        let message = refused(&files);
        assert!(message.contains("made for \"big/model\"") && message.contains("\"tiny\""), "{message}");
    }

    #[test]
    fn numbers_that_are_not_finite_are_found() {
        for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let mut files = adapter(1);
            let key = name("0.self_attn.v_proj.lora_B.weight");
            files.tensors.insert(key.clone(), Tensor::f32(&[6, 2], |i| if i == 7 { bad } else { 0.0 }));
            let message = refused(&files);
            assert!(message.contains(&format!("{key}: the value at [3, 1] is {shown}")), "{message}");
        }
        let mut files = adapter(1);
        let bytes = [[0, 0x7c], [0, 0]].concat().repeat(8);
        files
            .tensors
            .insert(name("0.self_attn.q_proj.lora_A.weight"), Tensor { dtype: Dtype::F16, shape: vec![2, 8], bytes });
        assert!(refused(&files).contains("at [0, 0] is inf"));
    }

    /// The message for these bytes as the weights of an adapter.
    fn refused_weights(bytes: &[u8]) -> String {
        let folder = adapter(1).folder();
        std::fs::write(folder.path().join(WEIGHTS), bytes).unwrap();
        let error = load(folder.path(), &tiny(), "tiny").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unprocessable, "{error}");
        assert_eq!(inspect(folder.path(), None).unwrap_err().kind, ErrorKind::Unprocessable);
        error.message
    }

    fn with_header(json: &str, data: usize) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat()
    }

    #[test]
    fn the_header_of_a_large_adapter_is_far_below_the_limit() {
        let tensors = (0..128).flat_map(|layer| (0..14).map(move |i| (layer, i))).map(|(layer, i)| {
            let module = name(&format!("{layer}.self_attn.{i:02}_proj.lora_A.default.weight"));
            format!(r#""{module}":{{"dtype":"F32","shape":[4096,131072],"data_offsets":[100000000000,100000000000]}}"#)
        });
        assert!(2 * tensors.map(|t| t.len() + 1).sum::<usize>() < 2 << 20);
    }

    #[test]
    fn malformed_safetensors_are_refused_with_words() {
        let good = adapter(1).weights();
        let tensor = |name: &str, shape: &str, from: usize, to: usize| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let two = |a: String, b: String| with_header(&format!("{{{a},{b}}}"), 8);
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (vec![], "0 bytes"),
            (good[..5].to_vec(), "5 bytes"),
            (good[..100].to_vec(), "header claims"),
            (good[..good.len() - 1].to_vec(), "its header describes"),
            ([&good[..], b"x"].concat(), "its header describes"),
            ([&u64::MAX.to_le_bytes()[..], b"{}"].concat(), "at most"),
            ([&(1u64 << 30).to_le_bytes()[..], b"{}"].concat(), "at most"),
            (with_header("{", 0), "header is not valid"),
            (with_header("[]", 0), "header is not valid"),
            (with_header(&"[".repeat(100_000), 0), "header is not valid"),
            // What takes many times its length when parsed.
            (with_header(&format!("{{\"x\":[{}0]}}", "0,".repeat(1 << 20)), 0), "at most"),
            (with_header(r#"{"x":{"dtype":"F7","shape":[],"data_offsets":[0,1]}}"#, 1), "header is not valid"),
            (two(tensor("a", "[1]", 0, 4), tensor("b", "[1]", 2, 6)), "offset"),
            (two(tensor("a", "[1]", 0, 4), tensor("b", "[1]", 0, 4)), "offset"),
            (two(tensor("a", "[1]", 4, 8), tensor("b", "[1]", 8, 12)), "offset"),
            (two(tensor("a", "[1]", 0, 4), tensor("b", "[1]", 4, 400)), "shape"),
            (with_header(&format!("{{{}}}", tensor("a", "[18446744073709551615,9]", 0, 4)), 4), "overflow"),
            (with_header(&format!("{{{}}}", tensor("a", "[1]", 4, 0)), 4), "offset"),
            (with_header(&format!("{{{}}}", tensor("a", "[-1]", 0, 4)), 4), "header is not valid"),
            ([&8u64.to_le_bytes()[..], &[0xff; 8]].concat(), "UTF-8"),
            (b"PK\x03\x04\x00\x00\x08\x08\x00\x00rest of an archive".to_vec(), "pickle"),
            (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "pickle"),
            (b"version https://git-lfs.github.com/spec/v1".to_vec(), "Git LFS"),
            (b"GGUF\x03\x00\x00\x00rest".to_vec(), "GGUF"),
        ];
        for (bytes, expected) in cases {
            let message = refused_weights(&bytes);
            assert!(message.contains(WEIGHTS) && message.contains(expected), "{expected}: {message}");
        }
    }

    #[test]
    fn every_truncation_of_a_file_is_refused() {
        let good = adapter(1).weights();
        for length in (0..good.len()).step_by(97) {
            refused_weights(&good[..length]);
        }
    }

    #[test]
    fn missing_files_and_pickles_are_told() {
        let folder = adapter(1).folder();
        std::fs::remove_file(folder.path().join(WEIGHTS)).unwrap();
        let message = || load(folder.path(), &tiny(), "").unwrap_err().message;
        assert_eq!(message(), "adapter_model.safetensors is missing");
        std::fs::write(folder.path().join(PICKLE), "x").unwrap();
        assert!(message().contains("adapter_model.bin is a Python pickle"));
        std::fs::create_dir(folder.path().join(WEIGHTS)).unwrap();
        assert!(message().contains("not a regular file"));
        std::fs::remove_file(folder.path().join(CONFIG)).unwrap();
        assert!(message().contains("adapter_config.json is missing"));
        std::fs::write(folder.path().join(CONFIG), vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(message().contains("at most 1048576 are read"));
    }

    #[test]
    fn inspection_needs_no_base() {
        let folder = classifier(1).folder();
        let seen = inspect(folder.path(), None).unwrap();
        assert_eq!(seen.generation, generation_of(folder.path()).unwrap());
        assert_eq!((seen.tensors.len(), seen.labels.as_ref().map(Vec::len), seen.r), (9, Some(3), 2));
        // q: 2×8 and 12×2, v: 2×8 and 6×2, in each of two layers; the head: 3×8.
        assert_eq!(seen.parameters, 2 * (16 + 24 + 16 + 12) + 24);
        assert_eq!(load(folder.path(), &tiny(), "").unwrap().summary.parameters, seen.parameters);
        inspect(folder.path(), Some(&tiny())).unwrap();
        let other = ModelConfig { hidden_size: 16, ..tiny() };
        assert!(inspect(folder.path(), Some(&other)).unwrap_err().message.contains("expected [2, 16]"));
    }

    #[test]
    fn inspection_finds_what_fits_no_base() {
        let message = |files: &Files| inspect(files.folder().path(), None).unwrap_err().message;
        let (a, b) = (name("0.self_attn.q_proj.lora_A.weight"), name("0.self_attn.q_proj.lora_B.weight"));
        let mut files = adapter(1);
        files.tensors.remove(&b);
        assert!(message(&files).contains(&format!("tensor {b} is missing")));
        files.tensors.insert(b.clone(), Tensor::f32(&[12, 3], |_| 0.0));
        assert!(message(&files).contains(&format!("tensor {a} has shape [2, 8] and {b} has shape [12, 3]")));
        let mut files = adapter(1);
        files.config["task_type"] = json!("SEQ_CLS");
        assert!(message(&files).contains("no classification head"));
        files.tensors.insert("base_model.model.score.weight".into(), Tensor::f32(&[1, 8], |_| 0.0));
        assert!(message(&files).contains("one row"));
        let folder = adapter(1).folder();
        std::fs::write(folder.path().join("labels.txt"), "a\nb").unwrap();
        assert!(inspect(folder.path(), None).unwrap_err().message.contains("no classification head"));
    }

    #[test]
    fn surveying_finds_the_same_without_the_numbers() {
        let mut files = classifier(1);
        files.tensors.insert("base_model.model.score.weight".into(), Tensor::f32(&[3, 8], |_| f32::NAN));
        let folder = files.folder();
        let summary = survey(folder.path(), &tiny(), "tiny").unwrap();
        assert_eq!((summary.rank, summary.labels.unwrap().len()), (2, 3));
        let (_, generation) = identify(folder.path(), &tiny(), "tiny").unwrap();
        assert_eq!(generation, generation_of(folder.path()).unwrap());
        assert!(load(folder.path(), &tiny(), "tiny").unwrap_err().message.contains("NaN"));
    }

    #[test]
    fn the_reference_adapters_are_accepted_or_refused_by_name() {
        let directory = fixtures().join("tiny/llama");
        let config = std::fs::read_to_string(directory.join("base/config.json")).unwrap();
        let base = ModelConfig::from_json(&config).unwrap();
        let mut seen = 0;
        for folder in std::fs::read_dir(&directory).unwrap() {
            let folder = folder.unwrap();
            let folder_name = folder.file_name().into_string().unwrap();
            let Some(variant) = folder_name.strip_prefix("adapter_") else { continue };
            seen += 1;
            let result = load(&folder.path(), &base, "tiny-llama");
            let expected = match variant {
                "dora_r4" => Err("use_dora"),
                "lora_bias" => Err("lora_bias"),
                "embed_and_head" => Err("embed_tokens"),
                "modules_to_save_norm" => Err("\"norm\""),
                "qv_r4" => Ok((4, 4, 2.0, 0)),
                "regex_targets" => Ok((4, 4, 2.0, 0)),
                "all_linear" => Ok((14, 4, 2.0, 0)),
                "all_r8" => Ok((14, 8, 2.0, 0)),
                "rslora_r8" => Ok((14, 8, 16.0 / 8f32.sqrt(), 0)),
                "exclude_down" => Ok((12, 4, 2.0, 0)),
                "layers_1_only" => Ok((7, 4, 2.0, 0)),
                "rank_alpha_pattern" => Ok((14, 16, 4.0 / 16.0, 0)),
                "seqcls" => Ok((4, 4, 2.0, 3)),
                other => panic!("unknown variant {other}"),
            };
            match (result, expected) {
                (Ok(loaded), Ok((pairs, rank, scale, labels))) => {
                    let first = loaded.adapter.pairs.values().next().unwrap();
                    let classes = loaded.adapter.head.as_ref().map_or(0, |h| h.labels.len());
                    assert_eq!(
                        (loaded.adapter.pairs.len(), loaded.summary.rank, classes),
                        (pairs, rank, labels),
                        "{variant}"
                    );
                    assert!((first.scale - scale).abs() < 1e-6, "{variant}: {}", first.scale);
                }
                (Err(e), Err(field)) => assert!(e.message.contains(field), "{variant}: {e}"),
                (result, _) => panic!("{variant}: {result:?}"),
            }
        }
        assert_eq!(seen, 13);
    }

    #[test]
    fn the_adapters_of_the_default_base_are_accepted() {
        let base = ModelConfig {
            hidden_size: 576,
            intermediate_size: 1536,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ..tiny()
        };
        for (folder, pairs, rank) in
            [("adapter_causal_r8", 60, 8), ("adapter_causal_r16", 210, 16), ("adapter_seqcls", 60, 8)]
        {
            let loaded = load(&fixtures().join("smollm2").join(folder), &base, "").unwrap();
            assert_eq!((loaded.adapter.pairs.len(), loaded.summary.rank), (pairs, rank));
        }
        let error = load(&fixtures().join("smollm2/adapter_causal_r8"), &tiny(), "x").unwrap_err();
        assert!(error.message.contains("layer ") && error.message.contains("SmolLM2"), "{error}");
    }
}
