//! Adapters in GGUF files, written as llama.cpp's `convert_lora_to_gguf.py` does, against the same in PEFT's.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use loramux::adapter::{Adapter, load};
use loramux::base::Base;

use serde_json::json;

use crate::common::*;
use crate::host::{Server, answer};

const ARCHITECTURE: &str = "llama";

fn base(model: &str) -> Base {
    Base::open(fixtures().join("tiny").join(model).join("base").to_str().unwrap()).unwrap()
}

fn metadata(architecture: &str, alpha: f32) -> Vec<(&'static str, Value)> {
    vec![
        ("general.type", Value::String("adapter".into())),
        ("general.architecture", Value::String(architecture.into())),
        ("adapter.type", Value::String("lora".into())),
        ("adapter.lora.alpha", Value::F32(alpha)),
    ]
}

fn write(path: &Path, metadata: &[(&str, Value)], tensors: &BTreeMap<String, Tensor>, dtype: GgmlDType) {
    let quantised: Vec<(&str, QTensor)> =
        tensors.iter().map(|(name, t)| (name.as_str(), QTensor::quantize(t, dtype).unwrap())).collect();
    let tensors: Vec<(&str, &QTensor)> = quantised.iter().map(|(name, t)| (*name, t)).collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// Rows of heads in the order of interleaved rope: the converter's `permute`.
fn permuted(t: &Tensor, heads: usize) -> Tensor {
    let (n, k) = t.dims2().unwrap();
    t.reshape((heads, 2, n / heads / 2, k)).unwrap().transpose(1, 2).unwrap().reshape((n, k)).unwrap()
}

/// The tensors of a PEFT adapter by the converter's names and in its order.
fn converted(folder: &Path, base: &Base) -> BTreeMap<String, Tensor> {
    let tensors = candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let mut all = BTreeMap::new();
    for (name, mut t) in tensors {
        if name.contains("base_layer") {
            continue;
        }
        let path = name.strip_prefix("base_model.model.").unwrap();
        if path.contains("q_proj.lora_B") {
            t = permuted(&t, base.config.heads);
        } else if path.contains("k_proj.lora_B") {
            t = permuted(&t, base.config.kv_heads);
        } else if path.contains("lora_embedding_A") {
            t = t.t().unwrap().contiguous().unwrap();
        }
        let swaps = [
            ("model.embed_tokens.lora_embedding_A", "token_embd.weight.lora_a"),
            ("model.embed_tokens.lora_embedding_B", "token_embd.weight.lora_b"),
            ("lora_A.weight", "weight.lora_a"),
            ("lora_B.weight", "weight.lora_b"),
            ("model.layers.", "blk."),
            ("model.norm", "output_norm"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ];
        all.insert(swaps.iter().fold(path.to_string(), |n, (from, to)| n.replace(from, to)), t);
    }
    all
}

fn read(path: &Path, base: &Base) -> loramux::Result<Adapter> {
    Ok(load(path, &base.config, "")?.adapter)
}

fn numbers(adapter: &Adapter) -> Vec<f32> {
    let pairs = adapter.pairs.values().chain(&adapter.embedding.pair);
    let pairs = pairs.flat_map(|p| p.a.iter().chain(&p.b).copied().chain([p.scale]).collect::<Vec<_>>());
    pairs.chain(adapter.norms.values().flat_map(|n| n.weight.clone().unwrap())).collect()
}

#[test]
fn a_gguf_file_is_the_adapter_it_was_made_of() {
    for (model, architecture) in [("llama", "llama"), ("mistral_window", "llama")] {
        let base = base(model);
        let variants: &[&str] = match model {
            "llama" => &["all_r8", "qv_r4", "embed_and_head", "modules_to_save_norm"],
            _ => &["all_r8", "qv_r4"],
        };
        for variant in variants {
            let peft = fixtures().join("tiny").join(model).join(format!("adapter_{variant}"));
            let alpha = if *variant == "all_r8" { 16.0 } else { 8.0 };
            let want = read(&peft, &base).unwrap();
            for dtype in [GgmlDType::F32, GgmlDType::F16] {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("any name.gguf");
                write(&path, &metadata(architecture, alpha), &converted(&peft, &base), dtype);
                let got = read(folder.path(), &base).unwrap();
                assert_eq!(got.pairs.len(), want.pairs.len());
                let difference = largest_difference(&numbers(&got), &numbers(&want));
                let most = if dtype == GgmlDType::F32 { 0.0 } else { 1e-3 };
                assert!(difference <= most, "{model} {variant} {dtype:?}: {difference}");
            }
        }
    }
}

#[test]
fn an_alpha_of_0_stands_for_a_scale_of_1() {
    let base = base("llama");
    let folder = tempfile::tempdir().unwrap();
    let tensors = converted(&fixtures().join("tiny/llama/adapter_qv_r4"), &base);
    write(&folder.path().join("x.gguf"), &metadata(ARCHITECTURE, 0.0), &tensors, GgmlDType::F32);
    assert!(read(folder.path(), &base).unwrap().pairs.values().all(|p| p.scale == 1.0));
}

#[test]
fn a_file_that_does_not_fit_is_refused_by_what_is_wrong() {
    let base = base("llama");
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("x.gguf");
    let tensors = converted(&fixtures().join("tiny/llama/adapter_qv_r4"), &base);
    let good = metadata(ARCHITECTURE, 8.0);
    let refused = |words: &str| {
        let error = read(folder.path(), &base).unwrap_err();
        assert!(error.kind == loramux::ErrorKind::Unprocessable && error.message.contains(words), "{words}: {error}");
    };
    type Change = fn(&mut Vec<(&'static str, Value)>);
    let changes: [(&str, Change); 6] = [
        ("general.type is \"model\"; expected \"adapter\"", |m| m[0].1 = Value::String("model".into())),
        ("general.architecture is \"rwkv\"", |m| m[1].1 = Value::String("rwkv".into())),
        ("general.architecture is \"qwen2\"; the base's is \"llama\"", |m| m[1].1 = Value::String("qwen2".into())),
        ("adapter.type is missing; expected \"lora\"", |m| drop(m.remove(2))),
        ("adapter.lora.alpha", |m| m[3].1 = Value::F32(f32::NAN)),
        ("activated LoRA", |m| m.push(("adapter.alora.invocation_tokens", Value::U32(1)))),
    ];
    for (words, change) in changes {
        let mut metadata = good.clone();
        change(&mut metadata);
        write(&path, &metadata, &tensors, GgmlDType::F32);
        refused(words);
    }
    type Damage = fn(&mut BTreeMap<String, Tensor>);
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let damages: [(&str, Damage); 5] = [
        ("model.layers.0.self_attn.q_proj.lora_A.weight is missing", |t| drop(t.remove("blk.0.attn_q.weight.lora_a"))),
        ("belongs to layer 7, but the base has the layers 0 to 1", |t| {
            let some = t["blk.0.attn_q.weight.lora_b"].clone();
            t.insert("blk.7.attn_q.weight.lora_b".into(), some);
        }),
        ("cls.output.weight", |t| {
            let some = t["blk.0.attn_q.weight.lora_b"].clone();
            t.insert("cls.output.weight.lora_a".into(), some);
        }),
        ("the value at [0, 0] is NaN", |t| {
            let some = t.get_mut("blk.1.attn_v.weight.lora_a").unwrap();
            *some = (&*some * f64::NAN).unwrap();
        }),
        ("it has no tensor that ends in .lora_b", |t| t.retain(|name, _| name.ends_with(".lora_a"))),
    ];
    for (words, damage) in damages {
        let mut tensors = tensors.clone();
        damage(&mut tensors);
        write(&path, &good, &tensors, GgmlDType::F32);
        refused(words);
    }
    let mut wrong = tensors.clone();
    wrong.insert("blk.0.attn_q.weight.lora_b".into(), zeros((62, 4)));
    write(&path, &good, &wrong, GgmlDType::F32);
    refused("has shape [62, 4]; expected [64, 4]");

    write(&path, &good, &tensors, GgmlDType::F32);
    let whole = std::fs::read(&path).unwrap();
    for end in [0, 3, 40, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..end]).unwrap();
        refused("adapter_model.gguf: GGUF");
    }
    std::fs::write(&path, &whole).unwrap();
    std::fs::write(folder.path().join("y.gguf"), &whole).unwrap();
    refused("two GGUF files, x.gguf and y.gguf");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_file_is_uploaded_as_it_is_or_in_a_form() {
    let model = fixtures().join("tiny/llama");
    let server = Server::start(&model.join("base").display().to_string(), &[]).await;
    let peft = model.join("adapter_qv_r4");
    assert_eq!(server.put_directory("peft", &peft).await.0, 201);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qv.gguf");
    write(&path, &metadata(ARCHITECTURE, 8.0), &converted(&peft, &base("llama")), GgmlDType::F32);
    let bytes = std::fs::read(&path).unwrap();

    let put = |name: &str| server.http.put(server.at(&format!("/v1/adapters/{name}")));
    let (status, plain) = answer(put("plain").body(bytes.clone())).await.unwrap();
    assert_eq!(status, 201, "{plain}");
    let part = reqwest::multipart::Part::bytes(bytes.clone()).file_name("qv-f32.gguf");
    let (status, form) =
        answer(put("form").multipart(reqwest::multipart::Form::new().part("weights", part))).await.unwrap();
    assert_eq!((status, &form["generation"]), (201, &plain["generation"]), "{form}");
    let ask = |adapter: &str| json!({ "adapter": adapter, "prompt": "t5 t6 t7", "max_tokens": 12, "logprobs": 3 });
    let (_, want) = server.post("/v1/generate", ask("peft")).await;
    for name in ["plain", "form"] {
        let (status, got) = server.post("/v1/generate", ask(name)).await;
        assert_eq!((status, &got["text"], &got["logprobs"]), (200, &want["text"], &want["logprobs"]), "{got}");
    }
    let (status, body) = answer(put("cut").body(bytes[..bytes.len() / 2].to_vec())).await.unwrap();
    assert_eq!(status, 422, "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("does not lie inside the file"), "{body}");
}
