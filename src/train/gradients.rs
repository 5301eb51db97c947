//! Gradients of what the layers train.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor, TensorId, Var};

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
