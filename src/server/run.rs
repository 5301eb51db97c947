//! From a named adapter and a task to the engine's answer.

use std::iter::Peekable;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use actix_web::ResponseError;
use actix_web::web::Bytes;
use actix_web::{HttpMessage, HttpRequest, HttpResponse};
use futures::StreamExt;
use futures::stream::{LocalBoxStream, SelectAll, poll_fn};
use serde_json::{Value, json};

use super::access::{Caller, late};
use super::blend;
use super::error::ApiError;
use super::fields::Fields;
use super::observe::Counted;
use super::{Shared, State, beside};
use crate::base::{Language, Tokenizer};
use crate::engine::{
    Choice, Engine, Event, FinishReason, Generate, QueueSlot, Request, Sampling, Task, TokenLogprob, Usage,
};
use crate::lora::PackedAdapter;
use crate::{Error, ErrorKind, Result};

/// Requests to the engine that one HTTP request has in flight at most: enough to fill batches, few beside the queue.
const WINDOW: usize = 64;
/// How often a request that has begun looks for another place in a full queue.
const LOOK_FOR_PLACE: Duration = Duration::from_millis(20);
/// Texts of more bytes are tokenized beside the workers.
const LONG_TEXT: usize = 8 << 10;
/// What one answer may take in memory, roughly: [`TOKEN_BYTES`] a token, and [`LOGPROB_BYTES`] each log-probability.
const MAX_ANSWER: usize = 128 << 20;
const TOKEN_BYTES: usize = 8;
const LOGPROB_BYTES: usize = 128;
/// What metrics call all blends: one with each weight would be without end. No adapter can have the name.
const BLEND: &str = "(blend)";
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// The adapter that a request runs on; `None` is the base.
#[derive(Clone)]
pub struct Target {
    /// With the name that metrics know it by.
    pub adapter: Option<(Arc<str>, Arc<PackedAdapter>)>,
    /// What answers call it: the adapter as the caller knows it, or what a blend is of.
    pub called: Option<Arc<str>>,
    pub caller: Caller,
    /// Its own, or the base's.
    pub language: Language,
    /// Where it waited in the queue for its adapter.
    place: Arc<Mutex<Option<QueueSlot>>>,
}

impl Target {
    /// The adapter's name, or what a blend is of, for answers; `None` for the base.
    pub fn name(&self) -> Option<&str> {
        self.called.as_deref()
    }

    pub fn generation(&self) -> Option<&str> {
        self.adapter.as_ref().map(|(_, a)| a.generation.as_str())
    }

    pub fn request(&self, prompt: Vec<u32>, task: Task) -> Request {
        Request { client: self.caller.client(), adapter: self.adapter.clone(), prompt, task }
    }
}

impl State {
    fn check_length(&self, tokenizer: &Tokenizer, text: &str) -> Result<()> {
        let longest = tokenizer.longest_token().saturating_mul(self.context);
        match text.len() <= longest {
            true => Ok(()),
            false => Err(Error::bad_request(format!(
                "the text has {} bytes; no text of more than {longest} fits the context of {} tokens",
                text.len(),
                self.context
            ))),
        }
    }

    /// What the request runs on: the blend that its `adapters` or `merged_adapters` name, else the adapter called `name`, or
    /// the base for none or one of its names. Adapters are pinned.
    pub async fn target(&self, http: &HttpRequest, f: &Fields, name: Option<&str>) -> Result<Target> {
        let caller = Caller::of(http)?;
        let name = name.filter(|name| !self.is_base(name));
        let count = |name| http.extensions().get::<Counted>().map(|counted| counted.set(name));
        // Of a full queue; under no name of a client's, which may be nobody's.
        let refused = |e: &Error| {
            if e.kind == ErrorKind::QueueFull {
                count(Some("other"));
            }
        };
        let (called, name, (packed, place)): (String, String, _) = match (blend::read(f)?, name) {
            (None, None) => {
                count(None);
                let language = self.language.clone();
                return Ok(Target { adapter: None, called: None, caller, language, place: Arc::default() });
            }
            (None, Some(name)) => {
                let whole = self.meant(&caller, name)?;
                let packed = self.warm(&caller, &whole, self.registry.acquire(&whole)).await.inspect_err(refused)?;
                (name.to_string(), whole, packed)
            }
            (Some(blend), None) => {
                let meant = blend.renamed(|name| self.meant(&caller, name))?;
                let acquire = self.registry.acquire_blend(&meant);
                let packed = self.warm(&caller, BLEND, acquire).await.inspect_err(refused)?;
                (blend.to_string(), BLEND.to_string(), packed)
            }
            (Some(_), Some(name)) => {
                return Err(Error::bad_request(format!(
                    "adapter {name:?} and a blend of adapters exclude each other; name it among those of the blend"
                )));
            }
        };
        count(Some(&name));
        let language = packed.language.clone().unwrap_or_else(|| self.language.clone());
        let place = Arc::new(Mutex::new(place));
        Ok(Target { adapter: Some((name.into(), packed)), called: Some(called.into()), caller, language, place })
    }

