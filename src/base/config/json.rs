//! `config.json` of Hugging Face.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{ModelConfig, check_layers, check_size, longrope_context};
use crate::base::rope::{Llama3, Rope, Yarn};
use crate::base::{Activation, Architecture, Family};
use crate::{Error, Result};

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn bad_json(what: impl std::fmt::Display) -> Error {
    Error::unprocessable(format!("config.json: {what}"))
}

/// The fields of `config.json`, or of an object in it.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Where the object lies, with a dot at the end.
    at: &'a str,
    /// `(name elsewhere, name here)`.
    renamed: &'static [(&'static str, &'static str)],
}

/// GPT-2's own names of what other families have too.
const GPT2_FIELDS: [(&str, &str); 5] = [
    ("hidden_size", "n_embd"),
    ("intermediate_size", "n_inner"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("max_position_embeddings", "n_positions"),
];

impl<'a> Fields<'a> {
    /// The name under which a field is there, if it is.
    fn name(&self, key: &'a str) -> &'a str {
        let renamed = self.renamed.iter().find(|(elsewhere, here)| *elsewhere == key && self.map.contains_key(*here));
        renamed.map_or(key, |(_, here)| here)
    }

    /// Whether the field is there, null or not.
    fn has(&self, key: &'a str) -> bool {
        self.map.contains_key(self.name(key))
    }

    /// `None` where the field is absent or null.
    fn get<T: DeserializeOwned>(&self, key: &'a str) -> Result<Option<T>> {
        let key = self.name(key);
        let Some(value) = self.map.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        T::deserialize(value).map(Some).map_err(|e| bad_json(format!("{}{key} is {value}: {e}", self.at)))
    }

    fn need<T: DeserializeOwned>(&self, key: &'a str) -> Result<T> {
        let found = if self.has(key) { "null" } else { "missing" };
        self.get(key)?.ok_or_else(|| bad_json(format!("{}{} is {found}; it is needed", self.at, self.name(key))))
    }

    /// As transformers' classes do: `absent` where the field is absent, `null` where it is null.
    fn get_or<T: DeserializeOwned>(&self, key: &'a str, absent: T, null: T) -> Result<T> {
        Ok(self.get(key)?.unwrap_or(if self.has(key) { null } else { absent }))
    }

    fn flag(&self, key: &'a str) -> Result<bool> {
        Ok(self.get(key)?.unwrap_or(false))
    }
}

impl ModelConfig {
    /// Reads Hugging Face's `config.json`; where a field is absent, transformers' default for the family counts, but for the
    /// tokens that begin and end a text, which are none then. A family or an option that the decoder does not compute is
    /// refused by name.
    pub fn from_json(text: &str) -> Result<Self> {
        let map: Map<String, Value> = serde_json::from_str(text).map_err(bad_json)?;
        let name: String = Fields { map: &map, at: "", renamed: &[] }.need("model_type")?;
        let family = Family::from_name(&name).ok_or_else(|| {
            let known = Family::ALL.map(Family::name).join(", ");
            bad_json(format!("model_type is {name:?}; supported: {known}"))
        })?;
        let renamed: &[_] = if family == Family::Gpt2 { &GPT2_FIELDS } else { &[] };
        let fields = Fields { map: &map, at: "", renamed };
        if let Some(quantised) = fields.get::<Value>("quantization_config")? {
            let method = quantised.get("quant_method").cloned().unwrap_or(quantised);
            let what = "supported: plain weights, or a GGUF file";
            return Err(bad_json(format!("quantization_config {method} is not supported; {what}")));
        }
        let hidden_size: usize = fields.need("hidden_size")?;
        let heads: usize = fields.need("num_attention_heads")?;
        let share = hidden_size / heads.max(1);
        let head_dim = match family {
            Family::Qwen3 => fields.get_or("head_dim", 128, share)?,
            Family::Gemma2 => fields.get_or("head_dim", 256, share)?,
            Family::Gpt2 | Family::Bert => share,
            _ => fields.get("head_dim")?.unwrap_or(share),
        };
        if matches!(family, Family::Gpt2 | Family::Bert) && head_dim * heads != hidden_size {
            let [width, of_heads] = ["hidden_size", "num_attention_heads"].map(|key| fields.name(key));
            return Err(bad_json(format!("{width} is {hidden_size}, not a multiple of {of_heads}, {heads}")));
        }
        let (kv, context, eps, tied) = match family {
            Family::Llama => (heads, 2048, 1e-6, false),
            Family::Mistral => (8, 131_072, 1e-6, false),
            Family::Qwen2 | Family::Qwen3 => (32, 32_768, 1e-6, false),
            Family::Gemma2 => (4, 8192, 1e-6, true),
            Family::Phi3 => (heads, 4096, 1e-5, false),
            Family::Gpt2 => (heads, 1024, 1e-5, true),
            Family::Bert => (heads, 512, 1e-12, true),
        };
        let (kv_heads, eps_name) = match family {
            Family::Gpt2 => (heads, "layer_norm_epsilon"),
            Family::Bert => (heads, "layer_norm_eps"),
            _ => (fields.get_or("num_key_value_heads", kv, heads)?, "rms_norm_eps"),
        };
        let intermediate_size = match family {
            Family::Gpt2 => fields.get("intermediate_size")?.unwrap_or(hidden_size.saturating_mul(4)),
            _ => fields.need("intermediate_size")?,
        };
        let (layers, context) =
            (fields.need("num_hidden_layers")?, fields.get_or("max_position_embeddings", context, 0)?);
        check_layers(layers)?;
        let (rope, context) = match family {
            Family::Gpt2 | Family::Bert => (None, context),
            _ => {
                let (rope, context) = rope_from_json(&fields, family, head_dim, context)?;
                (Some(rope), context)
            }
        };
        ModelConfig {
            family,
            vocab_size: fields.need("vocab_size")?,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps: fields.get(eps_name)?.unwrap_or(eps),
            rope,
            windows: windows_from_json(&fields, family, layers)?,
            architecture: architecture_from_json(&fields, family)?,
            context,
            tie_word_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(tied),
            predicts: !family.is_encoder(),
            bos_token: fields.get("bos_token_id")?,
            eos_tokens: match fields.get("eos_token_id")? {
                None => vec![],
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        }
        .checked()
    }
}

fn architecture_from_json(fields: &Fields, family: Family) -> Result<Architecture> {
    let mut a = Architecture::of(family);
    let key = match family {
        Family::Gemma2 => "hidden_activation",
        Family::Gpt2 => "activation_function",
        _ => "hidden_act",
    };
    if let Some(name) = fields.get::<String>(key)? {
        a.activation = Activation::from_name(&name).ok_or_else(|| {
            let known = "silu, gelu, gelu_new, gelu_pytorch_tanh and other names of these, relu";
            bad_json(format!("{key} is {name:?}; supported: {known}"))
        })?;
    }
    match family {
        Family::Llama => (a.qkv_bias, a.mlp_bias) = (fields.flag("attention_bias")?, fields.flag("mlp_bias")?),
        Family::Qwen3 => a.qkv_bias = fields.flag("attention_bias")?,
        Family::Gemma2 => {
            a.qkv_bias = fields.flag("attention_bias")?;
            let scalar: f64 = fields.get("query_pre_attn_scalar")?.unwrap_or(256.0);
            a.attention_scale = Some(scalar.powf(-0.5));
            // Null switches a cap off; only its absence means the default.
            a.attention_softcap = fields.get_or("attn_logit_softcapping", a.attention_softcap, None)?;
            a.logit_softcap = fields.get_or("final_logit_softcapping", a.logit_softcap, None)?;
            if fields.flag("use_bidirectional_attention")? {
                let what = "supported: attention to earlier tokens only";
                return Err(bad_json(format!("use_bidirectional_attention is true; {what}")));
            }
        }
        Family::Gpt2 => {
            if !fields.get("scale_attn_weights")?.unwrap_or(true) {
                a.attention_scale = Some(1.0);
            }
            a.scales_by_layer = fields.flag("scale_attn_by_inverse_layer_idx")?;
            if fields.flag("add_cross_attention")? {
                return Err(bad_json("add_cross_attention is true; supported: decoders without an encoder"));
            }
        }
        Family::Bert => {
            for key in ["is_decoder", "add_cross_attention"] {
                if fields.flag(key)? {
                    return Err(bad_json(format!("{key} is true; supported: encoders, whose tokens see each other")));
                }
            }
            if let Some(kind) = fields.get::<String>("position_embedding_type")?.filter(|kind| kind != "absolute") {
                return Err(bad_json(format!("position_embedding_type is {kind:?}; supported: absolute")));
            }
        }
        Family::Mistral | Family::Qwen2 | Family::Phi3 => {}
    }
    if !matches!(family, Family::Gpt2 | Family::Qwen2 | Family::Bert) {
        a.o_bias = a.qkv_bias;
    }
    Ok(a)
}

/// The window of each layer.
fn windows_from_json(fields: &Fields, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let key = "sliding_window";
    let window = match family {
        Family::Llama | Family::Gpt2 | Family::Bert => return Ok(vec![]),
        Family::Phi3 => return Ok(vec![fields.get(key)?; layers]),
        Family::Mistral => return Ok(vec![fields.get_or(key, Some(4096), None)?; layers]),
        Family::Qwen2 | Family::Qwen3 if !fields.flag("use_sliding_window")? => None,
        Family::Qwen2 | Family::Qwen3 | Family::Gemma2 => fields.get_or(key, Some(4096), None)?,
    };
    let sliding: Vec<bool> = match fields.get::<Vec<String>>("layer_types")? {
        Some(types) if types.len() != layers => {
            let what = format!("layer_types names {} layers, num_hidden_layers is {layers}", types.len());
            return Err(bad_json(what));
        }
        Some(types) => {
            let is_sliding = |kind: &String| match kind.as_str() {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                _ => {
                    let known = "supported: full_attention, sliding_attention";
                    Err(bad_json(format!("layer_types has {kind:?}; {known}")))
                }
            };
            types.iter().map(is_sliding).collect::<Result<_>>()?
        }
        None if family == Family::Gemma2 => (0..layers).map(|layer| layer % 2 == 0).collect(),
        None => {
            let first = fields.get("max_window_layers")?.unwrap_or(28);
            (0..layers).map(|layer| window.is_some() && layer >= first).collect()
        }
    };
    if window.is_none() && sliding.contains(&true) {
        let what = "layer_types has sliding_attention and there is no sliding_window (for Qwen, use_sliding_window)";
        return Err(bad_json(what));
    }
    Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}

/// The rope, and the longest sequence that it is right for.
fn rope_from_json(fields: &Fields, family: Family, head_dim: usize, context: usize) -> Result<(Rope, usize)> {
    check_size("head_dim", head_dim)?;
    // transformers 5 keeps all in `rope_parameters`, older ones the scaling alone in `rope_scaling`, which goes first.
    let mut scaling = None;
    for key in ["rope_scaling", "rope_parameters"] {
        match fields.get::<Value>(key)? {
            Some(Value::Object(map)) if map.is_empty() => {}
            Some(Value::Object(map)) => {
                scaling = Some((key, map));
                break;
            }
            Some(other) => return Err(bad_json(format!("{key} is {other}; expected an object"))),
            None => {}
        }
    }
    let (key, map) = scaling.unwrap_or(("rope_parameters", Map::new()));
    let at = format!("{key}.");
    let scaling = Fields { map: &map, at: &at, renamed: &[] };
    let kind: Option<String> = match scaling.get("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.get("type")?,
    };
    let kind = match kind.as_deref() {
        // Without a type, only what the plain kind has may be there: anything else belongs to a kind that is not named.
        None if map.keys().all(|key| matches!(key.as_str(), "rope_theta" | "partial_rotary_factor")) => "default",
        None => return Err(bad_json(format!("{key} {} has no rope_type", Value::Object(map.clone())))),
        // What Phi-3 was published with before the kind had its name.
        Some("su" | "yarn") if family == Family::Phi3 => "longrope",
        Some(kind) => kind,
    };
    let theta = match scaling.get("rope_theta")? {
        Some(theta) => theta,
        None => fields.get("rope_theta")?.unwrap_or(10_000.0),
    };
    let part: f64 = match scaling.get("partial_rotary_factor")? {
        Some(part) => part,
        None => fields.get("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let rotated = (head_dim as f64 * part) as usize;
    let possible = if family == Family::Phi3 { rotated > 0 && rotated <= head_dim } else { rotated == head_dim };
    if !possible {
        let what = if family == Family::Phi3 { "more than 0, at most 1" } else { "1" };
        return Err(bad_json(format!("partial_rotary_factor is {part}; supported for {family}: {what}")));
    }
    if !rotated.is_multiple_of(2) {
        let what = "expected an even number to be turned";
        return Err(bad_json(format!("head_dim is {head_dim}, of which rope turns {rotated}; {what}")));
    }
    let plain = Rope::plain(theta, rotated);
    let key_of_original = "original_max_position_embeddings";
    // Only Phi-3 has it beside the scaling, always; transformers reads it there for longrope alone.
    let own = if family == Family::Phi3 { Some(4096.0) } else { None };
    let outside = if kind == "longrope" { fields.get::<f64>(key_of_original)?.or(own) } else { None };
    let original = || -> Result<f64> {
        let inside: Option<f64> = scaling.get(key_of_original)?;
        let original = outside.or(inside).unwrap_or(context as f64);
        match original > 0.0 {
            true => Ok(original),
            false => Err(bad_json(format!("original_max_position_embeddings is {original}; expected more than 0"))),
        }
    };
    let rope = match kind {
        "default" => plain,
        kind if family == Family::Phi3 && kind != "longrope" => {
            return Err(bad_json(format!("{key} has the type {kind:?}; supported for phi3: default, longrope")));
        }
        // Within `max_position_embeddings` it leaves the angles as they are, and longer sequences are not served.
        "dynamic" => plain,
        "linear" => plain.linear(scaling.need("factor")?),
        "llama3" => plain.llama3(Llama3 {
            factor: scaling.need("factor")?,
            low_freq_factor: scaling.need("low_freq_factor")?,
            high_freq_factor: scaling.need("high_freq_factor")?,
            original_context: original()?,
        }),
        "yarn" => {
            let original_context = original()?;
            let factor = scaling.get("factor")?.unwrap_or(context as f64 / original_context);
            let mscales: [Option<f64>; 2] = [scaling.get("mscale")?, scaling.get("mscale_all_dim")?];
            let attention_factor = match (scaling.get("attention_factor")?, mscales) {
                (Some(factor), _) => factor,
                (None, [Some(m), Some(all)]) if m != 0.0 && all != 0.0 => {
                    Rope::yarn_attention_factor(factor, m) / Rope::yarn_attention_factor(factor, all)
                }
                (None, _) => Rope::yarn_attention_factor(factor, 1.0),
            };
            let bound = |key: &'static str, usual: f64| -> Result<f64> {
                Ok(scaling.get(key)?.filter(|&bound: &f64| bound != 0.0).unwrap_or(usual))
            };
            let rope = plain.yarn(Yarn {
                factor,
                original_context,
                beta_fast: bound("beta_fast", 32.0)?,
                beta_slow: bound("beta_slow", 1.0)?,
                truncate: scaling.get("truncate")?.unwrap_or(true),
                attention_factor,
            });
            // Some models name the stretched context, others (Qwen's) the one before.
            let stretched = scaling.has("original_max_position_embeddings").then_some(factor * original_context);
            return Ok((rope, context.max(stretched.unwrap_or(0.0) as usize)));
        }
        "longrope" => {
            let original = original()?;
            // An original context beside the scaling says by itself how far it is stretched.
            let told = if outside.is_some() { None } else { scaling.get("factor")? };
            let factor = told.unwrap_or(context as f64 / original);
            return longrope_from_json(&scaling, plain, original, factor, context);
        }
        other => {
            let known = "default, linear, dynamic, yarn, longrope, llama3";
            return Err(bad_json(format!("{key} has the type {other:?}; supported: {known}")));
        }
    };
    Ok((rope, context))
}

/// `factor` is how far the original context is stretched.
fn longrope_from_json(
    scaling: &Fields,
    plain: Rope,
    original: f64,
    factor: f64,
    context: usize,
) -> Result<(Rope, usize)> {
    let divisors = |key| -> Result<Vec<f32>> {
        let divisors: Vec<f32> = scaling.need(key)?;
        let (found, expected) = (divisors.len(), plain.frequencies.len());
        match found == expected {
            true => Ok(divisors),
            false => Err(bad_json(format!("{}{key} has {found} numbers; expected {expected}", scaling.at))),
        }
    };
    let (short, _long) = (divisors("short_factor")?, divisors("long_factor")?);
    let attention_factor = match scaling.get("attention_factor")? {
        Some(factor) => factor,
        None => Rope::longrope_attention_factor(factor, original),
    };
    Ok((plain.divided(&short, attention_factor), longrope_context(original as usize, context)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::base::Projection;

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
        assert_eq!((plain.kv_heads, plain.head_dim, &plain.rope), (2, 4, &Some(Rope::plain(10_000.0, 4))));
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
            assert_eq!(from_json(theta.clone()).unwrap().rope.unwrap().theta, want, "{theta}");
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
            (json!({ "rope_scaling": { "type": "ntk" } }), ["rope_scaling", "ntk"]),
            (json!({ "rope_scaling": { "type": "linear" } }), ["rope_scaling.factor", "missing"]),
            (json!({ "rope_scaling": { "factor": 2.0 } }), ["rope_scaling", "factor"]),
            (json!({ "rope_scaling": "dynamic" }), ["rope_scaling", "dynamic"]),
            (json!({ "rope_parameters": { "rope_type": 3 } }), ["rope_parameters", "3"]),
            (json!({ "rope_parameters": { "rope_theta": "big" } }), ["rope_parameters.rope_theta", "big"]),
            (json!({ "hidden_act": "mish" }), ["hidden_act", "mish"]),
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

    /// `config.json` of a small model of a family, with all that has no default, and `changes` on top.
    fn of(family: Family, changes: Value) -> Result<ModelConfig> {
        let mut config = json!({ "model_type": family.name(), "vocab_size": 8, "hidden_size": 16,
            "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 8 });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_json(&config.to_string())
    }

    /// As the classes of transformers 4.57 have them.
    #[test]
    fn absent_fields_mean_what_the_family_says() {
        for (family, kv_heads, head_dim, context, eps, tied) in [
            (Family::Llama, 8, 2, 2048, 1e-6, false),
            (Family::Mistral, 8, 2, 131_072, 1e-6, false),
            (Family::Qwen3, 8, 128, 32_768, 1e-6, false),
            (Family::Gemma2, 4, 256, 8192, 1e-6, true),
            (Family::Phi3, 8, 2, 4096, 1e-5, false),
            (Family::Gpt2, 8, 2, 1024, 1e-5, true),
        ] {
            // Qwen's default of 32 key-value heads would not fit these 8.
            let changes = if family == Family::Qwen3 { json!({ "num_key_value_heads": null }) } else { json!({}) };
            let c = of(family, changes).unwrap();
            let found = (c.kv_heads, c.head_dim, c.context, c.norm_eps, c.tie_word_embeddings);
            assert_eq!(found, (kv_heads, head_dim, context, eps, tied), "{family}");
            assert_eq!(c.rope.is_none(), family == Family::Gpt2);
        }
        assert!(of(Family::Qwen2, json!({})).unwrap_err().message.contains("32 key-value heads"));
        assert_eq!(of(Family::Mistral, json!({ "num_key_value_heads": 2, "head_dim": null })).unwrap().head_dim, 2);
        assert_eq!(of(Family::Gpt2, json!({})).unwrap().intermediate_size, 8);
        let gpt2 = json!({ "model_type": "gpt2", "vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2,
            "n_positions": 32, "n_inner": null, "layer_norm_epsilon": 1e-3 });
        let gpt2 = ModelConfig::from_json(&gpt2.to_string()).unwrap();
        assert_eq!((gpt2.hidden_size, gpt2.intermediate_size, gpt2.context, gpt2.norm_eps), (16, 64, 32, 1e-3));
    }

    #[test]
    fn windows_are_those_of_transformers() {
        let windows = |family, changes: Value| of(family, changes).unwrap().windows;
        let one = |window| vec![window; 4];
        assert_eq!(windows(Family::Llama, json!({ "sliding_window": 4 })), []);
        assert_eq!(windows(Family::Mistral, json!({})), one(Some(4096)));
        assert_eq!(windows(Family::Mistral, json!({ "sliding_window": null })), one(None));
        assert_eq!(windows(Family::Mistral, json!({ "sliding_window": 7 })), one(Some(7)));
        assert_eq!(windows(Family::Phi3, json!({})), one(None));
        assert_eq!(windows(Family::Phi3, json!({ "sliding_window": 7 })), one(Some(7)));
        let kv = |mut changes: Value| {
            changes["num_key_value_heads"] = json!(8);
            changes
        };
        for family in [Family::Qwen2, Family::Qwen3] {
            assert_eq!(windows(family, kv(json!({ "sliding_window": 7, "max_window_layers": 0 }))), one(None));
            let used = json!({ "use_sliding_window": true, "sliding_window": 7 });
            assert_eq!(windows(family, kv(used.clone())), one(None)); // From layer 28 on.
            let mut some = kv(used.clone());
            some["max_window_layers"] = json!(3);
            assert_eq!(windows(family, some), [None, None, None, Some(7)]);
            let mut listed = kv(used);
            listed["layer_types"] =
                json!(["sliding_attention", "full_attention", "full_attention", "sliding_attention"]);
            assert_eq!(windows(family, listed), [Some(7), None, None, Some(7)]);
        }
        assert_eq!(windows(Family::Gemma2, json!({})), [Some(4096), None, Some(4096), None]);
        let full = json!({ "sliding_window": 7, "layer_types": vec!["full_attention"; 4] });
        assert_eq!(windows(Family::Gemma2, full), one(None));
    }

    #[test]
    fn caps_scales_and_biases_follow_the_fields() {
        let gemma = |changes| of(Family::Gemma2, changes).unwrap();
        let plain = gemma(json!({})).architecture;
        assert_eq!((plain.attention_softcap, plain.logit_softcap), (Some(50.0), Some(30.0)));
        assert_eq!((plain.attention_scale, plain.activation), (Some(1.0 / 16.0), Activation::GeluTanh));
        let other = gemma(json!({ "attn_logit_softcapping": null, "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 4, "hidden_activation": "gelu", "attention_bias": true }));
        assert_eq!(other.attention_scale(3), 0.5);
        let other = other.architecture;
        assert_eq!((other.attention_softcap, other.logit_softcap), (None, Some(4.0)));
        assert_eq!((other.qkv_bias, other.o_bias, other.mlp_bias), (true, true, false));
        let biases = |family, changes: Value| {
            let a = of(family, changes).unwrap().architecture;
            (a.qkv_bias, a.o_bias, a.mlp_bias)
        };
        let all = json!({ "attention_bias": true, "mlp_bias": true, "num_key_value_heads": 8 });
        assert_eq!(biases(Family::Llama, all.clone()), (true, true, true));
        assert_eq!(biases(Family::Qwen3, all.clone()), (true, true, false));
        // These have no such field in transformers.
        assert_eq!(biases(Family::Mistral, all.clone()), (false, false, false));
        assert_eq!(biases(Family::Phi3, all.clone()), (false, false, false));
        assert_eq!(biases(Family::Qwen2, all), (true, false, false));
        let gpt2 = of(Family::Gpt2, json!({ "scale_attn_weights": false, "scale_attn_by_inverse_layer_idx": true }));
        assert_eq!(gpt2.unwrap().attention_scale(3), 0.25);
    }

    #[test]
    fn scaled_ropes_bound_the_context() {
        let llama = |changes| of(Family::Llama, changes).unwrap();
        let yarn = |more: Value| {
            let mut scaling = json!({ "type": "yarn", "factor": 4.0 });
            scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            llama(json!({ "max_position_embeddings": 64, "rope_scaling": scaling }))
        };
        assert_eq!(yarn(json!({})).context, 64);
        assert_eq!(yarn(json!({ "original_max_position_embeddings": 64 })).context, 256);
        assert_eq!(yarn(json!({ "original_max_position_embeddings": 16 })).context, 64);
        let scaling = json!({ "type": "longrope", "short_factor": [2.0], "long_factor": [3.0] });
        let phi = json!({ "max_position_embeddings": 8192, "rope_scaling": scaling });
        let phi = of(Family::Phi3, phi).unwrap();
        assert_eq!((phi.context, phi.rope.unwrap().frequencies), (4096, vec![0.5]));
        // Within its context it turns as the plain one does.
        let dynamic = llama(json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }));
        assert_eq!(dynamic.rope, llama(json!({})).rope);
    }

    #[test]
    fn what_a_family_lacks_is_named() {
        let kinds = |kind: &str| json!(["full_attention", kind, "full_attention", "full_attention"]);
        let short = json!({ "type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0] });
        for (family, changes, words) in [
            (Family::Gemma2, json!({ "layer_types": kinds("chunked_attention") }), ["layer_types", "chunked"]),
            (Family::Gemma2, json!({ "layer_types": ["full_attention"] }), ["1 layers", "4"]),
            (Family::Gemma2, json!({ "sliding_window": null }), ["sliding_window", "sliding_attention"]),
            (Family::Gemma2, json!({ "sliding_window": 0 }), ["sliding_window", "0"]),
            (Family::Gemma2, json!({ "use_bidirectional_attention": true }), ["use_bidirectional", "true"]),
            (Family::Gemma2, json!({ "final_logit_softcapping": -1.0 }), ["final_logit_softcapping", "-1"]),
            (Family::Qwen3, json!({ "layer_types": kinds("sliding_attention") }), ["layer_types", "use_sliding"]),
            (Family::Phi3, json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }), ["linear", "phi3"]),
            (Family::Phi3, json!({ "rope_scaling": short }), ["short_factor has 2", "expected 1"]),
            (Family::Phi3, json!({ "partial_rotary_factor": 1.5 }), ["partial_rotary_factor", "1.5"]),
            (Family::Mistral, json!({ "partial_rotary_factor": 0.5 }), ["partial_rotary_factor", "0.5"]),
            (Family::Gpt2, json!({ "n_embd": 20 }), ["n_embd", "20"]),
            (Family::Gpt2, json!({ "add_cross_attention": true }), ["add_cross_attention", "true"]),
            (Family::Gpt2, json!({ "activation_function": "tanh" }), ["activation_function", "tanh"]),
            (Family::Llama, json!({ "hidden_size": null }), ["hidden_size", "null"]),
            (Family::Llama, json!({ "rope_theta": 0.0 }), ["rope_theta", "0"]),
        ] {
            let error = of(family, changes.clone()).unwrap_err().message;
            assert!(words.iter().all(|word| error.contains(word)), "{family} {changes}: {error}");
        }
    }
}
