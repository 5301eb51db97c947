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
use serde_json::{Value, json};

use crate::common::*;

#[derive(Debug, Clone)]
pub struct Shape {
    pub family: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub tied: bool,
    pub theta: f64,
    pub variant: Variant,
}

/// What a family's configuration may say beside the sizes. A family reads what it knows.
#[derive(Debug, Clone)]
pub struct Variant {
    /// Biases of the layers that need not have one.
    pub biased: bool,
    pub window: Option<usize>,
    /// The first layer with a window, for Qwen.
    pub windowed_from: usize,
    pub cap: Option<f64>,
    pub query_scalar: f64,
    /// `rope_scaling`; `null` for none.
    pub scaling: Value,
    /// Of a head, for Phi-3.
    pub rotated: f64,
    pub activation: &'static str,
}

impl Variant {
    pub const fn plain() -> Self {
        Variant {
            biased: false,
            window: None,
            windowed_from: 0,
            cap: None,
            query_scalar: 1.0,
            scaling: Value::Null,
            rotated: 1.0,
            activation: "silu",
        }
    }
}

/// Longest sequence that any scaling begins with.
pub const ORIGINAL: usize = 64;

/// By name: shape and numbers.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub const EPS: f64 = 1e-5;
pub const CONTEXT: usize = 256;
/// Of f32's sums; logits here are around 1, and the differences seen are below 1e-5.
pub const TOLERANCE: f64 = 1e-4;

