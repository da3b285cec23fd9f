//! The device as a program's server: one front-end after the other is served by vfio-user.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use device_kit::{
    BalloonProcess, Capabilities, DeviceProcess, Health, HostError, Identity, Lent, LinkError,
    OpenError, Prefault, ServeResult, Server, Status, chain,
};
use migration::schema::UnitId;
use migration::state::DeviceState;
use nix::sys::eventfd::{EfdFlags, EventFd};
use prometheus_client::metrics::counter::Counter;
use vfio_user::{
    Device, DeviceInfo, DmaLog, DmaRegion, Errno, IrqAction, IrqInfo, Migration, Region, serve,
};

use crate::config::Options;
use crate::kernel::{self, Kernel};
use crate::metrics::Metrics;
use crate::synthetic::Synthetic;

/// A message that has begun arrives within this time, and an answer leaves within it.
const DEADLINE: Duration = Duration::from_secs(5);

/// The device and what counts for it.
pub(crate) struct Vfio {
    device: Mutex<Box<dyn Device + Send>>,
    metrics: Metrics,
    health: Health,
    unit: UnitId,
    /// Never signalled: a session ends with its stream.
    stop: EventFd,
}

impl Server for Vfio {
    type Options = Options;

    const CAPABILITIES: Capabilities = Capabilities {
        device_type: "vfio",
        features: &["host", "synthetic"],
        program: "godwit-vfio",
        about: "A PCI device that is passed through to a guest, as a vfio-user server",
    };
    const IOCTLS: &'static [u32] = kernel::AT_WORK;
    const KIND: &'static str = "vfio";

    fn open(options: Options, lent: Lent<'_>) -> Result<Self, OpenError> {
        let metrics = Metrics::register(lent.registry.sub_registry_with_prefix(Self::KIND));
        let Options { source, host_fd } = options;
        let device: Box<dyn Device + Send> = match source.host {
            Some(address) => Box::new(Kernel::open(&address, host_fd)?),
            // The command line has one of the two.
            None => Box::new(Synthetic::new(metrics.clone())?),
        };
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        lent.health.set_state(DeviceState::Running);
        Ok(Vfio {
            device: Mutex::new(device),
            metrics,
            health: lent.health,
            unit: lent.unit,
            stop: stop.map_err(|error| HostError::new("cannot make an eventfd", error))?,
        })
    }

    fn start(self: &Arc<Self>) -> Result<(), HostError> {
        Ok(())
    }

    fn serve(self: &Arc<Self>, stream: UnixStream) -> ServeResult {
        self.metrics.sessions.inc();
        self.health.set_connected(true);
        tracing::info!("front-end connected");
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let mut watched = Watched {
            device: &mut **device,
            metrics: &self.metrics,
            health: &self.health,
        };
        match serve(&stream, &mut watched, self.stop.as_fd(), DEADLINE) {
            Ok(_) => tracing::info!("front-end disconnected"),
            Err(error) => {
                self.metrics.failed_sessions.inc();
                let reason = chain(&error);
                tracing::warn!(reason, "session ended by an error");
                self.health.error(&reason);
            }
        }
        self.health.set_connected(false);
        Ok(())
    }

    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>> {
        None
    }
}

impl DeviceProcess for Vfio {
    fn identity(&self) -> Identity {
        Identity {
            kind: Self::KIND.to_owned(),
            unit: self.unit.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn status(&self) -> Status {
        let standing = self.health.standing();
        let mapped = u64::try_from(self.metrics.dma_bytes.get()).unwrap_or(0);
        Status {
            state: standing.state.to_string(),
            connected: standing.connected,
            last_error: standing.last_error,
            mapped,
            prefaulted: mapped,
            prefaulting: false,
        }
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let errors = ("errors", self.health.standing().errors);
        self.metrics
            .totals()
            .chain([errors])
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    }

    /// Memory is mapped when the device is given it, and nothing is left to do ahead.
    fn prefault(&self, _: Prefault) -> Result<(), LinkError> {
        Ok(())
    }

    fn cancel_prefault(&self) {}
}

/// A device whose use is counted, and whose trouble is told.
struct Watched<'a> {
    device: &'a mut (dyn Device + Send),
    metrics: &'a Metrics,
    health: &'a Health,
}

impl Watched<'_> {
    fn accessed(
        &self,
        result: Result<(), Errno>,
        len: usize,
        bytes: &Counter,
    ) -> Result<(), Errno> {
        self.metrics.requests.inc();
        match result {
            Ok(()) => _ = bytes.inc_by(len as u64),
            Err(_) => _ = self.metrics.failed.inc(),
        }
        result
    }

    fn trouble(&self, what: &str, error: Errno) {
        let text = format!("{what}: {}", error.desc());
        tracing::warn!("{text}");
        self.health.error(&text);
    }
}

impl Device for Watched<'_> {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        self.device.region(index)
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        self.device.irq(index)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction<OwnedFd>,
    ) -> Result<(), Errno> {
        self.device
            .set_irqs(index, start, action)
            .inspect_err(|error| self.trouble("interrupts cannot be set up", *error))
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let result = self.device.read(region, offset, data);
        self.accessed(result, data.len(), &self.metrics.bytes_to_guest)
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let result = self.device.write(region, offset, data);
        self.accessed(result, data.len(), &self.metrics.bytes_from_guest)
    }

    fn dma_map(&mut self, region: DmaRegion, memory: Option<OwnedFd>) -> Result<(), Errno> {
        let (address, size) = (region.address, region.size);
        let mapped = self.device.dma_map(region, memory);
        match mapped {
            Ok(()) => {
                self.metrics.dma_maps.inc();
                self.metrics.dma_bytes.inc_by(signed(size));
                self.health.touch();
            }
            Err(error) => {
                // A device of the host pins all that it is given.
                let advice = match error {
                    Errno::ENOMEM => {
                        " (let this process lock as much memory as the guest has, with \
                         LimitMEMLOCK=infinity in its unit, or ulimit -l)"
                    }
                    _ => "",
                };
                let what = format!(
                    "{size:#x} bytes at {address:#x} cannot be given to the device{advice}"
                );
                self.trouble(&what, error);
            }
        }
        mapped
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        let unmapped = self.device.dma_unmap(address, size);
        match unmapped {
            Ok(()) => {
                self.metrics.dma_bytes.dec_by(signed(size));
                self.health.touch();
            }
            Err(error) => {
                let what = format!("{size:#x} bytes at {address:#x} cannot be taken back");
                self.trouble(&what, error);
            }
        }
        unmapped
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        self.device.migration()
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.device.dma_log()
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.metrics.resets.inc();
        self.device
            .reset()
            .inspect_err(|error| self.trouble("the device cannot be reset", *error))
    }
}

fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
