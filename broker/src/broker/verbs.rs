//! What is done with a machine: most of it is a job.

use std::sync::Arc;
use std::time::Duration;

use api::core::CoreProxy;
use api::machine::State;
use api::{Dictionary, Error, path};
use zbus::OwnedObjectPath;

use super::Broker;
use crate::jobs::{Job, Kind};
use crate::machine::{self, Machine};
use crate::migration::{Leaving, Options, Uri};

/// How long a core may take to end when it is told to.
const TERMINATE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a machine may take to be gone when its core has ended or was killed.
const GONE_DEADLINE: Duration = Duration::from_secs(30);
/// How long a guest may take to switch itself off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(600);

impl Broker {
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
        machine.must_be_movable()?;
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
}

pub(super) async fn wait_for_power_off(machine: &Machine, job: &Job) -> Result<(), Error> {
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
pub(super) async fn end(machine: &Machine, job: &Job) -> Result<(), Error> {
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
