//! DoRA's gains: what each output feature of a changed matrix is multiplied with.

use rayon::prelude::*;

use crate::adapter::LoraPair;
use crate::{Error, Result};

/// Rows whose squares are summed together, so that a sum does not depend on the threads.
const CHUNK: usize = 256;

/// `magnitude / ‖W + scale * B A‖`, one an output feature (arXiv 2402.09353, section 4.3), `None` without a magnitude.
/// `weights` is `W`, `[out_features, in_features]`, as it is served.
pub(super) fn gains(weights: &[f32], pair: &LoraPair) -> Result<Option<Vec<f32>>> {
    let Some(magnitude) = &pair.magnitude else { return Ok(None) };
    let k = weights.len() / magnitude.len();
    let norm = |(row, b): (&[f32], &[f32])| {
        let mut row = row.to_vec();
        for (b, a) in b.iter().zip(pair.a.chunks_exact(k)) {
            let factor = pair.scale * b;
            row.iter_mut().zip(a).for_each(|(w, a)| *w += factor * a);
        }
        row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>().sqrt()
    };
    let norms: Vec<f64> = weights.par_chunks_exact(k).zip(pair.b.par_chunks_exact(pair.rank)).map(norm).collect();
    divided(magnitude, &norms).map(Some)
}

/// The same for an embedding, whose `weights` are `[in_features, out_features]`: a row a token.
pub(super) fn embedding_gains(weights: &[f32], pair: &LoraPair) -> Result<Option<Vec<f32>>> {
    let Some(magnitude) = &pair.magnitude else { return Ok(None) };
    let (n, vocab) = (magnitude.len(), weights.len() / magnitude.len());
    let squares = |(chunk, rows): (usize, &[f32])| {
        let mut sums = vec![0.0f64; n];
        for (i, row) in rows.chunks_exact(n).enumerate() {
            let token = chunk * CHUNK + i;
            let a: Vec<f32> = (0..pair.rank).map(|r| pair.scale * pair.a[r * vocab + token]).collect();
            for ((sum, w), b) in sums.iter_mut().zip(row).zip(pair.b.chunks_exact(pair.rank)) {
                let w = w + b.iter().zip(&a).map(|(b, a)| b * a).sum::<f32>();
                *sum += f64::from(w) * f64::from(w);
            }
        }
        sums
    };
    let parts: Vec<Vec<f64>> = weights.par_chunks(CHUNK * n).enumerate().map(squares).collect();
    let norms: Vec<f64> = (0..n).map(|j| parts.iter().map(|sums| sums[j]).sum::<f64>().sqrt()).collect();
    divided(magnitude, &norms).map(Some)
}

fn divided(magnitude: &[f32], norms: &[f64]) -> Result<Vec<f32>> {
    let gain = |(j, (&m, norm)): (usize, (&f32, &f64))| {
        let gain = (f64::from(m) / norm) as f32;
        match gain.is_finite() {
            true => Ok(gain),
            false => Err(Error::unprocessable(format!(
                "DoRA: the magnitude of output {j} is {m} and the norm of its weights {norm}; expected a finite quotient"
            ))),
        }
    };
    magnitude.iter().zip(norms).enumerate().map(gain).collect()
}
