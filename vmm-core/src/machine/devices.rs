//! The devices as the machine's owner sees them, without a question to the main thread: it may
//! be waiting for just the device that is asked about.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use api::Error;
use api::core::DeviceStatus;

use crate::remote::RemoteDevice;
use crate::remote::device1::{Balloon, BalloonSize, DeviceLinks};
use crate::remote::vfio_user::VfioUserDevice;
use crate::remote::vhost_user::VhostUserDevice;
use crate::transport::{DeviceKind, VirtioDevice as _};

/// All of them, in the order of the definition.
pub struct Devices {
    devices: Vec<Device>,
    links: Arc<DeviceLinks>,
}

struct Device {
    id: String,
    kind: String,
    /// Not owned: they go with the machine.
    remote: Weak<dyn RemoteDevice>,
}

impl Devices {
    /// Those of a machine, with what links there are.
    pub fn new(
        backends: &[Arc<VhostUserDevice>],
        pci_devices: &[VfioUserDevice],
        links: Arc<DeviceLinks>,
    ) -> Self {
        let virtio = backends.iter().map(|backend| Device {
            id: backend.id().to_owned(),
            kind: backend.kind().to_string(),
            remote: Arc::downgrade(backend) as _,
        });
        let pci = pci_devices.iter().map(|device| Device {
            id: device.id().to_owned(),
            kind: "vfio".into(),
            remote: Arc::downgrade(&device.remote()),
        });
        Self {
            devices: virtio.chain(pci).collect(),
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
        let health = device.remote.upgrade().ok_or_else(ended)?.health();
        Ok(DeviceStatus {
            kind: device.kind.clone(),
            connected: health.connected,
            reconnects: health.reconnects,
            trouble: health.trouble,
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

    /// How large one of them is, which must be a balloon.
    pub async fn balloon_size(&self, id: &str) -> Result<BalloonSize, Error> {
        self.balloon(id)?.size().await
    }

    /// Asks for a size of one of them, which must be a balloon.
    pub async fn set_balloon_target(&self, id: &str, bytes: u64) -> Result<(), Error> {
        self.balloon(id)?.set_target(bytes).await
    }

    /// Seconds between two questions for statistics of one of them, which must be a balloon.
    pub async fn balloon_statistics_interval(&self, id: &str) -> Result<u32, Error> {
        self.balloon(id)?.statistics_interval().await
    }

    /// Has one of them, which must be a balloon, ask as often.
    pub async fn set_balloon_statistics_interval(
        &self,
        id: &str,
        seconds: u32,
    ) -> Result<(), Error> {
        self.balloon(id)?.set_statistics_interval(seconds).await
    }

    fn balloon(&self, id: &str) -> Result<Balloon, Error> {
        if self.find(id)?.kind != DeviceKind::BALLOON.to_string() {
            return Err(Error::InvalidArgs(format!("device {id} is no balloon")));
        }
        self.links.balloon(id).ok_or_else(|| {
            Error::DeviceFailed(format!("the process of balloon {id} does not answer"))
        })
    }

    fn find(&self, id: &str) -> Result<&Device, Error> {
        let found = self.devices.iter().find(|device| device.id == id);
        found.ok_or_else(|| Error::NoSuchDevice(format!("this machine has no device {id}")))
    }
}
