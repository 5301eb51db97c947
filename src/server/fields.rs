//! A request's JSON object, read field by field with errors that name the field.

use actix_web::web;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::{beside, body};
use crate::{Error, Result};

/// Bodies of more bytes are parsed beside the workers.
const LONG_BODY: usize = 64 << 10;

/// Fields of an object. `null` is the same as absent.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    map: Map<String, Value>,
    /// Path in front of the names, e.g. `parameters.`.
    prefix: String,
    /// Length of the body.
    pub bytes: usize,
}

impl Fields {
    /// The body's object.
    pub async fn read(payload: web::Payload) -> Result<Self, ApiError> {
        let body = body::read(payload).await?;
        Ok(beside(body.len() > LONG_BODY, move || Self::parse(&body)).await?)
    }

    pub fn parse(body: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(body)
            .map_err(|e| Error::bad_request(format!("the body is not UTF-8: byte {} is wrong", e.valid_up_to())))?;
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Fields { map, prefix: String::new(), bytes: body.len() }),
            Ok(other) => Err(Error::bad_request(format!("the body is {}; expected an object", kind(&other)))),
            Err(e) => Err(Error::bad_request(format!("the body is not JSON: {e}"))),
        }
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub fn into_map(self) -> Map<String, Value> {
        self.map
    }

    /// A field's name from the body's root on.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// An error about a field.
    pub fn wrong(&self, name: &str, what: impl std::fmt::Display) -> Error {
        let path = self.path(name);
        Error::bad_request(format!("{path} {what}")).param(path)
    }

    fn expected(&self, name: &str, value: &Value, what: &str) -> Error {
        let mut found = value.to_string();
        if found.len() > 60 {
            found = kind(value).to_string();
        }
        self.wrong(name, format!("is {found}; expected {what}"))
    }

    pub fn text(&self, name: &str) -> Result<Option<String>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(other) => Err(self.expected(name, other, "a text")),
        }
    }

    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.expected(name, other, "true or false")),
        }
    }

    pub fn real(&self, name: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        number.map(Some).ok_or_else(|| self.expected(name, value, "a number"))
    }

    /// A whole number of 0 or more.
    pub fn count(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().filter(|&n| n <= u32::MAX as u64).map(|n| n as usize);
        number.map(Some).ok_or_else(|| self.expected(name, value, "a whole number of 0 or more"))
    }

    /// A whole number of 64 bits; negative ones count down from the largest.
    pub fn seed(&self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().or(value.as_i64().map(|i| i as u64));
        number.map(Some).ok_or_else(|| self.expected(name, value, "a whole number of 64 bits"))
    }

    /// A text or a list of texts.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<String>>> {
        let list = match self.get(name) {
            None => return Ok(None),
            Some(Value::String(s)) => return Ok(Some(vec![s.clone()])),
            Some(Value::Array(list)) => list.iter().map(|v| v.as_str().map(str::to_string)).collect(),
            Some(_) => None,
        };
        let wrong = || self.expected(name, &self.map[name], "a text or a list of texts");
        list.map(Some).ok_or_else(wrong)
    }

    pub fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong = || self.expected(name, value, "a list of token ids");
        token_ids(value).map(Some).ok_or_else(wrong)
    }

    /// The object under `name`; empty where it is absent.
    pub fn object(&self, name: &str) -> Result<Fields> {
        let prefix = format!("{}{name}.", self.prefix);
        match self.get(name) {
            None => Ok(Fields { map: Map::new(), prefix, bytes: 0 }),
            Some(Value::Object(map)) => Ok(Fields { map: map.clone(), prefix, bytes: self.bytes }),
            Some(other) => Err(self.expected(name, other, "an object")),
        }
    }

    pub fn list(&self, name: &str) -> Result<Option<&[Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.expected(name, other, "a list")),
        }
    }

    /// Refuses fields that would change the answer and are not supported. `false`, 0, empty lists and the values in
    /// `harmless` change nothing.
    pub fn refuse(&self, names: &[&str], harmless: &[Value]) -> Result<()> {
        for name in names {
            let Some(value) = self.get(name) else { continue };
            let nothing = match value {
                Value::Bool(b) => !b,
                Value::Number(n) => n.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(s) => s.is_empty(),
                Value::Null => true,
            };
            if !nothing && !harmless.contains(value) {
                return Err(self.wrong(name, "is not supported"));
            }
        }
        Ok(())
    }
}

/// A list of token ids.
pub fn token_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|v| u32::try_from(v.as_u64()?).ok()).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field() {
        let f =
            Fields::parse(br#"{"a": -1, "b": "x", "c": [1], "d": null, "e": 1e300, "s": -2, "o": {"p": 3}}"#).unwrap();
        for error in
            [f.count("a").unwrap_err(), f.text("a").unwrap_err(), f.flag("a").unwrap_err(), f.texts("a").unwrap_err()]
        {
            assert!(error.message.starts_with("a is -1; expected"), "{error}");
            assert_eq!(error.param.as_deref(), Some("a"));
        }
        assert!(f.real("e").is_err() && f.real("b").is_err() && f.texts("c").is_err());
        assert_eq!((f.text("d").unwrap(), f.text("zz").unwrap()), (None, None));
        assert_eq!(f.seed("s").unwrap(), Some(u64::MAX - 1));
        assert_eq!(f.tokens("c").unwrap(), Some(vec![1]));
        assert_eq!(f.object("o").unwrap().text("p").unwrap_err().param.as_deref(), Some("o.p"));
        assert!(f.refuse(&["b"], &[]).unwrap_err().message.contains("b is not supported"));
        assert!(f.refuse(&["d", "zz"], &[]).is_ok() && f.refuse(&["b"], &["x".into()]).is_ok());
    }

    #[test]
    fn bodies_that_are_no_objects() {
        let deep = "[".repeat(10_000) + &"]".repeat(10_000);
        for body in [deep.as_bytes(), b"", b"3", b"[]", b"{", b"\xff"] {
            assert!(Fields::parse(body).is_err());
        }
    }
}
