//! The dialect of LoRAX and Text Generation Inference.

use std::collections::VecDeque;
use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::Shared;
use super::error::ApiError;
use super::fields::Fields;
use super::run::{self, Target, Window};
use crate::Result;
use crate::base::Tokenizer;
use crate::engine::{Detokenizer, Event, FinishReason, Generate, Task, TokenLogprob};

const REFUSED: [&str; 5] = ["watermark", "schema", "return_k_alternatives", "apply_chat_template", "top_n_tokens"];
/// What LoRAX calls the base in `adapter_id`, beside leaving it empty.
const BASE_ADAPTER: &str = "__base_model__";

struct Asked {
    target: Target,
    prompt: Vec<u32>,
    text: String,
    task: Generate,
    full_text: bool,
    details: bool,
    prefill: bool,
}

impl Asked {
    /// The seed for the answer's details, where it was given and had an effect.
    fn seed(&self) -> Option<u64> {
        self.task.sampling.seed.filter(|_| self.task.sampling.temperature > 0.0)
    }
}

async fn read(state: &Shared, http: &HttpRequest, f: &Fields) -> Result<Asked> {
    let text = f.text("inputs")?.ok_or_else(|| f.wrong("inputs", "is needed"))?;
    let p = f.object("parameters")?;
    p.refuse(&REFUSED, &[])?;
    if p.count("best_of")?.is_some_and(|n| n > 1) {
        return Err(p.wrong("best_of", "above 1 is not supported"));
    }
    if let Some(source) = p.text("adapter_source")?.filter(|s| s != "local") {
        return Err(p.wrong("adapter_source", format!("is {source:?}; supported: \"local\"")));
    }
    let mut sampling = run::sampling(&p, 1.0)?;
    // As in the original, nothing is sampled at temperature 0, nor unless do_sample or a parameter that has an effect asks for
    // it. LoRAX's client sends `do_sample: false` whatever else it asks for.
    let asks = sampling.temperature != 1.0 || sampling.top_k != 0 || sampling.top_p < 1.0 || sampling.typical_p < 1.0;
    if !p.flag("do_sample")?.unwrap_or(false) && !asks {
        sampling.temperature = 0.0;
    }
    let mut task = Generate {
        // As in LoRAX, up to the end of the context where the request does not say; TGI's client always says.
        max_tokens: p.count("max_new_tokens")?.unwrap_or(state.context),
        min_tokens: 0,
        sampling,
        stop: p.texts("stop")?.unwrap_or_default(),
        stop_tokens: vec![],
        // TGI's text ends with the stop sequence.
        include_stop: true,
        ignore_eos: p.flag("ignore_eos_token")?.unwrap_or(false),
        logprobs: Some(0),
        n: 1,
        grammar: None,
    };
    state.check_size(1, &task)?;
    let adapter = p.text("adapter_id")?.filter(|id| !id.is_empty() && id != BASE_ADAPTER);
    let target = state.target(http, &p, adapter.as_deref()).await?;
    task.grammar = state.grammar(&target, &p).await?;
    let mut prompt = state.encode(&target, text.clone(), run::prompt).await?;
    if let Some(keep) = p.count("truncate")? {
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
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

/// Tokens in a row as the answer has them. Their texts together are the generated text: the token that completes a
/// character has it all, those before it have nothing.
struct Tokens {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
}

impl Tokens {
    fn new(target: &Target) -> Self {
        Tokens { tokenizer: target.language.tokenizer.clone(), detokenizer: Detokenizer::default() }
    }

    fn json(&mut self, entry: &TokenLogprob) -> Value {
        let special = self.tokenizer.is_special(entry.token);
        let mut text = String::new();
        match special {
            true => text = run::token_text(&self.tokenizer, entry.token),
            false => self.detokenizer.push(self.tokenizer.token_bytes(entry.token), &mut text),
        }
        json!({ "id": entry.token, "text": text, "logprob": entry.logprob, "special": special,
            "alternative_tokens": null })
    }

    /// Nothing more comes: what is left of a character goes to the last token that is text.
    fn finish<'a>(&mut self, tokens: impl DoubleEndedIterator<Item = &'a mut Value>) {
        let mut rest = String::new();
        self.detokenizer.finish(&mut rest);
        if let Some(token) = tokens.rev().find(|token| token["special"] == false).filter(|_| !rest.is_empty()) {
            let text = token["text"].as_str().unwrap_or_default();
            token["text"] = json!(format!("{text}{rest}"));
        }
    }
}

fn finish(finish: Option<FinishReason>, matched: bool) -> &'static str {
    match finish {
        Some(FinishReason::Stop) if matched => "stop_sequence",
        Some(FinishReason::Stop) => "eos_token",
        _ => "length",
    }
}

