//! GGUF files of every architecture and type of numbers, written as llama.cpp's converter does, against the equations on
//! candle's own dequantisation of them.

use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use loramux::Result;
use loramux::base::Base;
use serde_json::json;

use crate::common::*;
use crate::shapes::*;

/// All widths are whole blocks of 256, which the K formats need.
fn shape(family: &'static str) -> Shape {
    let variant = Variant { biased: family != "gpt2", activation: "silu", ..Variant::plain() };
    let shape = Shape {
        family,
        hidden: 256,
        intermediate: 256,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 90,
        tied: false,
        theta: 1e4,
        variant,
    };
    let with = |variant: Variant| Shape { variant, ..shape.clone() };
    let v = shape.variant.clone();
    match family {
        // A wide head, so that attention's scale is the head's and not the hidden size's share.
        "qwen3" => Shape { head_dim: 128, variant: Variant { biased: false, ..v }, ..shape },
        "gemma2" => Shape {
            head_dim: 128,
            tied: true,
            variant: Variant {
                biased: false,
                window: Some(9),
                cap: Some(30.0),
                query_scalar: 128.0,
                activation: "gelu_pytorch_tanh",
                ..v
            },
            ..shape
        },
        "phi3" => with(Variant { window: Some(20), ..v }),
        "gpt2" => Shape { kv_heads: 4, tied: true, ..with(Variant { biased: false, activation: "gelu_new", ..v }) },
        _ => shape,
    }
}

/// The name that llama.cpp's converter gives a tensor of Hugging Face's.
fn gguf_name(shape: &Shape, name: &str) -> String {
    let (module, kind) = name.rsplit_once('.').unwrap();
    let top = [(shape.embedding(), "token_embd"), (shape.final_norm(), "output_norm"), ("lm_head", "output")];
    let top = top.into_iter().chain([("transformer.wpe", "position_embd")]);
    if let Some((_, new)) = top.into_iter().find(|(old, _)| *old == module) {
        return format!("{new}.{kind}");
    }
    let mut parts = module.trim_start_matches("model.layers.").trim_start_matches("transformer.h.").splitn(2, '.');
    let (layer, path) = (parts.next().unwrap(), parts.next().unwrap());
    let new = match path {
        "input_layernorm" | "ln_1" => "attn_norm",
        "post_attention_layernorm" if shape.is("gemma2") => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" | "ln_2" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" | "attn.c_attn" => "attn_qkv",
        "self_attn.o_proj" | "attn.c_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" | "mlp.c_fc" => "ffn_up",
        "mlp.down_proj" | "mlp.c_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{new}.{kind}")
}

/// Rows of each head in the order of interleaved rope; `back` undoes it.
fn interleave(data: &[f32], rows: usize, head_dim: usize, back: bool) -> Vec<f32> {
    let (width, half) = (data.len() / rows, head_dim / 2);
    let source = |row: usize| {
        let (head, i) = (row / head_dim, row % head_dim);
        head * head_dim + if back { i % half * 2 + i / half } else { i % 2 * half + i / 2 }
    };
    (0..rows).flat_map(|row| data[source(row) * width..][..width].to_vec()).collect()
}

