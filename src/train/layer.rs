//! A decoder layer with what is trained in it.
//!
//! On a CPU a whole layer is one operation of the graph, with its backward pass written out: between its products nothing
//! is copied or added twice, and how much is kept for the way back is ours to say. On other devices it is made of candle's
//! operations.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor, TensorId, Var};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::ops::{self, Heads, Matrix, Rope, Target, multiply, norm, numbers, swiglu};
use crate::Result;
use crate::base::Projection;

pub enum Weight {
    Frozen(Tensor),
    Trained(Var),
}

impl Weight {
    pub fn tensor(&self) -> &Tensor {
        match self {
            Weight::Frozen(t) => t,
            Weight::Trained(v) => v.as_tensor(),
        }
    }

    fn trained(&self) -> Option<&Var> {
        match self {
            Weight::Frozen(_) => None,
            Weight::Trained(v) => Some(v),
        }
    }
}

pub struct Lora {
    /// `[rank, in]`.
    pub a: Var,
    /// `[out, rank]`.
    pub b: Var,
    pub scale: f64,
    /// Share of the input that is left out at random.
    pub dropout: f64,
}

pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    pub lora: Option<Lora>,
}

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
    pub keep: Keep,
    /// Gradients of what the layers train; on a CPU candle's graph does not know it.
    pub gradients: Gradients,
}

/// What a layer keeps for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// There is none.
    Nothing,
    /// Its input; the rest is computed again (arXiv 1604.06174).
    Input,
    /// All that the backward pass reads.
    All,
}

/// Gradients by the variable they are of.
#[derive(Default)]
pub struct Gradients(Mutex<HashMap<TensorId, Vec<f32>>>);

impl Gradients {
    fn add(&self, var: &Var, numbers: Vec<f32>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(var.id(), numbers);
    }

    pub fn take(&self, var: &Var) -> Result<Option<Tensor>> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&var.id());
        Ok(found.map(|numbers| Tensor::from_vec(numbers, var.shape(), &Device::Cpu)).transpose()?)
    }
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
        let linear = |projection: Projection, x: &Tensor| self.projections[&projection].plain(x, noise, projection);
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

/// The factors of a dropout: 0 with probability `p`, else `1 / (1 - p)`, so that the mean stays. The same for the same seed.
fn dropout(p: f64, seed: u64, projection: Projection, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(projection as u64);
    let (kept, threshold) = ((1.0 / (1.0 - p)) as f32, (p * 2f64.powi(32)) as u32);
    (0..len).map(|_| if rng.next_u32() < threshold { 0.0 } else { kept }).collect()
}

impl Lora {
    fn mask(&self, noise: Option<u64>, projection: Projection, len: usize) -> Option<Vec<f32>> {
        noise.filter(|_| self.dropout > 0.0).map(|seed| dropout(self.dropout, seed, projection, len))
    }
}

impl Linear {
    fn plain(&self, x: &Tensor, noise: Option<u64>, projection: Projection) -> Result<Tensor> {
        let y = x.matmul(&self.weight.tensor().t()?)?;
        let Some(lora) = &self.lora else { return Ok(y) };
        let dropped = match lora.mask(noise, projection, x.elem_count()) {
            Some(mask) => (x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?)?,
            None => x.clone(),
        };
        Ok((y + (dropped.matmul(&lora.a.t()?)? * lora.scale)?.matmul(&lora.b.t()?)?)?)
    }
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
    fn linear(&self, projection: Projection) -> candle_core::Result<(&Linear, usize, usize)> {
        let linear = &self.layer.projections[&projection];
        let (n, k) = linear.weight.tensor().dims2()?;
        Ok((linear, n, k))
    }

    /// Adds `x Wᵀ + scale x Aᵀ Bᵀ` to `y`.
    fn product(&self, projection: Projection, x: &[f32], y: &mut [f32]) -> candle_core::Result<()> {
        let ((linear, n, k), m) = (self.linear(projection)?, self.rows);
        let weight = numbers(linear.weight.tensor())?;
        multiply((m, n, k), Matrix::rows(x, k), Matrix::columns(&weight, k), 1.0, Target::sum(y, n), true);
        let Some(lora) = &linear.lora else { return Ok(()) };
        let (a, b, r) = (numbers(&lora.a)?, numbers(&lora.b)?, lora.a.dim(0)?);
        let mut t = vec![0.0; m * r];
        let dropped = lora.mask(self.noise, projection, x.len()).map(|mask| times(mask, x));
        let x = dropped.as_deref().unwrap_or(x);
        multiply((m, r, k), Matrix::rows(x, k), Matrix::columns(&a, k), 1.0, Target::sum(&mut t, r), true);
        multiply((m, n, r), Matrix::rows(&t, r), Matrix::columns(&b, r), lora.scale as f32, Target::sum(y, n), true);
        Ok(())
    }

