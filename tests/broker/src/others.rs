//! Processes of others that have a device of a machine.

use anyhow::{Result, bail, ensure};
use api::Dictionary;
use api::device::{DeviceProxy, State as DeviceState};
use api::machine::MachineProxy;
use nix::sys::signal::Signal;
use test_framework::machine::DEADLINE;
use test_framework::process::Process;
use zbus::Connection;

use crate::{device, done, machine, manager, until};

/// Starts a machine that needs the process that `others` starts: not before that is there.
pub async fn starts_after(
    bus: &Connection,
    definition: Dictionary,
    others: impl Fn() -> Result<Process>,
) -> Result<(MachineProxy<'static>, Process)> {
    let manager = manager(bus).await?;
    let path = manager.create_machine("vm", definition, 0).await?;
    let vm = machine(bus, path).await?;
    let job = vm.start(0).await?;
    let Err(error) = done(bus, job).await else {
        bail!("it starts without its device");
    };
    let error = format!("{error:#}");
    ensure!(error.contains("start it first"), "{error}");

    let process = others()?;
    until("a start", async || {
        let job = vm.start(0).await?;
        Ok(done(bus, job).await.is_ok())
    })
    .await?;
    Ok((vm, process))
}

/// Kills the process of a machine's device; its successor is reached.
pub async fn is_reached_again(
    bus: &Connection,
    id: &str,
    mut process: Process,
    others: impl Fn() -> Result<Process>,
) -> Result<Process> {
    process.signal(Signal::SIGKILL)?;
    process.wait(DEADLINE)?;
    let device: DeviceProxy<'_> = device(bus, "vm", id).await?;
    until("the loss", async || {
        Ok(device.state().await? == DeviceState::Restarting)
    })
    .await?;
    let successor = others()?;
    until("the connection", async || {
        Ok(device.state().await? == DeviceState::Running && device.reconnects().await? == 1)
    })
    .await?;
    Ok(successor)
}
