//! What is wanted of a machine that runs, and how it reaches its core or its supervisor.
//!
//! A core that gives no answer has mostly ended: what its supervisor finds of that is the reason
//! that a caller hears, so it is waited for.

use std::time::Duration;

use api::Error;
use api::core::CoreProxy;
use api::machine::State;
use nix::sys::signal::Signal;

use super::instance::Instance;
use super::supervisor::Command;
use super::{Live, Machine};
use crate::console::Console;
use crate::host::Host;
use crate::process::Process;

/// How long the end of a core that gave no answer may take to be noticed.
const END_DEADLINE: Duration = Duration::from_secs(5);

impl Machine {
    pub(super) fn live(&self, what: &str) -> Result<Live, Error> {
        let inner = self.lock();
        match &inner.live {
            Some(live) => Ok(live.clone()),
            None => Err(self.wrong_state(inner.state, what)),
        }
    }

    /// Its core.
    ///
    /// # Errors
    /// It has none.
    pub(crate) fn core(&self, what: &str) -> Result<CoreProxy<'static>, Error> {
        self.live(what).map(|live| live.core)
    }

    /// Has its core do something.
    ///
    /// # Errors
    /// It has none, the core refuses, or the core ends over it.
    pub(crate) async fn command<W>(
        &self,
        what: &str,
        command: impl FnOnce(CoreProxy<'static>) -> W,
    ) -> Result<(), Error>
    where
        W: Future<Output = Result<(), Error>>,
    {
        match command(self.core(what)?).await {
            Err(Error::ZBus(error)) => Err(self.lost(what, &error).await),
            result => result,
        }
    }

    /// Why its core gave no answer.
    pub(crate) async fn lost(&self, what: &str, error: &zbus::Error) -> Error {
        let name = &self.name;
        // Its end is noticed by another way than its silence.
        let noticed = tokio::time::timeout(END_DEADLINE, self.gone()).await;
        let (state, reason) = {
            let inner = self.lock();
            (inner.state, inner.reason.clone())
        };
        match (noticed, state) {
            (Ok(()), State::Failed) => {
                Error::MachineFailed(format!("{name} failed before it was {what}: {reason}"))
            }
            (Ok(()), _) => {
                Error::InvalidState(format!("{name} ended before it was {what}: {reason}"))
            }
            (Err(_), _) => Error::MachineFailed(format!(
                "the core of {name} does not answer, so it was not {what}: {error}"
            )),
        }
    }

    /// Its console.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) fn console(&self) -> Result<Console, Error> {
        self.live("looked at").map(|live| live.console)
    }

    /// Kills all of its processes.
    pub(crate) async fn kill(&self) {
        if let Ok(live) = self.live("killed") {
            // A supervisor that is gone has killed them.
            let _ = live.commands.send(Command::Kill).await;
        } else if self.is_silent()
            && let Some(id) = self.lock().process.clone()
            && let Ok(core) = Process::adopt(&id)
        {
            core.signal(Signal::SIGKILL);
        }
    }

    /// Replaces the process of a device.
    ///
    /// # Errors
    /// The machine does not run, or the new process does not take over.
    pub(crate) async fn restart_device(&self, at: usize) -> Result<(), Error> {
        let live = self.live("given a new device process")?;
        let (answer, answered) = tokio::sync::oneshot::channel();
        let ended = || Error::InvalidState(format!("{} has ended", self.name));
        let command = Command::Restart { at, answer };
        live.commands.send(command).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// Lets another generation of processes take the place of the present one.
    ///
    /// # Errors
    /// The machine has ended; so has that generation.
    pub(crate) async fn succeed(&self, host: &Host, instance: Instance) -> Result<(), Error> {
        let ended = || Error::InvalidState(format!("{} has ended", self.name));
        let commands = match self.live("moved") {
            Ok(live) => live.commands,
            Err(error) => {
                instance.discard(host).await;
                return Err(error);
            }
        };
        let (answer, answered) = tokio::sync::oneshot::channel();
        let instance = Box::new(instance);
        let command = Command::Succeed { instance, answer };
        if let Err(refused) = commands.send(command).await {
            if let Command::Succeed { instance, .. } = refused.0 {
                instance.discard(host).await;
            }
            return Err(ended());
        }
        answered.await.map_err(|_| ended())
    }
}
