//! A broker of the test's own, with machines that are nothing but their properties: it does on
//! request what a real broker does seldom.
//!
//! The kernel command line says what is to happen: `fail` lets the start fail, `slow` lets it go
//! on until it is cancelled, `stuck` is the same and cannot be cancelled.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use api::device::{self, Device, OneDevice};
use api::job::{self, Job, OneJob};
use api::machine::{self, Machine, OneMachine};
use api::manager::{JobEntry, MachineEntry, Machines, Manager, TRANSIENT};
use api::private_bus::PrivateBus;
use api::{Caller, Dictionary, Error};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use zbus::object_server::InterfaceRef;
use zbus::{Connection, OwnedFd, OwnedObjectPath, OwnedVariant, Variant};

/// A broker on a socket.
pub struct Fake {
    pub bus: PathBuf,
    pub world: Arc<World>,
    runtime: Runtime,
    folder: TempDir,
}

/// All that it knows.
#[derive(Default)]
pub struct World {
    state: Mutex<State>,
    connection: OnceLock<Connection>,
}

#[derive(Default)]
struct State {
    machines: BTreeMap<String, One>,
    jobs: BTreeMap<u32, job::Facts>,
}

struct One {
    state: machine::State,
    reason: String,
    transient: bool,
    definition: serde_json::Map<String, serde_json::Value>,
    reconnects: u32,
    /// The guest's end of its console.
    guest: Option<UnixStream>,
}

struct OfMachine(Arc<World>, String);
struct OfDevice(Arc<World>, String);
struct OfJob(Arc<World>, u32);
struct OfManager(Arc<World>);

impl Fake {
    /// Starts one.
    pub fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let bus = folder.path().join("bus");
        let runtime = Runtime::new().unwrap();
        let world = Arc::new(World::default());
        let user = nix::unistd::getuid().as_raw();
        runtime.block_on(async {
            let (private, service) = PrivateBus::new(api::SERVICE, user).unwrap();
            let connection = service
                .serve_at(api::path::MANAGER, Manager(OfManager(Arc::clone(&world))))
                .serve_at(api::path::MANAGER, zbus::fdo::ObjectManager)
                .build()
                .await
                .unwrap();
            world.connection.set(connection).unwrap();
            let listener = tokio::net::UnixListener::bind(&bus).unwrap();
            tokio::spawn(private.listen(listener));
        });
        Self {
            bus,
            world,
            runtime,
            folder,
        }
    }

    /// A path for what a test needs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Ends a machine: `None` is a guest that powered off.
    pub fn end_machine(&self, name: &str, failure: Option<&str>) {
        self.runtime.block_on(self.world.end(name, failure));
    }

    /// What the guest is sent, and what it says.
    pub fn guest(&self, name: &str) -> UnixStream {
        let state = self.world.state();
        state.machines[name]
            .guest
            .as_ref()
            .unwrap()
            .try_clone()
            .unwrap()
    }

    /// Its definition.
    pub fn definition(&self, name: &str) -> serde_json::Value {
        serde_json::Value::Object(self.world.state().machines[name].definition.clone())
    }

    /// Its state, if it is there.
    pub fn state_of(&self, name: &str) -> Option<machine::State> {
        self.world.state().machines.get(name).map(|one| one.state)
    }

    /// Signals so many changes of a job at once.
    pub fn hurry(&self, id: u32, times: usize) {
        self.runtime.block_on(async {
            let path = api::path::job(id);
            let interface = self.world.interface::<Job<OfJob>>(path).await;
            let emitter = interface.signal_emitter();
            for _ in 0..times {
                let job = interface.get().await;
                job.progress_changed(emitter).await.unwrap();
            }
        });
    }

    /// Ends a job.
    pub fn end_job(&self, id: u32, state: job::State) {
        self.runtime.block_on(self.world.end_job(id, state, None));
    }
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn interface<I: zbus::object_server::Interface>(
        &self,
        path: OwnedObjectPath,
    ) -> InterfaceRef<I> {
        let server = self.connection.get().unwrap().object_server();
        server.interface(path).await.unwrap()
    }

    async fn change(self: &Arc<Self>, name: &str, state: machine::State, reason: &str) {
        {
            let mut all = self.state();
            let one = all.machines.get_mut(name).unwrap();
            one.state = state;
            one.reason = reason.into();
        }
        let interface = self
            .interface::<Machine<OfMachine>>(api::path::machine(name))
            .await;
        let emitter = interface.signal_emitter();
        interface.get().await.reason_changed(emitter).await.unwrap();
        interface.get().await.state_changed(emitter).await.unwrap();
    }

    async fn end(self: &Arc<Self>, name: &str, failure: Option<&str>) {
        let state = failure.map_or(machine::State::Off, |_| machine::State::Failed);
        self.change(name, state, failure.unwrap_or_default()).await;
        let forget = {
            let mut all = self.state();
            let one = all.machines.get_mut(name).unwrap();
            one.guest = None;
            one.transient
        };
        if forget {
            self.forget(name).await;
        }
    }

    async fn forget(&self, name: &str) {
        self.state().machines.remove(name);
        let server = self.connection.get().unwrap().object_server();
        let device = api::path::device(name, "disk0");
        server.remove::<Device<OfDevice>, _>(device).await.unwrap();
        let machine = api::path::machine(name);
        server
            .remove::<Machine<OfMachine>, _>(machine)
            .await
            .unwrap();
    }

    async fn job(self: &Arc<Self>, kind: &str, machine: &str, cancellable: bool) -> u32 {
        let id = {
            let mut all = self.state();
            let id = u32::try_from(all.jobs.len()).unwrap() + 1;
            let facts = job::Facts {
                id,
                kind: kind.into(),
                machine: machine.into(),
                state: job::State::Running,
                phase: "working".into(),
                progress: 0.5,
                cancellable,
                result: Dictionary::new(),
            };
            all.jobs.insert(id, facts);
            id
        };
        let server = self.connection.get().unwrap().object_server();
        let job = Job(OfJob(Arc::clone(self), id));
        server.at(api::path::job(id), job).await.unwrap();
        id
    }

    async fn end_job(&self, id: u32, state: job::State, error: Option<(&str, &str)>) {
        {
            let mut all = self.state();
            let facts = all.jobs.get_mut(&id).unwrap();
            facts.state = state;
            facts.progress = 1.0;
            if let Some((name, message)) = error {
                facts.result.insert(job::RESULT_ERROR.into(), owned(name));
                facts
                    .result
                    .insert(job::RESULT_MESSAGE.into(), owned(message));
            }
        }
        let interface = self.interface::<Job<OfJob>>(api::path::job(id)).await;
        let emitter = interface.signal_emitter();
        interface.get().await.state_changed(emitter).await.unwrap();
    }
}

