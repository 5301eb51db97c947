//! Reads a PEFT directory (`adapter_config.json` + `adapter_model.safetensors`) into a checked [`Adapter`].

use std::collections::HashMap;
use std::path::Path;

use crate::adapter::config::{LoraConfig, Target};
use crate::adapter::files::{GGUF, steady};
use crate::adapter::generation::GenerationHasher;
use crate::adapter::gguf::GgufFile;
use crate::adapter::places::{HEAD, Kind, Places, Plan, Table, kinds};
use crate::adapter::tensors::{TensorFiles, TensorInfo};
use crate::adapter::texts::{Texts, no_config};
use crate::adapter::{Adapter, Generation, LoraPair, OwnNorm, OwnRows};
use crate::base::{Head, LM_HEAD, ModelConfig, Module, OwnLanguage};
use crate::error::shorten;
use crate::{Error, Result};

/// An adapter and what its files said about it.
#[derive(Debug)]
pub struct Loaded {
    pub adapter: Adapter,
    /// Tokenizer and chat template that lie beside it.
    pub language: Option<OwnLanguage>,
    pub summary: Summary,
}

/// What is known of an adapter without its numbers.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Largest rank of its pairs.
    pub rank: usize,
    pub lora_alpha: f64,
    /// Short names of the modules it adds pairs to, e.g. `q_proj`.
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
        let language = fitted.files.texts.language()?;
        Ok(Loaded { adapter: fitted.read()?, language, summary })
    })
}

/// How the adapter in `directory` spells texts, as far as its files say.
pub fn language(directory: &Path) -> Result<Option<OwnLanguage>> {
    steady(directory, || Files::open(directory)?.texts.language())
}

/// Checks all that [`load`] checks but the numbers and the texts beside them.
pub(super) fn survey(directory: &Path, base: &ModelConfig, base_id: &str) -> Result<Summary> {
    steady(directory, || Ok(Files::open(directory)?.fit(base, base_id)?.summary()))
}

/// The same with the generation, for which the numbers are hashed but not looked at.
pub(super) fn identify(directory: &Path, base: &ModelConfig, base_id: &str) -> Result<(Summary, Generation)> {
    steady(directory, || {
        let fitted = Files::open(directory)?.fit(base, base_id)?;
        let Files { texts, weights, .. } = fitted.files;
        Ok((fitted.summary, texts.generation(|hasher| weights.hash(hasher))?))
    })
}

/// An adapter's files with the weights' header read, the weights themselves not.
pub(super) struct Files {
    pub(super) texts: Texts,
    pub(super) config: LoraConfig,
    pub(super) weights: Weights,
    pub(super) tensors: Vec<TensorInfo>,
}

pub(super) enum Weights {
    Safetensors(TensorFiles),
    Gguf(GgufFile),
}

impl Weights {
    fn len(&self) -> u64 {
        match self {
            Weights::Safetensors(files) => files.len(),
            Weights::Gguf(file) => file.len(),
        }
    }

    /// Hands all numbers to `each`. `heads` are those of q and of k, where the order of rows matters.
    pub(super) fn read(
        self,
        heads: Option<[usize; 2]>,
        hasher: &mut GenerationHasher,
        each: impl FnMut(&str, Vec<f32>),
    ) -> Result<()> {
        match self {
            Weights::Safetensors(files) => files.read(hasher, each),
            Weights::Gguf(file) => file.read(heads, hasher, each),
        }
    }

    fn hash(self, hasher: &mut GenerationHasher) -> Result<()> {
        match self {
            Weights::Safetensors(files) => files.hash(hasher),
            Weights::Gguf(file) => {
                file.hash(hasher);
                Ok(())
            }
        }
    }
}

/// Files that fit a base, as far as can be told without the weights.
pub(super) struct Fitted {
    pub(super) files: Files,
    plan: Plan,
    /// Heads of q and of k.
    heads: [usize; 2],
    pub(super) summary: Summary,
}

