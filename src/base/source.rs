//! Where a base model comes from: a local directory, a `.gguf` file, or the hub.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::gguf::Gguf;
use super::weights::map;
use crate::base::{ChatTemplate, ModelConfig, Tokenizer, Weights, fetch};
use crate::{Error, Result};

/// A base model's parts, read but not yet on a device.
pub struct Base {
    /// What clients call it: the hub id, or the name of the directory or file.
    pub id: String,
    pub config: ModelConfig,
    pub weights: Weights,
    pub tokenizer: Arc<Tokenizer>,
    pub chat: Option<Arc<ChatTemplate>>,
}

/// The base model that `make serve` uses.
pub const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

impl Base {
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
        for end in ends.as_array().map_or(std::slice::from_ref(ends), Vec::as_slice).iter().filter_map(Value::as_u64) {
            if !config.eos_tokens.contains(&(end as u32)) {
                config.eos_tokens.push(end as u32);
            }
        }
        let tokenizer = Tokenizer::from_file(&directory.join("tokenizer.json"))?.with_bos(config.bos_token);
        let settings = json("tokenizer_config.json")?;
        let token = |key: &str| settings[key].as_str().or(settings[key]["content"].as_str());
        let template = match (read("chat_template.jinja")?, &settings["chat_template"]) {
            (Some(file), _) => Some(file),
            (None, Value::String(text)) => Some(text.clone()),
            (None, Value::Array(list)) => {
                let default = list.iter().find(|t| t["name"] == "default");
                default.and_then(|t| t["template"].as_str()).map(str::to_string)
            }
            (None, _) => None,
        };
        let chat = template.map(|t| ChatTemplate::new(&t, token("bos_token"), token("eos_token"))).transpose()?;
        let weights = Weights::open_directory(directory)?;
        Ok(Base { id: id.into(), config, weights, tokenizer: Arc::new(tokenizer), chat: chat.map(Arc::new) })
    }

    fn open_gguf(path: &Path, id: &str) -> Result<Self> {
        let map = map(path)?;
        let gguf = Gguf::read(&map)?;
        let config = ModelConfig::from_gguf(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?.with_bos(config.bos_token);
        let text = |id: Option<u32>| id.map(|id| tokenizer.decode(&[id], false));
        let (bos, eos) = (text(config.bos_token), text(config.eos_tokens.first().copied()));
        let template = gguf.text("tokenizer.chat_template").ok();
        let chat = template.map(|t| ChatTemplate::new(t, bos.as_deref(), eos.as_deref())).transpose()?;
        let weights = Weights::from_gguf(map, &gguf, config.heads, config.kv_heads);
        Ok(Base { id: id.into(), config, weights, tokenizer: Arc::new(tokenizer), chat: chat.map(Arc::new) })
    }
}
