//! Adapters of sources: what these offer, what of it is here, and when it is fetched.
//!
//! Every few seconds each source is looked at, on threads of their own. A name that is offered and not here is fetched when
//! it is asked for, once however many wait; a name that is nowhere is looked for at that moment. What was fetched is
//! validated like an upload and stays in the store's folder `fetched`, least recently used gone first. When a source has
//! another version of it, and at two looks in a row the same, that is fetched beside it and takes its place; if it cannot
//! be, what is here stays. So does all of it while a source is out of reach.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, Shared};
use futures::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use super::info::unusable;
use super::names::{Entry, Names, Slot};
use super::{AdapterInfo, Inner, RegistryOptions, Source, Tier, blocking, not_found, now};
use crate::adapter::name::check_name;
use crate::adapter::peft;
use crate::adapter::remote::{Failure, Found, Remote};
use crate::adapter::{Generation, Upload};
use crate::{Error, ErrorKind, Result};

/// Where a copy is from, in its folder.
const ORIGIN: &str = ".origin.json";
/// How often a fetch begins anew because the files changed under it.
const ATTEMPTS: usize = 3;
/// How long what cannot be an adapter is not fetched again, unless it changes.
const REFUSE: Duration = Duration::from_secs(60);
/// Names that are nowhere to be looked for, in the time from one look at the sources to the next.
const MAX_MISSES: usize = 256;
/// A source that does not list is asked for new versions of what was used within this many seconds,
const ACTIVE: u64 = 600;
/// of so many adapters at the same time.
const PROBES: usize = 4;

pub(super) struct Sources {
    remotes: Vec<Remote>,
    refresh: Duration,
    /// Bytes that copies may take.
    limit: u64,
    /// Where they lie.
    folder: PathBuf,
    /// Of each source, why it could not be read at last.
    outages: Vec<Mutex<Option<Outage>>>,
    fetches: Mutex<HashMap<String, Fetch>>,
    /// Names that are nowhere, until when nobody looks again, and what is answered.
    misses: Mutex<HashMap<String, (Instant, Error)>>,
    /// Names that can be no adapter's, which is told once.
    odd: Mutex<HashSet<String>>,
    /// Counts uses of copies; the larger one's, the more recent.
    clock: AtomicU64,
    /// Where fetches run, so that they neither wait for requests nor make them wait. It is there until the end.
    runtime: Option<Runtime>,
}

struct Outage {
    at: Instant,
    error: Error,
}

/// A fetch under way.
type Fetch = Shared<BoxFuture<'static, Result<Arc<Entry>>>>;

/// What a source has under a name.
#[derive(Debug, Clone)]
pub(super) struct Offer {
    source: usize,
    /// At the last look; `None` if there was none yet.
    found: Option<Arc<Found>>,
    /// What of it is here, in this or an earlier version.
    pub entry: Option<Arc<Entry>>,
    refused: Option<Refusal>,
}

/// A version that could not be fetched.
#[derive(Debug, Clone)]
struct Refusal {
    version: Arc<str>,
    until: Instant,
    error: Error,
}

/// The files of an adapter that was fetched. They go when it is obsolete and nobody reads them.
#[derive(Debug)]
pub(super) struct Copied {
    path: PathBuf,
    bytes: u64,
    version: Arc<str>,
    used: AtomicU64,
    obsolete: AtomicBool,
}

#[derive(Serialize, Deserialize)]
struct Origin {
    source: String,
    name: String,
    version: String,
    generation: String,
    created: u64,
}

impl Offer {
    pub fn bytes(&self) -> u64 {
        self.found.as_ref().map_or(0, |found| found.bytes())
    }

    fn copy(&self) -> Option<&Arc<Copied>> {
        self.entry.as_ref()?.copy.as_ref()
    }

    fn has(&self, version: &str) -> bool {
        self.copy().is_some_and(|copy| *copy.version == *version)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if self.obsolete.load(Ordering::Relaxed) {
            remove(&self.path);
        }
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        // The last to let go may be a thread of it, or one that must not wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Sources {
    /// Takes the sources of `options`, if there are any, and puts what is here of theirs among `names`.
    pub fn open(options: &mut RegistryOptions, names: &mut Names) -> Result<Option<Self>> {
        let remotes = std::mem::take(&mut options.sources);
        if remotes.is_empty() {
            return Ok(None);
        }
        let folder = options.store.join("fetched");
        let failed = |e: std::io::Error| Error::internal(format!("{}: {e}", folder.display()));
        fs::create_dir_all(&folder).map_err(failed)?;
        for copy in fs::read_dir(&folder).map_err(failed)? {
            let path = copy.map_err(failed)?.path();
            let known = read_copy(&path, options, &remotes);
            let taken = known.and_then(|(name, source, entry)| {
                let slot = names.entry(name).or_default();
                let is_first = slot.offer.as_ref().is_none_or(|other| other.source > source);
                is_first.then(|| slot.offer.replace(Offer { source, found: None, entry: Some(entry), refused: None }))
            });
            match taken {
                None => remove(&path),
                Some(other) => other.iter().filter_map(Offer::copy).for_each(|copy| copy.set_obsolete()),
            }
        }
        names.retain(|_, slot| !slot.is_empty());
        let threads =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("sources").enable_all().build();
        Ok(Some(Sources {
            refresh: options.source_refresh,
            limit: options.source_cache,
            folder,
            outages: remotes.iter().map(|_| Mutex::default()).collect(),
            remotes,
            fetches: Mutex::default(),
            misses: Mutex::default(),
            odd: Mutex::default(),
            clock: AtomicU64::new(1),
            runtime: Some(threads.map_err(|e| Error::internal(format!("threads for sources: {e}")))?),
        }))
    }

    fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
        self.runtime.as_ref().expect("it is there until the end").spawn(task)
    }

