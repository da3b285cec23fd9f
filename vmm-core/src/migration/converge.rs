//! When to stop: how long the blackout would be, and what to do when it gets no shorter.

use std::time::{Duration, Instant};

use super::MigrationError;
use super::setup::MigrateOptions;

/// Times that the link is crossed and back: the core's state, and the commit.
const LINK_TURNS: u32 = 2;
/// Times that all devices are asked and answer, one after the other: stop and save, locks; the end
/// of loading, start.
const DEVICE_TURNS: u32 = 2;
const DEVICE_TURNS_THERE: u32 = 2;
/// Times that somebody is woken and wakes in turn: vCPUs to stop, the ends of the memory channels on
/// both sides, vCPUs to go on; and on each crossing of the link.
const WAKE_TURNS: u32 = 4 + LINK_TURNS;
/// A rate before anything was measured, in bytes a second.
const FIRST_RATE: u64 = 100 << 20;
/// A round that sends less says nothing about the rate.
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

/// What else a switchover consists of, as it is at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around {
    /// The link, there and back.
    pub link: Duration,
    /// A thread that is woken and wakes the one that it was woken by.
    pub wake: Duration,
    /// The core's state: saved and loaded.
    pub core: Duration,
    /// All devices asked something at once: until the last has answered.
    pub devices: Duration,
    /// The same at the destination.
    pub devices_there: Duration,
    /// The slowest device's own time to stop, and the slowest one's to start.
    pub transitions: Duration,
    /// Bytes of the devices' states.
    pub state_bytes: u64,
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
    around: Around,
    rate: u64,
    dirty_rate: u64,
    last: Option<Duration>,
    rounds_without_gain: u32,
    stuck_since: Option<Instant>,
    throttle: u32,
}

impl Convergence {
    /// Nothing is known yet.
    pub fn new(options: MigrateOptions) -> Self {
        Self {
            options,
            around: Around::default(),
            rate: FIRST_RATE,
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
        if round.sent >= LEAST_MEASURED {
            self.rate = per_second(round.sent).max(1);
        }
        self.dirty_rate = per_second(round.dirtied);
    }

    /// Takes note of what is measured besides.
    pub fn found(&mut self, around: Around) {
        self.around = around;
    }

    /// How long the blackout would be with `remaining` bytes of memory left.
    pub fn predict(&self, remaining: u64) -> Duration {
        let around = &self.around;
        let bytes = remaining.saturating_add(around.state_bytes);
        let moved = u128::from(bytes) * 1_000_000 / u128::from(self.rate);
        Duration::from_micros(u64::try_from(moved).unwrap_or(u64::MAX))
            .saturating_add(around.core + around.wake * WAKE_TURNS + around.link * LINK_TURNS)
            .saturating_add(around.devices * DEVICE_TURNS)
            .saturating_add(around.devices_there * DEVICE_TURNS_THERE)
            .saturating_add(around.transitions)
    }

    /// What to do when `remaining` bytes are dirty.
    pub fn decide(&mut self, remaining: u64, now: Instant) -> Result<Decision, MigrationError> {
        let predicted = self.predict(remaining);
        if predicted <= self.options.max_downtime() || remaining == 0 {
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
                sent: self.rate,
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
        self.rate
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
        let mut convergence = Convergence::new(options);
        convergence.measured(Measured {
            sent: 100 * MIB,
            time: Duration::from_secs(1),
            dirtied: 90 * MIB,
        });
        convergence
    }

    #[test]
    fn what_is_left_is_predicted_at_the_measured_rate() {
        let mut convergence = convergence(MigrateOptions::default());
        assert_eq!(convergence.predict(0), Duration::ZERO);
        assert_eq!(convergence.predict(50 * MIB), Duration::from_millis(500));
        convergence.found(Around {
            link: Duration::from_micros(100),
            wake: Duration::from_micros(10),
            core: Duration::from_micros(400),
            devices: Duration::from_micros(1000),
            devices_there: Duration::from_micros(2000),
            transitions: Duration::from_millis(200),
            state_bytes: 10 * MIB,
        });
        assert_eq!(
            convergence.predict(50 * MIB),
            Duration::from_micros(600_000 + 400 + 60 + 200 + 2000 + 4000 + 200_000)
        );
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
        let mut hopeless = convergence;
        hopeless.options.max_downtime_ms = 0;
        assert_eq!(
            hopeless.decide(0, now).unwrap(),
            Decision::Stop,
            "nothing is left"
        );
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