async fn answer(state: &Shared, asked: Asked) -> Result<Value, ApiError> {
    let seed = asked.seed();
    let request = asked.target.request(asked.prompt.clone(), Task::Generate(asked.task));
    let all = &run::collect(Window::new(&state.engine, &asked.target, [request])?, 1, 1).await?[0];
    let choice = &all.choices[0];
    let text = if asked.full_text { format!("{}{}", asked.text, choice.text) } else { choice.text.clone() };
    let mut answer = json!({ "generated_text": text });
    if asked.details {
        let prefill = asked.prompt.iter().filter(|_| asked.prefill);
        let tokenizer = &asked.target.language.tokenizer;
        let prefill = prefill.map(|&t| json!({ "id": t, "text": run::token_text(tokenizer, t), "logprob": null }));
        let mut texts = Tokens::new(&asked.target);
        let mut tokens: Vec<Value> = choice.logprobs.iter().chain(&choice.end).map(|l| texts.json(l)).collect();
        texts.finish(tokens.iter_mut());
        answer["details"] = json!({
            "finish_reason": finish(choice.finish, choice.matched_stop.is_some()),
            "prompt_tokens": all.usage.prompt_tokens,
            "generated_tokens": all.usage.completion_tokens,
            "seed": seed,
            "prefill": prefill.collect::<Vec<_>>(),
            "tokens": tokens,
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
    let seed = asked.seed();
    let request = asked.target.request(asked.prompt, Task::Generate(asked.task));
    let window = Window::new(&state.engine, &asked.target, [request])?;
    let mut text = if asked.full_text { asked.text } else { String::new() };
    let mut tokens = Tokens::new(&asked.target);
    // Tokens that wait.
    let mut held: VecDeque<Value> = VecDeque::new();
    let (mut index, mut ending, mut matched) = (0, None, false);
    let event =
        |index: usize, token: Value| json!({ "index": index, "token": token, "generated_text": null, "details": null });
    let each = move |_: usize, new| match new {
        Event::Progress(c) => {
            text.push_str(&c.text);
            ending = c.finish.or(ending);
            matched |= c.matched_stop.is_some();
            // With an end token after it, the last token of the text waits too: it gets what is left of a character.
            let keep = 1 + usize::from(c.end.is_some());
            held.extend(c.logprobs.iter().chain(&c.end).map(|l| tokens.json(l)));
            let mut out = String::new();
            while held.len() > keep {
                index += 1;
                out.extend(held.pop_front().map(|token| run::sse(&event(index, token))));
            }
            out
        }
        Event::Done(usage) => {
            tokens.finish(held.iter_mut());
            let last =
                held.pop_back().unwrap_or_else(|| json!({ "id": 0, "text": "", "logprob": null, "special": true }));
            let mut out = String::new();
            for token in held.drain(..) {
                index += 1;
                out += &run::sse(&event(index, token));
            }
            let mut last = event(index + 1, last);
            last["generated_text"] = json!(text);
            last["details"] = json!({ "finish_reason": finish(ending, matched), "prompt_tokens": usage.prompt_tokens,
                "generated_tokens": usage.completion_tokens, "seed": seed });
            out + &run::sse(&last)
        }
        _ => String::new(),
    };
    Ok(run::stream(window, String::new(), each, String::new))
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
