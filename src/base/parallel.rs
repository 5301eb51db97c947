//! The parallel regions of a step. There are hundreds in a few milliseconds, so the threads that share them wait for the
//! next one awake, and sleep only when none has come for a while.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread stays awake for the next region: longer than what lies between two regions of a step, much shorter
/// than what others would miss of the core.
const AWAKE: Duration = Duration::from_micros(100);

/// How many threads share a region, the caller's among them.
static THREADS: OnceLock<usize> = OnceLock::new();

/// Sets the number of threads; without it they are as many as the machine has cores. Later calls, and calls after the first
/// region, change nothing.
pub fn set_threads(threads: usize) {
    let _ = THREADS.set(threads.max(1));
}

/// How many threads share a region.
pub fn threads() -> usize {
    *THREADS.get_or_init(|| thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Calls `task(i)` for every `i` below `tasks`, in any order, on all threads. Where these are in another region already, the
/// caller's does all of it.
///
/// # Panics
/// If a task does, once no other is running any more.
pub fn run(tasks: usize, task: impl Fn(usize) + Sync) {
    run_shares(tasks, |thread| thread * tasks / threads(), || {}, task)
}

/// [`run`] where a thread's share, which it begins with, starts with task `first(thread)`; the first one's with the first task.
/// The caller does `meanwhile` before its own.
///
/// # Panics
/// As there, or if `meanwhile` does.
pub fn run_shares(tasks: usize, first: impl Fn(usize) -> usize, meanwhile: impl FnOnce(), task: impl Fn(usize) + Sync) {
    static TEAM: OnceLock<Team> = OnceLock::new();
    if tasks <= 1 || threads() == 1 {
        meanwhile();
        return (0..tasks).for_each(task);
    }
    TEAM.get_or_init(|| Team::new(threads() - 1)).run(tasks, first, meanwhile, &task);
}

/// [`run`] for small tasks, of which a thread takes some side by side: to take one takes about as long as to norm a row.
fn run_small(tasks: usize, task: impl Fn(usize) + Sync) {
    /// What a thread takes this many times evens out what other programs take of its core.
    const TURNS: usize = 4;
    let side = (tasks / (TURNS * threads())).max(1);
    run(tasks.div_ceil(side), |i| (i * side..tasks.min((i + 1) * side)).for_each(&task));
}

/// Calls `task(i, chunk)` for every chunk of `size` numbers; the last one may be shorter.
///
/// # Panics
/// As [`run`], or if `size` is 0.
pub fn chunks<T: Send>(data: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let parts = Parts::new(data, size);
    // SAFETY: each part is lent once.
    run_small(parts.count(), |i| task(i, unsafe { parts.part(i) }));
}

/// The same for two slices that have as many chunks.
///
/// # Panics
/// As [`chunks`], or if one has more chunks.
pub fn chunk_pairs<T: Send, U: Send>(
    (first, first_size): (&mut [T], usize),
    (second, second_size): (&mut [U], usize),
    task: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let (first, second) = (Parts::new(first, first_size), Parts::new(second, second_size));
    assert_eq!(first.count(), second.count());
    // SAFETY: each part is lent once.
    run_small(first.count(), |i| task(i, unsafe { first.part(i) }, unsafe { second.part(i) }));
}

/// What `task` makes of each item, in their order.
///
/// # Panics
/// As [`run`].
pub fn map<T: Send, U: Send>(items: Vec<T>, task: impl Fn(T) -> U + Sync) -> Vec<U> {
    let mut items: Vec<Option<T>> = items.into_iter().map(Some).collect();
    let mut results: Vec<Option<U>> = items.iter().map(|_| None).collect();
    let (from, to) = (Parts::new(&mut items, 1), Parts::new(&mut results, 1));
    // SAFETY: each part is lent once.
    run(from.count(), |i| unsafe { to.part(i)[0] = from.part(i)[0].take().map(&task) });
    results.into_iter().flatten().collect()
}

/// Chunks of a slice for tasks that take one each.
struct Parts<'a, T> {
    start: *mut T,
    length: usize,
    size: usize,
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are disjoint and lent once.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    fn new(data: &'a mut [T], size: usize) -> Self {
        assert!(size > 0);
        Parts { start: data.as_mut_ptr(), length: data.len(), size, data: PhantomData }
    }

    fn count(&self) -> usize {
        self.length.div_ceil(self.size)
    }

    /// # Safety
    /// `i` is below the count, and no other reference to this part is alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, i: usize) -> &mut [T] {
        let first = i * self.size;
        // SAFETY: the part lies inside the slice; the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), self.size.min(self.length - first)) }
    }
}

/// A region's task, `call(data, i)`.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    data: *const (),
}

/// In [`Shared::state`]: threads may join the region.
const OPEN: usize = 1 << 16;
/// In [`Shared::state`]: the number of the region is above, the number of threads that are in it below [`OPEN`].
const REGION: usize = 1 << 17;

