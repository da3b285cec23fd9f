//! From a definition to a running machine, or to nothing.
//!
//! Order: everything that is opened, then the device processes, then the core with its
//! guest stopped, then the state on disk, then the guest runs. Of a broker that is killed on
//! the way no guest runs, and what it had started is ended by the next broker.

use std::sync::Arc;

use api::Error;
use api::machine::State;
use tokio::sync::mpsc;

use super::instance::{Instance, Plan};
use super::supervisor::Supervisor;
use super::{DeviceStatus, Live, Machine};
use crate::host::Host;
use crate::jobs::Job;
use crate::migration::ends::Incoming;

/// Starts `machine`, and its supervisor. With `paused`, its guest does not run yet.
///
/// # Errors
/// It did not start; nothing of it is left.
pub(crate) async fn start(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    paused: bool,
) -> Result<(), Error> {
    machine.must_be(&[State::Off, State::Failed], "started")?;
    machine.starts();
    let result = async {
        let instance = prepare(host, machine, job, None).await?;
        run(host, machine, instance, paused).await
    };
    let result = result.await;
    if let Err(error) = &result {
        machine.did_not_start(error);
    }
    result
}

/// Starts the processes of a machine that does not run, in its own folder unless it comes from
/// elsewhere.
///
/// # Errors
/// They did not start; nothing of them is left.
pub(crate) async fn prepare(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    incoming: Option<Incoming>,
) -> Result<Instance, Error> {
    let plan = Plan {
        host,
        machine,
        job,
        place: match &incoming {
            None => host.folder.machine(&machine.name),
            Some(_) => host.folder.incoming(&machine.name),
        },
        incoming,
        console: machine.console().ok(),
    };
    plan.build().await
}

/// Makes `instance` the machine, lets its guest run unless it is `paused`, and watches it.
///
/// # Errors
/// The guest does not run; nothing of it is left.
pub(crate) async fn run(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    mut instance: Instance,
    paused: bool,
) -> Result<(), Error> {
    host.folder.settle(&mut instance.place, &machine.name);
    let (commands, inbox) = mpsc::channel(16);
    machine.install(&mut instance, commands);
    let proxy = instance.proxy.clone();
    let mut supervisor = Supervisor::new(host, machine, Arc::clone(&instance.core), inbox);
    supervisor.adopt_devices(std::mem::take(&mut instance.devices));
    // From here on it ends by its supervisor.
    if let Err(error) = supervisor.begin(&proxy, paused).await {
        machine.update(|inner| inner.live = None);
        instance.devices = supervisor.into_devices();
        instance.discard(host).await;
        return Err(error);
    }
    tokio::spawn(supervisor.run());
    Ok(())
}

impl Machine {
    /// Notes that its processes are about to start.
    pub(crate) fn starts(&self) {
        self.update(|inner| {
            inner.state = State::Starting;
            inner.reason = String::new();
        });
        self.set_away(false);
        self.gone.send_replace(false);
    }

    /// Notes that they did not, and why.
    pub(crate) fn did_not_start(&self, error: &Error) {
        self.update(|inner| {
            inner.devices.fill(DeviceStatus::OFF);
            inner.process = None;
            inner.started_usec = 0;
            (inner.state, inner.reason) = match error {
                Error::Cancelled(_) => (State::Off, String::new()),
                error => (State::Failed, error.to_string()),
            };
        });
        self.gone.send_replace(true);
    }

    /// Shows `instance` as what the machine is.
    pub(super) fn install(
        &self,
        instance: &mut Instance,
        commands: mpsc::Sender<super::supervisor::Command>,
    ) {
        let console = instance.outside.console.clone();
        if let Some(switch) = instance.outside.switch.take() {
            console.switch(switch);
        }
        self.update(|inner| {
            inner.process = Some(instance.core.id().clone());
            inner.started_usec = instance.started_usec;
            inner.devices = instance.statuses();
            inner.live = Some(Live {
                core: instance.proxy.clone(),
                console,
                commands,
            });
        });
    }
}
