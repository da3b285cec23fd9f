//! Mechanisms that can be left out, so that a benchmark can say what each is worth.

use std::collections::BTreeSet;
use std::str::FromStr;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::MigrationError;

/// What makes a stop short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mechanism {
    /// Devices map memory and know their rings before the stop. Without it they are told when they
    /// start.
    EarlyMap,
    /// Devices and KVM know the layout of memory before the stop, by one change. Without it they are
    /// told again in the stop, region by region, as by a machine that is made while it arrives.
    Layout,
    /// All devices stop, save, load and start at once. Without it one after the other.
    Parallel,
    /// A device's state goes straight to its twin. Without it through both cores, one device's after
    /// the other's.
    Channels,
}

/// A word that names no mechanism.
#[derive(Debug, Error)]
#[error("{0:?} is no mechanism: there are early-map, layout, parallel, channels")]
pub struct NoMechanism(String);

impl FromStr for Mechanism {
    type Err = NoMechanism;

    fn from_str(word: &str) -> Result<Self, NoMechanism> {
        match word {
            "early-map" => Ok(Self::EarlyMap),
            "layout" => Ok(Self::Layout),
            "parallel" => Ok(Self::Parallel),
            "channels" => Ok(Self::Channels),
            word => Err(NoMechanism(word.into())),
        }
    }
}

/// What is left out; nothing in earnest.
#[derive(Clone, Debug, Default)]
pub struct Without(BTreeSet<Mechanism>);

impl Without {
    /// Whether this is left out.
    pub fn has(&self, mechanism: Mechanism) -> bool {
        self.0.contains(&mechanism)
    }
}

impl FromIterator<Mechanism> for Without {
    fn from_iter<I: IntoIterator<Item = Mechanism>>(mechanisms: I) -> Self {
        Self(mechanisms.into_iter().collect())
    }
}

/// Lets devices do something one after the other, in their order.
#[derive(Debug, Default)]
pub(super) struct Turns {
    next: Mutex<usize>,
    passed: Condvar,
}

impl Turns {
    /// Does `work` when all devices before `number` have had their turn.
    pub(super) fn take<T>(
        &self,
        number: usize,
        within: Duration,
        work: impl FnOnce() -> Result<T, MigrationError>,
    ) -> Result<T, MigrationError> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .passed
            .wait_timeout_while(next, within, |next| *next < number);
        let (next, late) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(next);
        let done = if late.timed_out() {
            Err(MigrationError::Setup(format!(
                "the devices before number {number} were not done within {} s",
                within.as_secs()
            )))
        } else {
            work()
        };
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = number + 1;
        self.passed.notify_all();
        done
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn words_name_mechanisms() {
        let without: Without = ["parallel", "early-map"]
            .iter()
            .map(|word| word.parse::<Mechanism>().unwrap())
            .collect();
        assert!(without.has(Mechanism::Parallel) && without.has(Mechanism::EarlyMap));
        assert!(!without.has(Mechanism::Channels));
        let error = "magic".parse::<Mechanism>().unwrap_err().to_string();
        assert!(error.starts_with("\"magic\" is no mechanism"), "{error}");
    }

    #[test]
    fn turns_come_in_order_and_failures_pass_them_on() {
        let turns = Turns::default();
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for number in [2, 1, 0] {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _ = turns.take(number, Duration::from_secs(60), || {
                        order.lock().unwrap().push(number);
                        Err::<(), _>(MigrationError::RamStalled)
                    });
                });
            }
        });
        assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
    }

    #[test]
    fn who_waits_too_long_says_so() {
        let turns = Turns::default();
        let late = turns.take(1, Duration::from_millis(10), || Ok(()));
        assert!(late.unwrap_err().to_string().contains("before number 1"));
    }
}
