//! Text to token ids and back.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PostProcessorWrapper, PreTokenizedString, PreTokenizer,
};

use super::gguf::{CONTROL, Gguf, NORMAL, UNKNOWN, USER_DEFINED};
use super::language::token_text;
use crate::error::shorten;
use crate::{Error, Result};

/// A tokenizer with the bytes of each token at hand.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// By id: the bytes a token stands for, and whether it is special.
    tokens: Vec<(Box<[u8]>, bool)>,
    bos: Option<u32>,
    /// Whether it begins each text with a space of its own, as SentencePiece does.
    adds_space: bool,
    /// Bytes of the longest token.
    longest: usize,
}

/// Far more than any vocabulary has; keeps a lying id from asking for a table of billions.
const MAX_VOCABULARY: usize = 1 << 22;

/// Far longer than any token of a SentencePiece vocabulary; keeps a lying one from being cut in billions of ways.
const MAX_PIECE: usize = 1 << 10;

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

/// Whether a text without a space at its start is given one.
fn adds_space(inner: &tokenizers::Tokenizer) -> Result<bool> {
    let failed = |e| Error::unprocessable(format!("tokenizer: it cannot take apart the text \"a\": {e}"));
    let mut text = NormalizedString::from("a");
    if let Some(normalizer) = inner.get_normalizer() {
        normalizer.normalize(&mut text).map_err(failed)?;
    }
    let mut words = PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
    }
    let first = words.get_splits(OffsetReferential::Normalized, OffsetType::Byte).into_iter().next();
    Ok(first.is_some_and(|(word, ..)| word.starts_with([' ', '▁', 'Ġ'])))
}

