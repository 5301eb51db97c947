//! What a part of a run takes.

use std::time::Instant;

/// Measures from a moment on.
pub struct Stopwatch {
    start: Instant,
    cores: Option<f64>,
}

impl Stopwatch {
    pub fn start() -> Self {
        Stopwatch { start: Instant::now(), cores: cpu_seconds() }
    }

    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Of all threads of this program. `None` where the system does not tell.
    pub fn cpu_seconds(&self) -> Option<f64> {
        Some(cpu_seconds()? - self.cores?)
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn cpu_seconds() -> Option<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` may be written.
    let told = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) } == 0;
    told.then(|| time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn cpu_seconds() -> Option<f64> {
    None
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn work_takes_the_cores_time_and_sleep_takes_none() {
        let watch = Stopwatch::start();
        let mut sum = 0u64;
        while watch.cpu_seconds().unwrap() < 0.02 {
            sum = std::hint::black_box(sum + 1);
        }
        // Other tests work beside this one, so there is no bound from above.
        assert!(watch.seconds() > 0.0 && watch.cpu_seconds().unwrap() >= 0.02);
    }
}
