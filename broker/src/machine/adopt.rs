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
use super::core::connect;
use super::device::RunningDevice;
use super::instance::Instance;
use super::state::MachineState;
use super::supervisor::Supervisor;
use crate::host::Host;
use crate::process::{Ended, Process};

/// How long a core that nobody knows may take to be ended.
const CLEAN_DEADLINE: Duration = Duration::from_secs(5);

/// Ends what is left of a machine whose start was cut short, with its folder.
pub(crate) async fn clean(host: &Host, place: &Path, state: Option<&MachineState>) {
    let control = place.join("control");
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
    host.folder.remove_place(place);
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
    let (commands, inbox) = mpsc::channel(16);
    let lives = match &state.core {
        Some(id) => host.launcher.adopt(id).await.is_ok(),
        None => false,
    };
    if !lives {
        // It ended while nobody watched: what it said tells how.
        let own = Process::new(std::process::id(), String::new())?;
        machine.gone.send_replace(false);
        let mut supervisor = Supervisor::new(host, machine, Arc::new(own), inbox);
        supervisor.adopt_devices(RunningDevice::adopt_all(host, state).await);
        supervisor.end(Ended::Unknown).await;
        return Ok(());
    }
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
