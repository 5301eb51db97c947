//! Rotation of heads by their position (RoFormer, arXiv 2104.09864), halves split as in Hugging Face's Llama.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

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

    /// Rotates the heads of rows of `width` numbers in place; with `sign` -1 back, which is the transpose.
    pub fn turn(&self, x: &mut [f32], width: usize, sign: f32) {
        let half = self.head_dim / 2;
        x.par_chunks_exact_mut(width).enumerate().for_each(|(row, x)| {
            let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
            for x in x.chunks_exact_mut(2 * half) {
                let (x1, x2) = x.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (x1[i], x2[i]);
                    x1[i] = a * cos[i] - sign * b * sin[i];
                    x2[i] = b * cos[i] + sign * a * sin[i];
                }
            }
        });
    }
}

/// [`Rope::turn`] made of candle's operations, for `x` `[rows, heads * head_dim]`.
pub fn rope(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    let ((rows, width), hd) = (x.dims2()?, rope.head_dim);
    let table = |t: &[f32]| Tensor::from_slice(t, (rows, 1, hd / 2), x.device())?.to_dtype(x.dtype());
    let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
    let x = x.reshape((rows, width / hd, hd))?;
    let (x1, x2) = (x.narrow(2, 0, hd / 2)?, x.narrow(2, hd / 2, hd / 2)?);
    let o1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let o2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[o1, o2], 2)?.reshape((rows, width))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, numbers};
    use super::*;

    #[test]
    fn gradients() {
        let (table, dy) = (Rope::new(&[2, 3], &[1.0, 0.01]), numbers(3, 40));
        let turned = |x: &[f32], sign| {
            let mut x = x.to_vec();
            table.turn(&mut x, 8, sign);
            x
        };
        check([(1, &[5, 8])], &dy, |[x]| turned(x, 1.0), |[_]| [turned(&dy, -1.0)], |[x]| rope(x, &table));
    }
}
