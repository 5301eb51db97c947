//! A new model: a tokenizer and a small Llama of random numbers, opened as any base is.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;

use super::args::ShapeArgs;
use super::network::{FAMILY, normal};
use super::random;
use crate::base::{Base, ModelConfig, Tokenizer};
use crate::{Error, Result};

/// What a tokenizer made here puts before a text, and what ends one.
const BOS: &str = "<|begin_of_text|>";
const EOS: &str = "<|end_of_text|>";

/// Spellings of the end of a text in the tokenizers that people have.
const ENDS: [&str; 5] = [EOS, "<|endoftext|>", "</s>", "<eos>", "<|im_end|>"];

/// Bytes and special tokens: what a byte-level tokenizer has at least.
const LEAST_VOCABULARY: usize = 256 + 2;
const MOST_VOCABULARY: usize = 1 << 20;

/// Far larger than any dimension of a model that is trained on a CPU.
const LARGEST: usize = 1 << 16;

/// Makes the model, with a tokenizer made from `texts` where none is given. It is written to a folder and opened from
/// there, so that the trainer, and later the server, understand its tokens alike.
pub fn model(shape: &ShapeArgs, texts: &[String], seed: u64, id: &str) -> Result<Base> {
    check(shape)?;
    let (tokenizer, end) = match &shape.tokenizer {
        Some(file) => given(file)?,
        None => {
            let tokenizer = Tokenizer::from_json(byte_level(texts, shape.vocab_size)?.as_bytes())?;
            let end = tokenizer.token_id(EOS);
            (tokenizer, end)
        }
    };
    let config = json!({
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size(),
        "hidden_size": shape.hidden_size,
        "intermediate_size": intermediate_size(shape),
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": kv_heads(shape),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": !shape.untie_embeddings,
        "bos_token_id": tokenizer.prefix()?.first(),
        "eos_token_id": end,
    })
    .to_string();
    let numbers = numbers(&ModelConfig::from_json(&config)?, seed)?;
    let folder = tempfile::tempdir()?;
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text);
    write("config.json", config)?;
    write("tokenizer.json", tokenizer.to_json()?)?;
    safetensors::serialize_to_file(numbers, None, &folder.path().join("model.safetensors")).map_err(Error::internal)?;
    // The numbers stay mapped when the folder goes.
    let base = Base::open(&folder.path().to_string_lossy())?;
    Ok(Base { id: id.into(), ..base })
}

/// The model in words.
pub fn describe(shape: &ShapeArgs) -> String {
    let tokenizer = match &shape.tokenizer {
        Some(file) => format!("{}", file.file_name().unwrap_or_default().display()),
        None => format!("BPE of {} tokens at most", shape.vocab_size),
    };
    format!(
        "{} layers, hidden size {}, {} heads and {} of keys and values, intermediate size {}, context {}, {} embeddings; \
         tokenizer: {tokenizer}",
        shape.layers,
        shape.hidden_size,
        shape.heads,
        kv_heads(shape),
        intermediate_size(shape),
        shape.context,
        if shape.untie_embeddings { "untied" } else { "tied" }
    )
}

fn kv_heads(shape: &ShapeArgs) -> usize {
    shape.kv_heads.unwrap_or(shape.heads)
}

/// With three matrices of this size a layer has as many numbers as with two of four times the hidden size.
fn intermediate_size(shape: &ShapeArgs) -> usize {
    shape.intermediate_size.unwrap_or((8 * shape.hidden_size).div_ceil(3).next_multiple_of(32))
}

/// Refuses what cannot be a model, by the names of the options.
fn check(shape: &ShapeArgs) -> Result<()> {
    let (hidden, heads, kv_heads) = (shape.hidden_size, shape.heads, kv_heads(shape));
    for (name, number, least) in [
        ("--layers", shape.layers, 1),
        ("--hidden-size", hidden, 1),
        ("--heads", heads, 1),
        ("--kv-heads", kv_heads, 1),
        ("--intermediate-size", shape.intermediate_size.unwrap_or(1), 1),
        ("--context", shape.context, 2),
    ] {
        if !(least..=LARGEST).contains(&number) {
            return Err(Error::bad_request(format!("{name} is {number}; expected {least} to {LARGEST}")));
        }
    }
    if !hidden.is_multiple_of(2 * heads) {
        let what = format!("--hidden-size is {hidden}; expected a multiple of {}, twice the heads", 2 * heads);
        return Err(Error::bad_request(what));
    }
    if !heads.is_multiple_of(kv_heads) {
        let what = format!("--kv-heads is {kv_heads}; expected a number that divides the {heads} heads");
        return Err(Error::bad_request(what));
    }
    Ok(())
}

