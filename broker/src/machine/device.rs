//! One device of a running machine: its process, and when it is tried again.
//!
//! ```text
//!            process ended                     BACK_OFF, doubled each time
//! running ─────────────────► restarting ─────────────────► running
//!    ▲                           │ MOST_RESTARTS within WINDOW
//!    └──── Restart ──── failed ◄─┘
//! ```

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use api::Error;
use api::device::State as DeviceState;
use tokio::time::Instant;

use super::{DeviceStatus, Machine, MachineState};
use crate::definition::{Device, DeviceKind, Vfio};
use crate::folder::last_words;
use crate::host::Host;
use crate::launch::Program;
use crate::name::MachineName;
use crate::process::{Ended, Process};
use crate::resources::{DeviceResources, FileIdentity};

/// Wait before the first restart.
const BACK_OFF: Duration = Duration::from_millis(10);
/// Longest wait before a restart.
const MAX_BACK_OFF: Duration = Duration::from_secs(2);
/// So many restarts within [`WINDOW`] are tried.
const MOST_RESTARTS: usize = 8;
/// Restarts longer ago than this are forgotten.
const WINDOW: Duration = Duration::from_secs(60);

/// The other ends of a device process's sockets.
#[derive(Debug)]
pub(super) struct Ends {
    /// What the device is served on.
    pub(super) backend: OwnedFd,
    /// `org.godwit.Device1`.
    pub(super) link: OwnedFd,
}

/// A device of a running machine.
#[derive(Debug)]
pub(super) struct RunningDevice {
    pub(super) device: Device,
    pub(super) process: Option<Arc<Process>>,
    /// Counts processes, so that the end of an old one is not taken for that of a new one.
    pub(super) generation: u64,
    pub(super) reconnects: u32,
    /// Another process has the image open and locked, until the machine is here.
    pub(super) shares_image: bool,
    resources: DeviceResources,
    restarts: VecDeque<Instant>,
}

impl RunningDevice {
    /// Opens what it is handed.
    pub(super) fn open(device: Device) -> Result<Self, Error> {
        let resources = DeviceResources::open(&device.kind, None)
            .map_err(|error| Error::ResourceUnavailable(error.to_string()))?;
        Ok(Self::with(device, resources, 0))
    }

    /// One of a machine that is adopted: what it is handed is opened when it is needed.
    pub(super) fn adopt(device: Device, image: Option<FileIdentity>, reconnects: u32) -> Self {
        let resources = DeviceResources {
            descriptors: Vec::new(),
            identity: image,
        };
        Self::with(device, resources, reconnects)
    }

    /// Those of a machine that is adopted, with their processes that still run.
    pub(super) async fn adopt_all(host: &Host, state: &MachineState) -> Vec<Self> {
        let mut devices = Vec::new();
        for (device, record) in state.definition.devices.iter().zip(&state.devices) {
            let mut device = Self::adopt(device.clone(), record.image, record.reconnects);
            if let Some(id) = &record.process {
                device.process = host.launcher.adopt(id).await.ok().map(Arc::new);
            }
            devices.push(device);
        }
        devices
    }

    fn with(device: Device, resources: DeviceResources, reconnects: u32) -> Self {
        Self {
            device,
            process: None,
            generation: 0,
            reconnects,
            shares_image: false,
            resources,
            restarts: VecDeque::new(),
        }
    }

    /// What the bus shows of it.
    pub(super) fn status(&self) -> DeviceStatus {
        let process = self.process.as_ref().map(|process| process.id().clone());
        DeviceStatus {
            state: match process.is_some() || !self.is_ours() {
                true => DeviceState::Running,
                false => DeviceState::Restarting,
            },
            process,
            reason: String::new(),
            reconnects: self.reconnects,
        }
    }

    /// Which file its image is.
    pub(super) fn image(&self) -> Option<FileIdentity> {
        self.resources.identity
    }

    /// Whether its process is ours.
    pub(super) fn is_ours(&self) -> bool {
        self.device.foreign_socket().is_none()
    }

