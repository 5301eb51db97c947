//! The names of a classification head's classes, and their probabilities.

use std::collections::HashSet;

use serde_json::Value;

use crate::error::shorten;
use crate::{Error, Result};

/// Longest name, in bytes.
const MAX_LENGTH: usize = 1000;

pub(crate) const LABELS_JSON: &str = "labels.json";
pub(crate) const LABELS_TEXT: &str = "labels.txt";

/// The probabilities of classes by their logits.
pub(crate) fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Reads `labels.json`: a list of names, an object `{"0": "name", …}`, or a model's `config.json` with such an
/// object as `id2label`.
pub(crate) fn from_json_file(bytes: &[u8]) -> Result<Vec<String>> {
    let value: Value = serde_json::from_slice(without_bom(bytes))
        .map_err(|e| Error::unprocessable(format!("{LABELS_JSON} is not JSON: {e}")))?;
    let value = value.get("id2label").unwrap_or(&value);
    from_json(value).map_err(|e| e.context(LABELS_JSON))
}

/// Reads `labels.txt`: one name a line; empty lines at the end do not count.
pub(crate) fn from_text_file(bytes: &[u8]) -> Result<Vec<String>> {
    let text = std::str::from_utf8(without_bom(bytes))
        .map_err(|e| Error::unprocessable(format!("{LABELS_TEXT} is not UTF-8 at byte {}", e.valid_up_to())))?;
    let names = text.trim_end().lines().map(|line| line.trim().to_string()).collect();
    checked(names).map_err(|e| e.context(LABELS_TEXT))
}

/// Without the byte order mark that some editors put in front.
fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes)
}

/// A list of names, or an object whose keys are the class numbers, as in Hugging Face's `id2label`.
pub(crate) fn from_json(value: &Value) -> Result<Vec<String>> {
    let name = |class: usize, value: &Value| match value {
        Value::String(name) => Ok(name.clone()),
        other => {
            let shown = shorten(&other.to_string(), 100);
            Err(Error::unprocessable(format!("the name of class {class} is {shown}, not a string")))
        }
    };
    let names = match value {
        Value::Array(items) => items.iter().enumerate().map(|(i, v)| name(i, v)).collect::<Result<_>>()?,
        Value::Object(map) => (0..map.len())
            .map(|class| match map.get(&class.to_string()) {
                Some(value) => name(class, value),
                None => Err(Error::unprocessable(format!(
                    "there are {} names but none for class \"{class}\"; expected the keys \"0\" to \"{}\"",
                    map.len(),
                    map.len() - 1
                ))),
            })
            .collect::<Result<_>>()?,
        _ => return Err(Error::unprocessable("expected a list of names or an object {\"0\": \"name\", …}")),
    };
    checked(names)
}

/// PEFT's own default where nothing names the classes.
pub(crate) fn default_names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

/// Names key the probabilities in a response, so two classes cannot share one.
fn checked(names: Vec<String>) -> Result<Vec<String>> {
    let mut seen = HashSet::new();
    for (class, name) in names.iter().enumerate() {
        if name.is_empty() {
            return Err(Error::unprocessable(format!("the name of class {class} is empty")));
        }
        if name.len() > MAX_LENGTH {
            return Err(Error::unprocessable(format!(
                "the name of class {class} has {} bytes; at most {MAX_LENGTH}",
                name.len()
            )));
        }
        if !seen.insert(name.as_str()) {
            return Err(Error::unprocessable(format!("two classes are called {name:?}")));
        }
    }
    if names.is_empty() {
        return Err(Error::unprocessable("no names in it"));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accepted_forms_agree() {
        let names = vec!["bad".to_string(), "good".to_string()];
        assert_eq!(from_json_file(br#"["bad", "good"]"#).unwrap(), names);
        assert_eq!(from_json_file(br#"{"1": "good", "0": "bad"}"#).unwrap(), names);
        assert_eq!(
            from_json_file(br#"{"model_type": "llama", "id2label": {"0": "bad", "1": "good"}}"#).unwrap(),
            names
        );
        assert_eq!(from_text_file(b"bad\r\ngood\n\n").unwrap(), names);
        assert_eq!(from_text_file("\u{feff}bad\ngood".as_bytes()).unwrap(), names);
        assert_eq!(from_json_file("\u{feff}[\"bad\", \"good\"]".as_bytes()).unwrap(), names);
        assert_eq!(default_names(2), ["LABEL_0", "LABEL_1"]);
    }

    #[test]
    fn malformed_names_are_refused_with_the_class() {
        for (json, expected) in [
            (r#"{"0": "a", "2": "b"}"#, "class \"1\""),
            (r#"["a", 3]"#, "class 1 is 3"),
            (r#"["a", ""]"#, "class 1 is empty"),
            (r#"["a", "a"]"#, "\"a\""),
            (&format!(r#"["a", "{}"]"#, "x".repeat(1001)), "1001 bytes"),
            ("[]", "no names"),
            ("{}", "no names"),
            ("7", "expected a list"),
            ("[", "not JSON"),
        ] {
            let message = from_json_file(json.as_bytes()).unwrap_err().message;
            assert!(message.contains(expected) && message.contains(LABELS_JSON), "{json}: {message}");
        }
        assert!(from_text_file(b"a\n\nb").unwrap_err().message.contains("class 1 is empty"));
        assert!(from_text_file(b"a\n\xff").unwrap_err().message.contains("byte 2"));
    }
}
