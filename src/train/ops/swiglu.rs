//! The gate of the feed-forward layer: `silu(gate) * up` (arXiv 2002.05202).

use rayon::prelude::*;

use crate::base::simd::{self, Simd};

/// Numbers that one task computes.
const CHUNK: usize = 1 << 13;

/// `silu(gate) * up`.
pub fn forward(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let (mut out, simd) = (vec![0.0; gate.len()], Simd::detect());
    let chunks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    chunks.for_each(|((out, gate), up)| simd::silu_mul(simd, gate, up, out));
    out
}

/// The gradients of the gate and of up.
pub fn backward(gate: &[f32], up: &[f32], dy: &[f32]) -> [Vec<f32>; 2] {
    let (mut dg, mut du, simd) = (vec![0.0; gate.len()], vec![0.0; gate.len()], Simd::detect());
    let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
    let chunks = dg.par_chunks_mut(CHUNK).zip(du.par_chunks_mut(CHUNK)).zip(inputs);
    chunks.for_each(|((dg, du), ((gate, up), dy))| simd::silu_mul_backward(simd, gate, up, dy, dg, du));
    [dg, du]
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, numbers};
    use super::*;

    #[test]
    fn gradients() {
        let dy = numbers(3, 21);
        check(
            [(1, &[3, 7]), (2, &[3, 7])],
            &dy,
            |[g, u]| forward(g, u),
            |[g, u]| backward(g, u, &dy),
            |[g, u]| g.silu()? * u,
        );
    }
}
