//! OpenAI's models, completions and chat, with vLLM's extra fields.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::access::Caller;
use super::error::ApiError;
use super::fields::{Fields, token_ids};
use super::run::{self, Target, Window};
use super::{Shared, State};
use crate::base::Tokenizer;
use crate::engine::{Choice, Detokenizer, Event, Generate, Request, Task, TokenLogprob, Usage};
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
    "use_beam_search",
    "prompt_logprobs",
    "continue_final_message",
    "chat_template",
    "documents",
    "truncate_prompt_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
];

fn refuse(f: &Fields) -> Result<()> {
    f.refuse(&REFUSED, &[])?;
    if f.flag("skip_special_tokens")? == Some(false) {
        return Err(f.wrong("skip_special_tokens", "is false, which is not supported"));
    }
    Ok(())
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
    let (root, parent) = match state.is_base(id) {
        true => (&*state.base_id, None),
        false => (id, Some(&state.base_id)),
    };
    json!({ "id": id, "object": "model", "created": created, "owned_by": "loramux", "root": root, "parent": parent,
        "max_model_len": state.context })
}

pub async fn models(state: Shared, caller: Caller) -> HttpResponse {
    let names = std::iter::once(&state.base_id).chain(&state.base_names);
    let mut data: Vec<Value> = names.map(|name| model_json(&state, name, 0)).collect();
    let seen = state.seen(&caller);
    data.extend(seen.iter().filter_map(|a| Some(model_json(&state, caller.called(&a.name)?, a.created))));
    HttpResponse::Ok().json(json!({ "object": "list", "data": data }))
}

pub async fn model(state: Shared, caller: Caller, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    if state.is_base(&id) {
        let id = if *id == "base" { &state.base_id } else { &*id };
        return Ok(HttpResponse::Ok().json(model_json(&state, id, 0)));
    }
    let info = state.meant(&caller, &id).and_then(|whole| state.registry.get(&whole)).map_err(unknown_model)?;
    Ok(HttpResponse::Ok().json(model_json(&state, &id, info.created)))
}

fn unknown_model(e: Error) -> ApiError {
    match e.kind {
        ErrorKind::NotFound => ApiError::from(e.param("model")).code("model_not_found"),
        // A name that no adapter can have is an unknown model too.
        ErrorKind::BadRequest => ApiError::from(Error::not_found(e.message).param("model")).code("model_not_found"),
        _ => e.into(),
    }
}

/// The model's name in the answer, and what it stands for; the base where the request names none, or the empty one, as in vLLM
/// and LoRAX.
async fn target(state: &State, http: &HttpRequest, f: &Fields) -> Result<(String, Target), ApiError> {
    let name = f.text("model")?.filter(|name| !name.is_empty()).unwrap_or_else(|| state.base_id.clone());
    let target = state.target(http, f, Some(&name)).await.map_err(unknown_model)?;
    Ok((name, target))
}

/// The prompts as token ids, each such that `request` makes something of it that the engine takes.
async fn prompts(
    state: &Shared,
    target: &Target,
    f: &Fields,
    request: impl Fn(Vec<u32>) -> Request,
) -> Result<Vec<Request>> {
    let encode = if f.flag("add_special_tokens")?.unwrap_or(true) { run::prompt } else { run::plain };
    let wrong = || f.wrong("prompt", "is no text, list of texts, list of token ids or list of lists of token ids");
    let value = f.get("prompt").ok_or_else(|| f.wrong("prompt", "is needed"))?;
    let list = match value {
        Value::String(_) => std::slice::from_ref(value),
        Value::Array(list) if list.first().is_some_and(Value::is_number) => std::slice::from_ref(value),
        Value::Array(list) if (1..=MAX_PROMPTS).contains(&list.len()) => list,
        Value::Array(list) => {
            return Err(f.wrong("prompt", format!("has {} prompts; expected 1 to {MAX_PROMPTS}", list.len())));
        }
        _ => return Err(wrong()),
    };
    let mut requests = Vec::with_capacity(list.len());
    for prompt in list {
        let tokens = match prompt {
            Value::String(text) => state.encode(target, text.clone(), encode).await?,
            list => token_ids(list).ok_or_else(wrong)?,
        };
        let request = request(tokens);
        // Before the next is encoded, and before a stream has begun.
        state.engine.check(&request)?;
        requests.push(request);
    }
    Ok(requests)
}

/// The `i`th prompt as it came, where it is a text: its tokens may spell it otherwise, and special ones are left out.
fn prompt_text(f: &Fields, i: usize) -> Option<String> {
    let prompt = match f.get("prompt")? {
        Value::Array(list) => list.get(i)?,
        one => one,
    };
    prompt.as_str().map(str::to_string)
}

fn include_usage(f: &Fields) -> Result<bool> {
    Ok(f.object("stream_options")?.flag("include_usage")?.unwrap_or(false))
}

