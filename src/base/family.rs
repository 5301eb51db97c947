//! The families of decoders: what their modules are called and how their layers differ.

use std::fmt;

/// The linear layers of a decoder block. LoRA adapters target these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    Q,
    K,
    V,
    /// Q, K and V in one matrix, their outputs in this order.
    Qkv,
    O,
    Gate,
    Up,
    /// Gate and up in one matrix, their outputs in this order.
    GateUp,
    Down,
}

/// The linear layers of a block after fusion. An adapter's delta is added at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Site {
    Qkv,
    O,
    /// Up alone where the family has no gate.
    GateUp,
    Down,
}

impl Site {
    /// The layer that a projection is a part of.
    pub fn of(projection: Projection) -> Self {
        use Projection::*;
        match projection {
            Q | K | V | Qkv => Site::Qkv,
            O => Site::O,
            Gate | Up | GateUp => Site::GateUp,
            Down => Site::Down,
        }
    }

    pub const ALL: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

    /// The projections whose outputs lie side by side in this layer's output.
    pub fn projections(self, family: Family) -> &'static [Projection] {
        use Projection::*;
        let fused = |fused: Projection| family.names().projections.iter().any(|(p, _)| *p == fused);
        match self {
            Site::Qkv if fused(Qkv) => &[Qkv],
            Site::Qkv => &[Q, K, V],
            Site::O => &[O],
            Site::GateUp if fused(GateUp) => &[GateUp],
            Site::GateUp if family.is_gated() => &[Gate, Up],
            Site::GateUp => &[Up],
            Site::Down => &[Down],
        }
    }
}

/// The norms of a decoder, those of a layer with its number. An adapter may bring its own weights for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NormSite {
    Attention(usize),
    /// Of each head of q.
    Query(usize),
    /// Of each head of k.
    Key(usize),
    AttentionPost(usize),
    Mlp(usize),
    MlpPost(usize),
    Final,
}

/// A matrix of the base that a low-rank pair can be added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    Linear(usize, Projection),
    Embedding,
    LmHead,
}

/// An architecture of decoders, by Hugging Face's `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Phi3,
    Gpt2,
}

/// Modules as Hugging Face's implementation of a family names them. Those of a layer are relative to it.
#[derive(Debug)]
pub struct Names {
    /// Of the model without its output layer.
    pub root: &'static str,
    pub embedding: &'static str,
    /// Learned positions.
    pub positions: Option<&'static str>,
    pub layers: &'static str,
    /// Before attention.
    pub attention_norm: &'static str,
    /// After attention, before its result is added.
    pub attention_post_norm: Option<&'static str>,
    /// Of each head of q and of k.
    pub head_norms: Option<[&'static str; 2]>,
    /// Before the MLP.
    pub mlp_norm: &'static str,
    /// After the MLP, before its result is added.
    pub mlp_post_norm: Option<&'static str>,
    pub projections: &'static [(Projection, &'static str)],
    /// Before the output layer.
    pub norm: &'static str,
}

/// The output layer, in every family.
pub const LM_HEAD: &str = "lm_head";

const LLAMA: Names = Names {
    root: "model",
    embedding: "model.embed_tokens",
    positions: None,
    layers: "model.layers",
    attention_norm: "input_layernorm",
    attention_post_norm: None,
    head_norms: None,
    mlp_norm: "post_attention_layernorm",
    mlp_post_norm: None,
    projections: &[
        (Projection::Q, "self_attn.q_proj"),
        (Projection::K, "self_attn.k_proj"),
        (Projection::V, "self_attn.v_proj"),
        (Projection::O, "self_attn.o_proj"),
        (Projection::Gate, "mlp.gate_proj"),
        (Projection::Up, "mlp.up_proj"),
        (Projection::Down, "mlp.down_proj"),
    ],
    norm: "model.norm",
};

const QWEN3: Names = Names { head_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]), ..LLAMA };

const GEMMA2: Names = Names {
    attention_post_norm: Some("post_attention_layernorm"),
    mlp_norm: "pre_feedforward_layernorm",
    mlp_post_norm: Some("post_feedforward_layernorm"),
    ..LLAMA
};

const PHI3: Names = Names {
    projections: &[
        (Projection::Qkv, "self_attn.qkv_proj"),
        (Projection::O, "self_attn.o_proj"),
        (Projection::GateUp, "mlp.gate_up_proj"),
        (Projection::Down, "mlp.down_proj"),
    ],
    ..LLAMA
};

const GPT2: Names = Names {
    root: "transformer",
    embedding: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h",
    attention_norm: "ln_1",
    mlp_norm: "ln_2",
    projections: &[
        (Projection::Qkv, "attn.c_attn"),
        (Projection::O, "attn.c_proj"),
        (Projection::Up, "mlp.c_fc"),
        (Projection::Down, "mlp.c_proj"),
    ],
    norm: "transformer.ln_f",
    ..LLAMA
};

