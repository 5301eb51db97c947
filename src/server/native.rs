//! `/v1/generate` and `/v1/classify`.

use std::collections::HashMap;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};

use super::Shared;
use super::error::ApiError;
use super::fields::Fields;
use super::run::{self, Target, Window};
use crate::base::Tokenizer;
use crate::base::labels::softmax;
use crate::engine::{Event, Task, Usage};
use crate::{Error, Result};

/// Texts that one request may have scored: its inputs times its labels.
const MAX_SCORES: usize = 1 << 16;
/// Tokens a generation has where the request does not say.
const MAX_TOKENS: usize = 128;

pub type Query = web::Query<HashMap<String, String>>;

/// The adapter that body and query name.
fn adapter_name(f: &Fields, query: &Query) -> Result<Option<String>> {
    let (body, query) = (f.text("adapter")?, query.get("adapter").cloned());
    match (body, query) {
        (Some(a), Some(b)) if a != b => Err(f.wrong("adapter", format!("is {a:?} in the body and {b:?} in the query"))),
        (a, b) => Ok(a.or(b)),
    }
}

pub async fn generate(
    state: Shared,
    http: HttpRequest,
    query: Query,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let name = adapter_name(&f, &query)?;
    let mut task = run::generation(&f, 0.0, f.count("max_tokens")?.unwrap_or(MAX_TOKENS))?;
    task.logprobs = f.count("logprobs")?;
    if task.n != 1 {
        return Err(f.wrong("n", format!("is {}; this route gives 1", task.n)).into());
    }
    state.check_size(1, &task)?;
    let target = state.target(&http, &f, name.as_deref()).await?;
    task.grammar = state.grammar(&target, &f).await?;
    let prompt = match (f.text("prompt")?, f.list("messages")?) {
        (Some(prompt), None) => state.encode(&target, prompt, run::prompt).await?,
        (None, Some(_)) => state.chat_prompt(&target, &f, true).await?,
        (None, None) => return Err(f.wrong("prompt", "or messages is needed").into()),
        (Some(_), Some(_)) => return Err(f.wrong("prompt", "and messages exclude each other").into()),
    };
    let stream = f.flag("stream")?.unwrap_or(false);
    let logprobs = task.logprobs;
    let window = Window::new(&state.engine, &target, [target.request(prompt, Task::Generate(task))])?;
    let head = move |target: &Target| {
        let mut map = Map::new();
        map.insert("adapter".into(), json!(target.name()));
        map.insert("generation".into(), json!(target.generation()));
        map
    };
    let tokenizer = target.language.tokenizer.clone();
    let entries = move |list: &[crate::engine::TokenLogprob]| -> Value {
        list.iter().map(|l| run::logprob_json(&tokenizer, l, logprobs.unwrap_or(0))).collect()
    };
    if stream {
        let mut finish = None;
        let each = move |_: usize, event| match event {
            Event::Progress(choice) => {
                finish = choice.finish.or(finish);
                let mut chunk = json!({ "text": choice.text });
                if logprobs.is_some() && !choice.logprobs.is_empty() {
                    chunk["logprobs"] = entries(&choice.logprobs);
                }
                run::sse(&chunk)
            }
            Event::Done(usage) => {
                let mut last = head(&target);
                last.insert("text".into(), json!(""));
                last.insert("finish_reason".into(), json!(run::finish_text(finish)));
                last.insert("usage".into(), run::usage_json(&usage));
                run::sse(&Value::Object(last))
            }
            _ => String::new(),
        };
        return Ok(run::stream(window, String::new(), each, || "data: [DONE]\n\n".into()));
    }
    let all = &run::collect(window, 1, 1).await?[0];
    let choice = &all.choices[0];
    let mut answer = head(&target);
    answer.insert("text".into(), json!(choice.text));
    answer.insert("finish_reason".into(), json!(run::finish_text(choice.finish)));
    answer.insert("usage".into(), run::usage_json(&all.usage));
    if logprobs.is_some() {
        answer.insert("logprobs".into(), entries(&choice.logprobs));
    }
    Ok(HttpResponse::Ok().json(answer))
}

