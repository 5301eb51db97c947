//! Names to generations: which adapters exist, which are in memory, which are in use.
//!
//! Three things, each with its own short lock: the names (read by every request, written for the instant of a swap),
//! the top memory tier ([`Cache`]), and the store on disk ([`Store`]). Files are read and written outside all of them.
//! Changes to names run one after the other under `changes`, which readers never take.
//!
//! What lies elsewhere is fetched when it is asked for: [`sources`].

mod sources;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
use serde::{Serialize, Serializer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::adapter::cache::{Cache, Flight, Lookup};
use crate::adapter::files::{adapter_files, is_adapter, is_weights};
use crate::adapter::name::{OWNER, check_whole_name};
use crate::adapter::peft::{self, Loaded, Summary};
use crate::adapter::store::{Lease, Store};
use crate::adapter::{Adapter, Blend, Generation, Remote, Upload};
use crate::base::{Decoder, Language, ModelConfig, OwnLanguage};
use crate::lora::{PackedAdapter, Pool};
use crate::metrics::Metrics;
use crate::{Error, Result};
use sources::{Copied, Offer, Sources};

/// Memory for adapters that are being read and packed, in KiB, by loads and uploads together.
const LOAD_MEMORY: u64 = 2 << 20;
/// Loads and uploads at the same time, however small they are.
const PARALLEL_LOADS: u64 = 16;
/// What an adapter takes while it is read and packed, as a multiple of its file: half-precision numbers are widened to
/// twice their size, and packed piece by piece.
const LOAD_FACTOR: u64 = 3;
/// How often a load that waits for room in the top tier looks for it: adapters are released without a word.
const LOOK_FOR_ROOM: Duration = Duration::from_millis(2);
/// How long it waits before it goes on without. Those who hold adapters may be clients that read slowly.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(5);
/// Pinned adapters may take this part of the top tier, so that loads of others find room without waiting for it.
const PINNED_SHARE: usize = 2;
/// How often a request follows a name that changes while it loads, before it gives up.
const MAX_CHASES: usize = 16;

pub struct RegistryOptions {
    /// The base as it is served; adapters are checked against it and packed to match it.
    pub decoder: Arc<Decoder>,
    /// How the base's texts become tokens and back; an adapter may bring its own.
    pub language: Language,
    /// The base's id, to tell an adapter for another base by its `base_model_name_or_path` in messages.
    pub base: String,
    /// Folders of adapters, one folder each, only read. An earlier one wins a name.
    pub directories: Vec<PathBuf>,
    /// Where uploads live. A stored adapter hides one of the same name in `directories`.
    pub store: PathBuf,
    /// Bytes of packed adapters kept in the top tier.
    pub memory: usize,
    /// The pages on a GPU that these have.
    pub pool: Option<Arc<Pool>>,
    /// Longest upload in bytes, also after unpacking.
    pub max_upload: u64,
    /// Whether uploads, and adapters of sources, may bring chat templates.
    pub uploaded_templates: bool,
    /// Places to fetch adapters from, by names that are neither stored nor in `directories`. An earlier one wins a name.
    pub sources: Vec<Remote>,
    /// How often these are looked at for what is new.
    pub source_refresh: Duration,
    /// Bytes of what was fetched that are kept on disk.
    pub source_cache: u64,
}

impl RegistryOptions {
    fn config(&self) -> &ModelConfig {
        self.decoder.config()
    }
}

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
    summary: Summary,
    created: u64,
    /// Keeps the files of a source's adapter there.
    copy: Option<Arc<Copied>>,
}

/// What a name stands for in each source. At least one is there.
#[derive(Debug, Clone, Default)]
struct Slot {
    /// An error where the stored files are damaged or do not fit this base: the name then answers with it, since any
    /// other content would be a wrong answer.
    stored: Option<Result<Arc<Entry>>>,
    directory: Option<Arc<Entry>>,
    offer: Option<Offer>,
    pinned: bool,
    usage: Arc<Usage>,
}

/// How often and when a name was asked for.
#[derive(Debug, Default)]
struct Usage {
    requests: AtomicU64,
    /// Unix seconds; 0 is never.
    last: AtomicU64,
}

impl Slot {
    fn current(&self) -> Option<Result<&Arc<Entry>>> {
        match (&self.stored, &self.directory) {
            (Some(Ok(entry)), _) | (None, Some(entry)) => Some(Ok(entry)),
            (Some(Err(e)), _) => Some(Err(e.clone())),
            (None, None) => self.offer.as_ref()?.entry.as_ref().map(Ok),
        }
    }

    fn is_empty(&self) -> bool {
        self.stored.is_none() && self.directory.is_none() && self.offer.is_none()
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
    /// [`LOAD_MEMORY`] that is free.
    room: Arc<Semaphore>,
    /// Held by the load whose turn it is to get room in the top tier.
    turn: tokio::sync::Mutex<()>,
    /// Packs adapters. The kernels' threads would take a step up only after what a large adapter has for them.
    packing: rayon::ThreadPool,
    /// Where there are any.
    sources: Option<Sources>,
}

impl Registry {
    /// Opens the store and checks every adapter by its configuration and the shapes of its weights. One that does not
    /// fit is logged, and left out if it comes from a folder. The weights themselves are checked when they are loaded.
    pub fn open(mut options: RegistryOptions, metrics: Arc<Metrics>) -> Result<Arc<Self>> {
        let (store, unreadable) = Store::open(&options.store)?;
        // A tenant would get the base by it too.
        let is_base = |name: &&String| name.split(OWNER).next() == Some(&options.base);
        if let Some(name) = store.records().keys().chain(unreadable.keys()).find(is_base) {
            return Err(Error::conflict(format!(
                "the store holds an adapter named {name:?}, which is the base's id too, so that requests for the \
                 adapter would be answered by the base; give the base's directory or file another name, or delete {}, \
                 which removes the adapter",
                options.store.join("names").join(name).display()
            )));
        }
        let mut names = scan_directories(&options)?;
        let stored: Vec<(String, Result<Arc<Entry>>)> = store
            .records()
            .into_par_iter()
            .map(|(name, record)| {
                let path = store.object(&record.generation);
                let entry = peft::survey(&path, options.config(), &options.base).map(|summary| {
                    let (generation, created) = (record.generation, record.created);
                    Arc::new(Entry { generation, source: Source::Store, path, summary, created, copy: None })
                });
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
        let sources = Sources::open(&mut options, &mut names)?;
        let threads = (rayon::current_num_threads() / 4).max(1);
        let packing = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("packing-{i}"));
        let packing = packing.build().map_err(|e| Error::internal(format!("threads to pack adapters: {e}")))?;
        let inner = Inner {
            cache: Cache::new(options.memory),
            options,
            metrics,
            store,
            names: RwLock::new(names),
            changes: Mutex::new(()),
            room: Arc::new(Semaphore::new(LOAD_MEMORY as usize)),
            turn: tokio::sync::Mutex::new(()),
            packing,
            sources,
        };
        let inner = Arc::new(inner);
        inner.watch_sources();
        Ok(Arc::new(Registry { inner }))
    }

    pub fn max_upload(&self) -> u64 {
        self.inner.options.max_upload
    }

    /// In the order of names, without adapters that cannot be used.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let slots = self.inner.names().clone();
        slots.iter().filter_map(|(name, slot)| self.inner.tell(name, slot)?.ok()).collect()
    }

    pub fn get(&self, name: &str) -> Result<AdapterInfo> {
        self.inner.tell(name, &self.inner.slot(name)).unwrap_or_else(|| Err(not_found(name)))
    }

    /// Whether the name stands for something, be it usable or not.
    pub fn has(&self, name: &str) -> bool {
        self.inner.slot(name).current().is_some()
    }

    /// Bytes that adapters take in the top tier, and those that they may take.
    pub fn memory(&self) -> (usize, usize) {
        (self.inner.cache.totals().1, self.inner.cache.limit())
    }

    /// The generation that `name` stands for now, loaded, for a request. Holding the `Arc` keeps it in memory. Waits while it
    /// is fetched and read from disk (once however many wait); other adapters' requests do not wait for it.
    pub async fn acquire(&self, name: &str) -> Result<Arc<PackedAdapter>> {
        let adapter = self.loaded(name).await?;
        self.inner.count_use([name]);
        Ok(adapter)
    }

