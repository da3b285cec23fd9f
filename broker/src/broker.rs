//! All machines of a host, and what is done with them.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::core::CoreProxy;
use api::machine::State;
use api::{Caller, Dictionary, Error, path};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use zbus::OwnedObjectPath;

use crate::definition::Definition;
use crate::folder;
use crate::host::Host;
use crate::jobs::{Job, Jobs, Kind, Record};
use crate::machine::{self, Machine, MachineState};
use crate::metrics::Census;
use crate::migration::{Awaited, Departure, Leaving, Options, Pending, Uri};
use crate::name::MachineName;
use crate::policy::{Action, Policy};
use crate::publish::Change;

/// Most machines of a broker.
const MAX_MACHINES: usize = 1024;
/// How long a core may take to end when it is told to.
const TERMINATE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a machine may take to be gone when its core has ended or was killed.
const GONE_DEADLINE: Duration = Duration::from_secs(30);
/// How long a guest may take to switch itself off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(600);

/// A machine that was made by a call, as it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Defined {
    definition: Definition,
    transient: bool,
}

/// All machines of this host.
#[derive(Debug)]
pub struct Broker {
    pub(crate) host: Arc<Host>,
    policy: Policy,
    pub(crate) config: Option<PathBuf>,
    machines: Mutex<BTreeMap<MachineName, Arc<Machine>>>,
    pub(crate) jobs: Jobs,
    /// Machines that somebody said will come.
    pub(crate) awaited: Awaited,
    /// What a broker before this one left in the middle of a migration, until its job goes on.
    pending: Mutex<BTreeMap<MachineName, Pending>>,
}

impl Broker {
    /// A broker that knows no machine yet.
    pub fn new(host: Host, policy: Policy, config: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Self {
            jobs: Jobs::new(host.publisher.clone()),
            host: Arc::new(host),
            policy,
            config,
            machines: Mutex::default(),
            awaited: Awaited::default(),
            pending: Mutex::default(),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, BTreeMap<MachineName, Arc<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pending(&self) -> MutexGuard<'_, BTreeMap<MachineName, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All machines, by name.
    pub fn machines(&self) -> Vec<Arc<Machine>> {
        self.lock().values().cloned().collect()
    }

    /// The machine of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn machine(&self, name: &str) -> Result<Arc<Machine>, Error> {
        let parsed =
            MachineName::new(name).map_err(|error| Error::InvalidArgs(error.to_string()))?;
        let known = self.lock().get(&parsed).cloned();
        known.ok_or_else(|| Error::NoSuchMachine(format!("there is no machine {name}")))
    }

    /// Asks whether a caller may do this, and counts it.
    ///
    /// # Errors
    /// It may not.
    pub(crate) async fn permit(
        &self,
        caller: &Caller,
        action: Action,
        machine: &str,
        verb: &str,
    ) -> Result<(), Error> {
        self.host.metrics.request();
        self.policy.check(caller, action, machine, verb).await
    }

    /// How many machines and devices there are in each state, and what their processes count.
    pub async fn census(self: Arc<Self>) -> Census {
        let mut machines = BTreeMap::new();
        let mut devices = BTreeMap::new();
        let mut asked = JoinSet::new();
        for machine in self.machines() {
            *machines.entry(machine.state().as_str()).or_default() += 1;
            for (_, status) in (0..).map_while(|at| machine.device(at)) {
                *devices.entry(status.state.as_str()).or_default() += 1;
            }
            asked.spawn(async move { machine.counted().await });
        }
        Census {
            machines: machines.into_iter().collect(),
            devices: devices.into_iter().collect(),
            processes: asked.join_all().await.concat(),
        }
    }

    /// Shortens all logs that have grown too long. Blocks.
    pub fn bound_logs(&self) {
        self.host.folder.bound_logs();
    }

    pub(crate) fn defined_path(&self, name: &MachineName) -> PathBuf {
        self.host.folder.defined().join(format!("{name}.json"))
    }

    /// Makes a machine of a dictionary.
    ///
    /// # Errors
    /// Its name or definition is impossible, or there is one of this name.
    pub(crate) async fn create(
        self: &Arc<Self>,
        name: &str,
        definition: Dictionary,
        transient: bool,
    ) -> Result<Arc<Machine>, Error> {
        let name = MachineName::new(name).map_err(|error| Error::InvalidArgs(error.to_string()))?;
        let definition = Definition::from_dictionary(definition)
            .map_err(|error| Error::InvalidDefinition(error.to_string()))?;
        let machine = self.insert(name, definition.clone(), transient, false)?;
        if let Err(error) = self.keep(machine.name(), &definition, transient) {
            self.drop_machine(machine.name());
            return Err(Error::Internal(format!(
                "the machine cannot be kept: {error}"
            )));
        }
        self.publish_added(&machine).await;
        Ok(machine)
    }

    /// Writes down that there is a machine, for the brokers after this one.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn keep(
        &self,
        name: &MachineName,
        definition: &Definition,
        transient: bool,
    ) -> io::Result<()> {
        let kept = Defined {
            definition: definition.clone(),
            transient,
        };
        folder::save(&self.defined_path(name), &kept)
    }

