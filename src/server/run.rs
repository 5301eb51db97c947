//! From a named adapter and a task to the engine's answer.

use std::sync::Arc;

use actix_web::web::Bytes;
use actix_web::{HttpMessage, HttpRequest, HttpResponse};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::State;
use super::error::ApiError;
use super::fields::Fields;
use crate::engine::{Choice, Event, FinishReason, Generate, Request, Sampling, Task, TokenLogprob, Usage};
use crate::lora::PackedAdapter;
use crate::{Error, Result};

/// The adapter that a request runs on; `None` is the base.
#[derive(Clone)]
pub struct Target {
    pub adapter: Option<(Arc<str>, Arc<PackedAdapter>)>,
}

impl Target {
    /// The adapter's name, for answers; `None` for the base.
    pub fn name(&self) -> Option<&str> {
        self.adapter.as_ref().map(|(name, _)| &**name)
    }

    pub fn generation(&self) -> Option<&str> {
        self.adapter.as_ref().map(|(_, a)| a.generation.as_str())
    }

    pub fn request(&self, prompt: Vec<u32>, task: Task) -> Request {
        Request { adapter: self.adapter.clone(), prompt, task }
    }
}

/// The name under which the metrics count a request, put down where it is known to be an adapter's.
pub struct Counted(pub Option<String>);

impl State {
    /// Token ids of a prompt. A text too long for any tokenization to fit the context is refused before the work.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.check_length(text)?;
        self.tokenizer.encode(text, true)
    }

    /// Token ids of a text for a classification head.
    pub fn encode_for_head(&self, text: &str) -> Result<Vec<u32>> {
        self.check_length(text)?;
        self.tokenizer.encode_for_head(text)
    }

    pub fn check_length(&self, text: &str) -> Result<()> {
        let longest = self.tokenizer.longest_token().saturating_mul(self.context);
        match text.len() <= longest {
            true => Ok(()),
            false => Err(Error::bad_request(format!(
                "the text has {} bytes; no text of more than {longest} fits the context of {} tokens",
                text.len(),
                self.context
            ))),
        }
    }

    /// The adapter called `name`, pinned; the base for none, `base` or the base's own id.
    pub async fn target(&self, http: &HttpRequest, name: Option<&str>) -> Result<Target> {
        let name = name.filter(|n| *n != "base" && *n != self.base_id);
        let Some(name) = name else {
            http.extensions_mut().insert(Counted(None));
            return Ok(Target { adapter: None });
        };
        let packed = self.registry.acquire(name).await?;
        http.extensions_mut().insert(Counted(Some(name.to_string())));
        Ok(Target { adapter: Some((name.into(), packed)) })
    }

    /// Token ids of a chat, by the model's template.
    pub fn chat_prompt(&self, messages: &[Value]) -> Result<Vec<u32>> {
        if messages.is_empty() {
            return Err(Error::bad_request("messages is empty; expected one message or more").param("messages"));
        }
        let chat = self.chat.as_ref();
        let chat = chat.ok_or_else(|| {
            Error::bad_request("the base model has no chat template; send a prompt").param("messages")
        })?;
        let text = chat.render(messages, true)?;
        self.check_length(&text)?;
        self.tokenizer.encode(&text, false)
    }
}

