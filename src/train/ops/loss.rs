//! Cross-entropy, alone and fused with the output layer.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Matrix, Target, is_plain_f32, multiply, slice};
use crate::base::simd::{self, Simd};

/// Rows whose logits are in memory at a time.
const CHUNK: usize = 128;

/// What each row should have said.
#[derive(Debug, Clone)]
pub struct Targets {
    pub classes: Vec<u32>,
    /// How much each row counts, e.g. its class's weight over the sum of all.
    pub weights: Vec<f32>,
    /// Share of the target that goes to all classes alike (arXiv 1512.00567).
    pub smoothing: f32,
}

/// `Σ weight * -log softmax(logits)[class]`, a scalar, for logits `[rows, classes]`. With smoothing `e`, the target is
/// `1 - e` of the class and `e / classes` of each.
pub fn cross_entropy(logits: &Tensor, targets: &Targets) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    let logits = logits.to_dtype(DType::F32)?;
    let logprobs = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
    let device = logits.device();
    let index = Tensor::from_slice(&targets.classes, (rows, 1), device)?;
    let weights = Tensor::from_slice(&targets.weights, rows, device)?;
    let e = targets.smoothing as f64;
    let picked = logprobs.gather(&index, 1)?.squeeze(1)?;
    let loss = match e == 0.0 {
        true => picked,
        false => ((picked * (1.0 - e))? + (logprobs.sum(1)? * (e / classes as f64))?)?,
    };
    (loss * weights)?.sum_all()?.neg()
}

/// `cross_entropy(x Wᵀ)` for `x` `[rows, in]` and `W` `[classes, in]`, without all logits in memory at once: forward and
/// backward go through [`CHUNK`] rows at a time in one pass.
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, targets: &Targets) -> Result<Tensor> {
    if !is_plain_f32(x) {
        return cross_entropy(&x.matmul(&weight.to_dtype(x.dtype())?.t()?)?, targets);
    }
    // What nobody can ask gradients of is only evaluated.
    let op = LinearCrossEntropy {
        targets: targets.clone(),
        track_x: x.track_op(),
        track_weight: weight.is_variable(),
        gradients: Mutex::default(),
    };
    x.contiguous()?.apply_op2(weight, op)
}

struct LinearCrossEntropy {
    targets: Targets,
    track_x: bool,
    track_weight: bool,
    /// Computed with the loss.
    gradients: Mutex<Option<Gradients>>,
}

struct Gradients {
    x: Vec<f32>,
    weight: Vec<f32>,
}

