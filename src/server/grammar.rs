//! The fields by which a request says what its answer must be like: OpenAI's `response_format`, vLLM's `guided_*` and
//! `structured_outputs`, TGI's `grammar`. All dialects take all of them.

use serde_json::{Value, json};

use super::State;
use super::fields::Fields;
use super::run::Target;
use crate::engine::{Constraint, Grammar};
use crate::{Error, Result};

/// A constraint and the field that it stands in.
type Found = Option<(String, Constraint)>;

impl State {
    /// What the answer must be like, compiled for the vocabulary of `target`; `None` where no field says so.
    ///
    /// Errors: `BadRequest` that names the field.
    pub async fn grammar(&self, target: &Target, f: &Fields) -> Result<Option<Grammar>> {
        let Some((field, constraint)) = read(f)? else { return Ok(None) };
        let language = &target.language;
        let grammar = self.grammars.compile(constraint, &language.tokenizer, &language.eos_tokens).await;
        grammar.map(Some).map_err(|e| e.context(&field).param(field))
    }
}

/// Errors: `BadRequest` for a field that is not understood, and for more than one.
fn read(f: &Fields) -> Result<Found> {
    let structured = f.object("structured_outputs")?;
    let refused = ["structural_tag", "whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"];
    structured.refuse(&refused, &[])?;
    f.refuse(&["guided_whitespace_pattern"], &[])?;
    let any_object = structured.flag("json_object")?.unwrap_or(false).then(json_object);
    let all = [
        response_format(&f.object("response_format")?)?,
        constraint(f, "guided_json", "json")?,
        constraint(f, "guided_regex", "regex")?,
        constraint(f, "guided_choice", "choice")?,
        constraint(f, "guided_grammar", "grammar")?,
        constraint(&structured, "json", "json")?,
        constraint(&structured, "regex", "regex")?,
        constraint(&structured, "choice", "choice")?,
        constraint(&structured, "grammar", "grammar")?,
        any_object.map(|constraint| (structured.path("json_object"), constraint)),
        grammar(&f.object("grammar")?)?,
    ];
    let mut found = all.into_iter().flatten();
    match (found.next(), found.next()) {
        (Some((first, _)), Some((second, _))) => {
            Err(Error::bad_request(format!("{second} and {first} exclude each other")).param(second))
        }
        (one, _) => Ok(one),
    }
}

fn json_object() -> Constraint {
    Constraint::Json(json!({ "type": "object" }))
}

/// OpenAI's, with LoRAX's schema beside `json_object`, and a type for each other constraint.
fn response_format(f: &Fields) -> Result<Found> {
    if f.is_empty() {
        return Ok(None);
    }
    let kind = f.text("type")?.ok_or_else(|| f.wrong("type", "is needed"))?;
    match kind.as_str() {
        "text" => Ok(None),
        // TGI's form; its client makes it of a `json_schema` too.
        "json" | "json_object" | "json_schema" | "regex" if f.get("value").is_some() => grammar(f),
        "json_object" => Ok(constraint(f, "schema", "json")?.or_else(|| Some((f.path("type"), json_object())))),
        "json_schema" => schema_in(&f.object("json_schema")?),
        "regex" | "choice" | "grammar" => {
            constraint(f, &kind, &kind)?.ok_or_else(|| f.wrong(&kind, "is needed")).map(Some)
        }
        _ => {
            let known = "text, json_object, json_schema, regex, choice and grammar";
            Err(f.wrong("type", format!("is {kind:?}; supported: {known}")))
        }
    }
}

/// TGI's: a type and a value.
fn grammar(f: &Fields) -> Result<Found> {
    if f.is_empty() {
        return Ok(None);
    }
    let needed = || f.wrong("value", "is needed");
    let kind = f.text("type")?.ok_or_else(|| f.wrong("type", "is needed"))?;
    match kind.as_str() {
        "json" | "json_object" => constraint(f, "value", "json")?.ok_or_else(needed).map(Some),
        "regex" => constraint(f, "value", "regex")?.ok_or_else(needed).map(Some),
        "json_schema" => schema_in(&f.object("value")?),
        _ => Err(f.wrong("type", format!("is {kind:?}; supported: json, json_schema and regex"))),
    }
}

/// A schema beside its name.
fn schema_in(f: &Fields) -> Result<Found> {
    // The schema is kept to in any case.
    f.flag("strict")?;
    constraint(f, "schema", "json")?.ok_or_else(|| f.wrong("schema", "is needed")).map(Some)
}

