//! What the owner hands over for a migration, and how it wants it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use migration::ram::MAX_CHANNELS;
use serde::{Deserialize, Serialize};

use super::MigrationError;
use super::unit::Unit;

/// Connected sockets between two cores and their devices, the same on both sides.
#[derive(Debug)]
pub struct Sockets {
    /// Between the cores.
    pub control: OwnedFd,
    /// For memory; none where both cores map the same.
    pub ram: Vec<OwnedFd>,
    /// From device to device, by id.
    pub states: BTreeMap<String, OwnedFd>,
}

/// How the machine is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct MigrateOptions {
    /// The stop begins when it is predicted to be shorter, in milliseconds.
    pub max_downtime_ms: u64,
    /// A stop that lasts longer is given up, in milliseconds: the machine goes on where it was.
    pub blackout_limit_ms: u64,
    /// A guest that dirties memory too fast is slowed down.
    pub auto_converge: bool,
    /// Memory is not sent: the destination maps the same file.
    pub shared_memory: bool,
    /// A migration that does not converge is given up after so many seconds of it.
    pub patience_s: u64,
    /// Most bytes of memory a second while the guest runs; 0: as many as the link carries.
    pub max_bandwidth: u64,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            max_downtime_ms: 300,
            blackout_limit_ms: 10_000,
            auto_converge: false,
            shared_memory: false,
            patience_s: 60,
            max_bandwidth: 0,
        }
    }
}

impl MigrateOptions {
    /// The longest stop that is wanted.
    pub fn max_downtime(&self) -> Duration {
        Duration::from_millis(self.max_downtime_ms)
    }

    /// The longest stop that is borne before it is given up.
    pub fn blackout_limit(&self) -> Duration {
        Duration::from_millis(self.blackout_limit_ms)
    }

    /// How long a migration may not converge.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_s)
    }
}

/// The longest stop that is wanted, which the owner may change while the machine is copied. Clones
/// are the same.
#[derive(Clone, Debug)]
pub struct MaxDowntime(Arc<AtomicU64>);

impl MaxDowntime {
    /// As the options have it.
    pub fn new(options: &MigrateOptions) -> Self {
        let this = Self(Arc::default());
        this.set(options.max_downtime());
        this
    }

    /// Counts from the next round on; to the microsecond.
    pub fn set(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.0.store(micros, Ordering::Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

impl Sockets {
    /// Puts the devices' sockets into the order of the devices. There must be one for each device
    /// that has state to move, and no other; and memory channels if memory is copied.
    pub fn take_states(
        &mut self,
        units: &[impl AsRef<Unit>],
        shared_memory: bool,
    ) -> Result<Vec<Option<OwnedFd>>, MigrationError> {
        let wrong = |why: String| Err(MigrationError::Setup(why));
        match (shared_memory, self.ram.len()) {
            (true, 0) => {}
            (true, channels) => {
                return wrong(format!(
                    "{channels} memory channels for memory that is shared"
                ));
            }
            (false, 1..=MAX_CHANNELS) => {}
            (false, channels) => {
                return wrong(format!(
                    "{channels} memory channels are not possible: give 1 to {MAX_CHANNELS}"
                ));
            }
        }
        let mut states = Vec::with_capacity(units.len());
        for unit in units.iter().map(AsRef::as_ref) {
            let state = self.states.remove(&unit.id);
            if state.is_none() && unit.remote.has_state() {
                return wrong(format!("device {} has state and no socket for it", unit.id));
            }
            states.push(state.filter(|_| unit.remote.has_state()));
        }
        match self.states.keys().next() {
            Some(id) => wrong(format!(
                "a socket for the state of {id}, which there is not"
            )),
            None => Ok(states),
        }
    }
}

impl AsRef<Unit> for Unit {
    fn as_ref(&self) -> &Unit {
        self
    }
}
