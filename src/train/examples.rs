//! Records to sequences of tokens with what is to be learned from them.

use std::collections::BTreeMap;

use rand::seq::SliceRandom;
use serde_json::Value;

use super::random;
use super::table::Record;
use crate::base::Base;
use crate::{Error, Result};

/// Columns that hold the text or the class where nobody says which.
const TEXT_COLUMNS: [&str; 7] = ["text", "sentence", "review", "content", "input", "body", "document"];
const LABEL_COLUMNS: [&str; 7] = ["label", "labels", "class", "category", "sentiment", "topic", "target"];

/// What is to be learned from a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    /// The class at its last token.
    Class(u32),
    /// The tokens from this index on and before that one, each from those before it.
    Tokens(Vec<std::ops::Range<usize>>),
}

impl Goal {
    /// Tokens without a gap.
    fn range(range: std::ops::Range<usize>) -> Self {
        Goal::Tokens(std::iter::once(range).collect())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    pub tokens: Vec<u32>,
    pub goal: Goal,
}

/// Which columns to read, and how.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    pub text: Option<String>,
    pub label: Option<String>,
    /// Names in place of the values of the label column, e.g. `0` to `negative`.
    pub rename: BTreeMap<String, String>,
    /// Leaves records with an empty text out instead of refusing them.
    pub skip_empty: bool,
    /// Tokens of a sequence at most.
    pub max_length: usize,
}

/// Examples of a classification and the names of the classes, sorted.
#[derive(Debug)]
pub struct Classified {
    pub examples: Vec<Example>,
    pub labels: Vec<String>,
    /// Texts that were cut to the longest length.
    pub cut: usize,
}

fn guess(records: &[Record], asked: &Option<String>, known: &[&str], what: &str, option: &str) -> Result<String> {
    let Some(first) = records.first() else { return Err(Error::bad_request("there are no examples")) };
    let has = |name: &str| first.fields.contains_key(name);
    let list = || first.fields.keys().map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ");
    match asked {
        Some(name) if has(name) => Ok(name.clone()),
        Some(name) => Err(first.wrong(format!("has no column {name:?}; it has {}", list()))),
        None => {
            match known.iter().find(|name| has(name)) {
                Some(name) => Ok(name.to_string()),
                None => Err(first
                    .wrong(format!("has no column that looks like {what}; it has {}; name one with {option}", list()))),
            }
        }
    }
}

/// The text of a record; `None` for an empty one that is to be left out. A null is empty, as Parquet's texts often are.
fn filled(record: &Record, column: &str, skip_empty: bool) -> Result<Option<String>> {
    let null = record.fields.get(column).is_some_and(Value::is_null);
    let text = if null { String::new() } else { record.text(column)? };
    match text.trim().is_empty() {
        false => Ok(Some(text)),
        true if skip_empty => Ok(None),
        true => {
            Err(record.wrong(format!("has an empty {column:?}; fill it in, or leave such rows out with --skip-empty")))
        }
    }
}

/// The column of the texts: the one asked for, or the one that looks like it.
pub fn text_column(records: &[Record], asked: &Option<String>) -> Result<String> {
    guess(records, asked, &TEXT_COLUMNS, "a text", "--text-column")
}

/// The texts themselves.
pub fn plain(records: &[Record], column: &str, skip_empty: bool) -> Result<Vec<String>> {
    records.iter().filter_map(|record| filled(record, column, skip_empty).transpose()).collect()
}

