//! A rate limit: so many units a minute.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A token bucket that holds a minute's units: a minute's worth may be spent at once. The limit is given with each call, so that
/// it can change.
#[derive(Debug, Default)]
pub struct Bucket(Mutex<Spent>);

#[derive(Debug, Default)]
struct Spent {
    /// Units spent and not yet refilled at `last`.
    units: f64,
    last: Option<Instant>,
}

impl Spent {
    fn refill(&mut self, per_minute: u32, now: Instant) {
        let elapsed = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.units = (self.units - elapsed.as_secs_f64() * f64::from(per_minute) / 60.0).max(0.0);
        self.last = Some(now);
    }
}

impl Bucket {
    /// Spends `units` where that leaves no more than `per_minute` spent. `units` of 0 asks whether anything is left.
    ///
    /// Errors: whole seconds after which it will be possible, 1 or more.
    pub fn spend(&self, units: u32, per_minute: u32, now: Instant) -> Result<(), u64> {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spent.refill(per_minute, now);
        let over = spent.units + f64::from(units.max(1)) - f64::from(per_minute);
        if over > 0.0 {
            return Err(((over * 60.0 / f64::from(per_minute)).ceil() as u64).max(1));
        }
        spent.units += f64::from(units);
        Ok(())
    }

    /// Spends units whatever is left, as for what is known afterwards.
    pub fn charge(&self, units: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).units += units as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_units_at_once_then_one_after_the_other() {
        let (bucket, start) = (Bucket::default(), Instant::now());
        let at = |millis: u64| start + Duration::from_millis(millis);
        assert!((0..30).all(|_| bucket.spend(1, 30, at(0)).is_ok()));
        assert_eq!(bucket.spend(1, 30, at(0)), Err(2));
        assert_eq!(bucket.spend(1, 30, at(1900)), Err(1));
        assert_eq!(bucket.spend(1, 30, at(2001)), Ok(()));
        assert_eq!(bucket.spend(1, 30, at(2001)), Err(2));
        // However long nobody asks, no more than a minute's.
        assert_eq!((0..100).filter(|_| bucket.spend(1, 30, at(600_000)).is_ok()).count(), 30);
        // A limit that is raised counts what was spent.
        assert_eq!((0..100).filter(|_| bucket.spend(1, 40, at(600_000)).is_ok()).count(), 10);
    }

    #[test]
    fn what_was_spent_beyond_the_limit_is_waited_for() {
        let (bucket, start) = (Bucket::default(), Instant::now());
        assert_eq!(bucket.spend(0, 600, start), Ok(()));
        bucket.charge(1200);
        assert_eq!(bucket.spend(0, 600, start), Err(61));
        assert_eq!(bucket.spend(0, 600, start + Duration::from_secs(60)), Err(1));
        assert_eq!(bucket.spend(0, 600, start + Duration::from_secs(61)), Ok(()));
    }
}
