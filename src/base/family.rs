//! The families of models: what their modules are called and how their layers differ.

use std::fmt;

/// The linear layers of a block, and the pooler after the blocks. LoRA adapters target these.
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
    /// What an encoder's classification head reads goes through it. It is one, and counts as layer 0's.
    Pooler,
}

/// The linear layers of a block after fusion, and the pooler. An adapter's delta is added at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    Qkv,
    O,
    /// Up alone where the family has no gate.
    GateUp,
    Down,
    Pooler,
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
            Pooler => Site::Pooler,
        }
    }

    pub const ALL: [Site; 5] = [Site::Qkv, Site::O, Site::GateUp, Site::Down, Site::Pooler];

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
            Site::Pooler if family.names().pooler.is_some() => &[Pooler],
            Site::Pooler => &[],
        }
    }
}

/// The norms of a model, those of a layer with its number. An adapter may bring its own weights for them.
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

/// An architecture, by Hugging Face's `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Phi3,
    Gpt2,
    Bert,
}

/// Modules as Hugging Face's implementation of a family names them. Those of a layer are relative to it.
#[derive(Debug)]
pub struct Names {
    /// Of the model without its output layer.
    pub root: &'static str,
    pub embedding: &'static str,
    /// Learned positions.
    pub positions: Option<&'static str>,
    /// What tells the texts of a pair apart. All tokens are of the first.
    pub token_types: Option<&'static str>,
    pub layers: &'static str,
    /// Before attention; where [`Family::norms_stream`], after the MLP of the layer before.
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
    /// Before the output layer; where [`Family::norms_stream`], before the first layer.
    pub norm: &'static str,
    pub pooler: Option<&'static str>,
    /// The classification head of a model that is one.
    pub head: &'static str,
}

/// The output layer, in every family.
pub const LM_HEAD: &str = "lm_head";

const LLAMA: Names = Names {
    root: "model",
    embedding: "model.embed_tokens",
    positions: None,
    token_types: None,
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
    pooler: None,
    head: "score",
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

const BERT: Names = Names {
    root: "bert",
    embedding: "bert.embeddings.word_embeddings",
    positions: Some("bert.embeddings.position_embeddings"),
    token_types: Some("bert.embeddings.token_type_embeddings"),
    layers: "bert.encoder.layer",
    attention_norm: "output.LayerNorm",
    mlp_norm: "attention.output.LayerNorm",
    projections: &[
        (Projection::Q, "attention.self.query"),
        (Projection::K, "attention.self.key"),
        (Projection::V, "attention.self.value"),
        (Projection::O, "attention.output.dense"),
        (Projection::Up, "intermediate.dense"),
        (Projection::Down, "output.dense"),
    ],
    norm: "bert.embeddings.LayerNorm",
    pooler: Some("bert.pooler.dense"),
    head: "classifier",
    ..LLAMA
};

impl Family {
    pub const ALL: [Family; 8] = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma2,
        Family::Phi3,
        Family::Gpt2,
        Family::Bert,
    ];

    /// What llama.cpp calls it: for it Mistral is a llama. `None` where its files are not read.
    pub fn in_gguf(self) -> Option<Self> {
        match self {
            Family::Mistral => Some(Family::Llama),
            Family::Bert => None,
            _ => Some(self),
        }
    }

    /// Those that GGUF files are read of.
    pub fn all_in_gguf() -> impl Iterator<Item = Self> {
        Family::ALL.into_iter().filter(|family| family.in_gguf() == Some(*family))
    }

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
            Family::Bert => "bert",
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
            Family::Bert => &BERT,
        }
    }

    /// The linear layers of a block, in the order they are used.
    pub fn projections(self) -> impl Iterator<Item = Projection> {
        self.names().projections.iter().map(|(projection, _)| *projection)
    }

    /// A projection's path inside a layer, as Hugging Face names it.
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
        !matches!(self, Family::Gpt2 | Family::Bert)
    }

    /// Whether every token sees all of its sequence, which therefore has to be computed as a whole, and whose first token
    /// stands for it.
    pub fn is_encoder(self) -> bool {
        self == Family::Bert
    }

    /// Whether a norm's result takes the place of the hidden state, instead of being a sublayer's input alone. Each norm is
    /// then where the next sublayer begins, and the last one's place is the end of the last layer.
    pub fn norms_stream(self) -> bool {
        self == Family::Bert
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
            Family::Bert => Architecture {
                norm: NormKind::Layer,
                activation: Activation::Gelu,
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
            Pooler => true,
        }
    }
}
