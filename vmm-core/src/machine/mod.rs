//! The machine: all parts together, with its life.
//!
//! ```text
//! start ─► Paused ⇄ Running ─► Ended
//! ```
//!
//! The main thread decides alone: what the guest, a vCPU, a device, the owner or a
//! signal wants reaches it as an [`event::Event`].
//!
//! Order rules:
//! - Pause: all vCPUs at once, and when the last is out of the guest all devices at
//!   once: a device that stops has seen everything the guest asked of it.
//!   A PCI device of vfio-user goes on with what it was told.
//! - Resume: devices, then vCPUs.
//! - Reset: pause, devices and platform as after power-on, interrupt controllers and
//!   vCPUs as KVM made them, the kernel or firmware loaded once more, resume.

mod assemble;
mod boot;
pub mod config;
mod console;
pub mod control;
mod devices;
mod error;
pub mod event;
mod exit;
pub mod migrate;
mod mover;
mod platform;
pub mod request;

use std::collections::VecDeque;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use api::Error as CallError;
use api::core::State;
use tokio::sync::watch;

pub use error::MachineError;
pub use exit::Reason;

use self::boot::Boot;
use self::console::Console;
use self::event::{Attachment, Command, Event};
use self::migrate::Moving;
use self::platform::Platform;
use self::request::Request;
use crate::boot::acpi::AcpiConfig;
use crate::hypervisor::{Ended, VcpuSavedState, VcpuSet, Vm, VmSavedState};
use crate::memory::Memory;
use crate::pci::{HostBridge, Root};
use crate::remote::vfio_user::VfioUserDevice;
use crate::remote::vhost_user::VhostUserDevice;
use crate::transport::{TransportError, VirtioPciDevice};

/// How long vCPUs may take to leave the guest. One of them may be waiting for a device
/// process, which has a deadline of its own that is shorter.
const VCPU_DEADLINE: Duration = Duration::from_secs(20);

/// IA32_MISC_ENABLE, with fast strings.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: enabled, write-back.
const MTRR_DEFAULT: (u32, u64) = (0x2ff, 0x806);

/// A machine, from its start to its end.
pub struct Machine {
    events: Receiver<Event>,
    /// Events that came while something else was done.
    deferred: VecDeque<Event>,
    moving: Moving,
    state: watch::Sender<State>,
    memory: Arc<Memory>,
    vm: Arc<Vm>,
    vcpus: VcpuSet,
    devices: Vec<Arc<VirtioPciDevice>>,
    backends: Vec<Arc<VhostUserDevice>>,
    pci_devices: Vec<VfioUserDevice>,
    root: Arc<Root>,
    bridge: Arc<HostBridge>,
    platform: Platform,
    console: Console,
    control: JoinHandle<()>,
    boot: Boot,
    acpi: AcpiConfig,
    /// What KVM made, for the next reset.
    pristine: (VmSavedState, Vec<VcpuSavedState>),
}

impl Machine {
    /// Runs the machine until it ends.
    pub fn run(mut self, paused: bool) -> Reason {
        let started = match self.moving.parts.incoming.take() {
            Some(incoming) => self.arrive(incoming),
            None if paused => Ok(()),
            None => self
                .resume()
                .map_err(|error| Reason::Internal(chain(&error))),
        };
        let reason = match started {
            Ok(()) => self.serve(),
            Err(reason) => reason,
        };
        self.state.send_replace(State::Ended);
        if let Err(error) = self.vcpus.pause(VCPU_DEADLINE) {
            tracing::error!(error = chain(&error), "a vCPU is left behind");
        }
        if let Some(backend) = self.backends.first() {
            backend.end_waits();
        }
        self.console.close();
        drop(self.state);
        if self.control.join().is_err() {
            tracing::error!("the control thread panicked");
        }
        reason
    }

