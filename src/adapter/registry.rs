//! Names to generations: which adapters exist, which are in memory, which are in use.
//!
//! Three things, each with its own short lock: the names (read by every request, written for the instant of a swap),
//! the top memory tier ([`Cache`]), and the store on disk ([`Store`]). Files are read and written outside all of them.
//! Changes to names run one after the other under `changes`, which readers never take.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use candle_core::Device;
use rayon::prelude::*;
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::adapter::cache::{Cache, Flight, Lookup};
use crate::adapter::files::{CONFIG, WEIGHTS};
use crate::adapter::name::check_name;
use crate::adapter::peft::{self, Loaded};
use crate::adapter::store::{Lease, Store};
use crate::adapter::{Generation, Upload};
use crate::base::ModelConfig;
use crate::lora::PackedAdapter;
use crate::metrics::Metrics;
use crate::{Error, Result};

/// Loads that read and convert at the same time; each holds one adapter in host memory.
const PARALLEL_LOADS: usize = 16;
/// How often a request follows a name that changes while it loads, before it gives up.
const MAX_CHASES: usize = 16;

pub struct RegistryOptions {
    pub config: ModelConfig,
    /// The base's id, to tell an adapter for another base by its `base_model_name_or_path` in messages.
    pub base: String,
    pub device: Device,
    /// Folders of adapters, one folder each, only read. An earlier one wins a name.
    pub directories: Vec<PathBuf>,
    /// Where uploads live. A stored adapter hides one of the same name in `directories`.
    pub store: PathBuf,
    /// Bytes of packed adapters kept in the top tier.
    pub memory: usize,
    /// Longest upload in bytes, also after unpacking.
    pub max_upload: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Packed for the kernels.
    Device,
    /// On disk only.
    Disk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A read-only folder given at start.
    Directory,
    /// Uploaded.
    Store,
}

/// What `GET /v1/adapters` tells about an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterInfo {
    pub name: String,
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
    /// Requests that hold this generation now.
    pub in_flight: usize,
    /// Unix seconds at which this generation was published.
    pub created: u64,
}

/// What must hold for a change to be made, else [`crate::ErrorKind::Conflict`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    Always,
    /// The name is not taken.
    Absent,
    /// The name stands for this generation.
    Is(Generation),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Created,
    Replaced,
    /// The same content was there already.
    Unchanged,
}

/// A generation that some name stands for.
#[derive(Debug, Clone)]
struct Entry {
    generation: Generation,
    source: Source,
    /// The folder with its files.
    path: PathBuf,
    rank: usize,
    lora_alpha: f64,
    target_modules: Vec<String>,
    labels: Option<Vec<String>>,
    parameters: usize,
    bytes: u64,
    created: u64,
}

impl Entry {
    fn new(loaded: &Loaded, source: Source, path: PathBuf, created: u64) -> Arc<Self> {
        Arc::new(Entry {
            generation: loaded.adapter.generation.clone(),
            source,
            path,
            rank: loaded.rank(),
            lora_alpha: loaded.config.lora_alpha,
            target_modules: loaded.target_modules(),
            labels: loaded.adapter.head.as_ref().map(|head| head.labels.clone()),
            parameters: loaded.adapter.parameters(),
            bytes: loaded.bytes,
            created,
        })
    }
}

/// What a name stands for in each source. At least one is there.
#[derive(Debug, Clone, Default)]
struct Slot {
    /// An error where the stored files are damaged or do not fit this base: the name then answers with it, since any
    /// other content would be a wrong answer.
    stored: Option<Result<Arc<Entry>>>,
    directory: Option<Arc<Entry>>,
}

impl Slot {
    fn current(&self) -> Option<Result<&Arc<Entry>>> {
        match (&self.stored, &self.directory) {
            (Some(Ok(entry)), _) | (None, Some(entry)) => Some(Ok(entry)),
            (Some(Err(e)), _) => Some(Err(e.clone())),
            (None, None) => None,
        }
    }
}

type Names = BTreeMap<String, Slot>;

pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    options: RegistryOptions,
    metrics: Arc<Metrics>,
    store: Arc<Store>,
    cache: Arc<Cache<PackedAdapter>>,
    names: RwLock<Names>,
    /// Held from the check of a condition until the change is durable and visible.
    changes: Mutex<()>,
    loads: Semaphore,
}

impl Registry {
    /// Opens the store and reads every adapter once, side by side. One that is broken is logged and left out.
    pub fn open(options: RegistryOptions, metrics: Arc<Metrics>) -> Result<Arc<Self>> {
        let (store, unreadable) = Store::open(&options.store)?;
        let mut names = scan_directories(&options)?;
        let stored: Vec<(String, Result<Arc<Entry>>)> = store
            .records()
            .into_par_iter()
            .map(|(name, record)| {
                let path = store.object(&record.generation);
                let entry = read_stored(&options, path, &record.generation, record.created);
                (name, entry)
            })
            .collect();
        let unreadable = unreadable.into_iter().map(|(name, error)| (name, Err(error)));
        for (name, entry) in stored.into_iter().chain(unreadable) {
            let entry = entry.map_err(|e| e.context(format!("the stored adapter {name:?} cannot be used")));
            if let Err(e) = &entry {
                tracing::error!("{e}");
            }
            names.entry(name).or_default().stored = Some(entry);
        }
        let inner = Inner {
            cache: Cache::new(options.memory),
            options,
            metrics,
            store,
            names: RwLock::new(names),
            changes: Mutex::new(()),
            loads: Semaphore::new(PARALLEL_LOADS),
        };
        inner.update_metrics();
        Ok(Arc::new(Registry { inner: Arc::new(inner) }))
    }

    pub fn max_upload(&self) -> u64 {
        self.inner.options.max_upload
    }

    /// In the order of names, without adapters that cannot be used.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let entries: Vec<(String, Arc<Entry>)> = {
            let names = self.inner.names.read().unwrap_or_else(PoisonError::into_inner);
            names.iter().filter_map(|(name, slot)| Some((name.clone(), slot.current()?.ok()?.clone()))).collect()
        };
        entries.iter().map(|(name, entry)| self.inner.info(name, entry)).collect()
    }

    pub fn get(&self, name: &str) -> Result<AdapterInfo> {
        Ok(self.inner.info(name, &*self.inner.entry(name)?))
    }

    /// The generation that `name` stands for now, loaded. Holding the `Arc` pins it. Waits while it is read from disk
    /// (one read however many wait); other adapters' requests do not wait for it.
    pub async fn acquire(&self, name: &str) -> Result<Arc<PackedAdapter>> {
        let mut entry = self.inner.entry(name)?;
        for _ in 0..MAX_CHASES {
            let outcome = match self.inner.cache.get(&entry.generation) {
                Lookup::Ready(adapter) => return Ok(adapter),
                Lookup::Wait(waiter) => waiter.wait().await,
                Lookup::Load(flight) => {
                    let waiter = flight.waiter();
                    // On its own, so that it goes on for the others if this caller is dropped.
                    tokio::spawn(self.inner.clone().load(name.to_string(), entry.clone(), flight));
                    waiter.wait().await
                }
            };
            match outcome {
                Ok(adapter) if adapter.generation == entry.generation => return Ok(adapter),
                // The name was replaced while its old files were being read, or a folder's files changed: the name
                // knows by now what it stands for.
                outcome => {
                    let now = self.inner.entry(name)?;
                    if let (true, Err(e)) = (now.generation == entry.generation, outcome) {
                        return Err(e.context(format!("adapter {name:?}")));
                    }
                    entry = now;
                }
            }
        }
        Err(Error::unavailable(format!(
            "adapter {name:?} changed {MAX_CHASES} times while it was being loaded; try again"
        )))
    }

    pub fn upload(&self) -> Result<Upload> {
        Ok(Upload::new(self.inner.store.incoming()?, self.inner.options.max_upload))
    }

    /// An upload that is a copy of a local directory.
    pub fn upload_from(&self, directory: &Path) -> Result<Upload> {
        let upload = self.upload()?;
        upload.copy_from(directory)?;
        Ok(upload)
    }

    /// Validates the files against the base, then publishes them under `name`, atomically and durably. The adapter is
    /// in the top tier afterwards if it fits. Goes on to its end if the caller is dropped.
    pub async fn publish(&self, name: &str, upload: Upload, when: Condition) -> Result<(AdapterInfo, Published)> {
        let (inner, name) = (self.inner.clone(), name.to_string());
        blocking(move || inner.publish(&name, upload, &when)).await
    }

    /// Requests in flight finish on the generation they hold. Tells what the name stood for.
    pub async fn remove(&self, name: &str, when: Condition) -> Result<AdapterInfo> {
        let (inner, name) = (self.inner.clone(), name.to_string());
        blocking(move || inner.remove(&name, &when)).await
    }
}