    /// Fails with what the source failed with, if that was lately.
    fn check(&self, source: usize) -> Result<()> {
        let outage = self.outages[source].lock().unwrap_or_else(PoisonError::into_inner);
        match &*outage {
            // One that lists is looked at all the time, and so known to be back.
            Some(Outage { at, error }) if self.remotes[source].lists() || at.elapsed() < self.refresh => {
                Err(error.clone())
            }
            _ => Ok(()),
        }
    }

    fn has_answered(&self, source: usize) {
        let outage = self.outages[source].lock().unwrap_or_else(PoisonError::into_inner).take();
        if outage.is_some() {
            tracing::info!("the source {} can be read again", self.remotes[source].url());
        }
    }

    fn retry_later(&self, error: Error) -> Error {
        error.retry_after(self.refresh.as_secs().max(1))
    }

    /// Notes that a name is about to be looked for; fails if there is no need to.
    fn note_miss(&self, name: &str) -> Result<()> {
        let mut misses = self.misses.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some((_, error)) = misses.get(name).filter(|(until, _)| *until > now) {
            return Err(error.clone());
        }
        if misses.len() >= MAX_MISSES {
            misses.retain(|_, (until, _)| *until > now);
        }
        match misses.len() < MAX_MISSES {
            true => drop(misses.insert(name.to_string(), (now + self.refresh, not_found(name)))),
            // They are looked at anyway.
            false if self.remotes.iter().all(Remote::lists) => return Err(not_found(name)),
            false => {
                let what = "too many adapters that are nowhere were asked for; try again";
                return Err(self.retry_later(Error::unavailable(what)));
            }
        }
        Ok(())
    }

    /// `None` where it is worth to look again.
    fn set_miss(&self, name: &str, answer: Option<Error>) {
        let mut misses = self.misses.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Some(error) => drop(misses.insert(name.to_string(), (Instant::now() + self.refresh, error))),
            None => drop(misses.remove(name)),
        }
    }
}

impl Copied {
    fn set_obsolete(&self) {
        self.obsolete.store(true, Ordering::Relaxed);
    }
}

impl Inner {
    /// Starts to look at the sources, until the registry is gone.
    pub(super) fn watch_sources(self: &Arc<Self>) {
        let Some(sources) = &self.sources else { return };
        {
            let _change = self.change();
            self.evict_copies(sources);
        }
        for source in 0..sources.remotes.len() {
            sources.spawn(watch(Arc::downgrade(self), source));
        }
    }

    /// The URL of the source of an offer.
    pub(super) fn url(&self, offer: &Offer) -> Arc<str> {
        self.sources.as_ref().map_or_else(|| "".into(), |sources| sources.remotes[offer.source].url().clone())
    }

    /// What is known of an adapter that is not here.
    pub(super) fn offered(&self, name: &str, slot: &Slot, offer: &Offer) -> AdapterInfo {
        let last_used = slot.usage.last.load(Ordering::Relaxed);
        AdapterInfo {
            source: Source::Remote(self.url(offer)),
            tier: Tier::Remote,
            bytes: offer.bytes(),
            pinned: slot.pinned,
            requests: slot.usage.requests.load(Ordering::Relaxed),
            last_used: (last_used > 0).then_some(last_used),
            created: offer.found.as_ref().map_or(0, |found| found.modified()),
            ..unusable(name)
        }
    }

    /// Sets how many adapters each source offers.
    pub(super) fn count_offers(&self, names: &Names) {
        let Some(sources) = &self.sources else { return };
        let mut counts = vec![0; sources.remotes.len()];
        names.values().filter_map(|slot| slot.offer.as_ref()).for_each(|offer| counts[offer.source] += 1);
        for (remote, count) in sources.remotes.iter().zip(counts) {
            self.metrics.source_adapters.with_label_values(&[&**remote.url()]).set(count);
        }
    }

