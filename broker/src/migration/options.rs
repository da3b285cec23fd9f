//! How a machine is to move, as the caller wants it.

use std::collections::HashMap;

use api::{Dictionary, Error};
use serde::{Deserialize, Serialize};
use zbus::OwnedVariant;

/// Most channels for memory.
const MAX_CHANNELS: u64 = migration::ram::MAX_CHANNELS as u64;
/// Longest times that are taken, in milliseconds and seconds: a day.
const MAX_MS: u64 = 86_400_000;
const MAX_S: u64 = 86_400;
/// Least bytes of memory a second: with less the other side would take a pause for a loss.
const MIN_BANDWIDTH: u64 = 1 << 20;

/// How a machine is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Options {
    /// Connections for memory.
    pub(crate) channels: usize,
    /// The stop begins when it is predicted to be shorter, in microseconds.
    pub(crate) max_downtime_usec: u64,
    /// A stop that lasts longer is given up.
    pub(crate) blackout_limit_ms: u64,
    /// How long a migration that does not converge goes on.
    pub(crate) patience_s: u64,
    /// A guest that is too fast is slowed down.
    pub(crate) auto_converge: bool,
    /// Most bytes of memory a second while the guest runs.
    pub(crate) max_bandwidth: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            channels: 2,
            max_downtime_usec: 300_000,
            blackout_limit_ms: 10_000,
            patience_s: 60,
            auto_converge: false,
            max_bandwidth: None,
        }
    }
}

impl Options {
    /// Of a caller's dictionary.
    ///
    /// # Errors
    /// Something is unknown, of another type, or too much.
    pub(crate) fn parse(dictionary: Dictionary) -> Result<Self, Error> {
        let mut options = Self::default();
        for (key, value) in dictionary {
            match key.as_str() {
                "channels" => {
                    let channels = number(&key, &value, 1..=MAX_CHANNELS)?;
                    options.channels = usize::try_from(channels).unwrap_or(1);
                }
                "max-downtime-ms" => {
                    options.max_downtime_usec = 1000 * number(&key, &value, 0..=MAX_MS)?;
                }
                "blackout-limit-ms" => {
                    options.blackout_limit_ms = number(&key, &value, 1..=MAX_MS)?;
                }
                "patience-s" => options.patience_s = number(&key, &value, 0..=MAX_S)?,
                "max-bandwidth" => {
                    let limit = number(&key, &value, MIN_BANDWIDTH..=u64::MAX)?;
                    options.max_bandwidth = Some(limit);
                }
                "auto-converge" => {
                    options.auto_converge = bool::try_from(value).map_err(|_| {
                        Error::InvalidArgs(format!("option {key} is not a boolean"))
                    })?;
                }
                _ => {
                    return Err(Error::InvalidArgs(format!(
                        "{key} is no option of a migration: there are channels, max-downtime-ms, \
                         blackout-limit-ms, patience-s, max-bandwidth, auto-converge"
                    )));
                }
            }
        }
        Ok(options)
    }

    /// Changes the longest stop that is wanted.
    ///
    /// # Errors
    /// It is longer than a day.
    pub(crate) fn set_max_downtime(&mut self, usec: u64) -> Result<(), Error> {
        if usec > 1000 * MAX_MS {
            return Err(Error::InvalidArgs(format!(
                "MaxDowntimeUSec {usec} is more than a day: give at most {}",
                1000 * MAX_MS
            )));
        }
        self.max_downtime_usec = usec;
        Ok(())
    }

    /// As a core takes them.
    pub(crate) fn for_core(&self, shared_memory: bool) -> HashMap<String, OwnedVariant> {
        HashMap::from([
            (
                "max-downtime-ms".into(),
                (self.max_downtime_usec / 1000).into(),
            ),
            ("blackout-limit-ms".into(), self.blackout_limit_ms.into()),
            ("patience-s".into(), self.patience_s.into()),
            (
                "max-bandwidth".into(),
                self.max_bandwidth.unwrap_or(0).into(),
            ),
            ("auto-converge".into(), self.auto_converge.into()),
            ("shared-memory".into(), shared_memory.into()),
        ])
    }
}

/// A number, of whatever integer type the caller chose.
pub(crate) fn number(
    key: &str,
    value: &OwnedVariant,
    possible: std::ops::RangeInclusive<u64>,
) -> Result<u64, Error> {
    let number = value
        .downcast_ref::<u64>()
        .ok()
        .or_else(|| value.downcast_ref::<u32>().ok().map(u64::from))
        .or_else(|| u64::try_from(value.downcast_ref::<i32>().ok()?).ok())
        .or_else(|| u64::try_from(value.downcast_ref::<i64>().ok()?).ok());
    number
        .filter(|number| possible.contains(number))
        .ok_or_else(|| {
            Error::InvalidArgs(format!(
                "option {key}: give an integer from {} to {}",
                possible.start(),
                possible.end()
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: impl Into<OwnedVariant>) -> Dictionary {
        HashMap::from([(key.to_owned(), value.into())])
    }

    #[test]
    fn options_are_read_whatever_their_integer_type() {
        assert_eq!(
            Options::parse(Dictionary::new()).unwrap(),
            Options::default()
        );
        assert_eq!(Options::parse(one("channels", 4u32)).unwrap().channels, 4);
        let options = Options::parse(one("max-downtime-ms", 20u64)).unwrap();
        assert_eq!(options.max_downtime_usec, 20_000);
        assert!(
            Options::parse(one("auto-converge", true))
                .unwrap()
                .auto_converge
        );
    }

    #[test]
    fn impossible_ones_are_named() {
        for (given, said) in [
            (one("channels", 17u32), "option channels: give an integer"),
            (one("channels", 0u32), "option channels: give an integer"),
            (one("max-downtime-ms", true), "option max-downtime-ms"),
            (one("auto-converge", 1u32), "auto-converge is not a boolean"),
            (
                one("max-bandwidth", 1u32),
                "option max-bandwidth: give an integer from 1048576",
            ),
            (one("speed", 1u32), "speed is no option"),
        ] {
            let error = Options::parse(given).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
