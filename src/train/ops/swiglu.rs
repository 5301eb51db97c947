//! The gate of the feed-forward layer: `silu(gate) * up` (arXiv 2002.05202).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{slice, with_slices};
use crate::base::simd::{self, Simd};

/// Numbers that one task computes.
const CHUNK: usize = 1 << 13;

/// `silu(gate) * up` for tensors of one shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match gate.device().is_cpu() {
        true => gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu),
        false => gate.silu()? * up,
    }
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gs: &CpuStorage, gl: &Layout, us: &CpuStorage, ul: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up, simd) = (slice(gs, gl)?, slice(us, ul)?, Simd::detect());
        let mut out = vec![0.0; gate.len()];
        let chunks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
        chunks.for_each(|((out, gate), up)| simd::silu_mul(simd, gate, up, out));
        Ok((CpuStorage::F32(out), gl.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dg, mut du) = (vec![0.0; gate.elem_count()], vec![0.0; gate.elem_count()]);
        with_slices([gate, up, &dy.contiguous()?], |[gate, up, dy]| {
            let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
            let chunks = dg.par_chunks_mut(CHUNK).zip(du.par_chunks_mut(CHUNK)).zip(inputs);
            let simd = Simd::detect();
            chunks.for_each(|((dg, du), ((gate, up), dy))| simd::silu_mul_backward(simd, gate, up, dy, dg, du));
        })?;
        let tensor = |numbers| Tensor::from_vec(numbers, gate.shape(), gate.device());
        Ok((Some(tensor(dg)?), Some(tensor(du)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, var};
    use super::*;

    #[test]
    fn gradients() {
        let (g, u, t) = (var(1, &[3, 7]), var(2, &[3, 7]), var(3, &[3, 7]).as_tensor().clone());
        let f = || swiglu(&g, &u)?.mul(&t)?.sum_all();
        let plain = || (g.silu()? * u.as_tensor())?.mul(&t)?.sum_all();
        check(&[g.clone(), u.clone()], f, plain);
    }
}
