//! From files to adapters that requests can use.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use super::names::{Entry, Slot, directory_entry};
use super::{Inner, RegistryOptions, Source};
use crate::adapter::cache::Flight;
use crate::adapter::peft::{self, Loaded, Summary};
use crate::adapter::store::Lease;
use crate::adapter::{Adapter, Blend, Generation};
use crate::base::OwnLanguage;
use crate::lora::PackedAdapter;
use crate::{Error, Result};

/// Memory for adapters that are being read and packed, in KiB, by loads and uploads together.
pub(super) const LOAD_MEMORY: u64 = 2 << 20;
/// Loads and uploads at the same time, however small they are.
const PARALLEL_LOADS: u64 = 16;
/// What an adapter takes while it is read and packed, as a multiple of its file: half-precision numbers are widened to
/// twice their size, and packed piece by piece.
const LOAD_FACTOR: u64 = 3;
/// How often a load that waits for room in the top tier looks for it: adapters are released without a word.
const LOOK_FOR_ROOM: Duration = Duration::from_millis(2);
/// How long it waits before it goes on without. Those who hold adapters may be clients that read slowly.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(5);

impl Inner {
    /// Waits until there is memory to read and pack weights of this many bytes. Larger ones than there ever is run alone.
    pub(super) async fn room(&self, weights: u64) -> Option<OwnedSemaphorePermit> {
        let needed = (weights >> 10).saturating_mul(LOAD_FACTOR).clamp(LOAD_MEMORY / PARALLEL_LOADS, LOAD_MEMORY);
        // The semaphore is never closed, so there is always a permit to be had.
        self.room.clone().acquire_many_owned(needed as u32).await.ok()
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

    pub(super) async fn load(self: Arc<Self>, name: String, entry: Arc<Entry>, mut flight: Flight<PackedAdapter>) {
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
    pub(super) async fn compute(
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

    pub(super) fn blend(&self, blend: &Blend, parts: &[Arc<Entry>], generation: Generation) -> Result<PackedAdapter> {
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

    pub(super) fn read(&self, directory: &Path) -> Result<Loaded> {
        peft::load(directory, self.options.config(), &self.options.base)
    }

    fn read_entry(&self, entry: &Entry) -> Result<Loaded> {
        // A source's adapter was read when it was fetched: what cannot be read now is damaged.
        self.read(&entry.path).inspect_err(|_| self.discard(entry))
    }

    pub(super) fn pack(&self, adapter: Adapter, language: Option<OwnLanguage>) -> Result<PackedAdapter> {
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
    pub(super) fn find_pages_for_offer(&self, packed: &mut PackedAdapter) -> Result<()> {
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
}