/// vLLM's `stop_reason`: the stop string that ended a choice, or the number of the stop token.
fn stop_reason(choice: &Choice, stop: &[String]) -> Value {
    match &choice.matched_stop {
        Some(token) if !stop.contains(token) => json!(token.parse::<u32>().ok()),
        other => json!(other),
    }
}

/// How far the text of a choice has come.
#[derive(Clone, Default)]
struct Place {
    detokenizer: Detokenizer,
    characters: usize,
}

/// Completions' form of log-probabilities; of a prompt's `first` token there is none. A token is among the likeliest in its place
/// also where it is not one of the `top`.
fn logprobs_json(
    tokenizer: &Tokenizer,
    first: Option<u32>,
    entries: &[TokenLogprob],
    top: usize,
    place: &mut Place,
) -> Value {
    let text = |token| spelling(tokenizer.token_bytes(token));
    let tokens: Vec<u32> = first.into_iter().chain(entries.iter().map(|entry| entry.token)).collect();
    let mut offsets = Vec::with_capacity(tokens.len());
    for &token in &tokens {
        offsets.push(place.characters);
        if !tokenizer.is_special(token) {
            let mut piece = String::new();
            place.detokenizer.push(tokenizer.token_bytes(token), &mut piece);
            place.characters += piece.chars().count();
        }
    }
    let likeliest = |entry: &TokenLogprob| {
        let own = (entry.token, entry.logprob);
        let top = entry.top.iter().take(top).copied().chain([own]);
        Value::Object(top.map(|(token, logprob)| (text(token), json!(logprob))).collect())
    };
    let with_first = |of: &dyn Fn(&TokenLogprob) -> Value| -> Vec<Value> {
        first.map(|_| Value::Null).into_iter().chain(entries.iter().map(of)).collect()
    };
    json!({
        "tokens": tokens.iter().map(|&token| text(token)).collect::<Vec<_>>(),
        "token_logprobs": with_first(&|entry| json!(entry.logprob)),
        "top_logprobs": with_first(&likeliest),
        "text_offset": offsets,
    })
}