/// Uniform in -1 to 1, of no period that a test could meet.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl Shape {
    pub fn is(&self, family: &str) -> bool {
        self.family == family
    }

    pub fn layer(&self, l: usize, module: &str) -> String {
        if self.is("gpt2") { format!("transformer.h.{l}.{module}") } else { format!("model.layers.{l}.{module}") }
    }

    pub fn embedding(&self) -> &'static str {
        if self.is("gpt2") { "transformer.wte" } else { "model.embed_tokens" }
    }

    pub fn final_norm(&self) -> &'static str {
        if self.is("gpt2") { "transformer.ln_f" } else { "model.norm" }
    }

    /// The modules whose outputs, side by side, are q, k and v; what follows attention; what leads into the MLP; what leads out.
    pub fn linears(&self) -> [Vec<(&'static str, usize)>; 4] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (hidden, inner) = (self.hidden, self.intermediate);
        match self.family {
            "phi3" => [
                vec![("self_attn.qkv_proj", q + 2 * kv)],
                vec![("self_attn.o_proj", hidden)],
                vec![("mlp.gate_up_proj", 2 * inner)],
                vec![("mlp.down_proj", hidden)],
            ],
            "gpt2" => [
                vec![("attn.c_attn", 3 * q)],
                vec![("attn.c_proj", hidden)],
                vec![("mlp.c_fc", inner)],
                vec![("mlp.c_proj", hidden)],
            ],
            _ => [
                vec![("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                vec![("self_attn.o_proj", hidden)],
                vec![("mlp.gate_proj", inner), ("mlp.up_proj", inner)],
                vec![("mlp.down_proj", hidden)],
            ],
        }
    }

    /// Whether the linear layers of each of the four places have a bias.
    fn biases(&self) -> [bool; 4] {
        let biased = self.variant.biased;
        match self.family {
            "gpt2" => [true; 4],
            "qwen2" => [true, false, false, false],
            "llama" => [biased; 4],
            "qwen3" | "gemma2" => [biased, biased, false, false],
            _ => [false; 4],
        }
    }

    /// Before attention, after it, before the MLP, after it.
    pub fn norms(&self) -> [Option<&'static str>; 4] {
        match self.family {
            "gpt2" => [Some("ln_1"), None, Some("ln_2"), None],
            "gemma2" => [
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ],
            _ => [Some("input_layernorm"), None, Some("post_attention_layernorm"), None],
        }
    }

    /// Matrices `[out, in]` whose outputs have a variance near 1, and norms around 1.
    pub fn tensors(&self, seed: u64) -> Tensors {
        let mut noise = noise(seed);
        let mut tensors = Tensors::new();
        let mut matrix = |module: String, n: usize, k: usize, bias: bool| {
            let scale = (3.0 / k as f32).sqrt();
            tensors.insert(format!("{module}.weight"), (vec![n, k], (0..n * k).map(|_| scale * noise()).collect()));
            if bias {
                tensors.insert(format!("{module}.bias"), (vec![n], (0..n).map(|_| noise() / 2.0).collect()));
            }
        };
        matrix(self.embedding().into(), self.vocab, self.hidden, false);
        if self.is("gpt2") {
            matrix("transformer.wpe".into(), CONTEXT, self.hidden, false);
        }
        if !self.tied {
            matrix("lm_head".into(), self.vocab, self.hidden, false);
        }
        let inputs = [self.hidden, self.heads * self.head_dim, self.hidden, self.intermediate];
        for layer in 0..self.layers {
            for ((modules, bias), k) in self.linears().into_iter().zip(self.biases()).zip(inputs) {
                modules.into_iter().for_each(|(module, n)| matrix(self.layer(layer, module), n, k, bias));
            }
        }
        let mut norms = vec![(self.final_norm().to_string(), self.hidden)];
        for layer in 0..self.layers {
            norms.extend(self.norms().into_iter().flatten().map(|norm| (self.layer(layer, norm), self.hidden)));
            if self.is("qwen3") {
                let head_norms = ["self_attn.q_norm", "self_attn.k_norm"];
                norms.extend(head_norms.map(|norm| (self.layer(layer, norm), self.head_dim)));
            }
        }
        let middle = if self.is("gemma2") { 0.0 } else { 1.0 };
        for (module, width) in norms {
            let numbers = (0..width).map(|_| middle + noise() / 2.0).collect();
            tensors.insert(format!("{module}.weight"), (vec![width], numbers));
            if self.is("gpt2") {
                tensors.insert(format!("{module}.bias"), (vec![width], (0..width).map(|_| noise() / 2.0).collect()));
            }
        }
        tensors
    }

    fn config(&self) -> Value {
        let v = &self.variant;
        if self.is("gpt2") {
            return json!({
                "model_type": "gpt2", "vocab_size": self.vocab, "n_embd": self.hidden, "n_inner": self.intermediate,
                "n_layer": self.layers, "n_head": self.heads, "n_positions": CONTEXT, "layer_norm_epsilon": EPS,
                "activation_function": v.activation, "tie_word_embeddings": self.tied,
                "scale_attn_by_inverse_layer_idx": v.biased, "scale_attn_weights": v.cap.is_none(),
            });
        }
        let mut config = json!({
            "model_type": self.family, "vocab_size": self.vocab, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "rms_norm_eps": EPS, "rope_theta": self.theta, "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": self.tied, "rope_scaling": v.scaling, "sliding_window": v.window,
            "attention_bias": v.biased, "mlp_bias": v.biased, "use_sliding_window": v.window.is_some(),
            "max_window_layers": v.windowed_from, "attn_logit_softcapping": v.cap, "final_logit_softcapping": v.cap,
            "query_pre_attn_scalar": v.query_scalar,
        });
        match self.family {
            "gemma2" => {
                config["hidden_activation"] = json!(v.activation);
                // All the window's layers, of which every other one would be.
                if v.window.is_none() {
                    config["layer_types"] = json!(vec!["full_attention"; self.layers]);
                }
            }
            "phi3" => {
                config["original_max_position_embeddings"] = json!(ORIGINAL);
                config["partial_rotary_factor"] = json!(v.rotated);
                config["hidden_act"] = json!(v.activation);
            }
            _ => config["hidden_act"] = json!(v.activation),
        }
        config
    }

    fn open(&self, tensors: &Tensors, dtype: Dtype) -> Base {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), self.config().to_string()).unwrap();
        let tokenizer = fixtures().join("tiny/llama/base/tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
        let bytes = |x: &f32| match dtype {
            Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let stored = |(name, (shape, data)): (&String, &(Vec<usize>, Vec<f32>))| {
            let (mut shape, mut data) = (shape.clone(), data.clone());
            // GPT-2's files have the inputs first.
            if self.is("gpt2") && name.contains(".c_") && shape.len() == 2 {
                let (n, k) = (shape[0], shape[1]);
                data = (0..n * k).map(|i| data[i % n * k + i / n]).collect();
                shape.reverse();
            }
            (name.clone(), shape, data.iter().flat_map(bytes).collect::<Vec<u8>>())
        };
        let stored: Vec<_> = tensors.iter().map(stored).collect();
        let views = stored.iter().map(|(name, s, bytes)| (name, TensorView::new(dtype, s.clone(), bytes).unwrap()));
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        Base::open(folder.path().to_str().unwrap()).unwrap()
    }

    /// The angle of one position for each pair of a head that is turned, and the factor of cosines and sines.
    fn angles(&self) -> (Vec<f64>, f64) {
        if self.is("gpt2") {
            return (vec![], 1.0);
        }
        let part = if self.is("phi3") { self.variant.rotated } else { 1.0 };
        let rotated = (self.head_dim as f64 * part) as usize;
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / rotated as f64);
        let scaling = &self.variant.scaling;
        let number = |key: &str| scaling[key].as_f64().unwrap();
        let original = ORIGINAL as f64;
        let scaled = |i: usize| match scaling["rope_type"].as_str().or(scaling["type"].as_str()) {
            None => plain(i),
            Some("linear") => plain(i) / number("factor"),
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
                // Waves that the original context holds.
                let waves = original * plain(i) / std::f64::consts::TAU;
                let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                plain(i) * (kept + (1.0 - kept) / number("factor"))
            }
            Some("yarn") => {
                // The pair that turns so often within the original context.
                let pair = |turns: f64| {
                    rotated as f64 / 2.0 * (original / (turns * std::f64::consts::TAU)).ln() / self.theta.ln()
                };
                let low = pair(number("beta_fast")).floor().max(0.0);
                let high = pair(number("beta_slow")).ceil().min(rotated as f64 - 1.0);
                let width = if low == high { 0.001 } else { high - low };
                let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                plain(i) * (1.0 - divided + divided / number("factor"))
            }
            Some("longrope") => plain(i) / scaling["short_factor"][i].as_f64().unwrap(),
            Some(other) => panic!("{other}"),
        };
        let factor = match scaling["rope_type"].as_str().or(scaling["type"].as_str()) {
            Some("yarn") => 0.1 * number("factor").ln() + 1.0,
            Some("longrope") => (1.0 + (CONTEXT as f64 / original).ln() / original.ln()).sqrt(),
            _ => 1.0,
        };
        ((0..rotated / 2).map(scaled).collect(), factor)
    }

    /// The positions that a layer looks back over, its own among them.
    fn window(&self, layer: usize) -> usize {
        let has = match self.family {
            "mistral" | "phi3" => true,
            "qwen2" | "qwen3" => layer >= self.variant.windowed_from,
            "gemma2" => layer.is_multiple_of(2),
            _ => false,
        };
        self.variant.window.filter(|_| has).unwrap_or(usize::MAX)
    }

    fn activation(&self, x: f64) -> f64 {
        match self.variant.activation {
            "silu" => x / (1.0 + (-x).exp()),
            "gelu" => 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2f64.sqrt())),
            "relu" => x.max(0.0),
            _ => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        }
    }

    /// Logits at every position: the families' equations, one number after the other.
    fn logits(&self, tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
        let numbers =
            |name: String| -> Option<Vec<f64>> { Some(tensors.get(&name)?.1.iter().map(|&w| f64::from(w)).collect()) };
        let multiply = |module: &str, x: &[f64]| -> Vec<f64> {
            let weight = numbers(format!("{module}.weight")).unwrap();
            let bias = numbers(format!("{module}.bias"));
            let dot = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            let rows = weight.chunks_exact(x.len()).enumerate();
            rows.map(|(i, w)| dot(w) + bias.as_ref().map_or(0.0, |b| b[i])).collect()
        };
        let all = |layer: usize, modules: &[(&str, usize)], x: &[f64]| -> Vec<f64> {
            modules.iter().flat_map(|(module, _)| multiply(&self.layer(layer, module), x)).collect()
        };
        let norm = |module: &str, x: &[f64]| -> Vec<f64> {
            let (weight, n) = (numbers(format!("{module}.weight")).unwrap(), x.len() as f64);
            let mean = if self.is("gpt2") { x.iter().sum::<f64>() / n } else { 0.0 };
            let scale = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + EPS).sqrt();
            let one = if self.is("gemma2") { 1.0 } else { 0.0 };
            let bias = numbers(format!("{module}.bias")).unwrap_or(vec![0.0; x.len()]);
            x.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) / scale * (one + w) + b).collect()
        };
        let (angles, factor) = self.angles();
        let rotate = |head: &[f64], position: usize| -> Vec<f64> {
            let half = angles.len();
            let turn = |i: usize| {
                if i >= 2 * half {
                    return head[i];
                }
                let angle = position as f64 * angles[i % half];
                let other = if i < half { -head[i + half] } else { head[i - half] };
                factor * (head[i] * angle.cos() + other * angle.sin())
            };
            (0..head.len()).map(turn).collect()
        };
        let cap = |x: f64| match self.variant.cap {
            Some(cap) if self.is("gemma2") => cap * (x / cap).tanh(),
            _ => x,
        };
        let add = |x: &mut [f64], y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        let (d, inner) = (self.head_dim, self.intermediate);
        let (q_width, kv_width) = (self.heads * d, self.kv_heads * d);
        let [qkv_modules, o, gate_up, down] = self.linears();
        let table = numbers(format!("{}.weight", self.embedding())).unwrap();
        let row = |table: &[f64], row: usize| table[row * self.hidden..][..self.hidden].to_vec();
        let embed = |(position, &token): (usize, &u32)| {
            let mut x = row(&table, token as usize);
            if self.is("gemma2") {
                x.iter_mut().for_each(|x| *x *= (self.hidden as f64).sqrt());
            }
            if self.is("gpt2") {
                add(&mut x, row(&numbers("transformer.wpe.weight".into()).unwrap(), position));
            }
            x
        };
        let mut xs: Vec<Vec<f64>> = tokens.iter().enumerate().map(embed).collect();
        for l in 0..self.layers {
            let [before, after, before_mlp, after_mlp] = self.norms().map(|n| n.map(|n| self.layer(l, n)));
            let normed = |module: &Option<String>, x: Vec<f64>| module.as_ref().map_or(x.clone(), |m| norm(m, &x));
            let scale = match self.family {
                "gemma2" => self.variant.query_scalar.powf(-0.5),
                "gpt2" => {
                    let scale = if self.variant.cap.is_none() { (d as f64).powf(-0.5) } else { 1.0 };
                    if self.variant.biased { scale / (l + 1) as f64 } else { scale }
                }
                _ => (d as f64).powf(-0.5),
            };
            // Per position, then per head.
            let (mut keys, mut values): (Vec<Vec<Vec<f64>>>, Vec<Vec<f64>>) = (vec![], vec![]);
            for (position, x) in xs.iter_mut().enumerate() {
                let qkv = all(l, &qkv_modules, &normed(&before, x.clone()));
                let turned = |numbers: &[f64], head_norm: &str| -> Vec<Vec<f64>> {
                    let heads = numbers.chunks_exact(d);
                    let normed = |head: &[f64]| match self.is("qwen3") {
                        true => norm(&self.layer(l, head_norm), head),
                        false => head.to_vec(),
                    };
                    heads.map(|head| rotate(&normed(head), position)).collect()
                };
                keys.push(turned(&qkv[q_width..][..kv_width], "self_attn.k_norm"));
                values.push(qkv[q_width + kv_width..].to_vec());
                let first = (position + 1).saturating_sub(self.window(l));
                let mut out = vec![];
                for (head, q) in turned(&qkv[..q_width], "self_attn.q_norm").iter().enumerate() {
                    let kv = head / (self.heads / self.kv_heads);
                    let score = |k: &Vec<Vec<f64>>| cap(scale * q.iter().zip(&k[kv]).map(|(q, k)| q * k).sum::<f64>());
                    let weights: Vec<f64> = keys[first..].iter().map(|k| score(k).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    let seen = weights.iter().zip(&values[first..]);
                    out.extend((0..d).map(|i| seen.clone().map(|(w, v)| w / sum * v[kv * d + i]).sum::<f64>()));
                }
                add(x, normed(&after, all(l, &o, &out)));
                let h = all(l, &gate_up, &normed(&before_mlp, x.clone()));
                let up = |i: usize| if self.is("gpt2") { 1.0 } else { h[inner + i] };
                let h: Vec<f64> = (0..inner).map(|i| self.activation(h[i]) * up(i)).collect();
                add(x, normed(&after_mlp, all(l, &down, &h)));
            }
        }
        let head = if self.tied { self.embedding() } else { "lm_head" };
        xs.iter().flat_map(|x| multiply(head, &norm(self.final_norm(), x))).map(cap).collect()
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

/// What the equations give for each sequence.
pub fn reference(shape: &Shape, tensors: &Tensors, sequences: &[(Vec<u32>, usize)]) -> Vec<Vec<f64>> {
    sequences.iter().map(|(tokens, _)| shape.logits(tensors, tokens)).collect()
}

/// Largest difference from what is wanted, over all sequences.
pub fn error(runner: &mut Runner, want: &[Vec<f64>], sequences: &[(Vec<u32>, usize)]) -> f64 {
    let mut worst = 0.0f64;
    for (want, got) in want.iter().zip(run(runner, sequences)) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!(got.is_finite());
            worst = worst.max((f64::from(*got) - want).abs());
        }
    }
    worst
}

