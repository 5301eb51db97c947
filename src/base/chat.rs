//! Chat messages to a prompt, by the model's own Jinja template.

use serde_json::Value;

use crate::Result;

pub struct ChatTemplate {}

impl ChatTemplate {
    /// `template` in the dialect of Hugging Face's `chat_template`; `bos`/`eos` as texts.
    pub fn new(_template: &str, _bos: Option<&str>, _eos: Option<&str>) -> Result<Self> {
        todo!()
    }
    /// `messages` is a list of objects with `role` and `content`. Errors are `BadRequest` and carry what the template raised.
    pub fn render(&self, _messages: &[Value], _add_generation_prompt: bool) -> Result<String> {
        todo!()
    }
}
