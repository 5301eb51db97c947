//! Tiny models of every family against transformers + PEFT: every adapter variant, every position, alone and mixed.

use std::collections::HashMap;
use std::sync::Arc;

use loramux::adapter::load;
use loramux::base::{Base, Kernels};
use loramux::engine::{Output, Runner, Task};
use loramux::lora::PackedAdapter;
use serde_json::Value;

use crate::common::*;

const FAMILIES: [(&str, &[&str], Option<&str>); 8] = [
    ("llama", &LLAMA_VARIANTS, Some("seqcls")),
    ("llama3_rope_untied", &VARIANTS, Some("seqcls")),
    ("mistral_window", &VARIANTS, Some("seqcls")),
    ("qwen2", &VARIANTS, Some("seqcls")),
    ("qwen3", &VARIANTS, Some("seqcls")),
    ("gemma2", &VARIANTS, Some("seqcls")),
    ("phi3", &VARIANTS, Some("seqcls")),
    ("gpt2", &VARIANTS, None),
];

const VARIANTS: [&str; 2] = ["qv_r4", "all_r8"];

const LLAMA_VARIANTS: [&str; 8] = [
    "qv_r4",
    "all_r8",
    "rslora_r8",
    "rank_alpha_pattern",
    "layers_1_only",
    "regex_targets",
    "all_linear",
    "exclude_down",
];

struct Expected {
    model: &'static str,
    base: Base,
    prompts: Vec<Vec<u32>>,
    greedy: Value,
    logits: HashMap<String, candle_core::Tensor>,
}

fn expected(model: &'static str) -> Expected {
    let folder = fixtures().join("tiny").join(model);
    let json: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    Expected {
        model,
        base: Base::open(folder.join("base").to_str().unwrap()).unwrap(),
        prompts: serde_json::from_value(json["prompts"].clone()).unwrap(),
        greedy: json["greedy"].clone(),
        logits: candle_core::safetensors::load(folder.join("expected.safetensors"), &candle_core::Device::Cpu).unwrap(),
    }
}

impl Expected {
    fn adapter(&self, variant: &str, kernels: Kernels) -> Arc<PackedAdapter> {
        adapter(&self.base, &fixtures().join("tiny").join(self.model).join(format!("adapter_{variant}")), kernels)
    }

    /// The base as `None`, then every variant.
    fn adapters<'a>(&self, variants: &[&'a str], kernels: Kernels) -> Vec<(&'a str, Option<Arc<PackedAdapter>>)> {
        let load = |name: &&'a str| (*name, Some(self.adapter(name, kernels)));
        [("base", None)].into_iter().chain(variants.iter().map(load)).collect()
    }
}

#[test]
fn logits_at_every_position_alone_and_mixed() {
    for (model, variants, head) in FAMILIES {
        let e = expected(model);
        for kernels in all_kernels() {
            let mut runner = Runner::new(decoder(&e.base, kernels, None), 8 << 20).unwrap();
            let mut mixed = Vec::new();
            for (name, adapter) in &e.adapters(variants, kernels) {
                for (i, prompt) in e.prompts.iter().enumerate() {
                    mixed.push((
                        format!("{name}.logits.{i}"),
                        (prompt.as_slice(), adapter.clone(), Output::Logits(prompt.len())),
                    ));
                }
            }
            if let Some(head) = head.map(|head| e.adapter(head, kernels)) {
                for (i, prompt) in e.prompts.iter().enumerate() {
                    mixed.push((format!("x.seqcls.logits.{i}"), (prompt.as_slice(), Some(head.clone()), Output::Head)));
                }
            }
            let work: Vec<_> = mixed.iter().map(|(_, w)| w.clone()).collect();
            let together = logits(&mut runner, &work);
            for ((name, work), together) in mixed.iter().zip(&together) {
                let name = format!("{model} by {kernels:?}: {name}");
                let want: Vec<f32> =
                    e.logits[name.rsplit(' ').next().unwrap()].flatten_all().unwrap().to_vec1().unwrap();
                let difference = largest_difference(together, &want);
                assert!(difference < 1e-3, "{name} mixed differs by {difference}");
                let alone = &logits(&mut runner, std::slice::from_ref(work))[0];
                if let Kernels::Packed(_) = kernels {
                    assert_eq!(alone, together, "{name} depends on what shares its batch");
                }
                let difference = largest_difference(alone, &want);
                assert!(difference < 1e-3, "{name} alone differs by {difference}");
            }
        }
    }
}

#[tokio::test]
async fn greedy_tokens_alone_and_mixed() {
    for (model, variants, _) in FAMILIES {
        let e = expected(model);
        for kernels in all_kernels() {
            let mut requests = Vec::new();
            let mut want = Vec::new();
            for (name, adapter) in e.adapters(variants, kernels) {
                for (i, prompt) in e.prompts.iter().enumerate() {
                    requests.push((prompt.clone(), adapter.clone(), Task::Generate(greedy(12))));
                    want.push((name, serde_json::from_value::<Vec<u32>>(e.greedy[name][i].clone()).unwrap()));
                }
            }
            // Chunks smaller than the prompts, and a cache that only preemption makes enough.
            for (kv_bytes, max_batch_tokens) in [(4 << 20, 512), (4 << 20, 7), (128 << 10, 16)] {
                let runner = SharedRunner::new(decoder(&e.base, kernels, None), kv_bytes);
                let together = answers(&engine(&e.base, &runner, max_batch_tokens), requests.clone()).await;
                for (got, (name, want)) in together.iter().zip(&want) {
                    assert_eq!(got.tokens(), want, "{model} by {kernels:?}: {name}, {max_batch_tokens} tokens a step");
                }
                for (request, (name, want)) in requests.iter().zip(&want) {
                    let alone = answer_alone(&e.base, &runner, request.clone()).await;
                    assert_eq!(alone.tokens(), want, "{model} by {kernels:?}: {name} alone");
                }
            }
        }
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let e = expected("llama");
    for (variant, name) in [
        ("dora_r4", "use_dora"),
        ("lora_bias", "lora_bias"),
        ("embed_and_head", "embed_tokens"),
        ("modules_to_save_norm", "norm"),
    ] {
        let error =
            load(&fixtures().join(format!("tiny/llama/adapter_{variant}")), &e.base.config, "tiny").unwrap_err();
        assert!(error.message.contains(name), "{variant}: {error}");
    }
}

#[test]
fn modules_go_by_the_familys_names() {
    let e = expected("gpt2");
    let folder = fixtures().join("tiny/gpt2/adapter_all_r8");
    let summary = load(&folder, &e.base.config, "").unwrap().summary;
    assert_eq!(summary.target_modules, ["c_attn", "c_proj", "c_fc"]);
    let llama = expected("llama").base;
    let error = load(&folder, &llama.config, "").unwrap_err().message;
    assert!(error.contains("model.layers.0.self_attn.q_proj to model.layers.1.mlp.down_proj"), "{error}");

    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("adapter_model.safetensors"), copy.path().join("adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    for table in ["wte", "wpe", "lm_head"] {
        let config = config.replace("\"c_fc\"", &format!("\"{table}\""));
        std::fs::write(copy.path().join("adapter_config.json"), config).unwrap();
        let error = load(copy.path(), &e.base.config, "").unwrap_err().message;
        assert!(error.contains(table) && error.contains("not supported"), "{error}");
    }
}
