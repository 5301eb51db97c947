//! Text to token ids and back.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::gguf::Gguf;
use crate::{Error, Result};

/// A tokenizer with the bytes of each token at hand.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// By id: the bytes a token stands for, and whether it is special.
    tokens: Vec<(Box<[u8]>, bool)>,
    bos: Option<u32>,
}

/// Far more than any vocabulary has; keeps a lying id from asking for a table of billions.
const MAX_VOCABULARY: usize = 1 << 22;

/// What is read of `tokenizer.json` here; the rest is for the tokenizers crate.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    decoder: Value,
}

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    /// GPT-2's alphabet of one character a byte.
    ByteLevel,
    /// `▁` for a space, `<0xAB>` for a byte.
    Metaspace,
    /// Whole words with spaces between them.
    Words,
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 is itself, the rest follow from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        n @ 0..=0xFF if printable(n as u8) => Some(n as u8),
        n @ 0x100..=0x143 => (0..=255u8).filter(|&b| !printable(b)).nth(n as usize - 0x100),
        _ => None,
    }
}

impl Tokenizer {
    /// From `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self> {
        let wrong = |e: String| Error::unprocessable(format!("{}: {e}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
        Self::from_json(&bytes).map_err(|e| wrong(e.message))
    }

    fn from_json(bytes: &[u8]) -> Result<Self> {
        let inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::unprocessable(format!("tokenizer: {e}")))?;
        let parts: Parts =
            serde_json::from_slice(bytes).map_err(|e| Error::unprocessable(format!("tokenizer: {e}")))?;
        Self::new(inner, &parts.decoder)
    }

