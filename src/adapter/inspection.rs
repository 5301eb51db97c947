//! What an adapter's files say, for people.

use std::path::Path;

use serde::Serialize;

use crate::Result;
use crate::adapter::Generation;
use crate::adapter::config::Modules;
use crate::adapter::files::steady;
use crate::adapter::peft::Files;
use crate::adapter::places::Places;
use crate::adapter::tensors::TensorInfo;
use crate::base::ModelConfig;

/// What an adapter's files say, for people.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    pub generation: Generation,
    /// Size of the files that matter.
    pub bytes: u64,
    pub base_model: Option<String>,
    pub task_type: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    pub use_rslora: bool,
    pub target_modules: Modules,
    /// Class names, if it has a head.
    pub labels: Option<Vec<String>>,
    pub parameters: usize,
    pub tensors: Vec<TensorSummary>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorSummary {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
}

/// Looks at the adapter in `directory`. With a base it is fully checked against it; without, everything is checked that
/// does not depend on the base.
pub fn inspect(directory: &Path, base: Option<&ModelConfig>) -> Result<Inspection> {
    steady(directory, || {
        let files = Files::open(directory)?;
        let (files, labels) = match base {
            Some(base) => {
                let fitted = files.fit(base, "")?;
                (fitted.files, fitted.summary.labels)
            }
            None => {
                let places = Places::assign(&files.config, &files.tensors)?;
                places.check_pairs()?;
                let labels = files.labels(places.head_rows()?)?;
                (files, labels)
            }
        };
        let (parameters, bytes) = (files.numbers(), files.bytes());
        let Files { texts, config, weights, tensors } = files;
        let tensors = tensors.into_iter().map(|TensorInfo { name, shape, dtype }| TensorSummary { name, dtype, shape });
        Ok(Inspection {
            generation: texts.generation(|hasher| weights.read(None, hasher, |_, _| {}))?,
            bytes,
            base_model: config.base_model,
            task_type: config.task_type,
            r: config.r,
            lora_alpha: config.lora_alpha,
            use_rslora: config.use_rslora,
            target_modules: config.target_modules,
            labels,
            parameters,
            tensors: tensors.collect(),
        })
    })
}