/// The sampling fields that all dialects share, over the dialect's own defaults.
pub fn sampling(f: &Fields, temperature: f32) -> Result<Sampling> {
    let default = Sampling::default();
    let mut logit_bias = std::collections::HashMap::new();
    if let Some(Value::Object(map)) = f.get("logit_bias") {
        for (token, bias) in map {
            let pair = token.parse::<u32>().ok().zip(bias.as_f64().map(|b| b as f32));
            let (token, bias) = pair.ok_or_else(|| f.wrong("logit_bias", "does not map token ids to numbers"))?;
            logit_bias.insert(token, bias);
        }
    } else if f.get("logit_bias").is_some() {
        return Err(f.wrong("logit_bias", "is not an object"));
    }
    // -1 is vLLM's way to say: all of them.
    let top_k = match f.get("top_k").and_then(Value::as_i64) {
        Some(-1) => 0,
        _ => f.count("top_k")?.unwrap_or(default.top_k),
    };
    Ok(Sampling {
        temperature: f.real("temperature")?.unwrap_or(temperature),
        top_k,
        top_p: f.real("top_p")?.unwrap_or(default.top_p),
        min_p: f.real("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: f.real("repetition_penalty")?.unwrap_or(default.repetition_penalty),
        frequency_penalty: f.real("frequency_penalty")?.unwrap_or(default.frequency_penalty),
        presence_penalty: f.real("presence_penalty")?.unwrap_or(default.presence_penalty),
        logit_bias,
        seed: f.seed("seed")?,
    })
}

/// The fields of a generation that the native and the OpenAI dialects share.
pub fn generation(f: &Fields, temperature: f32, max_tokens: usize) -> Result<Generate> {
    Ok(Generate {
        max_tokens,
        sampling: sampling(f, temperature)?,
        stop: f.texts("stop")?.unwrap_or_default(),
        stop_tokens: f.tokens("stop_token_ids")?.unwrap_or_default(),
        include_stop: f.flag("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: f.flag("ignore_eos")?.unwrap_or(false),
        logprobs: None,
        n: f.count("n")?.unwrap_or(1),
    })
}

/// All that a generation answered.
#[derive(Debug, Default)]
pub struct Generated {
    pub choices: Vec<Choice>,
    pub usage: Usage,
}

fn ended() -> Error {
    Error::unavailable("the server stops; the request was given up")
}

/// Waits for a whole generation.
pub async fn collect(mut events: UnboundedReceiver<Event>, n: usize) -> Result<Generated> {
    let mut all = Generated::default();
    all.choices.extend((0..n).map(|index| Choice { index, ..Choice::default() }));
    loop {
        match events.recv().await.ok_or_else(ended)? {
            Event::Progress(new) => {
                let choice = &mut all.choices[new.index];
                choice.tokens.extend(new.tokens);
                choice.text.push_str(&new.text);
                choice.logprobs.extend(new.logprobs);
                choice.finish = new.finish.or(choice.finish);
                choice.matched_stop = new.matched_stop.or(choice.matched_stop.take());
            }
            Event::Done(usage) => {
                all.usage = usage;
                return Ok(all);
            }
            Event::Failed(e) => return Err(e),
            other => return Err(Error::internal(format!("a generation was answered with {other:?}"))),
        }
    }
}

/// Waits for the numbers that answer a classification or a score.
pub async fn numbers(mut events: UnboundedReceiver<Event>) -> Result<(Vec<f32>, Usage)> {
    match events.recv().await.ok_or_else(ended)? {
        Event::Classified { logits, usage } => Ok((logits, usage)),
        Event::Scored { logprobs, usage } => Ok((logprobs, usage)),
        Event::Failed(e) => Err(e),
        other => Err(Error::internal(format!("numbers were asked for, the answer is {other:?}"))),
    }
}

/// One server-sent event.
pub fn sse(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// Server-sent events: `start`, what `each` makes of every event of every request as they come, then `end`. `each` gets
/// the index of the request. An error goes out as an event and ends the stream. Dropping the body, as when the client
/// has hung up, drops the receivers and so cancels the requests.
pub fn stream(
    receivers: Vec<UnboundedReceiver<Event>>,
    start: String,
    each: impl FnMut(usize, Event) -> String + 'static,
    end: impl FnOnce() -> String + 'static,
) -> HttpResponse {
    let events = futures::stream::select_all(receivers.into_iter().enumerate().map(|(i, mut receiver)| {
        futures::stream::poll_fn(move |cx| receiver.poll_recv(cx).map(|e| e.map(|e| (i, e))))
    }));
    let pieces = futures::stream::unfold((events, each, Some(end)), |(mut events, mut each, mut end)| async move {
        end.as_ref()?;
        let piece = match events.next().await {
            Some((_, Event::Failed(e))) => {
                end = None;
                sse(&ApiError::from(e).body())
            }
            Some((i, event)) => each(i, event),
            None => end.take()?(),
        };
        Some((piece, (events, each, end)))
    });
    // An empty piece would end a chunked body.
    let body = futures::stream::once(async { start })
        .chain(pieces)
        .filter(|piece| std::future::ready(!piece.is_empty()))
        .map(|piece| Ok::<_, actix_web::Error>(Bytes::from(piece)));
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header(("Cache-Control", "no-cache"))
        .insert_header(("X-Accel-Buffering", "no"))
        .streaming(body)
}

/// The text of one token.
pub fn token_text(state: &State, token: u32) -> String {
    String::from_utf8_lossy(state.tokenizer.token_bytes(token)).into_owned()
}

pub fn finish_text(finish: Option<FinishReason>) -> Option<&'static str> {
    finish.map(|f| match f {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    })
}

/// OpenAI's usage object, which the native routes share.
pub fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

pub fn add(total: &mut Usage, usage: &Usage) {
    total.prompt_tokens += usage.prompt_tokens;
    total.cached_tokens += usage.cached_tokens;
    total.completion_tokens += usage.completion_tokens;
}

/// Chat's form of a token's log-probability, also the native one.
pub fn logprob_json(state: &State, entry: &TokenLogprob, top: usize) -> Value {
    let one = |token: u32, logprob: f32| {
        let bytes = state.tokenizer.token_bytes(token);
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
    };
    let mut all = one(entry.token, entry.logprob);
    all["top_logprobs"] = entry.top.iter().take(top).map(|&(t, l)| one(t, l)).collect();
    all
}
