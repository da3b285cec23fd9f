//! The task that watches a running machine: it alone ends and restarts processes.
//!
//! ```text
//!          begin            a device is lost ─► restarted, for as long as it is worth it
//! start ──────────► watches ─┤ another generation of processes has it ─► watches that
//!                            └ the core ends ─► (a successor, if it is leaving) ─► ended
//! ```
//! | module | what |
//! |---|---|
//! | `watches` | what it waits for, and what it hears of that |
//! | `devices` | processes of devices that are lost, restarted and replaced |
//! | `succession` | another generation of processes in the place of the present one |
//! | `end` | the end of all, and why |
//!
//! One thing is done after the other, so what a later broker reads (`save`) is never half of two.
//! What a process says that has been replaced since is not listened to: each has a generation.

mod devices;
mod end;
mod succession;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use api::Error;
use api::core::CoreProxy;
use api::machine::State;
use nix::sys::signal::Signal;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use self::watches::Event;
use super::Machine;
use super::device::RunningDevice;
use super::instance::Instance;
use super::state::MachineState;
use crate::host::Host;
use crate::process::Process;

/// How long a device process may take to end when the core has.
const DEVICE_DEADLINE: Duration = Duration::from_secs(3);

/// How soon it is looked again whether a machine still moves that has lost a device.
const MOVING: Duration = Duration::from_millis(100);

/// What is wanted of the supervisor.
#[derive(Debug)]
pub(super) enum Command {
    /// End the core's process at once.
    Kill,
    /// The machine is another generation of processes from now on.
    Succeed {
        /// It.
        instance: Box<Instance>,
        /// Who waits until nothing is left of the former.
        answer: oneshot::Sender<()>,
    },
    /// Replace the process of a device.
    Restart {
        /// Which one.
        at: usize,
        /// Who waits for it.
        answer: oneshot::Sender<Result<(), Error>>,
    },
}

pub(super) struct Supervisor {
    host: Arc<Host>,
    machine: Arc<Machine>,
    core: Arc<Process>,
    devices: Vec<RunningDevice>,
    commands: Receiver<Command>,
    events: Receiver<Event>,
    tell: Sender<Event>,
    /// Tasks that wait for something on its behalf.
    waiting: Vec<AbortHandle>,
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        for task in &self.waiting {
            task.abort();
        }
    }
}

impl Supervisor {
    pub(super) fn new(
        host: &Arc<Host>,
        machine: &Arc<Machine>,
        core: Arc<Process>,
        commands: Receiver<Command>,
    ) -> Self {
        let (tell, events) = channel(64);
        Self {
            host: Arc::clone(host),
            machine: Arc::clone(machine),
            core,
            devices: Vec::new(),
            commands,
            events,
            tell,
            waiting: Vec::new(),
        }
    }

    /// Takes the devices, in the order of the definition.
    pub(super) fn adopt_devices(&mut self, devices: Vec<RunningDevice>) {
        self.devices = devices;
    }

    /// Gives them back, when the machine did not start after all.
    pub(super) fn into_devices(mut self) -> Vec<RunningDevice> {
        std::mem::take(&mut self.devices)
    }

    /// Writes down what runs, and lets the guest run.
    pub(super) async fn begin(
        &mut self,
        core: &CoreProxy<'static>,
        paused: bool,
    ) -> Result<(), Error> {
        self.save();
        if !paused {
            core.resume().await?;
        }
        for device in &mut self.devices {
            device.shares_image = false;
        }
        self.machine.update(|inner| {
            inner.state = if paused {
                State::Paused
            } else {
                State::Running
            };
        });
        self.watch(core);
        Ok(())
    }

    /// Watches until the machine has ended.
    pub(super) async fn run(mut self) {
        loop {
            let event = tokio::select! {
                Some(event) = self.events.recv() => event,
                Some(command) = self.commands.recv() => {
                    match command {
                        Command::Kill => self.core.signal(Signal::SIGKILL),
                        Command::Succeed { instance, answer } => {
                            self.succeed(*instance).await;
                            // A caller that does not wait is not told.
                            let _ = answer.send(());
                        }
                        Command::Restart { at, answer } => {
                            // A caller that does not wait is not told.
                            let _ = answer.send(self.replace(at).await);
                        }
                    }
                    continue;
                }
            };
            match event {
                Event::CoreEnded(ended) => match self.successor().await {
                    Some((instance, answer)) => {
                        self.succeed(*instance).await;
                        let _ = answer.send(());
                    }
                    None => {
                        self.end(ended).await;
                        return;
                    }
                },
                Event::CoreState(state) => self.machine.set_running_state(state),
                Event::Foreign { at, connected } => self.foreign(at, connected),
                Event::DeviceEnded {
                    at,
                    generation,
                    ended,
                } => {
                    if self.devices[at].generation == generation {
                        self.lost(at, ended).await;
                    }
                }
                Event::Due { at, generation } => {
                    if self.devices[at].generation == generation
                        && self.devices[at].process.is_none()
                    {
                        if self.machine.is_moving() {
                            // Its image may be another host's by now.
                            self.due(at, MOVING);
                        } else {
                            self.try_restart(at).await;
                        }
                    }
                }
            }
        }
    }

    /// Writes down what a later broker needs.
    fn save(&self) {
        let state = MachineState::new(&self.machine, Some(&self.core), &self.devices, true);
        let name = &self.machine.name;
        if let Err(error) = state.save(&self.host.folder.machine(name)) {
            tracing::error!(machine = %name, %error, "another broker could not adopt it");
        }
    }
}
