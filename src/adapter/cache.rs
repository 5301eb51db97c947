//! The top memory tier: values by generation, loaded once however many wait, evicted least recently used first.
//!
//! What somebody holds the `Arc` of is never evicted, nor what [`Cache::pin`] names. A load asks for room first
//! ([`Flight::reserve`]); what was loaded without it may exceed the limit, and the excess goes at the first chance after it is
//! released. No method waits for anything but a short lock, and values are freed outside of it.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use tokio::sync::oneshot;

use crate::adapter::Generation;
use crate::{Error, Result};

pub(super) struct Cache<T> {
    limit: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    ready: HashMap<Generation, Ready<T>>,
    /// Values that are not wanted any more, as long as somebody holds them.
    leaving: HashMap<Generation, (Weak<T>, usize)>,
    /// Loads under way, and to whom their outcomes go.
    loading: HashMap<Origin, Vec<oneshot::Sender<Outcome<T>>>>,
    /// Generations that stay though nobody holds them, whether they are in memory yet or not.
    pinned: HashSet<Generation>,
    /// Bytes of all values, ready and leaving.
    used: usize,
    /// Bytes that loads under way have room for.
    reserved: usize,
    /// Counts uses; the larger a value's, the more recent.
    clock: u64,
}

struct Ready<T> {
    value: Arc<T>,
    bytes: usize,
    used_at: u64,
}

/// What is loaded and the folder it is read from. One content may lie in two folders, and fail to load from one alone.
type Origin = (Generation, PathBuf);

type Outcome<T> = Result<Arc<T>>;

/// Waits for a load. Every waiter has a channel of its own: one for all would hold the value, and so pin it, for a
/// moment longer than anybody wants it.
pub(super) struct Waiter<T>(oneshot::Receiver<Outcome<T>>);

/// A value that is in memory.
pub(super) struct Presence {
    /// How many hold it beside the cache.
    pub holders: usize,
    pub bytes: usize,
}

/// What a look-up found.
pub(super) enum Lookup<T> {
    Ready(Arc<T>),
    Wait(Waiter<T>),
    /// Nobody loads it: the caller has to, and may wait for it like others.
    Load(Flight<T>, Waiter<T>),
}

/// The duty to load a generation. Dropped without [`Flight::settle`], it tells the waiters that the load failed.
pub(super) struct Flight<T> {
    cache: Arc<Cache<T>>,
    origin: Origin,
    reserved: usize,
    settled: bool,
}

/// A load that is done and not yet announced.
#[must_use]
pub(super) struct Settled<T> {
    waiters: Vec<oneshot::Sender<Outcome<T>>>,
    outcome: Outcome<T>,
}

impl<T> Cache<T> {
    pub fn new(limit: usize) -> Arc<Self> {
        let state = State {
            ready: HashMap::new(),
            leaving: HashMap::new(),
            loading: HashMap::new(),
            pinned: HashSet::new(),
            used: 0,
            reserved: 0,
            clock: 0,
        };
        Arc::new(Cache { limit, state: Mutex::new(state) })
    }

    /// The value of `generation`, or the load of it from the folder `from`.
    pub fn get(self: &Arc<Self>, generation: &Generation, from: &Path) -> Lookup<T> {
        let mut state = self.state();
        let found = match state.find(generation) {
            Some(value) => Lookup::Ready(value),
            None => {
                let origin = (generation.clone(), from.to_path_buf());
                let (sender, receiver) = oneshot::channel();
                let waiter = Waiter(receiver);
                match state.loading.get_mut(&origin) {
                    Some(waiters) => {
                        waiters.push(sender);
                        Lookup::Wait(waiter)
                    }
                    None => {
                        state.loading.insert(origin.clone(), vec![sender]);
                        Lookup::Load(Flight { cache: self.clone(), origin, reserved: 0, settled: false }, waiter)
                    }
                }
            }
        };
        // What was in use when the limit was exceeded may be free by now.
        let evicted = state.evict_to(self.limit);
        drop(state);
        drop(evicted);
        found
    }

    /// Takes a value that is ready, if it fits beside what is held or pinned. Returns whether the generation is ready now.
    pub fn offer(&self, generation: &Generation, value: Arc<T>, bytes: usize) -> bool {
        let mut state = self.state();
        if state.find(generation).is_some() {
            return true;
        }
        if bytes > self.limit {
            return false;
        }
        let evicted = state.evict_to(self.limit - bytes);
        let fits = state.used + state.reserved <= self.limit - bytes;
        if fits {
            state.insert(generation.clone(), value, bytes);
        }
        drop(state);
        drop(evicted);
        fits
    }