impl Tokenizer {
    /// From `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self> {
        let named = |e: String| Error::unprocessable(format!("{}: {e}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| named(e.to_string()))?;
        Self::from_json(&bytes).map_err(|e| named(e.message))
    }

    /// From the content of a `tokenizer.json`.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self> {
        // It panics at a merge that is longer than every token.
        let inner = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|_| Error::unprocessable("tokenizer: its merges do not fit its vocabulary"))?
            .map_err(|e| Error::unprocessable(format!("tokenizer: {e}")))?;
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
                // Gemma's runs of spaces are added tokens.
                let spells_spaces = spelling == Spelling::Metaspace && !token.special;
                let text = if spells_spaces { token.content.replace('▁', " ") } else { token.content.clone() };
                return (text.into_bytes().into_boxed_slice(), token.special);
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
                Spelling::Words => match text.strip_prefix("##") {
                    Some(rest) => rest.as_bytes().to_vec(),
                    None => format!(" {text}").into_bytes(),
                },
            };
            (bytes.into_boxed_slice(), false)
        };
        let tokens: Vec<(Box<[u8]>, bool)> = (0..size).map(token).collect();
        let longest = tokens.iter().map(|(bytes, _)| bytes.len()).max().unwrap_or(0);
        let adds_space = spelling == Spelling::Words || adds_space(&inner)?;
        Ok(Tokenizer { inner, tokens, bos: None, adds_space, longest })
    }

    /// This one with the vocabulary, the merges and the added tokens of another's `tokenizer.json`, whose ids are less than
    /// `most`. How texts are taken apart and put together stays: such steps are programs with costs of their own, and the
    /// file may be anybody's.
    pub(super) fn with_vocabulary(&self, json: &[u8], most: usize) -> Result<Self> {
        let wrong = |what: String| Error::unprocessable(format!("tokenizer.json: {what}"));
        let mut theirs: Value = serde_json::from_slice(json).map_err(|e| wrong(e.to_string()))?;
        if !theirs["model"].is_object() {
            return Err(wrong(format!(
                "its model is {}; expected an object",
                shorten(&theirs["model"].to_string(), 100)
            )));
        }
        let mut ours: Value = serde_json::from_str(&self.to_json()?).map_err(Error::internal)?;
        let (found, expected) = (&theirs["model"]["type"], &ours["model"]["type"]);
        if !found.is_null() && found != expected {
            return Err(wrong(format!("its model is {found}, the base's {expected}; expected the base's")));
        }
        for key in ["vocab", "merges", "unk_id"] {
            if let Some(own) = theirs["model"].get_mut(key) {
                ours["model"][key] = own.take();
            }
        }
        ours["added_tokens"] = theirs["added_tokens"].take();
        check_vocabulary(&ours, most).map_err(wrong)?;
        let tokenizer = Self::from_json(ours.to_string().as_bytes()).map_err(|e| wrong(e.message))?;
        Ok(tokenizer.with_bos(self.bos))
    }

    /// From GGUF metadata. `tokenizer.ggml.model` is `gpt2` for byte-level BPE and `llama` for SentencePiece. Tokens in `ends`
    /// end a text, whatever the file calls them.
    pub(super) fn from_gguf(gguf: &Gguf, ends: &[u32]) -> Result<Self> {
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let vocab: Vocabulary = tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();
        let mut recipe = match gguf.text("tokenizer.ggml.model")? {
            "gpt2" => byte_level(gguf, &vocab)?,
            "llama" => sentencepiece(gguf, &tokens, &vocab)?,
            other => {
                let what = "supported: \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE)";
                let hint = "a Hugging Face directory brings its own tokenizer";
                return Err(wrong(format!("tokenizer.ggml.model is {other:?}; {what}; {hint}")));
            }
        };
        let bos = gguf.token("tokenizer.ggml.bos_token_id")?;
        // Some files call an end of text normal, or a user's own.
        let kind = |id: usize| match gguf.token_kind(id) {
            NORMAL | USER_DEFINED if bos.iter().chain(ends).any(|end| *end as usize == id) => CONTROL,
            kind => kind,
        };
        // Those of Phi-3 take the space after them, of which the files say nothing; llama.cpp knows it as well.
        let is_phi3 = gguf.meta.get("general.architecture").and_then(|name| name.as_str()) == Some("phi3")
            && gguf.text("tokenizer.ggml.model")? == "llama";
        let takes_space = |content: &str| is_phi3 && !matches!(content, "<unk>" | "<s>" | "<|endoftext|>");
        let added: Vec<Value> = tokens
            .iter()
            .enumerate()
            .filter(|(id, _)| matches!(kind(*id), UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, content)| {
                json!({ "id": id, "content": content, "special": kind(id) != USER_DEFINED, "single_word": false,
                    "lstrip": false, "rstrip": takes_space(content), "normalized": false })
            })
            .collect();
        let spelling = |key: &str, wanted: bool| -> Result<Option<(&str, u32)>> {
            if !gguf.flag(&format!("tokenizer.ggml.add_{key}_token"))?.unwrap_or(wanted) {
                return Ok(None);
            }
            let id = gguf.number(&format!("tokenizer.ggml.{key}_token_id"))?;
            let token = tokens.get(id).map(|token| (*token, id as u32));
            let what = format!("the {} token {id} is not among the {} tokens", key.to_uppercase(), tokens.len());
            token.map(Some).ok_or_else(|| wrong(what))
        };
        let bos = spelling("bos", recipe.adds_bos)?;
        let eos = spelling("eos", false)?;
        recipe.parts["added_tokens"] = added.into();
        recipe.parts["post_processor"] = frame(bos, eos);
        recipe.parts["version"] = "1.0".into();
        Self::from_json(recipe.parts.to_string().as_bytes())
    }

    /// Token ids of `text`. Text that spells a special token becomes that token. `special` adds what the tokenizer's
    /// post-processor adds (e.g. BOS).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special);
        Ok(encoding.map_err(|e| Error::bad_request(format!("the text cannot be tokenized: {e}")))?.get_ids().to_vec())
    }

    /// What [`Tokenizer::encode`] adds in front of a text.
    pub fn prefix(&self) -> Result<Vec<u32>> {
        let (bare, mut framed) = (self.encode("a", false)?, self.encode("a", true)?);
        let added = (0..framed.len()).find(|&i| framed[i..].starts_with(&bare));
        framed.truncate(added.unwrap_or(0));
        Ok(framed)
    }

    /// Token ids of `text` as it goes on after another text, with a space between.
    pub fn continuation(&self, text: &str) -> Result<Vec<u32>> {
        if self.adds_space { self.encode(text, false) } else { self.encode(&format!(" {text}"), false) }
    }

    /// Puts BOS and EOS around texts as the flags in `tokenizer_config.json` say. As in transformers, they count for Llama's
    /// tokenizer, and there before what `tokenizer.json` says.
    pub(crate) fn with_settings(mut self, settings: &Value) -> Result<Self> {
        let is_llama = matches!(settings["tokenizer_class"].as_str(), Some("LlamaTokenizer" | "LlamaTokenizerFast"));
        let flags = ["add_bos_token", "add_eos_token"].map(|key| settings[key].as_bool());
        if !is_llama || (self.inner.get_post_processor().is_some() && flags == [None, None]) {
            return Ok(self);
        }
        let token = |key: &str, flag: Option<bool>, usually: bool, usual: &'static str| {
            if !flag.unwrap_or(usually) {
                return Ok(None);
            }
            let text = token_text(settings, key).unwrap_or(usual);
            match self.token_id(text) {
                Some(id) => Ok(Some((text, id))),
                // Nobody asked for it.
                None if flag.is_none() => Ok(None),
                None => Err(Error::unprocessable(format!(
                    "tokenizer_config.json: add_{key} is true and its {key} {text:?} is no token of tokenizer.json"
                ))),
            }
        };
        let bos = token("bos_token", flags[0], true, "<s>")?;
        let eos = token("eos_token", flags[1], false, "</s>")?;
        let processor: Option<PostProcessorWrapper> = serde_json::from_value(frame(bos, eos))
            .map_err(|e| Error::internal(format!("the tokenizer's post-processor: {e}")))?;
        self.inner.with_post_processor(processor);
        Ok(self)
    }

    /// The token that starts a sequence.
    pub(super) fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Names the token that starts a sequence.
    pub(super) fn with_bos(mut self, bos: Option<u32>) -> Self {
        self.bos = bos;
        self
    }

    /// Token ids of a text for a classification head: as for a prompt, but always with the model's BOS token in front where
    /// it has one. Heads are trained on whole sequences, and there the first token is BOS even where the tokenizer adds none
    /// to a prompt (SmolLM2's does not).
    pub fn encode_for_head(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Text of `ids` from its start, so without the space that the tokenizer adds there; special tokens left out if
    /// `skip_special`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let kept = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let bytes: Vec<u8> = kept.flat_map(|&id| self.token_bytes(id)).copied().collect();
        let added = if self.adds_space { bytes.strip_prefix(b" ") } else { None };
        String::from_utf8_lossy(added.unwrap_or(&bytes)).into_owned()
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
    pub(crate) fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether it makes the same of every text.
    pub(super) fn is_same(&self, other: &Tokenizer) -> bool {
        self.bos == other.bos && self.tokens == other.tokens && self.to_json().ok() == other.to_json().ok()
    }

    /// The tokenizer as a `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| Error::internal(format!("the tokenizer cannot be written: {e}")))
    }

    /// Bytes of the longest token.
    pub fn longest_token(&self) -> usize {
        self.longest
    }

    /// Memory of the table of tokens.
    pub(super) fn table_bytes(&self) -> usize {
        self.tokens.len() * size_of::<(Box<[u8]>, bool)>()
    }

    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
}