fn metadata(shape: &Shape) -> Vec<(String, Value)> {
    let arch = shape.family;
    let number = |n: usize| Value::U32(n as u32);
    let eps = if arch == "gpt2" { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
    let mut meta = vec![
        ("general.architecture".to_string(), Value::String(arch.into())),
        (format!("{arch}.embedding_length"), number(shape.hidden)),
        (format!("{arch}.feed_forward_length"), number(shape.intermediate)),
        (format!("{arch}.block_count"), number(shape.layers)),
        (format!("{arch}.context_length"), number(CONTEXT)),
        (format!("{arch}.attention.head_count"), number(shape.heads)),
        (format!("{arch}.attention.{eps}"), Value::F32(EPS as f32)),
        ("tokenizer.ggml.model".into(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Value::String("gpt-2".into())),
        ("tokenizer.ggml.merges".into(), Value::Array(vec![Value::String("a b".into())])),
        ("tokenizer.ggml.eos_token_id".into(), number(0)),
    ];
    let spelling = |i: usize| ["</s>", "a", "b", "ab"].get(i).map_or(format!("t{i}"), |t| t.to_string());
    let tokens = (0..shape.vocab).map(|i| Value::String(spelling(i)));
    meta.push(("tokenizer.ggml.tokens".into(), Value::Array(tokens.collect())));
    if arch != "gpt2" {
        meta.extend([
            (format!("{arch}.attention.head_count_kv"), number(shape.kv_heads)),
            (format!("{arch}.attention.key_length"), number(shape.head_dim)),
            (format!("{arch}.attention.value_length"), number(shape.head_dim)),
            (format!("{arch}.rope.freq_base"), Value::F32(shape.theta as f32)),
            (format!("{arch}.rope.dimension_count"), number((shape.head_dim as f64 * shape.variant.rotated) as usize)),
        ]);
    }
    if let Some(window) = shape.variant.window {
        meta.push((format!("{arch}.attention.sliding_window"), number(window)));
    }
    if let Some(cap) = shape.variant.cap {
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            meta.push((format!("{arch}.{key}"), Value::F32(cap as f32)));
        }
    }
    meta
}

/// Writes `tensors` in the form of GGUF, matrices as `dtype`, and gives back the numbers that are in it, in Hugging Face's
/// form.
fn write(
    path: &Path,
    shape: &Shape,
    tensors: &Tensors,
    dtype: GgmlDType,
    meta: &[(String, Value)],
    extra: &[(&str, Vec<f32>)],
) -> Tensors {
    let mut kept = Tensors::new();
    let mut written = vec![];
    for (name, (dims, data)) in tensors {
        let turned = shape.is("llama") && (name.contains("q_proj") || name.contains("k_proj"));
        let offset = shape.is("gemma2") && name.ends_with("norm.weight");
        let mut data = data.clone();
        if turned {
            data = interleave(&data, dims[0], shape.head_dim, false);
        }
        if offset {
            data.iter_mut().for_each(|x| *x += 1.0);
        }
        let tensor = Tensor::from_vec(data, dims.as_slice(), &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&tensor, if dims.len() == 2 { dtype } else { GgmlDType::F32 }).unwrap();
        let mut data: Vec<f32> = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        if turned {
            data = interleave(&data, dims[0], shape.head_dim, true);
        }
        if offset {
            data.iter_mut().for_each(|x| *x -= 1.0);
        }
        kept.insert(name.clone(), (dims.clone(), data));
        written.push((gguf_name(shape, name), stored));
    }
    for (name, data) in extra {
        let tensor = Tensor::from_slice(data, data.len(), &Device::Cpu).unwrap();
        written.push((name.to_string(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap()));
    }
    let meta: Vec<_> = meta.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let written: Vec<_> = written.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &meta, &written).unwrap();
    kept
}

fn open(path: &Path) -> Result<Base> {
    Base::open(path.to_str().unwrap())
}

const ARCHITECTURES: [&str; 6] = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"];

#[test]
fn every_architecture_in_every_type_equals_the_equations_on_the_files_numbers() {
    use GgmlDType::*;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for family in ARCHITECTURES {
        let shape = shape(family);
        let (tensors, meta, sequences) = (shape.tensors(7), metadata(&shape), three_sequences());
        let original = reference(&shape, &tensors, &sequences);
        for dtype in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let kept = write(&path, &shape, &tensors, dtype, &meta, &[]);
            let base = open(&path).unwrap();
            let want = reference(&shape, &kept, &sequences);
            for kernels in all_kernels() {
                let name = format!("{family} in {dtype:?} by {kernels:?}");
                let close = error(&mut runner(&base, kernels, None), &want, &sequences);
                assert!(close < TOLERANCE, "{name}: logits differ by {close}");
            }
            if dtype != F32 {
                let far = error(&mut runner(&base, all_kernels()[0], None), &original, &sequences);
                assert!(far > TOLERANCE, "{family} in {dtype:?}: it is no coarser than the model");
            }
        }
    }
}