    /// The adapter, and a place in the queue where it had to be waited for: those who wait for adapters are no more than the
    /// queue has places.
    async fn warm(
        &self,
        caller: &Caller,
        name: &str,
        acquire: impl Future<Output = Result<Arc<PackedAdapter>>>,
    ) -> Result<(Arc<PackedAdapter>, Option<QueueSlot>)> {
        tokio::pin!(acquire);
        // Ready at the first look where the adapter is in memory; else the request is counted as waiting.
        match futures::poll!(&mut acquire) {
            Poll::Ready(packed) => Ok((packed?, None)),
            Poll::Pending => {
                let place = self.engine.place(caller.client())?;
                let (_cold, start) = (self.metrics.cold(name), Instant::now());
                let packed = caller.in_time(acquire).await.unwrap_or_else(Err);
                caller.marks.adapter.get_or_init(|| (start, Instant::now()));
                Ok((packed?, Some(place)))
            }
        }
    }

    /// Refuses what would take more memory than one request may: `prompts` continuations as `task` asks for.
    pub fn check_size(&self, prompts: usize, task: &Generate) -> Result<()> {
        let entries = task.logprobs.map_or(0, |top| top.saturating_add(1));
        let token = entries.saturating_mul(LOGPROB_BYTES).saturating_add(TOKEN_BYTES);
        let tokens = prompts.saturating_mul(task.n).saturating_mul(task.max_tokens.min(self.context));
        let bytes = tokens.saturating_mul(token);
        match bytes <= MAX_ANSWER {
            true => Ok(()),
            false => Err(Error::bad_request(format!(
                "the answer may take {} MiB; the limit is {} MiB: ask for fewer prompts, a smaller n, max_tokens or \
                 logprobs",
                bytes >> 20,
                MAX_ANSWER >> 20
            ))
            .param("max_tokens")),
        }
    }
}

impl Shared {
    /// Token ids of texts for `target`, each as `encode` makes them. A text too long for any tokenization to fit the context is
    /// refused before the work.
    pub async fn encode_all(&self, target: &Target, texts: Vec<String>, encode: Encode) -> Result<Vec<Vec<u32>>> {
        let tokenizer = target.language.tokenizer.clone();
        texts.iter().try_for_each(|text| self.check_length(&tokenizer, text))?;
        let long = texts.iter().map(String::len).sum::<usize>() > LONG_TEXT;
        beside(long, move || texts.iter().map(|text| encode(&tokenizer, text)).collect()).await
    }

    /// Token ids of one text.
    pub async fn encode(&self, target: &Target, text: String, encode: Encode) -> Result<Vec<u32>> {
        Ok(self.encode_all(target, vec![text], encode).await?.concat())
    }

    /// Token ids of the chat `messages` of `f`, by the template of `target`.
    pub async fn chat_prompt(&self, target: &Target, f: &Fields, add_generation_prompt: bool) -> Result<Vec<u32>> {
        let messages = f.list("messages")?.unwrap_or_default().to_vec();
        if messages.is_empty() {
            return Err(f.wrong("messages", "is empty; expected one message or more"));
        }
        let variables = f.object("chat_template_kwargs")?.into_map();
        for (i, message) in messages.iter().enumerate() {
            if let Some(role) = message["role"].as_str().filter(|role| !ROLES.contains(role)) {
                let what = format!("messages[{i}].role is {role:?}; expected one of {}", ROLES.join(", "));
                return Err(Error::bad_request(what).param("messages"));
            }
        }
        let chat = target.language.chat.clone().ok_or_else(|| {
            let what = match target.adapter {
                Some(_) => "neither the adapter nor the base model has a chat template; send a prompt",
                None => "the base model has no chat template; send a prompt",
            };
            Error::bad_request(what).param("messages")
        })?;
        let render = move || chat.render_with(&messages, add_generation_prompt, variables);
        let text = beside(f.bytes > LONG_TEXT, render).await?;
        self.encode(target, text, plain).await
    }
}

