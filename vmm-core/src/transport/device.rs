//! What the transport needs of a device, and what it gives it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::DeviceKind;

/// Which queue of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(pub u16);

impl fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a device goes on in a ring: for split rings the index of the next available
/// descriptor chain, modulo 2^16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingBase(pub u16);

/// A queue that the driver has enabled.
#[derive(Debug)]
pub struct ActivatedQueue {
    /// Which.
    pub index: QueueIndex,
    /// Descriptors: a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest-physical address of the device area (used ring).
    pub device: u64,
    /// Where to go on.
    pub base: RingBase,
    /// Signalled when the guest has made buffers available.
    pub kick: Arc<EventFd>,
    /// To be signalled when buffers were used.
    pub call: Arc<EventFd>,
}

/// A queue that was stopped, and where it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoppedQueue {
    /// Which.
    pub index: QueueIndex,
    /// Where.
    pub base: RingBase,
}

/// A device did not do what it was asked. The cause says which and why.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct DeviceError(Box<dyn Error + Send + Sync>);

impl DeviceError {
    /// Wraps a device's own error.
    pub fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(cause.into())
    }

    /// What was wrapped.
    pub fn cause(&self) -> &(dyn Error + 'static) {
        &*self.0
    }
}

/// Hears of devices that do not work any more.
pub trait TroubleSink: Send + Sync {
    /// Notes that `device` failed; must not block.
    fn trouble(&self, device: &str, error: &(dyn Error + 'static));
}

/// What a device tells its transport, from any thread. No call blocks.
pub trait DeviceNotifier: Send + Sync {
    /// The device's configuration changes: `change` puts the new one in place, and the
    /// driver is interrupted. A driver that reads it meanwhile finds another generation,
    /// and reads it again.
    fn config_changed(&self, change: &mut dyn FnMut());
    /// The device cannot go on before a reset: the driver and the machine are told.
    fn trouble(&self, error: &(dyn Error + 'static));
}

/// A device behind the transport.
///
/// Calls that may wait for another process (activate, stop, reset, write_config) end
/// within a deadline of the device's own.
pub trait VirtioDevice: Send + Sync {
    /// The name for messages.
    fn name(&self) -> String;
    /// The device type.
    fn kind(&self) -> DeviceKind;
    /// Feature bits offered to the driver.
    fn features(&self) -> u64;
    /// Queues that the driver finds; at most [`super::MAX_QUEUES`].
    fn queues(&self) -> u16;
    /// Largest queue size in descriptors, a power of two.
    fn max_queue_size(&self) -> u16;
    /// Whom to tell; called once, before anything else.
    fn set_notifier(&self, notifier: Arc<dyn DeviceNotifier>);
    /// Fills `data` from the device configuration at `offset`, with zeros beyond its end.
    fn read_config(&self, offset: u32, data: &mut [u8]);
    /// Takes a driver's write to the device configuration.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError>;
    /// Prepares to start these queues, as far as it can be done before they run: how a machine that
    /// moves in is wired ahead. It may be called many times, and means nothing by itself.
    fn wire(&self, features: u64, queues: Vec<ActivatedQueue>) -> Result<(), DeviceError>;
    /// Starts the queues that the driver has enabled, with the features it accepted.
    fn activate(&self, features: u64, queues: Vec<ActivatedQueue>) -> Result<(), DeviceError>;
    /// As [`Self::activate`], but nothing is awaited: [`Self::activated`] must be asked next. Whether
    /// it was ordered; a device that starts in its own way says no.
    fn order_activate(
        &self,
        _features: u64,
        _queues: Vec<ActivatedQueue>,
    ) -> Result<bool, DeviceError> {
        Ok(false)
    }
    /// Waits until queues run whose start was ordered.
    fn activated(&self, _within: Duration) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Whether queues that start are looked at, and their driver called, without a kick.
    fn looks_at_rings(&self) -> bool;
    /// Stops every activated queue, drained, and says where each goes on.
    fn stop(&self) -> Result<Vec<StoppedQueue>, DeviceError>;
    /// Stops whatever runs and forgets everything that the driver did.
    fn reset(&self) -> Result<(), DeviceError>;
}
