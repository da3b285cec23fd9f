//! What outlives a session, and what only one process may have.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use migration::schema::UnitId;

use super::ConfigChange;
use crate::device::{Device, OptionError};
use crate::health::Health;
use crate::memory::Prefaulter;
use crate::metrics::Metrics;
use crate::queue_threads::QueueThreads;

/// How long a machine that starts waits for somebody else who has what only one process may have: a
/// guest stands still meanwhile.
const PATIENCE: Duration = Duration::from_millis(200);

/// What outlives a session.
#[derive(Debug)]
pub(crate) struct Services<D> {
    pub(crate) device: Arc<D>,
    /// Whether the device has what only one process may have.
    pub(crate) held: Mutex<bool>,
    pub(crate) queues: QueueThreads,
    pub(crate) unit: UnitId,
    pub(crate) prefault: Prefaulter,
    pub(crate) metrics: Metrics,
    pub(crate) config_change: ConfigChange,
    pub(crate) health: Health,
}

impl<D: Device> Services<D> {
    /// Takes what only one process may have, if it is not held.
    pub(crate) fn acquire(&self) -> Result<(), OptionError> {
        self.hold(true, |device| device.acquire(PATIENCE))
    }

    /// Gives it up, if it is held.
    pub(crate) fn release(&self) -> Result<(), OptionError> {
        self.hold(false, D::release)
    }

    fn hold(
        &self,
        hold: bool,
        change: impl FnOnce(&D) -> Result<(), OptionError>,
    ) -> Result<(), OptionError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if *held != hold {
            change(&self.device)?;
            *held = hold;
        }
        Ok(())
    }
}
