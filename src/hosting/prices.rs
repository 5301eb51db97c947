//! What machines cost.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Prices in one currency, from a TOML file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    pub currency: String,
    pub hours_per_month: f64,
    /// Of a gigabyte (10^9 bytes) for a month.
    pub disk_gb_month: f64,
    /// The one that is measured.
    pub machine: Machine,
    #[serde(default, rename = "gpu")]
    pub gpus: Vec<Gpu>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub name: String,
    pub memory_gib: f64,
    /// Price of an hour.
    pub hour: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    pub name: String,
    pub memory_gb: f64,
    /// Price of an hour.
    pub hour: f64,
}

impl Prices {
    /// Those of a file, or examples.
    pub fn read(path: Option<&Path>) -> Result<Self> {
        let examples = include_str!("prices.toml").to_string();
        let named =
            |what: String| Error::bad_request(path.map_or(what.clone(), |p| format!("{}: {what}", p.display())));
        let text = path.map_or(Ok(examples), fs::read_to_string).map_err(|e| named(e.to_string()))?;
        let prices: Prices = toml::from_str(&text).map_err(|e| named(e.to_string()))?;
        let (machine, gpus) = (&prices.machine, prices.gpus.iter().flat_map(|g| [g.memory_gb, g.hour]));
        let own = [prices.hours_per_month, prices.disk_gb_month, machine.memory_gib, machine.hour];
        match own.into_iter().chain(gpus).find(|x| !x.is_finite() || *x < 0.0) {
            Some(number) => Err(named(format!("{number} is no price or size"))),
            None if machine.memory_gib == 0.0 => Err(named("the machine has no memory".into())),
            None => Ok(prices),
        }
    }

    /// Price of a million tokens on a machine that computes so many a second and does nothing else.
    pub fn million_tokens(&self, tokens_per_second: f64) -> f64 {
        self.machine.hour / (tokens_per_second * 3600.0) * 1e6
    }

    /// Price of a task for a month: the share of the machine's memory that its fleet takes, and its files, divided by the
    /// fleet's tasks.
    pub fn task_month(&self, memory: f64, disk: f64, tasks: usize) -> f64 {
        let share = memory / (self.machine.memory_gib * (1u64 << 30) as f64);
        (share * self.machine.hour * self.hours_per_month + disk / 1e9 * self.disk_gb_month) / tasks as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_read_and_multiplied() {
        let prices = Prices::read(None).unwrap();
        assert!(!prices.gpus.is_empty());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.toml");
        let text = "currency = \"EUR\"\nhours_per_month = 700\ndisk_gb_month = 0.5\n\
                    [machine]\nname = \"m\"\nmemory_gib = 10\nhour = 0.36\n";
        fs::write(&path, text).unwrap();
        let prices = Prices::read(Some(&path)).unwrap();
        assert!((prices.million_tokens(100.0) - 1.0).abs() < 1e-9);
        // Half of the memory for 700 hours, and 2 GB, for 4 tasks.
        let month = prices.task_month((5u64 << 30) as f64, 2e9, 4);
        assert!((month - (0.5 * 0.36 * 700.0 + 1.0) / 4.0).abs() < 1e-9, "{month}");
        fs::write(&path, text.replace("0.36", "-1")).unwrap();
        assert!(Prices::read(Some(&path)).unwrap_err().message.contains("p.toml: -1 is no price"));
        fs::write(&path, text.replace("hour =", "hours =")).unwrap();
        assert!(Prices::read(Some(&path)).unwrap_err().message.contains("hours"));
    }
}