/// The constraint of a kind under `name`.
fn constraint(f: &Fields, name: &str, kind: &str) -> Result<Found> {
    let Some(value) = f.get(name) else { return Ok(None) };
    let constraint = match kind {
        "json" => {
            let schema = match value {
                Value::String(text) => {
                    serde_json::from_str(text).map_err(|e| f.wrong(name, format!("is a text that is not JSON: {e}")))?
                }
                schema => schema.clone(),
            };
            match schema {
                Value::Object(_) | Value::Bool(_) => Constraint::Json(schema),
                _ => return Err(f.wrong(name, "is no JSON schema; expected an object")),
            }
        }
        "choice" => {
            let list = f.list(name)?.unwrap_or_default().iter();
            let texts: Option<Vec<String>> = list.map(|text| text.as_str().map(str::to_string)).collect();
            Constraint::Choice(texts.ok_or_else(|| f.wrong(name, "is no list of texts"))?)
        }
        "regex" => Constraint::Regex(f.text(name)?.unwrap_or_default()),
        _ => Constraint::Lark(f.text(name)?.unwrap_or_default()),
    };
    Ok(Some((f.path(name), constraint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(body: Value) -> Result<Found> {
        read(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn every_spelling_of_a_constraint() {
        let schema = json!({ "type": "object", "properties": { "a": { "type": "integer" } } });
        let text = schema.to_string();
        let is_schema = |constraint: &Constraint| *constraint == Constraint::Json(schema.clone());
        for (body, field) in [
            (json!({ "response_format": { "type": "json_object", "schema": schema } }), "response_format.schema"),
            (
                json!({ "response_format": { "type": "json_schema", "json_schema":
                    { "name": "a", "schema": schema, "strict": true } } }),
                "response_format.json_schema.schema",
            ),
            (json!({ "guided_json": schema }), "guided_json"),
            (json!({ "guided_json": text }), "guided_json"),
            (json!({ "structured_outputs": { "json": text, "json_object": false } }), "structured_outputs.json"),
            (json!({ "grammar": { "type": "json", "value": schema } }), "grammar.value"),
            (json!({ "grammar": { "type": "json_object", "value": schema } }), "grammar.value"),
            (json!({ "grammar": { "type": "json_schema", "value": { "schema": schema } } }), "grammar.value.schema"),
            (json!({ "response_format": { "type": "json_object", "value": schema } }), "response_format.value"),
            (json!({ "response_format": { "type": "json", "value": text } }), "response_format.value"),
            (
                json!({ "response_format": { "type": "json_schema", "value": { "schema": schema } } }),
                "response_format.value.schema",
            ),
        ] {
            let (at, constraint) = found(body.clone()).unwrap().unwrap();
            assert!(is_schema(&constraint) && at == field, "{body}: {constraint:?} at {at}");
        }
        for body in [
            json!({ "response_format": { "type": "json_object" } }),
            json!({ "structured_outputs": { "json_object": true } }),
        ] {
            assert_eq!(found(body).unwrap().unwrap().1, json_object());
        }
        let others = [
            ("regex", json!("a+"), Constraint::Regex("a+".into())),
            ("choice", json!(["a", "b"]), Constraint::Choice(vec!["a".into(), "b".into()])),
            ("grammar", json!("start: \"a\""), Constraint::Lark("start: \"a\"".into())),
        ];
        for (kind, value, constraint) in others {
            let mut format = json!({ "type": kind });
            format[kind] = value.clone();
            let mut structured = json!({});
            structured[kind] = value.clone();
            let mut guided = json!({});
            guided[format!("guided_{kind}")] = value;
            for body in [json!({ "response_format": format }), json!({ "structured_outputs": structured }), guided] {
                assert_eq!(found(body.clone()).unwrap().unwrap().1, constraint, "{body}");
            }
        }
        for field in ["grammar", "response_format"] {
            let body = json!({ field: { "type": "regex", "value": "a+" } });
            assert_eq!(found(body).unwrap().unwrap().1, Constraint::Regex("a+".into()));
        }
        for body in [
            json!({}),
            json!({ "response_format": null, "guided_json": null, "structured_outputs": null, "grammar": null }),
            json!({ "response_format": { "type": "text" }, "structured_outputs": { "json": null } }),
        ] {
            assert_eq!(found(body).unwrap(), None);
        }
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (body, field, words) in [
            (json!({ "response_format": "json" }), "response_format", "an object"),
            (json!({ "response_format": { "schema": {} } }), "response_format.type", "needed"),
            (json!({ "response_format": { "type": "yaml" } }), "response_format.type", "yaml"),
            (json!({ "response_format": { "type": "structural_tag" } }), "response_format.type", "supported"),
            (json!({ "response_format": { "type": "json_schema" } }), "response_format.json_schema.schema", "needed"),
            (json!({ "response_format": { "type": "regex" } }), "response_format.regex", "needed"),
            (json!({ "guided_json": [1] }), "guided_json", "schema"),
            (json!({ "guided_json": "{" }), "guided_json", "not JSON"),
            (json!({ "guided_regex": 3 }), "guided_regex", "a text"),
            (json!({ "guided_choice": "a" }), "guided_choice", "a list"),
            (json!({ "guided_choice": ["a", 1] }), "guided_choice", "texts"),
            (json!({ "structured_outputs": { "structural_tag": "x" } }), "structured_outputs.structural_tag", "not"),
            (json!({ "guided_whitespace_pattern": " ?" }), "guided_whitespace_pattern", "not supported"),
            (json!({ "grammar": { "type": "lark", "value": "x" } }), "grammar.type", "lark"),
            (json!({ "grammar": "root ::= x" }), "grammar", "an object"),
            (json!({ "guided_json": {}, "guided_regex": "a" }), "guided_regex", "guided_json"),
            (
                json!({ "response_format": { "type": "json_object" }, "structured_outputs": { "choice": ["a"] } }),
                "structured_outputs.choice",
                "response_format.type",
            ),
        ] {
            let e = found(body.clone()).unwrap_err();
            assert_eq!((e.kind, e.param.as_deref()), (crate::ErrorKind::BadRequest, Some(field)), "{body}: {e}");
            assert!(e.message.contains(words) && e.message.starts_with(field), "{body}: {e}");
        }
    }
}
