//! A decoder layer with what is trained in it, its backward pass written out.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::gradients::Gradients;
use super::linear::{Linear, Noise, Weight};
use super::ops::{self, Heads, Rope, norm, numbers, swiglu};
use crate::Result;
use crate::base::Projection;

pub struct Layer {
    pub input_norm: Weight,
    pub projections: BTreeMap<Projection, Linear>,
    pub post_norm: Weight,
    pub head_dim: usize,
    pub eps: f64,
}

/// What the layers of one pass over a batch share.
pub struct Pass {
    /// Rows of each sequence.
    pub lengths: Vec<usize>,
    pub rope: Rope,
    /// Whether a layer keeps only its input for the backward pass and computes the rest again (arXiv 1604.06174).
    pub checkpointing: bool,
    /// Gradients of what the layers train; on a CPU candle's graph does not know it.
    pub gradients: Gradients,
}

impl Layer {
    /// The layer's output for `x` `[rows, hidden]`, made of candle's operations. `noise` is the seed of the dropout, `None` for
    /// none.
    pub fn plain(&self, x: &Tensor, pass: &Pass, noise: Option<u64>) -> Result<Tensor> {
        let linear =
            |projection: Projection, x: &Tensor| self.projections[&projection].plain(x, noise_of(noise, projection));
        let h = norm::plain(x, self.input_norm.tensor(), self.eps)?;
        let q = ops::rope(&linear(Projection::Q, &h)?, &pass.rope)?;
        let k = ops::rope(&linear(Projection::K, &h)?, &pass.rope)?;
        let h = ops::attention(&q, &k, &linear(Projection::V, &h)?, &pass.lengths, self.head_dim)?;
        let x = (x + linear(Projection::O, &h)?)?;
        let h = norm::plain(&x, self.post_norm.tensor(), self.eps)?;
        let h = (linear(Projection::Gate, &h)?.silu()? * linear(Projection::Up, &h)?)?;
        Ok((x + linear(Projection::Down, &h)?)?)
    }
}

/// Each projection's inputs are left out independently.
fn noise_of(seed: Option<u64>, projection: Projection) -> Option<Noise> {
    seed.map(|seed| Noise { seed, stream: projection as u64 })
}

/// What the backward pass reads, beside the layer's input.
pub struct Activations {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attention: Vec<f32>,
    /// The input of the feed-forward half.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// A pass of one layer over its numbers.
pub struct Run<'a> {
    pub layer: &'a Layer,
    pub pass: &'a Pass,
    /// The seed of the dropout, `None` for none.
    pub noise: Option<u64>,
    pub rows: usize,
}