fn owned<'a>(value: impl Into<Variant<'a>>) -> OwnedVariant {
    value.into().try_into_owned().unwrap()
}

impl Machines for OfManager {
    async fn create_machine(
        &self,
        _: Caller,
        name: &str,
        definition: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        if self.0.state().machines.contains_key(name) {
            return Err(Error::MachineExists(format!(
                "there is a machine {name} already"
            )));
        }
        if let Some(Ok("lots")) = definition.get("memory").map(<&str>::try_from) {
            let problem = "memory: \"lots\" is no size";
            return Err(Error::InvalidDefinition(problem.into()));
        }
        let text = |value: &OwnedVariant| <&str>::try_from(value).ok().map(serde_json::Value::from);
        let pairs = definition
            .iter()
            .filter_map(|(key, value)| Some((key.clone(), text(value)?)));
        let one = One {
            state: machine::State::Off,
            reason: String::new(),
            transient: flags & TRANSIENT != 0,
            definition: pairs.collect(),
            reconnects: 0,
            guest: None,
        };
        self.0.state().machines.insert(name.into(), one);
        let server = self.0.connection.get().unwrap().object_server();
        let path = api::path::machine(name);
        let machine = Machine(OfMachine(Arc::clone(&self.0), name.into()));
        server.at(&path, machine).await.unwrap();
        let device = Device(OfDevice(Arc::clone(&self.0), name.into()));
        server
            .at(api::path::device(name, "disk0"), device)
            .await
            .unwrap();
        Ok(path)
    }

    async fn receive_migration(
        &self,
        _: Caller,
        name: &str,
        _: Dictionary,
        _: u64,
    ) -> Result<OwnedObjectPath, Error> {
        Err(unmoved(name))
    }

    async fn restore_machine(
        &self,
        _: Caller,
        name: &str,
        _: &str,
        _: u64,
    ) -> Result<OwnedObjectPath, Error> {
        Err(unmoved(name))
    }

    async fn get_machine(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        match self.0.state().machines.contains_key(name) {
            true => Ok(api::path::machine(name)),
            false => Err(Error::NoSuchMachine(format!("there is no machine {name}"))),
        }
    }