    /// Adds the gradient of the input to `dx`, where there is one, and notes those of what is trained. With `t = x Aᵀ` and
    /// `dt = scale dy B`: `dB = scale dyᵀ t`, `dA = dtᵀ x`, `dx = dy W + dt A`; of a trained weight `dW = dyᵀ x`.
    fn back(
        &self,
        projection: Projection,
        x: &[f32],
        dy: &[f32],
        mut dx: Option<&mut [f32]>,
    ) -> candle_core::Result<()> {
        let ((linear, n, k), m) = (self.linear(projection)?, self.rows);
        let weight = numbers(linear.weight.tensor())?;
        if let Some(dx) = dx.as_deref_mut() {
            multiply((m, k, n), Matrix::rows(dy, n), Matrix::rows(&weight, k), 1.0, Target::sum(dx, k), true);
        }
        if let Some(var) = linear.weight.trained() {
            let mut dw = vec![0.0; n * k];
            multiply((n, k, m), Matrix::columns(dy, n), Matrix::rows(x, k), 1.0, Target::sum(&mut dw, k), true);
            self.pass.gradients.add(var, dw);
        }
        let Some(lora) = &linear.lora else { return Ok(()) };
        let (a, b, r, scale) = (numbers(&lora.a)?, numbers(&lora.b)?, lora.a.dim(0)?, lora.scale as f32);
        let mask = lora.mask(self.noise, projection, x.len());
        let dropped = mask.clone().map(|mask| times(mask, x));
        let x = dropped.as_deref().unwrap_or(x);
        // `t` again: a thin product costs less than keeping it would.
        let (mut t, mut dt) = (vec![0.0; m * r], vec![0.0; m * r]);
        multiply((m, r, k), Matrix::rows(x, k), Matrix::columns(&a, k), 1.0, Target::sum(&mut t, r), true);
        multiply((m, r, n), Matrix::rows(dy, n), Matrix::rows(&b, r), scale, Target::sum(&mut dt, r), true);
        let (mut da, mut db) = (vec![0.0; r * k], vec![0.0; n * r]);
        multiply((n, r, m), Matrix::columns(dy, n), Matrix::rows(&t, r), scale, Target::sum(&mut db, r), true);
        multiply((r, k, m), Matrix::columns(&dt, r), Matrix::rows(x, k), 1.0, Target::sum(&mut da, k), true);
        match (dx, mask) {
            (None, _) => {}
            (Some(dx), None) => {
                multiply((m, k, r), Matrix::rows(&dt, r), Matrix::rows(&a, k), 1.0, Target::sum(dx, k), true);
            }
            (Some(dx), Some(mask)) => {
                let mut masked = vec![0.0; m * k];
                multiply((m, k, r), Matrix::rows(&dt, r), Matrix::rows(&a, k), 1.0, Target::sum(&mut masked, k), true);
                dx.par_iter_mut().zip(times(mask, &masked)).for_each(|(dx, masked)| *dx += masked);
            }
        }
        self.pass.gradients.add(&lora.a, da);
        self.pass.gradients.add(&lora.b, db);
        Ok(())
    }

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

    fn heads<'b>(&self, pass: &'b Pass) -> candle_core::Result<Heads<'b>> {
        let (q_width, kv_width) = (self.linear(Projection::Q)?.1, self.linear(Projection::K)?.1);
        Ok(Heads { lengths: &pass.lengths, head_dim: self.layer.head_dim, q_width, kv_width })
    }

    fn activations(&self, x: &[f32]) -> candle_core::Result<Activations> {
        let heads = self.heads(self.pass)?;
        let wide = |width: usize| vec![0.0; self.rows * width];
        let h = self.normed(&self.layer.input_norm, x)?;
        let (mut q, mut k, mut v) = (wide(heads.q_width), wide(heads.kv_width), wide(heads.kv_width));
        self.product(Projection::Q, &h, &mut q)?;
        self.product(Projection::K, &h, &mut k)?;
        self.product(Projection::V, &h, &mut v)?;
        self.pass.rope.turn(&mut q, heads.q_width, 1.0);
        self.pass.rope.turn(&mut k, heads.kv_width, 1.0);
        let attention = heads.forward(&q, &k, &v);
        let mut middle = x.to_vec();
        self.product(Projection::O, &attention, &mut middle)?;
        let h = self.normed(&self.layer.post_norm, &middle)?;
        let width = self.linear(Projection::Gate)?.1;
        let (mut gate, mut up) = (wide(width), wide(width));
        self.product(Projection::Gate, &h, &mut gate)?;
        self.product(Projection::Up, &h, &mut up)?;
        Ok(Activations { q, k, v, attention, middle, gate, up })
    }

    fn output(&self, a: &Activations) -> candle_core::Result<Vec<f32>> {
        let mut y = a.middle.clone();
        self.product(Projection::Down, &swiglu::forward(&a.gate, &a.up), &mut y)?;
        Ok(y)
    }

    fn backward(&self, x: &[f32], a: Activations, dy: &[f32], input: bool) -> candle_core::Result<Option<Vec<f32>>> {
        let (layer, heads) = (self.layer, self.heads(self.pass)?);
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

fn times(mut factors: Vec<f32>, x: &[f32]) -> Vec<f32> {
    factors.par_iter_mut().zip(x).for_each(|(f, x)| *f *= x);
    factors
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
        if self.pass.keep == Keep::All {
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
        for (keep, dropout) in [(Keep::All, 0.0), (Keep::Input, 0.0), (Keep::All, 0.4), (Keep::Input, 0.4)] {
            let (layer, vars) = layer(dropout);
            let (layer, x, t) = (Arc::new(layer), var(77, &[5, 6]), var(78, &[5, 6]));
            let (lengths, rope) = (vec![2, 3], Rope::new(&[2, 3], &[1.0]));
            let pass = Arc::new(Pass { lengths, rope, keep, gradients: Gradients::default() });
            let got = layer.forward(&x, &pass, Some(9), true).unwrap();
            let want = layer.plain(&x, &pass, Some(9)).unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let close = |got: &Tensor, want: &Tensor, what: &str| {
                let largest = flat(want).iter().fold(0.0f32, |m, w| m.max(w.abs()));
                for (g, w) in flat(got).iter().zip(flat(want)) {
                    assert!((g - w).abs() <= 1e-4 * largest, "{keep:?}, {dropout}, {what}: {g}, not {w}");
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
            Arc::new(Pass { lengths, rope, keep: Keep::All, gradients: Gradients::default() })
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
