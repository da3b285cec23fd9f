//! All machines of a host, and what is done with them.
//!
//! | module | what |
//! |---|---|
//! | here | which machines there are |
//! | `verbs` | what is done with one |
//! | `work` | jobs, which most of that is |
//! | `take_up` | what a broker does when it is started |

mod take_up;
mod verbs;
mod work;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::machine::State;
use api::{Caller, Dictionary, Error};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::definition::Definition;
use crate::folder;
use crate::host::Host;
use crate::jobs::Jobs;
use crate::machine::Machine;
use crate::metrics::Census;
use crate::migration::{Awaited, Departure, Pending};
use crate::name::MachineName;
use crate::policy::{Action, Policy};
use crate::publish::Change;

/// Most machines of a broker.
const MAX_MACHINES: usize = 1024;

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
            // Before another of its name may have them.
            folder::remove_file(&self.defined_path(name));
            Departure::forget(&self.host, name);
            self.host.folder.remove_logs(name);
            machines.remove(name);
        }
        self.host
            .publisher
            .tell(|done| Change::Removed(name.clone(), done))
            .await;
        Ok(())
    }

    /// What brokers have that machines may come from and go to by TCP.
    pub fn migration_key(&self) -> Option<&crate::migration::peer::Key> {
        self.host.migration_key.as_ref()
    }
}
