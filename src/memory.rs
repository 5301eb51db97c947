//! How memory is had from the system.

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

/// Gives back to the system what is free now: for the end of a start, which needs memory that no step does.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn release() {
    // SAFETY: it touches only what nobody holds.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn release() {}