    /// Counts a use of what the slot stands for.
    pub(super) fn touch(&self, slot: &Slot) {
        let copy = slot.current().and_then(|entry| entry.ok()?.copy.as_ref());
        if let (Some(copy), Some(sources)) = (copy, &self.sources) {
            copy.used.store(sources.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// What the name, for which nothing is here, stands for in the sources, fetched.
    ///
    /// Errors: no source has it; the one that may have it is out of reach; or it is no adapter for this base.
    pub(super) async fn fetched(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>> {
        let Some(sources) = self.sources.as_ref().filter(|_| check_name(name).is_ok() && name != self.options.base)
        else {
            return Err(not_found(name));
        };
        self.fetch_once(sources, name)?.await
    }

    /// The fetch of `name` that is under way, or a new one. It goes on if nobody waits for it.
    fn fetch_once(self: &Arc<Self>, sources: &Sources, name: &str) -> Result<Fetch> {
        struct Ended(Arc<Inner>, String);
        impl Drop for Ended {
            fn drop(&mut self) {
                if let Some(sources) = &self.0.sources {
                    sources.fetches.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
                }
            }
        }
        let mut fetches = sources.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fetch) = fetches.get(name) {
            return Ok(fetch.clone());
        }
        if self.slot(name).offer.is_none() {
            sources.note_miss(name)?;
        }
        let ended = Ended(self.clone(), name.to_string());
        let task = sources.spawn(async move {
            let Ended(inner, name) = &ended;
            inner.fetch(name).await
        });
        let joined = |outcome: Result<_, _>| {
            outcome.unwrap_or_else(|e| Err(Error::internal(format!("an adapter's fetch was given up: {e}"))))
        };
        let fetch = task.map(joined).boxed().shared();
        fetches.insert(name.to_string(), fetch.clone());
        Ok(fetch)
    }

    async fn fetch(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>> {
        let Some(sources) = &self.sources else { return Err(not_found(name)) };
        let named = |e: Error| if e.kind == ErrorKind::NotFound { e } else { e.context(format!("adapter {name:?}")) };
        let (source, found) = match self.slot(name).offer {
            Some(Offer { entry: Some(entry), found: Some(found), .. })
                if entry.copy.as_ref().is_some_and(|copy| copy.version == found.version) =>
            {
                return Ok(entry);
            }
            Some(Offer { source, found: Some(found), refused, .. }) => {
                let refused = refused.filter(|r| r.version == found.version && r.until > Instant::now());
                if let Some(Refusal { error, .. }) = refused {
                    return Err(named(error));
                }
                (source, found)
            }
            _ => self.look_for(sources, name).await?,
        };
        sources.check(source).map_err(named)?;
        self.bring(sources, name, source, found).await.map_err(named)
    }

    /// Asks all sources for a name that none is known to offer. The first of them that has it counts.
    async fn look_for(self: &Arc<Self>, sources: &Sources, name: &str) -> Result<(usize, Arc<Found>)> {
        let looks = sources.remotes.iter().enumerate().map(async |(source, remote)| {
            sources.check(source)?;
            let found = remote.probe(name).await.map_err(|failure| self.failed(sources, source, failure))?;
            sources.has_answered(source);
            Ok::<_, Error>(found)
        });
        let (mut lack, mut trouble) = (None, None);
        for (source, look) in futures::future::join_all(looks).await.into_iter().enumerate() {
            match look {
                Ok(Some(found)) if found.lack.is_none() => {
                    sources.set_miss(name, None);
                    let found = Arc::new(found);
                    self.apply(sources, source, name, Some(found.clone()));
                    return Ok((source, found));
                }
                Ok(found) => {
                    if let Some(what) = found.as_ref().and_then(|found| found.lack.as_ref()) {
                        let url = sources.remotes[source].url();
                        let what = format!("there is no adapter {name:?}; what {url} has of it is not whole: {what}");
                        lack = lack.or(Some(Error::not_found(what)));
                    }
                    self.apply(sources, source, name, None);
                }
                Err(e) => trouble = trouble.or(Some(e)),
            }
        }
        // A source that was not asked may have it.
        if let Some(e) = trouble {
            sources.set_miss(name, None);
            return Err(e.context(format!("whether there is an adapter {name:?} is not known")));
        }
        let error = lack.unwrap_or_else(|| not_found(name));
        sources.set_miss(name, Some(error.clone()));
        Err(error)
    }

    /// Fetches `found`, or what has come in its place, until it is the same before and after.
    async fn bring(
        self: &Arc<Self>,
        sources: &Sources,
        name: &str,
        source: usize,
        mut found: Arc<Found>,
    ) -> Result<Arc<Entry>> {
        let remote = &sources.remotes[source];
        let _place = remote.place().await;
        let start = Instant::now();
        for _ in 0..ATTEMPTS {
            if found.bytes() > sources.limit {
                let what =
                    format!("its files have {} bytes together; --source-cache allows {}", found.bytes(), sources.limit);
                return Err(self.refuse(sources, source, name, &found, REFUSE, Error::too_large(what)));
            }
            let upload = Upload::new(self.store.incoming()?, self.options.max_upload);
            let outcome = remote.download(&found, upload.path(), self.options.max_upload).await;
            if let Err(Failure::Denied(e) | Failure::Trouble(e)) = outcome {
                self.metrics.source_errors.with_label_values(&[&**remote.url()]).inc();
                let e = sources.retry_later(e);
                return Err(self.refuse(sources, source, name, &found, sources.refresh, e));
            }
            let now = remote.probe(name).await.map_err(|failure| self.failed(sources, source, failure))?;
            let Some(now) = now.filter(|now| now.lack.is_none()).map(Arc::new) else {
                self.apply(sources, source, name, None);
                return Err(not_found(name));
            };
            if now.version != found.version {
                self.apply(sources, source, name, Some(now.clone()));
                found = now;
                continue;
            }
            let taken = match outcome {
                Ok(()) => self.take_in(name, source, &found, upload).await,
                Err(Failure::Refused(e)) => Err(e),
                Err(_) => continue,
            };
            self.metrics.adapter_load_seconds.with_label_values(&["remote"]).observe(start.elapsed().as_secs_f64());
            return taken.map_err(|e| self.refuse(sources, source, name, &found, REFUSE, e));
        }
        Err(sources.retry_later(Error::unavailable(format!(
            "its files in {} change while they are fetched; try again when they are complete",
            remote.url()
        ))))
    }

    /// Remembers that a version cannot be had for a while.
    fn refuse(
        &self,
        sources: &Sources,
        source: usize,
        name: &str,
        found: &Found,
        pause: Duration,
        error: Error,
    ) -> Error {
        let refusal = Refusal { version: found.version.clone(), until: Instant::now() + pause, error: error.clone() };
        let mut names = self.names_mut();
        if let Some(offer) = names.get_mut(name).and_then(|slot| slot.offer.as_mut()).filter(|o| o.source == source) {
            let before = offer.refused.replace(refusal);
            if before.is_none_or(|b| b.version != found.version || b.error.message != error.message) {
                let url = sources.remotes[source].url();
                let stays = if offer.entry.is_some() { "; the version before it stays" } else { "" };
                tracing::warn!("adapter {name:?} of the source {url} could not be fetched: {error}{stays}");
            }
        }
        error
    }

    /// Counts and notes a failure to look at a source.
    fn failed(&self, sources: &Sources, source: usize, failure: Failure) -> Error {
        let remote = &sources.remotes[source];
        self.metrics.source_errors.with_label_values(&[&**remote.url()]).inc();
        let error = match failure {
            // Of one name, where there is no list.
            Failure::Denied(e) if !remote.lists() => return sources.retry_later(e),
            Failure::Denied(e) | Failure::Trouble(e) | Failure::Refused(e) => e,
            Failure::Absent | Failure::Changed => {
                Error::unavailable(format!("the source {} changes while it is read", remote.url()))
            }
        };
        let error = sources.retry_later(error);
        let outage = Outage { at: Instant::now(), error: error.clone() };
        let before = sources.outages[source].lock().unwrap_or_else(PoisonError::into_inner).replace(outage);
        if before.is_none() {
            tracing::warn!("{error}");
        }
        error
    }

    /// Validates what was downloaded and lets `name` stand for it.
    async fn take_in(
        self: &Arc<Self>,
        name: &str,
        source: usize,
        found: &Arc<Found>,
        upload: Upload,
    ) -> Result<Arc<Entry>> {
        let room = self.room(upload.size()).await;
        let (inner, name, found) = (self.clone(), name.to_string(), found.clone());
        blocking(move || {
            let entry = inner.place(&name, source, found, upload);
            drop(room);
            entry
        })
        .await
    }

    fn place(&self, name: &str, source: usize, found: Arc<Found>, upload: Upload) -> Result<Arc<Entry>> {
        let Some(sources) = &self.sources else { return Err(not_found(name)) };
        let url = sources.remotes[source].url().clone();
        let (packed, summary) = self.validated(&upload)?;
        let generation = packed.generation.clone();
        let created = Some(found.modified()).filter(|time| *time > 0).unwrap_or_else(now);
        let origin = Origin {
            source: url.to_string(),
            name: name.into(),
            version: found.version.to_string(),
            generation: generation.to_string(),
            created,
        };
        fs::write(upload.path().join(ORIGIN), serde_json::to_vec(&origin).map_err(Error::internal)?)?;
        let path = upload.keep_in(&sources.folder)?;
        let copy = Copied {
            path: path.clone(),
            bytes: summary.bytes,
            version: found.version.clone(),
            used: sources.clock.fetch_add(1, Ordering::Relaxed).into(),
            obsolete: false.into(),
        };
        let (copy, source_name) = (Some(Arc::new(copy)), Source::Remote(url));
        let entry = Entry { generation: generation.clone(), source: source_name, path, summary, created, copy };
        let entry = Arc::new(entry);

        let _change = self.change();
        let slot = self.slot(name);
        let is_hidden = slot.stored.is_some() || slot.directory.is_some();
        let is_warm = |old: &Arc<Entry>| self.cache.presence(&old.generation).is_some();
        // Who asked for it waits for it, or somebody has it in memory; else others keep their room.
        if packed.is_placed()
            && !is_hidden
            && slot.offer.as_ref().and_then(|offer| offer.entry.as_ref()).is_none_or(is_warm)
        {
            let bytes = packed.bytes;
            self.cache.offer(&generation, packed, bytes);
        }
        let old = {
            let mut names = self.names_mut();
            let slot = names.entry(name.to_string()).or_default();
            if slot.offer.as_ref().is_some_and(|offer| offer.source < source) {
                drop(names);
                self.retire(entry);
                return Err(Error::unavailable("an earlier source has it by now; try again"));
            }
            let offer = Offer { source, found: Some(found), entry: Some(entry.clone()), refused: None };
            slot.offer.replace(offer).and_then(|old| old.entry)
        };
        self.evict_copies(sources);
        self.update_pins();
        old.into_iter().for_each(|old| self.retire(old));
        tracing::info!("adapter {name:?} was fetched: generation {generation}");
        Ok(entry)
    }

    /// Takes notice of what a look at a source found under a name.
    fn apply(self: &Arc<Self>, sources: &Sources, source: usize, name: &str, found: Option<Arc<Found>>) {
        if !is_news(&self.names(), source, name, found.as_deref()) {
            return;
        }
        let is_new_version = {
            let _change = self.change();
            let mut names = self.names_mut();
            // A look at another source may have made a change meanwhile.
            if !is_news(&names, source, name, found.as_deref()) {
                return;
            }
            let slot = names.entry(name.to_string()).or_default();
            let offer = slot.offer.take().unwrap_or(Offer { source, found: None, entry: None, refused: None });
            let whole = found.as_ref().filter(|found| found.lack.is_none());
            match whole {
                // Files of the next version are on their way.
                None if found.is_some() && offer.entry.is_some() => {
                    slot.offer = Some(offer);
                    false
                }
                None => {
                    if slot.is_empty() {
                        names.remove(name);
                    }
                    drop(names);
                    self.update_pins();
                    offer.entry.into_iter().for_each(|entry| self.retire(entry));
                    false
                }
                Some(found) => {
                    // Its writer may be half done until two looks in a row find the same.
                    let is_settled = offer.found.as_ref().is_some_and(|before| before.version == found.version);
                    let replaces = is_settled && offer.entry.is_some() && !offer.has(&found.version);
                    slot.offer = Some(Offer { source, found: Some(found.clone()), ..offer });
                    replaces
                }
            }
        };
        if is_new_version {
            // On its own; who asks meanwhile gets the version that is here.
            drop(self.fetch_once(sources, name));
        }
    }

    /// Looks at a source for what is new and what is gone.
    async fn refresh(self: &Arc<Self>, sources: &Sources, source: usize) {
        let remote = &sources.remotes[source];
        let offers = |keep: &dyn Fn(&Slot) -> bool| -> Vec<String> {
            let names = self.names();
            let of_it = |slot: &Slot| slot.offer.as_ref().is_some_and(|offer| offer.source == source);
            names.iter().filter(|(_, slot)| of_it(slot) && keep(slot)).map(|(name, _)| name.clone()).collect()
        };
        if remote.lists() {
            let found = match remote.list().await {
                Ok(found) => found,
                Err(failure) => return drop(self.failed(sources, source, failure)),
            };
            sources.has_answered(source);
            for name in offers(&|_| true).into_iter().filter(|name| !found.contains_key(name)) {
                self.apply(sources, source, &name, None);
            }
            for (name, found) in found {
                if self.may_be_named(sources, remote, &name, &found) {
                    self.apply(sources, source, &name, Some(Arc::new(found)));
                }
            }
            return;
        }
        let since = now().saturating_sub(ACTIVE);
        let active = offers(&|slot| slot.usage.last.load(Ordering::Relaxed) >= since);
        let looks = active.into_iter().map(async |name| {
            let found = remote.probe(&name).await;
            (name, found)
        });
        let mut looks = futures::stream::iter(looks).buffer_unordered(PROBES);
        while let Some((name, found)) = looks.next().await {
            match found {
                Ok(found) => {
                    sources.has_answered(source);
                    self.apply(sources, source, &name, found.map(Arc::new));
                }
                Err(failure) => drop(self.failed(sources, source, failure)),
            }
        }
    }

    fn may_be_named(&self, sources: &Sources, remote: &Remote, name: &str, found: &Found) -> bool {
        let wrong = match check_name(name) {
            Err(e) => e.message,
            Ok(()) if name == self.options.base => format!("{name:?} is the base model's id"),
            Ok(()) => return true,
        };
        let mut odd = sources.odd.lock().unwrap_or_else(PoisonError::into_inner);
        if found.lack.is_none() && odd.insert(name.to_string()) {
            tracing::warn!("an adapter of the source {} is left out: {wrong}", remote.url());
        }
        false
    }

    /// Lets names stand no more for a copy that turned out to be damaged; the next request fetches it again.
    pub(super) fn discard(&self, entry: &Entry) {
        if entry.copy.is_none() {
            return;
        }
        let _change = self.change();
        let damaged: Vec<Arc<Entry>> = {
            let mut names = self.names_mut();
            let offers = names.values_mut().filter_map(|slot| slot.offer.as_mut());
            offers.filter_map(|offer| offer.entry.take_if(|own| std::ptr::eq(&**own, entry))).collect()
        };
        self.update_pins();
        damaged.into_iter().for_each(|entry| self.retire(entry));
    }

    /// Lets the files of an entry that no name stands for go, and its numbers in memory.
    fn retire(&self, entry: Arc<Entry>) {
        if let Some(copy) = &entry.copy {
            copy.set_obsolete();
        }
        self.forget_unnamed(&entry.generation);
    }

    /// Makes copies take what they may, least recently used gone first. Called under `changes`.
    fn evict_copies(&self, sources: &Sources) {
        let mut evicted = vec![];
        {
            let mut names = self.names_mut();
            let mut total: u64 = names.values().filter_map(|slot| Some(slot.offer.as_ref()?.copy()?.bytes)).sum();
            while total > sources.limit {
                let free = names.values_mut().filter(|slot| !slot.pinned).filter_map(|slot| slot.offer.as_mut());
                let used = |offer: &Offer| offer.copy().map_or(0, |copy| copy.used.load(Ordering::Relaxed));
                let oldest = free.filter(|offer| offer.copy().is_some()).min_by_key(|offer| used(offer));
                let Some(entry) = oldest.and_then(|offer| offer.entry.take()) else { break };
                total -= entry.copy.as_ref().map_or(0, |copy| copy.bytes);
                evicted.push(entry);
            }
        }
        evicted.into_iter().for_each(|entry| self.retire(entry));
    }
}

/// Whether there is a change for [`Inner::apply`] to make, for which it keeps others from reading names.
fn is_news(names: &Names, source: usize, name: &str, found: Option<&Found>) -> bool {
    match (names.get(name).and_then(|slot| slot.offer.as_ref()), found) {
        (None, found) => found.is_some_and(|found| found.lack.is_none()),
        (Some(offer), _) if offer.source < source => false,
        (Some(offer), None) => offer.source == source,
        (Some(offer), Some(found)) if offer.source > source => found.lack.is_none(),
        (Some(offer), Some(found)) => {
            let is_known = offer.found.as_ref().is_some_and(|before| before.version == found.version);
            !is_known || (offer.entry.is_some() && !offer.has(&found.version))
        }
    }
}

async fn watch(inner: Weak<Inner>, source: usize) {
    loop {
        let Some(inner) = inner.upgrade() else { return };
        let Some(sources) = &inner.sources else { return };
        inner.refresh(sources, source).await;
        // Replicas that start together do not ask together for long.
        let pause = sources.refresh.mul_f64(0.9 + 0.2 * rand::random::<f64>());
        drop(inner);
        tokio::time::sleep(pause).await;
    }
}

/// The name and source of the copy in a folder, if it is whole and of one of the sources.
fn read_copy(path: &Path, options: &RegistryOptions, remotes: &[Remote]) -> Option<(String, usize, Arc<Entry>)> {
    let origin: Origin = serde_json::from_slice(&fs::read(path.join(ORIGIN)).ok()?).ok()?;
    let source = remotes.iter().position(|remote| **remote.url() == *origin.source)?;
    check_name(&origin.name).ok().filter(|()| origin.name != options.base)?;
    let summary = peft::survey(path, options.config(), &options.base).ok()?;
    let copy = Copied {
        path: path.into(),
        bytes: summary.bytes,
        version: origin.version.into(),
        used: 0.into(),
        obsolete: false.into(),
    };
    let entry = Entry {
        generation: Generation::new(origin.generation),
        source: Source::Remote(remotes[source].url().clone()),
        path: path.into(),
        summary,
        created: origin.created,
        copy: Some(Arc::new(copy)),
    };
    Some((origin.name, source, Arc::new(entry)))
}

fn remove(folder: &Path) {
    if let Err(e) = fs::remove_dir_all(folder) {
        tracing::warn!("{} could not be removed: {e}", folder.display());
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{World, upload};
    use super::super::{Condition, Registry};
    use super::*;
    use crate::adapter::files::{CONFIG, WEIGHTS};
    use crate::adapter::testing::{Bucket, Network, adapter, adapter_of_rank};
    use crate::adapter::{Blend, Merge, generation_of};
    use crate::lora::PackedAdapter;

    const HOUR: Duration = Duration::from_secs(3600);

    fn world(buckets: usize) -> World {
        World { buckets: (0..buckets).map(|_| Arc::default()).collect(), ..World::new() }
    }

    /// Waits for what the looks at the sources bring about.
    async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
        let start = Instant::now();
        while !is_so().await {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The store is free when the last look of the registry before has ended.
    async fn reopen(world: &World) -> Arc<Registry> {
        let mut registry = None;
        until("the store stays in use", async || {
            registry = world.open_with("tiny").ok();
            registry.is_some()
        })
        .await;
        registry.unwrap()
    }

    fn tier(registry: &Registry, name: &str) -> Option<Tier> {
        registry.get(name).ok().map(|info| info.tier)
    }

    fn generation(seed: usize) -> String {
        generation_of(adapter(seed).folder().path()).unwrap().to_string()
    }

    fn is(packed: &PackedAdapter, seed: usize) -> bool {
        packed.generation.as_str() == generation(seed)
    }

    fn copies(world: &World) -> usize {
        std::fs::read_dir(world.root.path().join("store/fetched")).unwrap().count()
    }

    fn fetches(world: &World) -> u64 {
        world.metrics.adapter_load_seconds.with_label_values(&["remote"]).get_sample_count()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn an_adapter_is_fetched_once_for_all_who_ask_first() {
        let mut world = world(1);
        world.source_refresh = HOUR;
        world.buckets[0].put("a", &adapter(1)).await;
        let registry = world.open();
        until("the source is not looked at", async || tier(&registry, "a").is_some()).await;
        let info = registry.get("a").unwrap();
        assert_eq!(
            (info.tier, &*info.generation, info.source),
            (Tier::Remote, "", Source::Remote("memory://source-0".into()))
        );
        assert_eq!(info.bytes, (adapter(1).weights().len() + adapter(1).config.to_string().len()) as u64);
        assert_eq!((world.gauge(&registry, "remote").0, world.gauge(&registry, "disk").0), (1, 0));
        assert_eq!(world.metrics.source_adapters.with_label_values(&["memory://source-0"]).get(), 1);
        let asked = (0..8).map(|_| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.acquire("a").await.unwrap() })
        });
        for packed in futures::future::join_all(asked).await {
            assert!(is(&packed.unwrap(), 1));
        }
        assert_eq!((fetches(&world), world.buckets[0].gets.load(Ordering::Relaxed), copies(&world)), (1, 2, 1));
        let info = registry.get("a").unwrap();
        assert_eq!((info.tier, info.generation, info.requests), (Tier::Device, generation(1), 8));
        assert_eq!((world.gauge(&registry, "remote").0, world.gauge(&registry, "disk").0), (0, 1));
        // From memory, and from the disk.
        assert_eq!(registry.unload("a").unwrap().tier, Tier::Disk);
        registry.acquire("a").await.unwrap();
        assert_eq!(fetches(&world), 1);
    }

    #[tokio::test]
    async fn a_name_that_is_new_is_looked_for_and_one_that_is_nowhere_not_again_and_again() {
        let mut world = world(1);
        world.source_refresh = HOUR;
        let (bucket, registry) = (world.buckets[0].clone(), world.open());
        until("the source is not looked at", async || bucket.lists.load(Ordering::Relaxed) > 0).await;
        bucket.put("a", &adapter(1)).await;
        assert!(is(&registry.acquire("a").await.unwrap(), 1));
        let lists = bucket.lists.load(Ordering::Relaxed);
        for name in ["b", "b", "b", "../a", "a/b", "", "tiny"] {
            assert_eq!(registry.acquire(name).await.unwrap_err().kind, ErrorKind::NotFound, "{name:?}");
        }
        assert_eq!(bucket.lists.load(Ordering::Relaxed), lists + 1);
        bucket.put_file("half", CONFIG, b"{}".to_vec()).await;
        let error = registry.acquire("half").await.unwrap_err();
        assert!(error.kind == ErrorKind::NotFound && error.message.contains(WEIGHTS), "{error}");
        for i in 0..2 * MAX_MISSES {
            assert_eq!(registry.acquire(&format!("x{i}")).await.unwrap_err().kind, ErrorKind::NotFound);
        }
        assert!(bucket.lists.load(Ordering::Relaxed) <= lists + MAX_MISSES);
    }

    #[tokio::test]
    async fn another_version_takes_the_place_and_requests_in_flight_keep_theirs() {
        let world = world(1);
        let (bucket, registry) = (&world.buckets[0], world.open());
        bucket.put("a", &adapter(1)).await;
        let held = registry.acquire("a").await.unwrap();
        bucket.put("a", &adapter(2)).await;
        until("the next version does not come", async || is(&registry.acquire("a").await.unwrap(), 2)).await;
        assert!(is(&held, 1));
        until("the files of the first version stay", async || copies(&world) == 1).await;
        bucket.remove("a").await;
        until("the name stays", async || registry.acquire("a").await.is_err()).await;
        assert_eq!(registry.acquire("a").await.unwrap_err().kind, ErrorKind::NotFound);
        until("the files stay", async || copies(&world) == 0).await;
        assert_eq!(tier(&registry, "a"), None);
    }

    #[tokio::test]
    async fn a_version_that_cannot_be_served_leaves_the_one_before() {
        let world = world(1);
        let (bucket, registry) = (&world.buckets[0], world.open());
        bucket.put("a", &adapter(1)).await;
        registry.acquire("a").await.unwrap();
        // Of another rank, as when only one of two files is there.
        bucket.put_file("a", CONFIG, adapter_of_rank(2, 3).config.to_string().into_bytes()).await;
        let gets = bucket.gets.load(Ordering::Relaxed);
        until("the next version is not tried", async || bucket.gets.load(Ordering::Relaxed) >= gets + 2).await;
        let lists = bucket.lists.load(Ordering::Relaxed);
        until("no more looks", async || bucket.lists.load(Ordering::Relaxed) > lists + 5).await;
        assert!(is(&registry.acquire("a").await.unwrap(), 1));
        // It is not tried again as long as it is the same.
        assert_eq!(bucket.gets.load(Ordering::Relaxed), gets + 2);
        bucket.put_file("a", WEIGHTS, adapter_of_rank(2, 3).weights()).await;
        until("the whole does not come", async || registry.get("a").unwrap().rank == 3).await;
        // One that was never good is told.
        bucket.put("b", &adapter(1)).await;
        bucket.put_file("b", CONFIG, adapter_of_rank(2, 3).config.to_string().into_bytes()).await;
        let error = registry.acquire("b").await.unwrap_err();
        assert!(error.kind == ErrorKind::Unprocessable && error.message.contains("\"b\""), "{error}");
    }

    #[tokio::test]
    async fn files_that_change_under_a_fetch_are_fetched_again() {
        let mut world = world(1);
        world.source_refresh = HOUR;
        let (bucket, registry) = (&world.buckets[0], world.open());
        bucket.put("a", &adapter(1)).await;
        // The configuration that goes with rank 3 comes while weights of rank 2 are read, and then its weights.
        let next = adapter_of_rank(2, 3);
        bucket.change_under_fetch("a", CONFIG, next.config.to_string().into_bytes());
        bucket.change_under_fetch("a", WEIGHTS, next.weights());
        registry.acquire("a").await.unwrap();
        assert_eq!(registry.get("a").unwrap().rank, 3);
        bucket.put("b", &adapter(1)).await;
        for seed in 0..ATTEMPTS {
            bucket.change_under_fetch("b", WEIGHTS, adapter(10 + seed).weights());
        }
        let error = registry.acquire("b").await.unwrap_err();
        assert!(error.kind == ErrorKind::Unavailable && error.message.contains("change while"), "{error}");
        bucket.set(Network::Cut);
        let error = registry.acquire("b").await.unwrap_err();
        assert!(error.kind == ErrorKind::Unavailable && error.retry_after.is_some(), "{error}");
        bucket.set(Network::Well);
        registry.acquire("b").await.unwrap();
        assert_eq!(std::fs::read_dir(world.root.path().join("store/incoming")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_source_that_fails_stops_only_what_it_alone_has() {
        for network in [Network::Down, Network::Silent] {
            let world = world(2);
            let (ill, well) = (world.buckets[0].clone(), world.buckets[1].clone());
            ill.put("cold", &adapter(1)).await;
            ill.put("here", &adapter(2)).await;
            well.put("other", &adapter(3)).await;
            well.put("late", &adapter(4)).await;
            let registry = world.open();
            until("the sources are not looked at", async || registry.list().len() == 4).await;
            registry.acquire("here").await.unwrap();
            ill.set(network);
            let errors = world.metrics.source_errors.with_label_values(&["memory://source-0"]);
            until("the failure is not noticed", async || errors.get() > 0).await;
            // What it is not needed for.
            for name in ["here", "other", "late"] {
                registry.acquire(name).await.unwrap();
            }
            assert_eq!(world.metrics.source_errors.with_label_values(&["memory://source-1"]).get(), 0);
            let (gets, start) = (ill.gets.load(Ordering::Relaxed), Instant::now());
            for name in ["cold", "unknown"] {
                let error = registry.acquire(name).await.unwrap_err();
                assert!(error.kind == ErrorKind::Unavailable && error.retry_after.is_some(), "{name}: {error}");
                assert!(error.message.contains("memory://source-0") && !error.message.contains("secret"), "{error}");
            }
            assert_eq!(ill.gets.load(Ordering::Relaxed), gets, "{:?}", start.elapsed());
            assert_eq!(registry.list().len(), 4);
            ill.set(Network::Well);
            until("it does not come back", async || registry.acquire("cold").await.is_ok()).await;
            assert_eq!(registry.acquire("unknown").await.unwrap_err().kind, ErrorKind::NotFound);
        }
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_is_told_and_does_not_fail_the_source() {
        let world = world(1);
        let (bucket, registry) = (&world.buckets[0], world.open());
        bucket.put("a", &adapter(1)).await;
        registry.acquire("a").await.unwrap();
        bucket.put("b", &adapter(2)).await;
        bucket.set(Network::Private);
        let error = registry.acquire("b").await.unwrap_err();
        assert!(error.kind == ErrorKind::Unavailable && error.message.contains("403"), "{error}");
        assert!(registry.inner.sources.as_ref().unwrap().check(0).is_ok());
    }

    #[tokio::test]
    async fn copies_that_were_used_least_recently_go_first() {
        let mut world = world(1);
        let bytes = (adapter(1).weights().len() + adapter(1).config.to_string().len()) as u64;
        (world.source_cache, world.source_refresh) = (bytes * 2 + bytes / 2, HOUR);
        let (bucket, registry) = (world.buckets[0].clone(), world.open());
        for i in 0..4 {
            bucket.put(&format!("a{i}"), &adapter(i)).await;
        }
        let stays = async |name: &str| {
            registry.acquire(name).await.unwrap();
            (0..4).filter(|i| tier(&registry, &format!("a{i}")).is_some_and(|t| t != Tier::Remote)).collect::<Vec<_>>()
        };
        assert_eq!(stays("a0").await, [0]);
        assert_eq!(stays("a1").await, [0, 1]);
        assert_eq!(stays("a0").await, [0, 1]);
        assert_eq!(stays("a2").await, [0, 2]);
        registry.pin("a2").await.unwrap();
        stays("a0").await;
        assert_eq!(stays("a3").await, [2, 3]);
        assert_eq!(stays("a1").await, [1, 2]);
        assert_eq!((copies(&world), fetches(&world)), (2, 5));
        bucket.put("large", &adapter_of_rank(1, 64)).await;
        let error = registry.acquire("large").await.unwrap_err();
        assert!(error.kind == ErrorKind::TooLarge && error.message.contains("--source-cache"), "{error}");
    }

    #[tokio::test]
    async fn copies_outlive_a_restart_and_serve_without_the_source() {
        let mut world = world(2);
        world.buckets[0].put("a", &adapter(1)).await;
        world.buckets[1].put("b", &adapter(2)).await;
        let registry = world.open();
        registry.acquire("a").await.unwrap();
        registry.acquire("b").await.unwrap();
        drop(registry);
        world.buckets[0].set(Network::Down);
        // Not a source any more.
        world.buckets.pop();
        let stray = world.root.path().join("store/fetched/stray");
        std::fs::create_dir(&stray).unwrap();
        let registry = reopen(&world).await;
        assert_eq!((registry.get("a").unwrap().generation, tier(&registry, "b")), (generation(1), None));
        registry.acquire("a").await.unwrap();
        assert!((copies(&world), stray.exists()) == (1, false));
        world.buckets[0].set(Network::Well);
        until("it is not looked at", async || registry.inner.slot("a").offer.unwrap().found.is_some()).await;
        registry.acquire("a").await.unwrap();
        assert_eq!(fetches(&world), 2);
    }

    #[tokio::test]
    async fn a_damaged_copy_is_fetched_again() {
        let world = world(1);
        let (bucket, registry) = (&world.buckets[0], world.open());
        bucket.put("a", &adapter(1)).await;
        registry.acquire("a").await.unwrap();
        for damage in [adapter(2).weights(), vec![]] {
            registry.unload("a").unwrap();
            let copy = registry.inner.entry("a").unwrap().unwrap().path.clone();
            std::fs::write(copy.join(WEIGHTS), damage).unwrap();
            assert!(is(&registry.acquire("a").await.unwrap(), 1));
        }
        assert_eq!(fetches(&world), 3);
    }

    #[tokio::test]
    async fn uploads_and_folders_go_before_sources_and_earlier_sources_before_later_ones() {
        let world = world(2);
        let names = ["upload", "folder", "both", "second"];
        for name in names {
            world.buckets[1].put(name, &adapter(1)).await;
        }
        world.buckets[0].put("both", &adapter(2)).await;
        world.folder("folder", &adapter(3));
        let registry = world.open();
        until("the sources are not looked at", async || registry.list().len() == names.len()).await;
        until("the first source does not win", async || {
            registry.get("both").unwrap().source == Source::Remote("memory://source-0".into())
        })
        .await;
        for condition in [Condition::Absent, Condition::Is(Generation::new("0"))] {
            let error = registry.publish("upload", upload(&registry, &adapter(4)), condition).await.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Conflict);
        }
        registry.publish("upload", upload(&registry, &adapter(4)), Condition::Always).await.unwrap();
        for (name, seed) in names.into_iter().zip([4, 3, 2, 1]) {
            assert!(is(&registry.acquire(name).await.unwrap(), seed), "{name}");
        }
        registry.remove("upload", Condition::Always).await.unwrap();
        assert!(is(&registry.acquire("upload").await.unwrap(), 1));
        for name in ["upload", "second"] {
            let error = registry.remove(name, Condition::Always).await.unwrap_err();
            assert!(error.kind == ErrorKind::Conflict && error.message.contains("memory://source-1"), "{error}");
        }
        // A name that the first source has no more is the second one's again, and the other way round.
        world.buckets[0].remove("both").await;
        until("the second source does not follow", async || {
            registry.acquire("both").await.is_ok_and(|packed| is(&packed, 1))
        })
        .await;
        world.buckets[0].put("second", &adapter(2)).await;
        until("the first source does not follow", async || is(&registry.acquire("second").await.unwrap(), 2)).await;
    }

    #[tokio::test]
    async fn a_web_server_is_asked_by_name_and_again_for_what_is_used() {
        let mut world = world(0);
        world.web.push(Arc::<Bucket>::default());
        let (server, registry) = (world.web[0].clone(), world.open());
        server.put("a", &adapter(1)).await;
        assert!(registry.list().is_empty());
        assert!(is(&registry.acquire("a").await.unwrap(), 1));
        assert_eq!(registry.acquire("b").await.unwrap_err().kind, ErrorKind::NotFound);
        server.put("a", &adapter(2)).await;
        until("the next version does not come", async || is(&registry.acquire("a").await.unwrap(), 2)).await;
        server.set(Network::Down);
        registry.acquire("a").await.unwrap();
        until("the failure is not told", async || {
            registry.acquire("c").await.is_err_and(|e| e.kind == ErrorKind::Unavailable)
        })
        .await;
        server.set(Network::Well);
        server.remove("a").await;
        until("the name stays", async || registry.get("a").is_err()).await;
        assert_eq!(server.lists.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_blend_of_what_is_elsewhere_is_fetched_and_follows_it() {
        let world = world(1);
        let (bucket, registry) = (&world.buckets[0], world.open());
        bucket.put("a", &adapter(1)).await;
        bucket.put("b", &adapter(2)).await;
        let blend = Blend::new(vec![("a".into(), 0.5), ("b".into(), 0.5)], Merge::Sum).unwrap();
        let first = registry.acquire_blend(&blend).await.unwrap();
        assert_eq!(fetches(&world), 2);
        bucket.put("b", &adapter(3)).await;
        until("the blend does not follow", async || {
            registry.acquire_blend(&blend).await.unwrap().generation != first.generation
        })
        .await;
    }
}
