//! A decoder layer with what is trained in it.
//!
//! On a CPU a whole layer is one operation of the graph, with its backward pass written out: between its products nothing
//! is copied or added twice, and how much is kept for the way back is ours to say. On other devices it is made of candle's
//! operations.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

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
    /// The layer's output for `x` `[rows, hidden]`. `noise` is the seed of the dropout, `None` for none; with
    /// `input_gradient` false the backward pass ends here.
    pub fn forward(
        self: &Arc<Self>,
        x: &Tensor,
        pass: &Arc<Pass>,
        noise: Option<u64>,
        input_gradient: bool,
    ) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return self.plain(x, pass, noise);
        }
        let op =
            Operation { layer: self.clone(), pass: pass.clone(), noise, input_gradient, activations: Mutex::default() };
        Ok(x.contiguous()?.apply_op1(op)?)
    }

    fn plain(&self, x: &Tensor, pass: &Pass, noise: Option<u64>) -> Result<Tensor> {
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

/// A layer's pass over a batch, as a node of candle's graph.
struct Operation {
    layer: Arc<Layer>,
    pass: Arc<Pass>,
    noise: Option<u64>,
    input_gradient: bool,
    /// From the forward pass to the backward one.
    activations: Mutex<Option<Activations>>,
}

/// What the backward pass reads, beside the layer's input.
struct Activations {
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
struct Run<'a> {
    layer: &'a Layer,
    pass: &'a Pass,
    noise: Option<u64>,
    rows: usize,
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

    fn activations(&self, x: &[f32]) -> candle_core::Result<Activations> {
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

    fn output(&self, a: &Activations) -> candle_core::Result<Vec<f32>> {
        let mut y = a.middle.clone();
        self.add_product(Projection::Down, &swiglu::forward(&a.gate, &a.up), &mut y)?;
        Ok(y)
    }

    fn backward(&self, x: &[f32], a: Activations, dy: &[f32], input: bool) -> candle_core::Result<Option<Vec<f32>>> {
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

impl Operation {
    fn run(&self, x: &[f32], width: usize) -> Run<'_> {
        Run { layer: &self.layer, pass: &self.pass, noise: self.noise, rows: x.len() / width }
    }
}

impl CustomOp1 for Operation {
    fn name(&self) -> &'static str {
        "decoder-layer"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = ops::slice(storage, layout)?;
        let run = self.run(x, layout.dims()[1]);
        let activations = run.activations(x)?;
        let y = run.output(&activations)?;
        if !self.pass.checkpointing {
            *self.activations.lock().unwrap_or_else(PoisonError::into_inner) = Some(activations);
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (xs, dys) = (numbers(x)?, numbers(&dy)?);
        let run = self.run(&xs, x.dim(1)?);
        let kept = self.activations.lock().unwrap_or_else(PoisonError::into_inner).take();
        let activations = match kept {
            Some(activations) => activations,
            None => run.activations(&xs)?,
        };
        let dx = run.backward(&xs, activations, &dys, self.input_gradient)?;
        dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::linear::Lora;
    use super::super::ops::testing::var;
    use super::*;

    const HEAD_DIM: usize = 2;

    /// Two query heads share a key-value head; hidden 6, feed-forward 5. Everything is trained, with pairs beside.
    fn layer(dropout: f64) -> (Layer, Vec<Var>) {
        let mut vars = vec![];
        let mut next = |shape: &[usize]| {
            let var = var(vars.len() as u64 + 1, shape);
            vars.push(var.clone());
            var
        };
        let mut projections = BTreeMap::new();
        for (projection, n, k) in [
            (Projection::Q, 4, 6),
            (Projection::K, 2, 6),
            (Projection::V, 2, 6),
            (Projection::O, 6, 4),
            (Projection::Gate, 5, 6),
            (Projection::Up, 5, 6),
            (Projection::Down, 6, 5),
        ] {
            let lora = Lora { a: next(&[3, k]), b: next(&[n, 3]), scale: 0.7, dropout };
            projections.insert(projection, Linear { weight: Weight::Trained(next(&[n, k])), lora: Some(lora) });
        }
        let (input_norm, post_norm) = (Weight::Trained(next(&[6])), Weight::Trained(next(&[6])));
        (Layer { input_norm, projections, post_norm, head_dim: HEAD_DIM, eps: 1e-5 }, vars)
    }

    /// The operation's output and gradients are those of candle's operations, whatever is kept, with dropout too.
    #[test]
    fn equals_the_plain_layer() {
        for (checkpointing, dropout) in [(false, 0.0), (true, 0.0), (false, 0.4), (true, 0.4)] {
            let (layer, vars) = layer(dropout);
            let (layer, x, t) = (Arc::new(layer), var(77, &[5, 6]), var(78, &[5, 6]));
            let (lengths, rope) = (vec![2, 3], Rope::new(&[2, 3], &[1.0]));
            let pass = Arc::new(Pass { lengths, rope, checkpointing, gradients: Gradients::default() });
            let got = layer.forward(&x, &pass, Some(9), true).unwrap();
            let want = layer.plain(&x, &pass, Some(9)).unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let close = |got: &Tensor, want: &Tensor, what: &str| {
                let largest = flat(want).iter().fold(0.0f32, |m, w| m.max(w.abs()));
                for (g, w) in flat(got).iter().zip(flat(want)) {
                    assert!((g - w).abs() <= 1e-4 * largest, "{checkpointing}, {dropout}, {what}: {g}, not {w}");
                }
            };
            close(&got, &want, "output");
            let gradients = |y: &Tensor| (y * t.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, want) = (gradients(&got), gradients(&want));
            close(got.get(&x).unwrap(), want.get(&x).unwrap(), "input");
            for (i, var) in vars.iter().enumerate() {
                let got = pass.gradients.take(var).unwrap().unwrap();
                close(&got, want.get(var).unwrap(), &format!("variable {i}"));
            }
        }
    }

    /// The gradient of the input, and of every trained number, is that of a difference quotient.
    #[test]
    fn gradients_are_difference_quotients() {
        let (layer, mut vars) = layer(0.0);
        let (layer, x, t) = (Arc::new(layer), var(77, &[5, 6]), var(78, &[5, 6]));
        let value = |pass: &Arc<Pass>| {
            let y = layer.forward(&x, pass, None, true).unwrap();
            (y * t.as_tensor()).unwrap().sum_all().unwrap()
        };
        let pass = || {
            let (lengths, rope) = (vec![2, 3], Rope::new(&[2, 3], &[1.0]));
            Arc::new(Pass { lengths, rope, checkpointing: false, gradients: Gradients::default() })
        };
        let first = pass();
        let by_candle = value(&first).backward().unwrap();
        vars.push(x.clone());
        for (v, var) in vars.iter().enumerate() {
            let gradient = first.gradients.take(var).unwrap();
            let gradient = gradient.unwrap_or_else(|| by_candle.get(var).unwrap().clone());
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (got, at) = (flat(&gradient), flat(var));
            for i in 0..at.len() {
                let moved = |by: f32| {
                    let mut numbers = at.clone();
                    numbers[i] += by;
                    var.set(&Tensor::from_vec(numbers, var.shape(), &Device::Cpu).unwrap()).unwrap();
                    value(&pass()).to_scalar::<f32>().unwrap()
                };
                let quotient = (moved(5e-3) - moved(-5e-3)) / 1e-2;
                moved(0.0);
                assert!((got[i] - quotient).abs() < 3e-2 * (1.0 + quotient.abs()), "{v}, {i}: {} {quotient}", got[i]);
            }
        }
    }
}