/// Reads a classification. `labels` are the classes that are allowed, e.g. those of the training data; without them they
/// are whatever occurs.
pub fn classified(base: &Base, records: &[Record], columns: &Columns, labels: Option<&[String]>) -> Result<Classified> {
    let text_column = text_column(records, &columns.text)?;
    let label_column = guess(records, &columns.label, &LABEL_COLUMNS, "a class", "--label-column")?;
    let mut read = Vec::with_capacity(records.len());
    for record in records {
        let Some(text) = filled(record, &text_column, columns.skip_empty)? else { continue };
        let label = record.text(&label_column)?.trim().to_string();
        if label.is_empty() {
            return Err(record.wrong(format!("has an empty {label_column:?}; every row needs its class")));
        }
        read.push((record, text, columns.rename.get(&label).cloned().unwrap_or(label)));
    }
    let mut found: Vec<String> = read.iter().map(|(_, _, label)| label.clone()).collect();
    found.sort();
    found.dedup();
    let names = labels.map_or(found, <[String]>::to_vec);
    if labels.is_none() && names.len() < 2 {
        return Err(Error::bad_request(format!(
            "all {} rows have the class {:?} in {label_column:?}; a classification needs two classes or more",
            read.len(),
            names.first().map_or("", String::as_str)
        )));
    }
    let mut cut = 0;
    let mut examples = Vec::with_capacity(read.len());
    for (record, text, label) in read {
        let class = names.iter().position(|n| *n == label).ok_or_else(|| {
            record.wrong(format!("has the class {label:?}, which the training data lacks; its classes are {names:?}"))
        })?;
        let mut tokens = base.tokenizer.encode_for_head(&text)?;
        if tokens.is_empty() {
            return Err(record.wrong(format!("has a {text_column:?} of which the tokenizer leaves nothing")));
        }
        cut += usize::from(tokens.len() > columns.max_length);
        tokens.truncate(columns.max_length);
        examples.push(Example { tokens, goal: Goal::Class(class as u32) });
    }
    Ok(Classified { examples, labels: names, cut })
}

/// Texts to continue.
#[derive(Debug)]
pub struct Texts {
    pub examples: Vec<Example>,
    /// How many of them each record was made into, in their order.
    pub pieces: Vec<usize>,
}

/// The places of chats and pairs of which not all is learned: those whose end is cut off, and those that are left out, since
/// what is to be learned begins where the longest length ends.
#[derive(Debug, Default, PartialEq)]
struct Shortened {
    cut: Vec<String>,
    left_out: Vec<String>,
}

impl Shortened {
    /// Notes that `record` has been cut; its example, if there is still something to learn from.
    fn note(&mut self, record: &Record, example: Option<Example>) -> Option<Example> {
        let places = if example.is_some() { &mut self.cut } else { &mut self.left_out };
        places.push(record.place.clone());
        example
    }

    /// What there is to say of it.
    fn told(&self, max_length: usize) -> Vec<String> {
        let say = |places: &[String], what: &str| {
            let (count, first) = (places.len(), places.first()?);
            Some(format!("{count} examples {what} {max_length} tokens (--max-length), the first of them {first}"))
        };
        let left_out = say(&self.left_out, "are left out, since what is to be learned of them begins after");
        let cut = say(&self.cut, "are cut off after");
        left_out.into_iter().chain(cut).collect()
    }
}

/// Reads texts to continue: `messages` (a chat), `prompt` and `completion`, or a text. Of a chat the assistant's turns are
/// learned, of a pair the completion, of a text every token. A text longer than the longest length is cut in pieces, each
/// with what the tokenizer puts before a text; of a longer chat or pair the end is cut off, which is told.
pub fn texts(base: &Base, records: &[Record], columns: &Columns) -> Result<Texts> {
    let (texts, shortened) = continued(base, records, columns)?;
    shortened.told(columns.max_length).iter().for_each(|what| tracing::warn!("{what}"));
    match texts.examples.is_empty() {
        true => Err(Error::bad_request("no example is short enough to learn from; raise --max-length")),
        false => Ok(texts),
    }
}