/// One input's answer: the likeliest label first, at most `top_k` in `scores`.
fn verdict(labels: &[String], logits: &[f32], top_k: usize) -> Value {
    let scores = softmax(logits);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let kept: Map<String, Value> = order.iter().take(top_k).map(|&i| (labels[i].clone(), json!(scores[i]))).collect();
    json!({ "label": labels[order[0]], "score": scores[order[0]], "scores": kept })
}

pub async fn classify(
    state: Shared,
    http: HttpRequest,
    query: Query,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let f = Fields::read(payload).await?;
    let name = adapter_name(&f, &query)?;
    let inputs = f.texts("input")?.ok_or_else(|| f.wrong("input", "is needed: a text or a list of texts"))?;
    if inputs.is_empty() {
        return Err(f.wrong("input", "is an empty list").into());
    }
    let top_k = f.count("top_k")?.unwrap_or(usize::MAX);
    if top_k == 0 {
        return Err(f.wrong("top_k", "is 0; expected 1 or more").into());
    }
    let asked = f.texts("labels")?;
    let target = state.target(&http, &f, name.as_deref()).await?;
    let named = target.clone();
    let head = target.adapter.as_ref().and_then(|(_, a)| a.labels.clone()).or(state.labels.clone());
    let mut usage = Usage::default();
    let count = inputs.len();
    let results: Vec<Value> = match (head, asked) {
        (Some(_), Some(_)) => {
            return Err(f
                .wrong("labels", "is for models without a classification head; this one's head has its own")
                .into());
        }
        (Some(labels), None) => {
            let prompts = state.encode_all(&target, inputs, Tokenizer::encode_for_head).await?;
            let requests = prompts.into_iter().map(move |prompt| target.request(prompt, Task::Classify));
            let answers = run::numbers(Window::new(&state.engine, &named, requests)?, count).await?;
            answers.iter().for_each(|(_, used)| run::add(&mut usage, used));
            answers.iter().map(|(logits, _)| verdict(&labels, logits, top_k)).collect()
        }
        (None, Some(labels)) => {
            if labels.len() < 2 || labels.iter().any(String::is_empty) {
                return Err(f.wrong("labels", "needs two or more texts, none empty").into());
            }
            let scores = count.saturating_mul(labels.len());
            if scores > MAX_SCORES {
                let what = format!("times the inputs are {scores} texts to score; the limit is {MAX_SCORES}");
                return Err(f.wrong("labels", what).into());
            }
            if inputs.iter().any(String::is_empty) {
                return Err(f.wrong("input", "has an empty text, which no label can continue").into());
            }
            let prompts = state.encode_all(&target, inputs, run::prompt).await?;
            let endings = state.encode_all(&target, labels.clone(), run::continuation).await?;
            let ways = labels.len();
            let requests = (0..scores).map(move |i| {
                let (prompt, ending) = (&prompts[i / ways], &endings[i % ways]);
                target.request([&prompt[..], ending].concat(), Task::Score { from: prompt.len(), top: 0 })
            });
            let answers = run::numbers(Window::new(&state.engine, &named, requests)?, scores).await?;
            answers.iter().for_each(|(_, used)| run::add(&mut usage, used));
            // The mean, so that a label of many tokens is not less likely for its length alone.
            let mean = |logprobs: &[f32]| logprobs.iter().sum::<f32>() / logprobs.len().max(1) as f32;
            let logits: Vec<f32> = answers.iter().map(|(logprobs, _)| mean(logprobs)).collect();
            logits.chunks(ways).map(|logits| verdict(&labels, logits, top_k)).collect()
        }
        (None, None) => {
            let who = target.name().map_or("the base model".to_string(), |n| format!("adapter {n:?}"));
            let what =
                format!("{who} has no classification head; send labels: [text, ...] to score texts as continuations");
            return Err(Error::bad_request(what).param("labels").into());
        }
    };
    Ok(HttpResponse::Ok().json(json!({
        "adapter": named.name(),
        "generation": named.generation(),
        "results": results,
        "usage": run::usage_json(&usage),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_likeliest_label() {
        let labels = ["a", "b", "c"].map(String::from);
        let v = verdict(&labels, &[1.0, 3.0, 3.0], 2);
        assert_eq!(v["label"], "b");
        assert_eq!(v["scores"].as_object().unwrap().len(), 2);
        assert!((v["score"].as_f64().unwrap() - 0.4683).abs() < 1e-3, "{v}");
    }
}