pub fn runner(base: &Base, kernels: Kernels, format: Option<Format>) -> Runner {
    Runner::new(decoder(base, kernels, format), 8 << 20).unwrap()
}

const FAMILIES: [&str; 7] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"];

fn any_variant() -> impl Strategy<Value = Variant> {
    let activation = prop::sample::select(vec!["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"]);
    let cap = prop::option::of(2f64..50.0);
    let scaling = (0usize..5, 1f64..8.0).prop_map(|(kind, factor)| match kind {
        0 => json!({ "type": "linear", "factor": factor }),
        1 => json!({ "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL }),
        2 => json!({ "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 8.0, "beta_slow": factor / 4.0 }),
        _ => Value::Null,
    });
    let windows = (prop::option::of(1usize..40), 0usize..3);
    // Of the head's size; see `any_shape`.
    let query_scalar = 0.5f64..2.0;
    (any::<bool>(), windows, cap, query_scalar, scaling, prop::sample::select(vec![0.25, 0.5, 0.75, 1.0]), activation)
        .prop_map(|(biased, (window, windowed_from), cap, query_scalar, scaling, rotated, activation)| Variant {
            biased,
            window,
            windowed_from,
            cap,
            query_scalar,
            scaling,
            rotated,
            activation,
        })
}

fn any_shape(family: &'static str) -> impl Strategy<Value = Shape> {
    let sizes = (4usize..100, 1usize..100, 1usize..4, 2usize..150);
    let heads = (1usize..5, 1usize..5, 1usize..40);
    (sizes, heads, prop::bool::ANY, prop_oneof![Just(1e4), Just(5e5)], any_variant()).prop_map(
        move |((hidden, intermediate, layers, vocab), (kv_heads, group, half), tied, theta, variant)| {
            let mut shape = Shape {
                family,
                hidden,
                intermediate,
                layers,
                heads: kv_heads * group,
                kv_heads,
                head_dim: 2 * half,
                vocab,
                tied,
                theta,
                variant,
            };
            if family == "gpt2" {
                // Layer norms of a few numbers can be of almost equal ones, whose difference f32 does not tell.
                shape.head_dim = shape.head_dim.next_multiple_of(8);
                (shape.kv_heads, shape.hidden) = (shape.heads, shape.heads * shape.head_dim);
            }
            // Models have about the head's size there. Far less of it makes scores so large that their softmax tells apart
            // what f32 does not.
            shape.variant.query_scalar *= shape.head_dim as f64;
            if family == "phi3" {
                shape.fit_to_phi3();
            }
            shape
        },
    )
}

impl Shape {
    /// Its scaling is a divisor for each pair that is turned, of which there must be some.
    fn fit_to_phi3(&mut self) {
        self.head_dim = self.head_dim.next_multiple_of(8);
        let pairs = (self.head_dim as f64 * self.variant.rotated) as usize / 2;
        if !self.variant.scaling.is_null() {
            let divisors = |first: f64| (0..pairs).map(|i| first + i as f64 / 10.0).collect::<Vec<_>>();
            self.variant.scaling =
                json!({ "type": "longrope", "short_factor": divisors(1.0), "long_factor": divisors(3.0) });
        }
    }
}

/// Up to three sequences, each cut somewhere; the second part may be a single token.
fn any_sequences() -> impl Strategy<Value = Vec<(Vec<u32>, usize)>> {
    let sequence = (prop::collection::vec(any::<u32>(), 1..40), any::<prop::sample::Index>())
        .prop_map(|(tokens, cut)| (tokens.clone(), cut.index(tokens.len() + 1)));
    prop::collection::vec(sequence, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_shape_equals_the_equations(
        shape in prop::sample::select(FAMILIES.to_vec()).prop_flat_map(any_shape),
        mut sequences in any_sequences(),
        seed: u64,
    ) {
        sequences.iter_mut().for_each(|(tokens, _)| tokens.iter_mut().for_each(|t| *t %= shape.vocab as u32));
        let tensors = shape.tensors(seed);
        let base = shape.open(&tensors, Dtype::F32);
        let want = reference(&shape, &tensors, &sequences);
        for kernels in all_kernels() {
            let error = error(&mut runner(&base, kernels, None), &want, &sequences);
            // Sharp attention and norms of small numbers enlarge what is rounded; a wrong equation is off by far more.
            prop_assert!(error < 5.0 * TOLERANCE, "{kernels:?}: logits differ by {error}");
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
                // Scales beside minima have 16 significant bits.
                let scale: f32 = (high - low) / 15.0;
                let scale = f32::from_bits((scale.to_bits() + 0x80) & !0xFF);
                group.iter().map(|x| ((x - low) / scale).round() * scale + low).collect::<Vec<_>>()
            };
            row.chunks(GROUP).flat_map(group).collect()
        }
        _ => row.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
    }
}

/// Its inputs of `down` and `o` are no whole groups, so these stay out of the quantised formats.
const UNEVEN: Shape = Shape {
    family: "llama",
    hidden: 96,
    intermediate: 80,
    layers: 2,
    heads: 6,
    kv_heads: 2,
    head_dim: 24,
    vocab: 90,
    tied: true,
    theta: 1e4,
    variant: Variant::plain(),
};

pub fn three_sequences() -> [(Vec<u32>, usize); 3] {
    [((0..37).map(|t| t * 7 % 90).collect(), 30), ((0..5).collect(), 4), (vec![9], 0)]
}

/// A base in each format computes what the equations give for the numbers it holds, whatever they were before.
#[test]
fn every_format_equals_the_equations_on_the_rounded_weights() {
    let (shape, sequences) = (UNEVEN, three_sequences());
    let tensors = shape.tensors(7);
    let original = reference(&shape, &tensors, &sequences);
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
        let rounded = reference(&shape, &numbers, &sequences);
        // Formats are for the packed kernels; candle's operations unpack what the file holds.
        for kernels in all_kernels().into_iter().filter(|k| format.is_none() || *k != Kernels::Tensor) {
            let name = format!("{dtype:?} as {format:?} by {kernels:?}");
            let close = error(&mut runner(&base, kernels, format), &rounded, &sequences);
            assert!(close < TOLERANCE, "{name}: logits differ by {close}");
            let far = error(&mut runner(&base, kernels, format), &original, &sequences);
            assert!(far > close, "{name}");
        }
    }
}

/// candle's operations with numbers of half the width, as on a GPU: everything is rounded at every step, so the result is
/// as near as the format's precision allows, not equal.
#[test]
fn half_precision_is_near_the_equations() {
    let variant = Variant { window: Some(9), cap: Some(30.0), query_scalar: 24.0, ..Variant::plain() };
    let gpt2 = Shape { family: "gpt2", hidden: 144, kv_heads: 6, ..UNEVEN };
    let shapes = [UNEVEN, Shape { family: "gemma2", variant, ..UNEVEN }, Shape { family: "qwen3", ..UNEVEN }, gpt2];
    for shape in shapes {
        let tensors = shape.tensors(7);
        let base = shape.open(&tensors, Dtype::F32);
        let want = reference(&shape, &tensors, &three_sequences());
        for (dtype, tolerance) in [(DType::BF16, 0.3), (DType::F16, 0.03)] {
            let options = DecoderOptions { device: Device::Cpu, kernels: Kernels::Tensor, format: None, dtype };
            let decoder = Decoder::load(&base.config, &base.weights, options).unwrap();
            let mut runner = Runner::new(decoder, 8 << 20).unwrap();
            let error = error(&mut runner, &want, &three_sequences());
            let family = shape.family;
            assert!(error > TOLERANCE && error < tolerance, "{family} in {dtype:?}: logits differ by {error}");
        }
    }
}