    /// Starts its process; what the core is to have of it.
    pub(super) async fn start(&mut self, host: &Host, machine: &Machine) -> Result<Ends, Error> {
        let declared = machine.from_file;
        let machine = machine.name();
        let failed = |text: String| {
            Error::DeviceFailed(format!("device {} of {machine}: {text}", self.device.id))
        };
        let system = |error: std::io::Error| failed(format!("no process for it: {error}"));
        if self.resources.descriptors.is_empty() && self.is_ours() {
            let known = self.resources.identity;
            self.resources = DeviceResources::open(&self.device.kind, known)
                .map_err(|error| Error::ResourceUnavailable(error.to_string()))?;
        }
        let (backend, served) = UnixStream::pair().map_err(system)?;
        let (link, control) = UnixStream::pair().map_err(system)?;
        let id = self.device.id.as_str();
        let name = match &self.device.kind {
            DeviceKind::Disk(_) => "godwit-blk",
            DeviceKind::Net(_) => "godwit-net",
            DeviceKind::Balloon(_) => "godwit-balloon",
            DeviceKind::Vfio(Vfio::Host(_) | Vfio::Synthetic) => "godwit-vfio",
            DeviceKind::VhostUser(_) | DeviceKind::Vfio(Vfio::Socket(_)) => {
                return Err(failed("its process is not ours".into()));
            }
        };
        let mut program = Program {
            machine: machine.to_string(),
            declared,
            beside: self.shares_image,
            pins_memory: matches!(self.device.kind, DeviceKind::Vfio(Vfio::Host(_))),
            role: id.to_owned(),
            path: host.programs.join(name),
            args: Vec::new(),
            descriptors: Vec::new(),
            log: host
                .folder
                .log(machine, &format!("device-{id}"))
                .map_err(system)?,
        };
        program.hand("--fd", served);
        program.hand("--control-fd", control);
        program.args(["--unit", id]);
        let mut handed = Vec::new();
        for descriptor in &self.resources.descriptors {
            handed.push(
                program
                    .pass(descriptor.try_clone().map_err(system)?)
                    .to_string(),
            );
        }
        let handed = handed.join(",");
        match &self.device.kind {
            DeviceKind::Disk(disk) => {
                let queues = disk.queues.to_string();
                program.args(["--blk-fd", &handed, "--num-queues", &queues]);
                if !disk.serial.is_empty() {
                    program.args(["--serial", &disk.serial]);
                }
                if disk.read_only {
                    program.args(["--read-only"]);
                }
                if self.shares_image {
                    program.args(["--incoming"]);
                }
            }
            DeviceKind::Net(net) => {
                program.args(["--tap-fd", &handed, "--mac", &net.mac]);
                program.args(["--queue-pairs", &net.queue_pairs.to_string()]);
                if let Some(mtu) = net.mtu {
                    program.args(["--mtu", &mtu.to_string()]);
                }
            }
            DeviceKind::Balloon(balloon) => {
                program.args(["--target", &balloon.target_mib.to_string()]);
                let interval = balloon.statistics_interval.to_string();
                program.args(["--statistics-interval", &interval]);
            }
            DeviceKind::Vfio(Vfio::Host(address)) => {
                program.args(["--host", address, "--host-fd", &handed]);
                // The kernel frees device and memory when nobody has them any more.
                self.resources.descriptors.clear();
            }
            DeviceKind::Vfio(Vfio::Synthetic) => program.args(["--synthetic"]),
            DeviceKind::VhostUser(_) | DeviceKind::Vfio(Vfio::Socket(_)) => {}
        }
        let process = host
            .launcher
            .start(program)
            .await
            .map_err(|error| failed(chain(&error)))?;
        self.process = Some(Arc::new(process));
        self.generation += 1;
        Ok(Ends {
            backend: backend.into(),
            link: link.into(),
        })
    }

    /// When its process is started again; `None` when that was tried too often.
    pub(super) fn next_restart(&mut self) -> Option<Duration> {
        let now = Instant::now();
        while self
            .restarts
            .front()
            .is_some_and(|at| now.duration_since(*at) > WINDOW)
        {
            self.restarts.pop_front();
        }
        if self.restarts.len() >= MOST_RESTARTS {
            return None;
        }
        let doublings = u32::try_from(self.restarts.len()).unwrap_or(u32::MAX);
        self.restarts.push_back(now);
        Some(
            BACK_OFF
                .saturating_mul(2u32.saturating_pow(doublings))
                .min(MAX_BACK_OFF),
        )
    }

    /// Forgets earlier restarts, as a person wants it to run.
    pub(super) fn forgive(&mut self) {
        self.restarts.clear();
    }

    /// Why its process ended, with its last words.
    pub(super) fn obituary(&self, host: &Host, machine: &MachineName, ended: Ended) -> String {
        let log = host
            .folder
            .logs(machine)
            .join(format!("device-{}.log", self.device.id));
        match (ended, last_words(&log)) {
            // Who was killed did not say why.
            (Ended::Signal(_), _) | (_, None) => ended.to_string(),
            (_, Some(line)) => format!("{ended}; its last words: {line}"),
        }
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::VhostUser;
    use crate::name::DeviceId;

    #[tokio::test(start_paused = true)]
    async fn restarts_come_slower_and_end() {
        let kind = DeviceKind::VhostUser(VhostUser {
            kind: "fs".into(),
            socket: "/s".into(),
            queues: None,
            tag: None,
        });
        let id = DeviceId::new("d").unwrap();
        let mut device = RunningDevice::adopt(Device { id, kind }, None, 0);
        let waits: Vec<_> = std::iter::from_fn(|| device.next_restart()).collect();
        assert_eq!(waits.len(), MOST_RESTARTS);
        assert!(waits.windows(2).all(|pair| pair[0] < pair[1]));
        tokio::time::advance(WINDOW * 2).await;
        assert_eq!(device.next_restart(), Some(BACK_OFF));
    }
}
