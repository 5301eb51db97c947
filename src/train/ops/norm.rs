//! RMSNorm (arXiv 1910.07467).

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{is_plain_f32, numbers, slice};
use crate::base::simd::{self, Simd};

/// `x / sqrt(mean(x²) + eps) * weight`, row by row; `x` is `[rows, width]`, `weight` `[width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !is_plain_f32(x) {
        return plain(x, weight, eps);
    }
    x.contiguous()?.apply_op2(weight, RmsNorm { eps: eps as f32, trained: weight.is_variable() })
}

/// [`rms_norm`] made of candle's operations, computed in f32.
pub fn plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (dtype, x, weight) = (x.dtype(), x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?);
    let scale = ((x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?).recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(&weight)?.to_dtype(dtype)
}

struct RmsNorm {
    eps: f32,
    /// Whether the weight wants a gradient.
    trained: bool,
}

/// `1 / sqrt(mean(x²) + eps)`.
fn scale(x: &[f32], eps: f32) -> f32 {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

/// The rows of `x`, each of `weight`'s length, normalised.
pub fn forward(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let (mut y, simd) = (vec![0.0; x.len()], Simd::detect());
    let rows = y.par_chunks_exact_mut(weight.len()).zip(x.par_chunks_exact(weight.len()));
    rows.for_each(|(y, x)| simd::rms_norm(simd, x, weight, eps, y));
    y
}

/// Adds the gradient of `x` to `dx`. With `s` the scale and `g = dy * w`: `dx = s * (g - x * s² * mean(g x))`.
pub fn backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let n = weight.len();
    let rows = dx.par_chunks_exact_mut(n).zip(x.par_chunks_exact(n)).zip(dy.par_chunks_exact(n));
    rows.for_each(|((dx, x), dy)| {
        let s = scale(x, eps);
        let dot: f32 = x.iter().zip(dy).zip(weight).map(|((x, dy), w)| x * dy * w).sum();
        let back = dot * s * s / n as f32;
        for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
            *dx += s * (dy * w - x * back);
        }
    });
}

/// The gradient of the weight: `Σ dy x s`.
pub fn weight_gradient(x: &[f32], width: usize, eps: f32, dy: &[f32]) -> Vec<f32> {
    let mut dw = vec![0.0; width];
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let s = scale(x, eps);
        for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
            *dw += x * s * dy;
        }
    }
    dw
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(forward(slice(s, l)?, slice(ws, wl)?, self.eps)), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (xs, weights, dys) = (numbers(x)?, numbers(weight)?, numbers(&dy)?);
        let mut dx = vec![0.0; xs.len()];
        backward(&xs, &weights, self.eps, &dys, &mut dx);
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let dw = || Tensor::from_vec(weight_gradient(&xs, weights.len(), self.eps, &dys), weight.shape(), x.device());
        Ok((Some(dx), self.trained.then(dw).transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, numbers};
    use super::*;

    #[test]
    fn gradients() {
        let dy = numbers(3, 15);
        let back = |[x, w]: [&[f32]; 2]| {
            let mut dx = vec![0.0; x.len()];
            backward(x, w, 1e-5, &dy, &mut dx);
            [dx, weight_gradient(x, w.len(), 1e-5, &dy)]
        };
        check([(1, &[3, 5]), (2, &[5])], &dy, |[x, w]| forward(x, w, 1e-5), back, |[x, w]| plain(x, w, 1e-5));
    }

    #[test]
    fn the_operation_is_the_function() {
        let var = |seed, shape: &[usize]| super::super::testing::var(seed, shape);
        let (x, w, t) = (var(1, &[3, 5]), var(2, &[5]), var(3, &[3, 5]).as_tensor().clone());
        let grads = |y: Result<Tensor>| y.unwrap().mul(&t).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (grads(rms_norm(&x, &w, 1e-5)), grads(plain(&x, &w, 1e-5)));
        for v in [&x, &w] {
            let difference = (got.get(v).unwrap() - want.get(v).unwrap()).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
        }
    }
}
