//! What a model is made of, read from `config.json` or from GGUF metadata.

mod gguf;
mod json;

use crate::base::{Architecture, Family, NormSite, Projection, Rope};
use crate::{Error, Result};

/// A linear layer of the base, as adapters name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetModule {
    /// Full module path, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub layer: usize,
    pub projection: Projection,
    pub out_features: usize,
    pub in_features: usize,
}

/// Far more than any model has; keeps a lying configuration from asking for lists of millions of modules.
const MAX_LAYERS: usize = 1 << 12;

/// A model's dimensions and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_eps: f64,
    /// `None` where positions are learned.
    pub rope: Option<Rope>,
    /// How many positions, its own among them, a row of each layer sees; a layer that is `None` or not listed sees all.
    pub windows: Vec<Option<usize>>,
    pub architecture: Architecture,
    /// Longest sequence, in tokens.
    pub context: usize,
    pub tie_word_embeddings: bool,
    /// Whether it predicts tokens. A classification may have left the output layer behind, and an encoder has none.
    pub predicts: bool,
    pub bos_token: Option<u32>,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
}

impl ModelConfig {
    /// Factor of the attention's scores in a layer.
    pub fn attention_scale(&self, layer: usize) -> f32 {
        let scale = self.architecture.attention_scale.unwrap_or((self.head_dim as f64).powf(-0.5));
        (if self.architecture.scales_by_layer { scale / (layer + 1) as f64 } else { scale }) as f32
    }

