//! Rotation of heads by their position (RoFormer, arXiv 2104.09864), halves split as in Hugging Face's Llama.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{slice, with_slices};

/// Cosines and sines of each row's position: `[rows, head_dim / 2]` each.
#[derive(Clone)]
pub struct Rope {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    head_dim: usize,
}

impl Rope {
    /// Positions count from 0 in each of the sequences, whose lengths are given; `frequencies` are the model's
    /// ([`crate::base::ModelConfig::rope_frequencies`]).
    pub fn new(lengths: &[usize], frequencies: &[f32]) -> Self {
        let positions = lengths.iter().flat_map(|&n| 0..n);
        let (sin, cos) = positions.flat_map(|p| frequencies.iter().map(move |f| (p as f32 * f).sin_cos())).unzip();
        Rope { cos: Arc::new(cos), sin: Arc::new(sin), head_dim: 2 * frequencies.len() }
    }

    fn turn(&self, x: &[f32], width: usize, sign: f32) -> Vec<f32> {
        let (half, mut out) = (self.head_dim / 2, vec![0.0; x.len()]);
        out.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).enumerate().for_each(|(row, (out, x))| {
            let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
            for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                let ((o1, o2), (x1, x2)) = (out.split_at_mut(half), x.split_at(half));
                for i in 0..half {
                    o1[i] = x1[i] * cos[i] - sign * x2[i] * sin[i];
                    o2[i] = x2[i] * cos[i] + sign * x1[i] * sin[i];
                }
            }
        });
        out
    }
}

/// Rotates the heads of `x` `[rows, heads * head_dim]`.
pub fn rope(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    match x.device() {
        Device::Cpu => x.contiguous()?.apply_op1(Rotate { rope: rope.clone() }),
        _ => plain(x, rope),
    }
}

fn plain(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    let ((rows, width), hd) = (x.dims2()?, rope.head_dim);
    let table = |t: &[f32]| Tensor::from_slice(t, (rows, 1, hd / 2), x.device())?.to_dtype(x.dtype());
    let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
    let x = x.reshape((rows, width / hd, hd))?;
    let (x1, x2) = (x.narrow(2, 0, hd / 2)?, x.narrow(2, hd / 2, hd / 2)?);
    let o1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let o2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[o1, o2], 2)?.reshape((rows, width))
}

struct Rotate {
    rope: Rope,
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims()[1];
        Ok((CpuStorage::F32(self.rope.turn(slice(storage, layout)?, width, 1.0)), layout.shape().clone()))
    }

    /// A rotation's transpose turns back.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = x.dims2()?;
        let dx = with_slices([&dy.contiguous()?], |[dy]| self.rope.turn(dy, width, -1.0))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, var};
    use super::*;

    #[test]
    fn gradients() {
        let (x, t) = (var(1, &[5, 8]), var(3, &[5, 8]).as_tensor().clone());
        let table = Rope::new(&[2, 3], &[1.0, 0.01]);
        let f = || rope(&x, &table)?.mul(&t)?.sum_all();
        let reference = || plain(&x, &table)?.mul(&t)?.sum_all();
        check(std::slice::from_ref(&x), f, reference);
    }
}