/// Refuses tokens with ids of `most` or more, which would make a table of billions, and tokens longer than any has.
fn check_vocabulary(tokenizer: &Value, most: usize) -> Result<(), String> {
    let check = |text: &str, id: u64| match (text.len() <= MAX_PIECE, id < most as u64) {
        (true, true) => Ok(()),
        (false, _) => Err(format!("the token {id} has {} bytes; at most {MAX_PIECE} are accepted", text.len())),
        (_, false) => Err(format!("it has the token id {id}; expected less than {most}")),
    };
    match &tokenizer["model"]["vocab"] {
        Value::Object(vocabulary) => {
            vocabulary.iter().try_for_each(|(text, id)| check(text, id.as_u64().unwrap_or(u64::MAX)))?;
        }
        // Pieces with their scores, by id.
        Value::Array(pieces) => {
            pieces.iter().enumerate().try_for_each(|(id, p)| check(p[0].as_str().unwrap_or_default(), id as u64))?;
        }
        _ => return Err("its model has no vocab".into()),
    }
    let added = tokenizer["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    added.iter().try_for_each(|token| {
        check(token["content"].as_str().unwrap_or_default(), token["id"].as_u64().unwrap_or(u64::MAX))
    })
}

type Vocabulary = serde_json::Map<String, Value>;