    fn serve(&mut self) -> Reason {
        loop {
            match self.next_event() {
                Ok(event) => {
                    if let Some(reason) = self.handle(event) {
                        return reason;
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Reason::Moved,
                Err(RecvTimeoutError::Disconnected) => {
                    return Reason::Internal("nobody is left who could end the machine".into());
                }
            }
        }
    }

    /// The next event; a timeout when the machine is elsewhere and this core goes.
    fn next_event(&mut self) -> Result<Event, RecvTimeoutError> {
        if let Some(event) = self.deferred.pop_front() {
            return Ok(event);
        }
        match self.moving.goes_at() {
            None => self.events.recv().map_err(RecvTimeoutError::from),
            Some(at) => self
                .events
                .recv_timeout(at.saturating_duration_since(Instant::now())),
        }
    }

    /// Acts on an event; the reason to end, if it is one.
    fn handle(&mut self, event: Event) -> Option<Reason> {
        match event {
            Event::Guest(Request::PowerOff) | Event::Vcpu(_, Ended::PowerOff) => {
                Some(Reason::PoweredOff)
            }
            Event::Guest(Request::Reset) | Event::Vcpu(_, Ended::Reset) => self
                .reset()
                .err()
                .map(|error| Reason::Internal(chain(&error))),
            Event::Vcpu(vcpu, ended) => Some(Reason::GuestFailed { vcpu, ended }),
            Event::Trouble { device, why } => {
                tracing::error!(device, why, "the device failed");
                None
            }
            Event::Terminated => Some(Reason::Terminated),
            Event::PowerButton => {
                self.platform.power.power_button();
                None
            }
            Event::Attach(attachment, answer) => {
                // A caller that does not wait is not told.
                let _ = answer.send(self.attach(attachment));
                None
            }
            Event::Command(Command::Terminate, answer) => {
                // A caller that does not wait is not told.
                let _ = answer.send(Ok(()));
                Some(Reason::Terminated)
            }
            Event::Migrate(request, to) => {
                let result = self.migrate(*request);
                migrate::answer(to, result);
                None
            }
            Event::Snapshot(files, to) => {
                let result = self.snapshot(*files);
                migrate::answer(to, result);
                None
            }
            Event::Copied(copied) => {
                self.copied(copied);
                None
            }
            Event::Written(written) => {
                self.written(*written);
                None
            }
            Event::Decide(runs_there, to) => {
                let result = self.decide(runs_there);
                migrate::answer(to, result);
                None
            }
            Event::Command(command, answer) => {
                let result = self.command(command);
                let failed = result.as_ref().err().map(|error| chain(error));
                let _ = answer.send(result.map_err(CallError::from));
                // A machine that could not be reset has no defined state.
                failed
                    .filter(|_| command == Command::Reset && self.moving.is_here())
                    .map(Reason::Internal)
            }
        }
    }

    fn command(&mut self, command: Command) -> Result<(), MachineError> {
        self.moving.check_here()?;
        self.moving.check_moves_on()?;
        match command {
            Command::Pause => self.pause(),
            Command::Resume => self.resume(),
            Command::Reset => self.reset(),
            Command::PowerButton => {
                self.platform.power.power_button();
                Ok(())
            }
            Command::Terminate => Ok(()),
        }
    }

    fn attach(&self, attachment: Attachment) -> Result<(), CallError> {
        match attachment {
            Attachment::Console(socket) => self
                .console
                .attach(socket)
                .map_err(|error| CallError::from(MachineError::Control(error))),
            Attachment::Backend { device, socket } => {
                let backend = self.backends.iter().find(|b| b.id() == device);
                let pci = self.pci_devices.iter().find(|d| d.id() == device);
                let attached = match (backend, pci) {
                    (Some(backend), _) => backend.reconnect_with(socket).map_err(Into::into),
                    (None, Some(pci)) => pci.reconnect_with(socket).map_err(MachineError::from),
                    (None, None) => {
                        let why = format!("this machine has no device {device}");
                        return Err(CallError::NoSuchDevice(why));
                    }
                };
                attached.map_err(CallError::from)
            }
        }
    }

    fn is(&self, state: State) -> bool {
        *self.state.borrow() == state
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        if self.is(State::Paused) {
            return Ok(());
        }
        self.vcpus.pause(VCPU_DEADLINE)?;
        self.each_device(VirtioPciDevice::stop)?;
        self.state.send_replace(State::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.is(State::Running) {
            return Ok(());
        }
        self.each_device(VirtioPciDevice::resume)?;
        self.vcpus.each(VCPU_DEADLINE, |vcpu| {
            vcpu.was_stopped();
            Ok(())
        })?;
        self.vcpus.run();
        self.state.send_replace(State::Running);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), MachineError> {
        let was_running = self.is(State::Running);
        self.vcpus.pause(VCPU_DEADLINE)?;
        self.state.send_replace(State::Paused);
        self.each_device(VirtioPciDevice::reset)?;
        self.pci_devices.iter().for_each(VfioUserDevice::reset);
        self.root.reset();
        self.bridge.reset();
        self.platform.reset();
        self.vm.restore(&self.pristine.0)?;
        let vcpus: Arc<[VcpuSavedState]> = self.pristine.1.as_slice().into();
        self.vcpus.each(VCPU_DEADLINE, move |vcpu| {
            match vcpus.get(vcpu.id() as usize) {
                Some(state) => vcpu.restore(state),
                None => Ok(()),
            }
        })?;
        self.load()?;
        if was_running { self.resume() } else { Ok(()) }
    }

    /// Puts the kernel into memory and the first vCPU at its entry; one that starts in firmware
    /// has its entry, and all registers, as they are.
    fn load(&self) -> Result<(), MachineError> {
        let entry = self.boot.load(&self.memory, &self.acpi)?;
        self.moving.parts.core_writes.note();
        let Some(entry) = entry else {
            return Ok(());
        };
        self.vcpus.each(VCPU_DEADLINE, move |vcpu| {
            vcpu.set_msrs(&[MISC_ENABLE, MTRR_DEFAULT])?;
            if vcpu.id() == 0 {
                vcpu.enter_at(&entry)
            } else {
                Ok(())
            }
        })?;
        Ok(())
    }

    /// Does something with all devices at once; the first failure counts.
    fn each_device(
        &self,
        work: impl Fn(&VirtioPciDevice) -> Result<(), TransportError> + Sync,
    ) -> Result<(), MachineError> {
        thread::scope(|scope| {
            let workers: Vec<_> = self
                .devices
                .iter()
                .map(|device| scope.spawn(|| work(device)))
                .collect();
            let join = |worker: thread::ScopedJoinHandle<'_, _>| {
                worker.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            workers
                .into_iter()
                .map(join)
                .fold(Ok(()), Result::and)
                .map_err(MachineError::from)
        })
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}
