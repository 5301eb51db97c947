//! What a decoder is made of, read from `config.json` or from GGUF metadata.

use serde::Deserialize;
use serde_json::Value;

use super::gguf::{CONTROL, Gguf};
use crate::{Error, Result};

/// The linear layers of a decoder block. LoRA adapters target these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub const ALL: [Projection; 7] = [
        Projection::Q,
        Projection::K,
        Projection::V,
        Projection::O,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// The module's path inside a decoder layer, as Hugging Face names it.
    pub fn path(self) -> &'static str {
        match self {
            Projection::Q => "self_attn.q_proj",
            Projection::K => "self_attn.k_proj",
            Projection::V => "self_attn.v_proj",
            Projection::O => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        }
    }
}

/// The norms of a decoder. An adapter may bring its own weights for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NormSite {
    Input(usize),
    PostAttention(usize),
    Final,
}

impl NormSite {
    /// Full module path, as Hugging Face names it.
    pub fn name(self) -> String {
        match self {
            NormSite::Input(layer) => format!("model.layers.{layer}.input_layernorm"),
            NormSite::PostAttention(layer) => format!("model.layers.{layer}.post_attention_layernorm"),
            NormSite::Final => "model.norm".into(),
        }
    }
}

/// Full module paths of the two tables whose rows belong to tokens.
pub const EMBEDDING: &str = "model.embed_tokens";
pub const LM_HEAD: &str = "lm_head";

/// A matrix of the base that a low-rank pair can be added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    Linear(usize, Projection),
    Embedding,
    LmHead,
}

/// A linear layer of the base, as adapters name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetModule {
    /// Full module path, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub layer: usize,
    pub projection: Projection,
    pub out_features: usize,
    pub in_features: usize,
}

/// Far more than any model has; keeps a lying configuration from asking for lists of millions of modules.
const MAX_LAYERS: usize = 1 << 12;

/// Control tokens that end a turn or a text wherever they are known. A GGUF names one or two end tokens, and its model may
/// say another; llama.cpp goes by the same spellings.
const TURN_ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "</s>",
];

/// A decoder's dimensions and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of Hugging Face or `general.architecture` of GGUF, e.g. `llama`.
    pub family: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// Longest sequence, in tokens.
    pub context: usize,
    pub tie_word_embeddings: bool,
    pub bos_token: Option<u32>,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

