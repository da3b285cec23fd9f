//! When to stop: how long the blackout would be, and what to do when it gets no shorter.

use std::time::{Duration, Instant};

use migration::report::Prediction;

use super::MigrationError;
use super::prediction::Around;
use super::setup::{MaxDowntime, MigrateOptions};

/// A rate before anything was measured, in bytes a second: of a link to another host, and within one.
const FIRST_RATE: u64 = 100 << 20;
const FIRST_LOCAL_RATE: u64 = 1 << 30;
/// A round that sends less does not show that the rate is lower.
const LEAST_MEASURED: u64 = 1 << 20;
/// Rounds in a row that bring nothing, before it is said.
const PATIENT_ROUNDS: u32 = 3;
/// First step of the throttle, and each step more, in percent.
const THROTTLE_FIRST: u32 = 20;
const THROTTLE_STEP: u32 = 10;

/// What a round has shown.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Bytes sent.
    pub sent: u64,
    /// How long that took.
    pub time: Duration,
    /// Bytes that were dirtied meanwhile.
    pub dirtied: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Stop the machine now.
    Stop,
    /// Copy what is dirty.
    Copy,
    /// Copy what is dirty, and take so many percent of its time from the guest.
    Throttle(u32),
}

/// Predicts, and decides.
#[derive(Debug)]
pub struct Convergence {
    options: MigrateOptions,
    max_downtime: MaxDowntime,
    around: Around,
    /// As measured.
    rate: Option<u64>,
    dirty_rate: u64,
    last: Option<Duration>,
    rounds_without_gain: u32,
    stuck_since: Option<Instant>,
    throttle: u32,
}

impl Convergence {
    /// Nothing is known yet. `max_downtime` is looked at whenever something is decided.
    pub fn new(options: MigrateOptions, max_downtime: MaxDowntime) -> Self {
        Self {
            options,
            max_downtime,
            around: Around::default(),
            rate: None,
            dirty_rate: 0,
            last: None,
            rounds_without_gain: 0,
            stuck_since: None,
            throttle: 0,
        }
    }

    /// Takes note of a round.
    pub fn measured(&mut self, round: Measured) {
        let per_second = |bytes: u64| {
            let micros = round.time.as_micros().max(1);
            u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
        };
        let rate = per_second(round.sent);
        if round.sent >= LEAST_MEASURED || self.rate.is_some_and(|known| rate > known) {
            self.rate = Some(rate.max(1));
        }
        self.dirty_rate = per_second(round.dirtied);
    }

    /// Takes note of what is measured besides.
    pub fn found(&mut self, around: Around) {
        self.around = around;
    }

    /// How long the blackout would be with `remaining` bytes of memory left.
    pub fn predict(&self, remaining: u64) -> Prediction {
        self.around.predict(remaining, self.rate())
    }

    /// What to do when `remaining` bytes are dirty.
    pub fn decide(&mut self, remaining: u64, now: Instant) -> Result<Decision, MigrationError> {
        let predicted = Duration::from_micros(self.predict(remaining).total_us());
        if predicted <= self.max_downtime.get() || remaining == 0 {
            return Ok(Decision::Stop);
        }
        let gains = self.last.is_none_or(|last| predicted * 10 < last * 9);
        self.last = Some(predicted);
        if gains {
            self.rounds_without_gain = 0;
            self.stuck_since = None;
            return Ok(Decision::Copy);
        }
        self.rounds_without_gain += 1;
        if self.rounds_without_gain < PATIENT_ROUNDS {
            return Ok(Decision::Copy);
        }
        let since = *self.stuck_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= self.options.patience() {
            return Err(MigrationError::NotConverging {
                dirtied: self.dirty_rate,
                sent: self.rate(),
            });
        }
        if !self.options.auto_converge {
            return Ok(Decision::Copy);
        }
        self.throttle = match self.throttle {
            0 => THROTTLE_FIRST,
            percent => (percent + THROTTLE_STEP).min(99),
        };
        self.rounds_without_gain = 0;
        Ok(Decision::Throttle(self.throttle))
    }

