//! Reads a PEFT directory (`adapter_config.json` + `adapter_model.safetensors`) into a checked [`Adapter`].

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::Serialize;

use crate::adapter::config::{HEADS, LoraConfig, Modules, Target};
use crate::adapter::files::{CONFIG, PICKLE, read_optional};
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
    pub config: LoraConfig,
    /// Size of the files that matter.
    pub bytes: u64,
}

/// Reads the adapter in `directory` and checks it against the base: every tensor belongs to a module that the base has
/// and the configuration targets, every targeted module has its pair, shapes and dtypes fit, all numbers are finite.
///
/// The file is read once, a piece at a time; the generation is the hash of exactly the bytes that were read. `base_id`
/// is only used in messages.
pub fn load(directory: &Path, base: &ModelConfig, base_id: &str) -> Result<Loaded> {
    let texts = Texts::read(directory)?;
    let config = LoraConfig::parse(&texts.config)?;
    let file = TensorFile::open(directory)?;
    load_parts(&texts, &config, file, base)
        .map_err(|e| explain_base(e, &config, base_id))
        .map(|(adapter, bytes)| Loaded { adapter, config, bytes })
}

fn load_parts(texts: &Texts, config: &LoraConfig, file: TensorFile, base: &ModelConfig) -> Result<(Adapter, u64)> {
    let targets = config.targets(base)?;
    let mut slots = plan(config, &targets, file.tensors(), base)?;
    let labels = match slots.head_rows {
        Some(rows) => Some(texts.labels(config, rows)?),
        None => {
            texts.refuse_labels()?;
            None
        }
    };
    let bytes = file.len() + texts.len();
    let mut hasher = GenerationHasher::new();
    texts.hash_config(&mut hasher);
    let mut values = HashMap::new();
    file.read(&mut hasher, |name, numbers| {
        if let Some(part) = slots.parts.remove(name) {
            values.insert(part, numbers);
        }
    })?;
    texts.hash_labels(&mut hasher);

    let mut take = |part: Part| values.remove(&part).ok_or_else(|| Error::internal(format!("{part:?} was not read")));
    let mut pairs = BTreeMap::new();
    for (index, Target { module, rank, scale }) in targets.iter().enumerate() {
        let (a, b) = (take(Part::A(index))?, take(Part::B(index))?);
        pairs.insert((module.layer, module.projection), LoraPair { rank: *rank, scale: *scale, a, b });
    }
    let head = match labels {
        Some(labels) => Some(Head { weight: take(Part::HeadWeight)?, bias: take(Part::HeadBias).ok(), labels }),
        None => None,
    };
    Ok((Adapter { generation: hasher.finish(), pairs, head }, bytes))
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

    fn hash_config(&self, hasher: &mut GenerationHasher) {
        hasher.file(CONFIG, self.config.len() as u64);
        hasher.update(&self.config);
    }

    fn hash_labels(&self, hasher: &mut GenerationHasher) {
        for (name, content) in [(LABELS_JSON, &self.labels_json), (LABELS_TEXT, &self.labels_text)] {
            if let Some(content) = content {
                hasher.file(name, content.len() as u64);
                hasher.update(content);
            }
        }
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

#[derive(Debug)]
struct Plan {
    /// By tensor name.
    parts: HashMap<String, Part>,
    /// Classes of the head, if there is one.
    head_rows: Option<usize>,
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

/// Assigns every tensor of the file its place, by names and shapes alone.
fn plan<'a>(
    config: &LoraConfig,
    targets: &[Target],
    tensors: impl Iterator<Item = (&'a str, &'a TensorInfo)>,
    base: &ModelConfig,
) -> Result<Plan> {
    let by_name: HashMap<&str, usize> = targets.iter().enumerate().map(|(i, t)| (t.module.name.as_str(), i)).collect();
    let mut parts: HashMap<String, Part> = HashMap::new();
    let mut places: HashMap<Part, (&str, &TensorInfo)> = HashMap::new();
    let mut head_name: Option<&str> = None;
    for (name, info) in tensors {
        let target = |module: &str| by_name.get(module).copied().ok_or_else(|| stray(name, module, config, base));
        let part = match Name::parse(name)? {
            Name::A(module) => Part::A(target(module)?),
            Name::B(module) => Part::B(target(module)?),
            Name::Head(head, bias) => {
                if !config.saves_head(head) {
                    return Err(Error::unprocessable(format!(
                        "tensor {name} is a classification head, but {CONFIG} has neither {head:?} in modules_to_save \
                         nor task_type \"SEQ_CLS\""
                    )));
                }
                if let Some(other) = head_name.replace(head).filter(|other| *other != head) {
                    return Err(Error::unprocessable(format!(
                        "tensor {name}: there are two classification heads, {other:?} and {head:?}; expected one"
                    )));
                }
                if bias { Part::HeadBias } else { Part::HeadWeight }
            }
            Name::Other(path) => return Err(unknown(name, path)),
        };
        check_dtype(name, info.dtype)?;
        if let Some((other, _)) = places.insert(part, (name, info)) {
            return Err(Error::unprocessable(format!("tensors {other} and {name} are the same one under two names")));
        }
        parts.insert(name.to_string(), part);
    }
    for (index, Target { module, rank, .. }) in targets.iter().enumerate() {
        let because =
            format!("rank {rank}, the module {} maps {} to {}", module.name, module.in_features, module.out_features);
        for (part, matrix, expected) in [
            (Part::A(index), "lora_A", [*rank, module.in_features]),
            (Part::B(index), "lora_B", [module.out_features, *rank]),
        ] {
            match places.get(&part) {
                Some((name, info)) => check_shape(name, &info.shape, &expected, &because)?,
                None => {
                    return Err(Error::unprocessable(format!(
                        "tensor {PREFIX}{}.{matrix}.weight is missing; {CONFIG} targets this module ({because})",
                        module.name
                    )));
                }
            }
        }
    }
    let head_rows = match places.get(&Part::HeadWeight) {
        Some((name, info)) => Some(check_head(name, info, places.get(&Part::HeadBias), base)?),
        None => None,
    };
    if let (None, Some((name, _))) = (head_rows, places.get(&Part::HeadBias)) {
        return Err(Error::unprocessable(format!("tensor {name}: the head has a bias but no weight")));
    }
    if head_rows.is_none() && config.is_sequence_classification() {
        return Err(Error::unprocessable(format!(
            "task_type is \"SEQ_CLS\" but the file has no classification head; expected the tensor {PREFIX}score.weight"
        )));
    }
    Ok(Plan { parts, head_rows })
}

fn check_head(name: &str, info: &TensorInfo, bias: Option<&(&str, &TensorInfo)>, base: &ModelConfig) -> Result<usize> {
    let rows = info.shape.first().copied().unwrap_or(0);
    let because = "classes × the base's hidden size";
    if !(1..=MAX_LABELS).contains(&rows) {
        return Err(Error::unprocessable(format!(
            "tensor {name} has shape {:?}; expected [1 to {MAX_LABELS}, {}] ({because})",
            info.shape, base.hidden_size
        )));
    }
    check_shape(name, &info.shape, &[rows, base.hidden_size], because)?;
    if let Some((name, info)) = bias {
        check_shape(name, &info.shape, &[rows], "one a class")?;
    }
    Ok(rows)
}

fn check_shape(name: &str, found: &[usize], expected: &[usize], because: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::unprocessable(format!("tensor {name} has shape {found:?}; expected {expected:?} ({because})")))
}

/// A LoRA tensor of a module that is not targeted.
fn stray(name: &str, module: &str, config: &LoraConfig, base: &ModelConfig) -> Error {
    let layer = module.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
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
    match &config.base_model {
        Some(made_for)
            if error.kind == crate::ErrorKind::Unprocessable && !base_id.is_empty() && made_for != base_id =>
        {
            Error {
                message: format!("{} (the adapter was made for {made_for:?}; the base is {base_id:?})", error.message),
                ..error
            }
        }
        _ => error,
    }
}

impl Loaded {
    /// Short names of the projections it changes, e.g. `q_proj`.
    pub fn target_modules(&self) -> Vec<String> {
        let changed = |p: &Projection| self.adapter.pairs.keys().any(|(_, projection)| projection == p);
        Projection::ALL.iter().filter(|p| changed(p)).map(|p| short_name(*p).to_string()).collect()
    }

    /// Largest rank of its pairs.
    pub fn rank(&self) -> usize {
        self.adapter.pairs.values().map(|p| p.rank).max().unwrap_or(0)
    }
}

fn short_name(projection: Projection) -> &'static str {
    let path = projection.path();
    path.rsplit_once('.').map_or(path, |(_, name)| name)
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

/// Looks at the adapter in `directory`. With a base it is fully checked against it; without, its configuration, the
/// form of its tensors' names, its labels and its numbers are.
pub fn inspect(directory: &Path, base: Option<&ModelConfig>) -> Result<Inspection> {
    if let Some(base) = base {
        load(directory, base, "")?;
    }
    let texts = Texts::read(directory)?;
    let config = LoraConfig::parse(&texts.config)?;
    let file = TensorFile::open(directory)?;
    let bytes = file.len() + texts.len();
    let mut rows = None;
    let mut tensors = Vec::new();
    for (name, info) in file.tensors() {
        match Name::parse(name)? {
            Name::Head(_, false) => rows = info.shape.first().copied(),
            Name::Other(path) => return Err(unknown(name, path)),
            _ => {}
        }
        check_dtype(name, info.dtype)?;
        let dtype = info.dtype.to_string();
        tensors.push(TensorSummary { name: name.to_string(), dtype, shape: info.shape.clone() });
    }
    let labels = match rows {
        Some(rows) if (1..=MAX_LABELS).contains(&rows) => Some(texts.labels(&config, rows)?),
        Some(rows) => {
            return Err(Error::unprocessable(format!("the head has {rows} rows; expected 1 to {MAX_LABELS}")));
        }
        None => None,
    };
    let mut hasher = GenerationHasher::new();
    let mut parameters = 0;
    texts.hash_config(&mut hasher);
    file.read(&mut hasher, |_, values| parameters += values.len())?;
    texts.hash_labels(&mut hasher);
    Ok(Inspection {
        generation: hasher.finish(),
        bytes,
        base_model: config.base_model,
        task_type: config.task_type,
        r: config.r,
        lora_alpha: config.lora_alpha,
        use_rslora: config.use_rslora,
        target_modules: config.target_modules,
        labels,
        parameters,
        tensors,
    })
}
