//! The top memory tier: values by generation, loaded once however many wait, evicted least recently used first.
//!
//! Whoever holds the `Arc` of a value pins it. What is pinned is never evicted, so more in use than the limit allows
//! exceeds the limit instead of failing; the excess goes at the first chance after it is released. No method waits
//! for anything but a short lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::oneshot;

use crate::adapter::Generation;
use crate::{Error, Result};

pub(super) struct Cache<T> {
    limit: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    slots: HashMap<Generation, Slot<T>>,
    /// Bytes of all ready values.
    used: usize,
    /// Counts uses; the larger a slot's, the more recent.
    clock: u64,
}

enum Slot<T> {
    /// To whom the outcome goes.
    Loading(Vec<oneshot::Sender<Outcome<T>>>),
    Ready {
        value: Arc<T>,
        bytes: usize,
        used_at: u64,
    },
}

type Outcome<T> = Result<Arc<T>>;

/// Waits for a load. Every waiter has a channel of its own: one for all would hold the value, and so pin it, for a
/// moment longer than anybody wants it.
pub(super) struct Waiter<T>(oneshot::Receiver<Outcome<T>>);

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
    generation: Generation,
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
        Arc::new(Cache { limit, state: Mutex::new(State { slots: HashMap::new(), used: 0, clock: 0 }) })
    }

    pub fn get(self: &Arc<Self>, generation: &Generation) -> Lookup<T> {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        let found = match state.slots.get_mut(generation) {
            Some(Slot::Ready { value, used_at, .. }) => {
                *used_at = now;
                Lookup::Ready(value.clone())
            }
            Some(Slot::Loading(waiters)) => {
                let (sender, receiver) = oneshot::channel();
                waiters.push(sender);
                Lookup::Wait(Waiter(receiver))
            }
            None => {
                let (sender, receiver) = oneshot::channel();
                state.slots.insert(generation.clone(), Slot::Loading(vec![sender]));
                let flight = Flight { cache: self.clone(), generation: generation.clone(), settled: false };
                Lookup::Load(flight, Waiter(receiver))
            }
        };
        // What was pinned when the limit was exceeded may be free by now.
        state.evict_to(self.limit);
        found
    }

    /// Takes a value that is ready, if it fits beside what is pinned. Returns whether it is in the cache now.
    pub fn offer(&self, generation: &Generation, value: Arc<T>, bytes: usize) -> bool {
        let mut state = self.state();
        match state.slots.get(generation) {
            Some(Slot::Ready { .. }) => return true,
            // Its loader will put it in.
            Some(Slot::Loading(_)) => return false,
            None => {}
        }
        if bytes > self.limit {
            return false;
        }
        state.evict_to(self.limit - bytes);
        if state.used > self.limit - bytes {
            return false;
        }
        state.insert(generation.clone(), value, bytes);
        true
    }

    /// Drops a value from the tier; whoever holds it keeps it. A load under way goes on.
    pub fn forget(&self, generation: &Generation) {
        let mut state = self.state();
        if let Some(Slot::Ready { .. }) = state.slots.get(generation) {
            state.remove(generation);
        }
    }

    /// How many hold the value beside the cache; `None` if it is not ready.
    pub fn holders(&self, generation: &Generation) -> Option<usize> {
        match self.state().slots.get(generation) {
            Some(Slot::Ready { value, .. }) => Some(Arc::strong_count(value) - 1),
            _ => None,
        }
    }

    /// Number and bytes of the ready values.
    pub fn totals(&self) -> (usize, usize) {
        let state = self.state();
        let ready = state.slots.values().filter(|slot| matches!(slot, Slot::Ready { .. })).count();
        (ready, state.used)
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<T> State<T> {
    fn insert(&mut self, generation: Generation, value: Arc<T>, bytes: usize) {
        self.clock += 1;
        self.used += bytes;
        self.slots.insert(generation, Slot::Ready { value, bytes, used_at: self.clock });
    }

    fn remove(&mut self, generation: &Generation) {
        if let Some(Slot::Ready { bytes, .. }) = self.slots.remove(generation) {
            self.used -= bytes;
        }
    }

    fn evict_to(&mut self, limit: usize) {
        while self.used > limit {
            // One strong count is the cache's own. It cannot grow meanwhile: clones are made from it under the lock.
            let oldest = self
                .slots
                .iter()
                .filter_map(|(generation, slot)| match slot {
                    Slot::Ready { value, used_at, .. } if Arc::strong_count(value) == 1 => Some((*used_at, generation)),
                    _ => None,
                })
                .min();
            let Some((_, generation)) = oldest else { return };
            let generation = generation.clone();
            self.remove(&generation);
        }
    }
}

impl<T> Flight<T> {
    /// Ends the load: keeps the value under `generation` (which may differ from the one asked for, if the files
    /// changed) if `keep` says so. `keep` is asked under the lock. The waiters hear of it by [`Settled::announce`].
    pub fn settle(
        mut self,
        outcome: Result<(Generation, Arc<T>, usize)>,
        keep: impl FnOnce(&Generation) -> bool,
    ) -> Settled<T> {
        let mut state = self.cache.state();
        let waiters = match state.slots.remove(&self.generation) {
            Some(Slot::Loading(waiters)) => waiters,
            _ => unreachable!("a generation in flight is in no other state"),
        };
        let outcome = outcome.map(|(generation, value, bytes)| {
            if keep(&generation) && !state.slots.contains_key(&generation) {
                state.insert(generation, value.clone(), bytes);
            }
            state.evict_to(self.cache.limit);
            value
        });
        drop(state);
        self.settled = true;
        Settled { waiters, outcome }
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
            self.cache.state().slots.remove(&self.generation);
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

    fn put(cache: &Arc<Cache<usize>>, i: usize, bytes: usize) -> Arc<usize> {
        match cache.get(&generation(i)) {
            Lookup::Ready(value) => value,
            Lookup::Wait(_) => panic!("nobody loads {i}"),
            Lookup::Load(flight, _) => {
                let settled = flight.settle(Ok((generation(i), Arc::new(i), bytes)), |_| true);
                settled.outcome.unwrap()
            }
        }
    }

    fn has(cache: &Cache<usize>, i: usize) -> bool {
        cache.holders(&generation(i)).is_some()
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
        assert_eq!(cache.holders(&generation(0)), Some(1));
        drop(held);
        put(&cache, 3, 10);
        assert_eq!(cache.totals(), (2, 20));
        assert!(has(&cache, 3) && has(&cache, 2));
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
        assert_eq!((cache.totals(), *held), ((0, 0), 1));
    }

    #[test]
    fn one_load_serves_all_who_wait() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let cache: Arc<Cache<usize>> = Cache::new(20);
            let Lookup::Load(flight, _) = cache.get(&generation(1)) else { panic!() };
            let waiters: Vec<_> = (0..3)
                .map(|_| match cache.get(&generation(1)) {
                    Lookup::Wait(waiter) => tokio::spawn(waiter.wait()),
                    _ => panic!(),
                })
                .collect();
            flight.settle(Ok((generation(1), Arc::new(7), 10)), |_| true).announce();
            let Lookup::Ready(value) = cache.get(&generation(1)) else { panic!() };
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
            let Lookup::Load(flight, _) = cache.get(&generation(1)) else { panic!() };
            let Lookup::Wait(waiter) = cache.get(&generation(1)) else { panic!() };
            flight.settle(Err(Error::unprocessable("broken")), |_| true).announce();
            assert_eq!(waiter.wait().await.unwrap_err().message, "broken");
            let Lookup::Load(flight, _) = cache.get(&generation(1)) else { panic!() };
            let Lookup::Wait(waiter) = cache.get(&generation(1)) else { panic!() };
            drop(flight);
            waiter.wait().await.unwrap_err();
            assert!(matches!(cache.get(&generation(1)), Lookup::Load(..)));
        });
    }

    proptest! {
        /// Any order of uses, releases, offers and removals keeps the books: bytes add up, held values stay what they
        /// were, and the limit is only exceeded by what is held.
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
                // A look-up evicts whatever the limit demands.
                drop(cache.get(&generation(99)));
                let pinned: usize = (0..8).filter(|&i| cache.holders(&generation(i)).is_some_and(|n| n > 0)).map(size).sum();
                let (_, used) = cache.totals();
                prop_assert!(used <= 40.max(pinned), "{} used, {} pinned", used, pinned);
            }
        }
    }
}
