//! Barriers: points of a migration that all units pass together.
//!
//! | | passed when |
//! |---|---|
//! | A | the destination has everything: memory mapped, devices there and wired |
//! | B | every vCPU is out of the guest |
//! | C | no device starts access to another device any more |
//! | D | every device has stopped: dirty logs are final |
//! | E | the destination has loaded and verified every unit |
//! | F | every device at the destination may be accessed by every other |
//!
//! Each is waited for with a deadline, and each wait is in the report.

use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use migration::report::Recorder;

use super::MigrationError;

/// How often a wait looks at what else there is.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Which barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// The destination is ready.
    A,
    /// All vCPUs are out.
    B,
    /// Nobody starts peer access.
    C,
    /// All devices have stopped.
    D,
    /// All is loaded.
    E,
    /// All devices are back.
    F,
}

impl Barrier {
    /// Its name in a report.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "barrier A",
            Self::B => "barrier B",
            Self::C => "barrier C",
            Self::D => "barrier D",
            Self::E => "barrier E",
            Self::F => "barrier F",
        }
    }
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A unit is at a barrier, or will never be.
#[derive(Debug)]
pub struct Arrival<T> {
    /// Number of the unit.
    pub unit: usize,
    /// When it began what it had to do.
    pub start: Instant,
    /// When it was done.
    pub end: Instant,
    /// What came of it.
    pub result: Result<T, MigrationError>,
}

/// Waits until each of `units` has arrived once; what each brought, in their order. The first that
/// failed fails all, at once.
pub fn wait<T>(
    barrier: Barrier,
    what: &'static str,
    units: &[String],
    arrivals: &Receiver<Arrival<T>>,
    within: Duration,
    recorder: &mut Recorder,
) -> Result<Vec<T>, MigrationError> {
    let nothing = |_| Ok(());
    wait_while(nothing, barrier, what, units, arrivals, within, recorder)
}

/// As [`wait`]; now and then `look` is told for how long, and may end it.
pub fn wait_while<T>(
    mut look: impl FnMut(Duration) -> Result<(), MigrationError>,
    barrier: Barrier,
    what: &'static str,
    units: &[String],
    arrivals: &Receiver<Arrival<T>>,
    within: Duration,
    recorder: &mut Recorder,
) -> Result<Vec<T>, MigrationError> {
    let begin = Instant::now();
    let end = begin + within;
    let mut brought: Vec<Option<T>> = units.iter().map(|_| None).collect();
    let mut left = units.len();
    while left > 0 {
        let time = end.saturating_duration_since(Instant::now());
        let arrival = match arrivals.recv_timeout(time.min(LOOK_EVERY)) {
            Err(RecvTimeoutError::Timeout) if time > LOOK_EVERY => {
                look(begin.elapsed())?;
                continue;
            }
            arrival => arrival,
        };
        let Ok(arrival) = arrival else {
            let missing = units.iter().zip(&brought).filter(|(_, b)| b.is_none());
            return Err(MigrationError::Late {
                barrier,
                units: missing.map(|(unit, _)| unit.clone()).collect(),
                within,
            });
        };
        let Some(unit) = units.get(arrival.unit) else {
            continue;
        };
        recorder.note_span(unit, what, arrival.start, arrival.end, 0);
        let value = arrival.result.map_err(|source| MigrationError::Device {
            device: unit.clone(),
            what,
            source: Box::new(source),
        })?;
        left -= usize::from(brought[arrival.unit].replace(value).is_none());
    }
    recorder.note("core", barrier.name(), begin, 0);
    Ok(brought.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn arrival(unit: usize, result: Result<u32, MigrationError>) -> Arrival<u32> {
        Arrival {
            unit,
            start: Instant::now(),
            end: Instant::now(),
            result,
        }
    }

    fn names() -> Vec<String> {
        vec!["disk0".into(), "net0".into()]
    }

    #[test]
    fn all_must_arrive_and_come_out_in_order() {
        let (sender, arrivals) = channel();
        let mut recorder = Recorder::start();
        sender.send(arrival(1, Ok(11))).unwrap();
        sender.send(arrival(0, Ok(10))).unwrap();
        let long = Duration::from_secs(60);
        let brought = wait(Barrier::D, "stop", &names(), &arrivals, long, &mut recorder);
        assert_eq!(brought.unwrap(), [10, 11]);
        assert!(recorder.side().span("core", "barrier D").is_some());
        assert!(recorder.side().span("net0", "stop").is_some());
    }

    #[test]
    fn who_is_late_is_named() {
        let (sender, arrivals) = channel();
        sender.send(arrival(0, Ok(10))).unwrap();
        let short = Duration::from_millis(20);
        let error = wait(
            Barrier::D,
            "stop",
            &names(),
            &arrivals,
            short,
            &mut Recorder::start(),
        );
        assert_eq!(
            error.unwrap_err().to_string(),
            "barrier D: [\"net0\"] did not arrive within 20 ms"
        );
    }

    #[test]
    fn a_look_may_end_the_wait() {
        let (_sender, arrivals) = channel::<Arrival<u32>>();
        let mut looks = 0;
        let look = |_| {
            looks += 1;
            match looks {
                3 => Err(MigrationError::Setup("seen enough".into())),
                _ => Ok(()),
            }
        };
        let error = wait_while(
            look,
            Barrier::E,
            "load",
            &names(),
            &arrivals,
            Duration::from_secs(3600),
            &mut Recorder::start(),
        );
        assert!(matches!(error, Err(MigrationError::Setup(_))));
    }

    #[test]
    fn who_fails_ends_the_wait_at_once() {
        let (sender, arrivals) = channel();
        let why = MigrationError::Setup("it will not".into());
        sender.send(arrival(1, Err(why))).unwrap();
        let error = wait(
            Barrier::E,
            "load",
            &names(),
            &arrivals,
            Duration::from_secs(3600),
            &mut Recorder::start(),
        );
        assert_eq!(error.unwrap_err().to_string(), "device net0 did not load");
    }
}