/// A tokenizer of somebody's, and the token that ends a text: the one that `tokenizer_config.json` beside it names, or a
/// special one with a known spelling.
fn given(file: &Path) -> Result<(Tokenizer, Option<u32>)> {
    let wrong = |e: Error| Error::bad_request(format!("--tokenizer {}", e.message));
    let beside = file.with_file_name("tokenizer_config.json");
    let settings: Value = match fs::read(&beside) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::bad_request(format!("--tokenizer {}: {e}", beside.display())))?,
        Err(_) => Value::Null,
    };
    let tokenizer = Tokenizer::from_file(file).and_then(|t| t.with_settings(&settings)).map_err(wrong)?;
    let named = settings["eos_token"].as_str().or(settings["eos_token"]["content"].as_str());
    let named = named.and_then(|token| tokenizer.token_id(token));
    let known = || ENDS.iter().filter_map(|end| tokenizer.token_id(end)).find(|&id| tokenizer.is_special(id));
    match named.or_else(known) {
        Some(end) => Ok((tokenizer, Some(end))),
        None => Err(Error::bad_request(format!(
            "--tokenizer {}: no token of it ends a text; name one as \"eos_token\" in a tokenizer_config.json beside it, or \
             have one of {ENDS:?}",
            file.display()
        ))),
    }
}

/// A `tokenizer.json` of bytes and of the joins of them that are most frequent in `texts`.
fn byte_level(texts: &[String], size: usize) -> Result<String> {
    if !(LEAST_VOCABULARY..=MOST_VOCABULARY).contains(&size) {
        return Err(Error::bad_request(format!(
            "--vocab-size is {size}; expected {LEAST_VOCABULARY} (256 bytes and 2 special tokens) to {MOST_VOCABULARY}"
        )));
    }
    let failed = |e: &dyn std::fmt::Display| Error::internal(format!("making the tokenizer: {e}"));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(size)
        .min_frequency(2)
        .special_tokens([BOS, EOS].map(|token| AddedToken::from(token, true)).into())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.train(&mut trainer, texts.iter()).map_err(|e| failed(&e))?;
    let bos = tokenizer.token_to_id(BOS).ok_or_else(|| failed(&"it lacks its special tokens"))?;
    let frame = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|b| b.try_pair(format!("{BOS} $A {BOS} $B")))
        .map_err(|e| failed(&e))?
        .special_tokens(vec![(BOS, bos)])
        .build();
    tokenizer.with_post_processor(Some(frame.map_err(|e| failed(&e))?));
    tokenizer.to_string(false).map_err(|e| failed(&e))
}

