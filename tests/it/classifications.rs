//! BERT, and bases of every family that are classifications, against transformers and PEFT: a tiny model's logits; models,
//! adapters and texts made anew.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use candle_core::Device;
use loramux::base::Base;
use loramux::engine::{Output, Runner, Task};
use loramux::lora::PackedAdapter;
use serde_json::{Value, json};

use crate::common::*;
use crate::host::Server;

const VARIANTS: [&str; 3] = ["base", "qv_r4", "all_r8"];

/// A variant, which prompt, and the logits that it should give.
type Expected = (&'static str, usize, Vec<f32>);

/// The tiny model, its prompts, and what is expected of every variant.
fn tiny() -> (Base, Vec<Vec<u32>>, Vec<Expected>) {
    let folder = fixtures().join("tiny/bert");
    let json: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let prompts: Vec<Vec<u32>> = serde_json::from_value(json["prompts"].clone()).unwrap();
    let logits = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let mut expected = vec![];
    for variant in VARIANTS {
        for i in 0..prompts.len() {
            expected.push((variant, i, logits[&format!("{variant}.logits.{i}")].to_vec1().unwrap()));
        }
    }
    (Base::open(folder.join("base").to_str().unwrap()).unwrap(), prompts, expected)
}

fn variant(base: &Base, name: &str, kernels: loramux::base::Kernels) -> Option<Arc<PackedAdapter>> {
    let folder = fixtures().join(format!("tiny/bert/adapter_{name}"));
    (name != "base").then(|| adapter(base, &folder, kernels))
}

#[test]
fn logits_alone_and_mixed() {
    let (base, prompts, expected) = tiny();
    for kernels in all_kernels() {
        let runner = Runner::new(decoder(&base, kernels, None), 8 << 20).unwrap();
        let mut runner = runner.with_head(base.head.clone());
        let work = |(name, i, _): &Expected| (&prompts[*i][..], variant(&base, name, kernels), Output::Head);
        let work: Vec<_> = expected.iter().map(work).collect();
        let together = logits(&mut runner, &work);
        for ((work, together), (name, i, want)) in work.iter().zip(&together).zip(&expected) {
            let alone = &logits(&mut runner, std::slice::from_ref(work))[0];
            for (how, got) in [("mixed", together), ("alone", alone)] {
                let difference = largest_difference(got, want);
                assert!(difference < 1e-3, "{name} by {kernels:?}: prompt {i} {how} differs by {difference}");
            }
            if let loramux::base::Kernels::Packed(_) = kernels {
                assert_eq!(alone, together, "{name} by {kernels:?}: prompt {i} depends on what shares its batch");
            }
        }
    }
}

/// Steps of fewer tokens than a text has, and a cache that holds few texts.
#[tokio::test]
async fn texts_are_computed_whole_whatever_the_limits() {
    let (base, prompts, expected) = tiny();
    let kernels = loramux::base::Kernels::for_device(&Device::Cpu);
    for (kv_bytes, max_batch_tokens) in [(4 << 20, 512), (4 << 20, 7), (100 << 10, 50)] {
        let runner = Runner::new(decoder(&base, kernels, None), kv_bytes).unwrap().with_head(base.head.clone());
        let runner = SharedRunner::from(runner);
        let requests: Vec<_> = (0..5).flat_map(|_| &expected).collect();
        let submitted =
            requests.iter().map(|(name, i, _)| (prompts[*i].clone(), variant(&base, name, kernels), Task::Classify));
        let got = answers(&engine(&base, &runner, max_batch_tokens), submitted.collect()).await;
        for (got, (name, i, want)) in got.iter().zip(requests) {
            let difference = largest_difference(&got.logits, want);
            assert!(difference < 1e-3, "{name}: prompt {i} differs by {difference}, {max_batch_tokens} tokens a step");
            assert_eq!(got.cached, 0, "an encoder's tokens depend on what follows them");
        }
    }
}

#[tokio::test]
async fn an_encoder_only_classifies() {
    let base = fixtures().join("tiny/bert/base");
    let server = Server::start(base.to_str().unwrap(), &[]).await;
    let (status, answer) = server.post("/v1/generate", json!({ "prompt": "t5 t6" })).await;
    assert_eq!(status, 400, "{answer}");
    assert!(answer.to_string().contains("it classifies only"), "{answer}");
    let (status, answer) = server.post("/v1/classify", json!({ "input": "t5 t6" })).await;
    assert_eq!((status, answer["usage"]["prompt_tokens"].as_u64()), (200, Some(2)), "{answer}");
    let long = "t5 ".repeat(257);
    let (status, answer) = server.post("/v1/classify", json!({ "input": long })).await;
    assert_eq!(status, 400);
    assert!(answer.to_string().contains("257 tokens; the model's context holds 256"), "{answer}");
}

/// Models and adapters that `classifications.py` makes in `folder`, and what they say.
fn made_by_peft(folder: &Path) -> Vec<Value> {
    let mut python = Command::new(std::env::var("LORAMUX_TEST_PYTHON").unwrap_or_else(|_| "python3".into()));
    if let Ok(installed) = std::env::var("LORAMUX_TEST_PEFT") {
        python.env("PYTHONPATH", installed);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peft/classifications.py");
    let output = python.arg(script).arg(folder).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} (`make test` installs what it imports): {told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn say_what_transformers_and_peft_say() {
    let folder = tempfile::tempdir().unwrap();
    for model in tokio::task::block_in_place(|| made_by_peft(folder.path())) {
        let at = folder.path().join(model["name"].as_str().unwrap());
        let (base, adapters) = (at.join("base"), at.join("adapters"));
        let server = Server::start(base.to_str().unwrap(), &["--adapters", adapters.to_str().unwrap()]).await;
        for (adapter, expected) in model["probabilities"].as_object().unwrap() {
            let ask = async |input: &Value| {
                let mut body = json!({ "input": input });
                if !adapter.is_empty() {
                    body["adapter"] = json!(adapter);
                }
                let (status, answer) = server.post("/v1/classify", body).await;
                assert_eq!(status, 200, "{} {adapter}: {answer}", model["name"]);
                answer["results"].as_array().unwrap().clone()
            };
            let together = ask(&model["texts"]).await;
            let texts = model["texts"].as_array().unwrap();
            for ((text, got), want) in texts.iter().zip(&together).zip(expected.as_array().unwrap()) {
                let made_up = || (0..want.as_array().unwrap().len()).map(|i| format!("LABEL_{i}")).collect();
                let own = model["labels"].get(adapter).map(|names| serde_json::from_value(names.clone()).unwrap());
                let names: Vec<String> = own.unwrap_or_else(made_up);
                for (name, want) in names.iter().zip(want.as_array().unwrap()) {
                    let (got, want) = (got["scores"][name].as_f64().unwrap(), want.as_f64().unwrap());
                    assert!((got - want).abs() < 1e-3, "{} {adapter}, {text}: {name} {got}, not {want}", model["name"]);
                }
                assert_eq!(ask(text).await[0], *got, "{} {adapter}, {text}: alone and beside others", model["name"]);
            }
        }
    }
}