    /// Evicts the value that was used least recently of those that may go. Whether there was one.
    pub fn evict_oldest(&self) -> bool {
        let mut state = self.state();
        let evicted = state.take_oldest();
        drop(state);
        evicted.is_some()
    }

    /// Drops a value from the tier; whoever holds it keeps it. A load under way goes on.
    pub fn forget(&self, generation: &Generation) {
        let mut state = self.state();
        let Some(Ready { value, bytes, .. }) = state.ready.remove(generation) else { return };
        state.leaving.insert(generation.clone(), (Arc::downgrade(&value), bytes));
        drop(state);
        drop(value);
    }

    /// Pins these generations, and none of those that were pinned before.
    pub fn pin(&self, generations: HashSet<Generation>) {
        self.state().pinned = generations;
    }

    /// `None` if the value is not in memory.
    pub fn presence(&self, generation: &Generation) -> Option<Presence> {
        let state = self.state();
        let ready = state.ready.get(generation).map(|r| (Arc::strong_count(&r.value) - 1, r.bytes));
        let leaving = || state.leaving.get(generation).map(|(v, bytes)| (v.strong_count(), *bytes)).filter(|v| v.0 > 0);
        ready.or_else(leaving).map(|(holders, bytes)| Presence { holders, bytes })
    }

