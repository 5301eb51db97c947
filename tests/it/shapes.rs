//! Models of many shapes and formats against a decoder written out in f64.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use half::{bf16, f16};
use loramux::base::matmul::Format;
use loramux::base::simd::GROUP;
use loramux::base::{BLOCK, Base, Decoder, DecoderOptions, Kernels};
use loramux::engine::{Model, Output, Runner, Work};
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::common::*;

#[derive(Debug, Clone)]
struct Shape {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    tied: bool,
    theta: f64,
}

/// By name: shape and numbers.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

const EPS: f64 = 1e-5;
/// Of f32's sums; logits here are around 1, and the differences seen are below 1e-5.
const TOLERANCE: f64 = 1e-4;

/// Uniform in -1 to 1, of no period that a test could meet.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl Shape {
    /// Matrices whose outputs have a variance near 1, and norms around 1.
    fn tensors(&self, seed: u64) -> Tensors {
        let mut noise = noise(seed);
        let mut tensors = Tensors::new();
        let mut matrix = |name: String, n: usize, k: usize| {
            let scale = (3.0 / k as f32).sqrt();
            tensors.insert(name, (vec![n, k], (0..n * k).map(|_| scale * noise()).collect()));
        };
        matrix("model.embed_tokens.weight".into(), self.vocab, self.hidden);
        if !self.tied {
            matrix("lm_head.weight".into(), self.vocab, self.hidden);
        }
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        for layer in 0..self.layers {
            for (name, n, k) in [
                ("self_attn.q_proj", q, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, q),
                ("mlp.gate_proj", self.intermediate, self.hidden),
                ("mlp.up_proj", self.intermediate, self.hidden),
                ("mlp.down_proj", self.hidden, self.intermediate),
            ] {
                matrix(format!("model.layers.{layer}.{name}.weight"), n, k);
            }
        }
        let norms = ["input_layernorm", "post_attention_layernorm"];
        let norms = (0..self.layers).flat_map(|l| norms.map(|norm| format!("model.layers.{l}.{norm}.weight")));
        for name in norms.chain(["model.norm.weight".into()]) {
            tensors.insert(name, (vec![self.hidden], (0..self.hidden).map(|_| 1.0 + noise() / 2.0).collect()));
        }
        tensors
    }

    fn open(&self, tensors: &Tensors, dtype: Dtype) -> Base {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({
            "model_type": "llama", "vocab_size": self.vocab, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "rms_norm_eps": EPS, "rope_theta": self.theta, "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let tokenizer = fixtures().join("tiny/llama/base/tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
        let bytes = |x: &f32| match dtype {
            Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let stored: Vec<_> = tensors
            .iter()
            .map(|(name, (shape, data))| (name, shape.clone(), data.iter().flat_map(bytes).collect::<Vec<u8>>()))
            .collect();
        let views = stored.iter().map(|(name, s, bytes)| (name, TensorView::new(dtype, s.clone(), bytes).unwrap()));
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        Base::open(folder.path().to_str().unwrap()).unwrap()
    }

    /// Logits at every position: Llama's equations, one number after the other.
    fn logits(&self, tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
        let weight = |name: &str| &tensors[name].1;
        let row = |name: &str, row: usize, width: usize| -> Vec<f64> {
            weight(name)[row * width..][..width].iter().map(|&w| f64::from(w)).collect()
        };
        let multiply = |name: &str, x: &[f64]| -> Vec<f64> {
            let rows = weight(name).chunks_exact(x.len());
            rows.map(|w| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
        };
        let norm = |name: &str, x: &[f64]| -> Vec<f64> {
            let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + EPS).sqrt();
            x.iter().zip(weight(name)).map(|(x, &w)| x / scale * f64::from(w)).collect()
        };
        let rotate = |head: &[f64], position: usize| -> Vec<f64> {
            let half = head.len() / 2;
            let turn = |i: usize| {
                let angle = position as f64 * self.theta.powf(-2.0 * (i % half) as f64 / head.len() as f64);
                let other = if i < half { -head[i + half] } else { head[i - half] };
                head[i] * angle.cos() + other * angle.sin()
            };
            (0..head.len()).map(turn).collect()
        };
        let add = |x: &mut [f64], y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        let d = self.head_dim;
        let mut xs: Vec<Vec<f64>> =
            tokens.iter().map(|&t| row("model.embed_tokens.weight", t as usize, self.hidden)).collect();
        for l in 0..self.layers {
            let name = |module: &str| format!("model.layers.{l}.{module}.weight");
            // Per position, then per head.
            let (mut keys, mut values): (Vec<Vec<Vec<f64>>>, Vec<Vec<f64>>) = (vec![], vec![]);
            for (position, x) in xs.iter_mut().enumerate() {
                let h = norm(&name("input_layernorm"), x);
                let turned = |module: &str| -> Vec<Vec<f64>> {
                    multiply(&name(module), &h).chunks_exact(d).map(|head| rotate(head, position)).collect()
                };
                keys.push(turned("self_attn.k_proj"));
                values.push(multiply(&name("self_attn.v_proj"), &h));
                let mut out = vec![];
                for (head, q) in turned("self_attn.q_proj").iter().enumerate() {
                    let kv = head / (self.heads / self.kv_heads);
                    let score = |k: &Vec<Vec<f64>>| q.iter().zip(&k[kv]).map(|(q, k)| q * k).sum::<f64>();
                    let weights: Vec<f64> = keys.iter().map(|k| (score(k) / (d as f64).sqrt()).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    out.extend(
                        (0..d).map(|i| weights.iter().zip(&values).map(|(w, v)| w / sum * v[kv * d + i]).sum::<f64>()),
                    );
                }
                add(x, multiply(&name("self_attn.o_proj"), &out));
                let h = norm(&name("post_attention_layernorm"), x);
                let (gate, up) = (multiply(&name("mlp.gate_proj"), &h), multiply(&name("mlp.up_proj"), &h));
                let h: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(x, multiply(&name("mlp.down_proj"), &h));
            }
        }
        let head = if self.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        xs.iter().flat_map(|x| multiply(head, &norm("model.norm.weight", x))).collect()
    }
}

/// Logits at every position of every sequence, of `(tokens, cut)`: in two steps, the second of which begins at `cut`. The
/// blocks of the sequences are mixed.
fn run(runner: &mut Runner, sequences: &[(Vec<u32>, usize)]) -> Vec<Vec<f32>> {
    let count = sequences.len() as u32;
    let mut all = vec![vec![]; sequences.len()];
    for second in [false, true] {
        let parts = sequences.iter().enumerate().map(|(i, (tokens, cut))| {
            let range = if second { *cut..tokens.len() } else { 0..*cut };
            let blocks = (0..tokens.len().div_ceil(BLOCK) as u32).map(|b| b * count + i as u32).collect();
            let (start, output) = (range.start, Output::Logits(range.len()));
            (i, Work { tokens: tokens[range].to_vec(), start, blocks, adapter: None, output })
        });
        let (which, work): (Vec<usize>, Vec<Work>) = parts.filter(|(_, w)| !w.tokens.is_empty()).unzip();
        if work.is_empty() {
            continue; // Every step of the engine has work.
        }
        for (i, logits) in which.into_iter().zip(runner.step(&work).unwrap()) {
            all[i].extend(logits);
        }
    }
    all
}

/// Largest difference from the reference, over all sequences.
fn error(runner: &mut Runner, shape: &Shape, reference: &Tensors, sequences: &[(Vec<u32>, usize)]) -> f64 {
    let mut worst = 0.0f64;
    for ((tokens, _), got) in sequences.iter().zip(run(runner, sequences)) {
        let want = shape.logits(reference, tokens);
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!(got.is_finite());
            worst = worst.max((f64::from(*got) - want).abs());
        }
    }
    worst
}

fn runner(base: &Base, kernels: Kernels, format: Option<Format>) -> Runner {
    Runner::new(decoder(base, kernels, format), 8 << 20).unwrap()
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let sizes = (4usize..100, 1usize..100, 1usize..4, 2usize..150);
    let heads = (1usize..5, 1usize..5, 1usize..40);
    (sizes, heads, prop::bool::ANY, prop_oneof![Just(1e4), Just(5e5)]).prop_map(
        |((hidden, intermediate, layers, vocab), (kv_heads, group, half), tied, theta)| Shape {
            hidden,
            intermediate,
            layers,
            heads: kv_heads * group,
            kv_heads,
            head_dim: 2 * half,
            vocab,
            tied,
            theta,
        },
    )
}

/// Up to three sequences, each cut somewhere; the second part may be a single token.
fn any_sequences() -> impl Strategy<Value = Vec<(Vec<u32>, usize)>> {
    let sequence = (prop::collection::vec(any::<u32>(), 1..40), any::<prop::sample::Index>())
        .prop_map(|(tokens, cut)| (tokens.clone(), cut.index(tokens.len() + 1)));
    prop::collection::vec(sequence, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_shape_equals_the_equations(shape in any_shape(), mut sequences in any_sequences(), seed: u64) {
        sequences.iter_mut().for_each(|(tokens, _)| tokens.iter_mut().for_each(|t| *t %= shape.vocab as u32));
        let tensors = shape.tensors(seed);
        let base = shape.open(&tensors, Dtype::F32);
        for kernels in all_kernels() {
            let error = error(&mut runner(&base, kernels, None), &shape, &tensors, &sequences);
            prop_assert!(error < TOLERANCE, "{kernels:?}: logits differ by {error}");
        }
    }
}

/// The number that stands in a format for each of a row's.
fn rounded(row: &[f32], format: Format) -> Vec<f32> {
    let whole_groups = row.len().is_multiple_of(GROUP);
    match format {
        Format::F32 => row.to_vec(),
        Format::F16 => row.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
        Format::Q8 if whole_groups => {
            let group = |group: &[f32]| {
                let scale = group.iter().fold(0.0, |max, x| x.abs().max(max)) / 127.0;
                group.iter().map(|x| (x / scale).round() * scale).collect::<Vec<_>>()
            };
            row.chunks(GROUP).flat_map(group).collect()
        }
        Format::Q4 if whole_groups => {
            let group = |group: &[f32]| {
                let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (x.min(l), x.max(h)));
                let scale = (high - low) / 15.0;
                group.iter().map(|x| ((x - low) / scale).round() * scale + low).collect::<Vec<_>>()
            };
            row.chunks(GROUP).flat_map(group).collect()
        }
        _ => row.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
    }
}

/// Its inputs of `down` and `o` are no whole groups, so these stay out of the quantised formats.
const UNEVEN: Shape = Shape {
    hidden: 96,
    intermediate: 80,
    layers: 2,
    heads: 6,
    kv_heads: 2,
    head_dim: 24,
    vocab: 90,
    tied: true,
    theta: 1e4,
};

fn three_sequences() -> [(Vec<u32>, usize); 3] {
    [((0..37).map(|t| t * 7 % 90).collect(), 30), ((0..5).collect(), 4), (vec![9], 0)]
}

/// A base in each format computes what the equations give for the numbers it holds, whatever they were before.
#[test]
fn every_format_equals_the_equations_on_the_rounded_weights() {
    let (shape, sequences) = (UNEVEN, three_sequences());
    let tensors = shape.tensors(7);
    let round = |format: Format, norms: bool| -> Tensors {
        let each = |(name, (s, data)): (&String, &(Vec<usize>, Vec<f32>))| {
            let data = match s.len() == 1 && !norms {
                true => data.clone(),
                false => data.chunks(s[s.len() - 1]).flat_map(|row| rounded(row, format)).collect(),
            };
            (name.clone(), (s.clone(), data))
        };
        tensors.iter().map(each).collect()
    };
    for (dtype, format, numbers) in [
        (Dtype::BF16, None, round(Format::Bf16, true)),
        (Dtype::F16, None, round(Format::F16, true)),
        (Dtype::F32, Some(Format::Bf16), round(Format::Bf16, false)),
        (Dtype::F32, Some(Format::F16), round(Format::F16, false)),
        (Dtype::F32, Some(Format::Q8), round(Format::Q8, false)),
        (Dtype::F32, Some(Format::Q4), round(Format::Q4, false)),
    ] {
        let base = shape.open(&tensors, dtype);
        // Formats are for the packed kernels; candle's operations unpack what the file holds.
        for kernels in all_kernels().into_iter().filter(|k| format.is_none() || *k != Kernels::Tensor) {
            let name = format!("{dtype:?} as {format:?} by {kernels:?}");
            let close = error(&mut runner(&base, kernels, format), &shape, &numbers, &sequences);
            assert!(close < TOLERANCE, "{name}: logits differ by {close}");
            let far = error(&mut runner(&base, kernels, format), &shape, &tensors, &sequences);
            assert!(far > close, "{name}");
        }
    }
}

/// candle's operations with numbers of half the width, as on a GPU: everything is rounded at every step, so the result is
/// as near as the format's precision allows, not equal.
#[test]
fn half_precision_is_near_the_equations() {
    let tensors = UNEVEN.tensors(7);
    let base = UNEVEN.open(&tensors, Dtype::F32);
    for (dtype, tolerance) in [(DType::BF16, 0.3), (DType::F16, 0.03)] {
        let options = DecoderOptions { device: Device::Cpu, kernels: Kernels::Tensor, format: None, dtype };
        let decoder = Decoder::load(&base.config, &base.weights, options).unwrap();
        let mut runner = Runner::new(decoder, 8 << 20).unwrap();
        let error = error(&mut runner, &UNEVEN, &tensors, &three_sequences());
        assert!(error > TOLERANCE && error < tolerance, "{dtype:?}: logits differ by {error}");
    }
}
