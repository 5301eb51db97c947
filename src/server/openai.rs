//! OpenAI's models, completions and chat, with vLLM's extra fields.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, token_ids};
use super::run::{self, Target};
use super::{Shared, State};
use crate::engine::{Choice, Event, Task, TokenLogprob, Usage};
use crate::{Error, ErrorKind, Result};

/// Tokens of a completion where the request does not say; OpenAI's number.
const MAX_TOKENS: usize = 16;
/// Prompts of one request.
const MAX_PROMPTS: usize = 1024;
/// Fields that would change the answer and are not supported.
const REFUSED: [&str; 14] = [
    "allowed_token_ids",
    "bad_words",
    "suffix",
    "tools",
    "functions",
    "audio",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "use_beam_search",
    "min_tokens",
    "prompt_logprobs",
];

fn refuse(f: &Fields) -> Result<()> {
    f.refuse(&REFUSED, &[])?;
    match f.object("response_format")?.text("type")?.is_some_and(|t| t != "text") {
        true => Err(f.wrong("response_format", "is not supported but for {\"type\": \"text\"}")),
        false => Ok(()),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn new_id(kind: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    format!("{kind}-{started:x}{:x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn model_json(state: &State, id: &str, created: u64) -> Value {
    let parent = (id != state.base_id).then_some(&state.base_id);
    json!({ "id": id, "object": "model", "created": created, "owned_by": "loramux", "root": id, "parent": parent,
        "max_model_len": state.context })
}

pub async fn models(state: Shared) -> HttpResponse {
    let mut data = vec![model_json(&state, &state.base_id, 0)];
    data.extend(state.registry.list().iter().map(|a| model_json(&state, &a.name, a.created)));
    HttpResponse::Ok().json(json!({ "object": "list", "data": data }))
}

pub async fn model(state: Shared, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    if *id == state.base_id || *id == "base" {
        return Ok(HttpResponse::Ok().json(model_json(&state, &state.base_id, 0)));
    }
    let info = state.registry.get(&id).map_err(unknown_model)?;
    Ok(HttpResponse::Ok().json(model_json(&state, &info.name, info.created)))
}

fn unknown_model(e: Error) -> ApiError {
    match e.kind {
        ErrorKind::NotFound => ApiError::from(e.param("model")).code("model_not_found"),
        // A name that no adapter can have is an unknown model too.
        ErrorKind::BadRequest => ApiError::from(Error::not_found(e.message).param("model")).code("model_not_found"),
        _ => e.into(),
    }
}

/// The model's name in the answer, and what it stands for; the base where the request names none.
async fn target(state: &State, http: &HttpRequest, f: &Fields) -> Result<(String, Target), ApiError> {
    let name = f.text("model")?.unwrap_or_else(|| state.base_id.clone());
    let target = state.target(http, Some(&name)).await.map_err(unknown_model)?;
    Ok((name, target))
}

fn prompts(state: &State, f: &Fields) -> Result<Vec<Vec<u32>>> {
    let special = f.flag("add_special_tokens")?.unwrap_or(true);
    let wrong = || f.wrong("prompt", "is no text, list of texts, list of token ids or list of lists of token ids");
    let value = f.get("prompt").ok_or_else(|| f.wrong("prompt", "is needed"))?;
    let encode = |text: &str| {
        state.check_length(text)?;
        state.tokenizer.encode(text, special)
    };
    let list = match value {
        Value::String(text) => return Ok(vec![encode(text)?]),
        Value::Array(list) => list,
        _ => return Err(wrong()),
    };
    if list.is_empty() || list.len() > MAX_PROMPTS && !list[0].is_number() {
        return Err(f.wrong("prompt", format!("has {} prompts; expected 1 to {MAX_PROMPTS}", list.len())));
    }
    if list[0].is_number() {
        return Ok(vec![token_ids(value).ok_or_else(wrong)?]);
    }
    let one = |v: &Value| match v {
        Value::String(text) => encode(text),
        list => token_ids(list).ok_or_else(wrong),
    };
    list.iter().map(one).collect()
}

fn include_usage(f: &Fields) -> Result<bool> {
    Ok(f.object("stream_options")?.flag("include_usage")?.unwrap_or(false))
}

/// Completions' form of log-probabilities.
fn logprobs_json(state: &State, entries: &[TokenLogprob], top: usize, offset: &mut usize) -> Value {
    let text = |token| run::token_text(state, token);
    let offsets: Vec<usize> = entries
        .iter()
        .map(|e| {
            let at = *offset;
            *offset += text(e.token).chars().count();
            at
        })
        .collect();
    let tops = entries
        .iter()
        .map(|e| e.top.iter().take(top).map(|&(t, l)| (text(t), json!(l))).collect::<Map<String, Value>>());
    json!({
        "tokens": entries.iter().map(|e| text(e.token)).collect::<Vec<_>>(),
        "token_logprobs": entries.iter().map(|e| e.logprob).collect::<Vec<_>>(),
        "top_logprobs": tops.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

pub async fn completions(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    refuse(&f)?;
    let mut task = run::generation(&f, 1.0, f.count("max_tokens")?.unwrap_or(MAX_TOKENS))?;
    task.logprobs = f.count("logprobs")?;
    let n = task.n;
    if f.count("best_of")?.is_some_and(|best| best != n) {
        return Err(f.wrong("best_of", "is not supported but where it equals n").into());
    }
    let echo = f.flag("echo")?.unwrap_or(false);
    if echo && task.logprobs.is_some() {
        return Err(f.wrong("echo", "together with logprobs is not supported").into());
    }
    let (stream, with_usage) = (f.flag("stream")?.unwrap_or(false), include_usage(&f)?);
    let prompts = prompts(&state, &f)?;
    let (model, target) = target(&state, &http, &f).await?;
    let logprobs = task.logprobs;
    let echoed: Vec<String> = match echo {
        true => prompts.iter().map(|p| state.tokenizer.decode(p, true)).collect(),
        false => vec![String::new(); prompts.len()],
    };
    let submit = |prompt| state.engine.submit(target.request(prompt, Task::Generate(task.clone())));
    let receivers = prompts.into_iter().map(submit).collect::<Result<Vec<_>>>()?;
    let (id, created) = (new_id("cmpl"), now());
    let choice_json = move |state: &State, index: usize, text: String, c: &Choice, offset: &mut usize| {
        let logprobs = logprobs.map(|top| logprobs_json(state, &c.logprobs, top, offset));
        json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": run::finish_text(c.finish),
            "stop_reason": c.matched_stop })
    };
    if stream {
        let whole = move |choices: Value| json!({ "id": id, "object": "text_completion", "created": created, "model": model, "choices": choices });
        let start: String = match echo {
            true => (0..echoed.len() * n)
                .map(|i| {
                    run::sse(&whole(json!([choice_json(&state, i, echoed[i / n].clone(), &Choice::default(), &mut 0)])))
                })
                .collect(),
            false => String::new(),
        };
        let mut offsets = vec![0; echoed.len() * n];
        let total = std::rc::Rc::new(std::cell::Cell::new(Usage::default()));
        let (sum, last) = (total.clone(), whole.clone());
        let each = move |i: usize, event| match event {
            Event::Progress(c) => {
                let index = i * n + c.index;
                run::sse(&whole(json!([choice_json(&state, index, c.text.clone(), &c, &mut offsets[index])])))
            }
            Event::Done(usage) => {
                let mut all = sum.get();
                run::add(&mut all, &usage);
                sum.set(all);
                String::new()
            }
            _ => String::new(),
        };
        let end = move || {
            let mut text = String::new();
            if with_usage {
                let mut chunk = last(json!([]));
                chunk["usage"] = run::usage_json(&total.get());
                text = run::sse(&chunk);
            }
            text + "data: [DONE]\n\n"
        };
        return Ok(run::stream(receivers, start, each, end));
    }
    let (mut choices, mut usage) = (Vec::new(), Usage::default());
    for (i, events) in receivers.into_iter().enumerate() {
        let all = run::collect(events, n).await?;
        run::add(&mut usage, &all.usage);
        for c in &all.choices {
            let text = format!("{}{}", echoed[i], c.text);
            choices.push(choice_json(&state, i * n + c.index, text, c, &mut 0));
        }
    }
    Ok(HttpResponse::Ok().json(json!({ "id": id, "object": "text_completion", "created": created, "model": model,
        "choices": choices, "usage": run::usage_json(&usage) })))
}

pub async fn chat(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    refuse(&f)?;
    let messages = f.list("messages")?.ok_or_else(|| f.wrong("messages", "is needed"))?;
    let prompt = state.chat_prompt(messages)?;
    let asked = f.count("max_completion_tokens")?.or(f.count("max_tokens")?);
    let mut task = run::generation(&f, 1.0, asked.unwrap_or(state.context.saturating_sub(prompt.len()).max(1)))?;
    let top = f.count("top_logprobs")?;
    let with_logprobs = f.flag("logprobs")?.unwrap_or(false);
    if top.is_some_and(|t| t > 0) && !with_logprobs {
        return Err(f.wrong("top_logprobs", "needs logprobs: true").into());
    }
    task.logprobs = with_logprobs.then(|| top.unwrap_or(0));
    let n = task.n;
    let (stream, with_usage) = (f.flag("stream")?.unwrap_or(false), include_usage(&f)?);
    let (model, target) = target(&state, &http, &f).await?;
    let events = state.engine.submit(target.request(prompt, Task::Generate(task)))?;
    let (id, created) = (new_id("chatcmpl"), now());
    let logprobs_of = move |state: &State, c: &Choice| {
        with_logprobs.then(|| {
            let content: Vec<Value> =
                c.logprobs.iter().map(|l| run::logprob_json(state, l, top.unwrap_or(0))).collect();
            json!({ "content": content, "refusal": null })
        })
    };
    if stream {
        let whole = move |choices: Value| json!({ "id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices });
        let first = |index: usize| {
            let delta = json!({ "role": "assistant", "content": "" });
            run::sse(&whole(json!([{ "index": index, "delta": delta, "logprobs": null, "finish_reason": null }])))
        };
        let start: String = (0..n).map(first).collect();
        let each = move |_: usize, event| match event {
            Event::Progress(c) => {
                let delta = if c.text.is_empty() { json!({}) } else { json!({ "content": c.text }) };
                let (logprobs, finish) = (logprobs_of(&state, &c), run::finish_text(c.finish));
                run::sse(&whole(
                    json!([{ "index": c.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish }]),
                ))
            }
            Event::Done(usage) if with_usage => {
                let mut chunk = whole(json!([]));
                chunk["usage"] = run::usage_json(&usage);
                run::sse(&chunk)
            }
            _ => String::new(),
        };
        return Ok(run::stream(vec![events], start, each, || "data: [DONE]\n\n".into()));
    }
    let all = run::collect(events, n).await?;
    let choices: Vec<Value> = all
        .choices
        .iter()
        .map(|c| {
            json!({ "index": c.index, "message": { "role": "assistant", "content": c.text, "refusal": null },
                "logprobs": logprobs_of(&state, c), "finish_reason": run::finish_text(c.finish) })
        })
        .collect();
    Ok(HttpResponse::Ok().json(json!({ "id": id, "object": "chat.completion", "created": created, "model": model,
        "choices": choices, "usage": run::usage_json(&all.usage) })))
}