fn continued(base: &Base, records: &[Record], columns: &Columns) -> Result<(Texts, Shortened)> {
    let end = base.config.eos_tokens.first().copied();
    let (mut examples, mut shortened) = (Vec::new(), Shortened::default());
    let mut pieces = Vec::new();
    let first = records.first().ok_or_else(|| Error::bad_request("there are no examples"))?;
    let has = |name: &str| columns.text.is_none() && first.fields.contains_key(name);
    if has("messages") {
        for record in records {
            let (example, whole) = chat(base, record, columns.max_length)?;
            examples.extend(if whole { example } else { shortened.note(record, example) });
        }
    } else if has("prompt") && has("completion") {
        for record in records {
            let Some(completion) = filled(record, "completion", columns.skip_empty)? else { continue };
            let prompt = record.text("prompt")?;
            let mut tokens = base.tokenizer.encode(&prompt, true)?;
            let from = tokens.len().max(1);
            tokens.extend(base.tokenizer.encode(&completion, false)?);
            tokens.extend(end);
            let whole = tokens.len() <= columns.max_length;
            tokens.truncate(columns.max_length);
            let goal = Goal::range(from..tokens.len());
            let example = (tokens.len() > from).then_some(Example { tokens, goal });
            examples.extend(if whole { example } else { shortened.note(record, example) });
        }
    } else {
        // As the server's prompts begin.
        let prefix = base.tokenizer.prefix()?;
        let longest = columns.max_length.saturating_sub(prefix.len()).max(1);
        for text in plain(records, &text_column(records, &columns.text)?, columns.skip_empty)? {
            let mut tokens = base.tokenizer.encode(&text, false)?;
            tokens.extend(end);
            let before = examples.len();
            for (i, piece) in tokens.chunks(longest).enumerate() {
                let tokens = [&prefix, piece].concat();
                // What begins a later piece follows from what is not in it.
                let from = if i == 0 { prefix.len().max(1) } else { prefix.len() + 1 };
                if from < tokens.len() {
                    examples.push(Example { goal: Goal::range(from..tokens.len()), tokens });
                }
            }
            pieces.push(examples.len() - before);
        }
    }
    // Of a chat or a pair there is one.
    let pieces = if pieces.is_empty() { vec![1; examples.len()] } else { pieces };
    Ok((Texts { examples, pieces }, shortened))
}

/// A chat by the base's template, and whether that is all of it. An assistant's turn is what the template adds to the prompt
/// that asks for it.
fn chat(base: &Base, record: &Record, max_length: usize) -> Result<(Option<Example>, bool)> {
    let template = base.chat.as_ref();
    let template = template.ok_or_else(|| record.wrong("is a chat, and the base model has no chat template"))?;
    let parsed: Value = match record.fields.get("messages").unwrap_or(&Value::Null) {
        Value::String(text) => {
            serde_json::from_str(text).map_err(|e| record.wrong(format!("has messages that are not JSON: {e}")))?
        }
        other => other.clone(),
    };
    let messages = parsed.as_array().ok_or_else(|| record.wrong("has messages that are not a list"))?;
    let whole = template.render(messages, false).map_err(|e| record.wrong(e))?;
    let mut tokens = base.tokenizer.encode(&whole, false)?;
    let mut turns = Vec::new();
    for (i, message) in messages.iter().enumerate().filter(|(_, m)| m["role"] == "assistant") {
        let before = template.render(&messages[..i], true).map_err(|e| record.wrong(e))?;
        let after = template.render(&messages[..=i], false).map_err(|e| record.wrong(e))?;
        let (start, end) = (base.tokenizer.encode(&before, false)?, base.tokenizer.encode(&after, false)?);
        if !tokens.starts_with(&start) || !tokens.starts_with(&end) {
            let what =
                "has an assistant's turn that the chat template does not simply append; it cannot be learned from";
            return Err(record.wrong(format!("{what} ({})", message["content"])));
        }
        turns.push(start.len().max(1)..end.len());
    }
    if turns.is_empty() {
        return Err(record.wrong("has no message of the role \"assistant\" to learn from"));
    }
    let whole = tokens.len() <= max_length;
    tokens.truncate(max_length);
    turns.iter_mut().for_each(|t| t.end = t.end.min(tokens.len()));
    turns.retain(|t| t.start < t.end);
    Ok(((!turns.is_empty()).then_some(Example { tokens, goal: Goal::Tokens(turns) }), whole))
}

