//! How a broker under test starts processes, and where it is called. The same tests pass in
//! every manner; those with systemd run in emulated hosts, one at a time.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{run, said};

/// The variable that names the manner.
const VARIABLE: &str = "GODWIT_TEST_BROKER";
/// How long units of machines that were killed may take to be gone.
const DEADLINE: Duration = Duration::from_secs(60);

/// How a broker starts processes, and where it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As children, on a private bus.
    Direct,
    /// As units of systemd, on a private bus.
    Units,
    /// As units of systemd, on the system bus.
    SystemBus,
}

impl Manner {
    /// The one that the tests were started for: `direct`, which is the default, `units`, or
    /// `system-bus`, by the variable GODWIT_TEST_BROKER.
    pub fn of_tests() -> Result<Self> {
        match env::var(VARIABLE).as_deref() {
            Err(_) | Ok("direct") => Ok(Self::Direct),
            Ok("units") => Ok(Self::Units),
            Ok("system-bus") => Ok(Self::SystemBus),
            Ok(other) => bail!("{VARIABLE}={other}: give direct, units or system-bus"),
        }
    }

    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            Self::Direct => &[],
            Self::Units => &["--launch", "systemd"],
            Self::SystemBus => &["--launch", "systemd", "--system"],
        }
    }

    /// Whether processes are units.
    pub fn has_units(self) -> bool {
        self != Self::Direct
    }

    /// Lets systemd forget that units of declared machines were killed, which it shows otherwise.
    pub(crate) fn forget_killed(self) {
        if self.has_units() {
            // What is left nevertheless is found by the next test.
            let _ = run(
                "systemctl",
                "systemd",
                &["reset-failed", "godwit-machine@*"],
            );
        }
    }

    /// Units of machines that are still there when those that end have ended.
    pub(crate) fn leftovers(self) -> Result<Vec<String>> {
        if !self.has_units() {
            return Ok(Vec::new());
        }
        let end = Instant::now() + DEADLINE;
        loop {
            let units = units()?;
            if units.is_empty() || Instant::now() > end {
                return Ok(units);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Units of machines, also those that have failed.
fn units() -> Result<Vec<String>> {
    let listed = said(run(
        "systemctl",
        "systemd",
        &["list-units", "--all", "--plain", "--no-legend", "godwit-*"],
    )?)?;
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let units: Vec<_> = names
        .filter(|name| *name != "godwit-broker.service")
        .map(str::to_owned)
        .collect();
    Ok(units)
}