impl Run<'_> {
    /// The gradient of a trained norm's weight is noted; that of its input is added to `dx`, where there is one.
    fn back_norm(&self, weight: &Weight, x: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> candle_core::Result<()> {
        let (weights, eps) = (numbers(weight.tensor())?, self.layer.eps as f32);
        if let Some(var) = weight.trained() {
            self.pass.gradients.add(var, norm::weight_gradient(x, weights.len(), eps, dy));
        }
        if let Some(dx) = dx {
            norm::backward(x, &weights, eps, dy, dx);
        }
        Ok(())
    }

    fn normed(&self, weight: &Weight, x: &[f32]) -> candle_core::Result<Vec<f32>> {
        Ok(norm::forward(x, &numbers(weight.tensor())?, self.layer.eps as f32))
    }

    fn heads(&self) -> candle_core::Result<Heads<'_>> {
        let width = |projection| self.layer.projections[&projection].weight.tensor().dim(0);
        let (q_width, kv_width) = (width(Projection::Q)?, width(Projection::K)?);
        Ok(Heads { lengths: &self.pass.lengths, head_dim: self.layer.head_dim, q_width, kv_width })
    }

    fn product(&self, projection: Projection, x: &[f32]) -> candle_core::Result<Vec<f32>> {
        let linear = &self.layer.projections[&projection];
        let mut y = vec![0.0; self.rows * linear.weight.tensor().dim(0)?];
        linear.forward(x, self.noise(projection), &mut y)?;
        Ok(y)
    }

    fn add_product(&self, projection: Projection, x: &[f32], y: &mut [f32]) -> candle_core::Result<()> {
        self.layer.projections[&projection].forward(x, self.noise(projection), y)
    }

    fn back(&self, projection: Projection, x: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> candle_core::Result<()> {
        let linear = &self.layer.projections[&projection];
        linear.backward(x, self.noise(projection), dy, dx, &self.pass.gradients)
    }

    fn noise(&self, projection: Projection) -> Option<Noise> {
        noise_of(self.noise, projection)
    }

    pub fn activations(&self, x: &[f32]) -> candle_core::Result<Activations> {
        let heads = self.heads()?;
        let h = self.normed(&self.layer.input_norm, x)?;
        let (mut q, mut k) = (self.product(Projection::Q, &h)?, self.product(Projection::K, &h)?);
        let v = self.product(Projection::V, &h)?;
        self.pass.rope.turn(&mut q, heads.q_width, 1.0);
        self.pass.rope.turn(&mut k, heads.kv_width, 1.0);
        let attention = heads.forward(&q, &k, &v);
        let mut middle = x.to_vec();
        self.add_product(Projection::O, &attention, &mut middle)?;
        let h = self.normed(&self.layer.post_norm, &middle)?;
        let (gate, up) = (self.product(Projection::Gate, &h)?, self.product(Projection::Up, &h)?);
        Ok(Activations { q, k, v, attention, middle, gate, up })
    }

    /// The layer's output.
    pub fn output(&self, a: &Activations) -> candle_core::Result<Vec<f32>> {
        let mut y = a.middle.clone();
        self.add_product(Projection::Down, &swiglu::forward(&a.gate, &a.up), &mut y)?;
        Ok(y)
    }

    /// The gradient of the input, where it is wanted; those of what is trained are noted.
    pub fn backward(
        &self,
        x: &[f32],
        a: Activations,
        dy: &[f32],
        input: bool,
    ) -> candle_core::Result<Option<Vec<f32>>> {
        let (layer, heads) = (self.layer, self.heads()?);
        let mut ds = vec![0.0; a.gate.len()];
        self.back(Projection::Down, &swiglu::forward(&a.gate, &a.up), dy, Some(&mut ds))?;
        let [dgate, dup] = swiglu::backward(&a.gate, &a.up, &ds);
        let (h, mut dh) = (self.normed(&layer.post_norm, &a.middle)?, vec![0.0; x.len()]);
        self.back(Projection::Gate, &h, &dgate, Some(&mut dh))?;
        self.back(Projection::Up, &h, &dup, Some(&mut dh))?;
        let mut dx = dy.to_vec();
        self.back_norm(&layer.post_norm, &a.middle, &dh, Some(&mut dx))?;
        let mut d_attention = vec![0.0; a.attention.len()];
        self.back(Projection::O, &a.attention, &dx, Some(&mut d_attention))?;
        let [mut dq, mut dk, dv] = heads.backward(&a.q, &a.k, &a.v, &d_attention);
        self.pass.rope.turn(&mut dq, heads.q_width, -1.0);
        self.pass.rope.turn(&mut dk, heads.kv_width, -1.0);
        let h = self.normed(&layer.input_norm, x)?;
        let wanted = input || layer.input_norm.trained().is_some();
        let mut dh = wanted.then(|| vec![0.0; x.len()]);
        self.back(Projection::Q, &h, &dq, dh.as_deref_mut())?;
        self.back(Projection::K, &h, &dk, dh.as_deref_mut())?;
        self.back(Projection::V, &h, &dv, dh.as_deref_mut())?;
        if let Some(dh) = dh {
            self.back_norm(&layer.input_norm, x, &dh, input.then_some(&mut dx))?;
        }
        Ok(input.then_some(dx))
    }
}
