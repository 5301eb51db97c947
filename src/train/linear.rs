//! A linear layer, with its low-rank pair.

use candle_core::{D, DType, Device, Tensor, Var};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::gradients::Gradients;
use super::ops::{Matrix, Target, multiply, numbers};
use crate::Result;

pub enum Weight {
    Frozen(Tensor),
    Trained(Var),
}

impl Weight {
    /// In the numbers that a pass computes in.
    pub fn cast(&self, dtype: DType) -> candle_core::Result<Tensor> {
        self.tensor().to_dtype(dtype)
    }

    pub fn tensor(&self) -> &Tensor {
        match self {
            Weight::Frozen(t) => t,
            Weight::Trained(v) => v.as_tensor(),
        }
    }

    pub fn trained(&self) -> Option<&Var> {
        match self {
            Weight::Frozen(_) => None,
            Weight::Trained(v) => Some(v),
        }
    }
}

pub struct Lora {
    /// `[rank, in]`.
    pub a: Var,
    /// `[out, rank]`.
    pub b: Var,
    pub scale: f64,
    /// Share of the input that is left out at random.
    pub dropout: f64,
    pub dora: Option<Dora>,
}

/// What makes a pair one of DoRA (arXiv 2402.09353): the layer's outputs are multiplied with the magnitude over the norm of
/// the weights, the pair's product added. The norm counts as a constant in gradients, as section 4.3 of the paper and
/// `DoraLinearLayer` of PEFT have it. Dropout leaves out the pair's inputs alone, here as elsewhere; PEFT's leaves out those
/// of a part of the base's product too.
pub struct Dora {
    /// `[out]`.
    pub magnitude: Var,
    /// The squares of the frozen weights, summed over each output's: `[out]`.
    squares: Vec<f32>,
}

impl Dora {
    /// The magnitudes with which a fresh pair changes nothing. `weight` is `[out, in]` and stays as it is.
    pub fn new(weight: &Tensor) -> Result<Self> {
        let squares: Vec<f32> =
            weight.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.to_device(&Device::Cpu)?.to_vec1()?;
        let norms: Vec<f32> = squares.iter().map(|s| s.sqrt()).collect();
        let magnitude = Var::from_tensor(&Tensor::from_vec(norms, squares.len(), weight.device())?)?;
        Ok(Dora { magnitude, squares })
    }

    /// `‖W + scale B A‖`, by output: the squares of `W`, plus `2 scale B A Wᵀ`, plus `scale² B A Aᵀ Bᵀ`.
    fn norms(&self, (weight, a, b): (&[f32], &[f32], &[f32]), scale: f32) -> Vec<f32> {
        let (n, k) = (self.squares.len(), weight.len() / self.squares.len());
        let r = b.len() / n;
        let (mut wa, mut aa) = (vec![0.0; n * r], vec![0.0; r * r]);
        multiply((n, r, k), Matrix::rows(weight, k), Matrix::columns(a, k), 1.0, Target::sum(&mut wa, r), true);
        multiply((r, r, k), Matrix::rows(a, k), Matrix::columns(a, k), 1.0, Target::sum(&mut aa, r), true);
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let scale = f64::from(scale);
        let norm = |(square, (b, wa)): (&f32, (&[f32], &[f32]))| {
            let baa: Vec<f32> = aa.chunks_exact(r).map(|row| dot(row, b) as f32).collect();
            let square = f64::from(*square) + scale * (2.0 * dot(b, wa) + scale * dot(b, &baa));
            square.max(0.0).sqrt() as f32
        };
        self.squares.iter().zip(b.chunks_exact(r).zip(wa.chunks_exact(r))).map(norm).collect()
    }
}

pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    pub lora: Option<Lora>,
}

/// Which random numbers a dropout takes.
#[derive(Clone, Copy)]
pub struct Noise {
    pub seed: u64,
    pub stream: u64,
}

/// The factors of a dropout: 0 with probability `p`, else `1 / (1 - p)`, so that the mean stays. The same for the same noise.
fn dropout(p: f64, noise: Noise, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(noise.seed);
    rng.set_stream(noise.stream);
    let (kept, threshold) = ((1.0 / (1.0 - p)) as f32, (p * 2f64.powi(32)) as u32);
    (0..len).map(|_| if rng.next_u32() < threshold { 0.0 } else { kept }).collect()
}

