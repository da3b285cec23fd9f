//! What a machine's processes count, and what they use.
//!
//! A device process tells its counters to the core, by their link, and the core to the broker;
//! what a process uses the kernel tells. Whoever does not answer in time has no counters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use api::Error;
use tokio::task::JoinSet;

use super::Machine;
use crate::metrics::Counted;
use crate::usage::Usage;

/// How long a core may take, which itself waits two seconds at most.
const DEADLINE: Duration = Duration::from_secs(4);
/// Counters of devices that a machine has the sums of.
const SUMS: [&str; 5] = [
    "requests",
    "failed_requests",
    "bytes_to_guest",
    "bytes_from_guest",
    "reconnects",
];

/// Counters by their names on the bus.
type Counters = BTreeMap<String, u64>;

impl Machine {
    /// See [`api::device::DeviceProxy::statistics`].
    ///
    /// # Errors
    /// There is no such device any more.
    pub(crate) async fn device_statistics(&self, at: usize) -> Result<Counters, Error> {
        let (device, status) = self
            .device(at)
            .ok_or_else(|| Error::NoSuchDevice(format!("{} has no device {at}", self.name)))?;
        let mut counters = Counters::new();
        if let Ok(core) = self.core("asked")
            && let Ok(Ok(said)) =
                tokio::time::timeout(DEADLINE, core.device_status(device.id.as_str())).await
        {
            counters = said.statistics;
            if said.link == api::core::Link::Up {
                counters.insert("mapped_bytes".into(), said.mapped_bytes);
                counters.insert("prefaulted_bytes".into(), said.prefaulted_bytes);
            }
        }
        counters.insert("reconnects".into(), status.reconnects.into());
        // The kernel's word stands above that of the process.
        if let Some(usage) = status.process.and_then(|process| Usage::of(&process).ok()) {
            counters.extend(usage.counters());
        }
        Ok(counters)
    }

    /// The statistics of all devices, in the order of the definition.
    async fn all_device_statistics(self: &Arc<Self>) -> Vec<Counters> {
        let count = self.definition().devices.len();
        let mut asked = JoinSet::new();
        for at in 0..count {
            let machine = Arc::clone(self);
            asked.spawn(async move { (at, machine.device_statistics(at).await) });
        }
        let mut all = vec![Counters::new(); count];
        while let Some(answer) = asked.join_next().await {
            if let Ok((at, Ok(counters))) = answer {
                all[at] = counters;
            }
        }
        all
    }

    /// What its core uses, and since when.
    fn core_usage(&self) -> Counters {
        let (process, started) = {
            let inner = self.lock();
            (inner.process.clone(), inner.started_usec)
        };
        let Some(usage) = process.and_then(|process| Usage::of(&process).ok()) else {
            return Counters::new();
        };
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        let up = ("uptime_usec".to_owned(), now.saturating_sub(started));
        usage.counters().into_iter().chain([up]).collect()
    }

    /// See [`api::machine::MachineProxy::statistics`].
    pub(crate) async fn statistics(self: &Arc<Self>) -> Counters {
        let mut counters = self.core_usage();
        if counters.is_empty() {
            return counters;
        }
        let devices = self.all_device_statistics().await;
        for name in SUMS {
            let counts = devices.iter().filter_map(|counters| counters.get(name));
            counters.insert(name.into(), counts.sum());
        }
        counters
    }

    /// All of its processes, for the metrics; none when it does not run.
    pub(crate) async fn counted(self: Arc<Self>) -> Vec<Counted> {
        let counters = self.core_usage();
        if counters.is_empty() {
            return Vec::new();
        }
        let counted = |process: &str, kind: &str, counters| Counted {
            machine: self.name.to_string(),
            process: process.into(),
            kind: kind.into(),
            counters,
        };
        let mut all = vec![counted("core", "core", counters)];
        let (definition, devices) = (self.definition(), self.all_device_statistics().await);
        for (device, counters) in definition.devices.iter().zip(devices) {
            all.push(counted(device.id.as_str(), device.kind_name(), counters));
        }
        all
    }
}
