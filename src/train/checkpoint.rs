//! A run's state in one file, replaced in one step: whoever is killed finds the last one whole.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use candle_core::{Device, Tensor, Var};

use super::optimizer::Moments;
use super::trainer::History;
use crate::{Error, Result};

pub struct Checkpoint {
    pub numbers: Vec<Tensor>,
    pub moments: Vec<Moments>,
    pub best: Option<Vec<Tensor>>,
    pub history: History,
}

impl Checkpoint {
    /// Writes it in place of the one before. `fingerprint` tells runs apart.
    pub fn write(&self, path: &Path, fingerprint: &str) -> Result<()> {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for (i, (numbers, moments)) in self.numbers.iter().zip(&self.moments).enumerate() {
            tensors.push((format!("number.{i}"), numbers.clone()));
            tensors
                .push((format!("first.{i}"), Tensor::from_slice(&moments.first, moments.first.len(), &Device::Cpu)?));
            tensors.push((
                format!("second.{i}"),
                Tensor::from_slice(&moments.second, moments.second.len(), &Device::Cpu)?,
            ));
        }
        for (i, best) in self.best.iter().flatten().enumerate() {
            tensors.push((format!("best.{i}"), best.clone()));
        }
        let history = serde_json::to_string(&self.history).map_err(Error::internal)?;
        let metadata = HashMap::from([("history".to_string(), history), ("fingerprint".into(), fingerprint.into())]);
        let failed = |e: &dyn std::fmt::Display| Error::internal(format!("the checkpoint {}: {e}", path.display()));
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::NamedTempFile::new_in(folder).map_err(|e| failed(&e))?;
        safetensors::serialize_to_file(tensors, Some(metadata), file.path()).map_err(|e| failed(&e))?;
        // Opened anew: it may have been written under another handle.
        File::open(file.path()).and_then(|f| f.sync_all()).map_err(|e| failed(&e))?;
        file.persist(path).map_err(|e| failed(&e.error))?;
        Ok(())
    }

    /// `None` where there is no file. A file of another run, or with numbers that do not fit `variables`, is an error.
    pub fn read(path: &Path, fingerprint: &str, variables: &[Var]) -> Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::bad_request(format!("{}: {e}", path.display()))),
        };
        let wrong = |what: String| Error::bad_request(format!("the checkpoint {}: {what}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| wrong(e.to_string()))?;
        let text = |key: &str| header.metadata().as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default();
        if text("fingerprint") != fingerprint {
            return Err(wrong(format!(
                "it is of a run with other settings or data; resume with the same, or remove it\n  then: {}\n  now:  {fingerprint}",
                text("fingerprint")
            )));
        }
        let history: History = serde_json::from_str(&text("history")).map_err(|e| wrong(e.to_string()))?;
        let mut tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let mut take = |name: String, count: usize| {
            let found = tensors.remove(&name).filter(|t| t.elem_count() == count);
            found.ok_or_else(|| wrong(format!("it lacks {name} of {count} numbers")))
        };
        let (mut numbers, mut moments, mut best) = (vec![], vec![], vec![]);
        for (i, var) in variables.iter().enumerate() {
            let count = var.elem_count();
            numbers.push(take(format!("number.{i}"), count)?.reshape(var.shape())?.to_device(var.device())?);
            let (first, second) = (take(format!("first.{i}"), count)?, take(format!("second.{i}"), count)?);
            moments.push(Moments { first: first.to_vec1()?, second: second.to_vec1()? });
            if history.best.is_some() {
                best.push(take(format!("best.{i}"), count)?.reshape(var.shape())?.to_device(var.device())?);
            }
        }
        Ok(Some(Checkpoint { numbers, moments, best: history.best.is_some().then_some(best), history }))
    }
}
