//! How fast memory is sent while the guest runs.

use std::time::{Duration, Instant};

/// Keeps what is sent below a number of bytes a second.
#[derive(Debug)]
pub struct Pace {
    /// When what was sent until now would have been sent at that rate.
    due: Instant,
}

impl Pace {
    /// Of a migration that begins.
    pub fn new(now: Instant) -> Self {
        Self { due: now }
    }

    /// Takes note of `bytes` that were sent since `began`. When the next may be sent, at `limit`
    /// bytes a second.
    pub fn spend(&mut self, began: Instant, bytes: u64, limit: u64) -> Instant {
        let micros = u128::from(bytes) * 1_000_000 / u128::from(limit.max(1));
        let time = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        // Time in which nothing was to be sent is not made up for.
        let from = self.due.max(began);
        self.due = from.checked_add(time).unwrap_or(from);
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn pieces_follow_each_other_at_the_rate() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        let mut next = begin;
        for _ in 0..10 {
            next = pace.spend(next, 4 * MIB, 20 * MIB);
        }
        assert_eq!(next, begin + Duration::from_secs(2));
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.spend(begin, MIB, MIB);
        let later = begin + Duration::from_secs(60);
        assert_eq!(pace.spend(later, MIB, MIB), later + Duration::from_secs(1));
    }

    #[test]
    fn a_link_that_is_slower_is_not_slowed_down_more() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        let mut now = begin;
        for _ in 0..10 {
            let due = pace.spend(now, MIB, 10 * MIB);
            now += Duration::from_millis(200);
            assert!(due <= now);
        }
    }
}
