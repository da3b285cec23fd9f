//! Notes how a machine ends, also one that is forgotten at that moment.

use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::watch::{Receiver, channel};
use zbus::fdo::ObjectManagerProxy;

use crate::connection::{Broker, Machine};
use crate::error::{Result, What as _};

/// How long the broker may take to say how a machine ended, whose console is closed already.
const DEADLINE: Duration = Duration::from_secs(5);

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It did not, as far as is known.
    None,
    /// It is off, as it should be.
    Off,
    /// It failed, for this reason.
    Failed(String),
}

/// What is known of a machine.
#[derive(Clone, Debug, Default)]
struct Known {
    state: String,
    reason: String,
    /// It is forgotten.
    gone: bool,
}

impl Known {
    fn end(&self) -> End {
        match self.state.as_str() {
            "failed" => End::Failed(self.reason.clone()),
            "off" => End::Off,
            _ if self.gone => End::Off,
            _ => End::None,
        }
    }
}

/// A watch on a machine, from its start on.
#[derive(Debug)]
pub struct Watch {
    known: Receiver<Known>,
}

impl Watch {
    /// Begins to watch; what is now is known first.
    pub async fn start(broker: &Broker, machine: &Machine) -> Result<Self> {
        let what = machine.name.as_str();
        let properties = broker.properties_of(what, &machine.path).await?;
        let mut changes = properties.receive_properties_changed().await.what(what)?;
        let objects = ObjectManagerProxy::builder(broker.connection())
            .destination(api::SERVICE)
            .path(api::path::MANAGER)
            .build()
            .await
            .what(what)?;
        let mut removals = objects.receive_interfaces_removed().await.what(what)?;
        let state = machine.state().await?;
        let (sender, known) = channel(Known {
            state,
            ..Known::default()
        });
        let path = machine.path.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    // A change that came before the removal is read before it.
                    biased;
                    change = changes.next() => {
                        let Some(change) = change else { return };
                        let Ok(change) = change.args() else { continue };
                        let text = |name| {
                            let value = change.changed_properties().get(name)?;
                            value.downcast_ref::<&str>().ok().map(str::to_owned)
                        };
                        sender.send_modify(|known| {
                            known.reason = text("Reason").unwrap_or_else(|| known.reason.clone());
                            known.state = text("State").unwrap_or_else(|| known.state.clone());
                        });
                    }
                    removed = removals.next() => {
                        let Some(removed) = removed else { return };
                        let Ok(removed) = removed.args() else { continue };
                        if *removed.object_path() == *path {
                            sender.send_modify(|known| known.gone = true);
                        }
                    }
                }
            }
        });
        Ok(Self { known })
    }

    /// How it ended, once its console is closed.
    pub async fn end(mut self) -> Result<End> {
        let ended = self.known.wait_for(|known| known.end() != End::None);
        match tokio::time::timeout(DEADLINE, ended).await {
            Ok(Ok(known)) => Ok(known.end()),
            // The broker is gone, or the machine goes on.
            Ok(Err(_)) | Err(_) => Ok(End::None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_machine_is_off_unless_it_failed() {
        let known = |state: &str, gone| {
            let reason = "oh".into();
            Known {
                state: state.into(),
                reason,
                gone,
            }
            .end()
        };
        assert_eq!(known("running", false), End::None);
        assert_eq!(known("stopping", true), End::Off);
        assert_eq!(known("off", false), End::Off);
        assert_eq!(known("failed", true), End::Failed("oh".into()));
    }
}