/// Tasks of a region that nobody has taken: the first in the low half, the one after the last in the high one. One for each
/// thread, in a cache line of its own.
#[repr(align(64))]
struct Left(AtomicU64);

impl Left {
    const HALF: u32 = 32;

    fn set(&self, tasks: Range<usize>) {
        self.0.store(tasks.start as u64 | (tasks.end as u64) << Self::HALF, SeqCst);
    }

    /// The first of `left`, and the one after the last.
    fn ends(left: u64) -> (usize, usize) {
        (left as u32 as usize, (left >> Self::HALF) as usize)
    }

    fn first(&self) -> Option<usize> {
        let rest = |left| Some(Self::ends(left)).filter(|(first, end)| first < end).map(|_| left + 1);
        self.0.fetch_update(SeqCst, SeqCst, rest).ok().map(|left| Self::ends(left).0)
    }

    fn last(&self) -> Option<usize> {
        let rest = |left| Some(Self::ends(left)).filter(|(first, end)| first < end).map(|_| left - (1 << Self::HALF));
        self.0.fetch_update(SeqCst, SeqCst, rest).ok().map(|left| Self::ends(left).1 - 1)
    }
}

struct Shared {
    state: AtomicUsize,
    /// Written by the caller while the region is closed and nobody is in it, read by those who are in it.
    job: UnsafeCell<Job>,
    /// Each thread's share of the tasks: as they lie side by side, it reads weights on from where it was, and as its share
    /// is about the same one from region to region, what it wrote is in its core's cache when it reads it.
    left: Box<[Left]>,
    sleeping: AtomicUsize,
    /// Held by a thread from its last look at `state` until it sleeps.
    sleep: Mutex<()>,
    wake: Condvar,
    /// What a task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is as it says; its data is what a closure that is `Sync` refers to.
unsafe impl Sync for Shared {}
unsafe impl Send for Shared {}

impl Shared {
    /// Takes a task of a thread's own share, else the last one of another's.
    fn take(&self, thread: usize) -> Option<usize> {
        let (before, own) = self.left.split_at(thread);
        let others = own[1..].iter().chain(before);
        own[0].first().or_else(|| others.into_iter().find_map(Left::last))
    }

    /// Takes tasks until there are none.
    fn work(&self, job: Job, thread: usize) {
        self.catch(|| {
            while let Some(task) = self.take(thread) {
                // SAFETY: the region is not over before this thread has left it, so the closure is there.
                unsafe { (job.call)(job.data, task) };
            }
        });
    }

    /// Keeps what `body` panics with for the caller; no more tasks are taken then.
    fn catch(&self, body: impl FnOnce()) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(body)) {
            self.left.iter().for_each(|left| left.set(0..0));
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(payload);
        }
    }

    /// Waits for a region after `last` and joins it; returns its number.
    fn join(&self, last: usize) -> usize {
        let mut since = Instant::now();
        let mut turns = 0u32;
        loop {
            let state = self.state.load(SeqCst);
            if state & OPEN != 0 && state / REGION != last {
                if self.state.compare_exchange(state, state + 1, SeqCst, SeqCst).is_ok() {
                    return state / REGION;
                }
                continue;
            }
            spin_loop();
            turns += 1;
            // The clock is looked at seldom.
            if turns.is_multiple_of(64) && since.elapsed() > AWAKE {
                self.doze(last);
                since = Instant::now();
            }
        }
    }

    /// Sleeps until a caller opens a region, unless one after `last` is open.
    fn doze(&self, last: usize) {
        let guard = self.sleep.lock().unwrap_or_else(|e| e.into_inner());
        // The caller opens the region first and then looks for sleepers, this thread does it the other way round: one of
        // them sees the other.
        self.sleeping.fetch_add(1, SeqCst);
        let state = self.state.load(SeqCst);
        if state & OPEN == 0 || state / REGION == last {
            // Once: who was woken for a region that is over by now waits awake for the next one.
            drop(self.wake.wait(guard).unwrap_or_else(|e| e.into_inner()));
        }
        self.sleeping.fetch_sub(1, SeqCst);
    }
}

/// Threads that join the regions of their callers.
struct Team {
    shared: Arc<Shared>,
    /// Held by the caller whose region it is.
    caller: Mutex<()>,
}

