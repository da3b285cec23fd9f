//! `org.godwit.Vmm1.Manager` at `/org/godwit/Vmm1`: all machines of a host.
//!
//! Beside it, at the same path, is `org.freedesktop.DBus.ObjectManager` for machines,
//! devices and jobs ([`zbus::fdo::ObjectManagerProxy`]).

use std::future::Future;

use serde::{Deserialize, Serialize};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{ObjectPath, OwnedObjectPath, Type};

use crate::{Caller, Dictionary, Error};

/// Flag of [`ManagerProxy::create_machine`]: start it as well. The machine is made even if
/// its start fails; its `Job` tells.
pub const START: u64 = 1;
/// Flag of [`ManagerProxy::create_machine`]: forget the machine when it has ended.
pub const TRANSIENT: u64 = 2;

/// One machine in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct MachineEntry {
    /// Its name.
    pub name: String,
    /// Its state, see [`crate::machine::State`].
    pub state: String,
    /// Its UUID.
    pub uuid: String,
    /// Where it is.
    pub path: OwnedObjectPath,
}

/// One job in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct JobEntry {
    /// Its number.
    pub id: u32,
    /// What it does, see [`crate::job::Job`].
    pub kind: String,
    /// Name of its machine.
    pub machine: String,
    /// How far it is, see [`crate::job::State`].
    pub state: String,
    /// Where it is.
    pub path: OwnedObjectPath,
}

/// What a broker does for all machines.
pub trait Machines: Send + Sync + 'static {
    /// See [`ManagerProxy::create_machine`].
    fn create_machine(
        &self,
        caller: Caller,
        name: &str,
        definition: Dictionary,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`ManagerProxy::receive_migration`].
    fn receive_migration(
        &self,
        caller: Caller,
        name: &str,
        options: Dictionary,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`ManagerProxy::restore_machine`].
    fn restore_machine(
        &self,
        caller: Caller,
        name: &str,
        folder: &str,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`ManagerProxy::get_machine`].
    fn get_machine(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`ManagerProxy::list_machines`].
    fn list_machines(&self) -> impl Future<Output = Result<Vec<MachineEntry>, Error>> + Send;
    /// See [`ManagerProxy::get_job`].
    fn get_job(&self, id: u32) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`ManagerProxy::list_jobs`].
    fn list_jobs(&self) -> impl Future<Output = Result<Vec<JobEntry>, Error>> + Send;
    /// See [`ManagerProxy::reload`].
    fn reload(&self, caller: Caller) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`ManagerProxy::version`].
    fn version(&self) -> String;
    /// See [`ManagerProxy::features`].
    fn features(&self) -> Vec<String>;
    /// See [`ManagerProxy::metrics_socket`].
    fn metrics_socket(&self) -> String;
}

/// The interface on [`Machines`].
#[derive(Debug)]
pub struct Manager<M>(pub M);

/// All machines of this host.
#[zbus::interface(
    name = "org.godwit.Vmm1.Manager",
    proxy(default_path = "/org/godwit/Vmm1", default_service = "org.godwit.Vmm1")
)]
impl<M: Machines> Manager<M> {
    /// Makes a machine of its definition, whose keys `api::definition` lists, and returns
    /// its path. Flags: 1 starts it as well, 2 forgets it when it has ended.
    #[zbus(out_args("machine"), proxy(allow_interactive_auth))]
    async fn create_machine(
        &self,
        #[zbus(header)] header: Header<'_>,
        name: &str,
        definition: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        let caller = Caller::from(&header);
        self.0.create_machine(caller, name, definition, flags).await
    }

    /// Waits for the machine `name` to come from another broker. Options: `listen` (s, `tcp://…`
    /// or `unix:…`: for this one machine; otherwise it must come to where this broker listens
    /// anyway), `paths` (a{ss}: what the other host calls a kernel, disk, tap or socket, and what it
    /// is called here), `timeout-s` (t, 600). The job ends when the machine is here.
    #[zbus(out_args("job"))]
    async fn receive_migration(
        &self,
        #[zbus(header)] header: Header<'_>,
        name: &str,
        options: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        let caller = Caller::from(&header);
        self.0.receive_migration(caller, name, options, flags).await
    }

    /// Makes the machine again that Snapshot wrote into `folder`, under `name` or, when that is
    /// empty, under its own, and lets it run. Flags: 1 leaves it paused, 2 forgets it when it has
    /// ended.
    #[zbus(out_args("job"))]
    async fn restore_machine(
        &self,
        #[zbus(header)] header: Header<'_>,
        name: &str,
        folder: &str,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        let caller = Caller::from(&header);
        self.0.restore_machine(caller, name, folder, flags).await
    }

    /// Where the machine of this name is.
    #[zbus(out_args("machine"))]
    async fn get_machine(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        self.0.get_machine(name).await
    }

    /// All machines by name: name, state, UUID, path.
    #[zbus(out_args("machines"))]
    async fn list_machines(&self) -> Result<Vec<MachineEntry>, Error> {
        self.0.list_machines().await
    }

    /// Where the job of this number is. A job is kept for at least five minutes after its end.
    #[zbus(out_args("job"))]
    async fn get_job(&self, id: u32) -> Result<OwnedObjectPath, Error> {
        self.0.get_job(id).await
    }

    /// All jobs by number: number, kind, machine, state, path.
    #[zbus(out_args("jobs"))]
    async fn list_jobs(&self) -> Result<Vec<JobEntry>, Error> {
        self.0.list_jobs().await
    }

    /// Reads the definitions in the configuration folder again. Machines that run keep the
    /// definition with which they were started; one whose file is gone is forgotten when it has
    /// ended. Mistakes are told, one a line with file and line, when all else is done.
    #[zbus(proxy(allow_interactive_auth))]
    async fn reload(&self, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.0.reload(Caller::from(&header)).await
    }

    /// Version of the broker.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn version(&self) -> String {
        self.0.version()
    }

    /// What this broker can do, by name: kinds of devices, ways to launch.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn features(&self) -> Vec<String> {
        self.0.features()
    }

    /// Path of a Unix socket that answers HTTP requests with OpenMetrics; empty when there
    /// is none.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn metrics_socket(&self) -> String {
        self.0.metrics_socket()
    }

    /// A job began.
    #[zbus(signal)]
    pub async fn job_new(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: ObjectPath<'_>,
    ) -> zbus::Result<()>;

    /// A job ended: with `done`, `failed` or `cancelled`. It can be read for at least five
    /// minutes more.
    #[zbus(signal)]
    pub async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: ObjectPath<'_>,
        machine: &str,
        result: &str,
    ) -> zbus::Result<()>;
}
