//! Chat messages to a prompt, by the model's own Jinja template.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value as JinjaValue, context};
use serde_json::{Map, Value};

use super::jinja;
use crate::{Error, Result};

/// Instructions a template may take: a few a message and character are needed, a loop without end is stopped.
const FUEL: u64 = 5_000_000;
/// Bytes a rendered prompt may have: more than any context holds.
const LONGEST: usize = 64 << 20;

pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Texts of the tokens; `None` where nobody said.
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// `template` in the dialect of Hugging Face's `chat_template`; `bos`/`eos` as texts.
    pub fn new(template: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(Error::internal)?);
        environment.set_fuel(Some(FUEL));
        jinja::extend(&mut environment);
        environment
            .add_template_owned("chat", jinja::without_generation_blocks(template))
            .map_err(|e| Error::unprocessable(format!("the chat template does not compile: {e:#}")))?;
        let text = |t: Option<&str>| t.map(str::to_string);
        Ok(ChatTemplate { environment, bos: text(bos), eos: text(eos) })
    }

    /// With another's texts of the tokens where it has none.
    pub(super) fn with_tokens_of(mut self, other: Option<&ChatTemplate>) -> Self {
        self.bos = self.bos.or(other.and_then(|other| other.bos.clone()));
        self.eos = self.eos.or(other.and_then(|other| other.eos.clone()));
        self
    }

    pub(super) fn is_same(&self, other: &ChatTemplate) -> bool {
        let source = |chat: &ChatTemplate| chat.source().ok();
        source(self) == source(other) && self.bos == other.bos && self.eos == other.eos
    }

    /// The template's own text.
    pub fn source(&self) -> Result<String> {
        Ok(self.environment.get_template("chat").map_err(Error::internal)?.source().to_string())
    }

    /// `messages` is a list of objects with `role` and `content`, a text or OpenAI's list of text parts. Errors are
    /// `BadRequest` and carry what the template raised.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, add_generation_prompt, Map::new())
    }

    /// The same with variables that the template alone knows, as Qwen3's `enable_thinking`. They take the place of none that
    /// every template has.
    pub fn render_with(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        variables: Map<String, Value>,
    ) -> Result<String> {
        let messages = messages.iter().enumerate().map(|(i, m)| plain(i, m)).collect::<Result<Vec<JinjaValue>>>()?;
        let template = self.environment.get_template("chat").map_err(Error::internal)?;
        // transformers passes what is absent as none, and templates ask `is not none`.
        let mut out = Bounded { text: Vec::new(), full: false };
        let rendered = template.render_captured_to(
            context! {
                messages,
                add_generation_prompt,
                bos_token => self.bos.as_deref().unwrap_or_default(),
                eos_token => self.eos.as_deref().unwrap_or_default(),
                tools => JinjaValue::from(()),
                documents => JinjaValue::from(()),
                ..jinja::value(&Value::Object(variables))
            },
            &mut out,
        );
        match rendered {
            Ok(_) => String::from_utf8(out.text).map_err(Error::internal),
            Err(_) if out.full => {
                let what = format!("the messages make a prompt of more than {LONGEST} bytes");
                Err(Error::bad_request(what).param("messages"))
            }
            Err(e) => {
                let what = format!("the chat template refuses the messages: {e:#}");
                Err(Error::bad_request(what).param("messages"))
            }
        }
    }
}

/// Text up to [`LONGEST`] bytes.
struct Bounded {
    text: Vec<u8>,
    /// Whether more was written than fits.
    full: bool,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.text.len() + bytes.len() > LONGEST {
            self.full = true;
            return Err(std::io::Error::other("full"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The message as the template sees it, its text parts on lines of their own, as vLLM has them.
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
            let mut texts = vec![];
            for part in parts {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => texts.push(text),
                    (kind, _) => return Err(wrong(format!(".content holds a part of type {kind:?}; supported: text"))),
                }
            }
            texts.join("\n")
        }
        None | Some(Value::Null) => String::new(),
        Some(other) => return Err(wrong(format!(".content is {other}; expected a text or a list of text parts"))),
    };
    fields.insert("content".into(), content.into());
    Ok(jinja::value(&Value::Object(fields)))
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
        assert_eq!(chat.render(&[parts], true).unwrap(), "[user] X \nY\n<s>>");
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
        let error = chat.render(&[], true).unwrap_err();
        assert!(error.message.contains("fuel"), "{error}");
    }

    #[test]
    fn a_prompt_without_end_is_stopped() {
        let template = "{% for a in range(1000) %}{{ messages[0].content }}{% endfor %}";
        let chat = ChatTemplate::new(template, None, None).unwrap();
        let message = json!({ "role": "user", "content": "x".repeat(1 << 20) });
        let error = chat.render(&[message], true).unwrap_err();
        assert!(error.message.contains("more than 67108864 bytes"), "{error}");
    }

    #[test]
    fn tools_and_documents_are_none() {
        let template = "{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}\
            {{ messages[0] | tojson }}{% for m in messages %}{% continue %}{% endfor %}";
        let chat = ChatTemplate::new(template, None, None).unwrap();
        let message = json!({ "role": "user", "content": "<a>" });
        assert_eq!(chat.render(&[message], true).unwrap(), r#"{"role": "user", "content": "<a>"}"#);
    }

    #[test]
    fn a_template_may_have_variables_of_its_own() {
        let template = "{{ bos_token }}{{ messages[0].content }}{% if style %}{{ style.name }}{% endif %}\
            {% if enable_thinking is defined and enable_thinking is false %} briefly{% endif %}";
        let chat = ChatTemplate::new(template, Some("<s>"), None).unwrap();
        let messages = [json!({ "role": "user", "content": "a" })];
        assert_eq!(chat.render(&messages, true).unwrap(), "<s>a");
        let variables = json!({ "enable_thinking": false, "messages": [], "bos_token": "b", "style": { "name": "!" } });
        let Value::Object(variables) = variables else { unreachable!() };
        assert_eq!(chat.render_with(&messages, true, variables).unwrap(), "<s>a! briefly");
    }

    #[test]
    fn the_default_models_chat_is_as_transformers_renders_it() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2/expected.json");
        let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let base = crate::base::Base::open(&crate::base::packaged().unwrap().to_string_lossy()).unwrap();
        let (chat, case) = (base.chat.unwrap(), &expected["chat"]);
        let text = chat.render(case["messages"].as_array().unwrap(), true).unwrap();
        assert_eq!(text, case["rendered"].as_str().unwrap());
        let ids: Vec<u64> = base.tokenizer.encode(&text, false).unwrap().into_iter().map(u64::from).collect();
        assert_eq!(json!(ids), case["ids"]);
    }
}
