//! What names stand for.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;

use super::sources::{Copied, Offer};
use super::{Inner, RegistryOptions, Source, now};
use crate::adapter::Generation;
use crate::adapter::files::{adapter_files, is_adapter, is_weights};
use crate::adapter::name::{OWNER, check_whole_name};
use crate::adapter::peft::{self, Summary};
use crate::{Error, Result};

/// A generation that some name stands for.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) generation: Generation,
    pub(super) source: Source,
    /// The folder with its files.
    pub(super) path: PathBuf,
    pub(super) summary: Summary,
    pub(super) created: u64,
    /// Keeps the files of a source's adapter there.
    pub(super) copy: Option<Arc<Copied>>,
}

/// What a name stands for in each source. At least one is there.
#[derive(Debug, Clone, Default)]
pub(super) struct Slot {
    /// An error where the stored files are damaged or do not fit this base: the name then answers with it, since any
    /// other content would be a wrong answer.
    pub(super) stored: Option<Result<Arc<Entry>>>,
    pub(super) directory: Option<Arc<Entry>>,
    pub(super) offer: Option<Offer>,
    pub(super) pinned: bool,
    pub(super) usage: Arc<Usage>,
}

/// How often and when a name was asked for.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub(super) requests: AtomicU64,
    /// Unix seconds; 0 is never.
    pub(super) last: AtomicU64,
}

impl Slot {
    pub(super) fn current(&self) -> Option<Result<&Arc<Entry>>> {
        match (&self.stored, &self.directory) {
            (Some(Ok(entry)), _) | (None, Some(entry)) => Some(Ok(entry)),
            (Some(Err(e)), _) => Some(Err(e.clone())),
            (None, None) => self.offer.as_ref()?.entry.as_ref().map(Ok),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.stored.is_none() && self.directory.is_none() && self.offer.is_none()
    }
}

pub(super) type Names = BTreeMap<String, Slot>;

impl Inner {
    pub(super) fn names(&self) -> RwLockReadGuard<'_, Names> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn names_mut(&self) -> RwLockWriteGuard<'_, Names> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of names, until it is dropped.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the name stands for, if its files are here.
    pub(super) fn entry(&self, name: &str) -> Option<Result<Arc<Entry>>> {
        let names = self.names();
        Some(names.get(name)?.current()?.cloned())
    }

    /// The same, fetched if its files are elsewhere. Ready at once if they are not.
    pub(super) async fn at_hand(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>> {
        match self.entry(name) {
            Some(entry) => entry,
            None => self.fetched(name).await,
        }
    }

    pub(super) fn count_use<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        let slots = self.names();
        for slot in names.into_iter().filter_map(|name| slots.get(name)) {
            slot.usage.requests.fetch_add(1, Ordering::Relaxed);
            // Not the greatest so far: a clock that was set back counts on from there.
            slot.usage.last.store(now(), Ordering::Relaxed);
            self.touch(slot);
        }
    }

    /// Whether some name stands for the generation.
    pub(super) fn is_named(&self, generation: &Generation) -> bool {
        let names = self.names();
        names.values().filter_map(Slot::current).any(|entry| entry.is_ok_and(|e| e.generation == *generation))
    }

    pub(super) fn slot(&self, name: &str) -> Slot {
        self.names().get(name).cloned().unwrap_or_default()
    }
}

/// The adapters of all read-only folders. An earlier folder wins a name.
pub(super) fn scan_directories(options: &RegistryOptions) -> Result<Names> {
    let mut folders: BTreeMap<String, PathBuf> = BTreeMap::new();
    for directory in &options.directories {
        let failed = |e: std::io::Error| {
            Error::bad_request(format!("the folder of adapters {} could not be read: {e}", directory.display()))
        };
        if is_adapter(directory) {
            tracing::warn!(
                "{} is an adapter itself; give the folder that it lies in, to serve all adapters there",
                directory.display()
            );
        }
        for folder in std::fs::read_dir(directory).map_err(failed)? {
            let folder = folder.map_err(failed)?;
            if !is_adapter(&folder.path()) {
                continue;
            }
            let name = folder.file_name().to_string_lossy().into_owned();
            if let Err(e) = check_whole_name(&name) {
                tracing::error!("{} is left out: {e}", folder.path().display());
            } else if name.split(OWNER).next() == Some(&options.base) {
                tracing::error!("{} is left out: {name:?} is the base model's id", folder.path().display());
            } else if let Some(first) = folders.get(&name) {
                tracing::warn!("{} is left out: {} has the same name", folder.path().display(), first.display());
            } else {
                folders.insert(name, folder.path());
            }
        }
    }
    let read: HashMap<String, Arc<Entry>> = folders
        .into_par_iter()
        .filter_map(|(name, path)| match peft::identify(&path, options.config(), &options.base) {
            Ok((summary, generation)) => Some((name, directory_entry(path, generation, summary))),
            Err(e) => {
                tracing::error!("{} is left out: {e}", path.display());
                None
            }
        })
        .collect();
    Ok(read.into_iter().map(|(name, entry)| (name, Slot { directory: Some(entry), ..Slot::default() })).collect())
}

pub(super) fn directory_entry(path: PathBuf, generation: Generation, summary: Summary) -> Arc<Entry> {
    let created = modified(&path);
    Arc::new(Entry { generation, source: Source::Directory, path, summary, created, copy: None })
}

/// When a folder's weights were last written, in Unix seconds.
pub(super) fn modified(path: &Path) -> u64 {
    let weights = adapter_files(path).unwrap_or_default().into_iter().filter(|(name, _)| is_weights(name));
    let times = weights.filter_map(|(_, path)| std::fs::metadata(path).and_then(|meta| meta.modified()).ok());
    times.max().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs())
}