    /// Bytes that values may take.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Number and bytes of the values in memory.
    pub fn totals(&self) -> (usize, usize) {
        let mut state = self.state();
        state.bury();
        (state.ready.len() + state.leaving.len(), state.used)
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<T> State<T> {
    /// A value in memory, which is wanted again if it was leaving.
    fn find(&mut self, generation: &Generation) -> Option<Arc<T>> {
        self.clock += 1;
        if let Some((value, bytes)) = self.leaving.remove(generation) {
            self.used -= bytes;
            if let Some(value) = value.upgrade() {
                self.insert(generation.clone(), value, bytes);
            }
        }
        let ready = self.ready.get_mut(generation)?;
        ready.used_at = self.clock;
        Some(ready.value.clone())
    }

    fn insert(&mut self, generation: Generation, value: Arc<T>, bytes: usize) {
        self.clock += 1;
        self.used += bytes;
        self.ready.insert(generation, Ready { value, bytes, used_at: self.clock });
    }

    /// Strikes off what nobody holds any more of the leaving.
    fn bury(&mut self) {
        let used = &mut self.used;
        self.leaving.retain(|_, (value, bytes)| {
            let held = value.strong_count() > 0;
            *used -= if held { 0 } else { *bytes };
            held
        });
    }

    /// Whether the value is pinned or held. One strong count is the cache's own.
    fn stays(&self, generation: &Generation, ready: &Ready<T>) -> bool {
        Arc::strong_count(&ready.value) > 1 || self.pinned.contains(generation)
    }

    /// Makes the values and what is reserved take at most `limit`, as far as values are free. Returns what is evicted, to be
    /// dropped without the lock.
    fn evict_to(&mut self, limit: usize) -> Vec<Arc<T>> {
        self.bury();
        let mut evicted = vec![];
        while self.used + self.reserved > limit {
            let Some(value) = self.take_oldest() else { break };
            evicted.push(value);
        }
        evicted
    }

    /// Takes out the value that was used least recently of those that may go, to be dropped without the lock.
    fn take_oldest(&mut self) -> Option<Arc<T>> {
        // Counts cannot grow meanwhile: clones are made under the lock.
        let free = self.ready.iter().filter(|(generation, ready)| !self.stays(generation, ready));
        let oldest = free.min_by_key(|(_, ready)| ready.used_at).map(|(generation, _)| generation.clone());
        let ready = self.ready.remove(&oldest?)?;
        self.used -= ready.bytes;
        Some(ready.value)
    }
}

impl<T> Flight<T> {
    /// Makes room for a value of about this many bytes, unless what is held, pinned or reserved by other loads leaves too
    /// little. One that is larger than there is room at all gets it when nothing else is in use.
    pub fn reserve(&mut self, bytes: usize) -> bool {
        let mut state = self.cache.state();
        state.bury();
        let stay = state.ready.iter().filter(|(generation, ready)| state.stays(generation, ready));
        let stay: usize = stay.map(|(_, ready)| ready.bytes).sum();
        let leaving: usize = state.leaving.values().map(|(_, bytes)| bytes).sum();
        let taken = stay + leaving + state.reserved;
        if taken > 0 && taken.saturating_add(bytes) > self.cache.limit {
            return false;
        }
        state.reserved += bytes;
        self.reserved += bytes;
        let evicted = state.evict_to(self.cache.limit);
        drop(state);
        drop(evicted);
        true
    }

    /// Whether waiting could make room for so many bytes: not where what is pinned leaves less.
    pub fn may_fit(&self, bytes: usize) -> bool {
        let state = self.cache.state();
        let pinned = state.ready.iter().filter(|(generation, _)| state.pinned.contains(*generation));
        let pinned: usize = pinned.map(|(_, ready)| ready.bytes).sum();
        pinned == 0 || pinned.saturating_add(bytes) <= self.cache.limit
    }

    /// Ends the load: keeps the value under `generation` (which may differ from the one asked for, if the files
    /// changed) if `keep` says so. `keep` is asked under the lock. The waiters hear of it by [`Settled::announce`].
    pub fn settle(
        mut self,
        outcome: Result<(Generation, Arc<T>, usize)>,
        keep: impl FnOnce(&Generation) -> bool,
    ) -> Settled<T> {
        let mut state = self.cache.state();
        state.reserved -= std::mem::take(&mut self.reserved);
        let waiters = state.loading.remove(&self.origin).unwrap_or_default();
        let outcome = outcome.map(|(generation, value, bytes)| match state.find(&generation) {
            // It came from elsewhere meanwhile; one copy is enough. This one is dropped without the lock.
            Some(there) => (there, Some(value)),
            None if keep(&generation) => {
                state.insert(generation, value.clone(), bytes);
                (value, None)
            }
            None => {
                state.used += bytes;
                state.leaving.insert(generation, (Arc::downgrade(&value), bytes));
                (value, None)
            }
        });
        let evicted = state.evict_to(self.cache.limit);
        drop(state);
        drop(evicted);
        self.settled = true;
        Settled { waiters, outcome: outcome.map(|(value, _)| value) }
    }
}

impl<T> Settled<T> {
    /// Wakes the waiters. There may be none left.
    pub fn announce(mut self) {
        let last = self.waiters.pop();
        for waiter in self.waiters {
            let _ = waiter.send(self.outcome.clone());
        }
        // The last one gets it by move, so that nothing is held here when that one goes on.
        if let Some(waiter) = last {
            let _ = waiter.send(self.outcome);
        }
    }
}

impl<T> Drop for Flight<T> {
    fn drop(&mut self) {
        if !self.settled {
            let mut state = self.cache.state();
            state.reserved -= self.reserved;
            state.loading.remove(&self.origin);
        }
    }
}

impl<T> Waiter<T> {
    pub async fn wait(self) -> Result<Arc<T>> {
        self.0.await.unwrap_or_else(|_| Err(Error::internal("the adapter's load was given up")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn generation(i: usize) -> Generation {
        Generation::new(format!("{i:064x}"))
    }

    fn look_up(cache: &Arc<Cache<usize>>, i: usize) -> Lookup<usize> {
        cache.get(&generation(i), Path::new("folder"))
    }

    fn put(cache: &Arc<Cache<usize>>, i: usize, bytes: usize) -> Arc<usize> {
        match look_up(cache, i) {
            Lookup::Ready(value) => value,
            Lookup::Wait(_) => panic!("nobody loads {i}"),
            Lookup::Load(flight, _) => {
                let settled = flight.settle(Ok((generation(i), Arc::new(i), bytes)), |_| true);
                settled.outcome.unwrap()
            }
        }
    }

    fn has(cache: &Cache<usize>, i: usize) -> bool {
        cache.presence(&generation(i)).is_some()
    }

    fn holders(cache: &Cache<usize>, i: usize) -> Option<usize> {
        cache.presence(&generation(i)).map(|p| p.holders)
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let cache = Cache::new(30);
        for i in [1, 2, 3, 1, 4] {
            put(&cache, i, 10);
        }
        assert_eq!([1, 2, 3, 4].map(|i| has(&cache, i)), [true, false, true, true]);
        assert_eq!(cache.totals(), (3, 30));
    }

    #[test]
    fn what_is_held_stays_and_may_exceed_the_limit() {
        let cache = Cache::new(20);
        let held: Vec<_> = (0..4).map(|i| put(&cache, i, 10)).collect();
        assert_eq!(cache.totals(), (4, 40));
        assert_eq!(holders(&cache, 0), Some(1));
        drop(held);
        put(&cache, 3, 10);
        assert_eq!(cache.totals(), (2, 20));
        assert!(has(&cache, 3) && has(&cache, 2));
    }

    #[test]
    fn the_oldest_goes_when_it_may() {
        let cache = Cache::new(40);
        let held = put(&cache, 1, 10);
        cache.pin([generation(2)].into());
        for i in [2, 3, 4] {
            put(&cache, i, 10);
        }
        assert!(cache.evict_oldest() && !has(&cache, 3) && has(&cache, 4));
        assert!(cache.evict_oldest() && !cache.evict_oldest());
        assert_eq!(cache.totals(), (2, 20));
        drop(held);
        assert!(cache.evict_oldest() && !has(&cache, 1) && has(&cache, 2));
    }

    #[test]
    fn what_is_pinned_stays_and_leaves_less_room() {
        let cache = Cache::new(20);
        // Before it is there, as after a replacement that did not fit.
        cache.pin([generation(1)].into());
        for i in [1, 2, 3] {
            put(&cache, i, 10);
        }
        assert_eq!([1, 2, 3].map(|i| has(&cache, i)), [true, false, true]);
        assert!(!cache.offer(&generation(4), Arc::new(4), 11));
        let Lookup::Load(mut flight, _) = look_up(&cache, 5) else { panic!("nobody loads it") };
        assert!(!flight.reserve(11));
        assert!(flight.may_fit(10) && !flight.may_fit(11));
        cache.pin(HashSet::new());
        assert!(flight.may_fit(11));
        assert!(flight.reserve(11));
        assert_eq!(cache.totals(), (0, 0));
    }

    #[test]
    fn an_offer_is_taken_only_where_it_fits() {
        let cache = Cache::new(20);
        let held = put(&cache, 1, 15);
        assert!(!cache.offer(&generation(2), Arc::new(2), 10));
        assert!(!cache.offer(&generation(3), Arc::new(3), 21));
        assert!(has(&cache, 1));
        drop(held);
        assert!(cache.offer(&generation(2), Arc::new(2), 10));
        assert_eq!(cache.totals(), (1, 10));
    }

    #[test]
    fn forgetting_leaves_the_holders_their_value() {
        let cache = Cache::new(20);
        let held = put(&cache, 1, 10);
        cache.forget(&generation(1));
        // It is in memory as long as it is held, and leaves no room for others.
        assert_eq!((cache.totals(), *held, holders(&cache, 1)), ((1, 10), 1, Some(1)));
        assert!(!cache.offer(&generation(2), Arc::new(2), 11));
        drop(held);
        assert_eq!((cache.totals(), holders(&cache, 1)), ((0, 0), None));
        assert!(cache.offer(&generation(2), Arc::new(2), 11));
    }

    #[test]
    fn what_is_wanted_again_while_it_is_held_is_not_loaded_again() {
        let cache = Cache::new(20);
        let held = put(&cache, 1, 10);
        for again in [false, true] {
            cache.forget(&generation(1));
            if again {
                assert!(cache.offer(&generation(1), Arc::new(7), 10));
            }
            assert!(matches!(look_up(&cache, 1), Lookup::Ready(value) if Arc::ptr_eq(&value, &held)));
            assert_eq!(cache.totals(), (1, 10));
        }
        drop(held);
        assert_eq!(cache.totals(), (1, 10));
    }

    #[test]
    fn a_load_is_shared_only_among_those_who_want_it_from_the_same_folder() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let cache: Arc<Cache<usize>> = Cache::new(20);
            let load = |folder: &str| match cache.get(&generation(1), Path::new(folder)) {
                Lookup::Load(flight, waiter) => (flight, waiter),
                _ => panic!("{folder} waits for another folder"),
            };
            let ((broken, one), (good, two), (late, three)) = (load("a"), load("b"), load("c"));
            broken.settle(Err(Error::unprocessable("broken")), |_| true).announce();
            good.settle(Ok((generation(1), Arc::new(7), 10)), |_| true).announce();
            late.settle(Ok((generation(1), Arc::new(7), 10)), |_| true).announce();
            one.wait().await.unwrap_err();
            // Whoever comes second takes what is there.
            assert!(Arc::ptr_eq(&two.wait().await.unwrap(), &three.wait().await.unwrap()));
            assert_eq!(cache.totals(), (1, 10));
        });
    }

    #[test]
    fn one_load_serves_all_who_wait() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let cache: Arc<Cache<usize>> = Cache::new(20);
            let Lookup::Load(flight, _) = look_up(&cache, 1) else { panic!() };
            let waiters: Vec<_> = (0..3)
                .map(|_| match look_up(&cache, 1) {
                    Lookup::Wait(waiter) => tokio::spawn(waiter.wait()),
                    _ => panic!(),
                })
                .collect();
            flight.settle(Ok((generation(1), Arc::new(7), 10)), |_| true).announce();
            let Lookup::Ready(value) = look_up(&cache, 1) else { panic!() };
            for waiter in waiters {
                assert!(Arc::ptr_eq(&waiter.await.unwrap().unwrap(), &value));
            }
        });
    }

    #[test]
    fn a_failed_or_abandoned_load_is_told_and_can_be_tried_again() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let cache: Arc<Cache<usize>> = Cache::new(20);
            let Lookup::Load(flight, _) = look_up(&cache, 1) else { panic!() };
            let Lookup::Wait(waiter) = look_up(&cache, 1) else { panic!() };
            flight.settle(Err(Error::unprocessable("broken")), |_| true).announce();
            assert_eq!(waiter.wait().await.unwrap_err().message, "broken");
            let Lookup::Load(flight, _) = look_up(&cache, 1) else { panic!() };
            let Lookup::Wait(waiter) = look_up(&cache, 1) else { panic!() };
            drop(flight);
            waiter.wait().await.unwrap_err();
            assert!(matches!(look_up(&cache, 1), Lookup::Load(..)));
        });
    }

    #[test]
    fn a_load_has_room_only_beside_what_is_held_and_other_loads() {
        let cache = Cache::new(30);
        let flight = |i: usize| match look_up(&cache, i) {
            Lookup::Load(flight, _) => flight,
            _ => panic!("nobody loads {i}"),
        };
        let held = put(&cache, 1, 10);
        put(&cache, 2, 10);
        let (mut third, mut fourth) = (flight(3), flight(4));
        assert!(third.reserve(15));
        // What nobody held has made room for it.
        assert_eq!([1, 2].map(|i| has(&cache, i)), [true, false]);
        assert!(!fourth.reserve(10));
        assert!(!cache.offer(&generation(5), Arc::new(5), 6));
        // A load that ends gives its room back, and takes what its value needs.
        drop(third.settle(Ok((generation(3), Arc::new(3), 20)), |_| true));
        assert_eq!(cache.totals(), (2, 30));
        assert!(fourth.reserve(10));
        assert_eq!([1, 3].map(|i| has(&cache, i)), [true, false]);
        drop(fourth);
        // One that is larger than all has to wait until nothing else is in use.
        let mut large = flight(6);
        assert!(!large.reserve(31));
        drop(held);
        assert!(large.reserve(31));
        assert_eq!(cache.totals(), (0, 0));
    }

    proptest! {
        /// Any order of uses, releases, offers and removals keeps the books: bytes add up, held values stay what they
        /// were and are in memory only once, and the limit is only exceeded by what is held.
        #[test]
        fn the_books_balance(steps in proptest::collection::vec((0usize..4, 0usize..8), 1..80)) {
            let size = |i: usize| 5 + 3 * i;
            let cache = Cache::new(40);
            let mut held: Vec<Arc<usize>> = vec![];
            for (action, i) in steps {
                match action {
                    0 => held.push(put(&cache, i, size(i))),
                    1 => { put(&cache, i, size(i)); }
                    2 => { cache.offer(&generation(i), Arc::new(i), size(i)); }
                    _ if i % 2 == 0 => cache.forget(&generation(i)),
                    _ => { held.pop(); }
                }
                let ready: Vec<usize> = (0..8).filter(|&i| has(&cache, i)).collect();
                prop_assert_eq!(cache.totals(), (ready.len(), ready.iter().map(|&i| size(i)).sum::<usize>()));
                for value in &held {
                    prop_assert!(held.iter().all(|other| other != value || Arc::ptr_eq(other, value)));
                }
                // A look-up evicts whatever the limit demands.
                drop(look_up(&cache, 99));
                let held: usize = (0..8).filter(|&i| holders(&cache, i).is_some_and(|n| n > 0)).map(size).sum();
                let (_, used) = cache.totals();
                prop_assert!(used <= 40.max(held), "{} used, {} held", used, held);
            }
        }
    }
}