    async fn loaded(&self, name: &str) -> Result<Arc<PackedAdapter>> {
        let mut entry = self.inner.at_hand(name).await?;
        // The entry whose load, begun by somebody else, failed. That one may have begun before the entry was there.
        let mut doubted: Option<Arc<Entry>> = None;
        for _ in 0..MAX_CHASES {
            let (outcome, joined) = match self.inner.cache.get(&entry.generation, &entry.path) {
                Lookup::Ready(adapter) => return Ok(adapter),
                Lookup::Wait(waiter) => (waiter.wait().await, true),
                Lookup::Load(flight, waiter) => {
                    // On its own, so that it goes on for the others if this caller is dropped.
                    tokio::spawn(self.inner.clone().load(name.to_string(), entry.clone(), flight));
                    (waiter.wait().await, false)
                }
            };
            match outcome {
                Ok(adapter) if adapter.generation == entry.generation => return Ok(adapter),
                // The name was replaced while its old files were being read, or a folder's files changed: the name
                // knows by now what it stands for.
                outcome => {
                    let now = self.inner.at_hand(name).await?;
                    // By identity: a name that was replaced and put back has files that were gone in between.
                    if let (true, Err(e)) = (Arc::ptr_eq(&now, &entry), outcome) {
                        let again = joined && doubted.as_ref().is_none_or(|d| !Arc::ptr_eq(d, &entry));
                        if !again {
                            return Err(e.context(format!("adapter {name:?}")));
                        }
                        doubted = Some(entry.clone());
                    }
                    entry = now;
                }
            }
        }
        Err(Error::unavailable(format!(
            "adapter {name:?} changed {MAX_CHASES} times while it was being loaded; try again"
        )))
    }

    /// The blend of the generations that its names stand for now, computed if it is not in memory. It is kept there as
    /// adapters are, and goes when others need its room.
    pub async fn acquire_blend(&self, blend: &Blend) -> Result<Arc<PackedAdapter>> {
        let adapter = self.computed(blend).await?;
        self.inner.count_use(blend.names());
        Ok(adapter)
    }

