//! `org.godwit.Vmm1.Balloon`.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::balloon::OneBalloon;
use api::{Caller, Error};

use crate::broker::Broker;
use crate::machine::Machine;
use crate::policy::Action;

/// A balloon of a machine.
#[derive(Debug)]
pub struct BalloonObject {
    broker: Arc<Broker>,
    machine: Arc<Machine>,
    /// Its place in the definition.
    at: usize,
}

impl BalloonObject {
    pub(super) fn new(broker: &Arc<Broker>, machine: &Arc<Machine>, at: usize) -> Self {
        Self {
            broker: Arc::clone(broker),
            machine: Arc::clone(machine),
            at,
        }
    }
}

impl OneBalloon for BalloonObject {
    async fn look(&self) -> Result<(u64, u64, BTreeMap<String, u64>), Error> {
        self.machine.balloon(self.at).await
    }

    async fn set_target(&self, caller: Caller, bytes: u64) -> Result<(), Error> {
        let name = self.machine.name().as_str();
        self.broker
            .permit(&caller, Action::Manage, name, "set-balloon-target")
            .await?;
        self.machine.set_balloon_target(self.at, bytes).await
    }

    async fn statistics_interval(&self) -> Result<u32, Error> {
        self.machine.balloon_statistics_interval(self.at).await
    }

    async fn set_statistics_interval(&self, caller: Caller, seconds: u32) -> Result<(), Error> {
        let name = self.machine.name().as_str();
        self.broker
            .permit(
                &caller,
                Action::Manage,
                name,
                "set-balloon-statistics-interval",
            )
            .await?;
        self.machine
            .set_balloon_statistics_interval(self.at, seconds)
            .await
    }
}
