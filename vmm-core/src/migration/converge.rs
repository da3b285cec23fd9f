//! When to stop: how long the blackout would be, and what to do when it gets no shorter.

use std::time::{Duration, Instant};

use super::MigrationError;
use super::saved_state::DeviceWiring;
use super::setup::{MaxDowntime, MigrateOptions};

/// Times that the link is crossed and back: the core's state, and the commit.
const LINK_TURNS: u32 = 2;
/// Times that all devices are asked and answer, one after the other: stop and save; the end of loading,
/// start.
const DEVICE_TURNS: u32 = 1;
const DEVICE_TURNS_THERE: u32 = 2;
/// What the rest costs, in times that somebody is woken and wakes in turn, as measured on this host:
/// the cores' threads one after the other, those of memory if it is copied, the first of the
/// devices, and each device and each ring on whatever processor is free.
const CORE_WAKES: u32 = 36;
const MEMORY_WAKES: u32 = 60;
const FIRST_DEVICE_WAKES: u32 = 30;
const DEVICE_WAKES: u32 = 38;
const RING_WAKES: u32 = 1;
/// A rate before anything was measured, in bytes a second: of a link to another host, and within one.
const FIRST_RATE: u64 = 100 << 20;
const FIRST_LOCAL_RATE: u64 = 1 << 30;
/// What one device saves and its twin loads, in bytes a second.
const STATE_RATE: u64 = 400 << 20;
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

/// What else a switchover consists of, as it is at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around {
    /// The link, there and back.
    pub link: Duration,
    /// A thread that is woken and wakes the one that it was woken by.
    pub wake: Duration,
    /// Memory is copied, and not kept.
    pub copies_memory: bool,
    /// Devices that the guest uses, and their rings.
    pub devices_rings: (u32, u32),
    /// Processors of this host.
    pub processors: u32,
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
    /// Bytes of the largest of them.
    pub largest_state: u64,
}

impl Around {
    /// Takes note of how much there is to stop and to start.
    pub(super) fn count(&mut self, devices: &[DeviceWiring]) {
        let rings = |device: &DeviceWiring| {
            let queues = device.state.transport.queues.iter();
            u32::try_from(queues.filter(|queue| queue.enabled).count()).unwrap_or(u32::MAX)
        };
        let used = devices.iter().map(rings).filter(|rings| *rings > 0);
        self.devices_rings = used.fold((0, 0), |(devices, all): (u32, u32), rings| {
            (devices + 1, all.saturating_add(rings))
        });
    }

    fn wakes(&self) -> Duration {
        let (devices, rings) = self.devices_rings;
        let memory = MEMORY_WAKES * u32::from(self.copies_memory);
        let first = FIRST_DEVICE_WAKES * devices.min(1);
        let spread = devices
            .saturating_mul(DEVICE_WAKES)
            .saturating_add(rings.saturating_mul(RING_WAKES));
        let spread = spread / self.processors.max(1);
        self.wake * (CORE_WAKES + memory + first).saturating_add(spread)
    }

    /// How long the devices' states take, over a link of this rate: as many at once as there are
    /// processors, and none faster than it is saved.
    fn states(&self, link: u64) -> Duration {
        let at_once = STATE_RATE.saturating_mul(self.processors.max(1).into());
        transfer(self.largest_state, STATE_RATE).max(transfer(self.state_bytes, at_once.min(link)))
    }
}

/// How long so many bytes take at a rate in bytes a second.
fn transfer(bytes: u64, rate: u64) -> Duration {
    let moved = u128::from(bytes) * 1_000_000 / u128::from(rate.max(1));
    Duration::from_micros(u64::try_from(moved).unwrap_or(u64::MAX))
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
    pub fn predict(&self, remaining: u64) -> Duration {
        let around = &self.around;
        transfer(remaining, self.rate())
            .saturating_add(around.states(self.rate()))
            .saturating_add(around.core + around.wakes() + around.link * LINK_TURNS)
            .saturating_add(around.devices * DEVICE_TURNS)
            .saturating_add(around.devices_there * DEVICE_TURNS_THERE)
            .saturating_add(around.transitions)
    }

    /// What to do when `remaining` bytes are dirty.
    pub fn decide(&mut self, remaining: u64, now: Instant) -> Result<Decision, MigrationError> {
        let predicted = self.predict(remaining);
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
        let mut convergence = convergence(MigrateOptions::default());
        assert_eq!(convergence.predict(0), Duration::ZERO);
        assert_eq!(convergence.predict(50 * MIB), Duration::from_millis(500));
        convergence.found(Around {
            link: Duration::from_micros(100),
            wake: Duration::from_micros(10),
            copies_memory: true,
            devices_rings: (3, 10),
            processors: 2,
            core: Duration::from_micros(400),
            devices: Duration::from_micros(1000),
            devices_there: Duration::from_micros(2000),
            transitions: Duration::from_millis(200),
            state_bytes: 10 * MIB,
            largest_state: 10 * MIB,
        });
        assert_eq!(
            convergence.predict(50 * MIB),
            Duration::from_micros(600_000 + 400 + 1880 + 200 + 1000 + 4000 + 200_000)
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
        limit.set(Duration::from_millis(899));
        assert_eq!(convergence.decide(90 * MIB, now).unwrap(), Decision::Copy);
        limit.set(Duration::from_millis(900));
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
