//! A task's full model: the base's weights with an adapter added to them, to be hosted as a full fine-tune is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::adapter::{Adapter, LoraPair};
use crate::base::{Base, tensors};
use crate::train::write_model;
use crate::{Error, Result};

/// Writes the base, with `adapter` added to it if there is one, as a Hugging Face model directory `out` in bf16.
///
/// Errors: a base or an adapter that no such directory can hold.
pub fn write(base: &Base, adapter: Option<&Adapter>, out: &Path) -> Result<()> {
    if let Some(what) = adapter.and_then(Adapter::beyond_pairs) {
        return Err(Error::bad_request(format!("it has {what}; a copy can be made of plain LoRA and a head only")));
    }
    let pairs: BTreeMap<String, &LoraPair> = adapter.map_or_else(BTreeMap::new, |adapter| {
        let modules = base.config.target_modules().into_iter();
        modules.filter_map(|m| Some((m.name + ".weight", adapter.pairs.get(&(m.layer, m.projection))?))).collect()
    });
    let mut all = Vec::new();
    for (name, shape) in tensors(&base.config) {
        let numbers = base.weights.get(&name)?.to_f32().map_err(|e| e.context(&name))?;
        let weight = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
        let merged = match pairs.get(&name) {
            Some(pair) => merged(&weight, pair)?,
            None => weight,
        };
        all.push((name, merged.to_dtype(DType::BF16)?));
    }
    let head = adapter.and_then(|a| a.head.as_ref()).or(base.head.as_deref());
    if let Some(head) = head {
        let (name, classes) = (base.config.family.names().head, head.labels.len());
        let weight = Tensor::from_vec(head.weight.clone(), (classes, base.config.hidden_size), &Device::Cpu)?;
        all.push((format!("{name}.weight"), weight));
        if let Some(bias) = &head.bias {
            all.push((format!("{name}.bias"), Tensor::from_vec(bias.clone(), classes, &Device::Cpu)?));
        }
    }
    fs::create_dir_all(out)?;
    write_model(out, base, all, head.map(|h| h.labels.as_slice()), DType::BF16)
}

/// `W + scale * B A`, `[out_features, in_features]`.
fn merged(weight: &Tensor, pair: &LoraPair) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let a = Tensor::from_slice(&pair.a, (pair.rank, k), &Device::Cpu)?;
    let b = Tensor::from_slice(&pair.b, (n, pair.rank), &Device::Cpu)?;
    Ok((weight + (b.matmul(&a)? * pair.scale as f64)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter;
    use crate::base::{Projection, Stored};

    #[test]
    fn a_copy_is_the_base_with_the_adapter_added() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama");
        let base = Base::open(&tiny.join("base").to_string_lossy()).unwrap();
        let adapter = adapter::load(&tiny.join("adapter_seqcls"), &base.config, &base.id).unwrap().adapter;
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("copy");
        write(&base, Some(&adapter), &out).unwrap();
        let copy = Base::open(&out.to_string_lossy()).unwrap();
        let (head, its) = (copy.head.as_ref().unwrap(), adapter.head.as_ref().unwrap());
        assert_eq!(head.labels, its.labels);
        assert_eq!((&copy.config.rope, copy.config.layers), (&base.config.rope, base.config.layers));
        let mut changed = 0;
        for module in base.config.target_modules() {
            let name = format!("{}.weight", module.name);
            let read = |of: &Base| of.weights.get(&name).unwrap().to_f32().unwrap();
            assert_eq!(copy.weights.get(&name).unwrap().stored, Stored::Bf16);
            let (before, after, k) = (read(&base), read(&copy), module.in_features);
            let pair = adapter.pairs.get(&(module.layer, module.projection));
            let delta = |i: usize| {
                pair.map_or(0.0, |p| {
                    let (row, column) = (i / k, i % k);
                    (0..p.rank).map(|r| p.scale * p.b[row * p.rank + r] * p.a[r * k + column]).sum()
                })
            };
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                let expected = before + delta(i);
                // bf16 has 8 bits.
                assert!(
                    (expected - after).abs() <= expected.abs() / 256.0 + 1e-6,
                    "{name} {i}: {after}, not {expected}"
                );
                changed += (delta(i).abs() > before.abs() / 64.0) as usize;
            }
        }
        assert!(changed > 100, "{changed}");
    }

    #[test]
    fn what_no_copy_can_hold_is_refused() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama");
        let base = Base::open(&tiny.join("base").to_string_lossy()).unwrap();
        let adapter = adapter::load(&tiny.join("adapter_dora_r4"), &base.config, &base.id).unwrap().adapter;
        assert!(adapter.pairs.contains_key(&(0, Projection::Q)));
        let folder = tempfile::tempdir().unwrap();
        let error = write(&base, Some(&adapter), &folder.path().join("copy")).unwrap_err().message;
        assert!(error.contains("DoRA"), "{error}");
    }
}