impl ModelConfig {
    /// By how much a position turns each of the `head_dim / 2` pairs of a head: `theta^(-2i / head_dim)` (RoFormer, arXiv
    /// 2104.09864).
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let theta = self.rope_theta as f32;
        (0..self.head_dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f32 / self.head_dim as f32)).collect()
    }

    /// Reads Hugging Face's `config.json`. A family or an option that the decoder does not compute is refused by name.
    pub fn from_json(text: &str) -> Result<Self> {
        let bad = |what: String| Error::unprocessable(format!("config.json: {what}"));
        let raw: HfConfig = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        if raw.model_type != "llama" {
            return Err(bad(format!("model_type is {:?}; supported: \"llama\"", raw.model_type)));
        }
        let mut rope_theta = raw.rope_theta;
        for (key, rope) in [("rope_scaling", &raw.rope_scaling), ("rope_parameters", &raw.rope_parameters)] {
            let Some(rope) = rope.as_ref().filter(|rope| !rope.is_null()) else { continue };
            let kind = rope.get("rope_type").or(rope.get("type"));
            // Without a type, only the angle may be there: anything else belongs to a kind that is not named.
            let plain = match kind {
                Some(kind) => kind == "default",
                None => rope.as_object().is_some_and(|fields| fields.keys().all(|key| key == "rope_theta")),
            };
            if !plain {
                return Err(bad(format!("{key} {rope} is not supported; supported: null or the type \"default\"")));
            }
            // As in transformers, the theta in here wins over the one beside it.
            if let Some(theta) = rope.get("rope_theta") {
                let number = theta.as_f64().ok_or_else(|| bad(format!("{key}.rope_theta is {theta}, not a number")))?;
                rope_theta = Some(number);
            }
        }
        if raw.attention_bias || raw.mlp_bias {
            return Err(bad("attention_bias or mlp_bias is true; supported: layers without bias".into()));
        }
        if let Some(quantised) = raw.quantization_config.filter(|q| !q.is_null()) {
            let method = quantised.get("quant_method").cloned().unwrap_or(quantised);
            return Err(bad(format!(
                "quantization_config {method} is not supported; supported: plain weights, or a GGUF file"
            )));
        }
        if let Some(act) = raw.hidden_act.filter(|a| a != "silu") {
            return Err(bad(format!("hidden_act is {act:?}; supported: \"silu\"")));
        }
        ModelConfig {
            family: raw.model_type,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1)),
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: rope_theta.unwrap_or(10_000.0),
            context: raw.max_position_embeddings,
            tie_word_embeddings: raw.tie_word_embeddings,
            bos_token: raw.bos_token_id,
            eos_tokens: match raw.eos_token_id {
                None => vec![],
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        }
        .checked()
    }

    /// Reads the metadata of a GGUF file.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let family = gguf.text("general.architecture")?;
        if family != "llama" {
            return Err(Error::unprocessable(format!(
                "GGUF: general.architecture is {family:?}; supported: \"llama\""
            )));
        }
        let number = |key: &str| gguf.number(&format!("{family}.{key}"));
        let optional = |key: &str| gguf.optional_number(&format!("{family}.{key}"));
        let present = |key: &str| gguf.meta.get(&format!("{family}.{key}"));
        let unsupported = |what: String| Err(Error::unprocessable(format!("GGUF: {what}")));
        if let Some(kind) = present("rope.scaling.type").filter(|k| k.as_str() != Some("none")) {
            return unsupported(format!("{family}.rope.scaling.type is {kind}; supported: none"));
        }
        // The older spelling of linear scaling. A factor of 0 or 1 means none.
        let factors = ["rope.scale_linear", "rope.scaling.factor"];
        for (key, factor) in factors.iter().filter_map(|key| Some((key, present(key)?))) {
            // With the type `none` a factor is not used.
            if present("rope.scaling.type").is_none() && !matches!(factor.as_f64(), Some(0.0 | 1.0)) {
                return unsupported(format!("{family}.{key} is {factor}; supported: 1"));
            }
        }
        if let Some(experts) = optional("expert_count")?.filter(|&n| n > 0) {
            return unsupported(format!("{family}.expert_count is {experts}; supported: models without experts"));
        }
        if let Some(parts) = gguf.optional_number("split.count")?.filter(|&n| n > 1) {
            return unsupported(format!("the model is split into {parts} files; supported: one file"));
        }
        if gguf.tensors.contains_key("rope_freqs.weight") {
            return Err(Error::unprocessable("GGUF: scaled rope (rope_freqs.weight) is not supported"));
        }
        if let Some(bias) = gguf.tensors.keys().find(|n| n.starts_with("blk.") && n.ends_with(".bias")) {
            return Err(Error::unprocessable(format!("GGUF: {bias}: layers with a bias are not supported")));
        }
        let (heads, hidden_size) = (number("attention.head_count")?, number("embedding_length")?);
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden_size / heads.max(1));
        let value_dim = optional("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            return unsupported(format!(
                "values of {value_dim} numbers a head and keys of {head_dim}; supported: equal"
            ));
        }
        let rotated = optional("rope.dimension_count")?.unwrap_or(head_dim);
        if rotated != head_dim {
            return Err(Error::unprocessable(format!(
                "GGUF: rope turns {rotated} of {head_dim} numbers of a head; supported: all"
            )));
        }
        let token = |key: &str| gguf.token(&format!("tokenizer.ggml.{key}"));
        let mut eos_tokens = vec![];
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos_tokens.extend(token(key)?.filter(|id| !eos_tokens.contains(id)));
        }
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        for (id, _) in tokens.iter().enumerate().filter(|(_, text)| TURN_ENDS.contains(text)) {
            if gguf.token_kind(id) == CONTROL && !eos_tokens.contains(&(id as u32)) {
                eos_tokens.push(id as u32);
            }
        }
        ModelConfig {
            family: family.into(),
            vocab_size: tokens.len(),
            hidden_size,
            intermediate_size: number("feed_forward_length")?,
            layers: number("block_count")?,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rms_norm_eps: gguf.real(&format!("{family}.attention.layer_norm_rms_epsilon"))?,
            rope_theta: present("rope.freq_base")
                .map_or(Ok(10_000.0), |_| gguf.real(&format!("{family}.rope.freq_base")))?,
            context: number("context_length")?,
            tie_word_embeddings: !gguf.tensors.contains_key("output.weight"),
            bos_token: token("bos_token_id")?,
            eos_tokens,
        }
        .checked()
    }

    /// Refuses dimensions that cannot belong together.
    pub fn checked(self) -> Result<Self> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("max_position_embeddings", self.context),
            ("head_dim", self.head_dim),
        ];
        for (name, value) in positive {
            if value == 0 || value > 1 << 24 {
                return Err(Error::unprocessable(format!("model config: {name} is {value}")));
            }
        }
        if self.layers > MAX_LAYERS {
            let what = format!("model config: num_hidden_layers is {}; at most {MAX_LAYERS} are possible", self.layers);
            return Err(Error::unprocessable(what));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::unprocessable(format!(
                "model config: head_dim is {}, not an even number",
                self.head_dim
            )));
        }
        let (eps, theta) = (self.rms_norm_eps, self.rope_theta);
        if !(eps.is_finite() && eps >= 0.0 && theta.is_finite() && theta > 0.0) {
            let what = format!("model config: rms_norm_eps is {eps} and rope_theta {theta}, not finite and positive");
            return Err(Error::unprocessable(what));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::unprocessable(format!(
                "model config: {} attention heads cannot share {} key-value heads",
                self.heads, self.kv_heads
            )));
        }
        Ok(self)
    }

    /// `(out_features, in_features)` of a projection.
    pub fn shape(&self, projection: Projection) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match projection {
            Projection::Q => (q, self.hidden_size),
            Projection::K | Projection::V => (kv, self.hidden_size),
            Projection::O => (self.hidden_size, q),
            Projection::Gate | Projection::Up => (self.intermediate_size, self.hidden_size),
            Projection::Down => (self.hidden_size, self.intermediate_size),
        }
    }

    /// Every norm, in the order of the layers.
    pub fn norms(&self) -> Vec<NormSite> {
        let layers = (0..self.layers).flat_map(|l| [NormSite::Input(l), NormSite::PostAttention(l)]);
        layers.chain([NormSite::Final]).collect()
    }

    /// Every linear layer inside the decoder blocks, in the order of the layers.
    pub fn target_modules(&self) -> Vec<TargetModule> {
        (0..self.layers)
            .flat_map(|layer| {
                Projection::ALL.map(|projection| {
                    let (out_features, in_features) = self.shape(projection);
                    let name = format!("model.layers.{layer}.{}", projection.path());
                    TargetModule { name, layer, projection, out_features, in_features }
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::gguf::Meta;
    use super::super::gguf::tests::write;
    use super::*;

    /// The metadata of a small model, with `changes` on top; `None` takes a key out.
    fn read(changes: &[(&str, Option<Meta>)]) -> Result<ModelConfig> {
        let number = Meta::Unsigned;
        let tokens = ["a", "b", "c"].map(|t| Meta::Text(t.into()));
        let mut meta = vec![
            ("general.architecture", Meta::Text("llama".into())),
            ("llama.embedding_length", number(64)),
            ("llama.feed_forward_length", number(160)),
            ("llama.block_count", number(2)),
            ("llama.attention.head_count", number(4)),
            ("llama.attention.head_count_kv", number(2)),
            ("llama.attention.layer_norm_rms_epsilon", Meta::Float(1e-6)),
            ("llama.context_length", number(256)),
            ("tokenizer.ggml.tokens", Meta::List(tokens.into())),
            ("tokenizer.ggml.eos_token_id", number(2)),
            ("tokenizer.ggml.eot_token_id", number(1)),
            ("tokenizer.ggml.eom_token_id", number(2)),
        ];
        for (key, value) in changes {
            meta.retain(|(k, _)| k != key);
            meta.extend(value.clone().map(|v| (*key, v)));
        }
        ModelConfig::from_gguf(&Gguf::read(&write(&meta, &[])).unwrap())
    }

    #[test]
    fn gguf_metadata_becomes_a_config() {
        let config = read(&[]).unwrap();
        assert_eq!((config.vocab_size, config.head_dim, config.kv_heads), (3, 16, 2));
        assert_eq!((config.rope_theta, config.rms_norm_eps), (10_000.0, 1e-6));
        assert_eq!(config.eos_tokens, [2, 1]);
        assert!(config.tie_word_embeddings && config.bos_token.is_none());
    }

    #[test]
    fn what_gguf_metadata_asks_for_and_the_decoder_lacks_is_named() {
        let (text, number) = (|t: &str| Some(Meta::Text(t.into())), |n| Some(Meta::Unsigned(n)));
        for (key, value) in [
            ("general.architecture", text("falcon")),
            ("llama.rope.scaling.type", text("yarn")),
            ("llama.rope.scaling.type", number(1)),
            ("llama.rope.scaling.factor", Some(Meta::Float(4.0))),
            ("llama.rope.scale_linear", Some(Meta::Float(2.0))),
            ("llama.expert_count", number(8)),
            ("split.count", number(2)),
            ("llama.attention.head_count_kv", Some(Meta::List(vec![Meta::Unsigned(2)]))),
            ("llama.attention.layer_norm_rms_epsilon", None),
            ("llama.block_count", None),
            ("tokenizer.ggml.eos_token_id", number(1 << 40)),
        ] {
            let error = read(&[(key, value)]).unwrap_err().message;
            let word = if key == "split.count" { "split into 2 files" } else { key };
            assert!(error.contains(word), "{key}: {error}");
        }
        read(&[("llama.rope.scaling.type", text("none"))]).unwrap();
        read(&[("llama.rope.scaling.factor", Some(Meta::Float(1.0)))]).unwrap();
    }

    #[test]
    fn absurd_dimensions_are_refused() {
        for (key, value) in [
            ("llama.attention.key_length", Meta::Unsigned(u64::MAX)),
            ("llama.attention.key_length", Meta::Unsigned(15)),
            ("llama.attention.head_count", Meta::Unsigned(0)),
            ("llama.attention.head_count_kv", Meta::Unsigned(3)),
            ("llama.embedding_length", Meta::Unsigned(1 << 40)),
            ("llama.block_count", Meta::Unsigned(1 << 20)),
            ("llama.rope.freq_base", Meta::Float(f64::NAN)),
            ("llama.attention.layer_norm_rms_epsilon", Meta::Float(f64::INFINITY)),
        ] {
            assert!(read(&[(key, Some(value))]).is_err(), "{key}");
        }
    }

    #[test]
    fn a_gguf_files_control_tokens_that_end_a_turn_are_end_tokens() {
        let tokens = ["<|eot_id|>", "a", "<|im_end|>", "<|im_start|>", "<|end|>"].map(|t| Meta::Text(t.into()));
        let kinds = [3, 1, 3, 3, 1].map(Meta::Unsigned);
        let config = read(&[
            ("tokenizer.ggml.tokens", Some(Meta::List(tokens.into()))),
            ("tokenizer.ggml.token_type", Some(Meta::List(kinds.into()))),
            ("tokenizer.ggml.eos_token_id", Some(Meta::Unsigned(2))),
        ]);
        // Those that the file names come first; `<|end|>` is no control token here.
        assert_eq!(config.unwrap().eos_tokens, [2, 1, 0]);
    }

    /// `config.json` of a small model with `changes` on top.
    fn from_json(changes: Value) -> Result<ModelConfig> {
        let mut config = json!({ "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 8 });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_json(&config.to_string())
    }

    #[test]
    fn config_json_says_what_the_decoder_computes() {
        let plain = from_json(json!({})).unwrap();
        assert_eq!((plain.kv_heads, plain.head_dim, plain.rope_theta), (2, 4, 10_000.0));
        assert!(!plain.tie_word_embeddings && plain.bos_token.is_none() && plain.eos_tokens.is_empty());
        for harmless in [
            json!({ "rope_scaling": null, "rope_parameters": null, "quantization_config": null, "hidden_act": null }),
            json!({ "rope_scaling": { "type": "default" } }),
            json!({ "rope_scaling": { "rope_type": "default" } }),
            json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e4 } }),
            json!({ "rope_parameters": {} }),
            json!({ "attention_bias": false, "mlp_bias": false, "hidden_act": "silu", "num_key_value_heads": 2 }),
            json!({ "head_dim": 4, "some_new_key": { "of": "no concern" } }),
        ] {
            assert_eq!(from_json(harmless.clone()).unwrap(), plain, "{harmless}");
        }
        for (theta, want) in [
            (json!({ "rope_theta": 5e5 }), 5e5),
            (json!({ "rope_parameters": { "rope_theta": 5e5 } }), 5e5),
            (json!({ "rope_theta": 1e6, "rope_parameters": { "rope_theta": 5e5, "rope_type": "default" } }), 5e5),
            (json!({ "rope_theta": 1e6, "rope_parameters": { "rope_type": "default" } }), 1e6),
        ] {
            assert_eq!(from_json(theta.clone()).unwrap().rope_theta, want, "{theta}");
        }
        for (ends, want) in [(json!(null), vec![]), (json!(2), vec![2]), (json!([2, 7]), vec![2, 7])] {
            assert_eq!(from_json(json!({ "eos_token_id": ends })).unwrap().eos_tokens, want);
        }
        let other = from_json(json!({ "head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": true })).unwrap();
        assert_eq!(other.shape(Projection::Q), (12, 8));
        assert_eq!(other.shape(Projection::K), (6, 8));
        assert!(other.tie_word_embeddings);
    }

    #[test]
    fn what_config_json_asks_for_and_the_decoder_lacks_is_named() {
        for (changes, words) in [
            (json!({ "model_type": "mamba" }), ["model_type", "mamba"]),
            (json!({ "model_type": null }), ["config.json", "null"]),
            (json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }), ["rope_scaling", "linear"]),
            (json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } }), ["rope_scaling", "yarn"]),
            (json!({ "rope_scaling": { "factor": 2.0 } }), ["rope_scaling", "factor"]),
            (json!({ "rope_scaling": "dynamic" }), ["rope_scaling", "dynamic"]),
            (json!({ "rope_parameters": { "rope_type": "llama3", "factor": 8.0 } }), ["rope_parameters", "llama3"]),
            (json!({ "rope_parameters": { "rope_type": 3 } }), ["rope_parameters", "3"]),
            (json!({ "rope_parameters": { "rope_theta": "big" } }), ["rope_parameters.rope_theta", "big"]),
            (json!({ "attention_bias": true }), ["attention_bias", "true"]),
            (json!({ "mlp_bias": true }), ["mlp_bias", "true"]),
            (json!({ "hidden_act": "gelu" }), ["hidden_act", "gelu"]),
            (json!({ "quantization_config": { "quant_method": "bitsandbytes" } }), ["quantization", "bitsandbytes"]),
            (json!({ "quantization_config": { "quant_method": "gptq" } }), ["quantization_config", "gptq"]),
            (json!({ "quantization_config": { "bits": 4 } }), ["quantization_config", "bits"]),
            (json!({ "num_key_value_heads": 3 }), ["2 attention heads", "3 key-value heads"]),
            (json!({ "head_dim": 5 }), ["head_dim", "5"]),
        ] {
            let error = from_json(changes.clone()).unwrap_err().message;
            assert!(words.iter().all(|word| error.contains(word)), "{changes}: {error}");
        }
    }
}