/// Random numbers as transformers begins with: normal ones of deviation 0.02, and norms of 1.
fn numbers(config: &ModelConfig, seed: u64) -> Result<Vec<(String, Tensor)>> {
    let mut rng = random(seed, "model", 0);
    let mut matrix = |shape| -> Result<Tensor> { Ok(normal(&mut rng, shape, 0.02, &Device::Cpu)?.into_inner()) };
    let norm = Tensor::ones(config.hidden_size, DType::F32, &Device::Cpu)?;
    let vocabulary = (config.vocab_size, config.hidden_size);
    let mut all = vec![("model.embed_tokens.weight".to_string(), matrix(vocabulary)?)];
    for layer in 0..config.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for projection in FAMILY.projections() {
            all.push((name(FAMILY.path(projection)), matrix(config.shape(projection))?));
        }
        all.extend(["input_layernorm", "post_attention_layernorm"].map(|part| (name(part), norm.clone())));
    }
    all.push(("model.norm.weight".into(), norm));
    if !config.tie_word_embeddings {
        all.push(("lm_head.weight".into(), matrix(vocabulary)?));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> ShapeArgs {
        ShapeArgs {
            layers: 2,
            hidden_size: 32,
            heads: 4,
            kv_heads: Some(2),
            intermediate_size: None,
            context: 16,
            untie_embeddings: false,
            vocab_size: 300,
            tokenizer: None,
        }
    }

    fn texts() -> Vec<String> {
        vec!["the cat and the hat".into(), "the cats, the hats and thé thés".into()]
    }

    fn open(shape: &ShapeArgs) -> Result<Base> {
        model(shape, &texts(), 1, "new")
    }

    fn read(base: &Base, name: &str) -> Vec<f32> {
        base.weights.get(name).unwrap().to_f32().unwrap()
    }

    #[test]
    fn numbers_are_what_transformers_begins_with() {
        let base = open(&shape()).unwrap();
        let c = &base.config;
        assert_eq!((base.id.as_str(), c.intermediate_size, c.head_dim, c.context), ("new", 96, 8, 16));
        assert!(c.tie_word_embeddings && !base.weights.contains("lm_head.weight"));
        for name in ["model.norm", "model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"] {
            assert_eq!(read(&base, &format!("{name}.weight")), [1.0; 32], "{name}");
        }
        for name in ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"] {
            let all = read(&base, &format!("{name}.weight"));
            let n = all.len() as f32;
            let mean = all.iter().sum::<f32>() / n;
            let deviation = (all.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
            // Five standard errors.
            assert!(mean.abs() < 5.0 * 0.02 / n.sqrt(), "{name}: mean {mean}");
            assert!((deviation - 0.02).abs() < 5.0 * 0.02 / (2.0 * n).sqrt(), "{name}: deviation {deviation}");
        }
        let q = |base: &Base, layer: usize| read(base, &format!("model.layers.{layer}.self_attn.q_proj.weight"));
        assert_ne!(q(&base, 0), q(&base, 1));
        assert_eq!(q(&base, 0), q(&open(&shape()).unwrap(), 0));
        assert_ne!(q(&base, 0), q(&model(&shape(), &texts(), 2, "new").unwrap(), 0));
        let untied = open(&ShapeArgs { untie_embeddings: true, ..shape() }).unwrap();
        assert!(!untied.config.tie_word_embeddings);
        assert_ne!(read(&untied, "lm_head.weight"), read(&untied, "model.embed_tokens.weight"));
    }

    #[test]
    fn a_tokenizer_of_the_texts_spells_any_text() {
        let base = open(&shape()).unwrap();
        let t = &base.tokenizer;
        let (bos, eos) = (t.token_id(BOS).unwrap(), t.token_id(EOS).unwrap());
        assert_eq!((base.config.bos_token, base.config.eos_tokens.as_slice()), (Some(bos), &[eos][..]));
        assert!(base.config.vocab_size > LEAST_VOCABULARY && base.config.vocab_size <= 300);
        let the = t.token_id("Ġthe").unwrap();
        assert_eq!(t.encode(" the", true).unwrap(), [bos, the]);
        for text in ["naïve 🎉\0\n\t  x", "the hats", ""] {
            let ids = t.encode(text, true).unwrap();
            assert_eq!((ids[0], t.decode(&ids, true)), (bos, text.to_string()));
        }
        assert_eq!(open(&ShapeArgs { vocab_size: LEAST_VOCABULARY, ..shape() }).unwrap().config.vocab_size, 258);
        let error = open(&ShapeArgs { vocab_size: 257, ..shape() }).err().unwrap().message;
        assert!(error.contains("--vocab-size is 257") && error.contains("258"), "{error}");
    }

    #[test]
    fn a_given_tokenizer_says_how_texts_begin_and_end() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        let put = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
        let token = |id: usize, content: &str| {
            json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false })
        };
        let tokenizer = |end: &str| {
            json!({ "version": "1.0", "added_tokens": [token(0, "<s>"), token(1, end)],
                "pre_tokenizer": { "type": "WhitespaceSplit" },
                "model": { "type": "WordLevel", "vocab": { "<s>": 0, end: 1, "a": 2, "b": 3 }, "unk_token": "a" } })
            .to_string()
        };
        let given = || open(&ShapeArgs { tokenizer: Some(file.clone()), ..shape() });
        put("tokenizer.json", tokenizer("</s>"));
        let base = given().unwrap();
        assert_eq!((base.config.vocab_size, base.config.bos_token), (4, None));
        assert_eq!(base.config.eos_tokens, [1]);
        assert_eq!(base.tokenizer.encode("b a", true).unwrap(), [3, 2]);
        put("tokenizer.json", tokenizer("[END]"));
        let error = given().err().unwrap().message;
        assert!(error.contains("tokenizer.json") && error.contains("eos_token") && error.contains("</s>"), "{error}");
        let settings = json!({ "tokenizer_class": "LlamaTokenizer", "eos_token": { "content": "[END]" } });
        put("tokenizer_config.json", settings.to_string());
        let base = given().unwrap();
        assert_eq!((base.config.bos_token, base.config.eos_tokens.as_slice()), (Some(0), &[1][..]));
        assert_eq!(base.tokenizer.encode("b a", true).unwrap(), [0, 3, 2]);
        put("tokenizer_config.json", "{".into());
        assert!(given().err().unwrap().message.contains("tokenizer_config.json"));
        fs::remove_file(&file).unwrap();
        assert!(given().err().unwrap().message.contains("--tokenizer"));
    }

    #[test]
    fn dimensions_that_do_not_belong_together_are_refused() {
        for (shape, words) in [
            (ShapeArgs { layers: 0, ..shape() }, ["--layers is 0", "1 to 65536"]),
            (ShapeArgs { hidden_size: 36, ..shape() }, ["--hidden-size is 36", "8"]),
            (ShapeArgs { hidden_size: 1 << 20, ..shape() }, ["--hidden-size is 1048576", "65536"]),
            (ShapeArgs { heads: 0, kv_heads: None, ..shape() }, ["--heads is 0", "1 to"]),
            (ShapeArgs { kv_heads: Some(3), ..shape() }, ["--kv-heads is 3", "4 heads"]),
            (ShapeArgs { intermediate_size: Some(0), ..shape() }, ["--intermediate-size is 0", "1 to"]),
            (ShapeArgs { context: 1, ..shape() }, ["--context is 1", "2 to"]),
        ] {
            let error = open(&shape).err().unwrap().message;
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