/// How a text becomes token ids.
pub type Encode = fn(&Tokenizer, &str) -> Result<Vec<u32>>;

/// As a prompt.
pub fn prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer.encode(text, true)
}

/// Nothing added, as for a text that has its special tokens already.
pub fn plain(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer.encode(text, false)
}

/// As a text that goes on after another one, e.g. a label after its input.
pub fn continuation(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer.continuation(text)
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
        typical_p: f.real("typical_p")?.unwrap_or(default.typical_p),
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
        min_tokens: f.count("min_tokens")?.unwrap_or(0),
        sampling: sampling(f, temperature)?,
        stop: f.texts("stop")?.unwrap_or_default(),
        stop_tokens: f.tokens("stop_token_ids")?.unwrap_or_default(),
        include_stop: f.flag("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: f.flag("ignore_eos")?.unwrap_or(false),
        logprobs: None,
        n: f.count("n")?.unwrap_or(1),
        grammar: None,
    })
}

/// All that a generation answered.
#[derive(Debug, Default, Clone)]
pub struct Generated {
    pub choices: Vec<Choice>,
    pub usage: Usage,
}

fn ended() -> Error {
    Error::unavailable("the server stops; the request was given up")
}

/// Requests of one HTTP request on their way through the engine, at most [`WINDOW`] at a time, until the caller's deadline.
/// Dropping it cancels them.
pub struct Window {
    engine: Engine,
    caller: Caller,
    /// For the first.
    place: Option<QueueSlot>,
    waiting: Peekable<Box<dyn Iterator<Item = Request>>>,
    /// Index of the next of `waiting`.
    next: usize,
    events: SelectAll<LocalBoxStream<'static, (usize, Event)>>,
}

impl Window {
    /// Sends off as many as the queue takes.
    ///
    /// Errors: `QueueFull` if it takes none; what else [`Engine::submit`] says of one.
    pub fn new(
        engine: &Engine,
        target: &Target,
        requests: impl IntoIterator<Item = Request, IntoIter: 'static>,
    ) -> Result<Self> {
        let requests: Box<dyn Iterator<Item = Request>> = Box::new(requests.into_iter());
        let (engine, caller, waiting) = (engine.clone(), target.caller.clone(), requests.peekable());
        let place = target.place.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut window = Window { engine, caller, place, waiting, next: 0, events: SelectAll::new() };
        window.fill()?;
        Ok(window)
    }

    fn fill(&mut self) -> Result<()> {
        while self.events.len() < WINDOW
            && let Some(request) = self.waiting.peek()
        {
            let mut receiver = match self.engine.submit_at(request.clone(), self.place.take()) {
                Ok(receiver) => {
                    self.caller.submitted(request.prompt.len());
                    receiver
                }
                // There will be room; and what is done already is not to be lost.
                Err(e) if e.kind == ErrorKind::QueueFull && self.next > 0 => return Ok(()),
                Err(e) => return Err(e),
            };
            self.waiting.next();
            let index = self.next;
            self.next += 1;
            let events = poll_fn(move |cx| receiver.poll_recv(cx).map(|e| e.map(|e| (index, e))));
            self.events.push(events.boxed_local());
        }
        Ok(())
    }

    /// The next event of any request, with the request's index; `None` when all are answered.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        loop {
            let Ok(event) = self.caller.in_time(self.events.next()).await else {
                return Some((self.next, Event::Failed(late())));
            };
            if let Some((_, event)) = &event {
                self.caller.answered(if let Event::Progress(choice) = event { choice.tokens.len() } else { 0 });
            }
            let room = !matches!(event, Some((_, Event::Progress(_))));
            if let Err(e) = if room { self.fill() } else { Ok(()) } {
                return Some((self.next, Event::Failed(e)));
            }
            if event.is_some() || self.events.is_empty() && self.waiting.peek().is_none() {
                return event;
            }
            if self.events.is_empty() && self.caller.in_time(tokio::time::sleep(LOOK_FOR_PLACE)).await.is_err() {
                return Some((self.next, Event::Failed(late())));
            }
        }
    }
}