/// What a kind of GGUF tokenizer brings of its own.
struct Recipe {
    /// `tokenizer.json` without added tokens and post-processor.
    parts: Value,
    /// Whether a text begins with BOS where the file does not say.
    adds_bos: bool,
}

fn wrong(what: String) -> Error {
    Error::unprocessable(format!("GGUF: {what}"))
}

/// A post-processor that puts these tokens around a text.
fn frame(bos: Option<(&str, u32)>, eos: Option<(&str, u32)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special =
        |token: Option<(&str, u32)>| token.map(|(token, _)| json!({ "SpecialToken": { "id": token, "type_id": 0 } }));
    let around = |id: &str| {
        let text = json!({ "Sequence": { "id": id, "type_id": 0 } });
        special(bos).into_iter().chain([text]).chain(special(eos))
    };
    let tokens: Vocabulary = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(token, id)| (token.to_string(), json!({ "id": token, "ids": [id], "tokens": [token] })))
        .collect();
    json!({ "type": "TemplateProcessing", "single": around("A").collect::<Vec<_>>(),
        "pair": around("A").chain(around("B")).collect::<Vec<_>>(), "special_tokens": tokens })
}

/// Byte-level BPE, cut into words as `tokenizer.ggml.pre` says.
fn byte_level(gguf: &Gguf, vocab: &Vocabulary) -> Result<Recipe> {
    let gpt2 = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let after_regex = |pattern: &str| {
        let split =
            json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
        json!({ "type": "Sequence", "pretokenizers": [split, bytes] })
    };
    let words = |digits: &str| {
        let contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
        format!(
            r"{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    // Words end where a capital letter begins another.
    let cased = |contractions: &str, digits: &str| {
        let (upper, lower) = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]");
        let first = r"[^\r\n\p{L}\p{N}]?";
        format!(
            r"{first}{upper}*{lower}+{contractions}|{first}{upper}+{lower}*{contractions}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let pre = if gguf.meta.contains_key("tokenizer.ggml.pre") { gguf.text("tokenizer.ggml.pre")? } else { "default" };
    if pre == "default" {
        tracing::warn!("the GGUF does not say how text is cut into words (tokenizer.ggml.pre); taking GPT-2's way");
    }
    // Their texts begin with BOS, and a word that is a token is that token.
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let begins = llama3 || pre == "tekken";
    let pre_tokenizer = match pre {
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            json!({ "type": "Sequence", "pretokenizers": [digits, gpt2] })
        }
        "gpt-2" | "gpt2" | "default" | "olmo" | "jais" | "phi-2" => gpt2,
        _ if llama3 => after_regex(&words("{1,3}")),
        "dbrx" | "smaug-bpe" => after_regex(&words("{1,3}")),
        "gpt-4o" => after_regex(&cased(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "{1,3}")),
        "tekken" => after_regex(&cased("", "")),
        "qwen2" | "qwen" | "deepseek-r1-qwen" => after_regex(&words("")),
        other => {
            let what =
                "supported: smollm, starcoder, gpt-2, default, llama-bpe, qwen2, dbrx, gpt-4o, tekken and their kin";
            return Err(wrong(format!("tokenizer.ggml.pre is {other:?}; {what}")));
        }
    };
    let merges: Vec<[&str; 2]> = gguf
        .texts("tokenizer.ggml.merges")?
        .into_iter()
        .map(|m| match m.split_once(' ') {
            Some((a, b)) => Ok([a, b]),
            None => Err(wrong(format!("tokenizer.ggml.merges holds {m:?}, which is not a pair"))),
        })
        .collect::<Result<_>>()?;
    let normalizer = if pre == "qwen2" { json!({ "type": "NFC" }) } else { Value::Null };
    let parts = json!({
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": begins },
    });
    // Files often leave the key out.
    Ok(Recipe { parts, adds_bos: begins && gguf.meta.contains_key("tokenizer.ggml.bos_token_id") })
}

/// SentencePiece's BPE: of all neighbours whose join is a token, those whose token has the highest score are joined first.
/// Characters outside the vocabulary become bytes.
fn sentencepiece(gguf: &Gguf, tokens: &[&str], vocab: &Vocabulary) -> Result<Recipe> {
    let key = "tokenizer.ggml.scores";
    let scores: Option<Vec<f64>> = gguf.get(key)?.as_list().and_then(|l| l.iter().map(|x| x.as_f64()).collect());
    let scores = scores.filter(|scores| scores.len() == tokens.len() && scores.iter().all(|x| x.is_finite()));
    let scores =
        scores.ok_or_else(|| wrong(format!("{key} is not a list of a number for each of {} tokens", tokens.len())))?;
    let joins = |id: usize| matches!(gguf.token_kind(id), NORMAL | USER_DEFINED);
    let is_part = |text: &str| vocab.get(text).and_then(Value::as_u64).is_some_and(|id| joins(id as usize));
    let mut merges: Vec<(f64, bool, [&str; 2])> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| joins(*id)) {
        if token.len() > MAX_PIECE {
            return Err(wrong(format!("the token {id} has {} bytes; at most {MAX_PIECE} are possible", token.len())));
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if is_part(left) && is_part(right) {
                // SentencePiece joins the leftmost first. Where two joins to the same token overlap, as of `ab` and `a`
                // and of `a` and `ba` in `ab|a|ba`, the left part of the right one is also the end of the token.
                merges.push((scores[id], token.ends_with(left), [left, right]));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(b.2[0].len().cmp(&a.2[0].len())));
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, _, pair)| pair).collect();
    let unknown = gguf.optional_number("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let prefix = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let prefix = prefix.then(|| json!({ "type": "Prepend", "prepend": "▁" }));
    let parts = json!({
        "normalizer": { "type": "Sequence", "normalizers": prefix.into_iter().chain([spaces]).collect::<Vec<_>>() },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
            { "type": "Fuse" }] },
        "model": { "type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": true, "fuse_unk": true,
            "unk_token": tokens.get(unknown) },
    });
    Ok(Recipe { parts, adds_bos: gguf.meta.contains_key("tokenizer.ggml.bos_token_id") })
}

