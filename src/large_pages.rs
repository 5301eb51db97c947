//! Memory for what steps read from one end to the other: weights and adapters. It lies in large pages where the system has
//! them, so that reading waits less for addresses to be translated, and in whole cache lines.
//!
//! One adapter has hundreds of matrices of a few kilobytes, so a page holds many of them, and of several adapters. The GNU
//! allocator can be told to ask for large pages by its environment only.

use std::alloc::Layout;
use std::ptr::NonNull;

use allocator_api2::alloc::{AllocError, Allocator};
use allocator_api2::vec::Vec;

/// Numbers in large pages.
pub type Large<T> = Vec<T, LargePages>;

/// `len` times `value`.
pub fn repeated<T: Clone>(value: T, len: usize) -> Large<T> {
    allocator_api2::vec![in LargePages; value; len]
}

/// As many as the iterator says it has.
pub fn collected<T>(numbers: impl ExactSizeIterator<Item = T>) -> Large<T> {
    let mut all = Large::with_capacity_in(numbers.len(), LargePages);
    all.extend(numbers);
    all
}

#[derive(Debug, Clone, Copy, Default)]
pub struct LargePages;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod heap {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::{Mutex, MutexGuard};

    /// The usual size of a large page.
    const PAGE: usize = 2 << 20;
    /// What is taken from the system at once, at least. Nothing of it is in memory before it is written to.
    const REGION: usize = 32 << 20;
    /// A cache line, of which all that is lent has whole ones.
    pub const LINE: usize = 64;

    static HEAP: Mutex<Heap> = Mutex::new(Heap::new());

    pub fn heap() -> MutexGuard<'static, Heap> {
        HEAP.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What of the system's memory is free, by addresses. Neighbouring free parts of a region are one.
    pub struct Heap {
        /// Sizes, by where the parts begin.
        free: BTreeMap<usize, usize>,
        /// Sizes and beginnings.
        by_size: BTreeSet<(usize, usize)>,
        /// Sizes of all regions, by where they begin.
        regions: BTreeMap<usize, usize>,
    }

    impl Heap {
        pub const fn new() -> Self {
            Heap { free: BTreeMap::new(), by_size: BTreeSet::new(), regions: BTreeMap::new() }
        }

        /// Where `size` bytes, in whole lines, are free; they are not any more. Of the parts that are large enough it is the
        /// smallest, in which least is left over. `None` where the system has no more.
        pub fn take(&mut self, size: usize) -> Option<usize> {
            debug_assert!(size > 0 && size.is_multiple_of(LINE));
            if self.by_size.range((size, 0)..).next().is_none() {
                let region = size.max(REGION).checked_next_multiple_of(PAGE)?;
                let start = map(region)?;
                self.regions.insert(start, region);
                self.add(start, region);
            }
            let &(found, start) = self.by_size.range((size, 0)..).next()?;
            self.remove(start, found);
            if found > size {
                self.add(start + size, found - size);
            }
            Some(start)
        }

        /// Gives back what [`Self::take`] lent. A region of which nothing is lent any more is the system's again.
        pub fn give(&mut self, mut start: usize, mut size: usize) {
            if let Some((&before, &length)) = self.free.range(..start).next_back()
                && before + length == start
                && !self.regions.contains_key(&start)
            {
                self.remove(before, length);
                (start, size) = (before, size + length);
            }
            if let Some(&length) = self.free.get(&(start + size))
                && !self.regions.contains_key(&(start + size))
            {
                self.remove(start + size, length);
                size += length;
            }
            if self.regions.get(&start) == Some(&size) {
                self.regions.remove(&start);
                // SAFETY: all of it was given back.
                unsafe { libc::munmap(start as *mut libc::c_void, size) };
            } else {
                self.add(start, size);
            }
        }

        fn add(&mut self, start: usize, size: usize) {
            self.free.insert(start, size);
            self.by_size.insert((size, start));
        }

        fn remove(&mut self, start: usize, size: usize) {
            self.free.remove(&start);
            self.by_size.remove(&(size, start));
        }
    }

