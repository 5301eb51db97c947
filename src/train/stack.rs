//! Decoder layers one after the other.
//!
//! On a CPU all layers are one operation of candle's graph: between them nothing is copied or added twice, no thread waits
//! for candle's, and how much is kept for the backward pass is ours to say. On other devices, and in other numbers than f32,
//! they are made of candle's operations.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::layer::{Activations, Layer, Pass, Run};
use super::ops::{self, numbers};
use crate::Result;

/// What a pass is for.
pub enum Aim {
    /// Its numbers alone.
    Output,
    /// Gradients too. `noise` has the seeds of the layers' dropouts; with `input` false the backward pass ends at the first
    /// layer.
    Gradients { noise: Vec<u64>, input: bool },
}

impl Aim {
    fn noise(&self, layer: usize) -> Option<u64> {
        match self {
            Aim::Output => None,
            Aim::Gradients { noise, .. } => Some(noise[layer]),
        }
    }
}

/// The output of `layers` for `x` `[rows, hidden]`.
pub fn forward(layers: &[Arc<Layer>], x: &Tensor, pass: &Arc<Pass>, aim: Aim) -> Result<Tensor> {
    if layers.is_empty() {
        return Ok(x.clone());
    }
    if ops::is_plain_f32(x) {
        let op = Stack { layers: layers.to_vec(), pass: pass.clone(), aim, kept: Mutex::default() };
        return Ok(x.contiguous()?.apply_op1(op)?);
    }
    let mut x = x.clone();
    for (l, layer) in layers.iter().enumerate() {
        x = layer.plain(&x, pass, aim.noise(l))?;
        if let Aim::Output = aim {
            // Else candle would keep what a backward pass needs.
            x = x.detach();
        }
    }
    Ok(x)
}

/// A pass over a batch, as a node of candle's graph.
struct Stack {
    layers: Vec<Arc<Layer>>,
    pass: Arc<Pass>,
    aim: Aim,
    /// Of each layer, from the forward pass to the backward one.
    kept: Mutex<Vec<Kept>>,
}

struct Kept {
    input: Vec<f32>,
    /// `None` if they are to be computed again.
    activations: Option<Activations>,
}

impl Stack {
    fn run(&self, layer: usize, rows: usize) -> Run<'_> {
        Run { layer: &self.layers[layer], pass: &self.pass, noise: self.aim.noise(layer), rows }
    }

    /// The output, and what a backward pass needs.
    fn pass(&self, x: &[f32], rows: usize) -> candle_core::Result<(Vec<f32>, Vec<Kept>)> {
        let (mut x, mut kept) = (x.to_vec(), vec![]);
        for layer in 0..self.layers.len() {
            let run = self.run(layer, rows);
            let activations = run.activations(&x)?;
            let input = std::mem::replace(&mut x, run.output(&activations)?);
            if let Aim::Gradients { .. } = self.aim {
                let activations = (!self.pass.checkpointing).then_some(activations);
                kept.push(Kept { input, activations });
            }
        }
        Ok((x, kept))
    }
}

impl CustomOp1 for Stack {
    fn name(&self) -> &'static str {
        "decoder-layers"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (y, kept) = self.pass(ops::slice(storage, layout)?, layout.dims()[0])?;
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Aim::Gradients { input, .. } = self.aim else { return Ok(None) };
        let rows = x.dim(0)?;
        let mut kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        if kept.is_empty() {
            // Of a second backward pass over the same graph.
            (_, kept) = self.pass(&numbers(x)?, rows)?;
        }
        let mut dy = numbers(&dy.contiguous()?)?.to_vec();
        for (layer, Kept { input: x, activations }) in kept.into_iter().enumerate().rev() {
            let run = self.run(layer, rows);
            let activations = activations.map_or_else(|| run.activations(&x), Ok)?;
            match run.backward(&x, activations, &dy, layer > 0 || input)? {
                Some(dx) => dy = dx,
                None => return Ok(None),
            }
        }
        Ok(Some(Tensor::from_vec(dy, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{Device, Var};

    use super::super::gradients::Gradients;
    use super::super::linear::{Dora, Linear, Lora, Weight};
    use super::super::ops::Rope;
    use super::super::ops::testing::var;
    use super::*;
    use crate::base::Projection;

    const HEAD_DIM: usize = 2;

    /// Two layers, in which two query heads share a key-value head; hidden 6, feed-forward 5. Everything is trained, with
    /// pairs beside; with DoRA, whose weights stay as they are, everything else.
    fn layers(dropout: f64, dora: bool) -> (Vec<Arc<Layer>>, Vec<Var>) {
        let mut vars = vec![];
        let layers = (0..2).map(|_| Arc::new(layer(dropout, dora, &mut vars))).collect();
        (layers, vars)
    }

    fn layer(dropout: f64, dora: bool, vars: &mut Vec<Var>) -> Layer {
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
            let mut lora = Lora { a: next(&[3, k]), b: next(&[n, 3]), scale: 0.7, dropout, dora: None };
            let weight = if dora {
                let weight = var(1000 + projection as u64, &[n, k]).into_inner();
                let dora = lora.dora.insert(Dora::new(&weight).unwrap());
                dora.magnitude = next(&[n]);
                Weight::Frozen(weight)
            } else {
                Weight::Trained(next(&[n, k]))
            };
            projections.insert(projection, Linear { weight, lora: Some(lora) });
        }
        let (input_norm, post_norm) = (Weight::Trained(next(&[6])), Weight::Trained(next(&[6])));
        Layer { input_norm, projections, post_norm, head_dim: HEAD_DIM, eps: 1e-5 }
    }

    /// The operation's output and gradients are those of candle's operations, whatever is kept, with dropout too.
    #[test]
    fn equals_the_plain_layers() {
        let cases = [(false, 0.0), (true, 0.0), (false, 0.4), (true, 0.4)].map(|case| [(case, false), (case, true)]);
        for ((checkpointing, dropout), dora) in cases.concat() {
            let ((layers, vars), x, t) = (layers(dropout, dora), var(77, &[5, 6]), var(78, &[5, 6]));
            let (lengths, rope) = (vec![2, 3], Rope::new(&[2, 3], &[1.0]));
            let pass = Arc::new(Pass { lengths, rope, checkpointing, gradients: Gradients::default() });
            let aim = Aim::Gradients { noise: vec![9, 10], input: true };
            let got = forward(&layers, &x, &pass, aim).unwrap();
            let want = layers[1].plain(&layers[0].plain(&x, &pass, Some(9)).unwrap(), &pass, Some(10)).unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let close = |got: &Tensor, want: &Tensor, what: &str| {
                let largest = flat(want).iter().fold(0.0f32, |m, w| m.max(w.abs()));
                for (g, w) in flat(got).iter().zip(flat(want)) {
                    assert!(
                        (g - w).abs() <= 1e-4 * largest,
                        "{checkpointing}, {dropout}, {dora}, {what}: {g}, not {w}"
                    );
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
        let ((layers, mut vars), x, t) = (layers(0.0, false), var(77, &[5, 6]), var(78, &[5, 6]));
        let value = |pass: &Arc<Pass>| {
            let aim = Aim::Gradients { noise: vec![0, 0], input: true };
            let y = forward(&layers, &x, pass, aim).unwrap();
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
