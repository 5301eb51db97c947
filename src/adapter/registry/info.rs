//! What is told of adapters.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Serialize, Serializer};

use super::names::{Entry, Slot};
use super::{Inner, Registry};
use crate::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Packed for the kernels.
    Device,
    /// On disk only.
    Disk,
    /// Not here yet.
    Remote,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A read-only folder given at start.
    Directory,
    /// Uploaded.
    Store,
    /// Fetched from this URL, or there to be.
    Remote(Arc<str>),
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Source::Directory => "directory",
            Source::Store => "store",
            Source::Remote(url) => url,
        })
    }
}

/// What `GET /v1/adapters` tells about an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterInfo {
    pub name: String,
    /// Empty as long as it is not known, as what follows is: until the adapter is fetched.
    pub generation: String,
    pub source: Source,
    pub tier: Tier,
    /// Largest rank of its pairs.
    pub rank: usize,
    pub lora_alpha: f64,
    /// Short names of the projections it changes, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    /// Class names, if it has a head.
    pub labels: Option<Vec<String>>,
    pub parameters: usize,
    /// Size of its files.
    pub bytes: u64,
    /// Size in memory; `None` where it is on disk only.
    pub memory_bytes: Option<usize>,
    /// Whether it stays in memory whatever else is wanted.
    pub pinned: bool,
    /// Requests that hold this generation now.
    pub in_flight: usize,
    /// Requests that were given the name's adapter since the start, alone or in a blend.
    pub requests: u64,
    /// Unix seconds at which the last of them got it.
    pub last_used: Option<u64>,
    /// Unix seconds at which this generation was published.
    pub created: u64,
}

impl Registry {
    /// Sets the gauges of both tiers. They are not kept up to date by every change: what requests release changes them,
    /// too, and only who reads them needs them.
    pub fn update_metrics(&self) {
        let (mut adapters, mut bytes, mut remote) = (HashSet::new(), 0, (0, 0));
        {
            let names = self.inner.names();
            for slot in names.values() {
                match (slot.current(), &slot.offer) {
                    (Some(Ok(entry)), _) if adapters.insert(entry.generation.clone()) => bytes += entry.summary.bytes,
                    (None, Some(offer)) => remote = (remote.0 + 1, remote.1 + offer.bytes()),
                    _ => {}
                }
            }
            self.inner.count_offers(&names);
        }
        let (ready, used) = self.inner.cache.totals();
        let tiers = [("device", ready, used as u64), ("disk", adapters.len(), bytes), ("remote", remote.0, remote.1)];
        for (tier, count, bytes) in tiers {
            self.inner.metrics.adapters.with_label_values(&[tier]).set(count as i64);
            self.inner.metrics.adapter_bytes.with_label_values(&[tier]).set(bytes as i64);
        }
    }
}

impl Inner {
    /// `None` for an empty slot.
    pub(super) fn tell(&self, name: &str, slot: &Slot) -> Option<Result<AdapterInfo>> {
        match slot.current() {
            Some(entry) => Some(entry.map(|entry| self.info(name, slot, entry))),
            None => Some(Ok(self.offered(name, slot, slot.offer.as_ref()?))),
        }
    }

    /// `entry` is the slot's current one.
    pub(super) fn info(&self, name: &str, slot: &Slot, entry: &Entry) -> AdapterInfo {
        let presence = self.cache.presence(&entry.generation);
        let last_used = slot.usage.last.load(Ordering::Relaxed);
        AdapterInfo {
            name: name.to_string(),
            generation: entry.generation.to_string(),
            source: entry.source.clone(),
            tier: if presence.is_some() { Tier::Device } else { Tier::Disk },
            rank: entry.summary.rank,
            lora_alpha: entry.summary.lora_alpha,
            target_modules: entry.summary.target_modules.clone(),
            labels: entry.summary.labels.clone(),
            parameters: entry.summary.parameters,
            bytes: entry.summary.bytes,
            memory_bytes: presence.as_ref().map(|p| p.bytes),
            pinned: slot.pinned,
            in_flight: presence.map_or(0, |p| p.holders),
            requests: slot.usage.requests.load(Ordering::Relaxed),
            last_used: (last_used > 0).then_some(last_used),
            created: entry.created,
        }
    }
}

/// Stands for a stored adapter that could not be read.
pub(super) fn unusable(name: &str) -> AdapterInfo {
    AdapterInfo {
        name: name.to_string(),
        generation: String::new(),
        source: Source::Store,
        tier: Tier::Disk,
        rank: 0,
        lora_alpha: 0.0,
        target_modules: vec![],
        labels: None,
        parameters: 0,
        bytes: 0,
        memory_bytes: None,
        pinned: false,
        in_flight: 0,
        requests: 0,
        last_used: None,
        created: 0,
    }
}
