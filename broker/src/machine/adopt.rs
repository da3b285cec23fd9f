//! Taking over what a killed broker left: machines that run are watched on, and what is left
//! of a start that was cut short is ended.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::machine::State;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use super::Machine;
use super::device::RunningDevice;
use super::instance::Instance;
use super::state::MachineState;
use super::supervisor::Supervisor;
use crate::holders;
use crate::host::Host;
use crate::migration::Fate;
use crate::process::{Ended, Process, ProcessId};

/// How soon a core that does not answer is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a process that was killed may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Ends what is left of a machine whose start was cut short, with its folder; whether one that was
/// to come from elsewhere had come.
pub(crate) async fn clean(host: &Host, place: &Path, state: Option<&MachineState>) -> Fate {
    let fate = Fate::forestall(place);
    let devices = state.into_iter().flat_map(|state| &state.devices);
    let devices = devices.filter_map(|device| device.process.as_ref());
    for id in devices.chain(state.and_then(|state| state.core.as_ref())) {
        if let Ok(process) = host.launcher.adopt(id).await {
            kill(&process).await;
        }
    }
    // A core that the broker had no time to write down holds its control socket.
    let control = place.join("control");
    match holders::of(&control) {
        Ok(unknown) => {
            // One that has ended since is gone anyway.
            let processes = unknown
                .into_iter()
                .map(|pid| Process::new(pid, String::new()));
            for process in processes.flatten() {
                kill(&process).await;
            }
        }
        Err(error) => tracing::warn!(place = %place.display(), %error, "a core of it may be left"),
    }
    host.folder.remove_place(place);
    fate
}

async fn kill(process: &Process) {
    process.signal(Signal::SIGKILL);
    if tokio::time::timeout(KILL_DEADLINE, process.ended())
        .await
        .is_err()
    {
        tracing::error!(pid = process.id().pid, "a killed process does not end");
    }
}

/// Takes `machine` over, which runs as `state` says, or ran. One whose core lives and does not answer
/// is what it was, and is taken over when it does.
pub(crate) async fn adopt(host: &Arc<Host>, machine: &Arc<Machine>, state: &MachineState) {
    if lives(host, state).await.is_none() {
        return bury(host, machine, state).await;
    }
    let Err(error) = take_over(host, machine, state).await else {
        return;
    };
    let Some(core) = lives(host, state).await else {
        return bury(host, machine, state).await;
    };
    let pid = core.id().pid;
    tracing::error!(machine = %machine.name, pid, %error, "a core does not answer");
    machine.falls_silent(
        core.id().clone(),
        format!("its core, process {pid}, does not answer"),
    );
    let (host, machine, state) = (Arc::clone(host), Arc::clone(machine), state.clone());
    tokio::spawn(async move {
        while tokio::time::timeout(AGAIN, core.ended()).await.is_err() {
            if take_over(&host, &machine, &state).await.is_ok() {
                machine.set_reason(String::new());
                machine.silent.send_replace(false);
                return;
            }
        }
        bury(&host, &machine, &state).await;
        machine.silent.send_replace(false);
    });
}

/// The core of a machine, if it has not ended.
async fn lives(host: &Host, state: &MachineState) -> Option<Process> {
    host.launcher.adopt(state.core.as_ref()?).await.ok()
}

/// It ended while nobody watched: what it said tells how.
async fn bury(host: &Arc<Host>, machine: &Arc<Machine>, state: &MachineState) {
    let own = match Process::new(std::process::id(), String::new()) {
        Ok(own) => own,
        Err(error) => return machine.set_failed(format!("nobody saw how it ended: {error}")),
    };
    let (_, inbox) = mpsc::channel(1);
    machine.gone.send_replace(false);
    let mut supervisor = Supervisor::new(host, machine, Arc::new(own), inbox);
    supervisor.adopt_devices(RunningDevice::adopt_all(host, state).await);
    supervisor.end(Ended::Unknown).await;
}

async fn take_over(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    state: &MachineState,
) -> io::Result<()> {
    let (commands, inbox) = mpsc::channel(16);
    let place = host.folder.machine(&machine.name);
    let mut instance = Instance::adopt(host, &machine.name, None, place, state).await?;
    let proxy = instance.proxy.clone();
    let core_state = proxy.state().await.map_err(io::Error::other)?;
    machine.gone.send_replace(false);
    machine.install(&mut instance, commands);
    machine.update(|inner| {
        inner.state = match core_state {
            api::core::State::Paused => State::Paused,
            api::core::State::Running | api::core::State::Ended => State::Running,
        };
    });
    let mut supervisor = Supervisor::new(host, machine, instance.core, inbox);
    supervisor.adopt_devices(instance.devices);
    supervisor.watch(&proxy);
    tokio::spawn(supervisor.run());
    Ok(())
}

impl Machine {
    /// Notes that it runs, for all that is known: its core, `process`, does not answer.
    fn falls_silent(&self, process: ProcessId, reason: String) {
        self.silent.send_replace(true);
        self.gone.send_replace(false);
        self.update(|inner| {
            inner.state = State::Running;
            inner.reason = reason;
            inner.process = Some(process);
        });
    }

    /// Whether its core lives and does not answer.
    pub(crate) fn is_silent(&self) -> bool {
        *self.silent.borrow()
    }

    /// Waits until its core answers, or has ended.
    pub(crate) async fn answers(&self) {
        let mut silent = self.silent.subscribe();
        // The sender lives as long as this machine.
        let _ = silent.wait_for(|silent| !*silent).await;
    }
}