    async fn list_machines(&self) -> Result<Vec<MachineEntry>, Error> {
        let entry = |(name, one): (&String, &One)| MachineEntry {
            name: name.clone(),
            state: one.state.as_str().into(),
            uuid: String::new(),
            path: api::path::machine(name),
        };
        Ok(self.0.state().machines.iter().map(entry).collect())
    }

    async fn get_job(&self, id: u32) -> Result<OwnedObjectPath, Error> {
        match self.0.state().jobs.contains_key(&id) {
            true => Ok(api::path::job(id)),
            false => Err(Error::NoSuchJob(format!("there is no job {id}"))),
        }
    }

    async fn list_jobs(&self) -> Result<Vec<JobEntry>, Error> {
        let entry = |(id, facts): (&u32, &job::Facts)| JobEntry {
            id: *id,
            kind: facts.kind.clone(),
            machine: facts.machine.clone(),
            state: facts.state.as_str().into(),
            path: api::path::job(*id),
        };
        Ok(self.0.state().jobs.iter().map(entry).collect())
    }

    async fn reload(&self, _: Caller) -> Result<(), Error> {
        Err(Error::AccessDenied("you may not reload".into()))
    }

    fn version(&self) -> String {
        "fake".into()
    }

    fn features(&self) -> Vec<String> {
        Vec::new()
    }

    fn metrics_socket(&self) -> String {
        String::new()
    }
}

impl OfMachine {
    fn wants(&self, word: &str) -> bool {
        let all = self.0.state();
        let cmdline = all.machines[&self.1].definition.get("cmdline").cloned();
        cmdline.is_some_and(|text| text.as_str() == Some(word))
    }

    fn must_be(&self, wanted: machine::State) -> Result<(), Error> {
        let is = self.0.state().machines[&self.1].state;
        if is == wanted {
            return Ok(());
        }
        Err(Error::InvalidState(format!(
            "{} is {}",
            self.1,
            is.as_str()
        )))
    }
}

/// Its machines have no memory that could be moved.
fn unmoved(name: &str) -> Error {
    Error::ResourceUnavailable(format!("there is nothing of {name} to move"))
}

impl OneMachine for OfMachine {
    async fn migrate(
        &self,
        _: Caller,
        _: &str,
        _: Dictionary,
        _: u64,
    ) -> Result<OwnedObjectPath, Error> {
        Err(unmoved(&self.1))
    }

    async fn snapshot(&self, _: Caller, _: &str, _: u64) -> Result<OwnedObjectPath, Error> {
        Err(unmoved(&self.1))
    }

    async fn decide(&self, _: Caller, there: bool, _: u64) -> Result<(), Error> {
        self.must_be(machine::State::Paused)?;
        if there {
            let (world, name) = (Arc::clone(&self.0), self.1.clone());
            tokio::spawn(async move { world.forget(&name).await });
        } else {
            self.0.change(&self.1, machine::State::Running, "").await;
        }
        Ok(())
    }

    async fn start(&self, _: Caller, flags: u64) -> Result<OwnedObjectPath, Error> {
        self.must_be(machine::State::Off)?;
        let id = self.0.job("start", &self.1, !self.wants("stuck")).await;
        if self.wants("fail") {
            let error = (
                "org.godwit.Vmm1.Error.ResourceUnavailable",
                "there is no tap t0",
            );
            self.0.end_job(id, job::State::Failed, Some(error)).await;
        } else if !self.wants("slow") && !self.wants("stuck") {
            let paused = flags & machine::PAUSED != 0;
            let state = if paused {
                machine::State::Paused
            } else {
                machine::State::Running
            };
            self.0.change(&self.1, state, "").await;
            self.0.end_job(id, job::State::Done, None).await;
        }
        Ok(api::path::job(id))
    }

    async fn power_off(&self, _: Caller, _: u64) -> Result<OwnedObjectPath, Error> {
        // This guest does not listen.
        let id = self.0.job("power-off", &self.1, true).await;
        Ok(api::path::job(id))
    }

    async fn terminate(&self, _: Caller, _: u64) -> Result<OwnedObjectPath, Error> {
        let id = self.0.job("terminate", &self.1, false).await;
        let transient = self.0.state().machines[&self.1].transient;
        self.0.change(&self.1, machine::State::Off, "").await;
        self.0.end_job(id, job::State::Done, None).await;
        assert!(!transient, "an object cannot remove itself in its own call");
        Ok(api::path::job(id))
    }

    async fn reset(&self, _: Caller, _: u64) -> Result<(), Error> {
        self.must_be(machine::State::Running)
    }