impl CustomOp2 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, xl: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(xs, xl)?, slice(ws, wl)?);
        let (rows, k) = (xl.dims()[0], xl.dims()[1]);
        let n = wl.dims()[0];
        let t = &self.targets;
        let (rest, simd) = (t.smoothing / n as f32, Simd::detect());
        let mut dx = vec![0.0; if self.track_x { x.len() } else { 0 }];
        let mut dw = vec![0.0; if self.track_weight { w.len() } else { 0 }];
        let mut logits = vec![0.0; CHUNK.min(rows) * n];
        let mut loss = 0.0f64;
        for first in (0..rows).step_by(CHUNK) {
            let m = CHUNK.min(rows - first);
            let (x, logits) = (&x[first * k..][..m * k], &mut logits[..m * n]);
            multiply(
                (m, n, k),
                Matrix::rows(x, k),
                Matrix::columns(w, k),
                1.0,
                Target { data: logits, stride: n, add: false },
                true,
            );
            // Each row's loss; its logits become their gradient.
            let losses: Vec<f64> = logits
                .par_chunks_exact_mut(n)
                .enumerate()
                .map(|(i, row)| {
                    let (class, weight) = (t.classes[first + i] as usize, t.weights[first + i]);
                    let max = row.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
                    let own = row[class];
                    let mean = if rest > 0.0 { row.iter().map(|&l| l as f64).sum::<f64>() / n as f64 } else { 0.0 };
                    let sum = simd::softmax(simd, row);
                    row.iter_mut().for_each(|p| *p = (*p / sum - rest) * weight);
                    row[class] -= (1.0 - t.smoothing) * weight;
                    let log_sum = max as f64 + (sum as f64).ln();
                    let e = t.smoothing as f64;
                    weight as f64 * (log_sum - (1.0 - e) * own as f64 - e * mean)
                })
                .collect();
            loss += losses.iter().sum::<f64>();
            if self.track_x {
                let dx = &mut dx[first * k..][..m * k];
                multiply((m, k, n), Matrix::rows(logits, n), Matrix::rows(w, k), 1.0, Target::sum(dx, k), true);
            }
            if self.track_weight {
                multiply((n, k, m), Matrix::columns(logits, n), Matrix::rows(x, k), 1.0, Target::sum(&mut dw, k), true);
            }
        }
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(Gradients { x: dx, weight: dw });
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, d: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Gradients { x: dx, weight: dw } =
            gradients.ok_or_else(|| candle_core::Error::msg("the loss has one backward pass"))?;
        let scale = d.to_scalar::<f32>()? as f64;
        let tensor = |on: bool, numbers: Vec<f32>, like: &Tensor| -> Result<Option<Tensor>> {
            on.then(|| Tensor::from_vec(numbers, like.shape(), like.device())?.affine(scale, 0.0)).transpose()
        };
        Ok((tensor(self.track_x, dx, x)?, tensor(self.track_weight, dw, w)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_graph, var};
    use super::*;

    fn targets(smoothing: f32) -> Targets {
        Targets { classes: vec![2, 0, 4, 1], weights: vec![1.0, 0.5, 0.0, 2.0], smoothing }
    }

    #[test]
    fn gradients_with_the_output_layer() {
        for smoothing in [0.0, 0.1] {
            let (x, w, targets) = (var(1, &[4, 3]), var(2, &[5, 3]), targets(smoothing));
            let f = || linear_cross_entropy(&x, &w, &targets)?.affine(1.5, 0.0);
            let plain = || cross_entropy(&x.matmul(&w.t()?)?, &targets)?.affine(1.5, 0.0);
            check_graph(&[x.clone(), w.clone()], f, plain);
        }
    }

    #[test]
    fn rows_of_several_chunks_add_up() {
        let rows = 2 * CHUNK + 3;
        let (x, w) = (var(1, &[rows, 3]), var(2, &[5, 3]));
        let targets = Targets {
            classes: (0..rows as u32).map(|i| i % 5).collect(),
            weights: vec![1.0 / rows as f32; rows],
            smoothing: 0.0,
        };
        let got = linear_cross_entropy(&x, &w, &targets).unwrap();
        let want = cross_entropy(&x.matmul(&w.t().unwrap()).unwrap(), &targets).unwrap();
        let (got_grads, want_grads) = (got.backward().unwrap(), want.backward().unwrap());
        for v in [&x, &w] {
            let flat = |g: &candle_core::backprop::GradStore| {
                g.get(v).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            for (g, w) in flat(&got_grads).iter().zip(flat(&want_grads)) {
                assert!((g - w).abs() < 1e-5, "{g} {w}");
            }
        }
    }

    #[test]
    fn a_certain_right_answer_costs_nothing() {
        let logits = Tensor::new(&[[100f32, 0.0], [0.0, 100.0]], &candle_core::Device::Cpu).unwrap();
        let loss = |classes: [u32; 2]| {
            let targets = Targets { classes: classes.to_vec(), weights: vec![0.5; 2], smoothing: 0.0 };
            cross_entropy(&logits, &targets).unwrap().to_scalar::<f32>().unwrap()
        };
        assert_eq!((loss([0, 1]), loss([1, 0])), (0.0, 100.0));
    }
}
