//! `org.godwit.Vmm1.Machine`.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use api::machine::{FORCE, Facts, OneMachine, PAUSED, READ_ONLY, REPLAY, State};
use api::{Caller, Dictionary, Error, only_flags};
use zbus::{OwnedFd, OwnedObjectPath};

use crate::broker::Broker;
use crate::machine::Machine;
use crate::name::DeviceId;
use crate::policy::Action;

/// A machine.
#[derive(Debug)]
pub struct MachineObject {
    broker: Arc<Broker>,
    machine: Arc<Machine>,
}

impl MachineObject {
    pub(super) fn new(broker: &Arc<Broker>, machine: &Arc<Machine>) -> Self {
        Self {
            broker: Arc::clone(broker),
            machine: Arc::clone(machine),
        }
    }

    /// The machine of this name, which may have been made anew since.
    async fn permit(&self, caller: &Caller, action: Action, verb: &str) -> Result<(), Error> {
        let name = self.machine.name().as_str();
        self.broker.permit(caller, action, name, verb).await
    }
}

impl OneMachine for MachineObject {
    async fn start(&self, caller: Caller, flags: u64) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, PAUSED | FORCE)?;
        self.permit(&caller, Action::Manage, "start").await?;
        let (paused, force) = (flags & PAUSED != 0, flags & FORCE != 0);
        self.broker.start(&self.machine, paused, force).await
    }

    async fn power_off(&self, caller: Caller, flags: u64) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Manage, "power-off").await?;
        self.broker.power_off(&self.machine).await
    }

    async fn terminate(&self, caller: Caller, flags: u64) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Manage, "terminate").await?;
        self.broker.terminate(&self.machine).await
    }

    async fn reset(&self, caller: Caller, flags: u64) -> Result<(), Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Manage, "reset").await?;
        self.machine
            .must_be(&[State::Running, State::Paused], "reset")?;
        self.machine
            .command("reset", async |core| core.reset().await)
            .await
    }

    async fn pause(&self, caller: Caller, flags: u64) -> Result<(), Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Manage, "pause").await?;
        self.machine
            .must_be(&[State::Running, State::Paused], "paused")?;
        self.machine
            .command("paused", async |core| core.pause().await)
            .await?;
        self.machine.set_running_state(api::core::State::Paused);
        Ok(())
    }

    async fn resume(&self, caller: Caller, flags: u64) -> Result<(), Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Manage, "resume").await?;
        self.machine
            .must_be(&[State::Running, State::Paused], "resumed")?;
        self.machine
            .command("resumed", async |core| core.resume().await)
            .await?;
        self.machine.set_running_state(api::core::State::Running);
        Ok(())
    }

    async fn remove(&self, caller: Caller, flags: u64) -> Result<(), Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Create, "remove").await?;
        self.broker.remove(&self.machine).await
    }

    async fn migrate(
        &self,
        caller: Caller,
        uri: &str,
        options: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Migrate, "migrate").await?;
        self.broker.migrate(&self.machine, uri, options).await
    }

    async fn snapshot(
        &self,
        caller: Caller,
        folder: &str,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, 0)?;
        // It names a folder that the broker makes.
        self.permit(&caller, Action::Create, "snapshot").await?;
        self.broker.snapshot(&self.machine, folder).await
    }

    async fn decide(&self, caller: Caller, runs_there: bool, flags: u64) -> Result<(), Error> {
        only_flags(flags, 0)?;
        self.permit(&caller, Action::Migrate, "decide").await?;
        self.broker.decide(&self.machine, runs_there).await
    }

    async fn open_console(
        &self,
        caller: Caller,
        console: &str,
        flags: u64,
    ) -> Result<OwnedFd, Error> {
        only_flags(flags, READ_ONLY | FORCE | REPLAY)?;
        if !matches!(console, "" | "serial0") {
            let shown: String = console.chars().take(64).collect();
            return Err(Error::InvalidArgs(format!(
                "there is no console {shown:?}: there is serial0"
            )));
        }
        self.permit(&caller, Action::OpenConsole, "open-console")
            .await?;
        Ok(self.machine.console()?.open(flags)?.into())
    }

    async fn open_log(&self, caller: Caller, source: &str, flags: u64) -> Result<OwnedFd, Error> {
        only_flags(flags, 0)?;
        let role = match source {
            "core" | "console" => source.to_owned(),
            device => {
                let id =
                    DeviceId::new(device).map_err(|error| Error::InvalidArgs(error.to_string()))?;
                let definition = self.machine.definition();
                if !definition.devices.iter().any(|device| device.id == id) {
                    return Err(Error::NoSuchDevice(format!(
                        "{} has no log {id}: there are core, console, and one for each device",
                        self.machine.name()
                    )));
                }
                format!("device-{id}")
            }
        };
        self.permit(&caller, Action::OpenConsole, "open-log")
            .await?;
        let logs = self.broker.host.folder.logs(self.machine.name());
        let log = File::open(logs.join(format!("{role}.log"))).map_err(|error| {
            Error::ResourceUnavailable(format!(
                "there is no log {source} of {} yet: {error}",
                self.machine.name()
            ))
        })?;
        Ok(std::os::fd::OwnedFd::from(log).into())
    }

    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        Ok(self.machine.statistics().await)
    }

    fn facts(&self) -> Facts {
        self.machine.facts()
    }
}
