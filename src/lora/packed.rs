//! An adapter laid out for the kernels, ready for a batch.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use crate::Result;
use crate::adapter::{Adapter, Generation, Head};
use crate::base::matmul::PackedMatrix;
use crate::base::{DecoderOptions, Kernels, ModelConfig, Site};

/// The low-rank pairs of one fused linear layer.
#[derive(Debug)]
pub(super) struct PackedSite {
    pub a: Factor,
    pub parts: Vec<Part>,
}

/// The pair of one projection of the fused layer.
#[derive(Debug)]
pub(super) struct Part {
    pub b: Factor,
    /// First of this projection's ranks among those of the site.
    pub rank_start: usize,
    /// First of this projection's outputs among those of the fused layer.
    pub column: usize,
    pub scale: f32,
}

#[derive(Debug)]
pub(super) enum Factor {
    Packed(PackedMatrix),
    /// `[out_features, in_features]`, in the decoder's numbers.
    Tensor(Tensor),
}

impl Factor {
    fn new(rows: &[f32], n: usize, k: usize, base: &DecoderOptions) -> Result<Self> {
        Ok(match base.kernels {
            Kernels::Packed(_) => Factor::Packed(PackedMatrix::pack_exactly(rows, n, k)),
            Kernels::Tensor => {
                let tensor = Tensor::from_slice(rows, (n, k), &Device::Cpu)?;
                Factor::Tensor(tensor.to_dtype(base.dtype)?.to_device(&base.device)?)
            }
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Factor::Packed(m) => m.bytes(),
            Factor::Tensor(t) => t.elem_count() * t.dtype().size_in_bytes(),
        }
    }

    /// Output features.
    pub fn n(&self) -> usize {
        match self {
            Factor::Packed(m) => m.n(),
            Factor::Tensor(t) => t.dims()[0],
        }
    }
}

/// An adapter on the device, in the layout that the delta kernels read.
///
/// The A factors of projections that share an input (q, k, v; gate, up) are stacked, so that a fused layer costs one
/// product with A, and one with each B.
#[derive(Debug)]
pub struct PackedAdapter {
    pub generation: Generation,
    /// Names of the classes of the head; `None` where the adapter has no head.
    pub labels: Option<Vec<String>>,
    /// Memory it takes.
    pub bytes: usize,
    pub(super) sites: HashMap<(usize, Site), PackedSite>,
    head: Option<Head>,
}

impl PackedAdapter {
    /// For the kernels and the numbers that `base` is held in. Each pair is freed as soon as it is packed, so that an
    /// adapter is not twice in memory.
    pub fn new(mut adapter: Adapter, config: &ModelConfig, base: &DecoderOptions) -> Result<Self> {
        let mut sites = HashMap::new();
        for layer in 0..config.layers {
            for site in Site::ALL {
                let (mut a, mut parts, mut ranks, mut column, mut width) = (Vec::new(), Vec::new(), 0, 0, 0);
                for &projection in site.projections(config.family) {
                    let (n, k) = config.shape(projection);
                    if let Some(pair) = adapter.pairs.remove(&(layer, projection)) {
                        a.extend_from_slice(&pair.a);
                        let b = Factor::new(&pair.b, n, pair.rank, base)?;
                        parts.push(Part { b, rank_start: ranks, column, scale: pair.scale });
                        ranks += pair.rank;
                    }
                    (column, width) = (column + n, k);
                }
                if !parts.is_empty() {
                    let a = Factor::new(&a, ranks, width, base)?;
                    sites.insert((layer, site), PackedSite { a, parts });
                }
            }
        }
        let site_bytes = |s: &PackedSite| s.a.bytes() + s.parts.iter().map(|p| p.b.bytes()).sum::<usize>();
        let head = adapter.head;
        let head_bytes = head.as_ref().map_or(0, |h| 4 * (h.weight.len() + h.bias.as_ref().map_or(0, Vec::len)));
        Ok(PackedAdapter {
            generation: adapter.generation,
            labels: head.as_ref().map(|h| h.labels.clone()),
            bytes: sites.values().map(site_bytes).sum::<usize>() + head_bytes,
            sites,
            head,
        })
    }

    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Logits `[labels]` of the classification head for a final hidden state `[hidden_size]`; `None` without a head.
    pub fn classify(&self, hidden: &[f32]) -> Option<Vec<f32>> {
        let head = self.head.as_ref()?;
        let dot = |row: &[f32]| row.iter().zip(hidden).map(|(w, x)| w * x).sum::<f32>();
        let logits = head.weight.chunks_exact(hidden.len()).map(dot);
        Some(match &head.bias {
            None => logits.collect(),
            Some(bias) => logits.zip(bias).map(|(l, b)| l + b).collect(),
        })
    }
}
