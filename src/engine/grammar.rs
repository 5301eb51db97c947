//! Structured output: what an answer must be like, and which tokens may come next for it to become so.
//!
//! The grammars and the masks are llguidance's. Here it gets the vocabulary, and bounds: what it compiles comes from clients,
//! so that happens on a thread of its own, with a limit on size, time and stack.

use std::fmt::{Debug, Display, Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::base::Tokenizer;
use crate::engine::Vocabulary;
use crate::error::shorten;
use crate::{Error, Result};

/// Longest schema, and all choices together, in bytes.
const MAX_SOURCE: usize = 128 << 10;
/// All regular expressions of a constraint together: what they take to compile can grow with the square of their length, 65 s for
/// `a?` 30,000 times.
const MAX_REGEX: usize = 8 << 10;
/// Longest grammar, of which much can be regular expressions.
const MAX_LARK: usize = 16 << 10;
/// Grammars that are compiled at the same time.
const PLACES: usize = 2;
/// How long one waits for its place, and then how long it may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// llguidance descends into nested rules and schemas by recursion, a few hundred bytes of stack for each byte of source at most.
/// What is not used of it takes no memory.
const STACK: usize = 256 << 20;
/// States of the lexer that one text's matcher may keep, each of 1 to 2 kB.
const MAX_LEXER_STATES: usize = 50_000;
/// Vocabularies whose tables are kept, at some 10 MB each.
const KEPT: usize = 8;
/// Bytes of all tokens of a vocabulary together.
const MAX_SPELLING: usize = 4 << 20;
/// Longest token that is ever drawn under a grammar; llguidance's tables have an end there.
const MAX_TOKEN: usize = 1000;
/// Characters of llguidance's messages that are passed on.
const MAX_MESSAGE: usize = 400;
/// What may stand between the parts of a JSON text: a space, or a new line and its indentation, as those who write JSON do.
/// llguidance allows any number of either by default, and a model that is not sure how to go on likes to add them without end.
const JSON_SPACE: &str = r"\x20|\x0A[\x20\x09]{0,64}";

/// What an answer must be like.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// JSON that a JSON schema allows.
    Json(Value),
    /// A text of which the whole matches a regular expression in the syntax of Rust's regex crate, without look-around.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of a context-free grammar in llguidance's variant of Lark.
    Lark(String),
}

impl Constraint {
    /// Errors: `BadRequest` for one that would take too long.
    fn check_size(&self) -> Result<()> {
        let (bytes, limit) = match self {
            Constraint::Json(schema) => (schema.to_string().len(), MAX_SOURCE),
            Constraint::Choice(choices) => (choices.iter().map(String::len).sum(), MAX_SOURCE),
            Constraint::Regex(text) => (text.len(), MAX_REGEX),
            Constraint::Lark(text) => (text.len(), MAX_LARK),
        };
        if bytes > limit {
            return Err(Error::bad_request(format!("it has {bytes} bytes; the limit is {limit}")));
        }
        if let Constraint::Json(schema) = self {
            let bytes = patterns(schema);
            if bytes > MAX_REGEX {
                let what = format!("its patterns have {bytes} bytes together; the limit is {MAX_REGEX}");
                return Err(Error::bad_request(what));
            }
        }
        Ok(())
    }

    /// For llguidance. Errors: `BadRequest`.
    fn source(&self) -> Result<TopLevelGrammar> {
        self.check_size()?;
        Ok(match self {
            Constraint::Json(schema) => TopLevelGrammar::from_json_schema(with_json_space(schema)),
            Constraint::Regex(regex) => {
                let backslashes = regex.len() - regex.trim_end_matches('\\').len();
                if backslashes % 2 == 1 {
                    return Err(Error::bad_request("it ends in a backslash that escapes nothing"));
                }
                TopLevelGrammar::from_regex(regex)
            }
            Constraint::Choice(choices) => {
                if choices.is_empty() || choices.iter().any(String::is_empty) {
                    return Err(Error::bad_request("expected one text or more, none empty"));
                }
                let escaped: Vec<String> = choices.iter().map(|choice| regex::escape(choice)).collect();
                TopLevelGrammar::from_regex(&escaped.join("|"))
            }
            Constraint::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        })
    }
}

