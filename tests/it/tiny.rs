//! Tiny models of every family against transformers + PEFT: every adapter variant, every position, alone and mixed.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use loramux::adapter::load;
use loramux::base::simd::Simd;
use loramux::base::{BLOCK, Base, Kernels};
use loramux::engine::{Computed, Draw, Edit, Model, Output, Runner, Task, Work};
use loramux::lora::PackedAdapter;
use serde_json::Value;

use crate::common::*;

/// Folder of the base with its adapters, and their names. More adapters are in `variants`, see `variants.py`.
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

const LLAMA_VARIANTS: [&str; 12] = [
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
];

struct Expected {
    base: Base,
    prompts: Vec<Vec<u32>>,
    /// By variant; its folder beside it.
    greedy: BTreeMap<String, (PathBuf, Vec<Vec<u32>>)>,
    logits: HashMap<String, Tensor>,
}

fn expected(model: &str, variants: &[&str]) -> Expected {
    let tiny = fixtures().join("tiny");
    let folder = tiny.join(model);
    let json = |folder: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap()
    };
    let (mut greedy, mut logits) = (BTreeMap::new(), HashMap::new());
    for folder in [folder.clone(), tiny.join("variants").join(model)] {
        if !folder.exists() {
            continue;
        }
        let all: BTreeMap<String, Value> = serde_json::from_value(json(&folder)["greedy"].clone()).unwrap();
        let own = folder != tiny.join(model);
        for (name, tokens) in
            all.into_iter().filter(|(name, _)| own || variants.contains(&name.as_str()) || name == "base")
        {
            let path = folder.join(format!("adapter_{name}"));
            greedy.insert(name, (path, serde_json::from_value(tokens).unwrap()));
        }
        logits.extend(candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap());
    }
    Expected {
        base: Base::open(folder.join("base").to_str().unwrap()).unwrap(),
        prompts: serde_json::from_value(json(&folder)["prompts"].clone()).unwrap(),
        greedy,
        logits,
    }
}

impl Expected {
    /// All variants; the base is `None`.
    fn adapters(&self, kernels: Kernels) -> Vec<(&str, Option<Arc<PackedAdapter>>)> {
        let decoder = decoder(&self.base, kernels, None);
        let load = |path: &Path| {
            let adapter = load(path, &self.base.config, &self.base.id).unwrap().adapter;
            Arc::new(PackedAdapter::new(adapter, &decoder).unwrap())
        };
        let all = self.greedy.iter();
        all.map(|(name, (path, _))| (name.as_str(), (name != "base").then(|| load(path)))).collect()
    }

    /// Prompt `i` for a variant. Those with new tokens have some in their prompts, as `variants.py` says.
    fn prompt(&self, variant: &str, i: usize) -> Vec<u32> {
        let new = variant.starts_with("resized");
        let token = |(j, &token): (usize, &u32)| if new && j % 3 == 0 { 256 + j as u32 % 4 } else { token };
        self.prompts[i].iter().enumerate().map(token).collect()
    }
}