impl Files {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let texts = Texts::read(directory)?;
        let (config, weights, tensors) = match &texts.config {
            Some(config) => {
                let config = LoraConfig::parse(config)?;
                let files = TensorFiles::open(directory)?;
                let tensors = files.tensors();
                (config, Weights::Safetensors(files), tensors)
            }
            None => {
                let file = GgufFile::open(directory)?.ok_or_else(|| no_config(directory))?;
                let pairs = file.pairs.iter().map(|pair| (pair.module.clone(), pair.rank)).collect();
                let config = LoraConfig::of_pairs(file.alpha, pairs, file.saved.clone());
                let tensors = file.tensors();
                (config, Weights::Gguf(file), tensors)
            }
        };
        Ok(Files { texts, config, weights, tensors })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.weights.len() + self.texts.len()
    }

    /// How many numbers are in it.
    pub(super) fn numbers(&self) -> usize {
        self.tensors.iter().map(|info| info.shape.iter().product::<usize>()).sum()
    }

    pub(super) fn labels(&self, head_rows: Option<usize>) -> Result<Option<Vec<String>>> {
        match head_rows {
            Some(rows) => self.texts.labels(&self.config, rows).map(Some),
            None => self.texts.refuse_labels().map(|()| None),
        }
    }

    pub(super) fn fit(self, base: &ModelConfig, base_id: &str) -> Result<Fitted> {
        if let Weights::Gguf(file) = &self.weights
            && !file.is_for(base.family)
        {
            return Err(Error::unprocessable(format!(
                "{GGUF}: general.architecture is {:?}; the base's is {:?}",
                file.architecture.name(),
                base.family.name()
            )));
        }
        let places = Places::assign(&self.config, &self.tensors)?;
        let plan = places.fit(&self.config, base).map_err(|e| explain_base(e, &self.config, base_id))?;
        let heads = [base.heads, base.kv_heads];
        let targeted = |module: &str| plan.targets.iter().any(|t| short_name(&t.name) == module);
        // GPT-2 has two modules of one name.
        let mut names: Vec<String> = vec![];
        let linear = base.family.projections().map(|p| base.family.short_name(p));
        for name in linear.chain([base.family.names().embedding, LM_HEAD].map(short_name)) {
            if targeted(name) && !names.iter().any(|n| n == name) {
                names.push(name.into());
            }
        }
        let summary = Summary {
            rank: plan.targets.iter().map(|t| t.rank).max().unwrap_or(0),
            lora_alpha: self.config.lora_alpha,
            target_modules: names,
            labels: self.labels(places.head_rows()?)?,
            parameters: self.numbers(),
            bytes: self.bytes(),
        };
        Ok(Fitted { files: self, plan, heads, summary })
    }
}

impl Fitted {
    fn summary(&self) -> Summary {
        self.summary.clone()
    }

    /// Reads the numbers.
    fn read(self) -> Result<Adapter> {
        let Fitted { files: Files { texts, weights, .. }, plan, heads, summary } = self;
        let mut values = HashMap::new();
        let generation = texts.generation(|hasher| {
            weights.read(Some(heads), hasher, |name, numbers| {
                if let Some(part) = plan.parts.get(name) {
                    values.insert(part.clone(), numbers);
                }
            })
        })?;
        let mut take = |module: &str, kind: Kind| values.remove(&(module.to_string(), kind));
        let read = |numbers: Option<Vec<f32>>| numbers.ok_or_else(|| Error::internal("a tensor was not read"));
        let mut adapter = Adapter::new(generation);
        for Target { name, module, rank, scale, .. } in &plan.targets {
            let [a, b] = kinds(*module);
            let pair = LoraPair {
                rank: *rank,
                scale: *scale,
                a: read(take(name, a))?,
                b: read(take(name, b))?,
                bias: take(name, Kind::BiasB),
                magnitude: take(name, Kind::Magnitude),
            };
            match module {
                Module::Linear(layer, projection) => drop(adapter.pairs.insert((*layer, *projection), pair)),
                Module::Embedding => adapter.embedding.pair = Some(pair),
                Module::LmHead => adapter.lm_head.pair = Some(pair),
            }
        }
        for (site, name) in plan.norms {
            let bias = take(&name, Kind::Bias).or(take(&name, Kind::BaseBias));
            adapter.norms.insert(site, OwnNorm { weight: take(&name, Kind::Weight), bias });
        }
        for (name, layer, projection) in plan.biases {
            let bias = take(&name, Kind::BaseBias).or(take(&name, Kind::Bias));
            adapter.biases.insert((layer, projection), read(bias)?);
        }
        adapter.vocab_size = Some(plan.vocab_size);
        let rows = |table: Table| -> Result<Option<OwnRows>> {
            let get = |module: &str, kind| read(values.get(&(module.to_string(), kind)).cloned());
            let whole = table.whole.map(|(module, kind)| get(module, kind)).transpose()?;
            let tokens = table.tokens.map(|(module, tokens)| Ok::<_, Error>((tokens, get(module, Kind::Tokens)?)));
            Ok(own_rows(whole, tokens.transpose()?, plan.hidden_size))
        };
        [adapter.embedding.rows, adapter.lm_head.rows] = {
            let [embedding, lm_head] = plan.tables.map(rows);
            [embedding?, lm_head?]
        };
        let mut take = |module: &str, kind: Kind| values.remove(&(module.to_string(), kind));
        if let Some(labels) = summary.labels {
            let weight = read(take(HEAD, Kind::Weight))?;
            adapter.head = Some(Head { weight, bias: take(HEAD, Kind::Bias), labels });
        }
        Ok(adapter)
    }
}

