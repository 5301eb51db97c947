//! Metadata of GGUF files.

use super::{ModelConfig, check_layers, check_size, longrope_context};
use crate::base::gguf::{CONTROL, Gguf};
use crate::base::rope::{Rope, Yarn};
use crate::base::{Architecture, Family};
use crate::{Error, Result};

/// Tokens that end a turn or a text wherever they are known. A GGUF names one or two end tokens, and its model may
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

impl ModelConfig {
    /// Reads the metadata of a GGUF file, as llama.cpp does. `data` is the whole file.
    pub(in crate::base) fn from_gguf(gguf: &Gguf, data: &[u8]) -> Result<Self> {
        let unsupported = |what: String| Err(Error::unprocessable(format!("GGUF: {what}")));
        let name = gguf.text("general.architecture")?;
        let Some(family) = Family::all_in_gguf().find(|family| family.name() == name) else {
            let known = Family::all_in_gguf().map(Family::name).collect::<Vec<_>>().join(", ");
            return unsupported(format!("general.architecture is {name:?}; supported: {known}"));
        };
        let number = |key: &str| gguf.number(&format!("{family}.{key}"));
        let optional = |key: &str| gguf.optional_number(&format!("{family}.{key}"));
        if let Some(experts) = optional("expert_count")?.filter(|&n| n > 0) {
            return unsupported(format!("{family}.expert_count is {experts}; supported: models without experts"));
        }
        if let Some(parts) = gguf.optional_number("split.count")?.filter(|&n| n > 1) {
            return unsupported(format!("the model is split into {parts} files; supported: one file"));
        }
        let (heads, hidden_size) = (number("attention.head_count")?, number("embedding_length")?);
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden_size / heads.max(1));
        let value_dim = optional("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            return unsupported(format!(
                "values of {value_dim} numbers a head and keys of {head_dim}; supported: equal"
            ));
        }
        let (layers, context) = (number("block_count")?, number("context_length")?);
        check_layers(layers)?;
        let mut architecture = Architecture::of(family);
        // The files do not say which layers have biases, other than by having them.
        let has_bias = |parts: &[&str]| parts.iter().any(|p| gguf.tensors.contains_key(&format!("blk.0.{p}.bias")));
        architecture.qkv_bias = has_bias(&["attn_q", "attn_qkv"]);
        architecture.o_bias = has_bias(&["attn_output"]);
        architecture.mlp_bias = has_bias(&["ffn_up"]);
        let mut windows = vec![];
        let window = optional("attention.sliding_window")?.filter(|&n| n > 0);
        match family {
            Family::Gemma2 => {
                if let Some(pattern) = optional("attention.sliding_window_pattern")?.filter(|&p| p != 2) {
                    let what = "supported: 2, every other layer";
                    return unsupported(format!("gemma2.attention.sliding_window_pattern is {pattern}; {what}"));
                }
                let window = window.unwrap_or(4096);
                windows = (0..layers).map(|layer| (layer % 2 == 0).then_some(window)).collect();
                // As llama.cpp has it: only the model of 46 layers scales by another width than its heads'.
                architecture.attention_scale = (layers == 46).then(|| ((hidden_size / heads.max(1)) as f64).powf(-0.5));
                for (key, cap) in [
                    ("attn_logit_softcapping", &mut architecture.attention_softcap),
                    ("final_logit_softcapping", &mut architecture.logit_softcap),
                ] {
                    if let Some(found) = gguf.optional_real(&format!("{family}.{key}"))? {
                        *cap = Some(found).filter(|&cap| cap != 0.0);
                    }
                }
            }
            Family::Phi3 => windows = vec![window; layers],
            _ => {}
        }
        let (rope, context) = match family {
            Family::Gpt2 => (None, context),
            _ => {
                let (rope, context) = rope_from_gguf(gguf, data, family, head_dim, context)?;
                (Some(rope), context)
            }
        };
        let eps = if family == Family::Gpt2 { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
        let token = |key: &str| gguf.token(&format!("tokenizer.ggml.{key}"));
        let mut eos_tokens = vec![];
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos_tokens.extend(token(key)?.filter(|id| !eos_tokens.contains(id)));
        }
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        for (id, text) in tokens.iter().enumerate().filter(|(_, text)| TURN_ENDS.contains(text)) {
            // Phi-3's files call `<|end|>` a user's own. Markup may have `</s>` as it has other tags.
            let is_end = *text != "</s>" || gguf.token_kind(id) == CONTROL;
            if is_end && !eos_tokens.contains(&(id as u32)) {
                eos_tokens.push(id as u32);
            }
        }
        ModelConfig {
            family,
            vocab_size: tokens.len(),
            hidden_size,
            intermediate_size: number("feed_forward_length")?,
            layers,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            norm_eps: gguf.real(&format!("{family}.attention.{eps}"))?,
            rope,
            windows,
            architecture,
            context,
            tie_word_embeddings: !gguf.tensors.contains_key("output.weight"),
            predicts: true,
            bos_token: token("bos_token_id")?,
            eos_tokens,
        }
        .checked()
    }
}

