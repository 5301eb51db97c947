//! What the fuzz targets do with bytes, and the test that replays their seeds: anything may be refused, nothing may panic. Each
//! says whether the bytes were taken.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device};
use loramux::adapter::{Upload, inspect, load};
use loramux::base::simd::Simd;
use loramux::base::{Base, Decoder, DecoderOptions, Kernels, Language, ModelConfig, OwnLanguage};
use loramux::server::Access;
use regex::Regex;
use serde_json::{Value, json};

mod host;

/// Longest archive when unpacked.
const UNPACKED: u64 = 1 << 20;

const CONFIG: &str = include_str!("../tests/fixtures/tiny/llama/base/config.json");
const WEIGHTS: &[u8] = include_bytes!("../tests/fixtures/tiny/llama/base/model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("../tests/fixtures/tiny/llama/base/tokenizer.json");

/// The base that adapters are checked against.
fn config() -> &'static ModelConfig {
    static BASE: OnceLock<ModelConfig> = OnceLock::new();
    BASE.get_or_init(|| ModelConfig::from_json(CONFIG).expect("the fixture is a configuration"))
}

/// How its texts become tokens.
fn language_of_base() -> &'static Language {
    static LANGUAGE: OnceLock<Language> = OnceLock::new();
    LANGUAGE.get_or_init(|| {
        let folder = folder(&[("config.json", CONFIG.as_bytes()), ("tokenizer.json", TOKENIZER)]);
        fs::write(folder.path().join("model.safetensors"), WEIGHTS).expect("room for a file");
        Base::open(&folder.path().to_string_lossy()).expect("the fixture is a base").language()
    })
}

/// A temporary folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("room for a file");
    }
    folder
}

/// Texts with a zero byte between them; one that is empty is not there.
fn parts<const N: usize>(data: &[u8]) -> [Option<&[u8]>; N] {
    let mut parts = data.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| parts.next().filter(|part| !part.is_empty()))
}

fn is_adapter(folder: &Path) -> bool {
    let _ = inspect(folder, Some(config()));
    load(folder, config(), "base").is_ok()
}

/// Whether the weights are those of the configuration.
fn run(base: &Base) -> bool {
    let kernels = Kernels::Packed(Simd::detect());
    let options = DecoderOptions { device: Device::Cpu, kernels, format: None, dtype: DType::F32 };
    let _ = base.tokenizer.encode("a text", true);
    Decoder::load(&base.config, &base.weights, options).is_ok()
}

/// `adapter_config.json`, whose length stands in the first two bytes, and after it `adapter_model.safetensors`.
pub fn adapter(data: &[u8]) -> bool {
    let [low, high, rest @ ..] = data else { return false };
    let (config, weights) = rest.split_at(rest.len().min(u16::from_le_bytes([*low, *high]).into()));
    is_adapter(folder(&[("adapter_config.json", config), ("adapter_model.safetensors", weights)]).path())
}

/// A base in a GGUF file, and the same bytes as an adapter's.
pub fn gguf(data: &[u8]) -> bool {
    let folder = folder(&[("model.gguf", data)]);
    let base = Base::open(&folder.path().join("model.gguf").to_string_lossy());
    let _ = base.as_ref().map(run);
    is_adapter(folder.path()) || base.is_ok()
}

/// `config.json`, `tokenizer.json` and `tokenizer_config.json` of a base, beside the weights of another.
pub fn base(data: &[u8]) -> bool {
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json"];
    let files = names.into_iter().zip(parts::<3>(data)).filter_map(|(name, text)| Some((name, text?)));
    let folder = folder(&files.chain([("model.safetensors", WEIGHTS)]).collect::<Vec<_>>());
    Base::open(&folder.path().to_string_lossy()).is_ok_and(|base| run(&base))
}

/// An archive of an adapter's files.
pub fn archive(data: &[u8]) -> bool {
    let folder = folder(&[("archive", data)]);
    let upload = Upload::new(tempfile::tempdir().expect("a temporary folder"), UNPACKED);
    upload.unpack(&folder.path().join("archive")).is_ok() && is_adapter(upload.path())
}

/// An adapter's `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, and the messages of a chat.
pub fn language(data: &[u8]) -> bool {
    let [tokenizer, settings, template, messages] = parts(data);
    let base = language_of_base();
    let own =
        OwnLanguage::read(tokenizer, settings, template).and_then(|own| own.map_or(Ok(None), |own| own.over(base)));
    let Ok(own) = own else { return false };
    let language = own.map_or(base.clone(), |(language, _)| language);
    let tokenizer = &language.tokenizer;
    for text in ["t5 t6", "a new é\n", "</s>"] {
        if let (Ok(tokens), Ok(more)) = (tokenizer.encode(text, true), tokenizer.continuation(text)) {
            let _ = (tokenizer.decode(&tokens, false), tokenizer.decode(&more, true), tokenizer.encode_for_head(text));
        }
    }
    let messages = messages.and_then(|text| serde_json::from_slice::<Vec<Value>>(text).ok());
    let messages = messages.unwrap_or_else(|| vec![json!({ "role": "user", "content": "a" })]);
    language.chat.is_none_or(|chat| chat.render(&messages, true).is_ok())
}

/// The file of the API keys.
pub fn keys(data: &[u8]) -> bool {
    Access::open(Some(folder(&[("keys.toml", data)]).path().join("keys.toml")), None).is_ok()
}

/// A request as HTTP/1 spells it, but for the version: `POST /path`, lines of headers, an empty one, and the body. See
/// [`host::ask`].
pub fn request(data: &[u8]) -> bool {
    host::ask(data).is_some_and(|answer| answer.status < 400)
}

/// What an answer must be like: `json`, `regex`, `choice` or `lark` in the first line, and after it a schema, a regular
/// expression, a text in each line, or a grammar. An answer that has come to its end must be so.
pub fn grammar(data: &[u8]) -> bool {
    let Some((kind, source)) = std::str::from_utf8(data).ok().and_then(|text| text.split_once('\n')) else {
        return false;
    };
    let (field, value) = match kind {
        "json" => ("guided_json", json!(source)),
        "regex" => ("guided_regex", json!(source)),
        "choice" => ("guided_choice", source.lines().collect()),
        "lark" => ("guided_grammar", json!(source)),
        _ => return false,
    };
    let body = json!({ "prompt": "a", "max_tokens": 40, "seed": source.len(), field: value });
    let answer = host::ask(format!("POST /v1/completions\n\n{body}").as_bytes()).expect("it is a request");
    if answer.status != 200 {
        return false;
    }
    let choice = &serde_json::from_slice::<Value>(&answer.body).expect("JSON, as was looked at")["choices"][0];
    let text = choice["text"].as_str().expect("a completion");
    if choice["finish_reason"] == "stop" {
        assert!(is_of(kind, source, text), "{text:?} is none of {kind} {source}");
    }
    true
}

/// Whether a text is what was asked for, as far as others than llguidance can tell.
fn is_of(kind: &str, source: &str, text: &str) -> bool {
    match kind {
        // Numbers and escapes that serde_json has no room for are JSON too.
        "json" => serde_json::from_str::<Value>(text)
            .err()
            .is_none_or(|e| ["out of range", "surrogate", "escape"].iter().any(|known| e.to_string().contains(known))),
        // Flags can make a comment of what stands behind it.
        "regex" if !source.contains("(?") => {
            Regex::new(&format!("^(?:{source})$")).map_or(true, |whole| whole.is_match(text))
        }
        "choice" => source.lines().any(|choice| choice == text),
        _ => true,
    }
}