impl Team {
    /// With so many threads beside the caller's.
    fn new(others: usize) -> Self {
        unsafe fn nothing(_: *const (), _: usize) {}
        let job = UnsafeCell::new(Job { call: nothing, data: std::ptr::null() });
        let shared = Arc::new(Shared {
            state: AtomicUsize::new(0),
            job,
            left: (0..=others).map(|_| Left(AtomicU64::new(0))).collect(),
            sleeping: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        for i in 0..others {
            let shared = shared.clone();
            let body = move || {
                let mut region = 0;
                loop {
                    region = shared.join(region);
                    // SAFETY: this thread is in the region.
                    shared.work(unsafe { *shared.job.get() }, i + 1);
                    shared.state.fetch_sub(1, SeqCst);
                }
            };
            // With fewer threads the others do more.
            if let Err(e) = thread::Builder::new().name(format!("compute-{i}")).spawn(body) {
                tracing::warn!("thread {i} for computing was not started: {e}");
            }
        }
        Team { shared, caller: Mutex::new(()) }
    }

    fn run<F: Fn(usize) + Sync>(
        &self,
        tasks: usize,
        first: impl Fn(usize) -> usize,
        meanwhile: impl FnOnce(),
        task: &F,
    ) {
        assert!(tasks <= u32::MAX as usize);
        let _caller = match self.caller.try_lock() {
            Ok(caller) => caller,
            // Its data is nothing.
            Err(TryLockError::Poisoned(caller)) => caller.into_inner(),
            Err(TryLockError::WouldBlock) => {
                meanwhile();
                return (0..tasks).for_each(task);
            }
        };
        unsafe fn call<F: Fn(usize)>(data: *const (), task: usize) {
            // SAFETY: `data` is the closure of the region.
            unsafe { (*data.cast::<F>())(task) }
        }
        let shared = &*self.shared;
        let job = Job { call: call::<F>, data: std::ptr::from_ref(task).cast() };
        // SAFETY: the last region is closed and left, and this caller is the only one.
        unsafe { *shared.job.get() = job };
        let mut start = 0;
        for (thread, left) in shared.left.iter().enumerate() {
            let is_last = thread + 1 == shared.left.len();
            let end = if is_last { tasks } else { first(thread + 1).clamp(start, tasks) };
            left.set(start..end);
            start = end;
        }
        let region = (shared.state.load(SeqCst) / REGION).wrapping_add(1);
        shared.state.store(region * REGION + OPEN, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            drop(shared.sleep.lock());
            shared.wake.notify_all();
        }
        shared.catch(meanwhile);
        shared.work(job, 0);
        shared.state.fetch_and(!OPEN, SeqCst);
        let mut turns = 0u32;
        while !shared.state.load(SeqCst).is_multiple_of(OPEN) {
            turns += 1;
            // Who is still in there may be waiting for this core.
            if turns.is_multiple_of(1024) { thread::yield_now() } else { spin_loop() }
        }
        if let Some(payload) = shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take() {
            resume_unwind(payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for others in [1, 3] {
            let team = Team::new(others);
            for region in 0..3000 {
                let counts: Vec<AtomicUsize> = (0..region % 50).map(|_| AtomicUsize::new(0)).collect();
                // Shares that are empty, and some that would overlap.
                let first = |thread: usize| region * thread * 7 % 61;
                let mut has_begun = false;
                team.run(counts.len(), first, || has_begun = true, &|i| {
                    counts[i].fetch_add(1, SeqCst);
                });
                assert!(has_begun && counts.iter().all(|count| count.load(SeqCst) == 1));
                if region % 300 == 0 {
                    // Long enough for the others to fall asleep.
                    thread::sleep(5 * AWAKE);
                }
            }
        }
    }

    #[test]
    fn several_callers_and_regions_in_regions() {
        let team = Team::new(2);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        team.run(7, |thread| 3 * thread, || {}, &|_| {
                            team.run(3, |_| 0, || {}, &|i| {
                                total.fetch_add(i, SeqCst);
                            })
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(SeqCst), 4 * 500 * 7 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2);
        for round in 0..100 {
            let bad = catch_unwind(AssertUnwindSafe(|| {
                team.run(20, |thread| 10 * thread, || {}, &|i| assert!(i != round % 20, "task {i}"))
            }));
            let message = *bad.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("task {}", round % 20));
            let bad = catch_unwind(AssertUnwindSafe(|| team.run(20, |_| 10, || panic!("meanwhile"), &|_| ())));
            assert_eq!(*bad.unwrap_err().downcast::<&str>().unwrap(), "meanwhile");
            let sum = AtomicUsize::new(0);
            team.run(20, |_| 20, || {}, &|i| {
                sum.fetch_add(i, SeqCst);
            });
            assert_eq!(sum.load(SeqCst), 190);
        }
    }

    #[test]
    fn chunks_are_the_whole() {
        for (length, size) in [(0, 3), (1, 3), (100, 7), (21, 7)] {
            let mut data = vec![0; length];
            chunks(&mut data, size, |i, chunk| {
                assert!(chunk.len() == size || i == length / size);
                chunk.iter_mut().for_each(|x| *x += 1 + i);
            });
            assert!(data.iter().enumerate().all(|(at, &x)| x == 1 + at / size));
        }
    }
}
