//! The dialect of LoRAX and Text Generation Inference.

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::run::{self, Generated, Target};
use super::{Shared, State};
use crate::Result;
use crate::engine::{Event, FinishReason, Generate, Task, TokenLogprob};

/// New tokens where the request does not say; LoRAX's number.
const MAX_NEW_TOKENS: usize = 20;
const REFUSED: [&str; 8] = [
    "merged_adapters",
    "typical_p",
    "watermark",
    "schema",
    "response_format",
    "grammar",
    "return_k_alternatives",
    "apply_chat_template",
];

struct Asked {
    target: Target,
    prompt: Vec<u32>,
    text: String,
    task: Generate,
    full_text: bool,
    details: bool,
    prefill: bool,
}

async fn read(state: &State, http: &HttpRequest, f: &Fields) -> Result<Asked> {
    let text = f.text("inputs")?.ok_or_else(|| f.wrong("inputs", "is needed"))?;
    let p = f.object("parameters")?;
    p.refuse(&REFUSED, &[json!(1.0)])?;
    if p.count("best_of")?.is_some_and(|n| n > 1) {
        return Err(p.wrong("best_of", "above 1 is not supported"));
    }
    if let Some(source) = p.text("adapter_source")?.filter(|s| s != "local") {
        return Err(p.wrong("adapter_source", format!("is {source:?}; supported: \"local\"")));
    }
    let mut sampling = run::sampling(&p, 1.0)?;
    // As in the original, nothing is sampled unless do_sample or one of its parameters asks for it. LoRAX's client sends
    // `do_sample: false` whatever else it asks for.
    let asks = ["temperature", "top_k", "top_p"].iter().any(|name| p.get(name).is_some());
    if p.flag("do_sample")?.unwrap_or(false) || asks {
        if sampling.temperature == 0.0 {
            return Err(p.wrong("temperature", "is 0 where sampling is asked for; expected more than 0"));
        }
    } else {
        sampling.temperature = 0.0;
    }
    let mut prompt = state.encode(&text)?;
    if let Some(keep) = p.count("truncate")? {
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
    let task = Generate {
        max_tokens: p.count("max_new_tokens")?.unwrap_or(MAX_NEW_TOKENS),
        sampling,
        stop: p.texts("stop")?.unwrap_or_default(),
        stop_tokens: vec![],
        // TGI's text ends with the stop sequence.
        include_stop: true,
        ignore_eos: p.flag("ignore_eos_token")?.unwrap_or(false),
        logprobs: Some(0),
        n: 1,
    };
    let target = state.target(http, p.text("adapter_id")?.as_deref()).await?;
    Ok(Asked {
        target,
        prompt,
        text,
        task,
        full_text: p.flag("return_full_text")?.unwrap_or(false),
        details: p.flag("details")?.unwrap_or(false),
        prefill: p.flag("decoder_input_details")?.unwrap_or(false),
    })
}

fn token_json(state: &State, entry: &TokenLogprob) -> Value {
    let special = state.tokenizer.is_special(entry.token);
    json!({ "id": entry.token, "text": run::token_text(state, entry.token), "logprob": entry.logprob, "special": special,
        "alternative_tokens": null })
}

fn finish(finish: Option<FinishReason>, matched: bool) -> &'static str {
    match finish {
        Some(FinishReason::Stop) if matched => "stop_sequence",
        Some(FinishReason::Stop) => "eos_token",
        _ => "length",
    }
}

async fn answer(state: &State, asked: Asked) -> Result<Value, ApiError> {
    let request = asked.target.request(asked.prompt.clone(), Task::Generate(asked.task));
    let all: Generated = run::collect(state.engine.submit(request)?, 1).await?;
    let choice = &all.choices[0];
    let text = if asked.full_text { format!("{}{}", asked.text, choice.text) } else { choice.text.clone() };
    let mut answer = json!({ "generated_text": text });
    if asked.details {
        let prefill = asked.prompt.iter().filter(|_| asked.prefill);
        let prefill = prefill.map(|&t| json!({ "id": t, "text": run::token_text(state, t), "logprob": null }));
        answer["details"] = json!({
            "finish_reason": finish(choice.finish, choice.matched_stop.is_some()),
            "prompt_tokens": all.usage.prompt_tokens,
            "generated_tokens": all.usage.completion_tokens,
            "seed": null,
            "prefill": prefill.collect::<Vec<_>>(),
            "tokens": choice.logprobs.iter().map(|l| token_json(state, l)).collect::<Vec<_>>(),
        });
    }
    Ok(answer)
}

pub async fn generate(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let asked = read(&state, &http, &f).await?;
    Ok(HttpResponse::Ok().json(answer(&state, asked).await?))
}

pub async fn generate_stream(
    state: Shared,
    http: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let asked = read(&state, &http, &f).await?;
    streamed(state, asked)
}

/// `POST /`: one of the two above, as `stream` says.
pub async fn either(state: Shared, http: HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let stream = f.flag("stream")?.unwrap_or(false);
    let asked = read(&state, &http, &f).await?;
    match stream {
        true => streamed(state, asked),
        false => Ok(HttpResponse::Ok().json(json!([answer(&state, asked).await?]))),
    }
}

/// One event a token. The last carries the whole text, so a token waits for the next one or for the end.
fn streamed(state: Shared, asked: Asked) -> Result<HttpResponse, ApiError> {
    let events = state.engine.submit(asked.target.request(asked.prompt, Task::Generate(asked.task)))?;
    let mut text = if asked.full_text { asked.text } else { String::new() };
    let mut held: Option<Value> = None;
    let (mut ending, mut matched) = (None, false);
    let each = move |_: usize, event| match event {
        Event::Progress(c) => {
            text.push_str(&c.text);
            ending = c.finish.or(ending);
            matched |= c.matched_stop.is_some();
            let tokens = c
                .logprobs
                .iter()
                .map(|l| json!({ "token": token_json(&state, l), "generated_text": null, "details": null }));
            let mut out = String::new();
            for token in tokens {
                out.extend(held.replace(token).map(|t| run::sse(&t)));
            }
            out
        }
        Event::Done(usage) => {
            let none = json!({ "token": { "id": 0, "text": "", "logprob": null, "special": true } });
            let mut last = held.take().unwrap_or(none);
            last["generated_text"] = json!(text);
            last["details"] = json!({ "finish_reason": finish(ending, matched), "prompt_tokens": usage.prompt_tokens,
                "generated_tokens": usage.completion_tokens, "seed": null });
            run::sse(&last)
        }
        _ => String::new(),
    };
    Ok(run::stream(vec![events], String::new(), each, String::new))
}

pub async fn info(state: Shared) -> HttpResponse {
    let waiting = state.engine.load().0;
    HttpResponse::Ok().json(json!({
        "model_id": state.base_id,
        "model_dtype": state.dtype,
        "model_device_type": state.device,
        "max_input_length": state.context - 1,
        "max_total_tokens": state.context,
        "waiting_requests": waiting,
        "version": env!("CARGO_PKG_VERSION"),
        "router": "loramux",
    }))
}
