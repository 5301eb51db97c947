//! Where a base model comes from: a local directory, a `.gguf` file, or the hub.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::gguf::Gguf;
use super::language::{Language, template, token_text};
use super::weights::map;
use crate::base::{ChatTemplate, Family, Head, ModelConfig, Tokenizer, Weights, fetch};
use crate::{Error, Result};

/// A base model's parts, read but not yet on a device.
pub struct Base {
    /// What clients call it: the hub id, or the name of the directory or file.
    pub id: String,
    pub config: ModelConfig,
    pub weights: Weights,
    pub tokenizer: Arc<Tokenizer>,
    pub chat: Option<Arc<ChatTemplate>>,
    /// Of a model that is itself a classification.
    pub head: Option<Arc<Head>>,
}

/// The base model that `make serve` uses.
pub const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

impl Base {
    /// How its texts become tokens and back.
    pub fn language(&self) -> Language {
        Language {
            tokenizer: self.tokenizer.clone(),
            chat: self.chat.clone(),
            eos_tokens: self.config.eos_tokens.clone(),
        }
    }

    /// Opens a local directory or `.gguf` file, or fetches a hub id `org/name[@revision]` first.
    pub fn open(source: &str) -> Result<Self> {
        let path = Path::new(source);
        if !source.is_empty() && path.exists() {
            let name = path.canonicalize()?;
            let name = if name.is_dir() { name.file_name() } else { name.file_stem() };
            return Self::open_local(path, &name.unwrap_or_default().to_string_lossy());
        }
        let id = source.split('@').next().unwrap_or(source);
        Self::open_local(&fetch(source)?, id)
    }

    fn open_local(path: &Path, id: &str) -> Result<Self> {
        if path.is_dir() { Self::open_directory(path, id) } else { Self::open_gguf(path, id) }
            .map_err(|e| e.context(format!("base model {}", path.display())))
    }

