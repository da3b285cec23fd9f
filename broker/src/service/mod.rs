//! The D-Bus objects, on what the broker knows.

mod balloon;
mod device;
mod job;
mod machine;
mod manager;

use std::collections::HashMap;
use std::sync::Arc;

use api::balloon1::Status;
use api::path;
use tokio::sync::mpsc::UnboundedReceiver;
use zbus::connection::Builder;
use zbus::fdo::{ObjectManager, Properties};
use zbus::object_server::{Interface, InterfaceRef, SignalEmitter};
use zbus::{Connection, OwnedObjectPath, Variant};

use self::balloon::BalloonObject;
use self::device::DeviceObject;
use self::job::{JobObject, MigrationObject};
use self::machine::MachineObject;
pub use self::manager::ManagerObject;
use crate::broker::Broker;
use crate::definition::DeviceKind;
use crate::jobs::Job;
use crate::machine::Machine;
use crate::name::{DeviceId, MachineName};
use crate::publish::Change;

type ManagerInterface = api::manager::Manager<ManagerObject>;
type MachineInterface = api::machine::Machine<MachineObject>;
type DeviceInterface = api::device::Device<DeviceObject>;
type BalloonInterface = api::balloon::Balloon<BalloonObject>;
type JobInterface = api::job::Job<JobObject>;
type MigrationInterface = api::job_migration::JobMigration<MigrationObject>;