    /// How many positions a row of a layer sees, its own among them; `None` is all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Refuses dimensions that cannot belong together.
    pub fn checked(self) -> Result<Self> {
        let bad = |what: String| Err(Error::unprocessable(format!("model config: {what}")));
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("max_position_embeddings", self.context),
            ("head_dim", self.head_dim),
        ];
        positive.into_iter().try_for_each(|(name, value)| check_size(name, value))?;
        check_layers(self.layers)?;
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return bad(format!("the epsilon of the norms is {}; expected 0 or more", self.norm_eps));
        }
        if let Some(rope) = &self.rope {
            if !(rope.theta.is_finite() && rope.theta > 0.0) {
                return bad(format!("rope_theta is {}, not finite and positive", rope.theta));
            }
            if !self.head_dim.is_multiple_of(2) {
                return bad(format!("head_dim is {}, not an even number", self.head_dim));
            }
            if 2 * rope.frequencies.len() > self.head_dim {
                let turned = 2 * rope.frequencies.len();
                return bad(format!("rope turns {turned} numbers of a head; it has {}", self.head_dim));
            }
            if !(rope.attention_factor.is_finite() && rope.frequencies.iter().all(|f| f.is_finite())) {
                return bad("the scaled rope has numbers that are not finite".into());
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return bad(format!("{heads} attention heads cannot share {kv} key-value heads"));
        }
        if self.windows.contains(&Some(0)) {
            return bad("sliding_window is 0; expected at least 1".into());
        }
        let a = &self.architecture;
        for (name, value) in [
            ("the scale of the attention", a.attention_scale),
            ("attn_logit_softcapping", a.attention_softcap),
            ("final_logit_softcapping", a.logit_softcap),
        ] {
            if let Some(value) = value.filter(|v| !(v.is_finite() && *v > 0.0)) {
                return bad(format!("{name} is {value}, not finite and positive"));
            }
        }
        Ok(self)
    }

    /// `(out_features, in_features)` of a projection.
    pub fn shape(&self, projection: Projection) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match projection {
            Projection::Q => (q, self.hidden_size),
            Projection::K | Projection::V => (kv, self.hidden_size),
            Projection::Qkv => (q + 2 * kv, self.hidden_size),
            Projection::O => (self.hidden_size, q),
            Projection::Gate | Projection::Up => (self.intermediate_size, self.hidden_size),
            Projection::GateUp => (2 * self.intermediate_size, self.hidden_size),
            Projection::Down => (self.hidden_size, self.intermediate_size),
            Projection::Pooler => (self.hidden_size, self.hidden_size),
        }
    }

    /// A module's full name, from its path inside a layer.
    pub fn in_layer(&self, layer: usize, path: &str) -> String {
        format!("{}.{layer}.{path}", self.family.names().layers)
    }

    /// A norm's full module path and its width; `None` where there is no such norm.
    pub fn norm(&self, site: NormSite) -> Option<(String, usize)> {
        let names = self.family.names();
        let [query, key] = names.head_norms.map_or([None, None], |names| names.map(Some));
        let after = |l: usize| self.in_layer(l, names.attention_norm);
        let (name, width) = match site {
            NormSite::Attention(0) if self.family.norms_stream() => (names.norm.into(), self.hidden_size),
            NormSite::Attention(l) if self.family.norms_stream() => (after(l - 1), self.hidden_size),
            NormSite::Final if self.family.norms_stream() => (after(self.layers - 1), self.hidden_size),
            NormSite::Attention(l) => (after(l), self.hidden_size),
            NormSite::Query(l) => (self.in_layer(l, query?), self.head_dim),
            NormSite::Key(l) => (self.in_layer(l, key?), self.head_dim),
            NormSite::AttentionPost(l) => (self.in_layer(l, names.attention_post_norm?), self.hidden_size),
            NormSite::Mlp(l) => (self.in_layer(l, names.mlp_norm), self.hidden_size),
            NormSite::MlpPost(l) => (self.in_layer(l, names.mlp_post_norm?), self.hidden_size),
            NormSite::Final => (names.norm.into(), self.hidden_size),
        };
        Some((name, width))
    }

    /// Every norm with its full module path and its width, in the order of the layers.
    pub fn norms(&self) -> Vec<(NormSite, String, usize)> {
        use NormSite::*;
        let layer = |l| [Attention(l), Query(l), Key(l), AttentionPost(l), Mlp(l), MlpPost(l)];
        let sites = (0..self.layers).flat_map(layer).chain([Final]);
        sites.filter_map(|site| self.norm(site).map(|(name, width)| (site, name, width))).collect()
    }

    /// A linear layer's full module path.
    pub fn module(&self, layer: usize, projection: Projection) -> String {
        match (projection, self.family.names().pooler) {
            (Projection::Pooler, Some(name)) => name.into(),
            _ => self.in_layer(layer, self.family.path(projection)),
        }
    }

    /// Every linear layer of the blocks, in the order of the layers, and the pooler.
    pub fn target_modules(&self) -> Vec<TargetModule> {
        let module = |(layer, projection)| {
            let (out_features, in_features) = self.shape(projection);
            TargetModule { name: self.module(layer, projection), layer, projection, out_features, in_features }
        };
        let blocks = (0..self.layers).flat_map(|layer| self.family.projections().map(move |p| (layer, p)));
        let pooler = self.family.names().pooler.map(|_| (0, Projection::Pooler));
        blocks.chain(pooler).map(module).collect()
    }
}

/// Refuses a number of layers that no model has, before anything is made for each.
fn check_layers(layers: usize) -> Result<()> {
    match layers <= MAX_LAYERS {
        true => Ok(()),
        false => Err(Error::unprocessable(format!(
            "model config: num_hidden_layers is {layers}; at most {MAX_LAYERS} are possible"
        ))),
    }
}

/// Refuses a size that no model has, before anything of that size is made.
fn check_size(name: &str, value: usize) -> Result<()> {
    match value {
        1..=0x100_0000 => Ok(()),
        _ => Err(Error::unprocessable(format!("model config: {name} is {value}"))),
    }
}

/// The longest sequence that is served with LongRoPE (arXiv 2402.13753). It has two sets of divisors, one for sequences that
/// fit the original context and one for longer ones. A sequence that outgrows it would have to be computed anew from its
/// first token, so only the first set is used, and the original context is the longest.
fn longrope_context(original: usize, context: usize) -> usize {
    if context > original {
        tracing::warn!(
            "the model's rope is scaled anew for sequences longer than {original}; serving up to that, not {context}"
        );
    }
    context.min(original)
}
