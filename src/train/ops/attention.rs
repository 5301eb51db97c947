//! Causal attention with grouped queries inside each of the packed sequences.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Matrix, Target, multiply, slice, with_slices};
use crate::base::simd::{self, Simd};

/// Attention of `q` `[rows, heads * head_dim]` over `k` and `v` `[rows, kv_heads * head_dim]`, each sequence by itself.
/// `lengths` are the sequences' rows; together they are all rows.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize], head_dim: usize) -> Result<Tensor> {
    if !q.device().is_cpu() {
        return plain(q, k, v, lengths, head_dim);
    }
    let op = Attention { lengths: lengths.to_vec(), head_dim };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

fn plain(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize], hd: usize) -> Result<Tensor> {
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

struct Attention {
    lengths: Vec<usize>,
    head_dim: usize,
}

/// One sequence's rows and one key-value head.
struct Task {
    start: usize,
    rows: usize,
    kv_head: usize,
}

impl Attention {
    fn tasks(&self, kv_heads: usize) -> Vec<Task> {
        let mut start = 0;
        let mut tasks = Vec::with_capacity(self.lengths.len() * kv_heads);
        for &rows in &self.lengths {
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

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        qs: &CpuStorage,
        ql: &Layout,
        ks: &CpuStorage,
        kl: &Layout,
        vs: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v, hd) = (slice(qs, ql)?, slice(ks, kl)?, slice(vs, vl)?, self.head_dim);
        let (q_width, kv_width) = (ql.dims()[1], kl.dims()[1]);
        let group = q_width / kv_width;
        let tasks = self.tasks(kv_width / hd);
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
        Ok((CpuStorage::F32(y), ql.shape().clone()))
    }

    /// The weights `p` are computed again rather than kept. With `dp = dy vᵀ` and `ds = p (dp - Σ p dp) / sqrt(head_dim)`:
    /// `dv = pᵀ dy`, `dq = ds k`, `dk = dsᵀ q`; keys and values sum over the heads that share them.
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hd = self.head_dim;
        let (q_width, kv_width) = (q.dim(1)?, k.dim(1)?);
        let (group, tasks) = (q_width / kv_width, self.tasks(kv_width / hd));
        let (mut dq, mut dk, mut dv) =
            (vec![0.0; q.elem_count()], vec![0.0; k.elem_count()], vec![0.0; v.elem_count()]);
        with_slices([q, k, v, &dy.contiguous()?], |[q, k, v, dy]| {
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
            for (task, [pq, pk, pv]) in tasks.iter().zip(&parts) {
                for (g, part) in pq.chunks_exact(task.rows * hd).enumerate() {
                    place(&mut dq, part, task, q_width, task.kv_head * group + g, hd);
                }
                place(&mut dk, pk, task, kv_width, task.kv_head, hd);
                place(&mut dv, pv, task, kv_width, task.kv_head, hd);
            }
        })?;
        let tensor = |numbers, like: &Tensor| Tensor::from_vec(numbers, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, var};
    use super::*;

    #[test]
    fn gradients() {
        // Four heads of two numbers share two key-value heads; sequences of 1, 3 and 2 rows.
        let (q, k, v) = (var(1, &[6, 8]), var(2, &[6, 4]), var(3, &[6, 4]));
        let t = var(4, &[6, 8]).as_tensor().clone();
        let f = || attention(&q, &k, &v, &[1, 3, 2], 2)?.mul(&t)?.sum_all();
        let reference = || plain(&q, &k, &v, &[1, 3, 2], 2)?.mul(&t)?.sum_all();
        check(&[q.clone(), k.clone(), v.clone()], f, reference);
    }
}
