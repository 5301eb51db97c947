//! A trained network as a directory that PEFT or transformers opens.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::network::{self, FAMILY, LoraOptions, Method, Network};
use crate::base::{Base, Projection};
use crate::{Error, Result};

/// What PEFT puts in front of every module's path.
const PREFIX: &str = "base_model.model.";

/// What is written beside the numbers.
pub struct Export<'a> {
    pub base: &'a Base,
    pub network: &'a Network,
    pub method: &'a Method,
    /// Names of the classes, for a classification.
    pub labels: Option<&'a [String]>,
    /// Numbers of the weights' file.
    pub dtype: DType,
    /// More files, e.g. the model card.
    pub texts: Vec<(&'a str, String)>,
}

impl Export<'_> {
    /// Writes the directory `out`: all of it or nothing. One that is there is only replaced with `overwrite`.
    pub fn write(&self, out: &Path, overwrite: bool) -> Result<()> {
        let failed = |e: std::io::Error| Error::internal(format!("{}: {e}", out.display()));
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(failed)?;
        let stage = tempfile::Builder::new().prefix(".loramux-train-").tempdir_in(parent).map_err(failed)?;
        let folder = stage.path().join("out");
        fs::create_dir(&folder).map_err(failed)?;
        match self.method {
            Method::Lora(_) | Method::Head => self.adapter(&folder)?,
            Method::LastLayers(_) | Method::Full => self.model(&folder)?,
        }
        for (name, text) in &self.texts {
            fs::write(folder.join(name), text).map_err(failed)?;
        }
        for file in fs::read_dir(&folder).map_err(failed)? {
            File::open(file.map_err(failed)?.path()).and_then(|f| f.sync_all()).map_err(failed)?;
        }
        match out.exists() {
            false => fs::rename(&folder, out).map_err(failed),
            true if overwrite => exchange(&folder, out).map_err(failed),
            true => Err(taken(out)),
        }
    }

    fn adapter(&self, folder: &Path) -> Result<()> {
        let mut tensors: Vec<(String, Tensor)> =
            self.network.trained().into_iter().map(|(n, v)| (n, v.as_tensor().clone())).collect();
        let options = match self.method {
            Method::Lora(options) => options.clone(),
            // PEFT's file has no form for a head alone: a pair that adds nothing stands beside it.
            _ => {
                let (n, k) = self.network.config().shape(Projection::Q);
                let name = |matrix: &str| format!("model.layers.0.{}.{matrix}.weight", FAMILY.path(Projection::Q));
                let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, self.network.device());
                tensors.push((name("lora_A"), zeros((1, k))?));
                tensors.push((name("lora_B"), zeros((n, 1))?));
                LoraOptions {
                    rank: 1,
                    alpha: 1.0,
                    rslora: false,
                    dropout: 0.0,
                    dora: false,
                    targets: vec![Projection::Q],
                }
            }
        };
        let tensors = tensors.into_iter().map(|(name, t)| (format!("{PREFIX}{name}"), t)).collect();
        write_tensors(&folder.join("adapter_model.safetensors"), tensors, self.dtype)?;
        write_json(&folder.join("adapter_config.json"), &self.adapter_config(&options))?;
        match self.labels {
            Some(labels) => write_json(&folder.join("labels.json"), &json!(labels)),
            None => Ok(()),
        }
    }

    fn adapter_config(&self, options: &LoraOptions) -> Value {
        let names: Vec<&str> = options.targets.iter().map(|p| FAMILY.short_name(*p)).collect();
        json!({
            "peft_type": "LORA",
            "task_type": if self.labels.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" },
            "base_model_name_or_path": self.base.id,
            "r": options.rank,
            "lora_alpha": options.alpha,
            "use_rslora": options.rslora,
            "use_dora": options.dora,
            "lora_dropout": options.dropout,
            "target_modules": names,
            "layers_to_transform": if *self.method == Method::Head { json!([0]) } else { Value::Null },
            "modules_to_save": self.labels.map(|_| ["classifier", "score"]),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
        })
    }

    fn model(&self, folder: &Path) -> Result<()> {
        write_model(folder, self.base, self.network.all(), self.labels, self.dtype)
    }
}