impl Inner {
    fn entry(&self, name: &str) -> Result<Arc<Entry>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        match names.get(name).and_then(Slot::current) {
            Some(entry) => entry.cloned(),
            None => Err(not_found(name)),
        }
    }

    fn info(&self, name: &str, entry: &Entry) -> AdapterInfo {
        let holders = self.cache.holders(&entry.generation);
        AdapterInfo {
            name: name.to_string(),
            generation: entry.generation.to_string(),
            source: entry.source,
            tier: if holders.is_some() { Tier::Device } else { Tier::Disk },
            rank: entry.rank,
            lora_alpha: entry.lora_alpha,
            target_modules: entry.target_modules.clone(),
            labels: entry.labels.clone(),
            parameters: entry.parameters,
            bytes: entry.bytes,
            in_flight: holders.unwrap_or(0),
            created: entry.created,
        }
    }

    /// Whether some name stands for the generation.
    fn is_named(&self, generation: &Generation) -> bool {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names.values().filter_map(Slot::current).any(|entry| entry.is_ok_and(|e| e.generation == *generation))
    }

    async fn load(self: Arc<Self>, name: String, entry: Arc<Entry>, flight: Flight<PackedAdapter>) {
        // The semaphore is never closed, so there is always a permit to be had.
        let _permit = self.loads.acquire().await;
        let inner = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let _lease = (entry.source == Source::Store).then(|| inner.store.lease(&entry.generation));
            let start = Instant::now();
            let outcome = inner.read(&entry).and_then(|loaded| {
                let packed = Arc::new(inner.pack(&loaded)?);
                if loaded.adapter.generation != entry.generation {
                    inner.follow_change(&entry, &loaded)?;
                }
                let bytes = packed.bytes;
                Ok((loaded.adapter.generation, packed, bytes))
            });
            inner.metrics.adapter_load_seconds.with_label_values(&["disk"]).observe(start.elapsed().as_secs_f64());
            if let Err(e) = &outcome {
                tracing::warn!("adapter {name:?} could not be loaded: {e}");
            }
            // A failure reaches whoever waits.
            let _ = flight.finish(outcome, |generation| inner.is_named(generation));
            inner.update_metrics();
        });
        if let Err(e) = work.await {
            tracing::error!("the load of an adapter panicked: {e}");
        }
    }

    fn read(&self, entry: &Entry) -> Result<Loaded> {
        peft::load(&entry.path, &self.options.config, &self.options.base)
    }

    fn pack(&self, loaded: &Loaded) -> Result<PackedAdapter> {
        PackedAdapter::new(&loaded.adapter, &self.options.config, &self.options.device)
    }

    /// The files of an entry are not what they were. In a read-only folder somebody has replaced them: the names that
    /// stand for the folder follow. In the store that is damage.
    fn follow_change(&self, entry: &Arc<Entry>, loaded: &Loaded) -> Result<()> {
        if entry.source == Source::Store {
            return Err(damaged(&entry.generation, &loaded.adapter.generation));
        }
        let fresh = Entry::new(loaded, Source::Directory, entry.path.clone(), modified(&entry.path));
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        for slot in names.values_mut() {
            if slot.directory.as_ref().is_some_and(|e| e.path == entry.path) {
                slot.directory = Some(fresh.clone());
            }
        }
        Ok(())
    }

    fn publish(&self, name: &str, upload: Upload, when: &Condition) -> Result<(AdapterInfo, Published)> {
        check_name(name)?;
        if name == self.options.base {
            return Err(
                Error::bad_request(format!("{name:?} is the base model's id, not free for an adapter")).param("name")
            );
        }
        upload.check_size()?;
        let loaded = peft::load(upload.path(), &self.options.config, &self.options.base)?;
        let generation = loaded.adapter.generation.clone();
        let packed = Arc::new(self.pack(&loaded)?);
        let entry = Entry::new(&loaded, Source::Store, self.store.object(&generation), now());
        drop(loaded);

        // From here on the object cannot be collected; if the change is not made, it is when the lease ends.
        let lease = self.store.lease(&generation);
        self.store.add(&lease, upload.path())?;
        let bytes = packed.bytes;
        self.cache.offer(&generation, packed, bytes);
        let published = self.swap_in(name, entry, &lease, when);
        self.forget_unnamed(&generation);
        self.update_metrics();
        published.map(|(entry, published)| (self.info(name, &entry), published))
    }

    /// The instant of publishing: checks the condition, makes the change durable, then visible.
    fn swap_in(
        &self,
        name: &str,
        entry: Arc<Entry>,
        lease: &Lease,
        when: &Condition,
    ) -> Result<(Arc<Entry>, Published)> {
        let _change = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = self.slot(name);
        check(name, &slot, when)?;
        let published = match slot.current() {
            None => Published::Created,
            Some(Ok(old)) if old.generation == entry.generation => Published::Unchanged,
            Some(_) => Published::Replaced,
        };
        if let (Published::Unchanged, Some(Ok(stored))) = (published, &slot.stored) {
            return Ok((stored.clone(), published));
        }
        self.store.set_name(name, lease, entry.created)?;
        {
            let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
            names.entry(name.to_string()).or_default().stored = Some(Ok(entry.clone()));
        }
        if let Some(Ok(old)) = slot.current() {
            self.forget_unnamed(&old.generation);
        }
        Ok((entry, published))
    }

    fn remove(&self, name: &str, when: &Condition) -> Result<AdapterInfo> {
        let removed = {
            let _change = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = self.slot(name);
            let current = slot.current().ok_or_else(|| not_found(name))?;
            check(name, &slot, when)?;
            if slot.stored.is_none() {
                let path = slot.directory.as_ref().map_or(String::new(), |e| e.path.display().to_string());
                return Err(Error::conflict(format!(
                    "adapter {name:?} comes from the read-only folder {path}; it can be hidden by an upload of the same \
                     name, but not removed"
                )));
            }
            let removed = current.map(|entry| (self.info(name, entry), entry.generation.clone()));
            self.store.remove_name(name)?;
            let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
            match &slot.directory {
                Some(_) => names.entry(name.to_string()).or_default().stored = None,
                None => drop(names.remove(name)),
            }
            removed
        };
        let info = match removed {
            Ok((info, generation)) => {
                self.forget_unnamed(&generation);
                info
            }
            // What could not be read has nothing to tell but that it is gone.
            Err(_) => unusable(name),
        };
        self.update_metrics();
        Ok(info)
    }

    fn slot(&self, name: &str) -> Slot {
        self.names.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned().unwrap_or_default()
    }

    /// Frees the tier of a generation that no request can ask for any more.
    fn forget_unnamed(&self, generation: &Generation) {
        if !self.is_named(generation) {
            self.cache.forget(generation);
        }
    }

    fn update_metrics(&self) {
        let (mut adapters, mut bytes) = (HashSet::new(), 0);
        {
            let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
            for entry in names.values().filter_map(Slot::current).flatten() {
                if adapters.insert(entry.generation.clone()) {
                    bytes += entry.bytes;
                }
            }
        }
        let (ready, used) = self.cache.totals();
        for (tier, count, bytes) in [("device", ready, used as u64), ("disk", adapters.len(), bytes)] {
            self.metrics.adapters.with_label_values(&[tier]).set(count as i64);
            self.metrics.adapter_bytes.with_label_values(&[tier]).set(bytes as i64);
        }
    }
}