    /// New memory from the start of a page on, `size` bytes in whole pages.
    fn map(size: usize) -> Option<usize> {
        let with_room = size.checked_add(PAGE)?;
        // SAFETY: nothing that is there is touched: the address is the system's choice, and what of it lies before the first
        // page and after the last one is in nobody's hands yet.
        unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let mapped = libc::mmap(std::ptr::null_mut(), with_room, access, kind, -1, 0);
            if mapped == libc::MAP_FAILED {
                return None;
            }
            let first = mapped as usize;
            let start = first.next_multiple_of(PAGE);
            for (from, to) in [(first, start), (start + size, first + with_room)] {
                if from < to {
                    libc::munmap(from as *mut libc::c_void, to - from);
                }
            }
            // Without large pages it is memory all the same.
            libc::madvise(start as *mut libc::c_void, size, libc::MADV_HUGEPAGE);
            Some(start)
        }
    }

    #[cfg(test)]
    mod tests {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            /// What is lent lies apart, keeps what was written to it, and all of it goes back to the system.
            #[test]
            fn what_is_lent_lies_apart(
                steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>(), 1usize..200_000), 1..80),
            ) {
                let mut heap = Heap::new();
                let mut lent: Vec<(usize, usize, u8)> = vec![];
                // SAFETY, here and below: it is lent.
                let ends = |start: usize, size: usize| unsafe { [&mut *(start as *mut u8), &mut *((start + size - 1) as *mut u8)] };
                for (i, (takes, which, lines)) in steps.into_iter().enumerate() {
                    if takes || lent.is_empty() {
                        let size = lines * LINE;
                        let start = heap.take(size).unwrap();
                        prop_assert!(start.is_multiple_of(LINE));
                        prop_assert!(lent.iter().all(|&(other, length, _)| start + size <= other || other + length <= start));
                        ends(start, size).into_iter().for_each(|byte| *byte = i as u8);
                        lent.push((start, size, i as u8));
                    } else {
                        let (start, size, value) = lent.swap_remove(which.index(lent.len()));
                        prop_assert!(ends(start, size).iter().all(|byte| **byte == value));
                        heap.give(start, size);
                    }
                    let known: usize = heap.regions.values().sum();
                    let free: usize = heap.free.values().sum();
                    prop_assert_eq!(known, free + lent.iter().map(|(_, size, _)| size).sum::<usize>());
                    prop_assert_eq!(heap.free.len(), heap.by_size.len());
                }
                for (start, size, _) in lent {
                    heap.give(start, size);
                }
                prop_assert!(heap.regions.is_empty() && heap.free.is_empty() && heap.by_size.is_empty());
            }
        }

        #[test]
        fn what_is_given_back_is_lent_again() {
            let mut heap = Heap::new();
            let all: Vec<usize> = (0..8).map(|_| heap.take(4 << 20).unwrap()).collect();
            assert_eq!(heap.regions.len(), 1);
            heap.give(all[2], 4 << 20);
            heap.give(all[5], 4 << 20);
            heap.give(all[4], 4 << 20);
            // Where it leaves least.
            assert_eq!(heap.take(3 << 20), Some(all[2]));
            assert_eq!(heap.take(8 << 20), Some(all[4]));
            assert_eq!(heap.take(usize::MAX / LINE * LINE), None);
            assert!(heap.take(REGION).is_some());
            assert_eq!(heap.regions.len(), 2);
        }
    }
}

// SAFETY: what is lent is nobody else's until it is given back, and stays where it is.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
unsafe impl Allocator for LargePages {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.align() > heap::LINE {
            return Err(AllocError);
        }
        let size = layout.size().checked_next_multiple_of(heap::LINE).ok_or(AllocError)?;
        let start = match size {
            0 => heap::LINE,
            _ => heap::heap().take(size).ok_or(AllocError)?,
        };
        let start = NonNull::new(start as *mut u8).ok_or(AllocError)?;
        Ok(NonNull::slice_from_raw_parts(start, size))
    }

    unsafe fn deallocate(&self, start: NonNull<u8>, layout: Layout) {
        let size = layout.size().next_multiple_of(heap::LINE);
        if size > 0 {
            heap::heap().give(start.as_ptr() as usize, size);
        }
    }
}

/// Elsewhere the usual memory.
// SAFETY: as for `Global`.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
unsafe impl Allocator for LargePages {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        allocator_api2::alloc::Global.allocate(layout)
    }

    unsafe fn deallocate(&self, start: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { allocator_api2::alloc::Global.deallocate(start, layout) }
    }
}