/// Takes a share of the examples away, at random, for evaluation.
pub fn split(examples: &mut Vec<Example>, share: f64, seed: u64) -> Vec<Example> {
    examples.shuffle(&mut random(seed, "split", 0));
    let kept = examples.len() - (examples.len() as f64 * share).round() as usize;
    examples.split_off(kept)
}

/// The same for texts that are in so many pieces each: all pieces of a text are learned from, or none, since they tell of each
/// other. Only where there are too few texts for that, pieces are taken.
pub fn split_texts(examples: &mut Vec<Example>, pieces: &[usize], share: f64, seed: u64) -> Vec<Example> {
    let count = (pieces.len() as f64 * share).round() as usize;
    if count == 0 || count == pieces.len() || pieces.iter().all(|&n| n == 1) {
        return split(examples, share, seed);
    }
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.shuffle(&mut random(seed, "split", 0));
    let mut chosen = vec![false; pieces.len()];
    order[..count].iter().for_each(|&text| chosen[text] = true);
    let held_out = pieces.iter().zip(chosen).flat_map(|(&n, chosen)| std::iter::repeat_n(chosen, n));
    let (out, kept): (Vec<_>, Vec<_>) = std::mem::take(examples).into_iter().zip(held_out).partition(|(_, out)| *out);
    examples.extend(kept.into_iter().map(|(example, _)| example));
    out.into_iter().map(|(example, _)| example).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn base() -> Base {
        Base::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama/base")).unwrap()
    }

    fn records(rows: &[Value]) -> Vec<Record> {
        let fields = |v: &Value| v.as_object().cloned().unwrap_or_else(Map::new);
        rows.iter()
            .enumerate()
            .map(|(i, v)| Record { place: format!("x.jsonl, row {}", i + 1), fields: fields(v) })
            .collect()
    }

    fn columns() -> Columns {
        Columns { max_length: 6, ..Columns::default() }
    }

    #[test]
    fn classes_are_sorted_and_long_texts_cut() {
        let rows = records(&[
            json!({ "review": "t1 t2", "label": 1 }),
            json!({ "review": "t1 t2 t3 t4 t5 t6 t7 t8", "label": 0 }),
        ]);
        let renamed = Columns { rename: [("0".into(), "bad".into()), ("1".into(), "good".into())].into(), ..columns() };
        let read = classified(&base(), &rows, &renamed, None).unwrap();
        assert_eq!((read.labels, read.cut), (vec!["bad".to_string(), "good".into()], 1));
        assert_eq!(read.examples[0].goal, Goal::Class(1));
        assert_eq!(read.examples[1].tokens.len(), 6);
        assert_eq!(read.examples[0].tokens, base().tokenizer.encode_for_head("t1 t2").unwrap());
    }

    #[test]
    fn what_is_wrong_is_told_with_its_row() {
        let good = json!({ "text": "t1", "label": "a" });
        let error = |rows: &[Value], labels: Option<&[String]>| {
            classified(&base(), &records(rows), &columns(), labels).unwrap_err().message
        };
        assert!(error(&[good.clone(), good.clone()], None).contains("all 2 rows have the class \"a\""));
        let empty = error(&[good.clone(), json!({ "text": " ", "label": "b" })], None);
        assert!(empty.contains("row 2") && empty.contains("--skip-empty"), "{empty}");
        let missing = error(&[json!({ "words": "t1", "label": "a" })], None);
        assert!(missing.contains("\"words\"") && missing.contains("--text-column"), "{missing}");
        let null = error(&[good.clone(), json!({ "text": null, "label": "b" })], None);
        assert!(null.contains("row 2") && null.contains("--skip-empty"), "{null}");
        let unseen = error(&[json!({ "text": "t1", "label": "c" })], Some(&["a".into(), "b".into()]));
        assert!(unseen.contains("row 1") && unseen.contains("\"c\""), "{unseen}");
        let none = error(&[good.clone(), json!({ "text": "t1" })], None);
        assert!(none.contains("row 2 has no \"label\""), "{none}");
        let named = Columns { text: Some("nope".into()), ..columns() };
        assert!(
            classified(&base(), &records(&[good]), &named, None).unwrap_err().message.contains("no column \"nope\"")
        );
    }

    #[test]
    fn empty_rows_are_left_out_where_asked() {
        let rows = records(&[
            json!({ "text": "t1", "label": "a" }),
            json!({ "text": null, "label": "a" }),
            json!({ "text": " ", "label": "c" }),
            json!({ "text": "t2", "label": "b" }),
        ]);
        let skipping = Columns { skip_empty: true, ..columns() };
        let read = classified(&base(), &rows, &skipping, None).unwrap();
        assert_eq!((read.examples.len(), read.labels), (2, vec!["a".to_string(), "b".into()]));
        assert_eq!(texts(&base(), &rows, &skipping).unwrap().examples.len(), 2);
        assert!(texts(&base(), &rows, &columns()).unwrap_err().message.contains("row 2"));
    }

    #[test]
    fn of_a_chat_the_assistants_turns_are_learned() {
        let template = "{% for m in messages %}{{ m.content }} {% endfor %}";
        let chat = crate::base::ChatTemplate::new(template, None, None).unwrap();
        let base = Base { chat: Some(std::sync::Arc::new(chat)), ..base() };
        let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
        let row = json!({ "messages": [turn("user", "t1 t2"), turn("assistant", "t3"), turn("user", "t4")] });
        let read = |rows: &[Value]| texts(&base, &records(rows), &columns()).map(|texts| texts.examples);
        let example = &read(std::slice::from_ref(&row)).unwrap()[0];
        let before = base.tokenizer.encode("t1 t2 ", false).unwrap().len();
        let after = base.tokenizer.encode("t1 t2 t3 ", false).unwrap().len();
        assert_eq!(example.goal, Goal::range(before..after));
        for (second, part) in [
            (json!({ "text": "t1" }), "not a list"),
            (json!({ "messages": "[" }), "not JSON"),
            (json!({ "messages": [turn("user", "t1")] }), "no message of the role \"assistant\""),
        ] {
            let error = read(&[row.clone(), second]).unwrap_err();
            assert!(error.message.contains("row 2") && error.message.contains(part), "{error}");
        }
    }

    #[test]
    fn texts_are_cut_in_pieces_and_completions_alone_are_learned() {
        let whole = texts(&base(), &records(&[json!({ "text": "t1 t2 t3 t4 t5 t6 t7" })]), &columns()).unwrap();
        let whole = whole.examples;
        assert_eq!(whole[0].tokens.len(), 6);
        assert_eq!(whole[0].goal, Goal::range(1..6));
        let rows = records(&[json!({ "prompt": "t1 t2", "completion": " t3" })]);
        let pair = texts(&base(), &rows, &columns()).unwrap().examples;
        let prompt = base().tokenizer.encode("t1 t2", true).unwrap().len();
        assert_eq!(pair[0].goal, Goal::range(prompt..pair[0].tokens.len()));
    }

    #[test]
    fn what_is_cut_off_or_left_out_is_told_with_its_place() {
        let row = |prompt: &str, completion: &str| json!({ "prompt": prompt, "completion": completion });
        let long = "t1 t2 t3 t4 t5 t6 t7";
        let rows = records(&[row("t1", " t2"), row("t1", long), row(long, " t2"), row(long, " t3")]);
        let (Texts { examples, pieces }, shortened) = continued(&base(), &rows, &columns()).unwrap();
        assert_eq!(pieces, [1, 1]);
        assert_eq!((examples.len(), examples[1].tokens.len()), (2, 6));
        let place = |row: usize| format!("x.jsonl, row {row}");
        assert_eq!(shortened, Shortened { cut: vec![place(2)], left_out: vec![place(3), place(4)] });
        let told = shortened.told(6);
        assert!(told[0].starts_with("2 examples are left out") && told[0].contains("x.jsonl, row 3"), "{told:?}");
        assert!(told[1].starts_with("1 examples are cut off") && told[1].contains("x.jsonl, row 2"), "{told:?}");
        assert!(texts(&base(), &rows[2..], &columns()).unwrap_err().message.contains("--max-length"));
        // An empty completion is one that --skip-empty is for.
        let rows = records(&[row("t1", " t2"), row("t1", "")]);
        let error = continued(&base(), &rows, &columns()).unwrap_err().message;
        assert!(error.contains("row 2") && error.contains("--skip-empty"), "{error}");
        let skipping = Columns { skip_empty: true, ..columns() };
        assert_eq!(continued(&base(), &rows, &skipping).unwrap().0.examples.len(), 1);
    }

    #[test]
    fn each_piece_of_a_text_begins_as_a_prompt_does() {
        let settings = json!({ "tokenizer_class": "LlamaTokenizerFast", "bos_token": "t1" });
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama/base/tokenizer.json");
        let tokenizer = crate::base::Tokenizer::from_file(path.as_ref()).unwrap().with_settings(&settings).unwrap();
        let base = Base { tokenizer: std::sync::Arc::new(tokenizer), ..base() };
        let read = texts(&base, &records(&[json!({ "text": "t11 t12 t13 t14 t15 t16 t17" })]), &columns()).unwrap();
        let end = base.config.eos_tokens[0];
        let Texts { examples: read, pieces } = read;
        assert_eq!(pieces, [2]);
        let example =
            |tokens: &[u32], from: usize| Example { tokens: tokens.into(), goal: Goal::range(from..tokens.len()) };
        assert_eq!(read, [example(&[1, 11, 12, 13, 14, 15], 1), example(&[1, 16, 17, end], 2)]);
    }

    #[test]
    fn a_split_takes_its_share_and_repeats() {
        let all: Vec<Example> = (0..10).map(|i| Example { tokens: vec![i], goal: Goal::Class(0) }).collect();
        let (mut a, mut b) = (all.clone(), all.clone());
        let (x, y) = (split(&mut a, 0.3, 7), split(&mut b, 0.3, 7));
        assert_eq!((&a, &x), (&b, &y));
        assert_eq!((a.len(), x.len()), (7, 3));
        let mut together: Vec<u32> = a.iter().chain(&x).map(|e| e.tokens[0]).collect();
        together.sort();
        assert_eq!(together, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn of_a_text_all_pieces_are_held_out_or_none() {
        let pieces = [3, 1, 4, 2, 3, 1, 2, 4, 1, 2];
        // The text that a piece is of, and which one it is.
        let all = pieces.iter().enumerate().flat_map(|(text, &n)| (0..n as u32).map(move |i| vec![text as u32, i]));
        let all: Vec<Example> = all.map(|tokens| Example { tokens, goal: Goal::Class(0) }).collect();
        for seed in 0..20 {
            let mut kept = all.clone();
            let out = split_texts(&mut kept, &pieces, 0.3, seed);
            let texts = |of: &[Example]| of.iter().map(|e| e.tokens[0]).collect::<std::collections::BTreeSet<_>>();
            assert_eq!((texts(&kept).len(), texts(&out).len(), kept.len() + out.len()), (7, 3, all.len()));
            assert!(texts(&kept).is_disjoint(&texts(&out)));
        }
        // Of two texts nothing could be held out otherwise.
        let mut two = all[..4].to_vec();
        assert_eq!(split_texts(&mut two, &pieces[..2], 0.2, 0).len(), 1);
        // Texts of one piece each are split as other examples are.
        let (mut a, mut b) = (all.clone(), all.clone());
        assert_eq!(split_texts(&mut a, &vec![1; all.len()], 0.3, 5), split(&mut b, 0.3, 5));
        assert_eq!(a, b);
    }
}
