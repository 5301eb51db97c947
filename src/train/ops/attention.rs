//! Causal attention with grouped queries inside each of the packed sequences.

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use super::{Matrix, Target, multiply};
use crate::base::simd::{self, Simd};

/// [`Heads::forward`] made of candle's operations.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize], hd: usize) -> Result<Tensor> {
    let (heads, kv_heads) = (q.dim(1)? / hd, k.dim(1)? / hd);
    let (mut start, mut out) = (0, Vec::with_capacity(lengths.len()));
    for &n in lengths {
        let split =
            |x: &Tensor, heads: usize| x.narrow(0, start, n)?.reshape((n, heads, hd))?.transpose(0, 1)?.contiguous();
        let q = split(q, heads)?.reshape((kv_heads, heads / kv_heads * n, hd))?;
        let (k, v) = (split(k, kv_heads)?, split(v, kv_heads)?);
        let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? * (1.0 / (hd as f64).sqrt()))?;
        let mask: Vec<f32> =
            (0..n).flat_map(|i| (0..n).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY })).collect();
        let mask = Tensor::from_vec(mask, (1, 1, n, n), q.device())?;
        let scores = scores.reshape((kv_heads, heads / kv_heads, n, n))?.broadcast_add(&mask)?;
        let max = scores.max_keepdim(D::Minus1)?.detach();
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.to_dtype(v.dtype())?;
        let y = weights.reshape((kv_heads, heads / kv_heads * n, n))?.matmul(&v)?;
        out.push(y.reshape((heads, n, hd))?.transpose(0, 1)?.reshape((n, heads * hd))?);
        start += n;
    }
    Tensor::cat(&out, 0)
}

/// The shape of an attention: sequences packed in rows, heads packed in a row's columns.
pub struct Heads<'a> {
    /// Rows of each sequence; together they are all rows.
    pub lengths: &'a [usize],
    pub head_dim: usize,
    /// Numbers in a row of q.
    pub q_width: usize,
    /// Numbers in a row of k and of v.
    pub kv_width: usize,
}

/// One sequence's rows and one key-value head.
struct Task {
    start: usize,
    rows: usize,
    kv_head: usize,
}

impl Heads<'_> {
    fn tasks(&self) -> Vec<Task> {
        let kv_heads = self.kv_width / self.head_dim;
        let mut start = 0;
        let mut tasks = Vec::with_capacity(self.lengths.len() * kv_heads);
        for &rows in self.lengths {
            tasks.extend((0..kv_heads).map(|kv_head| Task { start, rows, kv_head }));
            start += rows;
        }
        tasks
    }

    /// `softmax(q kᵀ / sqrt(head_dim))` of a head, zero above the diagonal: `[rows, rows]`.
    fn weights(&self, rows: usize, q: Matrix, k: Matrix) -> Vec<f32> {
        let (hd, simd) = (self.head_dim, Simd::detect());
        let mut p = vec![0.0; rows * rows];
        let k = Matrix { data: k.data, row: k.column, column: k.row };
        let scale = 1.0 / (hd as f32).sqrt();
        multiply((rows, rows, hd), q, k, scale, Target { data: &mut p, stride: rows, add: false }, false);
        for (i, row) in p.chunks_exact_mut(rows).enumerate() {
            let (visible, hidden) = row.split_at_mut(i + 1);
            let sum = simd::softmax(simd, visible);
            visible.iter_mut().for_each(|p| *p /= sum);
            hidden.fill(0.0);
        }
        p
    }
}

/// The rows of one head inside rows of `width` numbers.
fn head(data: &[f32], start: usize, width: usize, head: usize, head_dim: usize) -> Matrix<'_> {
    Matrix { data: &data[start * width + head * head_dim..], row: width, column: 1 }
}

/// Adds `[rows, head_dim]` numbers into a head's columns of rows of `width`.
fn place(out: &mut [f32], numbers: &[f32], task: &Task, width: usize, head: usize, head_dim: usize) {
    for (row, numbers) in numbers.chunks_exact(head_dim).enumerate() {
        out[(task.start + row) * width + head * head_dim..][..head_dim].copy_from_slice(numbers);
    }
}

