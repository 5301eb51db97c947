//! Gradients of what the layers train.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Tensor, TensorId, Var};
use rayon::prelude::*;

use super::ops;
use crate::Result;

/// Gradients by the variable they are of.
#[derive(Default)]
pub struct Gradients(Mutex<HashMap<TensorId, Vec<f32>>>);

impl Gradients {
    pub fn add(&self, var: &Var, numbers: Vec<f32>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(var.id(), numbers);
    }

    pub fn take(&self, var: &Var) -> Result<Option<Tensor>> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&var.id());
        Ok(found.map(|numbers| Tensor::from_vec(numbers, var.shape(), &Device::Cpu)).transpose()?)
    }
}

/// The sum of both; on a CPU in the place of `sum`.
pub fn add(sum: Tensor, gradient: &Tensor) -> Result<Tensor> {
    if !ops::is_plain_f32(&sum) {
        return Ok((sum + gradient)?);
    }
    sum.inplace_op2(gradient, &Add)?;
    Ok(sum)
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, sl: &Layout, x: &CpuStorage, xl: &Layout) -> candle_core::Result<()> {
        ops::slice_mut(sum, sl)?
            .par_iter_mut()
            .with_min_len(1 << 14)
            .zip(ops::slice(x, xl)?)
            .for_each(|(s, x)| *s += x);
        Ok(())
    }
}