    fn new(mut inner: tokenizers::Tokenizer, decoder: &Value) -> Result<Self> {
        // Prompts are never cut or padded in silence.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let decoder = decoder.to_string();
        let spelling = match () {
            _ if decoder.contains("ByteLevel") => Spelling::ByteLevel,
            _ if decoder.contains('▁') || decoder.contains("ByteFallback") => Spelling::Metaspace,
            _ => Spelling::Words,
        };
        let added = inner.get_added_tokens_decoder();
        let size = inner.get_vocab(true).values().map(|&id| id as usize + 1).max().unwrap_or(0);
        if size > MAX_VOCABULARY {
            let what = format!("tokenizer: it has the token id {}; at most {MAX_VOCABULARY} tokens", size - 1);
            return Err(Error::unprocessable(what));
        }
        let token = |id: usize| {
            let Some(text) = inner.id_to_token(id as u32) else { return (Box::default(), false) };
            if let Some(token) = added.get(&(id as u32)) {
                return (token.content.as_bytes().into(), token.special);
            }
            let bytes = match spelling {
                Spelling::ByteLevel => {
                    let bytes: Option<Vec<u8>> = text.chars().map(byte_of).collect();
                    bytes.unwrap_or_else(|| text.into_bytes())
                }
                Spelling::Metaspace => {
                    let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
                    match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
                        Some(byte) => vec![byte],
                        None => text.replace('▁', " ").into_bytes(),
                    }
                }
                Spelling::Words => format!(" {text}").into_bytes(),
            };
            (bytes.into_boxed_slice(), false)
        };
        let tokens = (0..size).map(token).collect();
        Ok(Tokenizer { inner, tokens, bos: None })
    }

    /// From GGUF metadata: the byte-level BPE of `tokenizer.ggml.model = gpt2`, cut into words as `tokenizer.ggml.pre` says.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let model = gguf.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let what = format!("tokenizer.ggml.model is {model:?}; supported: \"gpt2\" (byte-level BPE)");
            return Err(Error::unprocessable(format!(
                "GGUF: {what}; a Hugging Face directory brings its own tokenizer"
            )));
        }
        let gpt2 = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
        let after_regex = |pattern: &str| {
            let split =
                json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
            let bytes =
                json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
            json!({ "type": "Sequence", "pretokenizers": [split, bytes] })
        };
        let words = |digits: &str| {
            let contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
            format!(
                r"{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
        };
        let pre =
            if gguf.meta.contains_key("tokenizer.ggml.pre") { gguf.text("tokenizer.ggml.pre")? } else { "default" };
        if pre == "default" {
            tracing::warn!("the GGUF does not say how text is cut into words (tokenizer.ggml.pre); taking GPT-2's way");
        }
        let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
        let pre_tokenizer = match pre {
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
                let digits = json!({ "type": "Digits", "individual_digits": true });
                json!({ "type": "Sequence", "pretokenizers": [digits, gpt2] })
            }
            "gpt-2" | "gpt2" | "default" | "olmo" | "jais" | "phi-2" => gpt2,
            _ if llama3 => after_regex(&words("{1,3}")),
            "qwen2" | "qwen" | "deepseek-r1-qwen" => after_regex(&words("")),
            other => {
                let what = "supported: smollm, starcoder, gpt-2, default, llama-bpe, qwen2 and their kin";
                return Err(Error::unprocessable(format!("GGUF: tokenizer.ggml.pre is {other:?}; {what}")));
            }
        };
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let types = gguf.get("tokenizer.ggml.token_type").ok().and_then(|t| t.as_list()).unwrap_or_default();
        let mut ends = vec![];
        for key in ["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"] {
            ends.extend(gguf.token(&format!("tokenizer.ggml.{key}"))?.map(|id| id as usize));
        }
        // 1 is a normal token, 3 a control token, 4 one that a user added. Some files call an end of text normal.
        let kind = |id: usize| match types.get(id).and_then(|t| t.as_u64()).unwrap_or(1) {
            1 if ends.contains(&id) => 3,
            kind => kind,
        };
        let added: Vec<Value> = tokens
            .iter()
            .enumerate()
            .filter(|(id, _)| matches!(kind(*id), 3 | 4))
            .map(|(id, content)| {
                json!({ "id": id, "content": content, "special": kind(id) == 3, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false })
            })
            .collect();
        let vocab: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();
        let merges: Vec<[&str; 2]> = gguf
            .texts("tokenizer.ggml.merges")?
            .into_iter()
            .map(|m| match m.split_once(' ') {
                Some((a, b)) => Ok([a, b]),
                None => {
                    Err(Error::unprocessable(format!("GGUF: tokenizer.ggml.merges holds {m:?}, which is not a pair")))
                }
            })
            .collect::<Result<_>>()?;
        // Files of the Llama 3 family often leave the key out; their tokenizer always begins with BOS.
        let bos = match gguf.meta.get("tokenizer.ggml.add_bos_token") {
            None => llama3 && gguf.meta.contains_key("tokenizer.ggml.bos_token_id"),
            Some(flag) => flag.as_bool().ok_or_else(|| {
                Error::unprocessable(format!("GGUF: tokenizer.ggml.add_bos_token is {flag}, expected true or false"))
            })?,
        };
        let bos = match bos {
            false => None,
            true => {
                let id = gguf.number("tokenizer.ggml.bos_token_id")?;
                let missing = || format!("GGUF: the BOS token {id} is not among the {} tokens", tokens.len());
                Some(tokens.get(id).ok_or_else(|| Error::unprocessable(missing()))?)
            }
        };
        let normalizer = if pre == "qwen2" { json!({ "type": "NFC" }) } else { Value::Null };
        let post_processor = bos.map(|bos| {
            let token = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
            let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
            json!({ "type": "TemplateProcessing", "single": [token, text("A")], "pair": [token, text("A"), text("B")],
                "special_tokens": { *bos: { "id": bos, "ids": [vocab[*bos]], "tokens": [bos] } } })
        });
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": llama3 },
        });
        Self::from_json(json.to_string().as_bytes())
    }

    /// Token ids of `text`. Text that spells a special token becomes that token. `special` adds what the tokenizer's
    /// post-processor adds (e.g. BOS).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special);
        Ok(encoding.map_err(|e| Error::bad_request(format!("the text cannot be tokenized: {e}")))?.get_ids().to_vec())
    }

    /// Names the token that starts a sequence.
    pub(super) fn with_bos(mut self, bos: Option<u32>) -> Self {
        self.bos = bos;
        self
    }

    /// Token ids of a text for a classification head: as for a prompt, but always with the model's BOS token in front.
    /// Heads are trained on whole sequences, and there the first token is BOS even where the tokenizer adds none to a
    /// prompt (SmolLM2's does not).
    pub fn encode_for_head(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Text of `ids`, special tokens left out if `skip_special`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let kept = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let bytes: Vec<u8> = kept.flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes a token stands for in running text; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.tokens.get(id as usize).map_or(&[], |(bytes, _)| bytes)
    }

    /// Whether a token is special (control) and so not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_some_and(|(_, special)| *special)
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The tokenizer as a `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| Error::internal(format!("the tokenizer cannot be written: {e}")))
    }

    /// Bytes of the longest token.
    pub fn longest_token(&self) -> usize {
        self.tokens.iter().map(|(bytes, _)| bytes.len()).max().unwrap_or(0)
    }

    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::gguf::Meta;
    use super::super::gguf::tests::write;
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(b) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[b as usize], true), "{c:?}");
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('a')), (Some(b' '), Some(b'\n'), Some(b'a')));
    }

    #[test]
    fn the_default_models_tokens_spell_the_text() {
        let base = crate::base::Base::open(crate::base::DEFAULT_MODEL).unwrap();
        let t = &base.tokenizer;
        for text in ["  two  spaces\n\n\ttab", "naïve café, 北京 Ελλάδα", "👩‍👩‍👧 🏳️‍🌈", "1234567890 3.14", "", "don't we'll"]
        {
            let ids = t.encode(text, true).unwrap();
            assert_eq!(t.decode(&ids, true), text);
            assert_eq!(t.decode(&ids, true), t.inner.decode(&ids, true).unwrap());
        }
        assert_eq!(t.encode("12345", false).unwrap().len(), 5);
        let end = t.token_id("<|im_end|>").unwrap();
        assert_eq!(t.encode("a<|im_end|>", false).unwrap().last(), Some(&end));
        assert!(t.is_special(end) && t.decode(&[end], true).is_empty());
        assert_eq!(t.decode(&[end, u32::MAX], false), "<|im_end|>");
    }

    #[test]
    fn a_megabyte_of_anything_is_tokenized_in_time() {
        let base = crate::base::Base::open(crate::base::DEFAULT_MODEL).unwrap();
        for piece in ["word 12 ", "a", " ", "7", "京", "\0", "<|im_"] {
            let long = piece.repeat((1 << 20) / piece.len());
            let start = std::time::Instant::now();
            let ids = base.tokenizer.encode(&long, true).unwrap();
            assert_eq!(base.tokenizer.decode(&ids, false), long);
            // A second or so; quadratic time would take hours.
            assert!(start.elapsed().as_secs() < 60, "{piece:?} took {:?}", start.elapsed());
        }
    }

    #[test]
    fn the_reference_texts_have_the_reference_ids() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2/expected.json");
        let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let base = crate::base::Base::open(crate::base::DEFAULT_MODEL).unwrap();
        let prompts = expected["prompts"].as_array().unwrap();
        assert!(!prompts.is_empty());
        for prompt in prompts {
            let text = prompt["text"].as_str().unwrap();
            assert_eq!(json!(base.tokenizer.encode(text, true).unwrap()), prompt["ids"], "{text:?}");
        }
    }

    /// A GGUF tokenizer whose vocabulary is the 256 bytes, the pair "ab", and two end tokens.
    fn tiny(changes: &[(&str, Meta)]) -> Result<Tokenizer> {
        let spelling = |b: u8| (0..0x200).filter_map(char::from_u32).find(|&c| byte_of(c) == Some(b)).unwrap();
        let mut tokens: Vec<String> = (0..=255).map(|b| spelling(b).to_string()).collect();
        tokens.extend(["ab", "<s>", "</s>"].map(String::from));
        let list = |texts: &[String]| Meta::List(texts.iter().map(|t| Meta::Text(t.clone())).collect());
        let mut meta = vec![
            ("tokenizer.ggml.model", Meta::Text("gpt2".into())),
            ("tokenizer.ggml.pre", Meta::Text("gpt-2".into())),
            ("tokenizer.ggml.tokens", list(&tokens)),
            ("tokenizer.ggml.merges", list(&["a b".into()])),
            ("tokenizer.ggml.bos_token_id", Meta::Unsigned(257)),
            ("tokenizer.ggml.eos_token_id", Meta::Unsigned(258)),
        ];
        for (key, value) in changes {
            meta.retain(|(k, _)| k != key);
            meta.push((*key, value.clone()));
        }
        Tokenizer::from_gguf(&Gguf::read(&write(&meta, &[])).unwrap())
    }

    #[test]
    fn a_gguf_says_whether_a_text_begins_with_bos() {
        let (pre, add) = ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token");
        let text = |t: &str| Meta::Text(t.into());
        let first = |changes: &[(&str, Meta)]| tiny(changes).unwrap().encode("ab</s>", true).unwrap();
        assert_eq!(first(&[]), [256, 258]);
        assert_eq!(first(&[(add, Meta::Bool(true))]), [257, 256, 258]);
        assert_eq!(first(&[(pre, text("llama-bpe"))]), [257, 256, 258]);
        assert_eq!(first(&[(pre, text("llama-bpe")), (add, Meta::Bool(false))]), [256, 258]);
        assert!(tiny(&[(add, text("yes"))]).err().unwrap().message.contains(add));
        let far = tiny(&[(add, Meta::Bool(true)), ("tokenizer.ggml.bos_token_id", Meta::Unsigned(999))]);
        assert!(far.err().unwrap().message.contains("999"));
    }

    #[test]
    fn words_are_cut_as_the_gguf_says() {
        let cut = |pre: &str, text: &str| {
            let t = tiny(&[("tokenizer.ggml.pre", Meta::Text(pre.into()))]).unwrap();
            let mut words = tokenizers::PreTokenizedString::from(text);
            tokenizers::PreTokenizer::pre_tokenize(t.inner.get_pre_tokenizer().unwrap(), &mut words).unwrap();
            let splits = words.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
            splits.into_iter().map(|(_, (from, to), _)| text[from..to].to_string()).collect::<Vec<_>>()
        };
        let text = "It's 1234 x\n\n y";
        assert_eq!(cut("gpt-2", text), ["It", "'s", " 1234", " x", "\n\n", " y"]);
        assert_eq!(cut("smollm", text), ["It", "'s", " ", "1", "2", "3", "4", " x", "\n\n", " y"]);
        assert_eq!(cut("llama-bpe", text), ["It", "'s", " ", "123", "4", " x", "\n\n", " y"]);
        assert_eq!(cut("qwen2", text), ["It", "'s", " ", "1", "2", "3", "4", " x", "\n\n", " y"]);
        let error = tiny(&[("tokenizer.ggml.pre", Meta::Text("tekken".into()))]).err().unwrap().message;
        assert!(error.contains("\"tekken\""), "{error}");
        let error = tiny(&[("tokenizer.ggml.model", Meta::Text("llama".into()))]).err().unwrap().message;
        assert!(error.contains("\"llama\""), "{error}");
    }

    #[test]
    fn malformed_vocabularies_are_refused() {
        let merges = Meta::List(vec![Meta::Text("ab".into())]);
        assert!(tiny(&[("tokenizer.ggml.merges", merges)]).err().unwrap().message.contains("\"ab\""));
        let merges = Meta::List(vec![Meta::Text("q z".into())]);
        assert!(tiny(&[("tokenizer.ggml.merges", merges)]).is_err());
        let huge = r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":4294967295},"unk_token":"a"}}"#;
        assert!(Tokenizer::from_json(huge.as_bytes()).err().unwrap().message.contains("4294967295"));
        assert!(Tokenizer::from_json(b"{").is_err());
    }

    #[test]
    fn sentencepiece_spellings_are_undone() {
        let json = json!({ "version": "1.0", "added_tokens": [
                { "id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                  "normalized": false }],
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" } ] },
            "model": { "type": "BPE", "vocab": { "<s>": 0, "▁a": 1, "<0xC3>": 2, "<0xA9>": 3, "<0xZZ>": 4 }, "merges": [] } });
        let t = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        assert_eq!(t.decode(&[0, 1, 2, 3], true), " aé");
        assert_eq!(t.decode(&[0, 4, 2], false), "<s><0xZZ>\u{fffd}");
    }
}