/// Bytes of all that may be a regular expression in a schema.
fn patterns(schema: &Value) -> usize {
    let mut left = vec![schema];
    let mut bytes = 0;
    while let Some(value) = left.pop() {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    bytes += match (key.as_str(), value) {
                        ("patternProperties", Value::Object(properties)) => properties.keys().map(String::len).sum(),
                        (_, Value::String(text)) if key.contains("pattern") => text.len(),
                        _ => 0,
                    };
                    left.push(value);
                }
            }
            Value::Array(list) => left.extend(list),
            _ => {}
        }
    }
    bytes
}

/// The schema with [`JSON_SPACE`], unless it has its own mind about space in `x-guidance`, where llguidance's options stand.
fn with_json_space(schema: &Value) -> Value {
    // The schema `true` has no place for options.
    let mut schema = if *schema == true { json!({}) } else { schema.clone() };
    if let Value::Object(keywords) = &mut schema {
        let options = keywords.entry("x-guidance").or_insert_with(|| json!({}));
        if let Value::Object(options) = options
            && !options.contains_key("whitespace_flexible")
        {
            options.entry("whitespace_pattern").or_insert(JSON_SPACE.into());
        }
    }
    schema
}

/// What is wrong with a constraint, without llguidance's own state.
fn wrong(e: impl Display) -> Error {
    let message = format!("{e:#}");
    let message = ["\n<backtrace>", "\n<state>", "<non-verbose/>"]
        .iter()
        .fold(message.as_str(), |text, end| text.split(end).next().unwrap_or(text));
    Error::bad_request(shorten(message.trim(), MAX_MESSAGE))
}

/// llguidance's tables of a vocabulary of `size` tokens. `eos_tokens` end a text; they are never a part of it.
///
/// The tables have one token more, which cannot be drawn: where it is allowed, a text may end. So this is known of
/// vocabularies without an end token too.
fn tables(vocabulary: &dyn Vocabulary, size: usize, eos_tokens: &[u32]) -> Result<ParserFactory> {
    // llguidance tells special tokens by this byte in front, which no text has.
    const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let spell = |id: u32| {
        let bytes = vocabulary.token_bytes(id);
        let is_special = vocabulary.is_special(id) || eos_tokens.contains(&id);
        match is_special {
            _ if bytes.is_empty() || bytes.len() > MAX_TOKEN || bytes.contains(&MARKER) => vec![],
            true => [&[MARKER], bytes].concat(),
            false => bytes.to_vec(),
        }
    };
    let mut words: Vec<Vec<u8>> = (0..size as u32).map(spell).collect();
    words.push(vec![MARKER, 0]);
    let bytes: usize = words.iter().map(Vec::len).sum();
    if bytes > MAX_SPELLING {
        return Err(Error::bad_request(format!(
            "the vocabulary is too large for grammars: its tokens have {bytes} bytes, the limit is {MAX_SPELLING}"
        )));
    }
    let eos_tokens: Vec<u32> =
        eos_tokens.iter().copied().filter(|&id| (id as usize) < size).chain([size as u32]).collect();
    let build = || -> Result<ParserFactory, String> {
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos_tokens[0]), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&eos_tokens)));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(factory)
    };
    let built = catch_unwind(AssertUnwindSafe(build)).unwrap_or_else(|_| Err("it panicked".into()));
    built.map_err(|e| Error::internal(format!("no tables of the vocabulary for grammars: {e}")))
}

/// A compiled constraint, for any number of texts at the same time.
#[derive(Clone)]
pub struct Grammar(Arc<llguidance::Matcher>);

