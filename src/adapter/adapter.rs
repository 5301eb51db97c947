//! A validated adapter in host memory.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::base::Projection;

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

/// One low-rank pair: `y += scale * (x Aᵀ) Bᵀ` (LoRA, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct LoraPair {
    pub rank: usize,
    /// `alpha / r`, or `alpha / sqrt(r)` with rsLoRA (arXiv 2312.03732).
    pub scale: f32,
    /// `[rank, in_features]`, row-major.
    pub a: Vec<f32>,
    /// `[out_features, rank]`, row-major.
    pub b: Vec<f32>,
}

/// A trained classification head over the last token's hidden state.
#[derive(Debug, Clone)]
pub struct Head {
    /// `[labels, hidden_size]`, row-major.
    pub weight: Vec<f32>,
    /// `[labels]`.
    pub bias: Option<Vec<f32>>,
    /// One name a row of `weight`.
    pub labels: Vec<String>,
}

/// An adapter whose every tensor has been checked against the base's shapes.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub generation: Generation,
    /// Keyed by layer and projection.
    pub pairs: BTreeMap<(usize, Projection), LoraPair>,
    pub head: Option<Head>,
}
