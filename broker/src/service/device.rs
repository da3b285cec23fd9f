//! `org.godwit.Vmm1.Device`.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::device::{Facts, OneDevice, State};
use api::{Caller, Error, only_flags};
use zbus::OwnedObjectPath;

use crate::broker::Broker;
use crate::machine::Machine;
use crate::policy::Action;

/// A device of a machine.
#[derive(Debug)]
pub struct DeviceObject {
    broker: Arc<Broker>,
    machine: Arc<Machine>,
    /// Its place in the definition.
    at: usize,
}

impl DeviceObject {
    pub(super) fn new(broker: &Arc<Broker>, machine: &Arc<Machine>, at: usize) -> Self {
        Self {
            broker: Arc::clone(broker),
            machine: Arc::clone(machine),
            at,
        }
    }

    /// What the bus shows; nothing when the machine has no such device any more.
    pub(super) fn current(&self) -> Option<Facts> {
        let (device, status) = self.machine.device(self.at)?;
        let (unit, process) = match status.process {
            Some(process) => (process.unit, process.pid),
            None => (String::new(), 0),
        };
        Some(Facts {
            kind: device.kind_name().to_owned(),
            source: device.source(),
            id: device.id.into(),
            state: status.state,
            reason: status.reason,
            unit,
            process,
            reconnects: status.reconnects,
        })
    }
}

impl OneDevice for DeviceObject {
    async fn restart(&self, caller: Caller, flags: u64) -> Result<OwnedObjectPath, Error> {
        only_flags(flags, 0)?;
        let name = self.machine.name().as_str();
        self.broker
            .permit(&caller, Action::RestartDevice, name, "restart-device")
            .await?;
        self.broker.restart_device(&self.machine, self.at).await
    }

    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        self.machine.device_statistics(self.at).await
    }

    fn facts(&self) -> Facts {
        self.current().unwrap_or_else(|| Facts {
            id: String::new(),
            kind: String::new(),
            state: State::Off,
            reason: "the machine has no such device any more".into(),
            unit: String::new(),
            process: 0,
            source: String::new(),
            reconnects: 0,
        })
    }
}
