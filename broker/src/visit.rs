//! Units of declared machines that an administrator starts, or systemd at boot: a process of
//! the unit comes unasked, and becomes the core of its machine.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::broker::Broker;
use crate::launch::Launcher;
use crate::launch::systemd::names;
use crate::machine::Machine;

/// How long what is left of the machine's life before may take to be gone.
const DEADLINE: Duration = Duration::from_secs(30);

/// Starts the machines of units whose processes have come, for ever.
pub async fn receive(broker: Arc<Broker>, mut visits: UnboundedReceiver<String>) {
    while let Some(unit) = visits.recv().await {
        tokio::spawn(attend(Arc::clone(&broker), unit));
    }
}

async fn attend(broker: Arc<Broker>, unit: String) {
    let Launcher::Systemd(systemd) = &broker.host.launcher else {
        return;
    };
    // A machine that takes its process from there leaves nobody to be sent away.
    match start(&broker, &unit).await {
        Ok(()) => systemd.turn_away(&unit, "its machine has no use for it"),
        Err(why) => systemd.turn_away(&unit, &why),
    }
}

async fn start(broker: &Arc<Broker>, unit: &str) -> Result<(), String> {
    let machine = find(broker, unit)?;
    let quiet = async {
        machine.gone().await;
        machine.released().await;
    };
    if tokio::time::timeout(DEADLINE, quiet).await.is_err() {
        let state = machine.state().as_str();
        return Err(format!("machine {} is {state}", machine.name()));
    }
    let started = broker.start(&machine, false, false).await;
    let id = started.map_err(|error| error.to_string())?;
    let Some(job) = broker
        .jobs
        .all()
        .into_iter()
        .find(|job| api::path::job(job.id()) == id)
    else {
        return Ok(());
    };
    job.finished().await;
    match job.record().message {
        Some(why) => Err(why),
        None => Ok(()),
    }
}

fn find(broker: &Broker, unit: &str) -> Result<Arc<Machine>, String> {
    let mut machines = broker.machines();
    machines.retain(|machine| machine.from_file);
    let named = |machine: &Machine| names::machine(machine.name().as_str());
    if let Some(at) = machines.iter().position(|machine| named(machine) == unit) {
        return Ok(machines.swap_remove(at));
    }
    let typed = |machine: &Machine| format!("godwit-machine@{}.service", machine.name());
    match machines.iter().find(|machine| typed(machine) == unit) {
        Some(machine) => Err(format!(
            "the unit of machine {} is {:?}, as systemd-escape says",
            machine.name(),
            named(machine)
        )),
        None => Err(format!(
            "{unit} is of no declared machine: put a NAME.toml into the configuration folder, \
             then godwit reload"
        )),
    }
}