/// Fills `folder` with a Hugging Face model directory: `tensors` by their names there, and configuration and tokenizer of
/// `base`, whose layers they are. With `labels` it is a classification.
///
/// Errors: a base whose configuration this cannot say.
pub(crate) fn write_model(
    folder: &Path,
    base: &Base,
    tensors: Vec<(String, Tensor)>,
    labels: Option<&[String]>,
    dtype: DType,
) -> Result<()> {
    network::check(&base.config, &Method::Full)?;
    write_tensors(&folder.join("model.safetensors"), tensors, dtype)?;
    let c = &base.config;
    let dtype = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
    let mut config = json!({
        "architectures": [if labels.is_some() { "LlamaForSequenceClassification" } else { "LlamaForCausalLM" }],
        "model_type": c.family.name(),
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.as_ref().map(|rope| rope.theta),
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": c.bos_token,
        "eos_token_id": c.eos_tokens,
        "torch_dtype": dtype,
    });
    if let Some(labels) = labels {
        let by_number: Map<String, Value> = labels.iter().enumerate().map(|(i, l)| (i.to_string(), json!(l))).collect();
        let by_name: Map<String, Value> = labels.iter().enumerate().map(|(i, l)| (l.clone(), json!(i))).collect();
        config["id2label"] = by_number.into();
        config["label2id"] = by_name.into();
        // transformers finds the last token of a padded text by this.
        config["pad_token_id"] = json!(c.eos_tokens.first());
    }
    write_json(&folder.join("config.json"), &config)?;
    let failed = |e: std::io::Error| Error::internal(format!("{}: {e}", folder.display()));
    fs::write(folder.join("tokenizer.json"), base.tokenizer.to_json()?).map_err(failed)?;
    let spelled = |id: Option<u32>| id.map(|id| base.tokenizer.decode(&[id], false));
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelled(c.bos_token),
        "eos_token": spelled(c.eos_tokens.first().copied()),
        "pad_token": spelled(c.eos_tokens.first().copied()),
        "model_max_length": c.context,
    });
    if let Some(chat) = &base.chat {
        settings["chat_template"] = json!(chat.source()?);
    }
    write_json(&folder.join("tokenizer_config.json"), &settings)
}

fn write_tensors(path: &Path, tensors: Vec<(String, Tensor)>, dtype: DType) -> Result<()> {
    let converted: Vec<(String, Tensor)> = tensors
        .into_iter()
        .map(|(name, t)| Ok((name, t.to_device(&candle_core::Device::Cpu)?.to_dtype(dtype)?.contiguous()?)))
        .collect::<Result<_>>()?;
    // transformers looks for this word.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let failed = |e: std::io::Error| Error::internal(format!("{}: {e}", path.display()));
    // The library's file is its owner's alone; a server may run as somebody else.
    let usual = File::create(path).and_then(|file| file.metadata()).map_err(failed)?.permissions();
    safetensors::serialize_to_file(converted, Some(metadata), path)
        .map_err(|e| Error::internal(format!("{}: {e}", path.display())))?;
    fs::set_permissions(path, usual).map_err(failed)
}

/// Puts `new` in the place of `old`, in one step where the system can: whoever is killed leaves one of the two there. What was
/// there lies beside `new`, or in its place, then. After an error it is where it was.
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::CString;
        use std::os::unix::ffi::OsStrExt;

        let here = libc::AT_FDCWD;
        let (from, to) = (CString::new(new.as_os_str().as_bytes())?, CString::new(old.as_os_str().as_bytes())?);
        // SAFETY: both are texts that end with a 0 and stay until it returns.
        if unsafe { libc::renameat2(here, from.as_ptr(), here, to.as_ptr(), libc::RENAME_EXCHANGE) } == 0 {
            return Ok(());
        }
        // Not every file system does it.
    }
    let aside = new.with_file_name("old");
    fs::rename(old, &aside)?;
    fs::rename(new, old).inspect_err(|_| {
        let _ = fs::rename(&aside, old);
    })
}

/// The error of an output directory that is there already.
pub fn taken(out: &Path) -> Error {
    Error::bad_request(format!(
        "{} is there already; choose another --out, or replace it with --overwrite",
        out.display()
    ))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(Error::internal)?;
    fs::write(path, text + "\n").map_err(|e| Error::internal(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn directory(path: PathBuf, content: &str) -> PathBuf {
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), content).unwrap();
        path
    }

    #[test]
    fn what_is_replaced_is_there_all_the_time() {
        let folder = tempfile::tempdir().unwrap();
        let stage = folder.path().join("stage");
        fs::create_dir(&stage).unwrap();
        let (new, old) = (directory(stage.join("out"), "new"), directory(folder.path().join("old"), "old"));
        let content = || fs::read_to_string(old.join("file"));
        // What cannot be put there leaves what is there.
        assert!(exchange(&stage.join("none"), &old).is_err());
        assert_eq!(content().unwrap(), "old");
        exchange(&new, &old).unwrap();
        assert_eq!(content().unwrap(), "new");
        let can = fs::read_to_string(new.join("file")).is_ok_and(|content| content == "old");
        if !can {
            // This file system has no exchange.
            return;
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    content().unwrap();
                }
            });
            let exchanged = (0..200).try_for_each(|_| exchange(&new, &old));
            done.store(true, Ordering::Relaxed);
            exchanged.unwrap();
        });
    }
}
