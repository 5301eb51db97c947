//! A validated adapter in host memory.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::base::{Head, NormSite, Projection};

/// Identity of an adapter's content: the SHA-256 of its files, in hex. Equal content, equal generation.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(Arc<str>);

impl Generation {
    pub fn new(hex: impl Into<Arc<str>>) -> Self {
        Generation(hex.into())
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Serialize for Generation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Generation({})", &self.0[..self.0.len().min(12)])
    }
}

/// One low-rank pair: `y += scale * (B (A x) + bias)` (LoRA, arXiv 2106.09685). With a magnitude the whole becomes
/// `y = magnitude / ‖W + scale * B A‖ * (W x + scale * B A x)`, the norm taken of each output feature's weights (DoRA,
/// arXiv 2402.09353).
#[derive(Debug, Clone, Default)]
pub struct LoraPair {
    pub rank: usize,
    /// `alpha / r`, or `alpha / sqrt(r)` with rsLoRA (arXiv 2312.03732).
    pub scale: f32,
    /// `[rank, in_features]`, row-major.
    pub a: Vec<f32>,
    /// `[out_features, rank]`, row-major.
    pub b: Vec<f32>,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
    /// `[out_features]`.
    pub magnitude: Option<Vec<f32>>,
}

/// What an adapter changes of the embedding or of `lm_head`, whose rows belong to tokens.
#[derive(Debug, Clone, Default)]
pub struct TableChange {
    /// Rows that take the place of the base's, before the pair is added.
    pub rows: Option<OwnRows>,
    /// Of the embedding it maps a token's one-hot vector to its hidden state: `a` is `[rank, vocab_size]`, `b` is
    /// `[hidden_size, rank]`. Of `lm_head` it maps a state to logits.
    pub pair: Option<LoraPair>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct OwnRows {
    /// Whose rows these are, in ascending order; `None` for all tokens from 0 on.
    pub tokens: Option<Vec<u32>>,
    /// `[tokens, hidden_size]`, row-major.
    pub rows: Vec<f32>,
}

/// A norm's weights as Hugging Face's file has them; what is `None` stays the base's.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnNorm {
    pub weight: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
}

/// An adapter whose every tensor has been checked against the base's shapes.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub generation: Generation,
    /// Keyed by layer and projection.
    pub pairs: BTreeMap<(usize, Projection), LoraPair>,
    /// Biases that take the place of the base's.
    pub biases: BTreeMap<(usize, Projection), Vec<f32>>,
    /// Norms that take the place of the base's.
    pub norms: BTreeMap<NormSite, OwnNorm>,
    /// Tokens it knows; `None` where these are the base's.
    pub vocab_size: Option<usize>,
    pub embedding: TableChange,
    pub lm_head: TableChange,
    pub head: Option<Head>,
}

impl Adapter {
    /// One that changes nothing yet.
    pub fn new(generation: Generation) -> Self {
        Adapter {
            generation,
            pairs: BTreeMap::new(),
            biases: BTreeMap::new(),
            norms: BTreeMap::new(),
            vocab_size: None,
            embedding: TableChange::default(),
            lm_head: TableChange::default(),
            head: None,
        }
    }

    /// The first thing that is no plain low-rank pair of a linear layer and no head, if there is one.
    pub fn beyond_pairs(&self) -> Option<&'static str> {
        let has_magnitude = self.pairs.values().any(|p| p.magnitude.is_some());
        if has_magnitude { Some("DoRA's magnitudes") } else { self.beyond_dora() }
    }

    /// The same where pairs may have magnitudes.
    pub fn beyond_dora(&self) -> Option<&'static str> {
        let table = |t: &TableChange| t.rows.is_some() || t.pair.is_some();
        match () {
            _ if self.pairs.values().any(|p| p.bias.is_some()) || !self.biases.is_empty() => Some("biases"),
            _ if !self.norms.is_empty() => Some("norms"),
            _ if table(&self.embedding) => Some("changed embeddings"),
            _ if table(&self.lm_head) => Some("a changed lm_head"),
            _ => None,
        }
    }
}