impl Family {
    /// What llama.cpp calls it: for it Mistral is a llama.
    pub fn in_gguf(self) -> Self {
        if self == Family::Mistral { Family::Llama } else { self }
    }

    pub const ALL: [Family; 7] =
        [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3, Family::Gemma2, Family::Phi3, Family::Gpt2];

    /// `model_type` of Hugging Face, `general.architecture` of GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma2 => "gemma2",
            Family::Phi3 => "phi3",
            Family::Gpt2 => "gpt2",
        }
    }

    pub fn from_name(name: &str) -> Option<Family> {
        Family::ALL.into_iter().find(|family| family.name() == name)
    }

    pub fn names(self) -> &'static Names {
        match self {
            Family::Llama | Family::Mistral | Family::Qwen2 => &LLAMA,
            Family::Qwen3 => &QWEN3,
            Family::Gemma2 => &GEMMA2,
            Family::Phi3 => &PHI3,
            Family::Gpt2 => &GPT2,
        }
    }

    /// The linear layers of a block, in the order they are used.
    pub fn projections(self) -> impl Iterator<Item = Projection> {
        self.names().projections.iter().map(|(projection, _)| *projection)
    }

    /// A projection's path inside a decoder layer, as Hugging Face names it.
    ///
    /// # Panics
    /// If the family has no such projection.
    pub fn path(self, projection: Projection) -> &'static str {
        let found = self.names().projections.iter().find(|(p, _)| *p == projection);
        found.expect("a projection of this family").1
    }

    /// The last part of [`Self::path`]: what `target_modules` usually says.
    pub fn short_name(self, projection: Projection) -> &'static str {
        let path = self.path(projection);
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

    /// Whether the MLP multiplies a gate with what goes up.
    pub fn is_gated(self) -> bool {
        self != Family::Gpt2
    }

    /// Whether Hugging Face's files hold linear layers as `[in_features, out_features]`.
    pub fn transposes_linear(self) -> bool {
        self == Family::Gpt2
    }

    /// Whether Hugging Face's files hold the weights of norms less 1.
    pub fn offsets_norms(self) -> bool {
        self == Family::Gemma2
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How rows are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// By the root of their mean square (arXiv 1910.07467).
    Rms,
    /// To mean 0 and variance 1, with a bias (arXiv 1607.06450).
    Layer,
}

/// The non-linearity of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// By the error function (arXiv 1606.08415).
    Gelu,
    /// GELU approximated by a hyperbolic tangent.
    GeluTanh,
    Relu,
}

impl Activation {
    /// By transformers' name.
    pub fn from_name(name: &str) -> Option<Activation> {
        Some(match name {
            "silu" | "swish" => Activation::Silu,
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate" => {
                Activation::GeluTanh
            }
            "relu" => Activation::Relu,
            _ => return None,
        })
    }
}

/// What the layers compute, sizes and positions aside.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub norm: NormKind,
    pub activation: Activation,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Whether embeddings are multiplied by the square root of their width.
    pub scales_embedding: bool,
    /// Factor of the attention's scores; `None` is one over the square root of a head's width.
    pub attention_scale: Option<f64>,
    /// Whether the scores of layer `l` are divided by `l + 1` as well.
    pub scales_by_layer: bool,
    /// `c`, where scores become `c * tanh(score / c)`.
    pub attention_softcap: Option<f64>,
    /// The same for the logits.
    pub logit_softcap: Option<f64>,
}

impl Architecture {
    /// What a family does where its configuration says nothing else.
    pub fn of(family: Family) -> Self {
        let plain = Architecture {
            norm: NormKind::Rms,
            activation: Activation::Silu,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            scales_embedding: false,
            attention_scale: None,
            scales_by_layer: false,
            attention_softcap: None,
            logit_softcap: None,
        };
        match family {
            Family::Llama | Family::Mistral | Family::Qwen3 | Family::Phi3 => plain,
            Family::Qwen2 => Architecture { qkv_bias: true, ..plain },
            Family::Gemma2 => Architecture {
                activation: Activation::GeluTanh,
                scales_embedding: true,
                attention_softcap: Some(50.0),
                logit_softcap: Some(30.0),
                ..plain
            },
            Family::Gpt2 => Architecture {
                norm: NormKind::Layer,
                activation: Activation::GeluTanh,
                qkv_bias: true,
                o_bias: true,
                mlp_bias: true,
                ..plain
            },
        }
    }

    /// Whether a projection adds a bias.
    pub fn has_bias(&self, projection: Projection) -> bool {
        use Projection::*;
        match projection {
            Q | K | V | Qkv => self.qkv_bias,
            O => self.o_bias,
            Gate | Up | GateUp | Down => self.mlp_bias,
        }
    }
}