    async fn pause(&self, _: Caller, _: u64) -> Result<(), Error> {
        self.must_be(machine::State::Running)?;
        self.0.change(&self.1, machine::State::Paused, "").await;
        Ok(())
    }

    async fn resume(&self, _: Caller, _: u64) -> Result<(), Error> {
        self.must_be(machine::State::Paused)?;
        self.0.change(&self.1, machine::State::Running, "").await;
        Ok(())
    }

    async fn remove(&self, _: Caller, _: u64) -> Result<(), Error> {
        self.must_be(machine::State::Off)?;
        let (world, name) = (Arc::clone(&self.0), self.1.clone());
        tokio::spawn(async move { world.forget(&name).await });
        Ok(())
    }

    async fn open_console(&self, _: Caller, _: &str, flags: u64) -> Result<OwnedFd, Error> {
        if self.0.state().machines[&self.1].state == machine::State::Off {
            return Err(Error::InvalidState(format!("{} is off", self.1)));
        }
        let (mut guest, theirs) = UnixStream::pair().unwrap();
        if flags & machine::REPLAY != 0 {
            guest.write_all(b"it booted\n").unwrap();
        }
        self.0.state().machines.get_mut(&self.1).unwrap().guest = Some(guest);
        Ok(std::os::fd::OwnedFd::from(theirs).into())
    }

    async fn open_log(&self, _: Caller, source: &str, _: u64) -> Result<OwnedFd, Error> {
        if !["core", "disk0"].contains(&source) {
            return Err(Error::InvalidArgs(format!("{source} has no log")));
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "first of {source}\nsecond of {source}").unwrap();
        let log = file.reopen().unwrap();
        Ok(std::os::fd::OwnedFd::from(log).into())
    }

    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        Ok(BTreeMap::from([("cpu_usec".into(), 7_000_000)]))
    }

    fn facts(&self) -> machine::Facts {
        let all = self.0.state();
        let one = &all.machines[&self.1];
        let runs = one.state != machine::State::Off;
        let definition = one.definition.iter();
        machine::Facts {
            name: self.1.clone(),
            uuid: "00000000-0000-0000-0000-000000000001".into(),
            state: one.state,
            reason: one.reason.clone(),
            unit: String::new(),
            process: if runs { 42 } else { 0 },
            devices: vec![api::path::device(&self.1, "disk0")],
            job: api::path::nothing(),
            vcpus: 2,
            memory: 1 << 30,
            started_usec: u64::from(runs),
            transient: one.transient,
            autostart: false,
            definition: definition
                .map(|(key, value)| (key.clone(), owned(value.as_str().unwrap())))
                .collect(),
        }
    }
}

impl OneDevice for OfDevice {
    async fn restart(&self, _: Caller, _: u64) -> Result<OwnedObjectPath, Error> {
        self.0.state().machines.get_mut(&self.1).unwrap().reconnects += 1;
        let id = self.0.job("restart-device", &self.1, false).await;
        self.0.end_job(id, job::State::Done, None).await;
        Ok(api::path::job(id))
    }

    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        Ok(BTreeMap::from([("requests".into(), 4321)]))
    }

    fn facts(&self) -> device::Facts {
        let all = self.0.state();
        let one = &all.machines[&self.1];
        let runs = one.state != machine::State::Off;
        device::Facts {
            id: "disk0".into(),
            kind: "blk".into(),
            state: if runs {
                device::State::Running
            } else {
                device::State::Off
            },
            reason: String::new(),
            unit: String::new(),
            process: if runs { 43 } else { 0 },
            source: "/disk.img".into(),
            reconnects: one.reconnects,
        }
    }
}

impl OneJob for OfJob {
    async fn cancel(&self, _: Caller) -> Result<(), Error> {
        if !self.0.state().jobs[&self.1].cancellable {
            return Err(Error::InvalidState(format!(
                "job {} cannot be cancelled",
                self.1
            )));
        }
        self.0.end_job(self.1, job::State::Cancelled, None).await;
        Ok(())
    }

    fn facts(&self) -> job::Facts {
        let all = self.0.state();
        let facts = &all.jobs[&self.1];
        let copy =
            |(key, value): (&String, &OwnedVariant)| (key.clone(), value.try_clone().unwrap());
        job::Facts {
            kind: facts.kind.clone(),
            machine: facts.machine.clone(),
            phase: facts.phase.clone(),
            result: facts.result.iter().map(copy).collect(),
            ..*facts
        }
    }
}