    /// Knows a machine no more that was never told of.
    pub(crate) fn drop_machine(&self, name: &MachineName) {
        self.lock().remove(name);
    }

    pub(crate) async fn publish_added(&self, machine: &Machine) {
        let name = machine.name().clone();
        self.host
            .publisher
            .tell(|done| Change::Added(name, done))
            .await;
    }

    pub(crate) fn insert(
        &self,
        name: MachineName,
        definition: Definition,
        transient: bool,
        from_file: bool,
    ) -> Result<Arc<Machine>, Error> {
        let machines = &mut *self.lock();
        if machines.contains_key(&name) {
            return Err(Error::MachineExists(format!(
                "there is a machine {name} already"
            )));
        }
        if machines.len() >= MAX_MACHINES {
            return Err(Error::LimitsExceeded(format!(
                "there are {MAX_MACHINES} machines already"
            )));
        }
        let publisher = self.host.publisher.clone();
        let machine = Machine::new(name.clone(), definition, transient, from_file, publisher);
        machines.insert(name, Arc::clone(&machine));
        Ok(machine)
    }

    /// Forgets a machine that does not run.
    ///
    /// # Errors
    /// It runs, or something is being done with it.
    pub(crate) async fn remove(&self, machine: &Arc<Machine>) -> Result<(), Error> {
        let name = machine.name();
        {
            let machines = &mut *self.lock();
            machine.must_be(&[State::Off, State::Failed], "removed")?;
            if machine.job().is_some() {
                return Err(Error::JobInProgress(format!("a job works on {name}")));
            }
            machines.remove(name);
        }
        folder::remove_file(&self.defined_path(name));
        Departure::forget(&self.host, name);
        self.host.folder.remove_logs(name);
        self.host
            .publisher
            .tell(|done| Change::Removed(name.clone(), done))
            .await;
        Ok(())
    }

    // Jobs.

    fn job_path(&self, id: u32) -> PathBuf {
        self.host.folder.join("jobs").join(format!("{id}.json"))
    }

    pub(crate) fn save_job(&self, job: &Job) {
        if let Err(error) = folder::save(&self.job_path(job.id()), &job.record()) {
            tracing::warn!(job = job.id(), %error, "another broker would not know this job");
        }
    }