fn check(name: &str, slot: &Slot, when: &Condition) -> Result<()> {
    let current = slot.current();
    match (when, &current) {
        (Condition::Always, _) | (Condition::Absent, None) => Ok(()),
        (Condition::Absent, Some(Ok(entry))) => {
            Err(Error::conflict(format!("adapter {name:?} is there already, as generation {}", entry.generation)))
        }
        (Condition::Absent, Some(Err(e))) => Err(Error::conflict(format!("adapter {name:?} is there already: {e}"))),
        (Condition::Is(expected), Some(Ok(entry))) if entry.generation == *expected => Ok(()),
        (Condition::Is(expected), Some(Ok(entry))) => Err(Error::conflict(format!(
            "adapter {name:?} is generation {}, not the expected {expected}",
            entry.generation
        ))),
        (Condition::Is(expected), Some(Err(e))) => {
            Err(Error::conflict(format!("adapter {name:?} is not the expected generation {expected}: {e}")))
        }
        (Condition::Is(expected), None) => {
            Err(Error::conflict(format!("there is no adapter {name:?}; expected its generation {expected}")))
        }
    }
}

/// The adapters of all read-only folders. An earlier folder wins a name.
fn scan_directories(options: &RegistryOptions) -> Result<Names> {
    let mut folders: BTreeMap<String, PathBuf> = BTreeMap::new();
    for directory in &options.directories {
        let failed = |e: std::io::Error| {
            Error::bad_request(format!("the folder of adapters {} could not be read: {e}", directory.display()))
        };
        if directory.join(CONFIG).exists() {
            tracing::warn!(
                "{} is an adapter itself; give the folder that it lies in, to serve all adapters there",
                directory.display()
            );
        }
        for folder in std::fs::read_dir(directory).map_err(failed)? {
            let folder = folder.map_err(failed)?;
            if !folder.path().join(CONFIG).exists() {
                continue;
            }
            let name = folder.file_name().to_string_lossy().into_owned();
            if let Err(e) = check_name(&name) {
                tracing::error!("{} is left out: {e}", folder.path().display());
            } else if name == options.base {
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
        .filter_map(|(name, path)| match peft::load(&path, &options.config, &options.base) {
            Ok(loaded) => {
                let created = modified(&path);
                Some((name, Entry::new(&loaded, Source::Directory, path, created)))
            }
            Err(e) => {
                tracing::error!("{} is left out: {e}", path.display());
                None
            }
        })
        .collect();
    Ok(read.into_iter().map(|(name, entry)| (name, Slot { stored: None, directory: Some(entry) })).collect())
}

fn read_stored(options: &RegistryOptions, path: PathBuf, generation: &Generation, created: u64) -> Result<Arc<Entry>> {
    let loaded = peft::load(&path, &options.config, &options.base)?;
    if loaded.adapter.generation != *generation {
        return Err(damaged(generation, &loaded.adapter.generation));
    }
    Ok(Entry::new(&loaded, Source::Store, path, created))
}

fn damaged(expected: &Generation, found: &Generation) -> Error {
    Error::internal(format!("its files are damaged: their hash is {found}, expected {expected}; upload it again"))
}

fn not_found(name: &str) -> Error {
    let shown: String = name.chars().take(200).collect();
    Error::not_found(format!("there is no adapter {shown:?}"))
}

/// Stands for a stored adapter that could not be read.
fn unusable(name: &str) -> AdapterInfo {
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
        in_flight: 0,
        created: 0,
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// When a folder's weights were last written, in Unix seconds.
fn modified(path: &Path) -> u64 {
    let time = std::fs::metadata(path.join(WEIGHTS)).and_then(|meta| meta.modified());
    time.ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::internal(format!("a change of adapters panicked: {e}"))))
}