/// The manager and its ObjectManager on a connection that is being made.
pub fn manager(builder: Builder<'static>, manager: ManagerObject) -> Builder<'static> {
    builder
        .serve_at(path::MANAGER, ObjectManager)
        .serve_at(path::MANAGER, api::manager::Manager(manager))
}

/// What the bus was told last.
struct Published {
    broker: Arc<Broker>,
    connection: Connection,
    machines: HashMap<MachineName, api::machine::Facts>,
    devices: HashMap<(MachineName, DeviceId), (usize, api::device::Facts)>,
    balloons: HashMap<(MachineName, DeviceId), Status>,
    migrations: HashMap<u32, api::job_migration::Facts>,
}

/// Tells the bus what changed, for ever.
pub async fn publish(
    broker: Arc<Broker>,
    connection: Connection,
    mut changes: UnboundedReceiver<Change>,
) {
    let mut published = Published {
        broker,
        connection,
        machines: HashMap::new(),
        devices: HashMap::new(),
        balloons: HashMap::new(),
        migrations: HashMap::new(),
    };
    while let Some(change) = changes.recv().await {
        let said = format!("{change:?}");
        if let Err(error) = published.tell(change).await {
            tracing::warn!(%error, said, "the bus was not told");
        }
    }
}

/// The names of the properties that are others than before.
macro_rules! changed {
    ($old:expr, $new:expr, $($field:ident => $name:literal),+ $(,)?) => {{
        let changed = [$(($old.$field != $new.$field).then_some($name)),+];
        changed.into_iter().flatten().collect()
    }};
}

/// Tells in one PropertiesChanged what these properties of an object are now.
async fn tell<I: Interface>(
    interface: &InterfaceRef<I>,
    names: Vec<&'static str>,
) -> zbus::Result<()> {
    let emitter = interface.signal_emitter();
    let connection = emitter.connection();
    let mut changed = HashMap::new();
    let object = interface.get().await;
    for name in names {
        let value = object.get(name, connection.object_server(), connection, None, emitter);
        match value.await {
            Some(Ok(value)) => {
                changed.insert(name, Variant::from(value));
            }
            // What cannot be read now is not told.
            Some(Err(_)) => {}
            None => return Err(zbus::Error::Failure(format!("no property {name}"))),
        }
    }
    drop(object);
    if changed.is_empty() {
        return Ok(());
    }
    let none = [].as_slice().into();
    Properties::properties_changed(emitter, I::name(), changed, none).await
}

impl Published {
    async fn tell(&mut self, change: Change) -> zbus::Result<()> {
        match change {
            Change::Added(name, done) => {
                let result = self.add(&name).await;
                // Who said it may not wait.
                let _ = done.send(());
                result
            }
            Change::Removed(name, done) => {
                let result = self.remove(&name).await;
                let _ = done.send(());
                result
            }
            Change::Machine(name) => self.machine(&name).await,
            Change::Device(name, id) => self.device(&name, &id).await,
            Change::Balloon(name, id, size) => self.balloon(name, id, size).await,
            Change::Ended(name) => {
                let broker = Arc::clone(&self.broker);
                // Not here: the removal waits for this task.
                tokio::spawn(async move {
                    if let Ok(machine) = broker.machine(name.as_str()) {
                        machine.released().await;
                        if let Err(error) = broker.remove(&machine).await {
                            tracing::warn!(machine = %name, %error, "it is not forgotten");
                        }
                    }
                });
                Ok(())
            }
            Change::JobNew(id, done) => {
                let result = self.job_new(id).await;
                let _ = done.send(());
                result
            }
            Change::Job(id) => self.job(id, false).await,
            Change::JobEnded(id) => self.job(id, true).await,
            Change::JobForgotten(id) => {
                let server = self.connection.object_server();
                server.remove::<JobInterface, _>(path::job(id)).await?;
                // Most jobs have none.
                let _ = server.remove::<MigrationInterface, _>(path::job(id)).await;
                self.migrations.remove(&id);
                Ok(())
            }
        }
    }

    async fn add(&mut self, name: &MachineName) -> zbus::Result<()> {
        let Ok(machine) = self.broker.machine(name.as_str()) else {
            return Ok(());
        };
        let server = self.connection.object_server();
        let object = MachineObject::new(&self.broker, &machine);
        let at = path::machine(name.as_str());
        server.at(at, api::machine::Machine(object)).await?;
        self.machines
            .entry(name.clone())
            .or_insert_with(|| machine.facts());
        self.remove_devices(name).await?;
        self.add_devices(name, &machine).await?;
        self.machine(name).await
    }

    async fn add_devices(
        &mut self,
        name: &MachineName,
        machine: &Arc<Machine>,
    ) -> zbus::Result<()> {
        let server = self.connection.object_server();
        for at in 0.. {
            let Some((device, _)) = machine.device(at) else {
                break;
            };
            let object = DeviceObject::new(&self.broker, machine, at);
            let Some(facts) = object.current() else { break };
            let place = path::device(name.as_str(), device.id.as_str());
            if let DeviceKind::Balloon(_) = device.kind {
                let balloon = BalloonObject::new(&self.broker, machine, at);
                server.at(&place, api::balloon::Balloon(balloon)).await?;
            }
            server.at(place, api::device::Device(object)).await?;
            self.devices.insert((name.clone(), device.id), (at, facts));
        }
        Ok(())
    }

    async fn remove_devices(&mut self, name: &MachineName) -> zbus::Result<()> {
        let server = self.connection.object_server();
        let mine = self.devices.keys().filter(|(machine, _)| machine == name);
        for (_, id) in mine.cloned().collect::<Vec<_>>() {
            let place = path::device(name.as_str(), id.as_str());
            // Only a balloon has one.
            let _ = server.remove::<BalloonInterface, _>(&place).await;
            server.remove::<DeviceInterface, _>(place).await?;
            let key = (name.clone(), id);
            self.balloons.remove(&key);
            self.devices.remove(&key);
        }
        Ok(())
    }

    async fn balloon(&mut self, name: MachineName, id: DeviceId, now: Status) -> zbus::Result<()> {
        let at = path::device(name.as_str(), id.as_str());
        let key = (name, id);
        // One that is gone already is not told of.
        if !self.devices.contains_key(&key) {
            return Ok(());
        }
        let told = self.balloons.insert(key, now).unwrap_or_default();
        let emitter = SignalEmitter::new(&self.connection, at)?;
        api::balloon::tell_changes(&emitter, told, now).await
    }

    async fn remove(&mut self, name: &MachineName) -> zbus::Result<()> {
        self.remove_devices(name).await?;
        self.machines.remove(name);
        let place = path::machine(name.as_str());
        let server = self.connection.object_server();
        server.remove::<MachineInterface, _>(place).await?;
        Ok(())
    }

    async fn machine(&mut self, name: &MachineName) -> zbus::Result<()> {
        let Ok(machine) = self.broker.machine(name.as_str()) else {
            return Ok(());
        };
        // One that was not added yet is told whole when it is.
        let Some(old) = self.machines.get_mut(name) else {
            return Ok(());
        };
        let new = machine.facts();
        let old = std::mem::replace(old, new.clone());
        let server = self.connection.object_server();
        let interface = server
            .interface::<_, MachineInterface>(path::machine(name.as_str()))
            .await?;
        let names = changed!(old, new,
            devices => "Devices",
            vcpus => "Vcpus",
            memory => "Memory",
            autostart => "Autostart",
            definition => "Definition",
            unit => "Unit",
            process => "Process",
            started_usec => "StartedUSec",
            reason => "Reason",
            state => "State",
            job => "Job",
        );
        tell(&interface, names).await?;
        let mine = self.devices.keys().filter(|(machine, _)| machine == name);
        for (_, id) in mine.cloned().collect::<Vec<_>>() {
            self.device(name, &id).await?;
        }
        Ok(())
    }

    async fn device(&mut self, name: &MachineName, id: &DeviceId) -> zbus::Result<()> {
        let Some((at, old)) = self.devices.get_mut(&(name.clone(), id.clone())) else {
            return Ok(());
        };
        let Ok(machine) = self.broker.machine(name.as_str()) else {
            return Ok(());
        };
        let Some(new) = DeviceObject::new(&self.broker, &machine, *at).current() else {
            return Ok(());
        };
        let old = std::mem::replace(old, new.clone());
        let server = self.connection.object_server();
        let interface = server
            .interface::<_, DeviceInterface>(path::device(name.as_str(), id.as_str()))
            .await?;
        let names = changed!(old, new,
            source => "Source",
            unit => "Unit",
            process => "Process",
            reason => "Reason",
            reconnects => "Reconnects",
            state => "State",
        );
        tell(&interface, names).await
    }

    async fn job_new(&mut self, id: u32) -> zbus::Result<()> {
        let Ok(job) = self.broker.jobs.get(id) else {
            return Ok(());
        };
        let server = self.connection.object_server();
        let object = JobObject::new(&self.broker, &job);
        server.at(path::job(id), api::job::Job(object)).await?;
        if let Some(migration) = job.record().migration {
            let object = api::job_migration::JobMigration(MigrationObject::new(&self.broker, &job));
            server.at(path::job(id), object).await?;
            self.migrations.insert(id, migration.facts());
        }
        let emitter = self.manager_emitter()?;
        ManagerInterface::job_new(&emitter, id, path::job(id).into_inner()).await
    }

    fn manager_emitter(&self) -> zbus::Result<SignalEmitter<'_>> {
        SignalEmitter::new(&self.connection, path::MANAGER)
    }

    async fn job(&mut self, id: u32, ended: bool) -> zbus::Result<()> {
        let Ok(job) = self.broker.jobs.get(id) else {
            return Ok(());
        };
        let at: OwnedObjectPath = path::job(id);
        let server = self.connection.object_server();
        let interface = server.interface::<_, JobInterface>(&at).await?;
        let emitter = interface.signal_emitter();
        let mut names = vec!["Phase", "Progress", "Cancellable"];
        if ended {
            names.extend(["State", "Result"]);
        }
        tell(&interface, names).await?;
        self.migration(id, &job).await?;
        if ended {
            let facts = job.facts();
            let state = facts.state.as_str();
            JobInterface::finished(emitter, state, facts.result).await?;
            let manager = self.manager_emitter()?;
            let at = at.into_inner();
            ManagerInterface::job_removed(&manager, id, at, &facts.machine, state).await?;
        }
        Ok(())
    }

    async fn migration(&mut self, id: u32, job: &Job) -> zbus::Result<()> {
        let Some(old) = self.migrations.get_mut(&id) else {
            return Ok(());
        };
        let new = job.record().migration.unwrap_or_default().facts();
        let old = std::mem::replace(old, new.clone());
        let server = self.connection.object_server();
        let interface = server
            .interface::<_, MigrationInterface>(path::job(id))
            .await?;
        let names = changed!(old, new,
            place => "Place",
            bytes_sent => "BytesSent",
            bytes_remaining => "BytesRemaining",
            dirty_rate => "DirtyRate",
            link_rate => "LinkRate",
            iteration => "Iteration",
            max_downtime_usec => "MaxDowntimeUSec",
            predicted_downtime_usec => "PredictedDowntimeUSec",
            downtime_usec => "DowntimeUSec",
            throttle => "Throttle",
        );
        tell(&interface, names).await
    }
}