    async fn computed(&self, blend: &Blend) -> Result<Arc<PackedAdapter>> {
        let entries = || futures::future::try_join_all(blend.names().map(|name| self.inner.at_hand(name)));
        let mut parts = entries().await?;
        for _ in 0..MAX_CHASES {
            let generation = blend.generation(parts.iter().map(|entry| &entry.generation))?;
            let outcome = match self.inner.cache.get(&generation, Path::new("")) {
                Lookup::Ready(adapter) => return Ok(adapter),
                Lookup::Wait(waiter) => waiter.wait().await,
                Lookup::Load(flight, waiter) => {
                    tokio::spawn(self.inner.clone().compute(blend.clone(), parts.clone(), generation, flight));
                    waiter.wait().await
                }
            };
            // As in `acquire`: files that could not be read may be those of a name that stands for others by now.
            let now = entries().await?;
            match outcome {
                Err(e) if now.iter().zip(&parts).all(|(now, before)| Arc::ptr_eq(now, before)) => return Err(e),
                Err(_) => parts = now,
                ready => return ready,
            }
        }
        Err(Error::unavailable(format!(
            "adapters of {blend} changed {MAX_CHASES} times while they were read; try again"
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
        let work = tokio::spawn(async move {
            let room = inner.room(upload.size()).await;
            blocking(move || {
                let published = inner.publish(&name, upload, &when);
                drop(room);
                published
            })
            .await
        });
        work.await.unwrap_or_else(|e| Err(Error::internal(format!("a change of adapters was given up: {e}"))))
    }

    /// Requests in flight finish on the generation they hold. Tells what the name stood for.
    pub async fn remove(&self, name: &str, when: Condition) -> Result<AdapterInfo> {
        let (inner, name) = (self.inner.clone(), name.to_string());
        blocking(move || inner.remove(&name, &when)).await
    }

    /// Loads what `name` stands for and keeps it in memory, also what the name stands for later, until [`Self::unpin`] or the
    /// end of the process. It is no request.
    ///
    /// Errors: there is no such adapter, it cannot be loaded, or pinned adapters would take too much of the top tier.
    pub async fn pin(&self, name: &str) -> Result<AdapterInfo> {
        let adapter = self.loaded(name).await?;
        let (inner, own) = (self.inner.clone(), name.to_string());
        blocking(move || inner.set_pinned(&own, Some(&adapter))).await?;
        // After `adapter` is released, which is no request's.
        self.get(name)
    }

    /// Lets `name` be evicted again. It stays until others need its room.
    pub async fn unpin(&self, name: &str) -> Result<AdapterInfo> {
        let (inner, own) = (self.inner.clone(), name.to_string());
        blocking(move || inner.set_pinned(&own, None)).await?;
        self.get(name)
    }

    /// Takes what `name` stands for out of the top tier; its files stay, and the next request loads it again. Requests in
    /// flight finish on what they hold.
    ///
    /// Errors: there is no such adapter, or it is pinned.
    pub fn unload(&self, name: &str) -> Result<AdapterInfo> {
        if let Some(entry) = self.inner.slot(name).current() {
            let generation = &entry?.generation;
            if self.inner.pinned().contains(generation) {
                return Err(Error::conflict(format!("adapter {name:?} is pinned; unpin it before it is unloaded")));
            }
            self.inner.cache.forget(generation);
        }
        self.get(name)
    }
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
    fn names(&self) -> RwLockReadGuard<'_, Names> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn names_mut(&self) -> RwLockWriteGuard<'_, Names> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of names, until it is dropped.
    fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is memory to read and pack weights of this many bytes. Larger ones than there ever is run alone.
    async fn room(&self, weights: u64) -> Option<OwnedSemaphorePermit> {
        let needed = (weights >> 10).saturating_mul(LOAD_FACTOR).clamp(LOAD_MEMORY / PARALLEL_LOADS, LOAD_MEMORY);
        // The semaphore is never closed, so there is always a permit to be had.
        self.room.clone().acquire_many_owned(needed as u32).await.ok()
    }

    /// What the name stands for, if its files are here.
    fn entry(&self, name: &str) -> Option<Result<Arc<Entry>>> {
        let names = self.names();
        Some(names.get(name)?.current()?.cloned())
    }

    /// The same, fetched if its files are elsewhere. Ready at once if they are not.
    async fn at_hand(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>> {
        match self.entry(name) {
            Some(entry) => entry,
            None => self.fetched(name).await,
        }
    }

    /// `None` for an empty slot.
    fn tell(&self, name: &str, slot: &Slot) -> Option<Result<AdapterInfo>> {
        match slot.current() {
            Some(entry) => Some(entry.map(|entry| self.info(name, slot, entry))),
            None => Some(Ok(self.offered(name, slot, slot.offer.as_ref()?))),
        }
    }

    /// `entry` is the slot's current one.
    fn info(&self, name: &str, slot: &Slot, entry: &Entry) -> AdapterInfo {
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

    fn count_use<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        let slots = self.names();
        for slot in names.into_iter().filter_map(|name| slots.get(name)) {
            slot.usage.requests.fetch_add(1, Ordering::Relaxed);
            // Not the greatest so far: a clock that was set back counts on from there.
            slot.usage.last.store(now(), Ordering::Relaxed);
            self.touch(slot);
        }
    }

    /// What pinned names stand for.
    fn pinned(&self) -> HashSet<Generation> {
        let names = self.names();
        let pinned = names.values().filter(|slot| slot.pinned);
        pinned.filter_map(|slot| Some(slot.current()?.ok()?.generation.clone())).collect()
    }

    /// Tells the cache what pinned names stand for. Called under `changes`, after a change.
    fn update_pins(&self) {
        self.cache.pin(self.pinned());
    }

    /// Bytes that pinned adapters take beside `generation`, which `name` is to stand for, and those that all may take.
    fn pinned_beside(&self, name: &str, generation: &Generation) -> (usize, usize) {
        let others: HashSet<Generation> = {
            let names = self.names();
            let pinned = names.iter().filter(|(other, slot)| slot.pinned && *other != name);
            pinned.filter_map(|(_, slot)| Some(slot.current()?.ok()?.generation.clone())).collect()
        };
        let others = others.iter().filter(|other| *other != generation);
        let others = others.filter_map(|generation| Some(self.cache.presence(generation)?.bytes)).sum();
        (others, self.cache.limit() / PINNED_SHARE)
    }

    /// Whether there is room to pin `adapter`, which `name` stands for.
    fn check_pin(&self, name: &str, adapter: &PackedAdapter) -> Result<()> {
        let (others, most) = self.pinned_beside(name, &adapter.generation);
        match others.saturating_add(adapter.bytes) <= most {
            true => Ok(()),
            false => Err(Error::conflict(format!(
                "adapter {name:?} takes {} bytes and others that are pinned {others}; of the {} bytes that adapters may \
                 take {most} may be pinned",
                adapter.bytes,
                self.cache.limit()
            ))),
        }
    }

    /// Pins `name`, which stands for `adapter`, or unpins it where there is none.
    fn set_pinned(&self, name: &str, adapter: Option<&PackedAdapter>) -> Result<()> {
        let _change = self.change();
        adapter.map_or(Ok(()), |adapter| self.check_pin(name, adapter))?;
        {
            let mut names = self.names_mut();
            names.get_mut(name).ok_or_else(|| not_found(name))?.pinned = adapter.is_some();
        }
        self.update_pins();
        Ok(())
    }

    /// Whether some name stands for the generation.
    fn is_named(&self, generation: &Generation) -> bool {
        let names = self.names();
        names.values().filter_map(Slot::current).any(|entry| entry.is_ok_and(|e| e.generation == *generation))
    }

    /// Waits, first come, first served, until the top tier has room for what is loaded from files of this many bytes: a
    /// crowd of requests for different adapters must not hold more memory than adapters may take.
    async fn top_tier_room(&self, flight: &mut Flight<PackedAdapter>, bytes: u64) {
        let _turn = self.turn.lock().await;
        let start = Instant::now();
        let bytes = bytes as usize;
        while !flight.reserve(bytes) && flight.may_fit(bytes) && start.elapsed() < WAIT_FOR_ROOM {
            tokio::time::sleep(LOOK_FOR_ROOM).await;
        }
    }

    async fn load(self: Arc<Self>, name: String, entry: Arc<Entry>, mut flight: Flight<PackedAdapter>) {
        self.top_tier_room(&mut flight, entry.summary.bytes).await;
        let room = self.room(entry.summary.bytes).await;
        let work = tokio::task::spawn_blocking(move || {
            let lease = (entry.source == Source::Store).then(|| self.store.lease(&entry.generation));
            let start = Instant::now();
            let outcome = self.read_entry(&entry).and_then(|Loaded { adapter, language, summary }| {
                let mut packed = self.pack(adapter, language)?;
                self.wait_for_pages(&mut packed)?;
                let packed = Arc::new(packed);
                if packed.generation != entry.generation {
                    self.follow_change(&entry, &packed.generation, summary)?;
                }
                let bytes = packed.bytes;
                Ok((packed.generation.clone(), packed, bytes))
            });
            self.metrics.adapter_load_seconds.with_label_values(&["disk"]).observe(start.elapsed().as_secs_f64());
            if let Err(e) = &outcome {
                tracing::warn!("adapter {name:?} could not be loaded: {e}");
            }
            let settled = flight.settle(outcome, |generation| self.is_named(generation));
            // All is released before the waiters go on, so that none of them finds the store still in use.
            drop((room, lease, self));
            settled.announce();
        });
        if let Err(e) = work.await {
            tracing::error!("the load of an adapter panicked: {e}");
        }
    }

    /// Ends the flight of a blend.
    async fn compute(
        self: Arc<Self>,
        blend: Blend,
        parts: Vec<Arc<Entry>>,
        generation: Generation,
        mut flight: Flight<PackedAdapter>,
    ) {
        self.top_tier_room(&mut flight, parts.iter().map(|entry| entry.summary.bytes).sum()).await;
        let room = self.room(parts.iter().map(|entry| entry.summary.bytes).sum()).await;
        let work = tokio::task::spawn_blocking(move || {
            let stored = parts.iter().filter(|entry| entry.source == Source::Store);
            let leases: Vec<Lease> = stored.map(|entry| self.store.lease(&entry.generation)).collect();
            let start = Instant::now();
            let outcome = self.blend(&blend, &parts, generation.clone()).and_then(|mut packed| {
                self.wait_for_pages(&mut packed)?;
                let bytes = packed.bytes;
                Ok((generation, Arc::new(packed), bytes))
            });
            self.metrics.adapter_load_seconds.with_label_values(&["disk"]).observe(start.elapsed().as_secs_f64());
            if let Err(e) = &outcome {
                tracing::warn!("{blend} could not be computed: {e}");
            }
            // No name stands for a blend; it stays as long as it is used.
            let settled = flight.settle(outcome, |_| true);
            drop((room, leases, self));
            settled.announce();
        });
        if let Err(e) = work.await {
            tracing::error!("the computation of a blend panicked: {e}");
        }
    }

    fn blend(&self, blend: &Blend, parts: &[Arc<Entry>], generation: Generation) -> Result<PackedAdapter> {
        let (mut adapters, mut language) = (Vec::with_capacity(parts.len()), None);
        for (name, entry) in blend.names().zip(parts) {
            let named = |e: Error| e.context(format!("adapter {name:?}"));
            let Loaded { adapter, language: own, summary } = self.read_entry(entry).map_err(named)?;
            if adapter.generation != entry.generation {
                self.follow_change(entry, &adapter.generation, summary).map_err(named)?;
                return Err(named(Error::unavailable("its files changed while they were read; try again")));
            }
            adapters.push(adapter);
            let own = own.map_or(Ok(None), |own| own.over(&self.options.language)).map_err(named)?;
            if let (Some(_), Some(_)) = (&language, &own) {
                let what = "has a tokenizer or chat template of its own, as another one of the blend has; one can";
                return Err(named(Error::unprocessable(what)));
            }
            language = language.or(own);
        }
        let blend = blend.of(adapters, generation)?;
        Ok(self.pack_numbers(blend)?.with_language(language))
    }

    fn read(&self, directory: &Path) -> Result<Loaded> {
        peft::load(directory, self.options.config(), &self.options.base)
    }

    fn read_entry(&self, entry: &Entry) -> Result<Loaded> {
        // A source's adapter was read when it was fetched: what cannot be read now is damaged.
        self.read(&entry.path).inspect_err(|_| self.discard(entry))
    }

    fn pack(&self, adapter: Adapter, language: Option<OwnLanguage>) -> Result<PackedAdapter> {
        let packed = self.pack_numbers(adapter)?;
        let own = language.map_or(Ok(None), |own| own.over(&self.options.language))?;
        Ok(packed.with_language(own))
    }

    fn pack_numbers(&self, adapter: Adapter) -> Result<PackedAdapter> {
        let RegistryOptions { decoder, pool, .. } = &self.options;
        self.packing.install(|| match pool {
            Some(pool) => PackedAdapter::for_pages(adapter, decoder, pool),
            None => PackedAdapter::new(adapter, decoder),
        })
    }

    /// Puts an adapter on the GPU's pages, where there are such, and evicts others for it. Whether there were enough beside
    /// what is in use. Room in the tier is counted by bytes and, before a load, by those of files: here it is seen.
    fn find_pages(&self, packed: &mut PackedAdapter) -> Result<bool> {
        let Some(pool) = &self.options.pool else { return Ok(true) };
        loop {
            if packed.place(pool)? {
                return Ok(true);
            }
            if !self.cache.evict_oldest() {
                return Ok(false);
            }
        }
    }

    /// The same for one that the cache is offered; without pages it is not.
    fn find_pages_for_offer(&self, packed: &mut PackedAdapter) -> Result<()> {
        if self.cache.presence(&packed.generation).is_none() {
            self.find_pages(packed)?;
        }
        Ok(())
    }

    /// Finds pages, but waits for adapters in use to be released. There is nowhere else to put it.
    fn wait_for_pages(&self, packed: &mut PackedAdapter) -> Result<()> {
        let start = Instant::now();
        while !self.find_pages(packed)? {
            if start.elapsed() > WAIT_FOR_ROOM {
                let error = Error::unavailable("adapters in use have all of --adapter-memory on the GPU; try again");
                return Err(error.retry_after(1));
            }
            std::thread::sleep(LOOK_FOR_ROOM);
        }
        Ok(())
    }

    /// The files of an entry are not what they were. In a read-only folder somebody has replaced them: the names that
    /// stand for the folder follow. In the store that is damage.
    fn follow_change(&self, entry: &Entry, found: &Generation, summary: Summary) -> Result<()> {
        let expected = &entry.generation;
        if entry.source == Source::Store {
            return Err(Error::internal(format!(
                "its files are damaged: their hash is {found}, expected {expected}; upload it again"
            )));
        }
        if entry.copy.is_some() {
            self.discard(entry);
            return Err(Error::unavailable(format!(
                "what was fetched of it is damaged: its hash is {found}, expected {expected}; it is fetched again"
            )));
        }
        tracing::info!("the files in {} have changed from generation {expected} to {found}", entry.path.display());
        let fresh = directory_entry(entry.path.clone(), found.clone(), summary);
        let _change = self.change();
        {
            let mut names = self.names_mut();
            let same = |slot: &&mut Slot| slot.directory.as_ref().is_some_and(|e| e.path == entry.path);
            names.values_mut().filter(same).for_each(|slot| slot.directory = Some(fresh.clone()));
        }
        self.update_pins();
        Ok(())
    }

    fn publish(&self, name: &str, upload: Upload, when: &Condition) -> Result<(AdapterInfo, Published)> {
        check_whole_name(name)?;
        // A tenant would get the base by it too.
        if name.split(OWNER).next() == Some(&self.options.base) {
            return Err(
                Error::bad_request(format!("{name:?} is the base model's id, not free for an adapter")).param("name")
            );
        }
        upload.check_size()?;
        let Loaded { adapter, language, summary } = self.read(upload.path())?;
        let mut packed = self.pack(adapter, language)?;
        self.check_template(&packed)?;
        self.find_pages_for_offer(&mut packed)?;
        let packed = Arc::new(packed);
        let generation = packed.generation.clone();
        let path = self.store.object(&generation);
        let entry = Arc::new(Entry {
            generation: generation.clone(),
            source: Source::Store,
            path,
            summary,
            created: now(),
            copy: None,
        });

        // From here on the object cannot be collected; if the change is not made, it is when the lease ends.
        let lease = self.store.lease(&generation);
        self.store.add(&lease, upload.path())?;
        let bytes = packed.bytes;
        if packed.is_placed() {
            self.cache.offer(&generation, packed, bytes);
        }
        let published = self.swap_in(name, entry, bytes, &lease, when);
        self.forget_unnamed(&generation);
        published.map(|(entry, published)| (self.info(name, &self.slot(name), &entry), published))
    }

    /// Refuses a chat template that comes from others than who runs the server.
    fn check_template(&self, packed: &PackedAdapter) -> Result<()> {
        let brings_template = packed.language.as_ref().is_some_and(|own| !own.has_chat_of(&self.options.language));
        if brings_template && !self.options.uploaded_templates {
            return Err(Error::unprocessable(
                "it has a chat template of its own, which is a program that can take any amount of memory; take \
                 chat_template.jinja, or chat_template in tokenizer_config.json, out of it, or start the server with \
                 --allow-uploaded-templates",
            ));
        }
        Ok(())
    }

    /// The instant of publishing: checks the condition, makes the change durable, then visible. `bytes` are
    /// those that it takes in memory.
    fn swap_in(
        &self,
        name: &str,
        entry: Arc<Entry>,
        bytes: usize,
        lease: &Lease,
        when: &Condition,
    ) -> Result<(Arc<Entry>, Published)> {
        let _change = self.change();
        let slot = self.slot(name);
        check(name, &slot, when)?;
        let published = match slot.current() {
            None if slot.is_empty() => Published::Created,
            // The same content from a folder is replaced all the same: it stays when the folder goes.
            Some(Ok(old)) if old.generation == entry.generation && old.source == Source::Store => {
                return Ok((old.clone(), Published::Unchanged));
            }
            _ => Published::Replaced,
        };
        let (others, most) = self.pinned_beside(name, &entry.generation);
        if slot.pinned && others.saturating_add(bytes) > most {
            // How much others have pinned is not a tenant's to know.
            return Err(Error::conflict(format!(
                "adapter {name:?} is pinned, and what is to replace it takes {bytes} bytes, more than can be pinned; \
                 unpin it first"
            )));
        }
        // The old files stay until no reader can find the entry that leads to them.
        let _old = self.lease_stored(&slot);
        self.store.set_name(name, lease, entry.created)?;
        {
            let mut names = self.names_mut();
            names.entry(name.to_string()).or_default().stored = Some(Ok(entry.clone()));
        }
        self.update_pins();
        if let Some(Ok(old)) = slot.current() {
            self.forget_unnamed(&old.generation);
        }
        Ok((entry, published))
    }

    fn remove(&self, name: &str, when: &Condition) -> Result<AdapterInfo> {
        let removed = {
            let _change = self.change();
            let slot = self.slot(name);
            if slot.is_empty() {
                return Err(not_found(name));
            }
            check(name, &slot, when)?;
            let Some(stored) = &slot.stored else {
                let origin = match (&slot.directory, &slot.offer) {
                    (None, Some(offer)) => format!("source {}", self.url(offer)),
                    (entry, _) => {
                        let path = entry.as_ref().map_or(String::new(), |e| e.path.display().to_string());
                        format!("read-only folder {path}")
                    }
                };
                return Err(Error::conflict(format!(
                    "adapter {name:?} comes from the {origin}; it can be hidden by an upload of the same name, but not \
                     removed here"
                )));
            };
            let removed = stored.clone().map(|entry| (self.info(name, &slot, &entry), entry.generation.clone()));
            // As for a replacement.
            let _old = self.lease_stored(&slot);
            self.store.remove_name(name)?;
            {
                let mut names = self.names_mut();
                if let Some(slot) = names.get_mut(name) {
                    slot.stored = None;
                    if slot.is_empty() {
                        names.remove(name);
                    }
                }
            }
            self.update_pins();
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
        Ok(info)
    }

    fn lease_stored(&self, slot: &Slot) -> Option<Lease> {
        let stored = slot.stored.as_ref()?.as_ref().ok()?;
        Some(self.store.lease(&stored.generation))
    }

    fn slot(&self, name: &str) -> Slot {
        self.names().get(name).cloned().unwrap_or_default()
    }

    /// Frees the tier of a generation that no request can ask for any more.
    fn forget_unnamed(&self, generation: &Generation) {
        if !self.is_named(generation) {
            self.cache.forget(generation);
        }
    }
}

fn check(name: &str, slot: &Slot, when: &Condition) -> Result<()> {
    let current = slot.current();
    match (when, &current) {
        (Condition::Absent | Condition::Is(_), None) if !slot.is_empty() => {
            Err(Error::conflict(format!("adapter {name:?} is there already, in a source, and not fetched yet")))
        }
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

fn directory_entry(path: PathBuf, generation: Generation, summary: Summary) -> Arc<Entry> {
    let created = modified(&path);
    Arc::new(Entry { generation, source: Source::Directory, path, summary, created, copy: None })
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
        memory_bytes: None,
        pinned: false,
        in_flight: 0,
        requests: 0,
        last_used: None,
        created: 0,
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// When a folder's weights were last written, in Unix seconds.
fn modified(path: &Path) -> u64 {
    let weights = adapter_files(path).unwrap_or_default().into_iter().filter(|(name, _)| is_weights(name));
    let times = weights.filter_map(|(_, path)| std::fs::metadata(path).and_then(|meta| meta.modified()).ok());
    times.max().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::internal(format!("a change of adapters panicked: {e}"))))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::time::Duration;

    use candle_core::Device;
    use tempfile::TempDir;

    use super::*;
    use crate::ErrorKind;
    use crate::adapter::files::{CONFIG, WEIGHTS};
    use crate::adapter::testing::{Bucket, Files, Net, Tensor, adapter, adapter_of_rank, classifier, fixtures, tiny};
    use crate::base::testing::{decoder, options};
    use crate::base::{Base, Kernels};
    use crate::lora::HostUploads;

    pub(super) struct World {
        pub root: TempDir,
        pub memory: usize,
        pub pool: Option<Arc<Pool>>,
        pub metrics: Arc<Metrics>,
        /// Sources, of which those that list come first.
        pub buckets: Vec<Arc<Bucket>>,
        pub web: Vec<Arc<Bucket>>,
        pub source_refresh: Duration,
        pub source_cache: u64,
    }

    impl World {
        pub fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            std::fs::create_dir(root.path().join("adapters")).unwrap();
            World {
                root,
                memory: 1 << 20,
                pool: None,
                metrics: Arc::new(Metrics::new()),
                buckets: vec![],
                web: vec![],
                source_refresh: Duration::from_millis(10),
                source_cache: 1 << 20,
            }
        }

        /// Puts an adapter into the read-only folder.
        pub fn folder(&self, name: &str, files: &Files) -> PathBuf {
            let path = self.root.path().join("adapters").join(name);
            files.write(&path);
            path
        }

        pub fn open(&self) -> Arc<Registry> {
            self.open_with("tiny").unwrap()
        }

        pub fn open_with(&self, base: &str) -> Result<Arc<Registry>> {
            let listed = self.buckets.iter().map(|bucket| (bucket, true));
            let sources = listed.chain(self.web.iter().map(|bucket| (bucket, false))).enumerate();
            let source = |(i, (bucket, lists)): (usize, (&Arc<Bucket>, bool))| {
                let (store, url) = (Arc::new(Net(bucket.clone())), format!("memory://source-{i}"));
                Remote::over(store, &url, "prefix".into(), lists).with_patience(Duration::from_secs(1))
            };
            let options = RegistryOptions {
                base: base.into(),
                decoder: Arc::new(decoder(&tiny(), options(Kernels::for_device(&Device::Cpu)), 1)),
                language: Base::open(&fixtures().join("tiny/llama/base").to_string_lossy())?.language(),
                directories: vec![self.root.path().join("adapters")],
                store: self.root.path().join("store"),
                memory: self.memory,
                pool: self.pool.clone(),
                max_upload: 1 << 20,
                uploaded_templates: false,
                sources: sources.map(source).collect(),
                source_refresh: self.source_refresh,
                source_cache: self.source_cache,
            };
            Registry::open(options, self.metrics.clone())
        }

        fn object(&self, info: &AdapterInfo) -> PathBuf {
            self.root.path().join("store/objects").join(&info.generation)
        }

        pub fn gauge(&self, registry: &Registry, tier: &str) -> (i64, i64) {
            registry.update_metrics();
            let value = |gauges: &prometheus::IntGaugeVec| gauges.with_label_values(&[tier]).get();
            (value(&self.metrics.adapters), value(&self.metrics.adapter_bytes))
        }
    }

    pub(super) fn upload(registry: &Registry, files: &Files) -> Upload {
        let upload = registry.upload().unwrap();
        files.write(upload.path());
        upload
    }

    async fn publish(registry: &Registry, name: &str, seed: usize) -> (AdapterInfo, Published) {
        registry.publish(name, upload(registry, &adapter(seed)), Condition::Always).await.unwrap()
    }

    fn generation(info: &AdapterInfo) -> Generation {
        Generation::new(info.generation.as_str())
    }

    fn names(registry: &Registry) -> Vec<String> {
        registry.list().into_iter().map(|info| info.name).collect()
    }

    #[tokio::test]
    async fn folders_are_served_and_broken_ones_left_out() {
        let world = World::new();
        world.folder("b", &adapter(1));
        world.folder("a", &classifier(2));
        let broken = world.folder("broken", &adapter(3));
        std::fs::write(broken.join(WEIGHTS), "x").unwrap();
        world.folder("-bad-name", &adapter(4));
        world.folder("tiny", &adapter(4));
        std::fs::create_dir(world.root.path().join("adapters/empty")).unwrap();
        let registry = world.open();
        assert_eq!(names(&registry), ["a", "b"]);
        let info = registry.get("a").unwrap();
        assert_eq!((info.source, info.tier, info.rank, info.in_flight), (Source::Directory, Tier::Disk, 2, 0));
        assert_eq!((info.lora_alpha, info.labels.unwrap().len()), (4.0, 3));
        assert_eq!(info.target_modules, ["q_proj", "v_proj"]);
        for name in ["broken", "nobody"] {
            assert_eq!(registry.get(name).unwrap_err().kind, ErrorKind::NotFound);
            assert_eq!(registry.acquire(name).await.unwrap_err().kind, ErrorKind::NotFound);
        }
        let error = registry.remove("a", Condition::Always).await.unwrap_err();
        assert!(error.kind == ErrorKind::Conflict && error.message.contains("read-only"), "{error}");
    }

    #[tokio::test]
    async fn a_crowd_for_more_adapters_than_fit_takes_turns() {
        let mut world = World::new();
        (0..6).for_each(|i| drop(world.folder(&format!("a{i}"), &adapter(i))));
        let registry = world.open();
        let bytes = registry.get("a0").unwrap().bytes as usize;
        world.memory = 2 * bytes + bytes / 2;
        drop(registry);
        let registry = world.open();
        let most = AtomicUsize::new(0);
        let ask = async |i: usize| {
            let held = registry.acquire(&format!("a{i}")).await.unwrap();
            most.fetch_max(registry.inner.cache.totals().1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            held.generation.to_string()
        };
        let asked = futures::future::join_all((0..24).map(|i| ask(i % 6)));
        let generations: HashSet<String> = asked.await.into_iter().collect();
        assert_eq!(generations.len(), 6);
        let most = most.load(Ordering::SeqCst);
        assert!(0 < most && most <= world.memory, "{most} bytes of adapters, room for {}", world.memory);
    }

    /// Pages for so many of the adapters that `adapter` makes. Returns the bytes of one. The tier counts on more room.
    fn pages_for(world: &mut World, adapters: usize) -> usize {
        const PAGE: usize = 256;
        let one = world.folder("one", &adapter(100));
        let (base, loaded) = (decoder(&tiny(), options(Kernels::for_device(&Device::Cpu)), 1), tiny());
        let loaded = peft::load(&one, &loaded, "tiny").unwrap();
        let packed = PackedAdapter::for_pages(loaded.adapter, &base, &HostUploads::pool(PAGE, 1)).unwrap();
        assert!(!packed.is_placed() && packed.bytes.is_multiple_of(PAGE) && packed.bytes > PAGE, "{}", packed.bytes);
        std::fs::remove_dir_all(one).unwrap();
        world.pool = Some(HostUploads::pool(PAGE, adapters * packed.bytes / PAGE));
        packed.bytes
    }

    #[tokio::test]
    async fn adapters_have_pages_while_they_are_in_memory() {
        let mut world = World::new();
        (0..6).for_each(|i| drop(world.folder(&format!("a{i}"), &adapter(i))));
        let bytes = pages_for(&mut world, 2);
        let registry = world.open();
        let ask = async |i: usize| {
            let held = registry.acquire(&format!("a{i}")).await.unwrap();
            assert!(held.is_placed());
            assert_eq!(held.bytes, bytes);
            tokio::time::sleep(Duration::from_millis(5)).await;
            held.generation.to_string()
        };
        let asked = futures::future::join_all((0..24).map(|i| ask(i % 6)));
        let generations: HashSet<String> = asked.await.into_iter().collect();
        assert_eq!(generations.len(), 6);
        assert_eq!(world.gauge(&registry, "device"), (2, 2 * bytes as i64));
        // What is uploaded while all pages are in use waits on disk.
        let held = [registry.acquire("a0").await.unwrap(), registry.acquire("a1").await.unwrap()];
        let (info, _) = publish(&registry, "mine", 7).await;
        assert_eq!(info.tier, Tier::Disk);
        drop(held);
        assert!(registry.acquire("mine").await.unwrap().is_placed());
        let (info, _) = publish(&registry, "mine", 8).await;
        assert_eq!(info.tier, Tier::Device);
    }

    #[tokio::test]
    async fn an_adapter_of_more_pages_than_there_are_is_refused() {
        let mut world = World::new();
        let path = world.folder("a", &adapter(1));
        pages_for(&mut world, 1);
        world.pool = Some(HostUploads::pool(256, 1));
        let registry = world.open();
        let error = registry.acquire("a").await.unwrap_err();
        assert!(error.kind == ErrorKind::TooLarge && error.message.contains("pages of 256 bytes"), "{error}");
        let error = registry.publish("mine", upload(&registry, &adapter(2)), Condition::Always).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::TooLarge);
        assert_eq!(registry.get("mine").unwrap_err().kind, ErrorKind::NotFound);
        drop(path);
    }

    #[tokio::test]
    async fn published_adapters_are_hot_pinned_and_survive_a_restart() {
        let world = World::new();
        let registry = world.open();
        let (info, published) = publish(&registry, "mine", 1).await;
        assert_eq!(
            (published, info.source, info.tier, info.in_flight),
            (Published::Created, Source::Store, Tier::Device, 0)
        );
        let held = registry.acquire("mine").await.unwrap();
        assert_eq!(held.generation.as_str(), info.generation);
        assert_eq!(registry.get("mine").unwrap().in_flight, 1);
        assert_eq!(publish(&registry, "mine", 1).await.1, Published::Unchanged);
        let (second, published) = publish(&registry, "mine", 2).await;
        assert_eq!(published, Published::Replaced);
        assert_ne!(second.generation, info.generation);
        // Who held the old one keeps it; it is in nobody's way.
        assert_eq!(held.generation.as_str(), info.generation);
        let new = registry.acquire("mine").await.unwrap();
        assert_eq!(new.generation.as_str(), second.generation);
        assert_eq!(world.gauge(&registry, "device"), (2, (held.bytes + new.bytes) as i64));
        drop(held);
        assert_eq!(world.gauge(&registry, "device"), (1, new.bytes as i64));
        assert_eq!(world.gauge(&registry, "disk"), (1, second.bytes as i64));
        drop((registry, new));
        let registry = world.open();
        let again = registry.get("mine").unwrap();
        assert_eq!((&again.generation, again.created, again.tier), (&second.generation, second.created, Tier::Disk));
        assert_eq!(registry.acquire("mine").await.unwrap().generation.as_str(), second.generation);
        assert_eq!(registry.get("mine").unwrap().tier, Tier::Device);
        let removed = registry.remove("mine", Condition::Always).await.unwrap();
        assert_eq!(removed.generation, second.generation);
        assert_eq!(
            (names(&registry).len(), world.gauge(&registry, "device"), world.gauge(&registry, "disk")),
            (0, (0, 0), (0, 0))
        );
        assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 0);
        assert_eq!(registry.remove("mine", Condition::Always).await.unwrap_err().kind, ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_pinned_name_stays_in_memory_whatever_else_is_asked_for() {
        let mut world = World::new();
        // Of a rank at which numbers are most of a file, and of numbers that take f32 in memory, so that all are of one size.
        (0..4).for_each(|i| drop(world.folder(&format!("a{i}"), &adapter_of_rank(i + 3, 64))));
        let (bytes, files) = {
            let registry = world.open();
            (registry.loaded("a0").await.unwrap().bytes, registry.get("a0").unwrap().bytes as usize)
        };
        // One has room beside a pinned one while it is read, and two cannot be pinned.
        world.memory = bytes + files.max(bytes);
        assert!(world.memory < 4 * bytes, "{files} {bytes}");
        let registry = world.open();
        let tiers = || registry.list().iter().map(|info| info.tier == Tier::Device).collect::<Vec<_>>();
        let info = registry.pin("a0").await.unwrap();
        assert_eq!(
            (info.pinned, info.tier, info.memory_bytes, info.requests, info.last_used, info.in_flight),
            (true, Tier::Device, Some(bytes), 0, None, 0)
        );
        for name in ["a1", "a2", "a3"] {
            drop(registry.acquire(name).await.unwrap());
        }
        assert_eq!(tiers(), [true, false, false, true]);
        // Half of the memory is for others.
        let error = registry.pin("a1").await.unwrap_err();
        assert!(error.kind == ErrorKind::Conflict && error.message.contains("may be pinned"), "{error}");
        assert_eq!(registry.unload("a0").unwrap_err().kind, ErrorKind::Conflict);
        // The pin is the name's: it goes over to what is uploaded in the place of the folder's adapter, and back.
        let (uploaded, _) = publish(&registry, "a0", 7).await;
        assert!(uploaded.pinned && uploaded.tier == Tier::Device, "{uploaded:?}");
        let large = upload(&registry, &adapter_of_rank(9, 192));
        let error = registry.publish("a0", large, Condition::Always).await.unwrap_err();
        assert!(error.kind == ErrorKind::Conflict && error.message.contains("is pinned"), "{error}");
        assert_eq!(registry.get("a0").unwrap().generation, uploaded.generation);
        assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 1);
        for name in ["a1", "a2"] {
            drop(registry.acquire(name).await.unwrap());
        }
        assert_eq!(tiers(), [true, false, true, false]);
        registry.remove("a0", Condition::Always).await.unwrap();
        drop(registry.acquire("a0").await.unwrap());
        for name in ["a1", "a2"] {
            drop(registry.acquire(name).await.unwrap());
        }
        assert_eq!(tiers(), [true, false, true, false]);
        assert!(!registry.unpin("a0").await.unwrap().pinned);
        for name in ["a1", "a2"] {
            drop(registry.acquire(name).await.unwrap());
        }
        assert_eq!(tiers(), [false, true, true, false]);
        for name in ["nobody", "a0/.."] {
            assert_eq!(registry.pin(name).await.unwrap_err().kind, ErrorKind::NotFound);
            assert_eq!(registry.unpin(name).await.unwrap_err().kind, ErrorKind::NotFound);
            assert_eq!(registry.unload(name).unwrap_err().kind, ErrorKind::NotFound);
        }
    }

    #[tokio::test]
    async fn uses_are_counted_by_name_and_unloading_frees_the_memory() {
        let world = World::new();
        let registry = world.open();
        publish(&registry, "a", 1).await;
        publish(&registry, "b", 1).await;
        let before = now();
        let held = registry.acquire("a").await.unwrap();
        drop(registry.acquire("a").await.unwrap());
        registry.acquire("nobody").await.unwrap_err();
        let (a, b) = (registry.get("a").unwrap(), registry.get("b").unwrap());
        assert_eq!((a.requests, b.requests, b.last_used), (2, 0, None));
        assert!(a.last_used.is_some_and(|last| before <= last && last <= now()), "{a:?}");
        // A replacement is the same name.
        assert_eq!(publish(&registry, "a", 2).await.0.requests, 2);
        registry.unload("a").unwrap();
        assert_eq!(registry.get("a").unwrap().tier, Tier::Disk);
        // What is held is in memory until it is released.
        let info = registry.unload("b").unwrap();
        assert_eq!((info.tier, info.in_flight), (Tier::Device, 1));
        drop(held);
        assert_eq!(registry.get("b").unwrap().memory_bytes, None);
        assert_eq!(world.gauge(&registry, "device"), (0, 0));
        drop(registry.acquire("b").await.unwrap());
        assert_eq!(registry.get("b").unwrap().tier, Tier::Device);
    }

    #[tokio::test]
    async fn conditions_are_checked_at_the_swap() {
        let world = World::new();
        let registry = world.open();
        let publish_if = async |name: &str, seed: usize, when: Condition| {
            registry.publish(name, upload(&registry, &adapter(seed)), when).await
        };
        let nothing = Condition::Is(Generation::new("0".repeat(64)));
        assert_eq!(publish_if("a", 1, nothing.clone()).await.unwrap_err().kind, ErrorKind::Conflict);
        let (one, _) = publish_if("a", 1, Condition::Absent).await.unwrap();
        assert_eq!(publish_if("a", 2, Condition::Absent).await.unwrap_err().kind, ErrorKind::Conflict);
        assert_eq!(publish_if("a", 2, nothing.clone()).await.unwrap_err().kind, ErrorKind::Conflict);
        assert_eq!(registry.get("a").unwrap().generation, one.generation);
        let (two, _) = publish_if("a", 2, Condition::Is(generation(&one))).await.unwrap();
        assert_eq!(registry.remove("a", Condition::Is(generation(&one))).await.unwrap_err().kind, ErrorKind::Conflict);
        registry.remove("a", Condition::Is(generation(&two))).await.unwrap();
        // What was refused has left nothing behind.
        assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(world.root.path().join("store/incoming")).unwrap().count(), 0);
        assert_eq!(world.gauge(&registry, "device"), (0, 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_swaps_that_expect_the_same_one_wins() {
        let world = World::new();
        let registry = world.open();
        let (mut current, _) = publish(&registry, "a", 0).await;
        for round in 0..5 {
            let tries: Vec<_> = (0..4)
                .map(|i| {
                    let registry = registry.clone();
                    let when = Condition::Is(generation(&current));
                    tokio::spawn(async move {
                        let upload = upload(&registry, &adapter(1 + round * 4 + i));
                        registry.publish("a", upload, when).await
                    })
                })
                .collect();
            let mut won = vec![];
            for attempt in tries {
                match attempt.await.unwrap() {
                    Ok((info, _)) => won.push(info),
                    Err(e) => assert_eq!(e.kind, ErrorKind::Conflict, "{e}"),
                }
            }
            assert_eq!(won.len(), 1);
            assert_eq!(registry.get("a").unwrap().generation, won[0].generation);
            current = won.remove(0);
        }
        assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn an_upload_hides_a_folder_until_it_is_removed() {
        let world = World::new();
        world.folder("a", &adapter(1));
        let registry = world.open();
        let original = registry.get("a").unwrap();
        let absent = registry.publish("a", upload(&registry, &adapter(2)), Condition::Absent).await;
        assert_eq!(absent.unwrap_err().kind, ErrorKind::Conflict);
        let (info, published) = publish(&registry, "a", 2).await;
        assert_eq!((published, info.source), (Published::Replaced, Source::Store));
        assert_eq!(names(&registry), ["a"]);
        drop(registry);
        let registry = world.open();
        assert_eq!(registry.get("a").unwrap().generation, info.generation);
        registry.remove("a", Condition::Always).await.unwrap();
        assert_eq!(registry.get("a").unwrap().generation, original.generation);
        assert_eq!(registry.acquire("a").await.unwrap().generation.as_str(), original.generation);
    }

    #[tokio::test]
    async fn bad_uploads_are_refused_and_change_nothing() {
        let world = World::new();
        let registry = world.open();
        let mut wrong = adapter(1);
        wrong.config["r"] = serde_json::json!(4);
        let mut huge = adapter(1);
        huge.tensors.insert("x".into(), Tensor::f32(&[1 << 18], |_| 0.0));
        for (name, files, kind) in [
            ("a", &wrong, ErrorKind::Unprocessable),
            ("a", &huge, ErrorKind::TooLarge),
            ("a/b", &adapter(1), ErrorKind::BadRequest),
            ("base", &adapter(1), ErrorKind::BadRequest),
            ("tiny", &adapter(1), ErrorKind::BadRequest),
        ] {
            let error = registry.publish(name, upload(&registry, files), Condition::Always).await.unwrap_err();
            assert_eq!(error.kind, kind, "{error}");
        }
        let empty = registry.publish("a", registry.upload().unwrap(), Condition::Always).await.unwrap_err();
        assert!(empty.message.contains("adapter_config.json is missing"), "{empty}");
        assert!(registry.list().is_empty());
        for folder in ["objects", "names", "incoming"] {
            assert_eq!(std::fs::read_dir(world.root.path().join("store").join(folder)).unwrap().count(), 0, "{folder}");
        }
    }

    #[tokio::test]
    async fn a_local_directory_or_an_archive_can_be_published() {
        let world = World::new();
        let registry = world.open();
        let folder = classifier(1).folder();
        std::fs::write(folder.path().join("labels.json"), r#"["a", "b", "c"]"#).unwrap();
        std::fs::write(folder.path().join("optimizer.pt"), vec![0; 2 << 20]).unwrap();
        let upload = registry.upload_from(folder.path()).unwrap();
        let (copied, _) = registry.publish("copied", upload, Condition::Always).await.unwrap();
        assert_eq!(copied.labels.unwrap(), ["a", "b", "c"]);
        let upload = registry.upload().unwrap();
        let file = upload.path().join("archive");
        let mut tar = tar::Builder::new(std::fs::File::create(&file).unwrap());
        for name in ["adapter_config.json", WEIGHTS, "labels.json"] {
            tar.append_path_with_name(folder.path().join(name), name).unwrap();
        }
        tar.finish().unwrap();
        upload.unpack(&file).unwrap();
        assert!(!file.exists());
        let (unpacked, _) = registry.publish("unpacked", upload, Condition::Always).await.unwrap();
        assert_eq!(unpacked.generation, copied.generation);
        // One content under two names: one copy in memory, one on disk.
        let (a, b) = (registry.acquire("copied").await.unwrap(), registry.acquire("unpacked").await.unwrap());
        assert!(Arc::ptr_eq(&a, &b));
        assert_eq!((registry.get("copied").unwrap().in_flight, world.gauge(&registry, "disk").0), (2, 1));
        registry.remove("copied", Condition::Always).await.unwrap();
        assert_eq!(registry.get("unpacked").unwrap().tier, Tier::Device);
        assert!(registry.upload_from(Path::new("/nowhere")).is_err());
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(registry.upload_from(empty.path()).err().unwrap().kind, ErrorKind::Unprocessable);
    }

    #[tokio::test]
    async fn more_adapters_than_fit_take_turns() {
        let mut world = World::new();
        for i in 0..6 {
            world.folder(&format!("a{i}"), &adapter(i));
        }
        let mut one = 0;
        for i in 0..6 {
            one = one.max(world.open().acquire(&format!("a{i}")).await.unwrap().bytes);
        }
        world.memory = 2 * one;
        let registry = world.open();
        for round in 0..3 {
            for i in 0..6 {
                let name = format!("a{i}");
                let adapter = registry.acquire(&name).await.unwrap();
                assert_eq!(adapter.generation.as_str(), registry.get(&name).unwrap().generation, "{round}");
                assert!(world.gauge(&registry, "device").1 <= 2 * one as i64);
            }
        }
        // All in use at once: more than the limit, and nobody is refused.
        let mut held = vec![];
        for i in 0..6 {
            held.push(registry.acquire(&format!("a{i}")).await.unwrap());
        }
        assert_eq!(world.gauge(&registry, "device"), (6, held.iter().map(|a| a.bytes as i64).sum()));
        drop(held);
        registry.acquire("a0").await.unwrap();
        assert_eq!(registry.list().iter().filter(|info| info.tier == Tier::Device).count(), 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_cold_adapter_is_read_once_for_all_who_wait() {
        let world = World::new();
        world.folder("a", &adapter(1));
        let registry = world.open();
        let waiting: Vec<_> = (0..16)
            .map(|_| {
                let registry = registry.clone();
                tokio::spawn(async move { registry.acquire("a").await.unwrap() })
            })
            .collect();
        let mut found = vec![];
        for one in waiting {
            found.push(one.await.unwrap());
        }
        assert!(found.iter().all(|adapter| Arc::ptr_eq(adapter, &found[0])));
        assert_eq!(world.metrics.adapter_load_seconds.with_label_values(&["disk"]).get_sample_count(), 1);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_does_not_stop_the_load() {
        let world = World::new();
        world.folder("a", &adapter(1));
        let registry = world.open();
        let given_up = tokio::time::timeout(Duration::ZERO, registry.acquire("a")).await;
        assert!(given_up.is_err() || registry.get("a").unwrap().tier == Tier::Device);
        registry.acquire("a").await.unwrap();
        assert_eq!(world.metrics.adapter_load_seconds.with_label_values(&["disk"]).get_sample_count(), 1);
    }

    #[tokio::test]
    async fn a_folder_whose_files_change_is_followed() {
        let world = World::new();
        let path = world.folder("a", &adapter(1));
        let registry = world.open();
        let before = registry.get("a").unwrap();
        adapter(2).write(&path);
        let adapter = registry.acquire("a").await.unwrap();
        assert_ne!(adapter.generation.as_str(), before.generation);
        assert_eq!(registry.get("a").unwrap().generation, adapter.generation.as_str());
        assert_eq!(registry.get("a").unwrap().tier, Tier::Device);
    }

    #[tokio::test]
    async fn a_damaged_or_unfit_upload_is_kept_out_but_named() {
        let world = World::new();
        let registry = world.open();
        let (info, _) = publish(&registry, "bad", 1).await;
        publish(&registry, "good", 2).await;
        drop(registry);
        let object = world.object(&info);
        let mut config = adapter(1).config;
        config["lora_alpha"] = serde_json::json!(8);
        std::fs::write(object.join(CONFIG), config.to_string()).unwrap();
        let registry = world.open();
        let error = registry.acquire("bad").await.unwrap_err();
        assert!(error.message.contains("\"bad\"") && error.message.contains("damaged"), "{error}");
        drop(registry);
        config["r"] = serde_json::json!(8);
        std::fs::write(object.join(CONFIG), config.to_string()).unwrap();
        let registry = world.open();
        assert_eq!(names(&registry), ["good"]);
        for error in [registry.get("bad").unwrap_err(), registry.acquire("bad").await.unwrap_err()] {
            assert!(error.message.contains("\"bad\"") && error.message.contains("expected [8, 8]"), "{error}");
        }
        let absent = registry.publish("bad", upload(&registry, &adapter(1)), Condition::Absent).await;
        assert_eq!(absent.unwrap_err().kind, ErrorKind::Conflict);
        assert_eq!(publish(&registry, "bad", 1).await.1, Published::Replaced);
        registry.acquire("bad").await.unwrap();
        drop(registry);
        std::fs::remove_dir_all(&object).unwrap();
        let registry = world.open();
        assert_eq!(names(&registry), ["good"]);
        registry.remove("bad", Condition::Always).await.unwrap();
        assert_eq!(registry.get("bad").unwrap_err().kind, ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn damage_while_running_is_told_not_served() {
        let mut world = World::new();
        world.memory = 0;
        let registry = world.open();
        let (info, _) = publish(&registry, "a", 1).await;
        std::fs::write(world.object(&info).join(WEIGHTS), adapter(2).weights()).unwrap();
        let error = registry.acquire("a").await.unwrap_err();
        assert!(error.kind == ErrorKind::Internal && error.message.contains("damaged"), "{error}");
        // The same upload again heals it.
        publish(&registry, "a", 1).await;
        registry.acquire("a").await.unwrap();
    }

    #[tokio::test]
    async fn numbers_that_are_not_finite_are_found_at_the_first_load() {
        let world = World::new();
        let mut files = adapter(1);
        let tensor = files.tensors.values_mut().next().unwrap();
        *tensor = Tensor::f32(&tensor.shape.clone(), |_| f32::NAN);
        world.folder("a", &files);
        let registry = world.open();
        let error = registry.acquire("a").await.unwrap_err();
        assert!(error.kind == ErrorKind::Unprocessable && error.message.contains("NaN"), "{error}");
    }

    #[tokio::test]
    async fn a_base_called_like_a_stored_adapter_is_not_served() {
        let world = World::new();
        publish(&world.open(), "theirs@tenant", 1).await;
        let error = world.open_with("theirs").map(|_| ()).unwrap_err();
        assert!(error.kind == ErrorKind::Conflict && error.message.contains("theirs@tenant"), "{error}");
        let (info, _) = publish(&world.open(), "other", 1).await;
        let error = world.open_with("other").map(|_| ()).unwrap_err();
        let file = world.root.path().join("store/names/other").display().to_string();
        assert!(error.kind == ErrorKind::Conflict && error.message.contains(&file), "{error}");
        assert_eq!(world.open().get("other").unwrap().generation, info.generation);
        std::fs::write(&file, "damage").unwrap();
        world.open_with("other").map(|_| ()).unwrap_err();
    }

    #[tokio::test]
    async fn an_upload_of_what_a_folder_holds_outlives_the_folder() {
        let world = World::new();
        let path = world.folder("a", &adapter(1));
        let registry = world.open();
        let (info, published) = publish(&registry, "a", 1).await;
        assert_eq!((published, info.source), (Published::Replaced, Source::Store));
        assert_eq!(publish(&registry, "a", 1).await.1, Published::Unchanged);
        drop(registry);
        std::fs::remove_dir_all(path).unwrap();
        assert_eq!(world.open().acquire("a").await.unwrap().generation.as_str(), info.generation);
    }

    #[tokio::test]
    async fn a_damaged_folder_does_not_fail_the_same_content_in_the_store() {
        let mut world = World::new();
        world.memory = 0;
        let path = world.folder("folder", &adapter(1));
        let registry = world.open();
        publish(&registry, "stored", 1).await;
        std::fs::write(path.join(WEIGHTS), "damage").unwrap();
        // All ask before any load ends, those for the folder first.
        let folder = futures::future::join_all((0..4).map(|_| registry.acquire("folder")));
        let (folder, stored) = futures::join!(folder, registry.acquire("stored"));
        let stored = stored.unwrap();
        // The same content may have come from the store meanwhile.
        assert!(folder[0].is_err() && folder.iter().flatten().all(|a| a.generation == stored.generation));
    }

    #[tokio::test]
    async fn a_load_that_began_before_the_entry_does_not_fail_it() {
        let mut world = World::new();
        world.memory = 0;
        let registry = world.open();
        publish(&registry, "a", 1).await;
        let entry = registry.inner.entry("a").unwrap().unwrap();
        let Lookup::Load(flight, _) = registry.inner.cache.get(&entry.generation, &entry.path) else { panic!() };
        let fail = async { flight.settle(Err(Error::internal("its files were gone")), |_| true).announce() };
        // Polled in this order: the request has joined the load when that fails.
        let (acquired, ()) = futures::join!(registry.acquire("a"), fail);
        acquired.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn old_files_stay_until_the_old_entry_cannot_be_found() {
        let world = World::new();
        let registry = world.open();
        let (old, _) = publish(&registry, "a", 1).await;
        let name = world.root.path().join("store/names/a");
        let replacing = {
            // Keeps the new entry from becoming visible.
            let names = registry.inner.names.read().unwrap();
            let (registry, record) = (registry.clone(), std::fs::read(&name).unwrap());
            let replacing = tokio::spawn(async move { publish(&registry, "a", 2).await });
            let start = Instant::now();
            while std::fs::read(&name).unwrap() == record {
                assert!(start.elapsed().as_secs() < 60, "the name was not replaced on disk");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(100));
            assert!(world.object(&old).exists());
            drop(names);
            replacing
        };
        replacing.await.unwrap();
        assert!(!world.object(&old).exists());
    }

    #[tokio::test]
    async fn loads_and_uploads_wait_for_memory() {
        let world = World::new();
        world.folder("a", &adapter(1));
        let registry = world.open();
        // As much as there is for one that is larger than that.
        let room = registry.inner.room(1 << 40).await.unwrap();
        assert_eq!((room.num_permits() as u64, registry.inner.room.available_permits()), (LOAD_MEMORY, 0));
        let (loader, publisher) = (registry.clone(), registry.clone());
        let load = tokio::spawn(async move { loader.acquire("a").await });
        let publish = tokio::spawn(async move { publish(&publisher, "b", 2).await });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!load.is_finished() && !publish.is_finished());
        drop(room);
        load.await.unwrap().unwrap();
        publish.await.unwrap();
        assert_eq!(registry.inner.room.available_permits() as u64, LOAD_MEMORY);
    }

    /// Readers of several names go on without an error, and without a generation their name never stood for, while
    /// these are replaced and removed, with a tier too small for all.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn traffic_goes_on_while_adapters_change() {
        let mut world = World::new();
        world.memory = 5000;
        let registry = world.open();
        let seeds = |name: usize| [name * 10, name * 10 + 1];
        let mut known = vec![];
        for name in 0..4 {
            let mut generations = HashSet::new();
            for seed in seeds(name) {
                generations.insert(publish(&registry, &format!("a{name}"), seed).await.0.generation);
            }
            known.push(generations);
        }
        let known = Arc::new(known);
        let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let (registry, known, done, served) = (registry.clone(), known.clone(), done.clone(), served.clone());
                tokio::spawn(async move {
                    let mut turn = reader;
                    while !done.load(Ordering::Relaxed) {
                        let name = turn % 4;
                        turn += 1;
                        let adapter = registry.acquire(&format!("a{name}")).await.unwrap();
                        assert!(known[name].contains(adapter.generation.as_str()));
                        served.fetch_add(1, Ordering::Relaxed);
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        for round in 0..24 {
            publish(&registry, &format!("a{}", round % 4), seeds(round % 4)[round / 4 % 2]).await;
            publish(&registry, "other", 100 + round % 3).await;
            registry.remove("other", Condition::Always).await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.await.unwrap();
        }
        assert!(served.load(Ordering::Relaxed) > 100);
        assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 4);
        assert!(registry.list().iter().all(|info| info.in_flight == 0));
        assert!(world.gauge(&registry, "device").1 <= 5000 + 4 * 2000);
    }
}
