//! Chat messages to a prompt, by the model's own Jinja template.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value as JinjaValue, context};
use serde_json::Value;

use crate::{Error, Result};

/// Instructions a template may take: a few a message and character are needed, a loop without end is stopped.
const FUEL: u64 = 5_000_000;

pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// `template` in the dialect of Hugging Face's `chat_template`; `bos`/`eos` as texts.
    pub fn new(template: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(Error::internal)?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", template.to_string())
            .map_err(|e| Error::unprocessable(format!("the chat template does not compile: {e:#}")))?;
        let text = |t: Option<&str>| t.unwrap_or_default().to_string();
        Ok(ChatTemplate { environment, bos: text(bos), eos: text(eos) })
    }

    /// `messages` is a list of objects with `role` and `content`, a text or OpenAI's list of text parts. Errors are
    /// `BadRequest` and carry what the template raised.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let messages = messages.iter().enumerate().map(|(i, m)| plain(i, m)).collect::<Result<Vec<JinjaValue>>>()?;
        let template = self.environment.get_template("chat").map_err(Error::internal)?;
        let rendered = template.render(context! {
            messages,
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        });
        rendered
            .map_err(|e| Error::bad_request(format!("the chat template refuses the messages: {e:#}")).param("messages"))
    }
}

/// The message as the template sees it, its text parts joined.
fn plain(i: usize, message: &Value) -> Result<JinjaValue> {
    let wrong = |what: String| Error::bad_request(format!("messages[{i}]{what}")).param("messages");
    let Some(fields) = message.as_object() else { return Err(wrong(" is not an object with role and content".into())) };
    if !fields.get("role").is_some_and(Value::is_string) {
        return Err(wrong(".role is missing or no text".into()));
    }
    let mut fields = fields.clone();
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in parts {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(t)) => text.push_str(t),
                    (kind, _) => return Err(wrong(format!(".content holds a part of type {kind:?}; supported: text"))),
                }
            }
            text
        }
        None | Some(Value::Null) => String::new(),
        Some(other) => return Err(wrong(format!(".content is {other}; expected a text or a list of text parts"))),
    };
    fields.insert("content".into(), content.into());
    Ok(jinja(&Value::Object(fields)))
}

fn jinja(value: &Value) -> JinjaValue {
    match value {
        Value::Null => JinjaValue::from(()),
        Value::Bool(b) => JinjaValue::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => JinjaValue::from(i),
            (None, x) => JinjaValue::from(x.unwrap_or(f64::NAN)),
        },
        Value::String(s) => JinjaValue::from(s.as_str()),
        Value::Array(list) => list.iter().map(jinja).collect(),
        Value::Object(fields) => JinjaValue::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), jinja(v)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn renders_as_transformers_does() {
        let template = "{%- for m in messages %}\n    {% if m.content.startswith('x') %}\n[{{ m['role'] }}] \
            {{ m['content'].strip() | upper }}\n    {% else %}\n{{ raise_exception('no x') }}\n    {% endif %}\n\
            {%- endfor %}{{ bos_token }}{% if add_generation_prompt %}>{% endif %}";
        let chat = ChatTemplate::new(template, Some("<s>"), None).unwrap();
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "x "}, {"type": "text", "text": "y"}]});
        assert_eq!(chat.render(&[parts], true).unwrap(), "[user] X Y\n<s>>");
        let error = chat.render(&[json!({"role": "user", "content": "a"})], true).unwrap_err();
        assert!(error.message.contains("no x"), "{error}");
        for bad in [
            json!("x"),
            json!({"content": "x"}),
            json!({"role": "user", "content": 3}),
            json!({"role": "user", "content": [{"type": "image_url"}]}),
        ] {
            assert!(chat.render(&[bad], true).unwrap_err().message.starts_with("messages[0]"));
        }
        assert!(ChatTemplate::new("{% for %}", None, None).is_err());
    }

    #[test]
    fn a_template_without_end_is_stopped() {
        let template = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        let chat = ChatTemplate::new(template, None, None).unwrap();
        assert!(chat.render(&[], true).is_err());
    }
}
