//! RMSNorm (arXiv 1910.07467).

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{slice, with_slices};
use crate::base::simd::{self, Simd};

/// `x / sqrt(mean(x²) + eps) * weight`, row by row; `x` is `[rows, width]`, `weight` `[width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return plain(x, weight, eps);
    }
    x.contiguous()?.apply_op2(weight, RmsNorm { eps: eps as f32, trained: weight.is_variable() })
}

fn plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = ((x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?).recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(weight)
}

struct RmsNorm {
    eps: f32,
    /// Whether the weight wants a gradient.
    trained: bool,
}

impl RmsNorm {
    /// `1 / sqrt(mean(x²) + eps)`.
    fn scale(&self, x: &[f32]) -> f32 {
        let squares: f32 = x.iter().map(|x| x * x).sum();
        1.0 / (squares / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(s, l)?, slice(ws, wl)?);
        let (mut y, simd) = (vec![0.0; x.len()], Simd::detect());
        let rows = y.par_chunks_exact_mut(weight.len()).zip(x.par_chunks_exact(weight.len()));
        rows.for_each(|(y, x)| simd::rms_norm(simd, x, weight, self.eps, y));
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    /// With `s` the scale and `g = dy * w`: `dx = s * (g - x * s² * mean(g x))`, `dw = Σ dy x s`.
    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dw) = with_slices([x, weight, &dy], |[x, weight, dy]| {
            let n = weight.len();
            let mut dx = vec![0.0; x.len()];
            let rows = dx.par_chunks_exact_mut(n).zip(x.par_chunks_exact(n)).zip(dy.par_chunks_exact(n));
            rows.for_each(|((dx, x), dy)| {
                let s = self.scale(x);
                let dot: f32 = x.iter().zip(dy).zip(weight).map(|((x, dy), w)| x * dy * w).sum();
                let back = dot * s * s / n as f32;
                for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                    *dx = s * (dy * w - x * back);
                }
            });
            let mut dw = vec![0.0; if self.trained { n } else { 0 }];
            if self.trained {
                for (x, dy) in x.chunks_exact(n).zip(dy.chunks_exact(n)) {
                    let s = self.scale(x);
                    for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                        *dw += x * s * dy;
                    }
                }
            }
            (dx, dw)
        })?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let dw = self.trained.then(|| Tensor::from_vec(dw, weight.shape(), x.device())).transpose()?;
        Ok((Some(dx), dw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, var};
    use super::*;

    #[test]
    fn gradients() {
        let (x, w, t) = (var(1, &[3, 5]), var(2, &[5]), var(3, &[3, 5]).as_tensor().clone());
        let f = || rms_norm(&x, &w, 1e-5)?.mul(&t)?.sum_all();
        let reference = || plain(&x, &w, 1e-5)?.mul(&t)?.sum_all();
        check(&[x.clone(), w.clone()], f, reference);
    }
}