impl Lora {
    fn mask(&self, noise: Option<Noise>, len: usize) -> Option<Vec<f32>> {
        noise.filter(|_| self.dropout > 0.0).map(|noise| dropout(self.dropout, noise, len))
    }
}

impl Linear {
    /// The layer made of candle's operations, in the numbers of `x`.
    pub fn plain(&self, x: &Tensor, noise: Option<Noise>) -> Result<Tensor> {
        let weight = self.weight.cast(x.dtype())?;
        let y = x.matmul(&weight.t()?)?;
        let Some(lora) = &self.lora else { return Ok(y) };
        let (a, b) = (lora.a.to_dtype(x.dtype())?, lora.b.to_dtype(x.dtype())?);
        let dropped = match lora.mask(noise, x.elem_count()) {
            Some(mask) => (x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?)?,
            None => x.clone(),
        };
        let y = (y + (dropped.matmul(&a.t()?)? * lora.scale)?.matmul(&b.t()?)?)?;
        let Some(dora) = &lora.dora else { return Ok(y) };
        let sum = (self.weight.cast(DType::F32)? + (lora.b.matmul(&lora.a)? * lora.scale)?)?;
        let norm = sum.sqr()?.sum(D::Minus1)?.sqrt()?.detach();
        Ok(y.broadcast_mul(&(dora.magnitude.as_tensor() / norm)?.to_dtype(x.dtype())?)?)
    }

    /// Adds `x Wᵀ + scale x Aᵀ Bᵀ` to `y`, for `x` `[rows, in]`; with DoRA, that multiplied by `magnitude / norm`.
    pub fn forward(&self, x: &[f32], noise: Option<Noise>, y: &mut [f32]) -> candle_core::Result<()> {
        let (n, k) = self.weight.tensor().dims2()?;
        let Some((lora, dora)) = self.lora.as_ref().and_then(|lora| Some((lora, lora.dora.as_ref()?))) else {
            return self.add_products(x, noise, y);
        };
        let mut products = vec![0.0; x.len() / k * n];
        self.add_products(x, noise, &mut products)?;
        let (weight, a, b) = (numbers(self.weight.tensor())?, numbers(&lora.a)?, numbers(&lora.b)?);
        let norms = dora.norms((&weight, &a, &b), lora.scale as f32);
        let gains: Vec<f32> = numbers(&dora.magnitude)?.iter().zip(norms).map(|(m, norm)| m / norm).collect();
        y.par_chunks_exact_mut(n).zip(products.par_chunks_exact(n)).for_each(|(y, products)| {
            y.iter_mut().zip(products.iter().zip(&gains)).for_each(|(y, (product, gain))| *y += gain * product);
        });
        Ok(())
    }

    /// Adds `x Wᵀ + scale x Aᵀ Bᵀ` to `y`.
    fn add_products(&self, x: &[f32], noise: Option<Noise>, y: &mut [f32]) -> candle_core::Result<()> {
        let (n, k) = self.weight.tensor().dims2()?;
        let (weight, m) = (numbers(self.weight.tensor())?, x.len() / k);
        multiply((m, n, k), Matrix::rows(x, k), Matrix::columns(&weight, k), 1.0, Target::sum(y, n), true);
        let Some(lora) = &self.lora else { return Ok(()) };
        let (a, b, r) = (numbers(&lora.a)?, numbers(&lora.b)?, lora.a.dim(0)?);
        let mut t = vec![0.0; m * r];
        let dropped = lora.mask(noise, x.len()).map(|mask| times(mask, x));
        let x = dropped.as_deref().unwrap_or(x);
        multiply((m, r, k), Matrix::rows(x, k), Matrix::columns(&a, k), 1.0, Target::sum(&mut t, r), true);
        multiply((m, n, r), Matrix::rows(&t, r), Matrix::columns(&b, r), lora.scale as f32, Target::sum(y, n), true);
        Ok(())
    }

