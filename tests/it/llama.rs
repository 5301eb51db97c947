//! The tiny llama against transformers + PEFT: every adapter variant, every position, alone and mixed.

use std::collections::HashMap;
use std::sync::Arc;

use loramux::base::{Base, Kernels};
use loramux::engine::{Output, Runner, Task};
use loramux::lora::PackedAdapter;
use serde_json::Value;

use crate::common::*;

/// Folder of the fixtures, and its variants that generate.
const VARIANTS: [(&str, &[&str]); 2] = [
    (
        "llama",
        &[
            "qv_r4",
            "all_r8",
            "rslora_r8",
            "rank_alpha_pattern",
            "layers_1_only",
            "regex_targets",
            "all_linear",
            "exclude_down",
            "dora_r4",
            "lora_bias",
            "embed_and_head",
            "modules_to_save_norm",
        ],
    ),
    (
        "variants",
        &[
            "embed_dora",
            "lm_head",
            "lm_head_dora",
            "lm_head_bias",
            "tied_targets",
            "save_embed",
            "save_embed_tied",
            "save_lm_head",
            "save_both",
            "save_one_norm",
            "tokens",
            "tokens_apart",
            "resized",
            "resized_embed",
            "resized_tokens",
            "pissa_converted",
        ],
    ),
];

struct Expected {
    base: Base,
    prompts: Vec<Vec<u32>>,
    greedy: HashMap<String, Vec<Vec<u32>>>,
    logits: HashMap<String, candle_core::Tensor>,
}

impl Expected {
    /// Prompt `i` for a variant. Those with new tokens have some in their prompts, as `variants.py` says.
    fn prompt(&self, variant: &str, i: usize) -> Vec<u32> {
        let new = variant.starts_with("resized");
        let token = |(j, &token): (usize, &u32)| if new && j % 3 == 0 { 256 + j as u32 % 4 } else { token };
        self.prompts[i].iter().enumerate().map(token).collect()
    }
}

fn expected() -> Expected {
    let folder = fixtures().join("tiny");
    let json = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(folder.join(name).join("expected.json")).unwrap()).unwrap()
    };
    let tensors = |name: &str| {
        candle_core::safetensors::load(folder.join(name).join("expected.safetensors"), &candle_core::Device::Cpu)
            .unwrap()
    };
    let mut greedy: HashMap<_, _> = serde_json::from_value(json("llama")["greedy"].clone()).unwrap();
    greedy.extend(serde_json::from_value::<HashMap<_, _>>(json("variants")["greedy"].clone()).unwrap());
    let mut logits = tensors("llama");
    logits.extend(tensors("variants"));
    Expected {
        base: Base::open(folder.join("llama/base").to_str().unwrap()).unwrap(),
        prompts: serde_json::from_value(json("llama")["prompts"].clone()).unwrap(),
        greedy,
        logits,
    }
}

/// The base as `None`, then every variant.
fn adapters(base: &Base, kernels: Kernels) -> Vec<(&'static str, Option<Arc<PackedAdapter>>)> {
    let decoder = decoder(base, kernels, None);
    let load = |folder: &str, name: &'static str| {
        let path = fixtures().join("tiny").join(folder).join(format!("adapter_{name}"));
        let adapter = loramux::adapter::load(&path, &base.config, &base.id).unwrap().adapter;
        (name, Some(Arc::new(PackedAdapter::new(adapter, &decoder).unwrap())))
    };
    let variants = VARIANTS.iter().flat_map(|(folder, names)| names.iter().map(|name| load(folder, name)));
    [("base", None)].into_iter().chain(variants).collect()
}

#[test]
fn logits_at_every_position_alone_and_mixed() {
    let e = expected();
    for kernels in all_kernels() {
        let mut runner = Runner::new(decoder(&e.base, kernels, None), 4 << 20).unwrap();
        let all = adapters(&e.base, kernels);
        let prompts: Vec<Vec<Vec<u32>>> =
            all.iter().map(|(name, _)| (0..e.prompts.len()).map(|i| e.prompt(name, i)).collect()).collect();
        let mut mixed = Vec::new();
        for ((name, adapter), prompts) in all.iter().zip(&prompts) {
            for (i, prompt) in prompts.iter().enumerate() {
                mixed.push((
                    format!("{name}.logits.{i}"),
                    (prompt.as_slice(), adapter.clone(), Output::Logits(prompt.len())),
                ));
            }
        }
        let head = adapter(&e.base, &fixtures().join("tiny/llama/adapter_seqcls"), kernels);
        for (i, prompt) in e.prompts.iter().enumerate() {
            mixed.push((format!("x.seqcls.logits.{i}"), (prompt.as_slice(), Some(head.clone()), Output::Head)));
        }
        let work: Vec<_> = mixed.iter().map(|(_, w)| w.clone()).collect();
        let together = logits(&mut runner, &work);
        for ((name, work), together) in mixed.iter().zip(&together) {
            let want: Vec<f32> = e.logits[name].flatten_all().unwrap().to_vec1().unwrap();
            let difference = largest_difference(together, &want);
            assert!(difference < 1e-3, "{kernels:?}: {name} mixed differs by {difference}");
            let alone = &logits(&mut runner, std::slice::from_ref(work))[0];
            if let Kernels::Packed(_) = kernels {
                assert_eq!(alone, together, "{kernels:?}: {name} depends on what shares its batch");
            }
            let difference = largest_difference(alone, &want);
            assert!(difference < 1e-3, "{kernels:?}: {name} alone differs by {difference}");
        }
    }
}

#[tokio::test]
async fn greedy_tokens_alone_and_mixed() {
    let e = expected();
    for kernels in all_kernels() {
        let mut requests = Vec::new();
        let mut want = Vec::new();
        for (name, adapter) in adapters(&e.base, kernels) {
            for i in 0..e.prompts.len() {
                requests.push((e.prompt(name, i), adapter.clone(), Task::Generate(greedy(12))));
                want.push((name, e.greedy[name][i].clone()));
            }
        }
        // Chunks smaller than the prompts, and a cache that only preemption makes enough.
        for (kv_bytes, max_batch_tokens) in [(4 << 20, 512), (4 << 20, 7), (64 << 10, 16)] {
            let runner = SharedRunner::new(decoder(&e.base, kernels, None), kv_bytes);
            let together = answers(&engine(&e.base, &runner, max_batch_tokens), requests.clone()).await;
            for (got, (name, want)) in together.iter().zip(&want) {
                assert_eq!(got.tokens(), want, "{kernels:?}: {name}, {max_batch_tokens} tokens a step");
            }
            for (request, (name, want)) in requests.iter().zip(&want) {
                let alone = answer_alone(&e.base, &runner, request.clone()).await;
                assert_eq!(alone.tokens(), want, "{kernels:?}: {name} alone");
            }
        }
    }
}
