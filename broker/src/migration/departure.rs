//! A machine that went to another broker: where to, so that it is not started here a second time,
//! and so that the other can be asked what became of it.

use serde::{Deserialize, Serialize};

use super::Uri;
use super::arrivals::Fate;
use super::peer::Dial;
use crate::folder;
use crate::host::Host;
use crate::machine::Machine;
use crate::name::MachineName;

/// Where a machine went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Departure {
    /// The other broker.
    pub(crate) uri: String,
    /// What the other broker knows it by.
    pub(crate) id: String,
    /// It is there. Else it may be.
    pub(crate) moved: bool,
}

impl Departure {
    /// That of a machine, if it went anywhere and has not come back.
    pub(crate) fn of(host: &Host, machine: &MachineName) -> Option<Self> {
        folder::load(&host.folder.departure(machine)).ok()
    }

    /// Writes it down.
    pub(crate) fn note(&self, host: &Host, machine: &MachineName) {
        if let Err(error) = folder::save(&host.folder.departure(machine), self) {
            tracing::error!(%machine, %error, "another broker would not know where it went");
        }
    }

    /// Writes down that the machine is there. One that is not declared is forgotten with its end.
    pub(crate) fn moved(host: &Host, machine: &Machine) -> Self {
        let name = machine.name();
        let mut departure = Self::of(host, name).unwrap_or_default();
        departure.moved = true;
        departure.note(host, name);
        departure
    }

    /// The machine is here.
    pub(crate) fn forget(host: &Host, machine: &MachineName) {
        folder::remove_file(&host.folder.departure(machine));
    }

    /// Asks the other broker what became of the machine: `None` if it cannot be reached or does not
    /// know.
    pub(crate) async fn ask(&self, host: &Host) -> Option<Fate> {
        let uri: Uri = self.uri.parse().ok()?;
        let dial = Dial {
            uri: &uri,
            key: host.migration_key.as_ref(),
        };
        match dial.ask(&self.id).await {
            Ok(fate) => fate,
            Err(error) => {
                tracing::info!(uri = %uri, %error, "nobody there says what became of a machine");
                None
            }
        }
    }

    /// Whether the machine came there, if the other broker knows.
    pub(crate) async fn has_come(&self, host: &Host) -> Option<bool> {
        match self.ask(host).await? {
            Fate::Came => Some(true),
            Fate::Never => Some(false),
            Fate::Coming => None,
        }
    }

    /// What there is to do about it, in one sentence.
    pub(crate) fn advice(&self, machine: &MachineName) -> String {
        let Self { uri, moved, .. } = self;
        match moved {
            true => format!(
                "{machine} has moved to {uri}: start it there, or here with --force when it has \
                 ended there for good"
            ),
            false => format!(
                "{machine} may run at {uri}: look there; start it here with --force when it does \
                 not run there and never will"
            ),
        }
    }
}
