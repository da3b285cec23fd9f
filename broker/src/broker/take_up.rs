//! The broker's own start: it takes over what a broker before it left.

use std::sync::Arc;

use api::Error;
use api::machine::State;

use super::verbs::{end, wait_for_power_off};
use super::{Broker, Defined};
use crate::folder;
use crate::jobs::{Kind, Record};
use crate::machine::{self, MachineState};
use crate::name::MachineName;
use crate::publish::Change;

impl Broker {
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