/// A token's text; one that is no whole characters is spelled as OpenAI does, so that no two of them are the same.
fn spelling(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => bytes.iter().fold("bytes:".into(), |text: String, byte| format!("{text}\\x{byte:02x}")),
    }
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
    let (stream, with_usage) = (f.flag("stream")?.unwrap_or(false), include_usage(&f)?);
    if echo && stream && task.logprobs.is_some() {
        return Err(f.wrong("echo", "together with logprobs is not supported in a stream").into());
    }
    let (model, target) = target(&state, &http, &f).await?;
    task.grammar = state.grammar(&target, &f).await?;
    let (logprobs, stop) = (task.logprobs, task.stop.clone());
    let requests = prompts(&state, &target, &f, |prompt| target.request(prompt, Task::Generate(task.clone()))).await?;
    let count = requests.len();
    // An echo has log-probabilities too.
    let longest = requests.iter().map(|r| r.prompt.len()).max().filter(|_| echo && logprobs.is_some());
    let max_tokens = task.max_tokens.saturating_add(longest.unwrap_or(0));
    state.check_size(count, &Generate { max_tokens, ..task })?;
    let echoed: Vec<String> = match echo {
        true => {
            let decoded = |r: &Request| target.language.tokenizer.decode(&r.prompt, true);
            requests.iter().enumerate().map(|(i, r)| prompt_text(&f, i).unwrap_or_else(|| decoded(r))).collect()
        }
        false => vec![String::new(); count],
    };
    // First by itself: the generation finds in the cache what that computes.
    let (mut firsts, mut echoed_logprobs) = (vec![None; count], vec![vec![]; count]);
    if let (true, Some(top)) = (echo, logprobs) {
        let score = |r: &Request| target.request(r.prompt.clone(), Task::Score { from: 1, top });
        let scores: Vec<Request> = requests.iter().map(score).collect();
        firsts = requests.iter().map(|r| r.prompt.first().copied()).collect();
        echoed_logprobs = run::scores(Window::new(&state.engine, &target, scores)?, count).await?;
    }
    let window = Window::new(&state.engine, &target, requests)?;
    let (id, created) = (new_id("cmpl"), now());
    let tokenizer = target.language.tokenizer.clone();
    let choice_json = move |index: usize, text: String, c: &Choice, place: &mut Place| {
        let logprobs = logprobs.map(|top| logprobs_json(&tokenizer, firsts[index / n], &c.logprobs, top, place));
        json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": run::finish_text(c.finish),
            "stop_reason": stop_reason(c, &stop) })
    };
    if stream {
        let whole = move |choices: Value| json!({ "id": id, "object": "text_completion", "created": created, "model": model, "choices": choices });
        let start: String = match echo {
            true => (0..count * n)
                .map(|i| {
                    let (text, place) = (echoed[i / n].clone(), &mut Place::default());
                    run::sse(&whole(json!([choice_json(i, text, &Choice::default(), place)])))
                })
                .collect(),
            false => String::new(),
        };
        let mut places = vec![Place::default(); count * n];
        let total = std::rc::Rc::new(std::cell::Cell::new(Usage::default()));
        let (sum, last) = (total.clone(), whole.clone());
        let each = move |i: usize, event| match event {
            Event::Progress(c) => {
                let index = i * n + c.index;
                run::sse(&whole(json!([choice_json(index, c.text.clone(), &c, &mut places[index])])))
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
        return Ok(run::stream(window, start, each, end));
    }
    let (mut choices, mut usage) = (Vec::new(), Usage::default());
    for (i, all) in run::collect(window, count, n).await?.iter().enumerate() {
        run::add(&mut usage, &all.usage);
        for c in &all.choices {
            let text = format!("{}{}", echoed[i], c.text);
            let whole = Choice { logprobs: [&echoed_logprobs[i][..], &c.logprobs].concat(), ..c.clone() };
            choices.push(choice_json(i * n + c.index, text, &whole, &mut Place::default()));
        }
    }
    Ok(HttpResponse::Ok().json(json!({ "id": id, "object": "text_completion", "created": created, "model": model,
        "choices": choices, "usage": run::usage_json(&usage) })))
}

pub async fn chat(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    refuse(&f)?;
    f.refuse(&["echo"], &[])?;
    f.list("messages")?.ok_or_else(|| f.wrong("messages", "is needed"))?;
    let (model, target) = target(&state, &http, &f).await?;
    let prompt = state.chat_prompt(&target, &f, f.flag("add_generation_prompt")?.unwrap_or(true)).await?;
    let asked = f.count("max_completion_tokens")?.or(f.count("max_tokens")?);
    let mut task = run::generation(&f, 1.0, asked.unwrap_or(state.context.saturating_sub(prompt.len()).max(1)))?;
    let top = f.count("top_logprobs")?;
    let with_logprobs = f.flag("logprobs")?.unwrap_or(false);
    if top.is_some_and(|t| t > 0) && !with_logprobs {
        return Err(f.wrong("top_logprobs", "needs logprobs: true").into());
    }
    task.logprobs = with_logprobs.then(|| top.unwrap_or(0));
    task.grammar = state.grammar(&target, &f).await?;
    let (n, stop) = (task.n, task.stop.clone());
    let (stream, with_usage) = (f.flag("stream")?.unwrap_or(false), include_usage(&f)?);
    state.check_size(1, &task)?;
    let window = Window::new(&state.engine, &target, [target.request(prompt, Task::Generate(task))])?;
    let tokenizer = target.language.tokenizer;
    let (id, created) = (new_id("chatcmpl"), now());
    let logprobs_of = move |c: &Choice| {
        with_logprobs.then(|| {
            let content: Vec<Value> =
                c.logprobs.iter().map(|l| run::logprob_json(&tokenizer, l, top.unwrap_or(0))).collect();
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
                let (logprobs, finish) = (logprobs_of(&c), run::finish_text(c.finish));
                run::sse(&whole(json!([{ "index": c.index, "delta": delta, "logprobs": logprobs,
                    "finish_reason": finish, "stop_reason": stop_reason(&c, &stop) }])))
            }
            Event::Done(usage) if with_usage => {
                let mut chunk = whole(json!([]));
                chunk["usage"] = run::usage_json(&usage);
                run::sse(&chunk)
            }
            _ => String::new(),
        };
        return Ok(run::stream(window, start, each, || "data: [DONE]\n\n".into()));
    }
    let all = &run::collect(window, 1, n).await?[0];
    let choices: Vec<Value> = all
        .choices
        .iter()
        .map(|c| {
            json!({ "index": c.index, "message": { "role": "assistant", "content": c.text, "refusal": null },
                "logprobs": logprobs_of(c), "finish_reason": run::finish_text(c.finish),
                "stop_reason": stop_reason(c, &stop) })
        })
        .collect();
    Ok(HttpResponse::Ok().json(json!({ "id": id, "object": "chat.completion", "created": created, "model": model,
        "choices": choices, "usage": run::usage_json(&all.usage) })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_token_is_told_by_its_number() {
        let reason = |matched: Option<&str>| {
            let choice = Choice { matched_stop: matched.map(str::to_string), ..Choice::default() };
            stop_reason(&choice, &["5".into(), "x".into()])
        };
        assert_eq!((reason(None), reason(Some("x")), reason(Some("7"))), (Value::Null, json!("x"), json!(7)));
        assert_eq!(reason(Some("5")), json!("5"));
    }

    #[test]
    fn halves_of_characters_keep_apart() {
        assert_eq!(spelling("é".as_bytes()), "é");
        assert_eq!(spelling(b" \xf0\x9f"), "bytes:\\x20\\xf0\\x9f");
    }
}
