//! How memory is had from the system.

use std::ops::Range;

/// Keeps up to about `bytes` of what is freed for the next step, which needs just as much: the GNU allocator would return the
/// larger blocks to the system and take them again, cleared, page by page. A tenth of the time of a full fine-tune went there.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep(bytes: usize) {
    /// The largest threshold that it takes.
    const LARGEST: libc::c_int = 32 << 20;
    // SAFETY: both only set a number of the allocator, before other threads are there.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
        libc::mallopt(libc::M_TRIM_THRESHOLD, bytes.try_into().unwrap_or(libc::c_int::MAX));
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep(_bytes: usize) {}

/// The addresses of `numbers`.
pub fn place<T>(numbers: &[T]) -> Range<usize> {
    let range = numbers.as_ptr_range();
    range.start as usize..range.end as usize
}

/// Has the system hold what lies at these addresses in large pages, where it has such and not never: what is read from one end
/// to the other then waits less for addresses to be translated. What fails stays as it is.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn in_large_pages(mut parts: Vec<Range<usize>>) {
    /// The usual size of a large one.
    const PAGE: usize = 2 << 20;
    /// What may lie between parts: smaller things, and what the allocator keeps of its own.
    const GAP: usize = 256 << 10;
    /// Since Linux 6.1; it asks nobody whether it may.
    const MADV_COLLAPSE: libc::c_int = 25;
    let wanted = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if wanted.is_ok_and(|wanted| wanted.contains("[never]")) {
        return;
    }
    parts.sort_unstable_by_key(|part| part.start);
    parts.dedup_by(|next, kept| {
        let is_close = next.start <= kept.end + GAP;
        if is_close {
            kept.end = kept.end.max(next.end);
        }
        is_close
    });
    for part in parts {
        let (start, end) = (part.start.next_multiple_of(PAGE), part.end / PAGE * PAGE);
        if start < end {
            for advice in [libc::MADV_HUGEPAGE, MADV_COLLAPSE] {
                // SAFETY: it changes how memory is mapped, not what is in it.
                unsafe { libc::madvise(start as *mut libc::c_void, end - start, advice) };
            }
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn in_large_pages(_parts: Vec<Range<usize>>) {}
