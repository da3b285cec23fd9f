//! `org.godwit.Vmm1.Manager`.

use std::sync::Arc;

use api::machine::PAUSED;
use api::manager::{JobEntry, MachineEntry, Machines, START, TRANSIENT};
use api::{Caller, Dictionary, Error, only_flags, path};
use zbus::OwnedObjectPath;

use crate::broker::Broker;
use crate::policy::Action;

/// The manager.
#[derive(Debug)]
pub struct ManagerObject {
    /// What it shows.
    pub broker: Arc<Broker>,
    /// Where metrics are served.
    pub metrics_socket: String,
}

impl Machines for ManagerObject {
    async fn create_machine(
        &self,
        caller: Caller,
        name: &str,
        definition: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, START | TRANSIENT)?;
        let broker = &self.broker;
        broker
            .permit(&caller, Action::Create, name, "create")
            .await?;
        if flags & START != 0 {
            broker
                .permit(&caller, Action::Manage, name, "start")
                .await?;
        }
        let machine = broker
            .create(name, definition, flags & TRANSIENT != 0)
            .await?;
        if flags & START != 0 {
            // What goes wrong is its job's.
            broker.start(&machine, false, false).await?;
        }
        Ok(path::machine(name))
    }

    async fn receive_migration(
        &self,
        caller: Caller,
        name: &str,
        options: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, 0)?;
        self.broker
            .permit(&caller, Action::ReceiveMigration, name, "receive")
            .await?;
        self.broker.receive(name, options).await
    }

    async fn restore_machine(
        &self,
        caller: Caller,
        name: &str,
        folder: &str,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, PAUSED | TRANSIENT)?;
        self.broker
            .permit(&caller, Action::Create, name, "restore")
            .await?;
        let (paused, transient) = (flags & PAUSED != 0, flags & TRANSIENT != 0);
        self.broker.restore(name, folder, paused, transient).await
    }

    async fn get_machine(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        self.broker.machine(name).map(|_| path::machine(name))
    }

    async fn list_machines(&self) -> Result<Vec<MachineEntry>, Error> {
        let entry = |facts: api::machine::Facts| MachineEntry {
            path: path::machine(&facts.name),
            name: facts.name,
            state: facts.state.as_str().into(),
            uuid: facts.uuid,
        };
        let machines = self.broker.machines();
        Ok(machines
            .iter()
            .map(|machine| entry(machine.facts()))
            .collect())
    }

    async fn get_job(&self, id: u32) -> Result<OwnedObjectPath, Error> {
        self.broker.jobs.get(id).map(|_| path::job(id))
    }

    async fn list_jobs(&self) -> Result<Vec<JobEntry>, Error> {
        let entry = |facts: api::job::Facts| JobEntry {
            id: facts.id,
            kind: facts.kind,
            machine: facts.machine,
            state: facts.state.as_str().into(),
            path: path::job(facts.id),
        };
        let jobs = self.broker.jobs.all();
        Ok(jobs.iter().map(|job| entry(job.facts())).collect())
    }

    async fn reload(&self, caller: Caller) -> Result<(), Error> {
        self.broker
            .permit(&caller, Action::Manage, "", "reload")
            .await?;
        self.broker.reload().await
    }

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").into()
    }

    fn features(&self) -> Vec<String> {
        let launch = format!("launch-{}", self.broker.host.launcher.name());
        ["disk", "net", "vhost-user", &launch]
            .map(str::to_owned)
            .into()
    }

    fn metrics_socket(&self) -> String {
        self.metrics_socket.clone()
    }
}
