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

/// A variable's moments where the variable is.
enum State {
    Memory(Mutex<Moments>),
    /// On another device; of the variable's shape.
    Tensors {
        first: Tensor,
        second: Tensor,
    },
}

impl State {
    fn new(var: &Var, moments: Moments) -> Result<Self> {
        if var.device().is_cpu() {
            return Ok(State::Memory(Mutex::new(moments)));
        }
        Self::tensors(var, &moments)
    }

    fn tensors(var: &Var, moments: &Moments) -> Result<Self> {
        let tensor = |numbers: &[f32]| Tensor::from_slice(numbers, var.shape(), var.device());
        Ok(State::Tensors { first: tensor(&moments.first)?, second: tensor(&moments.second)? })
    }

    fn moments(&self) -> Result<Moments> {
        match self {
            State::Memory(moments) => Ok(moments.lock().unwrap_or_else(|e| e.into_inner()).clone()),
            State::Tensors { first, second } => {
                let numbers = |t: &Tensor| t.flatten_all()?.to_vec1();
                Ok(Moments { first: numbers(first)?, second: numbers(second)? })
            }
        }
    }
}

pub struct AdamW {
    options: AdamWOptions,
    variables: Vec<Var>,
    states: Vec<State>,
    /// Steps taken.
    step: i32,
}

struct Update<'a> {
    options: &'a AdamWOptions,
    rate: f64,
    decay: f64,
    step: i32,
    /// Factor of the gradient, from clipping.
    scale: f32,
}

/// An update of numbers in memory.
struct InMemory<'a> {
    update: Update<'a>,
    moments: &'a Mutex<Moments>,
}

impl Update<'_> {
    /// The same as for numbers in memory, made of candle's operations.
    fn tensors(&self, var: &Var, gradient: &Tensor, first: &mut Tensor, second: &mut Tensor) -> Result<()> {
        let o = self.options;
        let g = (gradient * self.scale as f64)?;
        *first = ((&*first * o.beta1)? + (&g * (1.0 - o.beta1))?)?;
        *second = ((&*second * o.beta2)? + (g.sqr()? * (1.0 - o.beta2))?)?;
        let rate = self.rate / (1.0 - o.beta1.powi(self.step));
        let root = 1.0 / (1.0 - o.beta2.powi(self.step)).sqrt();
        let change = (&*first / ((second.sqrt()? * root)? + o.epsilon)?)?;
        let kept = (var.as_tensor().detach() * (1.0 - self.rate * self.decay))?;
        Ok(var.set(&(kept - (change * rate)?)?)?)
    }
}

impl InplaceOp2 for InMemory<'_> {
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
        let Update { options: o, rate, decay, step, scale } = self.update;
        let (b1, b2) = (o.beta1 as f32, o.beta2 as f32);
        let correction1 = 1.0 - o.beta1.powi(step);
        let correction2 = (1.0 - o.beta2.powi(step)).sqrt();
        let keep = (1.0 - rate * decay) as f32;
        let rate = (rate / correction1) as f32;
        let (root, epsilon) = ((1.0 / correction2) as f32, o.epsilon as f32);
        let mut moments = self.moments.lock().unwrap_or_else(|e| e.into_inner());
        let Moments { first, second } = &mut *moments;
        let state = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        let numbers = w.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
        numbers.zip(state).for_each(|((w, g), (m, v))| {
            for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * scale;
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
    pub fn new(variables: Vec<Var>, options: AdamWOptions) -> Result<Self> {
        // Written rather than asked of the system, whose zeros would be copied page by page in the first step.
        let zeros = |v: &Var| {
            let mut zeros = Vec::with_capacity(v.elem_count());
            zeros.resize(v.elem_count(), 0.0);
            zeros
        };
        let fresh = |v: &Var| State::new(v, Moments { first: zeros(v), second: zeros(v) });
        let states = variables.iter().map(fresh).collect::<Result<_>>()?;
        Ok(AdamW { options, variables, states, step: 0 })
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
        for ((var, state), gradient) in self.variables.iter().zip(&mut self.states).zip(gradients) {
            let Some(gradient) = gradient else { continue };
            let decay = if var.rank() > 1 { self.options.weight_decay } else { 0.0 };
            let update = Update { options: &self.options, rate, decay, step: self.step, scale };
            match state {
                State::Memory(moments) => {
                    var.inplace_op2(&gradient.contiguous()?, &InMemory { update, moments })?;
                }
                State::Tensors { first, second } => update.tensors(var, gradient, first, second)?,
            }
        }
        Ok(norm)
    }

    pub fn moments(&self) -> Result<Vec<Moments>> {
        self.states.iter().map(State::moments).collect()
    }

    /// Goes on after `step` steps that left these moments.
    pub fn restore(&mut self, moments: Vec<Moments>, step: usize) -> Result<()> {
        self.states = self.variables.iter().zip(moments).map(|(v, m)| State::new(v, m)).collect::<Result<_>>()?;
        self.step = step as i32;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The recurrence in f64, number by number, for numbers in memory and for those of other devices.
    #[test]
    fn equals_the_recurrence() {
        for tensors in [false, true] {
            let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
            let var = Var::from_tensor(&Tensor::new(&[[0.5f32, -1.0], [2.0, 0.0]], &Device::Cpu).unwrap()).unwrap();
            let mut adamw = AdamW::new(vec![var.clone()], options).unwrap();
            if tensors {
                adamw.states = vec![State::tensors(&var, &adamw.moments().unwrap()[0]).unwrap()];
            }
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
                assert!((*g as f64 - w).abs() < 1e-5, "{tensors}: {g} {w}");
            }
            let moments = &adamw.moments().unwrap()[0];
            assert!(moments.first.iter().zip(m).all(|(a, b)| (*a as f64 - b).abs() < 1e-6), "{moments:?}");
        }
    }
}