    fn open_directory(directory: &Path, id: &str) -> Result<Self> {
        let read = |name: &str| -> Result<Option<String>> {
            match fs::read_to_string(directory.join(name)) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(Error::unprocessable(format!("{name}: {e}"))),
            }
        };
        let json = |name: &str| -> Result<Value> {
            let Some(text) = read(name)? else { return Ok(Value::Null) };
            serde_json::from_str(&text).map_err(|e| Error::unprocessable(format!("{name}: {e}")))
        };
        let text = read("config.json")?.ok_or_else(|| Error::unprocessable("it has no config.json"))?;
        let mut config = ModelConfig::from_json(&text)?;
        let ends = &json("generation_config.json")?["eos_token_id"];
        for end in ends.as_array().map_or(std::slice::from_ref(ends), Vec::as_slice) {
            let end = end.as_u64().and_then(|end| u32::try_from(end).ok());
            config.eos_tokens.extend(end.filter(|end| !config.eos_tokens.contains(end)));
        }
        let settings = json("tokenizer_config.json")?;
        let tokenizer = Tokenizer::from_file(&directory.join("tokenizer.json"))?.with_settings(&settings)?;
        // Qwen's configuration names an end of text there, and its tokenizer says that no text begins with a token.
        let has_bos = settings.get("bos_token") != Some(&Value::Null);
        let tokenizer = tokenizer.with_bos(config.bos_token.filter(|_| has_bos));
        let token = |key: &str| token_text(&settings, key);
        // A tuned model's turns may end with a token that only its tokenizer names.
        let end = token("eos_token").and_then(|text| tokenizer.token_id(text));
        config.eos_tokens.extend(end.filter(|id| !config.eos_tokens.contains(id)));
        let template = template(read("chat_template.jinja")?, &settings);
        let chat = template.map(|t| ChatTemplate::new(&t, token("bos_token"), token("eos_token"))).transpose()?;
        let weights = Weights::open_directory(directory, config.family)?;
        let head = Head::of_base(&weights, &config, &json("config.json")?)?.map(Arc::new);
        config.predicts &= head.is_none() || config.tie_word_embeddings || weights.find("lm_head.weight")?.is_some();
        weights.check(&config)?;
        Ok(Base { id: id.into(), config, weights, tokenizer: Arc::new(tokenizer), chat: chat.map(Arc::new), head })
    }

    fn open_gguf(path: &Path, id: &str) -> Result<Self> {
        let map = map(path)?;
        let gguf = Gguf::read(&map)?;
        let config = ModelConfig::from_gguf(&gguf, &map)?;
        // As in `open_directory`: Qwen's files name an end of text there, and no text of theirs begins with it.
        let begins = !matches!(config.family, Family::Qwen2 | Family::Qwen3)
            || gguf.flag("tokenizer.ggml.add_bos_token")? == Some(true);
        let tokenizer = Tokenizer::from_gguf(&gguf, &config.eos_tokens)?;
        let tokenizer = tokenizer.with_bos(config.bos_token.filter(|_| begins));
        let text = |id: Option<u32>| id.map(|id| tokenizer.decode(&[id], false));
        let (bos, eos) = (text(config.bos_token), text(config.eos_tokens.first().copied()));
        let key = "tokenizer.chat_template";
        let template = gguf.meta.contains_key(key).then(|| gguf.text(key)).transpose()?;
        let chat = template.map(|t| ChatTemplate::new(t, bos.as_deref(), eos.as_deref())).transpose()?;
        let weights = Weights::from_gguf(map, &gguf, &config)?;
        weights.check(&config)?;
        let (tokenizer, chat) = (Arc::new(tokenizer), chat.map(Arc::new));
        Ok(Base { id: id.into(), config, weights, tokenizer, chat, head: None })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::gguf::Meta;
    use super::super::gguf::tests::write;
    use super::*;

    /// A copy of the small model to break.
    fn copy() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama/base")).unwrap() {
            let file = file.unwrap();
            fs::write(folder.path().join(file.file_name()), fs::read(file.path()).unwrap()).unwrap();
        }
        folder
    }

    fn open(folder: &Path) -> Result<Base> {
        Base::open(&folder.to_string_lossy())
    }

    #[test]
    fn a_directory_is_called_by_its_name_and_its_settings_are_joined() {
        let folder = copy();
        let put = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
        let plain = open(folder.path()).unwrap();
        assert_eq!(plain.id, folder.path().file_name().unwrap().to_string_lossy());
        assert_eq!(plain.config.eos_tokens, [2]);
        assert!(plain.chat.is_none());

        put("generation_config.json", json!({ "eos_token_id": [2, 7] }).to_string());
        let list =
            json!([{ "name": "tool_use", "template": "no" }, { "name": "default", "template": "{{ bos_token }}" }]);
        let settings = json!({ "bos_token": { "content": "t1" }, "chat_template": list });
        put("tokenizer_config.json", settings.to_string());
        let base = open(folder.path()).unwrap();
        assert_eq!(base.config.eos_tokens, [2, 7]);
        assert_eq!(base.tokenizer.encode("t9", true).unwrap(), [9]);
        assert_eq!(base.chat.unwrap().render(&[], true).unwrap(), "t1");

        let settings = json!({ "bos_token": "t1", "eos_token": "t8", "tokenizer_class": "LlamaTokenizerFast" });
        put("tokenizer_config.json", settings.to_string());
        let base = open(folder.path()).unwrap();
        assert_eq!(base.config.eos_tokens, [2, 7, 8]);
        assert_eq!(base.tokenizer.encode("t9", true).unwrap(), [1, 9]);

        assert_eq!(base.tokenizer.encode_for_head("t9").unwrap(), [1, 9]);
        put("tokenizer_config.json", json!({ "bos_token": null, "add_bos_token": false }).to_string());
        assert_eq!(open(folder.path()).unwrap().tokenizer.encode_for_head("t9").unwrap(), [9]);
        put("tokenizer_config.json", settings.to_string());

        put("chat_template.jinja", "file {{ bos_token }}".into());
        assert_eq!(open(folder.path()).unwrap().chat.unwrap().render(&[], true).unwrap(), "file t1");
        put("chat_template.jinja", "{% for %}".into());
        assert!(open(folder.path()).err().unwrap().message.contains("chat template"));
    }

    #[test]
    fn what_a_directory_lacks_or_gets_wrong_is_named() {
        for (name, text, word) in [
            ("config.json", None, "config.json"),
            ("config.json", Some("{"), "config.json"),
            ("tokenizer.json", None, "tokenizer.json"),
            ("tokenizer_config.json", Some("["), "tokenizer_config.json"),
            ("generation_config.json", Some("x"), "generation_config.json"),
            ("model.safetensors", None, "model.safetensors"),
        ] {
            let folder = copy();
            let path = folder.path().join(name);
            match text {
                None => fs::remove_file(path).unwrap(),
                Some(text) => fs::write(path, text).unwrap(),
            }
            let error = open(folder.path()).err().unwrap().message;
            assert!(error.contains(word) && error.contains("base model"), "{name}: {error}");
        }
        let folder = copy();
        let path = folder.path().join("config.json");
        let text = fs::read_to_string(&path).unwrap().replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4");
        fs::write(path, text).unwrap();
        assert!(open(folder.path()).err().unwrap().message.contains("model.layers.2"));
    }

    #[test]
    fn the_default_model_keeps_its_hub_name() {
        let base = Base::open(DEFAULT_MODEL).unwrap();
        assert_eq!(base.id, DEFAULT_MODEL);
        assert_eq!((base.config.layers, base.config.vocab_size, base.config.context), (30, 49_152, 8_192));
        let name = "model.layers.29.self_attn.k_proj.weight";
        let raw = base.weights.get(name).unwrap();
        assert_eq!(raw.shape, [192, 576]);
        assert!(raw.to_f32().unwrap().iter().all(|x| x.is_finite()));
    }

    #[test]
    fn a_classification_brings_its_head() {
        let folder = copy();
        let path = folder.path().join("model.safetensors");
        let plain = fs::read(&path).unwrap();
        let write = |rows: usize, columns: usize, last: f32| {
            let mut tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
            let mut numbers = vec![0.5f32; rows * columns];
            *numbers.last_mut().unwrap() = last;
            let score = candle_core::Tensor::from_vec(numbers, (rows, columns), &candle_core::Device::Cpu).unwrap();
            tensors.insert("score.weight".into(), score);
            candle_core::safetensors::save(&tensors, &path).unwrap();
        };
        let config = fs::read_to_string(folder.path().join("config.json")).unwrap();
        let configure = |changes: Value| {
            let mut all: Value = serde_json::from_str(&config).unwrap();
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            fs::write(folder.path().join("config.json"), all.to_string()).unwrap();
        };
        assert!(open(folder.path()).unwrap().head.is_none());
        write(3, 64, 1.5);
        let base = open(folder.path()).unwrap();
        let head = base.head.unwrap();
        assert!(base.config.predicts);
        assert_eq!(head.labels, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        assert_eq!(head.logits(&[2.0; 64]), [64.0, 64.0, 66.0]);

        configure(json!({ "architectures": ["LlamaForTokenClassification"] }));
        assert!(open(folder.path()).err().unwrap().message.contains("LlamaForTokenClassification"));
        configure(json!({ "id2label": { "0": "no", "1": "yes", "2": "perhaps" } }));
        assert_eq!(open(folder.path()).unwrap().head.unwrap().labels, ["no", "yes", "perhaps"]);
        // Its output layer is gone, and not the embedding.
        configure(json!({ "tie_word_embeddings": false }));
        assert!(!open(folder.path()).unwrap().config.predicts);

        let error = || open(folder.path()).err().unwrap().message;
        configure(json!({ "id2label": { "0": "no", "1": "yes" } }));
        assert!(error().contains("3 rows, and id2label of config.json 2 names"));
        configure(json!({}));
        write(3, 32, 1.0);
        assert!(error().contains("[3, 32]; expected [labels, 64]"));
        write(3, 64, f32::NAN);
        assert!(error().contains("NaN"));
        fs::write(&path, plain).unwrap();
        configure(json!({ "tie_word_embeddings": false }));
        assert!(error().contains("no tensor lm_head.weight"));
    }

    /// A whole GGUF model of one layer, and where its tensors' bytes begin.
    fn small_gguf() -> (Vec<u8>, usize) {
        let (number, text) = (Meta::Unsigned, |t: &str| Meta::Text(t.into()));
        let meta = [
            ("general.architecture", text("llama")),
            ("llama.embedding_length", number(4)),
            ("llama.feed_forward_length", number(4)),
            ("llama.block_count", number(1)),
            ("llama.attention.head_count", number(2)),
            ("llama.attention.layer_norm_rms_epsilon", Meta::Float(1e-6)),
            ("llama.context_length", number(16)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("smollm")),
            ("tokenizer.ggml.tokens", Meta::List(["a", "b", "ab", "<s>"].map(text).into())),
            ("tokenizer.ggml.merges", Meta::List(vec![text("a b")])),
            ("tokenizer.ggml.token_type", Meta::List([1, 1, 1, 3].map(number).into())),
            ("tokenizer.ggml.bos_token_id", number(3)),
            ("tokenizer.ggml.add_bos_token", Meta::Bool(true)),
            ("tokenizer.chat_template", text("{{ bos_token }}{{ messages[0].content }}")),
        ];
        let matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
        let names: Vec<String> = ["token_embd.weight".into(), "output_norm.weight".into()]
            .into_iter()
            .chain(["attn_norm", "ffn_norm"].iter().chain(&matrices).map(|n| format!("blk.0.{n}.weight")))
            .collect();
        let tensors: Vec<_> = names
            .iter()
            .map(|name| match name.contains("norm") {
                true => (name.as_str(), vec![4], vec![1.0; 4]),
                false => (name.as_str(), vec![4, 4], (0..16).map(|i| i as f32).collect()),
            })
            .collect();
        let file = write(&meta, &tensors);
        let gguf = Gguf::read(&file).unwrap();
        let start = gguf.tensors.values().map(|place| place.bytes.start).min().unwrap();
        (file, start)
    }

    #[test]
    fn a_gguf_file_brings_everything() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("small.gguf");
        fs::write(&path, small_gguf().0).unwrap();
        let base = Base::open(&path.to_string_lossy()).unwrap();
        assert_eq!(base.id, "small");
        assert_eq!(base.tokenizer.encode("ab", true).unwrap(), [3, 2]);
        assert_eq!(base.chat.unwrap().render(&[json!({ "role": "user", "content": "b" })], true).unwrap(), "<s>b");
        // Heads of two rows are the same in either order of rope.
        let raw = base.weights.get("model.layers.0.self_attn.q_proj.weight").unwrap();
        assert_eq!(raw.to_f32().unwrap(), (0..16).map(|i| i as f32).collect::<Vec<_>>());
    }

    #[test]
    fn no_lie_in_a_gguf_file_is_more_than_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lying.gguf");
        let (file, start) = small_gguf();
        let mut refused = 0;
        for at in 0..start {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut file = file.clone();
                file[at] = byte;
                // A new file each time: cutting one that is mapped would be a fault of the test.
                fs::remove_file(&path).ok();
                fs::write(&path, file).unwrap();
                match Base::open(&path.to_string_lossy()) {
                    Err(_) => refused += 1,
                    Ok(base) => base.weights.names().iter().for_each(|n| drop(base.weights.get(n).unwrap().to_f32())),
                }
            }
        }
        assert!(refused > start, "only {refused} of {} were refused", 4 * start);
    }

    #[test]
    fn a_gguf_file_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        for bytes in [&b""[..], b"GGUF", b"not a model at all"] {
            fs::write(&path, bytes).unwrap();
            assert!(Base::open(&path.to_string_lossy()).err().unwrap().message.contains("x.gguf"));
        }
    }
}