    /// Adds the gradient of the input to `dx`, where there is one, and notes those of what is trained. With `t = x Aᵀ` and
    /// `dt = scale dy B`: `dB = scale dyᵀ t`, `dA = dtᵀ x`, `dx = dy W + dt A`; of a trained weight `dW = dyᵀ x`. With DoRA,
    /// where `y = magnitude / norm * z`, the magnitude's is the sum of `dy z / norm`, and `dz` takes the place of `dy`.
    pub fn backward(
        &self,
        x: &[f32],
        noise: Option<Noise>,
        dy: &[f32],
        mut dx: Option<&mut [f32]>,
        gradients: &Gradients,
    ) -> candle_core::Result<()> {
        let (n, k) = self.weight.tensor().dims2()?;
        let (weight, m) = (numbers(self.weight.tensor())?, x.len() / k);
        let dz = match self.lora.as_ref().and_then(|lora| Some((lora, lora.dora.as_ref()?))) {
            None => None,
            Some((lora, dora)) => {
                // `z` again, for the magnitude's gradient.
                let mut z = vec![0.0; m * n];
                self.add_products(x, noise, &mut z)?;
                let norms = dora.norms((&weight, &*numbers(&lora.a)?, &*numbers(&lora.b)?), lora.scale as f32);
                let mut dm = vec![0.0; n];
                for (z, dy) in z.chunks_exact(n).zip(dy.chunks_exact(n)) {
                    dm.iter_mut().zip(z.iter().zip(dy)).for_each(|(dm, (z, dy))| *dm += z * dy);
                }
                dm.iter_mut().zip(&norms).for_each(|(dm, norm)| *dm /= norm);
                gradients.add(&dora.magnitude, dm);
                let gains: Vec<f32> = numbers(&dora.magnitude)?.iter().zip(norms).map(|(m, norm)| m / norm).collect();
                // In the place of `z`.
                z.par_chunks_exact_mut(n).zip(dy.par_chunks_exact(n)).for_each(|(dz, dy)| {
                    dz.iter_mut().zip(dy.iter().zip(&gains)).for_each(|(dz, (dy, gain))| *dz = dy * gain);
                });
                Some(z)
            }
        };
        let dy = dz.as_deref().unwrap_or(dy);
        if let Some(dx) = dx.as_deref_mut() {
            multiply((m, k, n), Matrix::rows(dy, n), Matrix::rows(&weight, k), 1.0, Target::sum(dx, k), true);
        }
        if let Some(var) = self.weight.trained() {
            let mut dw = vec![0.0; n * k];
            multiply((n, k, m), Matrix::columns(dy, n), Matrix::rows(x, k), 1.0, Target::sum(&mut dw, k), true);
            gradients.add(var, dw);
        }
        let Some(lora) = &self.lora else { return Ok(()) };
        let (a, b, r, scale) = (numbers(&lora.a)?, numbers(&lora.b)?, lora.a.dim(0)?, lora.scale as f32);
        let mask = lora.mask(noise, x.len());
        let dropped = mask.clone().map(|mask| times(mask, x));
        let x = dropped.as_deref().unwrap_or(x);
        // `t` again: a thin product costs less than keeping it would.
        let (mut t, mut dt) = (vec![0.0; m * r], vec![0.0; m * r]);
        multiply((m, r, k), Matrix::rows(x, k), Matrix::columns(&a, k), 1.0, Target::sum(&mut t, r), true);
        multiply((m, r, n), Matrix::rows(dy, n), Matrix::rows(&b, r), scale, Target::sum(&mut dt, r), true);
        let (mut da, mut db) = (vec![0.0; r * k], vec![0.0; n * r]);
        multiply((n, r, m), Matrix::columns(dy, n), Matrix::rows(&t, r), scale, Target::sum(&mut db, r), true);
        multiply((r, k, m), Matrix::columns(&dt, r), Matrix::rows(x, k), 1.0, Target::sum(&mut da, k), true);
        match (dx, mask) {
            (None, _) => {}
            (Some(dx), None) => {
                multiply((m, k, r), Matrix::rows(&dt, r), Matrix::rows(&a, k), 1.0, Target::sum(dx, k), true);
            }
            (Some(dx), Some(mask)) => {
                let mut masked = vec![0.0; m * k];
                multiply((m, k, r), Matrix::rows(&dt, r), Matrix::rows(&a, k), 1.0, Target::sum(&mut masked, k), true);
                dx.par_iter_mut().zip(times(mask, &masked)).for_each(|(dx, masked)| *dx += masked);
            }
        }
        gradients.add(&lora.a, da);
        gradients.add(&lora.b, db);
        Ok(())
    }
}

fn times(mut factors: Vec<f32>, x: &[f32]) -> Vec<f32> {
    factors.par_iter_mut().zip(x).for_each(|(f, x)| *f *= x);
    factors
}