#[cfg(test)]
mod tests {
    use super::super::gguf::Meta;
    use super::super::gguf::tests::write;
    use super::*;

    /// The model that the reference texts were made with.
    fn packaged() -> Result<crate::base::Base> {
        crate::base::Base::open(&crate::base::packaged()?.to_string_lossy())
    }

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
        let base = packaged().unwrap();
        let t = &base.tokenizer;
        for text in ["  two  spaces\n\n\ttab", "naïve café, 北京 Ελλάδα", "👩‍👩‍👧 🏳️‍🌈", "1234567890 3.14", "", "don't we'll"]
        {
            let ids = t.encode(text, true).unwrap();
            assert_eq!(t.decode(&ids, true), text);
            assert_eq!(t.decode(&ids, true), t.inner.decode(&ids, true).unwrap());
        }
        assert_eq!(t.encode("12345", false).unwrap().len(), 5);
        let end = t.inner.token_to_id("<|im_end|>").unwrap();
        assert_eq!(t.encode("a<|im_end|>", false).unwrap().last(), Some(&end));
        assert!(t.is_special(end) && t.decode(&[end], true).is_empty());
        assert_eq!(t.decode(&[end, u32::MAX], false), "<|im_end|>");
    }

    #[test]
    fn a_megabyte_of_anything_is_tokenized_in_time() {
        let base = packaged().unwrap();
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
        let base = packaged().unwrap();
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
        Tokenizer::from_gguf(&Gguf::read(&write(&meta, &[])).unwrap(), &[2, 258])
    }

    #[test]
    fn a_gguf_says_whether_a_text_begins_with_bos() {
        let (pre, add) = ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token");
        let text = |t: &str| Meta::Text(t.into());
        let first = |changes: &[(&str, Meta)]| tiny(changes).unwrap().encode("ab</s>", true).unwrap();
        assert_eq!(first(&[]), [256, 258]);
        assert_eq!(first(&[(add, Meta::Bool(true))]), [257, 256, 258]);
        assert_eq!(first(&[(pre, text("llama-bpe"))]), [257, 256, 258]);
        assert_eq!(first(&[(pre, text("tekken"))]), [257, 256, 258]);
        assert_eq!(tiny(&[(pre, text("llama-bpe"))]).unwrap().prefix().unwrap(), [257]);
        assert!(tiny(&[]).unwrap().prefix().unwrap().is_empty());
        assert_eq!(first(&[(pre, text("llama-bpe")), (add, Meta::Bool(false))]), [256, 258]);
        assert!(tiny(&[(add, text("yes"))]).err().unwrap().message.contains(add));
        let far = tiny(&[(add, Meta::Bool(true)), ("tokenizer.ggml.bos_token_id", Meta::Unsigned(999))]);
        assert!(far.err().unwrap().message.contains("999"));
    }

    #[test]
    fn words_are_cut_as_the_gguf_says() {
        let cut = |pre: &str, text: &str| {
            let t = tiny(&[("tokenizer.ggml.pre", Meta::Text(pre.into()))]).unwrap();
            let mut words = PreTokenizedString::from(text);
            t.inner.get_pre_tokenizer().unwrap().pre_tokenize(&mut words).unwrap();
            let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
            splits.into_iter().map(|(_, (from, to), _)| text[from..to].to_string()).collect::<Vec<_>>()
        };
        let text = "It's 1234 x\n\n y";
        assert_eq!(cut("gpt-2", text), ["It", "'s", " 1234", " x", "\n\n", " y"]);
        assert_eq!(cut("smollm", text), ["It", "'s", " ", "1", "2", "3", "4", " x", "\n\n", " y"]);
        assert_eq!(cut("llama-bpe", text), ["It", "'s", " ", "123", "4", " x", "\n\n", " y"]);
        assert_eq!(cut("qwen2", text), ["It", "'s", " ", "1", "2", "3", "4", " x", "\n\n", " y"]);
        assert_eq!(cut("dbrx", text), cut("llama-bpe", text));
        let text = "It's aBC/\n 1234 Élan ÉLAN's";
        assert_eq!(cut("gpt-4o", text), ["It's", " a", "BC", "/\n", " ", "123", "4", " Élan", " ÉLAN's"]);
        assert_eq!(
            cut("tekken", text),
            ["It", "'s", " a", "BC", "/\n", " ", "1", "2", "3", "4", " Élan", " ÉLAN", "'s"]
        );
        let error = tiny(&[("tokenizer.ggml.pre", Meta::Text("bloom".into()))]).err().unwrap().message;
        assert!(error.contains("\"bloom\""), "{error}");
        let error = tiny(&[("tokenizer.ggml.model", Meta::Text("t5".into()))]).err().unwrap().message;
        assert!(error.contains("\"t5\""), "{error}");
    }

    #[test]
    fn malformed_vocabularies_are_refused() {
        let merges = Meta::List(vec![Meta::Text("ab".into())]);
        assert!(tiny(&[("tokenizer.ggml.merges", merges)]).err().unwrap().message.contains("\"ab\""));
        let merges = Meta::List(vec![Meta::Text("q z".into())]);
        assert!(tiny(&[("tokenizer.ggml.merges", merges)]).is_err());
        // Longer than every token, which is more than unknown.
        let merges = Meta::List(vec![Meta::Text("</s> </s>".into())]);
        assert!(tiny(&[("tokenizer.ggml.merges", merges)]).err().unwrap().message.contains("merges"));
        let huge = r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":4294967295},"unk_token":"a"}}"#;
        assert!(Tokenizer::from_json(huge.as_bytes()).err().unwrap().message.contains("4294967295"));
        assert!(Tokenizer::from_json(b"{").is_err());
    }

    #[test]
    fn wordpieces_of_a_word_go_together() {
        let json = json!({ "version": "1.0", "added_tokens": [], "pre_tokenizer": { "type": "Whitespace" },
            "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
            "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": { "[UNK]": 0, "play": 1, "##ing": 2 } } });
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let ids = tokenizer.encode("playing play", false).unwrap();
        assert_eq!((&ids[..], tokenizer.decode(&ids, true).trim()), (&[1, 2, 1][..], "playing play"));
    }

    /// The pieces of a small SentencePiece vocabulary, by falling score.
    fn pieces() -> Vec<String> {
        let mut pieces: Vec<String> = Vec::new();
        let words = "ab ba aba bab ▁a ▁b ▁ab ▁ba abab aab ▁▁ ▁▁▁▁ bb abb bba ▁aab é aé ▁bab baab abba";
        pieces.extend(words.split(' ').map(String::from));
        pieces.extend(["▁", "a", "b", "c"].map(String::from));
        pieces
    }

    /// A GGUF tokenizer of [`pieces`] after `<unk>`, `<s>`, `</s>` and the 256 bytes; then a token of a user's.
    fn spm(changes: &[(&str, Meta)]) -> Result<Tokenizer> {
        let text = |t: &str| Meta::Text(t.into());
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
        let mut kinds = vec![2, 3, 3];
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
        kinds.resize(tokens.len(), 6);
        let first = tokens.len();
        tokens.extend(pieces());
        kinds.resize(tokens.len(), 1);
        tokens.push("<tool>".into());
        kinds.push(4);
        let scores = (0..tokens.len()).map(|id| Meta::Float(first as f64 - id.max(first) as f64)).collect();
        let mut meta = vec![
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.tokens", Meta::List(tokens.iter().map(|t| text(t)).collect())),
            ("tokenizer.ggml.scores", Meta::List(scores)),
            ("tokenizer.ggml.token_type", Meta::List(kinds.into_iter().map(Meta::Unsigned).collect())),
            ("tokenizer.ggml.bos_token_id", Meta::Unsigned(1)),
            ("tokenizer.ggml.eos_token_id", Meta::Unsigned(2)),
        ];
        for (key, value) in changes {
            meta.retain(|(k, _)| k != key);
            meta.push((*key, value.clone()));
        }
        Tokenizer::from_gguf(&Gguf::read(&write(&meta, &[])).unwrap(), &[2, 258])
    }

    /// SentencePiece's algorithm, plainly: of all neighbours that join to a piece, join the best, the leftmost of equals.
    fn reference(text: &str) -> Vec<String> {
        let pieces = pieces();
        let text = if text.is_empty() { String::new() } else { format!("▁{}", text.replace(' ', "▁")) };
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let rank = |i: usize| pieces.iter().position(|p| *p == format!("{}{}", symbols[i], symbols[i + 1]));
            let best = (0..symbols.len().saturating_sub(1)).filter_map(|i| Some((rank(i)?, i))).min();
            let Some((_, i)) = best else { break };
            let right = symbols.remove(i + 1);
            symbols[i].push_str(&right);
        }
        let spelled = |s: &String| match pieces.contains(s) {
            true => vec![s.clone()],
            false => s.bytes().map(|b| format!("<0x{b:02X}>")).collect(),
        };
        symbols.iter().flat_map(spelled).collect()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(2000))]

        #[test]
        fn a_sentencepiece_vocabulary_cuts_texts_as_sentencepiece_does(text in "[ab é北]{0,24}") {
            thread_local!(static TOKENIZER: Tokenizer = spm(&[]).unwrap());
            TOKENIZER.with(|t| {
                let ids = t.encode(&text, false).unwrap();
                let spelled: Vec<String> = ids.iter().map(|&id| t.inner.id_to_token(id).unwrap()).collect();
                assert_eq!(spelled, reference(&text), "{text:?}");
                assert_eq!(t.decode(&ids, false), text);
            });
        }
    }

    #[test]
    fn a_sentencepiece_gguf_says_what_surrounds_a_text() {
        let t = spm(&[]).unwrap();
        let id = |token: &str| t.token_id(token).unwrap();
        assert_eq!(t.encode("ab</s>", true).unwrap(), [1, id("▁ab"), 2]);
        assert_eq!(t.encode("a<tool>b", false).unwrap(), [id("▁a"), id("<tool>"), id("▁b")]);
        assert!(t.is_special(0) && t.is_special(1) && !t.is_special(id("<tool>")));
        // A text that goes on has one space before it, and no more.
        assert_eq!(t.continuation("ab").unwrap(), [id("▁ab")]);
        assert_eq!(t.decode(&[1, id("▁ab"), id("▁a")], true), "ab a");
        assert_eq!(t.token_bytes(id("▁ab")), b" ab");

        let phi3 = spm(&[("general.architecture", Meta::Text("phi3".into()))]).unwrap();
        assert_eq!(phi3.encode("a<tool>\n ab</s>\n", false).unwrap(), [id("▁a"), id("<tool>"), id("▁ab"), 2]);
        assert_eq!(phi3.encode("<s>\nab", false).unwrap(), t.encode("<s>\nab", false).unwrap());
        assert_ne!(phi3.encode("<tool>\nab", false).unwrap(), t.encode("<tool>\nab", false).unwrap());

        let flag = |key, value| (key, Meta::Bool(value));
        let around = [flag("tokenizer.ggml.add_bos_token", false), flag("tokenizer.ggml.add_eos_token", true)];
        assert_eq!(spm(&around).unwrap().encode("ab", true).unwrap(), [id("▁ab"), 2]);
        assert!(spm(&around).unwrap().prefix().unwrap().is_empty());
        let t = spm(&[flag("tokenizer.ggml.add_space_prefix", false)]).unwrap();
        assert_eq!(t.encode("ab", false).unwrap(), [id("ab")]);
        assert_eq!(t.continuation("ab").unwrap(), [id("▁ab")]);
        assert_eq!(t.decode(&[id("▁ab")], true), " ab");
        let scores = Meta::List(vec![Meta::Float(1.0)]);
        for (key, bad) in [("tokenizer.ggml.scores", scores), ("tokenizer.ggml.add_space_prefix", Meta::Unsigned(1))] {
            assert!(spm(&[(key, bad)]).err().unwrap().message.contains(key));
        }
    }

    #[test]
    fn llamas_flags_say_what_surrounds_a_text() {
        let vocabulary = json!({ "<s>": 0, "</s>": 1, "▁a": 2, "a": 3, "▁": 4, "[B]": 5 });
        let tokenizer = |processor: Value| {
            let json = json!({ "version": "1.0", "added_tokens": [], "post_processor": processor,
                "normalizer": { "type": "Prepend", "prepend": "▁" }, "decoder": { "type": "ByteFallback" },
                "model": { "type": "BPE", "vocab": vocabulary, "merges": [["▁", "a"]] } });
            Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
        };
        let kept = || frame(Some(("</s>", 1)), None);
        let ids = |processor: Value, mut settings: Value| {
            if settings["tokenizer_class"].is_null() {
                settings["tokenizer_class"] = "LlamaTokenizer".into();
            }
            tokenizer(processor).with_settings(&settings).unwrap().encode("a", true).unwrap()
        };
        assert_eq!(ids(Value::Null, json!({})), [0, 2]);
        assert_eq!(ids(Value::Null, json!({ "add_bos_token": false })), [2]);
        assert_eq!(ids(Value::Null, json!({ "add_eos_token": true })), [0, 2, 1]);
        assert_eq!(ids(Value::Null, json!({ "bos_token": { "content": "[B]" } })), [5, 2]);
        assert_eq!(ids(Value::Null, json!({ "bos_token": "none" })), [2]);
        assert_eq!(ids(kept(), json!({})), [1, 2]);
        assert_eq!(ids(kept(), json!({ "add_bos_token": true })), [0, 2]);
        assert_eq!(ids(kept(), json!({ "add_bos_token": true, "tokenizer_class": "Other" })), [1, 2]);
        let settings = json!({ "tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "bos_token": "none" });
        let error = tokenizer(Value::Null).with_settings(&settings).err().unwrap().message;
        assert!(error.contains("add_bos_token") && error.contains("\"none\""), "{error}");
    }

    #[test]
    fn sentencepiece_spellings_are_undone() {
        let added = |id: u32, content: &str, special: bool| {
            json!({ "id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false })
        };
        let json = json!({ "version": "1.0",
            "added_tokens": [added(0, "<s>", true), added(5, "▁▁", false), added(6, "<|a▁b|>", true)],
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" } ] },
            "model": { "type": "BPE", "vocab": { "<s>": 0, "▁a": 1, "<0xC3>": 2, "<0xA9>": 3, "<0xZZ>": 4, "▁▁": 5,
                "<|a▁b|>": 6 }, "merges": [] } });
        let t = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        assert_eq!(t.decode(&[0, 1, 2, 3], true), " aé");
        assert_eq!(t.decode(&[0, 4, 2], false), "<s><0xZZ>\u{fffd}");
        // As in Gemma 2, whose runs of spaces are added tokens; what spells a control token stays as it is.
        assert_eq!(t.decode(&[1, 5, 1], true), t.inner.decode(&[1, 5, 1], true).unwrap());
        assert_eq!((t.token_bytes(5), t.decode(&[6], false).as_str()), (&b"  "[..], "<|a▁b|>"));
    }
}