impl Heads<'_> {
    /// Attention of `q` `[rows, q_width]` over `k` and `v` `[rows, kv_width]`, each sequence by itself.
    pub fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (q_width, kv_width, hd) = (self.q_width, self.kv_width, self.head_dim);
        let (group, tasks) = (q_width / kv_width, self.tasks());
        let parts: Vec<Vec<f32>> = tasks
            .par_iter()
            .map(|task| {
                let n = task.rows;
                let (k, v) =
                    (head(k, task.start, kv_width, task.kv_head, hd), head(v, task.start, kv_width, task.kv_head, hd));
                let mut out = vec![0.0; group * n * hd];
                for (g, out) in out.chunks_exact_mut(n * hd).enumerate() {
                    let q = head(q, task.start, q_width, task.kv_head * group + g, hd);
                    let p = self.weights(n, q, k);
                    multiply(
                        (n, hd, n),
                        Matrix::rows(&p, n),
                        v,
                        1.0,
                        Target { data: out, stride: hd, add: false },
                        false,
                    );
                }
                out
            })
            .collect();
        let mut y = vec![0.0; q.len()];
        for (task, part) in tasks.iter().zip(&parts) {
            for (g, part) in part.chunks_exact(task.rows * hd).enumerate() {
                place(&mut y, part, task, q_width, task.kv_head * group + g, hd);
            }
        }
        y
    }

    /// The gradients of q, k and v. The weights `p` are computed again rather than kept. With `dp = dy vᵀ` and
    /// `ds = p (dp - Σ p dp) / sqrt(head_dim)`: `dv = pᵀ dy`, `dq = ds k`, `dk = dsᵀ q`; keys and values sum over the heads
    /// that share them.
    pub fn backward(&self, q: &[f32], k: &[f32], v: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let (q_width, kv_width, hd) = (self.q_width, self.kv_width, self.head_dim);
        let (group, tasks) = (q_width / kv_width, self.tasks());
        let parts: Vec<[Vec<f32>; 3]> = tasks
            .par_iter()
            .map(|task| {
                let n = task.rows;
                let k = head(k, task.start, kv_width, task.kv_head, hd);
                let v = head(v, task.start, kv_width, task.kv_head, hd);
                let (mut dq, mut dk, mut dv) = (vec![0.0; group * n * hd], vec![0.0; n * hd], vec![0.0; n * hd]);
                let mut ds = vec![0.0; n * n];
                for (g, dq) in dq.chunks_exact_mut(n * hd).enumerate() {
                    let q = head(q, task.start, q_width, task.kv_head * group + g, hd);
                    let dy = head(dy, task.start, q_width, task.kv_head * group + g, hd);
                    let p = self.weights(n, q, k);
                    let into = |data, add| Target { data, stride: hd, add };
                    multiply((n, hd, n), Matrix::columns(&p, n), dy, 1.0, into(&mut dv, true), false);
                    let v = Matrix { data: v.data, row: v.column, column: v.row };
                    multiply((n, n, hd), dy, v, 1.0, Target { data: &mut ds, stride: n, add: false }, false);
                    let scale = 1.0 / (hd as f32).sqrt();
                    for (ds, p) in ds.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
                        let mean: f32 = ds.iter().zip(p).map(|(d, p)| d * p).sum();
                        ds.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean) * scale);
                    }
                    multiply((n, hd, n), Matrix::rows(&ds, n), k, 1.0, into(dq, false), false);
                    multiply((n, hd, n), Matrix::columns(&ds, n), q, 1.0, into(&mut dk, true), false);
                }
                [dq, dk, dv]
            })
            .collect();
        let mut all = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
        let [dq, dk, dv] = &mut all;
        for (task, [pq, pk, pv]) in tasks.iter().zip(&parts) {
            for (g, part) in pq.chunks_exact(task.rows * hd).enumerate() {
                place(dq, part, task, q_width, task.kv_head * group + g, hd);
            }
            place(dk, pk, task, kv_width, task.kv_head, hd);
            place(dv, pv, task, kv_width, task.kv_head, hd);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, numbers};
    use super::*;

    #[test]
    fn gradients() {
        // Four heads of two numbers share two key-value heads; sequences of 1, 3 and 2 rows.
        let heads = Heads { lengths: &[1, 3, 2], head_dim: 2, q_width: 8, kv_width: 4 };
        let inputs = [(1, &[6, 8][..]), (2, &[6, 4]), (3, &[6, 4])];
        let dy = numbers(4, 48);
        check(
            inputs,
            &dy,
            |[q, k, v]| heads.forward(q, k, v),
            |[q, k, v]| heads.backward(q, k, v, &dy),
            |[q, k, v]| attention(q, k, v, &[1, 3, 2], 2),
        );
    }
}
