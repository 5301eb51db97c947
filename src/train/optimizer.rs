//! AdamW with decoupled weight decay (arXiv 1711.05101), as PyTorch computes it.

use std::sync::Mutex;

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor, Var};
use rayon::prelude::*;

use super::ops::{self, numbers};
use crate::Result;

/// Numbers that one task updates.
const CHUNK: usize = 1 << 14;

#[derive(Debug, Clone, PartialEq)]
pub struct AdamWOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Of matrices; norms are not decayed.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The running means of a variable's gradient and of its square.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

pub struct AdamW {
    options: AdamWOptions,
    variables: Vec<Var>,
    moments: Vec<Mutex<Moments>>,
    /// Steps taken.
    step: i32,
}

struct Update<'a> {
    options: &'a AdamWOptions,
    moments: &'a Mutex<Moments>,
    rate: f64,
    decay: f64,
    step: i32,
    /// Factor of the gradient, from clipping.
    scale: f32,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        wl: &Layout,
        gradient: &CpuStorage,
        gl: &Layout,
    ) -> candle_core::Result<()> {
        let (w, g) = (ops::slice_mut(weights, wl)?, ops::slice(gradient, gl)?);
        let o = self.options;
        let (b1, b2) = (o.beta1 as f32, o.beta2 as f32);
        let correction1 = 1.0 - o.beta1.powi(self.step);
        let correction2 = (1.0 - o.beta2.powi(self.step)).sqrt();
        let rate = (self.rate / correction1) as f32;
        let (root, epsilon) = ((1.0 / correction2) as f32, o.epsilon as f32);
        let keep = (1.0 - self.rate * self.decay) as f32;
        let mut moments = self.moments.lock().unwrap_or_else(|e| e.into_inner());
        let Moments { first, second } = &mut *moments;
        let state = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        let numbers = w.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
        numbers.zip(state).for_each(|((w, g), (m, v))| {
            for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * self.scale;
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *w = *w * keep - rate * *m / (v.sqrt() * root + epsilon);
            }
        });
        Ok(())
    }
}

/// The sum of the squares.
fn square(t: &Tensor) -> Result<f64> {
    if !t.device().is_cpu() {
        return Ok(t.sqr()?.sum_all()?.to_scalar::<f32>()? as f64);
    }
    let t = t.contiguous()?;
    let of = |chunk: &[f32]| chunk.iter().map(|x| x * x).sum::<f32>() as f64;
    Ok(numbers(&t)?.par_chunks(CHUNK).map(of).collect::<Vec<_>>().iter().sum())
}

impl AdamW {
    pub fn new(variables: Vec<Var>, options: AdamWOptions) -> Self {
        // Written rather than asked of the system, whose zeros would be copied page by page in the first step.
        let zeros = |v: &Var| {
            let mut zeros = Vec::with_capacity(v.elem_count());
            zeros.resize(v.elem_count(), 0.0);
            zeros
        };
        let moments = variables.iter().map(|v| Mutex::new(Moments { first: zeros(v), second: zeros(v) })).collect();
        AdamW { options, variables, moments, step: 0 }
    }

    /// Takes a step along `gradients`, one a variable; `None` is no gradient. They are scaled down together so that their
    /// norm is at most `max_norm` (0: as they are). Returns their norm before that.
    pub fn step(&mut self, gradients: &[Option<Tensor>], rate: f64, max_norm: f64) -> Result<f64> {
        let mut squares = 0.0;
        for gradient in gradients.iter().flatten() {
            squares += square(gradient)?;
        }
        let norm = squares.sqrt();
        let scale = if max_norm > 0.0 && norm > max_norm { (max_norm / (norm + 1e-6)) as f32 } else { 1.0 };
        self.step += 1;
        for ((var, moments), gradient) in self.variables.iter().zip(&self.moments).zip(gradients) {
            let Some(gradient) = gradient else { continue };
            let decay = if var.rank() > 1 { self.options.weight_decay } else { 0.0 };
            let update = Update { options: &self.options, moments, rate, decay, step: self.step, scale };
            var.inplace_op2(&gradient.contiguous()?, &update)?;
        }
        Ok(norm)
    }

    pub fn moments(&self) -> Vec<Moments> {
        self.moments.iter().map(|m| m.lock().unwrap_or_else(|e| e.into_inner()).clone()).collect()
    }

    /// Goes on after `step` steps that left these moments.
    pub fn restore(&mut self, moments: Vec<Moments>, step: usize) {
        self.moments = moments.into_iter().map(Mutex::new).collect();
        self.step = step as i32;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The recurrence in f64, number by number.
    #[test]
    fn equals_the_recurrence() {
        let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
        let var = Var::from_tensor(&Tensor::new(&[[0.5f32, -1.0], [2.0, 0.0]], &Device::Cpu).unwrap()).unwrap();
        let mut adamw = AdamW::new(vec![var.clone()], options);
        let mut want = [0.5f64, -1.0, 2.0, 0.0];
        let (mut m, mut v) = ([0.0f64; 4], [0.0f64; 4]);
        for t in 1..=5 {
            let g: Vec<f32> = (0..4).map(|i| ((i + t) as f32).sin()).collect();
            let rate = 0.01 * t as f64;
            let gradient = Tensor::from_vec(g.clone(), (2, 2), &Device::Cpu).unwrap();
            let norm = adamw.step(&[Some(gradient)], rate, 0.5).unwrap();
            let plain = g.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
            assert!((norm - plain).abs() < 1e-6);
            for i in 0..4 {
                let g = g[i] as f64 * (0.5 / (norm + 1e-6)).min(1.0);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (m, v) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
                want[i] = want[i] * (1.0 - rate * 0.1) - rate * m / (v.sqrt() + 1e-8);
            }
        }
        let got = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (g, w) in got.iter().zip(want) {
            assert!((*g as f64 - w).abs() < 1e-5, "{g} {w}");
        }
    }
}