#[test]
fn logits_at_every_position_alone_and_mixed() {
    for (model, variants, head) in FAMILIES {
        let e = expected(model, variants);
        for kernels in all_kernels() {
            let mut runner = Runner::new(decoder(&e.base, kernels, None), 8 << 20).unwrap();
            let all = e.adapters(kernels);
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
            let head = head.map(|head| fixtures().join("tiny").join(model).join(format!("adapter_{head}")));
            if let Some(head) = head.map(|path| adapter(&e.base, &path, kernels)) {
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
        let e = expected(model, variants);
        for kernels in all_kernels() {
            let mut requests = Vec::new();
            let mut want = Vec::new();
            for (name, adapter) in e.adapters(kernels) {
                for (i, tokens) in e.greedy[name].1.iter().enumerate() {
                    requests.push((e.prompt(name, i), adapter.clone(), Task::Generate(greedy(12))));
                    want.push((name, tokens.as_slice()));
                }
            }
            // Chunks smaller than the prompts, and a cache that only preemption makes enough.
            for (kv_bytes, max_batch_tokens) in [(4 << 20, 512), (4 << 20, 7), (128 << 10, 16)] {
                let runner = SharedRunner::new(decoder(&e.base, kernels, None), kv_bytes);
                let together = answers(&engine(&e.base, &runner, max_batch_tokens), requests.clone()).await;
                for (got, (name, want)) in together.iter().zip(&want) {
                    assert_eq!(got.tokens(), *want, "{model} by {kernels:?}: {name}, {max_batch_tokens} tokens a step");
                }
                for (request, (name, want)) in requests.iter().zip(&want) {
                    let alone = answer_alone(&e.base, &runner, request.clone()).await;
                    assert_eq!(alone.tokens(), *want, "{model} by {kernels:?}: {name} alone");
                }
            }
        }
    }
}

/// A step that is asked for tokens, logits and a head's classes at once gives what one gives that is asked for logits alone.
#[test]
fn a_model_draws_the_tokens_that_its_logits_give() {
    let kernels = [Kernels::Tensor, Kernels::Packed(Simd::detect())];
    for ((model, variants, _), kernels) in FAMILIES.into_iter().flat_map(|f| kernels.map(|kernels| (f, kernels))) {
        let e = expected(model, variants);
        let mut runner = Runner::new(decoder(&e.base, kernels, None), 8 << 20).unwrap();
        let head = fixtures().join("tiny").join(model).join("adapter_seqcls");
        let head = head.exists().then(|| adapter(&e.base, &head, kernels));
        let (mut next, mut work, mut draws) = (0, vec![], vec![]);
        for (i, (name, adapter)) in e.adapters(kernels).into_iter().enumerate() {
            let prompt = e.prompt(name, i % e.prompts.len());
            let mut add = |adapter: Option<Arc<PackedAdapter>>, output, draw: Option<Draw>| {
                let count = prompt.len().div_ceil(BLOCK) as u32;
                next += count;
                let blocks = (next - count..next).collect();
                work.push(Work { tokens: prompt.clone(), start: 0, blocks, adapter, output });
                draws.push(draw);
            };
            let plain = Draw {
                edits: vec![Edit { token: i as u32, bias: 3.0, seen: true, penalty: 0.5 }],
                repetition_penalty: 1.2,
                temperature: 0.8,
                top_p: 0.9,
                place: (1 << 52) + i as u64 * (1 << 48),
                ..Draw::default()
            };
            add(adapter.clone(), Output::LastLogits, (i % 3 != 1).then(|| plain.clone()));
            add(adapter.clone(), Output::Logits(2), None);
            add(adapter, Output::None, None);
            if let Some(head) = head.clone().filter(|_| !name.starts_with("resized")) {
                add(Some(head), Output::Head, None);
            }
        }
        let logits = runner.step(&work).unwrap();
        let computed = runner.step_and_draw(&work, &draws).unwrap();
        assert!(runner.draws() && draws.iter().any(Option::is_some));
        for ((mut logits, computed), draw) in logits.into_iter().zip(computed).zip(draws) {
            let want = match draw {
                Some(draw) => Computed::Token(Some(draw.token(&mut logits, &mut vec![]).unwrap())),
                None => Computed::Numbers(logits),
            };
            assert_eq!(computed, want, "{model}");
        }
    }
}

#[test]
fn modules_go_by_the_familys_names() {
    let e = expected("gpt2", &[]);
    let folder = fixtures().join("tiny/gpt2/adapter_all_r8");
    let summary = load(&folder, &e.base.config, "").unwrap().summary;
    assert_eq!(summary.target_modules, ["c_attn", "c_proj", "c_fc"]);
    let llama = expected("llama", &[]).base;
    let error = load(&folder, &llama.config, "").unwrap_err().message;
    assert!(error.contains("model.layers.0.self_attn.q_proj to model.layers.1.mlp.down_proj"), "{error}");

    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("adapter_model.safetensors"), copy.path().join("adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    for (table, expected) in [("wte", "is missing"), ("wpe", "not supported"), ("lm_head", "is missing")] {
        let config = config.replace("\"c_fc\"", &format!("\"{table}\""));
        std::fs::write(copy.path().join("adapter_config.json"), config).unwrap();
        let error = load(copy.path(), &e.base.config, "").unwrap_err().message;
        assert!(error.contains(table) && error.contains(expected), "{error}");
    }
}
