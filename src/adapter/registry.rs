//! Names to generations: which adapters exist, which are in memory, which are in use.
//!
//! Three things, each with its own short lock: the names (read by every request, written for the instant of a swap),
//! the top memory tier ([`Cache`]), and the store on disk ([`Store`]). Files are read and written outside all of them.
//! Changes to names run one after the other under `changes`, which readers never take.
//!
//! What lies elsewhere is fetched when it is asked for: [`sources`].

mod changes;
mod info;
mod loading;
mod names;
mod pins;
mod sources;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
use tokio::sync::Semaphore;

pub use self::changes::{Condition, Published};
pub use self::info::{AdapterInfo, Source, Tier};
use self::loading::LOAD_MEMORY;
use self::names::{Entry, Names, scan_directories};
use self::sources::Sources;
use crate::adapter::cache::{Cache, Lookup};
use crate::adapter::name::OWNER;
use crate::adapter::peft;
use crate::adapter::store::Store;
use crate::adapter::{Blend, Remote, Upload};
use crate::base::{Decoder, Language, ModelConfig};
use crate::lora::{PackedAdapter, Pool};
use crate::metrics::Metrics;
use crate::{Error, Result};

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

fn not_found(name: &str) -> Error {
    let shown: String = name.chars().take(200).collect();
    Error::not_found(format!("there is no adapter {shown:?}"))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::internal(format!("a change of adapters panicked: {e}"))))
}