#[test]
fn scaled_ropes_are_those_of_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let original = |arch: &str| (format!("{arch}.rope.scaling.original_context_length"), Value::U32(ORIGINAL as u32));
    let kind = |arch: &str, kind: &str| (format!("{arch}.rope.scaling.type"), Value::String(kind.into()));
    let factor = |arch: &str, x: f32| (format!("{arch}.rope.scaling.factor"), Value::F32(x));
    let check = |shape: &Shape, more: Vec<(String, Value)>, extra: &[(&str, Vec<f32>)]| {
        let tensors = shape.tensors(9);
        let meta = [metadata(shape), more].concat();
        let kept = write(&path, shape, &tensors, GgmlDType::F32, &meta, extra);
        let base = open(&path).unwrap();
        let want = reference(shape, &kept, &three_sequences());
        for kernels in all_kernels() {
            let close = error(&mut runner(&base, kernels, None), &want, &three_sequences());
            assert!(close < TOLERANCE, "{} {}: logits differ by {close}", shape.family, shape.variant.scaling);
        }
        base.config.context
    };
    let scaled = |family: &'static str, scaling: serde_json::Value| {
        let shape = shape(family);
        Shape { variant: Variant { scaling, ..shape.variant.clone() }, ..shape }
    };

    let linear = scaled("llama", json!({ "rope_type": "linear", "factor": 4.0 }));
    check(&linear, vec![kind("llama", "linear"), factor("llama", 4.0)], &[]);
    check(&linear, vec![("llama.rope.scale_linear".into(), Value::F32(4.0))], &[]);

    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0 });
    check(&scaled("qwen2", yarn), vec![kind("qwen2", "yarn"), factor("qwen2", 4.0), original("qwen2")], &[]);

    // The converter writes Llama 3.1's divisors out.
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    let llama3 = scaled("llama", llama3);
    let divisor = |i: usize| {
        let waves = ORIGINAL as f64 * llama3.theta.powf(-2.0 * i as f64 / 64.0) / std::f64::consts::TAU;
        let kept = ((waves - 1.0) / 3.0).clamp(0.0, 1.0);
        (1.0 / (kept + (1.0 - kept) / 8.0)) as f32
    };
    check(&llama3, vec![], &[("rope_freqs.weight", (0..32).map(divisor).collect())]);

    // Phi-3's files hold both sets of divisors and the factor that the converter computes.
    let (short, long) = ((0..24).map(|i| 1.0 + i as f32 / 8.0).collect::<Vec<_>>(), vec![5.0; 24]);
    let mut phi3 = scaled("phi3", json!({ "type": "longrope", "short_factor": short }));
    phi3.variant.rotated = 0.75;
    let attention = (1.0 + (CONTEXT as f64 / ORIGINAL as f64).ln() / (ORIGINAL as f64).ln()).sqrt() as f32;
    let factors = [("rope_factors_short.weight", short), ("rope_factors_long.weight", long)];
    let attention = ("phi3.rope.scaling.attn_factor".to_string(), Value::F32(attention));
    assert_eq!(check(&phi3, vec![original("phi3"), attention], &factors), ORIGINAL);
    assert_eq!(check(&phi3, vec![original("phi3")], &factors), ORIGINAL);
}

#[test]
fn tensors_that_do_not_belong_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let numbers = || vec![1.0; 256];
    let qwen3 = shape("qwen3");
    for (extra, words) in [
        (("blk.0.attn_sub_norm.weight", numbers()), ["blk.0.attn_sub_norm.weight", "qwen3"]),
        (("blk.1.attn_output.bias", numbers()), ["layers.1.self_attn.o_proj.bias", "no such bias"]),
        (("output_norm.bias", numbers()), ["model.norm.bias", "no such bias"]),
        (("position_embd.weight", numbers()), ["position_embd.weight", "qwen3"]),
        (("rope_freqs.weight", numbers()), ["rope_freqs.weight", "256"]),
    ] {
        write(&path, &qwen3, &qwen3.tensors(1), GgmlDType::F32, &metadata(&qwen3), &[extra]);
        let error = open(&path).err().unwrap().message;
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}
