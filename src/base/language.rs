//! How texts become tokens and back: tokenizer, chat template, end tokens. The base has one; an adapter may bring its own.

use std::sync::Arc;

use serde_json::Value;

use crate::base::{ChatTemplate, Tokenizer};
use crate::{Error, Result};

#[derive(Clone)]
pub struct Language {
    pub tokenizer: Arc<Tokenizer>,
    pub chat: Option<Arc<ChatTemplate>>,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
}

impl Language {
    /// Whether its chat template is the other's.
    pub fn has_chat_of(&self, other: &Language) -> bool {
        match (&self.chat, &other.chat) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (own, other) => own.is_none() && other.is_none(),
        }
    }
}

/// What an adapter's files say beside its weights.
pub struct OwnLanguage {
    /// `tokenizer.json`.
    tokenizer: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    settings: Value,
    chat: Option<ChatTemplate>,
    /// Size of the files.
    bytes: usize,
}

/// How many tokens an adapter may have beyond the base's: a step's logits are as wide as its widest adapter.
pub const MAX_NEW_TOKENS: usize = 1 << 17;

/// Of a token in `tokenizer_config.json`.
pub(super) fn token_text<'a>(settings: &'a Value, key: &str) -> Option<&'a str> {
    settings[key].as_str().or(settings[key]["content"].as_str())
}

/// The template in `chat_template.jinja`, or else in `tokenizer_config.json`.
pub(super) fn template(file: Option<String>, settings: &Value) -> Option<String> {
    match (file, &settings["chat_template"]) {
        (Some(file), _) => Some(file),
        (None, Value::String(text)) => Some(text.clone()),
        (None, Value::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default");
            default.and_then(|t| t["template"].as_str()).map(str::to_string)
        }
        (None, _) => None,
    }
}

impl OwnLanguage {
    /// From the content of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, as far as they are there.
    pub fn read(tokenizer: Option<&[u8]>, settings: Option<&[u8]>, chat: Option<&[u8]>) -> Result<Option<Self>> {
        let bytes = [tokenizer, settings, chat].into_iter().flatten().map(<[u8]>::len).sum();
        if bytes == 0 {
            return Ok(None);
        }
        let wrong = |name: &str, e: &dyn std::fmt::Display| Error::unprocessable(format!("{name}: {e}"));
        let settings = match settings {
            Some(text) => serde_json::from_slice(text).map_err(|e| wrong("tokenizer_config.json", &e))?,
            None => Value::Null,
        };
        let chat = match chat {
            Some(text) => Some(std::str::from_utf8(text).map_err(|e| wrong("chat_template.jinja", &e))?.to_string()),
            None => None,
        };
        let [begin, end] = ["bos_token", "eos_token"].map(|key| token_text(&settings, key));
        let chat = template(chat, &settings).map(|text| ChatTemplate::new(&text, begin, end)).transpose()?;
        Ok(Some(OwnLanguage { tokenizer: tokenizer.map(<[u8]>::to_vec), settings, chat, bytes }))
    }

    /// Together with the base's, where it adds something to that, and what it takes in memory: a few times its files.
    pub fn over(self, base: &Language) -> Result<Option<(Language, usize)>> {
        let token =
            |tokenizer: &Tokenizer, key| token_text(&self.settings, key).and_then(|text| tokenizer.token_id(text));
        let tokenizer = match &self.tokenizer {
            None => None,
            Some(json) => {
                let most = base.tokenizer.vocab_size() + MAX_NEW_TOKENS;
                let own = base.tokenizer.with_vocabulary(json, most)?.with_settings(&self.settings)?;
                let bos = token(&own, "bos_token").or(base.tokenizer.bos());
                Some(own.with_bos(bos)).filter(|own| !own.is_same(&base.tokenizer)).map(Arc::new)
            }
        };
        let chat = self.chat.map(|chat| chat.with_tokens_of(base.chat.as_deref()));
        let chat = chat.filter(|chat| base.chat.as_ref().is_none_or(|base| !chat.is_same(base))).map(Arc::new);
        let known = tokenizer.as_ref().unwrap_or(&base.tokenizer);
        let end = token(known, "eos_token").filter(|id| !base.eos_tokens.contains(id));
        if tokenizer.is_none() && chat.is_none() && end.is_none() {
            return Ok(None);
        }
        let bytes = tokenizer.as_ref().map_or(self.bytes, |own| 4 * self.bytes + own.table_bytes());
        let language = Language {
            tokenizer: tokenizer.unwrap_or_else(|| base.tokenizer.clone()),
            chat: chat.or_else(|| base.chat.clone()),
            eos_tokens: base.eos_tokens.iter().copied().chain(end).collect(),
        };
        Ok(Some((language, bytes)))
    }
}

