//! The devices as the machine's owner sees them, without a question to the main thread: it may
//! be waiting for just the device that is asked about.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use api::Error;
use api::core::DeviceStatus;

use super::chain;
use crate::remote::device1::DeviceLinks;
use crate::remote::vhost_user::VhostUserDevice;
use crate::transport::VirtioDevice as _;

/// All of them, in the order of the definition.
#[derive(Debug)]
pub struct Devices {
    devices: Vec<Device>,
    links: DeviceLinks,
}

#[derive(Debug)]
struct Device {
    id: String,
    kind: String,
    /// Not owned: they go with the machine.
    backend: Weak<VhostUserDevice>,
}

impl Devices {
    /// Those of a machine, with what links there are.
    pub fn new(backends: &[Arc<VhostUserDevice>], links: DeviceLinks) -> Self {
        let device = |backend: &Arc<VhostUserDevice>| Device {
            id: backend.id().to_owned(),
            kind: backend.kind().to_string(),
            backend: Arc::downgrade(backend),
        };
        Self {
            devices: backends.iter().map(device).collect(),
            links,
        }
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.devices
            .iter()
            .map(|device| device.id.clone())
            .collect()
    }

    /// How one of them does.
    pub async fn status(&self, id: &str) -> Result<DeviceStatus, Error> {
        let device = self.find(id)?;
        let (link, words) = self.links.ask(id).await;
        let ended = || Error::InvalidState("the machine has ended".into());
        let backend = device.backend.upgrade().ok_or_else(ended)?;
        Ok(DeviceStatus {
            kind: device.kind.clone(),
            connected: backend.is_connected(),
            reconnects: backend.reconnects(),
            trouble: backend.failure().map(|e| chain(&*e)).unwrap_or_default(),
            link,
            state: words.state,
            last_error: words.last_error,
            mapped_bytes: words.mapped,
            prefaulted_bytes: words.prefaulted,
            statistics: words.statistics,
        })
    }

    /// Gives one of them a link to its process.
    pub fn attach_link(&self, id: &str, socket: OwnedFd) -> Result<(), Error> {
        self.find(id)?;
        self.links.attach(id, socket).map_err(|error| {
            Error::InvalidArgs(format!("the link to device {id} cannot be used: {error}"))
        })
    }

    fn find(&self, id: &str) -> Result<&Device, Error> {
        let found = self.devices.iter().find(|device| device.id == id);
        found.ok_or_else(|| Error::NoSuchDevice(format!("this machine has no device {id}")))
    }
}