impl Grammar {
    /// Errors: `BadRequest` if the constraint is wrong, too large, or not to be met with the vocabulary.
    fn compile(tables: &ParserFactory, constraint: &Constraint) -> Result<Self> {
        let parser = tables.create_parser(constraint.source()?).map_err(wrong)?;
        let mut matcher = llguidance::Matcher::new(Ok(parser));
        // What can begin a text, which every text then has at hand; an error if nothing can.
        matcher.compute_mask().map_err(stuck)?;
        Ok(Grammar(Arc::new(matcher)))
    }

    /// At the beginning of a text.
    pub(super) fn matcher(&self) -> Matcher {
        // Nothing is shared, not even what the lexer has learnt: its size is limited, and one text must not use up another's.
        Matcher { inner: self.0.deep_clone() }
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Debug for Grammar {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

/// Where one text is in its grammar.
pub(super) struct Matcher {
    inner: llguidance::Matcher,
}

/// Why a text cannot go on.
fn stuck(e: impl Display) -> Error {
    let e = wrong(e);
    match e.message.as_str() {
        "NoExtensionBias" => {
            Error::bad_request("no token of the vocabulary can come next in the text that is asked for")
        }
        _ => e,
    }
}

impl Matcher {
    /// Makes −∞ of the logits of tokens that must not come next: those that the grammar has no place for, and `refused`. `false`
    /// if none is left, for the text is complete.
    ///
    /// Errors: `BadRequest` if none is left and the text is not complete, or if the grammar has become too complex.
    pub fn mask(&mut self, logits: &mut [f32], refused: &[u32]) -> Result<bool> {
        let allowed = self.inner.compute_mask().map_err(stuck)?;
        // The token that is in no vocabulary.
        let end = allowed.len() as u32 - 1;
        let mut any = false;
        for (logit, token) in logits.iter_mut().zip(0..) {
            if token < end && allowed.is_allowed(token) && !refused.contains(&token) {
                any = true;
            } else {
                *logit = f32::NEG_INFINITY;
            }
        }
        match any || allowed.is_allowed(end) {
            true => Ok(any),
            false => Err(stuck("NoExtensionBias")),
        }
    }

    /// Goes on with a token that the mask left. Whether the text is complete now and nothing can follow.
    ///
    /// Errors: `BadRequest` if the grammar has become too complex.
    pub fn take(&mut self, token: u32) -> Result<bool> {
        self.inner.consume_token(token).map_err(stuck)?;
        Ok(self.inner.is_stopped())
    }
}

impl Debug for Matcher {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Matcher")
    }
}

/// Tables that are built when the first grammar needs them.
type Tables = Arc<OnceLock<Result<ParserFactory>>>;

struct Kept {
    tokenizer: Weak<Tokenizer>,
    eos_tokens: Vec<u32>,
    tables: Tables,
}

/// Compiles constraints, and keeps the tables of the vocabularies that were used last.
pub struct Grammars {
    /// The one used last comes first.
    kept: Mutex<Vec<Kept>>,
    places: Arc<Semaphore>,
}

impl Default for Grammars {
    fn default() -> Self {
        Grammars { kept: Mutex::default(), places: Arc::new(Semaphore::new(PLACES)) }
    }
}

impl Grammars {
    /// Compiles a constraint for texts in the tokens of `tokenizer` that `eos_tokens` end, on a thread of its own.
    ///
    /// Errors: `BadRequest` if the constraint is wrong, too large, takes too long, or is not to be met with the vocabulary;
    /// `Unavailable` if others take too long.
    pub async fn compile(
        &self,
        constraint: Constraint,
        tokenizer: &Arc<Tokenizer>,
        eos_tokens: &[u32],
    ) -> Result<Grammar> {
        let place = timeout(PATIENCE, self.places.clone().acquire_owned()).await;
        let place = place.map_err(|_| Error::unavailable("other grammars are being compiled; try again soon"))?;
        let place = place.map_err(Error::internal)?;
        let (sender, receiver) = oneshot::channel();
        let (kept, tokenizer, eos_tokens) =
            (self.tables(tokenizer, eos_tokens), tokenizer.clone(), eos_tokens.to_vec());
        let compile = move || {
            let _place = place;
            let tables = kept.get_or_init(|| tables(&*tokenizer, tokenizer.vocab_size(), &eos_tokens));
            let grammar = match tables {
                Ok(tables) => Grammar::compile(tables, &constraint),
                Err(e) => Err(e.clone()),
            };
            // A receiver that is gone has hung up, or lost patience.
            let _ = sender.send(grammar);
        };
        std::thread::Builder::new().name("grammar".into()).stack_size(STACK).spawn(compile)?;
        match timeout(PATIENCE, receiver).await {
            Ok(grammar) => grammar.unwrap_or_else(|_| Err(Error::internal("compiling a grammar panicked"))),
            Err(_) => Err(Error::bad_request(format!("it takes more than {} s to compile", PATIENCE.as_secs()))),
        }
    }

    fn tables(&self, tokenizer: &Arc<Tokenizer>, eos_tokens: &[u32]) -> Tables {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|k| k.tokenizer.strong_count() > 0);
        let is_it = |k: &Kept| std::ptr::eq(k.tokenizer.as_ptr(), Arc::as_ptr(tokenizer)) && k.eos_tokens == eos_tokens;
        let first = match kept.iter().position(is_it) {
            Some(i) => kept.remove(i),
            None => Kept {
                tokenizer: Arc::downgrade(tokenizer),
                eos_tokens: eos_tokens.to_vec(),
                tables: Tables::default(),
            },
        };
        let tables = first.tables.clone();
        kept.insert(0, first);
        kept.truncate(KEPT);
        tables
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;
    use std::path::Path;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::base::Base;
    use crate::{Error, ErrorKind};

    /// Compiled for a vocabulary of which `eos_tokens` end a text.
    pub fn compile(
        vocabulary: &dyn Vocabulary,
        size: usize,
        eos_tokens: &[u32],
        constraint: &Constraint,
    ) -> Result<Grammar> {
        Grammar::compile(&tables(vocabulary, size, eos_tokens)?, constraint)
    }

    /// Tokens by their bytes, and which of them are special.
    struct Words(Vec<(Vec<u8>, bool)>);

    impl Vocabulary for Words {
        fn token_bytes(&self, id: u32) -> &[u8] {
            self.0.get(id as usize).map_or(&[], |(bytes, _)| bytes)
        }
        fn is_special(&self, id: u32) -> bool {
            self.0.get(id as usize).is_some_and(|(_, special)| *special)
        }
    }

    fn regex(text: &str) -> Constraint {
        Constraint::Regex(text.into())
    }

    /// A constraint, its texts of up to nine of the characters a, b and é or more, and all beginnings of these.
    struct Language {
        constraint: Constraint,
        texts: HashSet<Vec<u8>>,
        beginnings: HashSet<Vec<u8>>,
    }

    static LANGUAGES: LazyLock<Vec<Language>> = LazyLock::new(|| {
        let mut all = vec![String::new()];
        let mut from = 0;
        for _ in 0..9 {
            let until = all.len();
            for i in from..until {
                all.extend(["a", "b", "é"].map(|c| format!("{}{c}", all[i])));
            }
            from = until;
        }
        let of = |constraint: Constraint, texts: HashSet<Vec<u8>>| {
            let beginnings = texts.iter().flat_map(|text| (0..=text.len()).map(|end| text[..end].to_vec())).collect();
            Language { constraint, texts, beginnings }
        };
        let language = |constraint: Constraint, has: &dyn Fn(&str) -> bool| {
            of(constraint, all.iter().filter(|text| has(text)).map(|text| text.clone().into()).collect())
        };
        let mut languages: Vec<Language> =
            ["a*b", "(ab|é)+", "a?é?b?", "(a|ab|abé)b*", "[ab]{2,4}", "é(a|b)*", "^(aa|bb|éé){1,2}$", "[^a]*", "é"]
                .iter()
                .map(|text| {
                    let whole = regex::Regex::new(&format!("^(?:{text})$")).unwrap();
                    language(regex(text), &|text| whole.is_match(text))
                })
                .collect();
        let choices = ["a", "ab", "abé", "éa"];
        languages.push(language(Constraint::Choice(choices.map(String::from).into()), &|text| choices.contains(&text)));
        let nested = "start: \"a\" start \"b\" | \"é\"";
        // As long as its longest beginnings need: of six times a, thirteen characters.
        let texts = (0..8).map(|n| format!("{}é{}", "a".repeat(n), "b".repeat(n)).into_bytes()).collect();
        languages.push(of(Constraint::Lark(nested.into()), texts));
        languages
    });

    /// Pieces of texts, also of characters.
    fn any_word() -> impl Strategy<Value = Vec<u8>> {
        (prop::collection::vec(prop::sample::select(vec!["a", "b", "é"]), 1..3), 0usize..3, 0usize..3).prop_map(
            |(characters, from, cut)| {
                let bytes = characters.concat().into_bytes();
                let end = bytes.len().saturating_sub(cut);
                bytes[from.min(end)..end].to_vec()
            },
        )
    }

    proptest! {
        /// At each step of a walk: every token of the vocabulary by itself, looked up in a list of all texts.
        #[test]
        fn the_mask_is_what_trying_every_token_gives(
            words in prop::collection::vec((any_word(), prop::bool::weighted(0.1)), 1..40),
            which in prop::sample::select((0..LANGUAGES.len()).collect::<Vec<_>>()),
            ends in 0usize..3,
            refused in prop::option::of(0u32..40),
            turns in prop::collection::vec(any::<prop::sample::Index>(), 4),
        ) {
            let language = &LANGUAGES[which];
            let eos_tokens: Vec<u32> = (0..ends.min(words.len()) as u32).collect();
            let vocabulary = Words(words.clone());
            let is_text = |id: usize| !words[id].1 && !eos_tokens.contains(&(id as u32)) && !words[id].0.is_empty();
            let mut text: Vec<u8> = vec![];
            let follows = |text: &[u8], id: usize| {
                is_text(id) && language.beginnings.contains(&[text, &words[id].0].concat())
            };
            let mut matcher = match compile(&vocabulary, words.len(), &eos_tokens, &language.constraint) {
                Ok(grammar) => grammar.matcher(),
                Err(e) => {
                    prop_assert_eq!(e.kind, ErrorKind::BadRequest, "{}", e);
                    prop_assert!(!(0..words.len()).any(|id| follows(&text, id)) && !language.texts.contains(&text));
                    return Ok(());
                }
            };
            let refused: Vec<u32> = refused.into_iter().collect();
            for turn in turns {
                let is_complete = language.texts.contains(&text);
                let expected: Vec<bool> = (0..words.len())
                    .map(|id| follows(&text, id) || is_complete && eos_tokens.contains(&(id as u32)))
                    .zip(0..)
                    .map(|(allowed, id)| allowed && !refused.contains(&id))
                    .collect();
                // The model has more logits than the vocabulary has tokens.
                let mut logits = vec![0.0; words.len() + 3];
                let any = matcher.mask(&mut logits, &refused);
                match any {
                    Ok(any) => prop_assert!(any == expected.contains(&true) && (any || is_complete)),
                    Err(e) => {
                        prop_assert!(!expected.contains(&true) && !is_complete, "{} after {:?}", e, text);
                        break;
                    }
                }
                let allowed: Vec<bool> = logits.iter().map(|logit| *logit == 0.0).collect();
                prop_assert_eq!(&allowed[..words.len()], &expected, "after {:?}", text);
                prop_assert!(!allowed[words.len()..].contains(&true));
                let next: Vec<usize> = (0..words.len()).filter(|&id| expected[id] && is_text(id)).collect();
                if next.is_empty() {
                    break;
                }
                let token = next[turn.index(next.len())];
                text.extend(&words[token].0);
                let ended = matcher.take(token as u32).unwrap();
                let goes_on = language.beginnings.iter().any(|longer| longer.len() > text.len() && longer.starts_with(&text));
                prop_assert!(!ended || language.texts.contains(&text) && !goes_on, "after {:?}", text);
                if ended || text.len() > 4 {
                    break;
                }
            }
        }
    }

    fn tiny() -> Arc<Tokenizer> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama/base");
        Base::open(&model.to_string_lossy()).unwrap().tokenizer
    }

    /// One byte each, and an end.
    fn bytes() -> Words {
        Words((0..=255).map(|byte| (vec![byte], false)).chain([(b"</s>".to_vec(), true)]).collect())
    }

    fn compile_for_bytes(constraint: &Constraint) -> Result<Grammar> {
        compile(&bytes(), 257, &[256], constraint)
    }

    fn error(constraint: Constraint) -> Error {
        let e = compile_for_bytes(&constraint).expect_err("an error");
        assert_eq!(e.kind, ErrorKind::BadRequest, "{e}");
        assert!(!e.message.is_empty() && e.message.len() < 2000 && !e.message.contains("backtrace"), "{e}");
        e
    }

    #[test]
    fn what_is_wrong_with_a_constraint_is_told() {
        let json = |schema: Value| error(Constraint::Json(schema)).message;
        let message = json(json!({ "properties": { "a": { "$ref": "http://example.com/schema.json" } } }));
        assert!(message.contains("http://example.com/schema.json"), "{message}");
        assert!(json(json!({ "$ref": "#/$defs/a" })).contains("#/$defs/a"));
        assert!(json(json!({ "type": "strnig" })).contains("strnig"));
        assert!(json(json!({ "type": "string", "pattern": "(" })).contains('('));
        assert!(json(json!({ "not": { "type": "string" } })).contains("not"));
        assert!(json(json!({ "type": "integer", "minimum": 3, "maximum": 2 })).contains("minimum"));
        assert!(!json(json!(false)).is_empty());
        assert!(json(json!({ "x-guidance": { "no_such_option": 1 } })).contains("no_such_option"));
        for text in ["(", "a{3,2}", "[", r"a\", r"\p{No}\", r"(?=a)b", r"\bword"] {
            error(regex(text));
        }
        assert!(error(Constraint::Choice(vec![])).message.contains("one text"));
        error(Constraint::Choice(vec!["a".into(), "".into()]));
        for text in ["", "begin: \"a\"", "start: \"a", "start: no_such", "root ::= \"a\"", "{\"grammars\": []}"] {
            error(Constraint::Lark(text.into()));
        }
        let long = "a?".repeat(MAX_REGEX / 2);
        assert!(error(regex(&format!("{long}b"))).message.contains("limit"));
        assert!(error(Constraint::Lark(format!("start: /{}/", "a?".repeat(MAX_LARK / 2)))).message.contains("limit"));
        assert!(json(json!({ "items": [{ "pattern": long }, { "pattern": "a" }] })).contains("patterns"));
        assert!(json(json!({ "patternProperties": { long + "a": {} } })).contains("patterns"));
        assert!(json(json!({ "const": "a".repeat(MAX_SOURCE) })).contains("limit"));
        // The end of a multi-byte character lies where the message is cut.
        error(Constraint::Json(json!({ "type": format!("{}é", "x".repeat(98)) })));
    }

    /// The whole of what a grammar lets the first or the last of the allowed tokens make, up to `max` tokens.
    fn walk(grammar: &Grammar, last: bool, max: usize) -> String {
        let (mut matcher, mut text) = (grammar.matcher(), vec![]);
        for _ in 0..max {
            let mut logits = vec![0.0; 257];
            if !matcher.mask(&mut logits, &[256]).unwrap() {
                break;
            }
            let mut allowed = (0..256u32).filter(|&id| logits[id as usize] == 0.0);
            let token = if last { allowed.next_back() } else { allowed.next() }.unwrap();
            text.push(token as u8);
            if matcher.take(token).unwrap() {
                break;
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn space_between_the_parts_of_json_has_an_end() {
        let grammar =
            compile_for_bytes(&Constraint::Json(json!({ "type": "array", "items": { "const": 1 } }))).unwrap();
        // The first byte that is allowed is a new line, and then a tab as long as one is.
        assert_eq!(walk(&grammar, false, 200)[..67], format!("[\n{}1", "\t".repeat(64)));
        let bare = json!({ "const": [1, 2], "x-guidance": { "whitespace_flexible": false } });
        assert_eq!(walk(&compile_for_bytes(&Constraint::Json(bare)).unwrap(), false, 200), "[1,2]");
        assert!(compile_for_bytes(&Constraint::Json(json!(true))).is_ok());
    }

    /// What clients send may be made to hurt. It is compiled or refused, in time and without a crash, and so is what comes of
    /// it.
    #[test]
    fn constraints_that_attack() {
        let rules = |n: usize| (0..n).map(|i| format!("r{i}: r{} \"b\"\n", i + 1)).collect::<String>();
        let terminals = |n: usize| (0..n).map(|i| format!("R{i}: \"a\" R{} | \"b\"\n", i + 1)).collect::<String>();
        let defs = |n: usize| {
            let each = |i: usize| (format!("d{i}"), json!({ "items": { "$ref": format!("#/$defs/d{}", i + 1) } }));
            (0..n).map(each).chain([(format!("d{n}"), json!({ "type": "null" }))]).collect::<serde_json::Map<_, _>>()
        };
        let nested = |key: &str, n: usize| (0..n).fold(json!({}), |inner, _| json!({ key: [inner.clone(), inner] }));
        let parentheses = |n: usize| format!("{}a{}", "(".repeat(n), ")".repeat(n));
        let lark = |text: String| Constraint::Lark(text);
        let attacks = vec![
            lark(format!("start: {}", parentheses(60_000).replace('a', "\"a\""))),
            lark(format!("start: {}", "(".repeat(MAX_SOURCE - 7))),
            lark(format!("start: {}\"a\"{}", "[".repeat(60_000), "]".repeat(60_000))),
            lark(format!("start: r0\n{}r8000: \"a\"\n", rules(8000))),
            lark(format!("start: R0\n{}R6000: \"a\"\n", terminals(6000))),
            lark("start: start start | \"a\" | \"\"".into()),
            lark("start: a\na: b\nb: a".into()),
            lark("start: \"a\"{1,1000000}".into()),
            lark("start: ((\"a\"{1,1000}){1,1000}){1,1000}".into()),
            regex(&parentheses(60_000)),
            regex(&parentheses(200)),
            regex("((a{1,1000}){1,1000}){1,1000}"),
            regex("(x+x+)+y"),
            regex(&format!("{}b", "(a|b)*a(a|b){0,60}".repeat(20))),
            regex(r"(\pL|\pN|\pS){1,2000}"),
            regex(&"a?".repeat(3000)),
            Constraint::Choice((0..4000).map(|i| format!("{}{i}", "a".repeat(20))).collect()),
            Constraint::Choice((0..500).map(|i| "a".repeat(i + 1)).collect()),
            Constraint::Json(json!({ "$ref": "#" })),
            Constraint::Json(json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/a" } } })),
            Constraint::Json(json!({ "allOf": [{ "$ref": "#" }, { "$ref": "#" }] })),
            Constraint::Json(json!({ "$ref": "#/$defs/d0", "$defs": defs(2500) })),
            Constraint::Json(
                json!({ "allOf": [{ "$ref": "#/$defs/d0" }, { "$ref": "#/$defs/d1" }], "$defs": defs(2500) }),
            ),
            Constraint::Json(nested("allOf", 12)),
            Constraint::Json(nested("anyOf", 12)),
            Constraint::Json(nested("oneOf", 12)),
            Constraint::Json((0..120).fold(json!({}), |inner, _| json!({ "items": inner }))),
            Constraint::Json(json!({ "type": "string", "minLength": 1_000_000_000u64 })),
            Constraint::Json(json!({ "type": "string", "maxLength": 4_000_000_000u64 })),
            Constraint::Json(json!({ "type": "array", "minItems": 1_000_000, "items": { "type": "array" } })),
            Constraint::Json(json!({ "type": "array", "maxItems": u64::MAX })),
            Constraint::Json(json!({ "type": "number", "multipleOf": 1e-300 })),
            Constraint::Json(json!({ "type": "integer", "multipleOf": 999_999_937 })),
            Constraint::Json(json!({ "type": "number", "minimum": -1e300, "maximum": 1e-300 })),
            Constraint::Json(json!({ "type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$" })),
        ];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (grammars, tokenizer, bytes) = (Grammars::default(), tiny(), tables(&bytes(), 257, &[256]).unwrap());
        let bytes = Arc::new(bytes);
        for constraint in attacks {
            let name = shorten(&format!("{constraint:?}"), 60);
            match runtime.block_on(grammars.compile(constraint.clone(), &tokenizer, &[2])) {
                Ok(_) => {}
                Err(e) => assert!(matches!(e.kind, ErrorKind::BadRequest | ErrorKind::Unavailable), "{name}: {e}"),
            }
            // With a vocabulary that spells everything, on a thread as the engine's for the steps.
            let tables = bytes.clone();
            let compile = move || Grammar::compile(&tables, &constraint);
            let compiled = std::thread::Builder::new().stack_size(STACK).spawn(compile).unwrap().join().unwrap();
            let Ok(grammar) = compiled else { continue };
            for last in [false, true] {
                let mut matcher = grammar.matcher();
                for _ in 0..40 {
                    let mut logits = vec![0.0; 257];
                    // Too complex to go on is an answer too.
                    let Ok(true) = matcher.mask(&mut logits, &[256]) else { break };
                    let mut allowed = (0..256u32).filter(|&id| logits[id as usize] == 0.0);
                    let token = if last { allowed.next_back() } else { allowed.next() }.unwrap();
                    if matcher.take(token).unwrap_or(true) {
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn tables_are_built_once_and_those_used_last_are_kept() {
        let grammars = Grammars::default();
        let tokenizers: Vec<Arc<Tokenizer>> = (0..KEPT + 1).map(|_| tiny()).collect();
        let first = grammars.tables(&tokenizers[0], &[2]);
        assert!(Arc::ptr_eq(&first, &grammars.tables(&tokenizers[0], &[2])));
        assert!(!Arc::ptr_eq(&first, &grammars.tables(&tokenizers[0], &[2, 3])));
        for tokenizer in &tokenizers[1..KEPT] {
            grammars.tables(tokenizer, &[2]);
            assert!(Arc::ptr_eq(&first, &grammars.tables(&tokenizers[0], &[2])));
        }
        for tokenizer in &tokenizers[1..] {
            grammars.tables(tokenizer, &[2]);
        }
        assert!(!Arc::ptr_eq(&first, &grammars.tables(&tokenizers[0], &[2])));
        assert_eq!(grammars.kept.lock().unwrap().len(), KEPT);
        drop(tokenizers);
        grammars.tables(&tiny(), &[2]);
        assert_eq!(grammars.kept.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_vocabulary_too_large_for_the_tables_is_refused() {
        let words = Words((0..6000).map(|i| (format!("{i:0>900}").into_bytes(), false)).collect());
        let e = compile(&words, 6000, &[], &regex("0*")).unwrap_err();
        assert!(e.message.contains("too large"), "{e}");
        // A token longer than the tables hold, and bytes that no text has, are left out.
        let odd = Words(vec![(vec![b'a'; 5000], false), (vec![0xff], false), (b"a".to_vec(), false)]);
        let mut matcher = compile(&odd, 3, &[], &regex("a*")).unwrap().matcher();
        let mut logits = vec![0.0; 3];
        assert!(matcher.mask(&mut logits, &[]).unwrap());
        assert_eq!(logits, [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0]);
    }
}