/// The rope, and the longest sequence that it is right for.
fn rope_from_gguf(gguf: &Gguf, data: &[u8], family: Family, head_dim: usize, context: usize) -> Result<(Rope, usize)> {
    check_size("head_dim", head_dim)?;
    let unsupported = |what: String| Err(Error::unprocessable(format!("GGUF: {what}")));
    let present = |key: &str| gguf.meta.get(&format!("{family}.{key}"));
    let real =
        |key: &str, absent: f64| Ok::<_, Error>(gguf.optional_real(&format!("{family}.{key}"))?.unwrap_or(absent));
    let rotated = gguf.optional_number(&format!("{family}.rope.dimension_count"))?.unwrap_or(head_dim);
    let possible = rotated == head_dim || family == Family::Phi3 && (1..head_dim).contains(&rotated);
    if !possible || !rotated.is_multiple_of(2) {
        return unsupported(format!(
            "{family}.rope.dimension_count is {rotated}, of {head_dim} numbers of a head; supported: all"
        ));
    }
    let plain = Rope::plain(real("rope.freq_base", 10_000.0)?, rotated);
    let divisors = |name: &str| -> Result<Option<Vec<f32>>> {
        let Some(divisors) = gguf.numbers(data, name)? else { return Ok(None) };
        match divisors.len() == rotated / 2 {
            true => Ok(Some(divisors)),
            false => {
                let what = format!("GGUF: {name} has {} numbers; expected {}", divisors.len(), rotated / 2);
                Err(Error::unprocessable(what))
            }
        }
    };
    let kind = present("rope.scaling.type").map(|kind| kind.as_str().unwrap_or_default());
    let original = real("rope.scaling.original_context_length", context as f64)?;
    if let Some(short) = divisors("rope_factors_short.weight")? {
        let factor = Rope::longrope_attention_factor(context as f64 / original, original);
        let attention_factor = real("rope.scaling.attn_factor", factor)?;
        return Ok((plain.divided(&short, attention_factor), longrope_context(original as usize, context)));
    }
    if let Some(divisors) = divisors("rope_freqs.weight")? {
        let factor = real("rope.scaling.factor", 1.0)?;
        if kind != Some("none") && factor != 0.0 && factor != 1.0 {
            let what = format!(
                "the tensor rope_freqs.weight and {family}.rope.scaling.factor {factor}; supported: one of them"
            );
            return unsupported(what);
        }
        return Ok((plain.divided(&divisors, 1.0), context));
    }
    // The older spelling of linear scaling counts where there is no other. A factor of 0 means none.
    let factor = real("rope.scaling.factor", real("rope.scale_linear", 1.0)?)?;
    let factor = if factor == 0.0 { 1.0 } else { factor };
    let rope = match kind {
        Some("none") => plain,
        None | Some("linear") if factor == 1.0 => plain,
        None | Some("linear") => plain.linear(factor),
        Some("yarn") => plain.yarn(Yarn {
            factor,
            original_context: original,
            beta_fast: real("rope.scaling.yarn_beta_fast", 32.0)?,
            beta_slow: real("rope.scaling.yarn_beta_slow", 1.0)?,
            truncate: true,
            attention_factor: real("rope.scaling.attn_factor", 1.0)? * Rope::yarn_attention_factor(factor, 1.0),
        }),
        Some(_) => {
            let kind = present("rope.scaling.type").map(ToString::to_string).unwrap_or_default();
            let what = "supported: none, linear, yarn, and longrope with the tensor rope_factors_short.weight";
            return unsupported(format!("{family}.rope.scaling.type is {kind}; {what}"));
        }
    };
    Ok((rope, context))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::gguf::Meta;
    use crate::base::gguf::tests::write;

    /// The metadata of a small model, with `changes` on top; `None` takes a key out. The keys of another architecture are
    /// those of llama here too.
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
        let architecture = meta.iter().find(|(key, _)| *key == "general.architecture");
        let prefix =
            architecture.and_then(|(_, name)| name.as_str()).map_or("llama.".into(), |name| format!("{name}."));
        let keys: Vec<String> = meta.iter().map(|(key, _)| key.replacen("llama.", &prefix, 1)).collect();
        let meta: Vec<_> = keys.iter().zip(meta).map(|(key, (_, value))| (key.as_str(), value)).collect();
        let file = write(&meta, &[]);
        ModelConfig::from_gguf(&Gguf::read(&file).unwrap(), &file)
    }

    #[test]
    fn gguf_metadata_becomes_a_config() {
        let config = read(&[]).unwrap();
        assert_eq!((config.vocab_size, config.head_dim, config.kv_heads), (3, 16, 2));
        assert_eq!((config.rope, config.norm_eps), (Some(Rope::plain(10_000.0, 16)), 1e-6));
        assert_eq!(config.eos_tokens, [2, 1]);
        assert!(config.tie_word_embeddings && config.bos_token.is_none());
    }

    #[test]
    fn what_gguf_metadata_asks_for_and_the_decoder_lacks_is_named() {
        let (text, number) = (|t: &str| Some(Meta::Text(t.into())), |n| Some(Meta::Unsigned(n)));
        for (key, value) in [
            ("general.architecture", text("falcon")),
            ("llama.rope.scaling.type", text("su")),
            ("llama.rope.scaling.type", number(1)),
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
    fn a_gguf_files_tokens_that_end_a_turn_are_end_tokens() {
        let tokens = ["<|eot_id|>", "a", "<|im_end|>", "<|im_start|>", "<|end|>", "</s>"];
        let (tokens, kinds) = (tokens.map(|t| Meta::Text(t.into())), [3, 1, 3, 3, 4, 1].map(Meta::Unsigned));
        let config = read(&[
            ("tokenizer.ggml.tokens", Some(Meta::List(tokens.into()))),
            ("tokenizer.ggml.token_type", Some(Meta::List(kinds.into()))),
            ("tokenizer.ggml.eos_token_id", Some(Meta::Unsigned(2))),
        ]);
        // Those that the file names come first; `</s>` is no control token here.
        assert_eq!(config.unwrap().eos_tokens, [2, 1, 0, 4]);
    }

    #[test]
    fn gemmas_constants_are_llama_cpps() {
        let gemma = |changes: &[(&str, Option<Meta>)]| {
            let family = [("general.architecture", Some(Meta::Text("gemma2".into())))];
            read(&[&family[..], &[("llama.attention.key_length", Some(Meta::Unsigned(32)))], changes].concat())
        };
        let plain = gemma(&[]).unwrap();
        assert_eq!(
            (plain.attention_scale(0), plain.windows[..2].to_vec()),
            (1.0 / 32f32.sqrt(), vec![Some(4096), None])
        );
        let caps = (plain.architecture.attention_softcap, plain.architecture.logit_softcap);
        assert_eq!(caps, (Some(50.0), Some(30.0)));
        let largest = gemma(&[("llama.block_count", Some(Meta::Unsigned(46)))]).unwrap();
        assert_eq!(largest.attention_scale(0), 0.25);
        let number = |key, n: u64| (key, Some(Meta::Unsigned(n)));
        let other = gemma(&[
            number("llama.attention.sliding_window", 7),
            ("llama.attn_logit_softcapping", Some(Meta::Float(0.0))),
            ("llama.final_logit_softcapping", Some(Meta::Float(9.0))),
        ]);
        let other = other.unwrap();
        assert_eq!((other.window(0), other.window(1)), (Some(7), None));
        assert_eq!((other.architecture.attention_softcap, other.architecture.logit_softcap), (None, Some(9.0)));
        let error = gemma(&[number("llama.attention.sliding_window_pattern", 6)]).unwrap_err().message;
        assert!(error.contains("sliding_window_pattern is 6"), "{error}");
    }
}