/// Rows of a whole table with those of some tokens in their place.
fn own_rows(whole: Option<Vec<f32>>, tokens: Option<(Vec<u32>, Vec<f32>)>, width: usize) -> Option<OwnRows> {
    match (whole, tokens) {
        (None, None) => None,
        (Some(rows), None) => Some(OwnRows { tokens: None, rows }),
        (Some(mut rows), Some((tokens, some))) => {
            for (token, row) in tokens.into_iter().zip(some.chunks_exact(width)) {
                rows[token as usize * width..][..width].copy_from_slice(row);
            }
            Some(OwnRows { tokens: None, rows })
        }
        (None, Some((tokens, some))) => {
            let mut sorted: Vec<(u32, &[f32])> = tokens.into_iter().zip(some.chunks_exact(width)).collect();
            sorted.sort_by_key(|(token, _)| *token);
            let (tokens, rows): (Vec<u32>, Vec<&[f32]>) = sorted.into_iter().unzip();
            Some(OwnRows { tokens: Some(tokens), rows: rows.concat() })
        }
    }
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

/// The last part of a module's path.
fn short_name(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use serde_json::{Value, json};

    use super::*;
    use crate::ErrorKind;
    use crate::adapter::files::{CONFIG, INDEX, PICKLE, WEIGHTS};
    use crate::adapter::testing::{Files, Tensor, adapter, classifier, fixtures, tiny};
    use crate::adapter::{Adapter, generation_of, inspect};
    use crate::base::Projection;

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
        let Adapter { generation, pairs, head, .. } = &loaded.adapter;
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
    fn shards_are_one_adapter() {
        let files = classifier(1);
        let (folder, whole) = (files.sharded(), read(&files).unwrap());
        let load_it = || load(folder.path(), &tiny(), "");
        let loaded = load_it().unwrap();
        assert_eq!(loaded.adapter.generation, generation_of(folder.path()).unwrap());
        assert_ne!(loaded.adapter.generation, whole.adapter.generation);
        let numbers = |a: &Adapter| a.pairs.values().flat_map(|p| [p.a.clone(), p.b.clone()]).collect::<Vec<_>>();
        assert_eq!(numbers(&loaded.adapter), numbers(&whole.adapter));
        assert_eq!(loaded.summary.parameters, whole.summary.parameters);
        let size: u64 = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(loaded.summary.bytes, size);

        let message = || load_it().unwrap_err().message;
        let [first, index] = ["adapter_model-00001-of-00002.safetensors", INDEX].map(|name| folder.path().join(name));
        let (first_bytes, index_text) = (std::fs::read(&first).unwrap(), std::fs::read_to_string(&index).unwrap());
        std::fs::remove_file(&first).unwrap();
        assert!(message().contains("the shard adapter_model-00001-of-00002.safetensors, which it names, is missing"));
        std::fs::write(&first, &first_bytes[..first_bytes.len() - 1]).unwrap();
        assert!(message().contains("adapter_model-00001-of-00002.safetensors is not a valid safetensors file"));
        std::fs::write(&first, std::fs::read(folder.path().join("adapter_model-00002-of-00002.safetensors")).unwrap())
            .unwrap();
        assert!(message().contains("both hold the tensor"), "{}", message());
        std::fs::write(&first, &first_bytes).unwrap();
        for (text, expected) in [
            ("{", "EOF"),
            ("{}", "weight_map"),
            (r#"{"weight_map": {"a": "../x.safetensors"}}"#, "names the shard \"../x.safetensors\""),
            (
                r#"{"weight_map": {"a": "adapter_model-00001-of-00002.safetensors"}}"#,
                "00002-of-00002.safetensors is there",
            ),
            (&index_text.replace("base_model.model.score.weight", "x"), "does not hold the tensor x"),
        ] {
            std::fs::write(&index, text).unwrap();
            let message = message();
            assert!(message.contains(INDEX) && message.contains(expected), "{expected}: {message}");
        }
        std::fs::remove_file(&index).unwrap();
        assert!(message().contains("index.json is missing, but its shard"));
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
            (name("0.self_attn.qkv_proj.lora_A.weight"), "none of the base"),
            ("base_model.model.lm_head.lora_A.weight".into(), "does not target"),
            (name("0.self_attn.q_proj.lora_magnitude_vector"), "no use_dora"),
            (name("0.self_attn.q_proj.weight"), "replaces a linear layer"),
            (name("0.self_attn.q_proj.base_layer.bias"), "saves none"),
            (name("0.self_attn.q_proj.lora_embedding_A"), "does not target"),
            (name("0.self_attn.q_proj.lora_C"), "expected the ending"),
            (name("0.input_layernorm.weight"), "does not save"),
            (
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
                "not in trainable_token",
            ),
            ("base_model.model.model.vision.weight".into(), "none of the base"),
            (name("0.self_attn.q_proj.lora_B.bias"), "no lora_bias"),
            ("base_model.model.model.embed_tokens.lora_embedding_A".into(), "does not target"),
            ("base_model.model.model.norm.weight".into(), "does not save"),
            ("model.layers.0.self_attn.q_proj.lora_A.weight".into(), "does not begin with"),
            (name("0.self_attn.q_proj.lora_A.default.weight"), "under two names"),
        ] {
            let mut files = adapter(1);
            files.tensors.insert(tensor_name.clone(), tensor.clone());
            let message = refused(&files);
            assert!(message.contains(&tensor_name) && message.contains(expected), "{message}");
        }
    }

    /// Rank 2 on q with all that an adapter can bring: a magnitude, saved norms, tables of 33 tokens.
    fn rich() -> Files {
        let mut files = adapter(1);
        files.config["target_modules"] = json!(["q_proj"]);
        files.config["use_dora"] = json!(true);
        files.config["modules_to_save"] = json!(["norm", "embed_tokens", "lm_head"]);
        files.tensors.retain(|name, _| name.contains("q_proj"));
        for layer in 0..2 {
            let magnitude = name(&format!("{layer}.self_attn.q_proj.lora_magnitude_vector"));
            files.tensors.insert(magnitude, Tensor::f32(&[12], |_| 1.0));
            for norm in ["input", "post_attention"] {
                let norm = name(&format!("{layer}.{norm}_layernorm.weight"));
                files.tensors.insert(norm, Tensor::f32(&[8], |_| 1.0));
            }
        }
        for (module, shape) in [("model.norm", vec![8]), ("model.embed_tokens", vec![33, 8]), ("lm_head", vec![33, 8])]
        {
            let tensor = Tensor::f32(&shape, |i| i as f32);
            files.tensors.insert(format!("base_model.model.{module}.weight"), tensor);
        }
        files
    }

    #[test]
    fn what_is_saved_beside_the_pairs_arrives() {
        let Loaded { adapter, summary, .. } = read(&rich()).unwrap();
        assert_eq!(
            (adapter.vocab_size, adapter.norms.len(), summary.target_modules),
            (Some(33), 5, vec!["q_proj".into()])
        );
        let rows = adapter.lm_head.rows.unwrap();
        assert_eq!((rows.tokens.clone(), rows.rows.len(), rows.rows[33 * 8 - 1]), (None, 33 * 8, 263.0));
        assert_eq!(adapter.embedding.rows.unwrap(), rows);
        assert_eq!(adapter.pairs[&(1, Projection::Q)].magnitude, Some(vec![1.0; 12]));
    }

    #[test]
    fn what_is_saved_beside_the_pairs_must_fit() {
        let (lm_head, embedding) = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight");
        let magnitude = name("0.self_attn.q_proj.lora_magnitude_vector");
        let norm = name("1.input_layernorm.weight");
        for (tensor, shape, expected) in [
            (&*magnitude, vec![11], "has shape [11]; expected [12] (use_dora"),
            (&*magnitude, vec![12, 1], "has shape [12, 1]; expected [12]"),
            (&*norm, vec![9], "has shape [9]; expected [8]"),
            (lm_head, vec![32, 8], "has 32 rows, base_model.model.model.embed_tokens.weight has 33"),
            (lm_head, vec![33, 9], "has shape [33, 9]; expected [33, 8]"),
            (embedding, vec![264], "has shape [264]; expected [264, 8]"),
            (embedding, vec![0, 8], "has 0 rows"),
        ] {
            let mut files = rich();
            files.tensors.insert(tensor.into(), Tensor::f32(&shape, |_| 0.0));
            let message = refused(&files);
            assert!(message.contains(tensor) && message.contains(expected), "{message}");
        }
        for tensor in [&*magnitude, &*norm, lm_head] {
            let mut files = rich();
            files.tensors.insert(tensor.into(), Tensor { ..rich().tensors[tensor].clone() });
            let bytes = &mut files.tensors.get_mut(tensor).unwrap().bytes;
            bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
            let message = refused(&files);
            assert!(message.contains(tensor) && message.contains("NaN"), "{message}");
            files.tensors.remove(tensor);
            let message = refused(&files);
            assert!(message.contains(&format!("{tensor} is missing")), "{message}");
        }
    }

    #[test]
    fn rows_of_tokens_must_fit() {
        let rows = |table: &str| format!("base_model.model.{table}.token_adapter.trainable_tokens_delta");
        let with = |indices: Value, tables: &[(&str, usize)]| {
            let mut files = adapter(1);
            files.config["trainable_token_indices"] = indices;
            for (table, count) in tables {
                files.tensors.insert(rows(table), Tensor::f32(&[*count, 8], |i| i as f32));
            }
            files
        };
        let embedding = "model.embed_tokens";
        let found = read(&with(json!([5, 32, 3]), &[(embedding, 3)])).unwrap().adapter;
        let own = found.embedding.rows.unwrap();
        assert_eq!((own.tokens.unwrap(), own.rows[0], found.vocab_size), (vec![3, 5, 32], 16.0, Some(33)));
        // The base's tables are tied.
        assert_eq!(found.lm_head.rows.unwrap().tokens.unwrap(), [3, 5, 32]);
        let apart = json!({"embed_tokens": [1], "lm_head": [2, 3]});
        let found = read(&with(apart.clone(), &[(embedding, 1), ("lm_head", 2)])).unwrap().adapter;
        assert_eq!(found.lm_head.rows.unwrap().tokens.unwrap(), [2, 3]);
        for (files, expected) in [
            (with(json!([5, 32, 3]), &[(embedding, 2)]), "has shape [2, 8]; expected [3, 8]"),
            (with(json!([5]), &[]), "trainable_tokens_delta is missing"),
            (with(json!([4_000_000]), &[(embedding, 1)]), "at most 131072 tokens can follow the base's 32"),
            (with(apart, &[(embedding, 1)]), "lm_head.token_adapter.trainable_tokens_delta is missing"),
            // Token 32 is new, and 33 too, which nothing has a row for.
            (
                with(json!({"embed_tokens": [32, 33], "lm_head": [33]}), &[(embedding, 2), ("lm_head", 1)]),
                "lm_head.weight",
            ),
        ] {
            let message = refused(&files);
            assert!(message.contains(expected), "{expected}: {message}");
        }
        // Of tables that are not tied, each needs its own.
        let base = ModelConfig { tie_word_embeddings: false, ..tiny() };
        let files = with(json!([32]), &[(embedding, 1)]);
        let message = load(files.folder().path(), &base, "").unwrap_err().message;
        assert!(message.contains("lm_head.weight is missing: the adapter has 33 tokens"), "{message}");
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
    fn the_reference_adapters_are_read() {
        let directory = fixtures().join("tiny/llama");
        let config = std::fs::read_to_string(directory.join("base/config.json")).unwrap();
        let base = ModelConfig::from_json(&config).unwrap();
        let mut seen = 0;
        for folder in std::fs::read_dir(&directory).unwrap() {
            let folder = folder.unwrap();
            let folder_name = folder.file_name().into_string().unwrap();
            let Some(variant) = folder_name.strip_prefix("adapter_") else { continue };
            seen += 1;
            let loaded = load(&folder.path(), &base, "tiny-llama").unwrap();
            let expected = match variant {
                "embed_and_head" => (2, 4, 2.0, 0),
                "qv_r4" | "regex_targets" | "modules_to_save_norm" => (4, 4, 2.0, 0),
                "all_linear" | "dora_r4" | "lora_bias" => (14, 4, 2.0, 0),
                "all_r8" => (14, 8, 2.0, 0),
                "rslora_r8" => (14, 8, 16.0 / 8f32.sqrt(), 0),
                "exclude_down" => (12, 4, 2.0, 0),
                "layers_1_only" => (7, 4, 2.0, 0),
                "rank_alpha_pattern" => (14, 16, 4.0 / 16.0, 0),
                "seqcls" => (4, 4, 2.0, 3),
                other => panic!("unknown variant {other}"),
            };
            let (pairs, rank, scale, labels) = expected;
            let first = loaded.adapter.pairs.values().next().unwrap();
            let classes = loaded.adapter.head.as_ref().map_or(0, |h| h.labels.len());
            assert_eq!((loaded.adapter.pairs.len(), loaded.summary.rank, classes), (pairs, rank, labels), "{variant}");
            assert!((first.scale - scale).abs() < 1e-6, "{variant}: {}", first.scale);
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
