//! `loramux generate` and `loramux classify`: the engine without the server.

use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::args::{ClassifyArgs, GenerateArgs, ModelArgs};
use super::host::{Host, Limits};
use crate::base::Language;
use crate::base::labels::softmax;
use crate::engine::{Client, Event, Generate, Request, Sampling, Task};
use crate::lora::PackedAdapter;
use crate::{Error, Result, output};

pub(super) type NamedAdapter = (Arc<str>, Arc<PackedAdapter>);

/// The base, and the adapter by name, or by path and then read where it lies. The store is an empty one that goes with
/// the returned folder.
pub(super) async fn start(
    args: &ModelArgs,
    adapter: Option<&str>,
) -> Result<(Host, Option<NamedAdapter>, tempfile::TempDir)> {
    let store = tempfile::tempdir()?;
    let limits = Limits {
        store: store.path().join("store"),
        max_sequences: 64,
        max_batch_tokens: 512,
        max_prefill_tokens: None,
        max_queue: 1 << 20,
        tenant_slowdown: f64::INFINITY,
        max_upload: u64::MAX,
        uploaded_templates: false,
        sources: vec![],
        source_refresh: Duration::MAX,
        source_cache: 0,
    };
    let host = Host::start(args, limits)?;
    let Some(name) = adapter else { return Ok((host, None, store)) };
    let path = Path::new(name);
    let packed = if crate::adapter::is_adapter(path) {
        let loaded = crate::adapter::load(path, host.decoder.config(), &host.base_id)?;
        let packed = PackedAdapter::new(loaded.adapter, &host.decoder)?;
        let own = loaded.language.map_or(Ok(None), |own| own.over(&host.language))?;
        Arc::new(packed.with_language(own))
    } else {
        host.registry.acquire(name).await?
    };
    Ok((host, Some((name.into(), packed)), store))
}

/// The adapter's own, or the base's.
fn language(host: &Host, adapter: &Option<NamedAdapter>) -> Language {
    let own = adapter.as_ref().and_then(|(_, adapter)| adapter.language.clone());
    own.unwrap_or_else(|| host.language.clone())
}

pub async fn generate(args: GenerateArgs) -> Result<()> {
    let (host, adapter, _store) = start(&args.model, args.adapter.as_deref()).await?;
    let mut text = args.prompt;
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text)?;
    }
    let language = language(&host, &adapter);
    let prompt = if args.chat {
        let chat = language.chat.as_ref().ok_or_else(|| Error::bad_request("the model has no chat template"))?;
        let text = chat.render(&[json!({ "role": "user", "content": text })], true)?;
        language.tokenizer.encode(&text, false)?
    } else {
        language.tokenizer.encode(&text, true)?
    };
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        ..Sampling::default()
    };
    let task = Task::Generate(Generate {
        max_tokens: args.max_tokens,
        min_tokens: 0,
        sampling,
        stop: args.stop,
        stop_tokens: vec![],
        include_stop: false,
        ignore_eos: false,
        logprobs: None,
        n: 1,
        grammar: None,
    });
    let mut events = host.engine.submit(Request { client: Client::default(), adapter, prompt, task })?;
    while let Some(event) = events.recv().await {
        match event {
            Event::Progress(choice) => output::part(choice.text)?,
            Event::Failed(e) => return Err(e),
            Event::Done(usage) => {
                output::line("")?;
                tracing::info!("{} prompt tokens, {} generated", usage.prompt_tokens, usage.completion_tokens);
            }
            Event::Classified { .. } | Event::Scored { .. } => {}
        }
    }
    Ok(())
}

pub async fn classify(args: ClassifyArgs) -> Result<()> {
    let (host, adapter, _store) = start(&args.model, args.adapter.as_deref()).await?;
    let labels = adapter.as_ref().and_then(|(_, a)| a.labels.clone()).or(host.labels.clone());
    let labels = labels
        .ok_or_else(|| Error::bad_request("there is no classification head, neither the adapter's nor the base's"))?;
    let inputs = match args.inputs.is_empty() {
        true => std::io::stdin().lock().lines().collect::<Result<_, _>>()?,
        false => args.inputs,
    };
    let language = language(&host, &adapter);
    let submit = |text: &String| {
        let prompt = language.tokenizer.encode_for_head(text)?;
        host.engine.submit(Request {
            client: Client::default(),
            adapter: adapter.clone(),
            prompt,
            task: Task::Classify,
        })
    };
    let answers = inputs.iter().map(submit).collect::<Result<Vec<_>>>()?;
    for (text, mut events) in inputs.iter().zip(answers) {
        match events.recv().await {
            Some(Event::Classified { logits, .. }) => {
                let scores = softmax(&logits);
                let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0);
                let all: serde_json::Map<_, _> = labels.iter().cloned().zip(scores.iter().map(|&s| json!(s))).collect();
                let answer = json!({ "input": text, "label": labels[best], "score": scores[best], "scores": all });
                output::line(answer)?;
            }
            Some(Event::Failed(e)) => return Err(e),
            other => return Err(Error::internal(format!("unexpected answer {other:?}"))),
        }
    }
    Ok(())
}
