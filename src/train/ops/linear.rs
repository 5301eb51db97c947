//! A linear layer that is not trained.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{Matrix, Target, multiply, slice, with_slices};

/// `x Wᵀ` for `x` `[rows, in]` and a frozen `W` `[out, in]`.
///
/// candle's own product would compute and keep a gradient of `W` too: half as much work again, and as much memory as
/// the weights.
pub fn frozen_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return x.matmul(&weight.t()?);
    }
    x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone() })
}

struct FrozenLinear {
    weight: Tensor,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let (n, k) = self.weight.dims2()?;
        let m = x.len() / k;
        let mut y = vec![0.0; m * n];
        with_slices([&self.weight], |[w]| {
            let (x, w) = (Matrix::rows(x, k), Matrix::columns(w, k));
            multiply((m, n, k), x, w, 1.0, Target { data: &mut y, stride: n, add: false }, true);
        })?;
        Ok((CpuStorage::F32(y), Shape::from((m, n))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.matmul(&self.weight).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, var};
    use super::*;

    #[test]
    fn gradients() {
        let (x, w) = (var(1, &[3, 5]), var(2, &[4, 5]));
        let (w, t) = (w.as_tensor().clone(), var(3, &[3, 4]).as_tensor().clone());
        let f = || frozen_linear(&x, &w)?.mul(&t)?.sum_all();
        let plain = || x.matmul(&w.t()?)?.mul(&t)?.sum_all();
        check(std::slice::from_ref(&x), f, plain);
    }
}