impl std::fmt::Debug for Language {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Language({} tokens)", self.tokenizer.vocab_size())
    }
}

impl std::fmt::Debug for OwnLanguage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OwnLanguage({} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::base::Base;

    fn base() -> Base {
        Base::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama/base").to_string_lossy())
            .unwrap()
    }

    #[test]
    fn what_an_adapter_repeats_of_the_base_is_the_bases() {
        let base = base();
        let (language, json) = (base.language(), base.tokenizer.to_json().unwrap());
        let own = |tokenizer: &str, settings: Value, chat: Option<&str>| {
            let settings = settings.to_string();
            let files = (Some(tokenizer.as_bytes()), Some(settings.as_bytes()), chat.map(str::as_bytes));
            OwnLanguage::read(files.0, files.1, files.2).unwrap().unwrap().over(&language).unwrap()
        };
        assert!(OwnLanguage::read(None, None, None).unwrap().is_none());
        assert!(own(&json, json!({}), None).is_none());
        assert!(own(&json, json!({ "eos_token": "t2" }), None).is_none(), "it is the base's end token");

        let (ends, bytes) = own(&json, json!({ "eos_token": { "content": "t9" } }), None).unwrap();
        assert_eq!(ends.eos_tokens, [2, 9]);
        assert!(Arc::ptr_eq(&ends.tokenizer, &language.tokenizer) && bytes >= json.len());

        let more = json.replace("\"t200\"", "\"new\"");
        let (other, _) = own(&more, json!({ "bos_token": "t7" }), Some("{{ bos_token }}!")).unwrap();
        assert_eq!(other.tokenizer.encode("new", false).unwrap(), [200]);
        assert_eq!(other.tokenizer.encode_for_head("new").unwrap(), [7, 200]);
        assert_eq!(other.chat.unwrap().render(&[], true).unwrap(), "t7!");
    }

    /// Its steps are the base's, so that no text grows in them; lies about ids and lengths are told.
    #[test]
    fn of_a_tokenizer_only_the_vocabulary_counts() {
        let base = base();
        let language = base.language();
        let json: Value = serde_json::from_str(&base.tokenizer.to_json().unwrap()).unwrap();
        let over = |json: &Value| {
            let text = json.to_string();
            OwnLanguage::read(Some(text.as_bytes()), None, None).unwrap().unwrap().over(&language)
        };
        let mut grows = json.clone();
        let step = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaaaa" });
        grows["normalizer"] = json!({ "type": "Sequence", "normalizers": vec![step; 12] });
        grows["post_processor"] = Value::Null;
        assert!(over(&grows).unwrap().is_none());

        let error = |json: &Value| over(json).err().unwrap().message;
        let mut far = json.clone();
        far["model"]["vocab"]["far"] = json!(4_000_000);
        assert!(error(&far).contains("4000000"));
        let mut long = json.clone();
        long["model"]["vocab"]["x".repeat(5000)] = json!(5);
        assert!(error(&long).contains("5000 bytes"));
        let mut other = json.clone();
        other["model"]["type"] = json!("Unigram");
        assert!(error(&other).contains("Unigram"));
        assert!(error(&json!({ "model": {} })).contains("tokenizer.json"));
        for none in [json!(113), json!([]), json!({}), json!({ "model": 5 }), json!({ "model": "BPE" })] {
            assert!(error(&none).contains("expected an object"), "{none}");
        }
    }

    #[test]
    fn files_that_are_wrong_are_named() {
        for (files, name) in
            [((None, Some("["), None), "tokenizer_config.json"), ((None, None, Some("{% for %}")), "chat template")]
        {
            let (tokenizer, settings, chat): (Option<&str>, Option<&str>, Option<&str>) = files;
            let bytes = |text: Option<&'static str>| text.map(str::as_bytes);
            let error = OwnLanguage::read(bytes(tokenizer), bytes(settings), bytes(chat)).unwrap_err();
            assert!(error.message.contains(name), "{error}");
        }
    }
}
