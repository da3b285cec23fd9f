//! Taking over what a killed broker left: machines that run are watched on, and what is left
//! of a start that was cut short is ended.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::device::State as DeviceState;
use api::machine::State;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use super::core::connect;
use super::device::RunningDevice;
use super::state::MachineState;
use super::supervisor::Supervisor;
use super::{DeviceStatus, Live, Machine};
use crate::console::Console;
use crate::host::Host;
use crate::name::MachineName;
use crate::process::{Ended, Process};

/// How long a core that runs may take to answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a core that nobody knows may take to be ended.
const CLEAN_DEADLINE: Duration = Duration::from_secs(5);

/// Ends what is left of a machine whose start was cut short.
pub(crate) async fn clean(host: &Host, name: &MachineName, state: Option<&MachineState>) {
    let control = host.folder.machine(name).join("control");
    if let Some(state) = state {
        let devices = state
            .devices
            .iter()
            .filter_map(|device| device.process.as_ref());
        for id in devices.chain(&state.core) {
            if let Ok(process) = host.launcher.adopt(id).await {
                process.signal(Signal::SIGKILL);
                // A killed process ends, or the kernel is broken.
                let _ = tokio::time::timeout(CLEAN_DEADLINE, process.ended()).await;
            }
        }
    } else if let Ok(Ok(core)) = tokio::time::timeout(CLEAN_DEADLINE, connect(&control)).await {
        // Its guest has never run.
        let _ = core.terminate().await;
    }
    host.folder.remove_machine(name);
}

/// Takes `machine` over, which runs as `state` says.
///
/// # Errors
/// It does not run any more, or cannot be reached; it is still to be cleaned up.
pub(crate) async fn adopt(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    state: &MachineState,
) -> io::Result<()> {
    let gone = |what: &str| io::Error::new(io::ErrorKind::NotFound, what.to_owned());
    let id = state.core.as_ref().ok_or_else(|| gone("it has no core"))?;
    let (commands, inbox) = mpsc::channel(16);
    let mut devices = Vec::new();
    for (device, record) in state.definition.devices.iter().zip(&state.devices) {
        let mut device = RunningDevice::adopt(device.clone(), record.image, record.reconnects);
        if let Some(id) = &record.process {
            device.process = host.launcher.adopt(id).await.ok().map(Arc::new);
        }
        devices.push(device);
    }
    let core = match host.launcher.adopt(id).await {
        Ok(core) => Arc::new(core),
        Err(_) => {
            // It ended while nobody watched: what it said tells how.
            let own = Process::new(std::process::id(), String::new())?;
            machine.gone.send_replace(false);
            let mut supervisor = Supervisor::new(host, machine, Arc::new(own), inbox);
            supervisor.adopt_devices(devices);
            supervisor.end(Ended::Unknown).await;
            return Ok(());
        }
    };
    let control = host.folder.machine(machine.name()).join("control");
    let proxy = tokio::time::timeout(DEADLINE, connect(&control))
        .await
        .map_err(|_| gone("its core does not answer"))?
        .map_err(io::Error::other)?;
    let console = attach_console(&proxy, &host.folder.logs(machine.name())).await?;
    let core_state = proxy.state().await.map_err(io::Error::other)?;
    machine.gone.send_replace(false);
    machine.update(|inner| {
        inner.state = match core_state {
            api::core::State::Paused => State::Paused,
            api::core::State::Running | api::core::State::Ended => State::Running,
        };
        inner.process = Some(core.id().clone());
        inner.started_usec = state.started_usec;
        for (status, device) in inner.devices.iter_mut().zip(&devices) {
            let process = device.process.as_ref().map(|process| process.id().clone());
            *status = DeviceStatus {
                state: match process.is_some() || !device.is_ours() {
                    true => DeviceState::Running,
                    false => DeviceState::Restarting,
                },
                process,
                reason: String::new(),
                reconnects: device.reconnects,
            };
        }
        inner.live = Some(Live {
            core: proxy.clone(),
            console,
            commands,
        });
    });
    let mut supervisor = Supervisor::new(host, machine, core, inbox);
    supervisor.adopt_devices(devices);
    supervisor.watch(&proxy);
    tokio::spawn(supervisor.run());
    Ok(())
}

async fn attach_console(core: &api::core::CoreProxy<'static>, logs: &Path) -> io::Result<Console> {
    let (ours, theirs) = UnixStream::pair()?;
    let console = Console::new(ours, &logs.join("console.log"))?;
    core.attach_console(std::os::fd::OwnedFd::from(theirs).into())
        .await
        .map_err(io::Error::other)?;
    Ok(console)
}