/// Waits for the whole generations of `count` requests, `n` choices each.
pub async fn collect(mut window: Window, count: usize, n: usize) -> Result<Vec<Generated>> {
    let choices: Vec<Choice> = (0..n).map(|index| Choice { index, ..Choice::default() }).collect();
    let mut all = vec![Generated { choices, usage: Usage::default() }; count];
    let mut left = count;
    while left > 0 {
        match window.next().await.ok_or_else(ended)? {
            (i, Event::Progress(new)) => {
                let choice = &mut all[i].choices[new.index];
                choice.tokens.extend(new.tokens);
                choice.text.push_str(&new.text);
                choice.logprobs.extend(new.logprobs);
                choice.finish = new.finish.or(choice.finish);
                choice.end = new.end.or(choice.end.take());
                choice.matched_stop = new.matched_stop.or(choice.matched_stop.take());
            }
            (i, Event::Done(usage)) => {
                all[i].usage = usage;
                left -= 1;
            }
            (_, Event::Failed(e)) => return Err(e),
            (_, other) => return Err(Error::internal(format!("a generation was answered with {other:?}"))),
        }
    }
    Ok(all)
}

/// Waits for the answers to `count` requests that have one each. `read` gives nothing for what is no such answer.
async fn answers<T: Clone + Default>(
    mut window: Window,
    count: usize,
    read: impl Fn(Event) -> Option<T>,
) -> Result<Vec<T>> {
    let mut all = vec![T::default(); count];
    for _ in 0..count {
        let (i, event) = window.next().await.ok_or_else(ended)?;
        let answer = match event {
            Event::Failed(e) => return Err(e),
            event => read(event),
        };
        all[i] = answer.ok_or_else(|| Error::internal("a request was answered with an event of another one's kind"))?;
    }
    Ok(all)
}

/// Waits for the numbers that answer `count` classifications or scores.
pub async fn numbers(window: Window, count: usize) -> Result<Vec<(Vec<f32>, Usage)>> {
    let read = |event| match event {
        Event::Classified { logits, usage } => Some((logits, usage)),
        Event::Scored { logprobs, usage } => Some((logprobs.iter().map(|entry| entry.logprob).collect(), usage)),
        _ => None,
    };
    answers(window, count, read).await
}

/// Waits for the log-probabilities that answer `count` scores.
pub async fn scores(window: Window, count: usize) -> Result<Vec<Vec<TokenLogprob>>> {
    let read = |event| match event {
        Event::Scored { logprobs, .. } => Some(logprobs),
        _ => None,
    };
    answers(window, count, read).await
}

/// One server-sent event.
pub fn sse(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// Server-sent events: `start`, what `each` makes of every event of every request as they come, then `end`. `each` gets
/// the index of the request. An error goes out as an event and ends the stream. Dropping the body, as when the client
/// has hung up, drops the window and so cancels the requests.
pub fn stream(
    window: Window,
    start: String,
    each: impl FnMut(usize, Event) -> String + 'static,
    end: impl FnOnce() -> String + 'static,
) -> HttpResponse {
    let pieces = futures::stream::unfold((window, each, Some(end)), |(mut window, mut each, mut end)| async move {
        end.as_ref()?;
        let piece = match window.next().await {
            Some((_, Event::Failed(e))) => {
                end = None;
                let e = ApiError::from(e);
                window.caller.marks.failed.get_or_init(|| e.status_code().as_u16());
                sse(&e.body())
            }
            Some((i, event)) => each(i, event),
            None => end.take()?(),
        };
        Some((piece, (window, each, end)))
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
pub fn token_text(tokenizer: &Tokenizer, token: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned()
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
pub fn logprob_json(tokenizer: &Tokenizer, entry: &TokenLogprob, top: usize) -> Value {
    let one = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token);
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
    };
    let mut all = one(entry.token, entry.logprob);
    all["top_logprobs"] = entry.top.iter().take(top).map(|&(t, l)| one(t, l)).collect();
    all
}