    /// Begins a job on a machine.
    pub(crate) async fn begin<W>(
        self: &Arc<Self>,
        kind: Kind,
        machine: &Arc<Machine>,
        work: impl FnOnce(Arc<Self>, Arc<Machine>, Arc<Job>) -> W,
    ) -> Result<OwnedObjectPath, Error>
    where
        W: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let job = self.jobs.begin(kind, machine.name())?;
        if let Err(error) = machine.claim(&job) {
            self.jobs.forget(job.id());
            return Err(error);
        }
        let id = job.id();
        let work = work(Arc::clone(self), Arc::clone(machine), Arc::clone(&job));
        self.publish_job(&job).await;
        self.carry_out(machine, job, work);
        Ok(path::job(id))
    }

    /// Writes down and tells that there is a job.
    pub(crate) async fn publish_job(&self, job: &Job) {
        let id = job.id();
        self.save_job(job);
        self.host
            .publisher
            .tell(|done| Change::JobNew(id, done))
            .await;
    }

    fn carry_out(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        job: Arc<Job>,
        work: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) {
        let (broker, machine) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            let result = work.await;
            broker.end_job(job, Some(machine), result).await;
        });
    }

    /// Notes how a job ended, and forgets the machine with it if that is how it is meant.
    pub(crate) async fn end_job(
        self: Arc<Self>,
        job: Arc<Job>,
        machine: Option<Arc<Machine>>,
        result: Result<(), Error>,
    ) {
        job.finish(&result);
        if let Some(machine) = &machine {
            machine.release(&job);
        }
        let record = job.record();
        self.host
            .metrics
            .job_ended(record.kind.as_str(), record.state.as_str());
        self.save_job(&job);
        self.host.publisher.send(Change::JobEnded(record.id));
        if let (Some(machine), Err(Error::Undecided(_))) = (&machine, &result) {
            self.resolve(machine);
        }
        if let Some(machine) = machine
            && is_over(&machine, &record, result.is_ok())
            && let Err(error) = self.remove(&machine).await
        {
            tracing::warn!(machine = %machine.name(), %error, "it is not forgotten");
        }
        self.forget_later(job).await;
    }

    async fn forget_later(self: Arc<Self>, job: Arc<Job>) {
        tokio::time::sleep(job.kept_for().unwrap_or_default()).await;
        let id = job.id();
        self.jobs.forget(id);
        folder::remove_file(&self.job_path(id));
        self.host.publisher.send(Change::JobForgotten(id));
    }

    /// Starts a machine.
    ///
    /// # Errors
    /// It runs, or has moved to another host and this is not to be done by `force`, or something is
    /// being done with it. What happens later is the job's.
    pub(crate) async fn start(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        paused: bool,
        force: bool,
    ) -> Result<OwnedObjectPath, Error> {
        machine.must_be(&[State::Off, State::Failed], "started")?;
        self.must_not_be_elsewhere(machine, force).await?;
        self.begin(Kind::Start, machine, |broker, machine, job| async move {
            machine::start::start(&broker.host, &machine, &job, paused).await?;
            broker.host.metrics.machine_started();
            Ok(())
        })
        .await
    }

    /// Presses the power button, and waits for what comes of it.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub(crate) async fn power_off(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
    ) -> Result<OwnedObjectPath, Error> {
        machine.must_be(&[State::Running], "powered off")?;
        self.begin(Kind::PowerOff, machine, |_, machine, job| async move {
            let press = async |core: CoreProxy<'static>| core.power_button().await;
            machine.command("powered off", press).await?;
            wait_for_power_off(&machine, &job).await
        })
        .await
    }

    /// Ends a machine, and what is being done with it.
    ///
    /// # Errors
    /// It does not run, or what is being done with it cannot be cancelled.
    pub(crate) async fn terminate(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
    ) -> Result<OwnedObjectPath, Error> {
        if let Some(job) = machine.job()
            && job.cancel().is_ok()
            && tokio::time::timeout(GONE_DEADLINE, job.finished())
                .await
                .is_ok()
        {
            // Its task lets go of the machine next.
            machine.released().await;
            if job.record().kind == Kind::Start && machine.state() == State::Off {
                return Ok(path::job(job.id()));
            }
        }
        machine.must_be(
            &[State::Running, State::Paused, State::Stopping],
            "terminated",
        )?;
        self.begin(Kind::Terminate, machine, |_, machine, job| async move {
            end(&machine, &job).await
        })
        .await
    }

    /// What brokers have that machines may come from and go to by TCP.
    pub fn migration_key(&self) -> Option<&crate::migration::peer::Key> {
        self.host.migration_key.as_ref()
    }

    /// Moves a machine.
    ///
    /// # Errors
    /// As [`Self::start`], or the way or an option is impossible.
    pub(crate) async fn migrate(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        uri: &str,
        options: Dictionary,
    ) -> Result<OwnedObjectPath, Error> {
        let uri: Uri = uri.parse().map_err(Error::InvalidArgs)?;
        let options = Options::parse(options)?;
        machine.must_be(&[State::Running, State::Paused], "moved")?;
        self.begin(Kind::Migrate, machine, |broker, machine, job| {
            job.migration(|migration| {
                migration.uri = uri.to_string();
                migration.options = options;
            });
            let leaving = Leaving {
                host: Arc::clone(&broker.host),
                machine,
                job,
            };
            async move { leaving.go(&uri, &options).await }
        })
        .await
    }

    /// Replaces the process of a device.
    ///
    /// # Errors
    /// The machine does not run, or something is being done with it.
    pub(crate) async fn restart_device(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        at: usize,
    ) -> Result<OwnedObjectPath, Error> {
        machine.must_be(
            &[State::Running, State::Paused],
            "given a new device process",
        )?;
        self.begin(Kind::RestartDevice, machine, |_, machine, job| async move {
            job.set_phase("replacing the process", 0.0);
            machine.restart_device(at).await
        })
        .await
    }

    // The broker's own start.

    /// Takes over what a broker before this one left, reads the configuration folder, and
    /// starts what is to be started. Says what is wrong and goes on.
    pub async fn take_up(self: &Arc<Self>) {
        for file in folder::list(&self.host.folder.defined()) {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            let defined: Result<Defined, _> = folder::load(&file);
            match (MachineName::new(&name), defined) {
                (Ok(name), Ok(defined))
                    if defined.transient && !self.host.folder.machine(&name).exists() =>
                {
                    // It ended with the host.
                    folder::remove_file(&file);
                    self.host.folder.remove_logs(&name);
                }
                (Ok(name), Ok(defined)) => {
                    // There is no other of this name yet.
                    let _ = self.insert(name, defined.definition, defined.transient, false);
                }
                (Ok(_), Err(error)) => {
                    tracing::error!(file = %file.display(), %error, "a machine cannot be read");
                }
                // A file that was being written.
                (Err(_), _) => folder::remove_file(&file),
            }
        }
        let mut waiting = Vec::new();
        for (name, pending) in self.find_pending().await {
            let pending = self.settle(&name, pending).await;
            waiting.extend(pending.map(|pending| (name, pending)));
        }
        for place in folder::list(&self.host.folder.join("machines")) {
            let name = place.file_name().unwrap_or_default().to_string_lossy();
            if let Ok(name) = MachineName::new(&name) {
                self.take_over(name).await;
            }
        }
        for mistake in self.read_configuration().mistakes {
            tracing::error!("{mistake}");
        }
        self.await_pending(waiting).await;
        for machine in self.machines() {
            self.publish_added(&machine).await;
        }
        for file in folder::list(&self.host.folder.join("jobs")) {
            match folder::load::<Record>(&file) {
                Ok(record) => self.take_up_job(record).await,
                Err(_) => folder::remove_file(&file),
            }
        }
        self.end_pending().await;
        for machine in self.machines() {
            if machine.definition().autostart
                && machine.state() == State::Off
                && let Err(error) = self.start(&machine, false, false).await
            {
                tracing::warn!(machine = %machine.name(), %error, "it is not started");
            }
        }
    }

    pub(crate) async fn take_over(self: &Arc<Self>, name: MachineName) {
        let place = self.host.folder.machine(&name);
        let state = match MachineState::load(&place).ok() {
            Some(state) if state.complete => state,
            // The broker before was killed when it had come, and was to be watched.
            Some(state) if folder::has_arrived(&place) => MachineState {
                complete: true,
                ..state
            },
            cut_short => {
                machine::adopt::clean(&self.host, &place, cut_short.as_ref()).await;
                return;
            }
        };
        self.lock().remove(&name);
        let inserted = self.insert(
            name.clone(),
            state.definition.clone(),
            state.transient,
            state.from_file,
        );
        let Ok(machine) = inserted else { return };
        machine::adopt::adopt(&self.host, &machine, &state).await;
    }

    /// Goes on with a job of the broker before.
    async fn take_up_job(self: &Arc<Self>, record: Record) {
        let running = record.state == api::job::State::Running;
        let (id, kind) = (record.id, record.kind.clone());
        let machine = self.machine(record.machine.as_str());
        let job = self.jobs.restore(record);
        self.host
            .publisher
            .tell(|done| Change::JobNew(id, done))
            .await;
        if !running {
            tokio::spawn(Arc::clone(self).forget_later(job));
            return;
        }
        let machine = match machine {
            Ok(machine) if machine.claim(&job).is_ok() => machine,
            _ => {
                job.finish(&Err(Error::InvalidState("its machine is gone".into())));
                self.host.publisher.send(Change::JobEnded(id));
                tokio::spawn(Arc::clone(self).forget_later(job));
                return;
            }
        };
        let runs = matches!(machine.state(), State::Running | State::Paused);
        let (job_of, machine_of) = (Arc::clone(&job), Arc::clone(&machine));
        let broker = Arc::clone(self);
        let pending = self.pending().remove(machine.name());
        let work = async move {
            match kind {
                Kind::Migrate | Kind::Receive | Kind::Restore => {
                    broker.go_on(job_of, machine_of, pending).await
                }
                Kind::PowerOff => wait_for_power_off(&machine_of, &job_of).await,
                Kind::Terminate if runs => end(&machine_of, &job_of).await,
                Kind::Terminate => Ok(()),
                Kind::Start if runs => Ok(()),
                Kind::Snapshot if runs => broker.go_on_writing(&machine_of, &job_of).await,
                Kind::Start | Kind::RestartDevice | Kind::Snapshot => Err(Error::Internal(
                    "the broker ended in the middle of it: try again".into(),
                )),
            }
        };
        self.carry_out(&machine, job, work);
    }
}

