//! Processes of devices: a lost one is followed by another on a new socket, which the core is handed.
//! Requests in flight are in the core's record, and done by the new one.
//!
//! ```text
//!            lost                     due                  attached
//! Running ─────────► Restarting ───────────► a new process ─────────► Running
//!    ▲                   ▲ │ too often             │ it does not start, or take over
//!    │                   │ └────────► Failed       │
//!    └── replace ────────┴─────────────────────────┘
//! ```
//! The old process has ended before the new one starts: no image has two writers. While the machine
//! moves nothing is restarted, as its image may be another host's by then: the move is ended first.

use std::time::Duration;

use api::Error;
use api::device::State as DeviceState;
use nix::sys::signal::Signal;

use super::{DEVICE_DEADLINE, Supervisor};
use crate::machine::DeviceStatus;
use crate::migration::Mover;
use crate::process::Ended;
use crate::publish::Change;

/// A device whose front-end is gone ends by itself: so soon after it the core has ended too,
/// if that is why.
const CORE_DEADLINE: Duration = Duration::from_millis(200);

impl Supervisor {
    /// A back-end that is not ours is lost, or another has taken over.
    pub(super) fn foreign(&mut self, at: usize, connected: bool) {
        let device = &mut self.devices[at];
        device.reconnects += u32::from(connected);
        let reconnects = device.reconnects;
        self.update_device(at, |status| {
            status.reconnects = reconnects;
            (status.state, status.reason) = match connected {
                true => (DeviceState::Running, String::new()),
                false => (DeviceState::Restarting, "its back-end is gone".into()),
            };
        });
        self.save();
    }

    fn update_device(&self, at: usize, change: impl FnOnce(&mut DeviceStatus)) {
        let id = self.devices[at].device.id.clone();
        {
            let inner = &mut *self.machine.lock();
            if let Some(status) = inner.devices.get_mut(at) {
                change(status);
            }
        }
        let machine = self.machine.name.clone();
        self.machine.publisher.send(Change::Device(machine, id));
    }

    /// A device's process has ended by itself.
    pub(super) async fn lost(&mut self, at: usize, ended: Ended) {
        let name = self.machine.name.clone();
        if !matches!(ended, Ended::Signal(_))
            && tokio::time::timeout(CORE_DEADLINE, self.core.ended())
                .await
                .is_ok()
        {
            // It ended because the core did, whose end is the next event.
            self.devices[at].process = None;
            return;
        }
        let device = &mut self.devices[at];
        device.process = None;
        let why = device.obituary(&self.host, &name, ended);
        tracing::warn!(machine = %name, device = %device.device.id, why, "a device process ended");
        self.host.metrics.device_ended(device.device.kind_name());
        let id = device.device.id.clone();
        self.end_move(&format!("device {id} ended: {why}"));
        self.retry(at, &why);
    }

    /// A machine that has lost a device does not move; it goes on here with a new one.
    fn end_move(&mut self, why: &str) {
        let Some(job) = self.machine.job().filter(|_| self.machine.is_moving()) else {
            return;
        };
        job.migration(|migration| migration.trouble = Some(why.to_owned()));
        if let Ok(core) = self.machine.core("asked") {
            self.wait(async move {
                if let Ok(mover) = Mover::of(&core).await {
                    // After the commit it is too late, and the destination has its own device.
                    let _ = mover.0.cancel().await;
                }
            });
        }
    }

    /// Starts a device again later, or gives up.
    fn retry(&mut self, at: usize, why: &str) {
        match self.devices[at].next_restart() {
            Some(after) => {
                self.update_device(at, |status| {
                    status.state = DeviceState::Restarting;
                    status.process = None;
                    status.reason = why.to_owned();
                });
                self.due(at, after);
            }
            None => self.update_device(at, |status| {
                status.state = DeviceState::Failed;
                status.process = None;
                status.reason = format!("it ended too often; the last time: {why}");
            }),
        }
        self.save();
    }

    pub(super) async fn try_restart(&mut self, at: usize) {
        match self.start_device(at).await {
            Ok(()) => {}
            Err(error) => {
                let name = &self.machine.name;
                tracing::warn!(machine = %name, %error, "a device process was not started");
                self.drop_process(at).await;
                self.retry(at, &error.to_string());
            }
        }
    }

    /// Starts a device's process and hands its socket to the core.
    async fn start_device(&mut self, at: usize) -> Result<(), Error> {
        let core = self.machine.core("given a new device process")?;
        let name = self.machine.name.clone();
        let ends = self.devices[at].start(&self.host, &self.machine).await?;
        let device = &self.devices[at];
        let id = device.device.id.clone();
        let attached = core.attach_backend(id.as_str(), ends.backend.into()).await;
        attached.map_err(|error| match error {
            Error::ZBus(error) => Error::MachineFailed(format!(
                "the core of {name} does not answer, so it did not get the new process of {id}: \
                 {error}"
            )),
            refused => refused,
        })?;
        if let Err(error) = core.attach_link(id.as_str(), ends.link.into()).await {
            // The device works without.
            tracing::warn!(machine = %name, device = %id, %error, "its core cannot ask it anything");
        }
        let process = device.process.as_ref().map(|process| process.id().clone());
        let device = &mut self.devices[at];
        device.reconnects += 1;
        let reconnects = device.reconnects;
        self.update_device(at, |status| {
            status.state = DeviceState::Running;
            status.process = process;
            status.reconnects = reconnects;
        });
        self.host
            .metrics
            .device_restarted(self.devices[at].device.kind_name());
        self.watch_device(at);
        self.save();
        Ok(())
    }

    /// Ends the process of a device, whatever it does.
    pub(super) async fn drop_process(&mut self, at: usize) {
        let device = &mut self.devices[at];
        // Its end is expected.
        device.generation += 1;
        if let Some(process) = device.process.take() {
            process.signal(Signal::SIGTERM);
            if tokio::time::timeout(DEVICE_DEADLINE, process.ended())
                .await
                .is_err()
            {
                process.signal(Signal::SIGKILL);
                // A killed process ends, or the kernel is broken.
                let _ = tokio::time::timeout(DEVICE_DEADLINE, process.ended()).await;
            }
        }
    }

    /// Replaces the process of a device, as somebody wants it.
    pub(super) async fn replace(&mut self, at: usize) -> Result<(), Error> {
        let Some(device) = self.devices.get_mut(at) else {
            return Err(Error::NoSuchDevice(format!(
                "{} has no device {at}",
                self.machine.name
            )));
        };
        if !device.is_ours() {
            return Err(Error::InvalidState(format!(
                "the process of {} is not the broker's: restart it where it was started",
                device.device.id
            )));
        }
        device.forgive();
        self.update_device(at, |status| status.state = DeviceState::Restarting);
        self.drop_process(at).await;
        let result = self.start_device(at).await;
        if let Err(error) = &result {
            self.drop_process(at).await;
            self.retry(at, &error.to_string());
        }
        result
    }
}
