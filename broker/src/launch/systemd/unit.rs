//! A unit whose process we watch. It is not our child, so only systemd knows how it ended.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use zbus::proxy::CacheProperties;

use super::bus::{ManagerProxy, ServiceProxy, UnitProxy};
use crate::process::Ended;

/// How long systemd may take to notice the end of a process.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is asked.
const LOOK: Duration = Duration::from_millis(5);
/// How often a unit that starts is looked at.
const STARTING_LOOK: Duration = Duration::from_millis(50);

/// A unit that systemd keeps in mind for us, also when its process has ended.
pub(crate) struct Unit {
    name: String,
    manager: ManagerProxy<'static>,
    unit: UnitProxy<'static>,
    service: ServiceProxy<'static>,
    held: AtomicBool,
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Unit").field(&self.name).finish()
    }
}

impl Unit {
    pub(super) async fn hold(manager: &ManagerProxy<'static>, name: &str) -> zbus::Result<Self> {
        manager.ref_unit(name).await?;
        let path = manager.get_unit(name).await?;
        let connection = manager.inner().connection();
        let unit = UnitProxy::builder(connection).path(path.clone());
        let service = ServiceProxy::builder(connection).path(path);
        Ok(Self {
            name: name.to_owned(),
            manager: manager.clone(),
            unit: unit.cache_properties(CacheProperties::No).build().await?,
            service: service
                .cache_properties(CacheProperties::No)
                .build()
                .await?,
            held: AtomicBool::new(true),
        })
    }

    /// Waits until its start has failed, and tells how.
    pub(super) async fn failed(&self) -> String {
        loop {
            tokio::time::sleep(STARTING_LOOK).await;
            match self.failure().await {
                Ok(None) => {}
                Ok(Some(why)) => return why,
                Err(error) => return error.to_string(),
            }
        }
    }

    async fn failure(&self) -> zbus::Result<Option<String>> {
        let state = self.unit.active_state().await?;
        let (job, _) = self.unit.job().await?;
        if job != 0 || !matches!(state.as_str(), "failed" | "inactive") {
            return Ok(None);
        }
        let result = self.service.result().await?;
        let status = self.service.exec_main_status().await?;
        Ok(Some(format!("{result}, status {status}")))
    }

    /// How the process `pid`, which has ended, did so. Lets go of the unit.
    pub(crate) async fn ended(&self, pid: u32) -> Ended {
        let ended = tokio::time::timeout(DEADLINE, self.look_until_ended(pid)).await;
        if let Some(gone) = self.let_go() {
            // It does not panic.
            let _ = gone.await;
        }
        match ended {
            Ok(Ok(ended)) => ended,
            Ok(Err(error)) => {
                tracing::warn!(unit = self.name, %error, "systemd does not say how a process ended");
                Ended::Unknown
            }
            Err(_) => Ended::Unknown,
        }
    }

    async fn look_until_ended(&self, pid: u32) -> zbus::Result<Ended> {
        loop {
            if self.service.exec_main_pid().await? != pid {
                // Another start has overwritten it.
                return Ok(Ended::Unknown);
            }
            if self.service.exec_main_exit_timestamp_monotonic().await? != 0 {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        let status = self.service.exec_main_status().await?;
        Ok(match self.service.exec_main_code().await? {
            libc::CLD_EXITED => Ended::Status(status),
            _ => Signal::try_from(status).map_or(Ended::Unknown, Ended::Signal),
        })
    }

    /// Lets go of the unit, also when nobody waits for the end of that.
    fn let_go(&self) -> Option<JoinHandle<()>> {
        // Without a runtime the broker ends, and with it what systemd keeps for it.
        let runtime = Handle::try_current().ok()?;
        if !self.held.swap(false, Ordering::Relaxed) {
            return None;
        }
        let (manager, name) = (self.manager.clone(), self.name.clone());
        Some(runtime.spawn(async move {
            if let Err(error) = manager.unref_unit(&name).await {
                tracing::warn!(unit = name, %error, "systemd keeps a unit that has ended");
            }
        }))
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        self.let_go();
    }
}