    /// Bytes a second that are sent.
    pub fn rate(&self) -> u64 {
        self.rate.unwrap_or(if self.around.link.is_zero() {
            FIRST_LOCAL_RATE
        } else {
            FIRST_RATE
        })
    }

    /// Bytes a second that are dirtied.
    pub fn dirty_rate(&self) -> u64 {
        self.dirty_rate
    }

    /// Whether the prediction gets shorter.
    pub fn is_converging(&self) -> bool {
        self.stuck_since.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn convergence(options: MigrateOptions) -> Convergence {
        let mut convergence = Convergence::new(options, MaxDowntime::new(&options));
        convergence.measured(Measured {
            sent: 100 * MIB,
            time: Duration::from_secs(1),
            dirtied: 90 * MIB,
        });
        convergence
    }

    #[test]
    fn what_is_left_is_predicted_at_the_measured_rate() {
        let convergence = convergence(MigrateOptions::default());
        let nothing = convergence.predict(0).total_us();
        assert_eq!(convergence.predict(50 * MIB).total_us(), nothing + 500_000);
        assert_eq!(
            (convergence.rate(), convergence.dirty_rate()),
            (100 * MIB, 90 * MIB)
        );
    }

    #[test]
    fn it_stops_as_soon_as_the_prediction_is_short_enough() {
        let mut convergence = convergence(MigrateOptions::default());
        let now = Instant::now();
        assert_eq!(convergence.decide(50 * MIB, now).unwrap(), Decision::Copy);
        assert_eq!(convergence.decide(29 * MIB, now).unwrap(), Decision::Stop);
        convergence.max_downtime.set(Duration::ZERO);
        assert_eq!(convergence.decide(29 * MIB, now).unwrap(), Decision::Copy);
        assert_eq!(
            convergence.decide(0, now).unwrap(),
            Decision::Stop,
            "nothing is left"
        );
    }

    #[test]
    fn what_is_wanted_may_change_on_the_way() {
        let mut convergence = convergence(MigrateOptions::default());
        let limit = convergence.max_downtime.clone();
        let now = Instant::now();
        for _ in 0..10 {
            assert_eq!(convergence.decide(90 * MIB, now).unwrap(), Decision::Copy);
        }
        limit.set(Duration::from_millis(900));
        assert_eq!(convergence.decide(90 * MIB, now).unwrap(), Decision::Copy);
        limit.set(Duration::from_millis(901));
        assert_eq!(convergence.decide(90 * MIB, now).unwrap(), Decision::Stop);
    }

    #[test]
    fn a_fast_guest_is_reported_and_given_up_after_a_while() {
        let mut convergence = convergence(MigrateOptions::default());
        let now = Instant::now();
        for _ in 0..3 {
            assert!(convergence.is_converging());
            assert_eq!(convergence.decide(90 * MIB, now).unwrap(), Decision::Copy);
        }
        assert_eq!(convergence.decide(90 * MIB, now).unwrap(), Decision::Copy);
        assert!(!convergence.is_converging());
        let late = now + Duration::from_secs(61);
        let error = convergence.decide(90 * MIB, late).unwrap_err().to_string();
        assert!(
            error.contains("dirties 92160 KiB/s and 102400 KiB/s"),
            "{error}"
        );
    }

    #[test]
    fn a_fast_guest_is_slowed_down_by_steps_when_asked() {
        let mut convergence = convergence(MigrateOptions {
            auto_converge: true,
            ..MigrateOptions::default()
        });
        let now = Instant::now();
        let mut steps = Vec::new();
        for _ in 0..40 {
            if let Decision::Throttle(percent) = convergence.decide(90 * MIB, now).unwrap() {
                steps.push(percent);
            }
        }
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99, 99, 99, 99, 99]);
    }

    #[test]
    fn a_gain_starts_the_patience_anew() {
        let mut convergence = convergence(MigrateOptions::default());
        let now = Instant::now();
        for _ in 0..5 {
            convergence.decide(90 * MIB, now).unwrap();
        }
        let late = now + Duration::from_secs(61);
        assert_eq!(convergence.decide(60 * MIB, late).unwrap(), Decision::Copy);
        assert!(convergence.is_converging());
    }
}
