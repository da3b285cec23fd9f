//! `org.godwit.Core1.Migration` for the owner.

use std::collections::HashMap;
use std::time::Duration;

use api::Error;
use api::migration::Mover;
use tokio::sync::oneshot;
use zbus::{OwnedFd, OwnedVariant};

use super::event::{Event, Events};
use super::migrate::{Request, Watcher};
use crate::migration::setup::{MigrateOptions, Sockets};
use crate::migration::snapshot::Files;

/// How long the main thread has to begin a migration. It may be in the middle of another one's
/// switchover.
const BEGIN_DEADLINE: Duration = Duration::from_secs(60);

/// One owner's view.
pub(super) struct Service {
    events: Events,
    watcher: Watcher,
}

impl Service {
    pub(super) fn new(events: Events, watcher: Watcher) -> Self {
        Self { events, watcher }
    }

    async fn ask(
        &self,
        event: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> Event,
    ) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.events.send(event(answer));
        match tokio::time::timeout(BEGIN_DEADLINE, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::InvalidState("the machine has ended".into())),
            Err(_) => Err(Error::TimedOut(format!(
                "the machine did not answer within {} s",
                BEGIN_DEADLINE.as_secs()
            ))),
        }
    }
}

impl Mover for Service {
    async fn migrate(
        &self,
        control: OwnedFd,
        ram: Vec<OwnedFd>,
        states: HashMap<String, OwnedFd>,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<(), Error> {
        let sockets = Sockets {
            control: control.into(),
            ram: ram.into_iter().map(Into::into).collect(),
            states: states.into_iter().map(|(id, fd)| (id, fd.into())).collect(),
        };
        let request = Box::new(Request {
            sockets,
            options: parse(options)?,
        });
        self.ask(|answer| Event::Migrate(request, answer)).await
    }

    async fn snapshot(
        &self,
        core: OwnedFd,
        ram: Vec<OwnedFd>,
        states: HashMap<String, OwnedFd>,
    ) -> Result<(), Error> {
        let files = Box::new(Files {
            core: core.into(),
            ram: ram.into_iter().map(Into::into).collect(),
            states: states.into_iter().map(|(id, fd)| (id, fd.into())).collect(),
        });
        self.ask(|answer| Event::Snapshot(files, answer)).await
    }

    async fn wait(&self) -> Result<String, Error> {
        let mut status = self.watcher.status.clone();
        let ended = status
            .wait_for(|status| !status.active)
            .await
            .map_err(|_| Error::InvalidState("the machine has ended".into()))?;
        match &ended.outcome {
            Some(outcome) => to_json(outcome),
            None => Err(Error::InvalidState("there was no migration".into())),
        }
    }

    async fn cancel(&self) -> Result<(), Error> {
        if self.watcher.current.cancel() {
            Ok(())
        } else {
            Err(Error::InvalidState("no migration is under way".into()))
        }
    }

    fn set_max_downtime(&self, micros: u64) -> Result<(), Error> {
        let time = Duration::from_micros(micros);
        if self.watcher.current.set_max_downtime(time) {
            Ok(())
        } else {
            let nothing = "no migration away from here is under way";
            Err(Error::InvalidState(nothing.into()))
        }
    }

    async fn decide(&self, runs_there: bool) -> Result<(), Error> {
        self.ask(|answer| Event::Decide(runs_there, answer)).await
    }

    fn progress(&self) -> Result<String, Error> {
        to_json(&self.watcher.status.borrow().progress)
    }

    fn memory(&self) -> Result<OwnedFd, Error> {
        let file = self.watcher.memory.try_clone();
        let file = file.map_err(|error| Error::Internal(error.to_string()))?;
        Ok(std::os::fd::OwnedFd::from(file).into())
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Internal(error.to_string()))
}

/// Options from a dictionary, in which there is nothing else.
fn parse(dictionary: HashMap<String, OwnedVariant>) -> Result<MigrateOptions, Error> {
    let mut options = MigrateOptions::default();
    for (key, value) in dictionary {
        let wrong = || Error::InvalidArgs(format!("option {key} is of another type"));
        let number = |value: OwnedVariant| u64::try_from(value).map_err(|_| wrong());
        let flag = |value: OwnedVariant| bool::try_from(value).map_err(|_| wrong());
        match key.as_str() {
            "max-downtime-ms" => options.max_downtime_ms = number(value)?,
            "blackout-limit-ms" => options.blackout_limit_ms = number(value)?,
            "patience-s" => options.patience_s = number(value)?,
            "max-bandwidth" => options.max_bandwidth = number(value)?,
            "auto-converge" => options.auto_converge = flag(value)?,
            "shared-memory" => options.shared_memory = flag(value)?,
            _ => {
                return Err(Error::InvalidArgs(format!(
                    "{key} is no option of a migration: there are max-downtime-ms, blackout-limit-ms, \
                     patience-s, max-bandwidth, auto-converge, shared-memory"
                )));
            }
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: impl Into<OwnedVariant>) -> HashMap<String, OwnedVariant> {
        HashMap::from([(key.to_owned(), value.into())])
    }

    #[test]
    fn options_are_read_and_others_refused() {
        assert_eq!(parse(HashMap::new()).unwrap(), MigrateOptions::default());
        let options = parse(one("max-downtime-ms", 20u64)).unwrap();
        assert_eq!(options.max_downtime_ms, 20);
        let error = parse(one("auto-converge", 1u64)).unwrap_err().to_string();
        assert!(
            error.contains("auto-converge is of another type"),
            "{error}"
        );
        let error = parse(one("speed", 1u64)).unwrap_err().to_string();
        assert!(error.contains("speed is no option"), "{error}");
    }
}
