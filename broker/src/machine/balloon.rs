//! A machine's balloon, which its core asks.

use std::collections::BTreeMap;
use std::time::Duration;

use api::Error;
use api::balloon1::Status;
use api::core::CoreProxy;

use super::Machine;
use crate::name::DeviceId;
use crate::publish::Change;

/// How long a core may take, which itself waits a second at most.
const DEADLINE: Duration = Duration::from_secs(4);

impl Machine {
    /// Target, size and statistics of the balloon at place `at` of the definition.
    ///
    /// # Errors
    /// The machine does not run, or the balloon does not answer.
    pub(crate) async fn balloon(
        &self,
        at: usize,
    ) -> Result<(u64, u64, BTreeMap<String, u64>), Error> {
        let (core, id) = (self.core("asked for its balloon")?, self.balloon_id(at)?);
        self.in_time(core.balloon(id.as_str())).await
    }

    /// Asks the guest for so many bytes.
    ///
    /// # Errors
    /// As [`Self::balloon`], or it is no size.
    pub(crate) async fn set_balloon_target(&self, at: usize, bytes: u64) -> Result<(), Error> {
        let (core, id) = (self.core("asked for memory")?, self.balloon_id(at)?);
        let memory = self.definition().memory;
        if bytes > memory {
            let name = &self.name;
            return Err(Error::InvalidArgs(format!(
                "{name} has {memory} bytes of memory: it cannot give {bytes}"
            )));
        }
        self.in_time(core.set_balloon_target(id.as_str(), bytes))
            .await
    }

    /// Seconds between two questions for the guest's statistics.
    ///
    /// # Errors
    /// As [`Self::balloon`].
    pub(crate) async fn balloon_statistics_interval(&self, at: usize) -> Result<u32, Error> {
        let (core, id) = (self.core("asked for its balloon")?, self.balloon_id(at)?);
        self.in_time(core.balloon_statistics_interval(id.as_str()))
            .await
    }

    /// Has the guest asked as often.
    ///
    /// # Errors
    /// As [`Self::balloon`], or it is too seldom.
    pub(crate) async fn set_balloon_statistics_interval(
        &self,
        at: usize,
        seconds: u32,
    ) -> Result<(), Error> {
        let (core, id) = (self.core("asked for statistics")?, self.balloon_id(at)?);
        self.in_time(core.set_balloon_statistics_interval(id.as_str(), seconds))
            .await
    }

    /// Tells the bus each status of the balloon at place `at`, for as long as its core is there.
    pub(super) async fn follow_balloon(
        &self,
        at: usize,
        core: CoreProxy<'static>,
    ) -> zbus::Result<()> {
        let Ok(id) = self.balloon_id(at) else {
            return Ok(());
        };
        // Those of other devices would fill the queue while the core is asked.
        let mine = [(0, id.as_str())];
        let mut changes = core.receive_device_changed_with_args(&mine).await?;
        loop {
            // One that does not answer has none; the next change may be that it does.
            if let Ok((target, actual, _)) = self.balloon(at).await
                && let Ok(statistics_interval) = self.balloon_statistics_interval(at).await
            {
                let status = Status {
                    target,
                    actual,
                    statistics_interval,
                };
                self.publisher
                    .send(Change::Balloon(self.name.clone(), id.clone(), status));
            }
            if api::next(&mut changes).await.is_none() {
                return Ok(());
            }
        }
    }

    fn balloon_id(&self, at: usize) -> Result<DeviceId, Error> {
        let (device, _) = self
            .device(at)
            .ok_or_else(|| Error::NoSuchDevice(format!("{} has no device {at}", self.name)))?;
        Ok(device.id)
    }

    async fn in_time<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::time::timeout(DEADLINE, call)
            .await
            .unwrap_or_else(|_| {
                Err(Error::TimedOut(format!(
                    "the core of {} did not answer within {} s",
                    self.name,
                    DEADLINE.as_secs()
                )))
            })
    }
}