/// Whether a machine is not here any more, or never was, now that a job has ended.
fn is_over(machine: &Machine, job: &Record, is_ok: bool) -> bool {
    match job.kind {
        Kind::Start => !is_ok && machine.transient,
        Kind::Receive | Kind::Restore => !is_ok && machine.is_new(),
        // One that a file declares stays, and is off.
        Kind::Migrate => {
            is_ok && !machine.transient && !machine.from_file && machine.state() == State::Off
        }
        _ => false,
    }
}

async fn wait_for_power_off(machine: &Machine, job: &Job) -> Result<(), Error> {
    let name = machine.name();
    job.set_phase("waiting for the guest", 0.0);
    tokio::select! {
        () = machine.gone() => Ok(()),
        () = job.cancelled() => Err(Error::Cancelled(format!("nobody waits for {name} any more"))),
        () = tokio::time::sleep(POWER_OFF_DEADLINE) => Err(Error::TimedOut(format!(
            "the guest of {name} did not switch itself off within {} s",
            POWER_OFF_DEADLINE.as_secs()
        ))),
    }
}

/// Ends a machine: by its core, and if that does not do it, by force.
async fn end(machine: &Machine, job: &Job) -> Result<(), Error> {
    job.set_phase("ending", 0.0);
    if let Ok(core) = machine.core("terminated") {
        // A core that does not answer is killed.
        let _ = tokio::time::timeout(TERMINATE_DEADLINE, core.terminate()).await;
    }
    if tokio::time::timeout(TERMINATE_DEADLINE, machine.gone())
        .await
        .is_err()
    {
        job.set_phase("killing", 0.5);
        machine.kill().await;
    }
    tokio::time::timeout(GONE_DEADLINE, machine.gone())
        .await
        .map_err(|_| {
            let name = machine.name();
            let seconds = GONE_DEADLINE.as_secs();
            Error::TimedOut(format!("processes of {name} are left after {seconds} s"))
        })
}
