//! Devices in other processes.

pub mod device1;
mod endpoint;
pub mod vfio_user;
pub mod vhost_user;

pub use endpoint::{DEFAULT_DEADLINE, Endpoint, EndpointError};

/// A device in another process, as the machine's owner sees it.
pub trait RemoteDevice: Send + Sync {
    /// How it does. Waits for nobody.
    fn health(&self) -> Health;
}

/// How a device in another process does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Whether there is a process now.
    pub connected: bool,
    /// How many times a process took the place of another.
    pub reconnects: u32,
    /// Why the device does not work any more, or empty.
    pub trouble: String,
}
