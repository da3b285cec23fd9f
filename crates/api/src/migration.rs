//! `org.godwit.Core1.Migration` at `/org/godwit/Core1`: moving a machine to another core.
//!
//! The owner connects the two cores and, for each device with state, the two device processes,
//! and hands one end of each connection to either side: here to the source, and on its command
//! line (`--incoming`) to the destination. What passes is between the two.

use std::collections::HashMap;
use std::future::Future;

use zbus::{OwnedFd, OwnedVariant};

use crate::Error;

/// What a core does for its owner who moves its machine.
pub trait Mover: Send + Sync + 'static {
    /// See [`MigrationProxy::migrate`].
    fn migrate(
        &self,
        control: OwnedFd,
        ram: Vec<OwnedFd>,
        states: HashMap<String, OwnedFd>,
        options: HashMap<String, OwnedVariant>,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MigrationProxy::snapshot`].
    fn snapshot(
        &self,
        core: OwnedFd,
        ram: Vec<OwnedFd>,
        states: HashMap<String, OwnedFd>,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MigrationProxy::wait`].
    fn wait(&self) -> impl Future<Output = Result<String, Error>> + Send;
    /// See [`MigrationProxy::cancel`].
    fn cancel(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MigrationProxy::set_max_downtime`]. Must not block.
    fn set_max_downtime(&self, micros: u64) -> Result<(), Error>;
    /// See [`MigrationProxy::decide`].
    fn decide(&self, runs_there: bool) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MigrationProxy::progress`]. Must not block.
    fn progress(&self) -> Result<String, Error>;
    /// See [`MigrationProxy::memory`]. Must not block.
    fn memory(&self) -> Result<OwnedFd, Error>;
}

/// The interface on a [`Mover`].
#[derive(Debug)]
pub struct Migration<M>(pub M);

/// Moves the machine.
#[zbus::interface(
    name = "org.godwit.Core1.Migration",
    proxy(
        default_path = "/org/godwit/Core1",
        default_service = "org.godwit.Core1"
    )
)]
impl<M: Mover> Migration<M> {
    /// Starts to move the machine. `control` is connected to the other core, `ram` are 1 to 16
    /// connections for memory (none where memory is shared), `states` one for each device with
    /// state, by id. Options: `max-downtime-ms` (t, 300),
    /// `blackout-limit-ms` (t, 10000: a stop that lasts longer is given up), `auto-converge` (b), `shared-memory` (b,
    /// the other core maps [`Self::memory`]), `patience-s` (t, 60: how long a migration that does
    /// not converge goes on), `max-bandwidth` (t, bytes of memory a second while the guest runs;
    /// 0: no limit).
    async fn migrate(
        &self,
        control: OwnedFd,
        ram: Vec<OwnedFd>,
        states: HashMap<String, OwnedFd>,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<(), Error> {
        self.0.migrate(control, ram, states, options).await
    }

    /// Starts to write the machine into files, which are empty: one for the core, 1 to 16 for
    /// memory, one for each device with state, by id. The machine stands still meanwhile and then
    /// goes on; [`Self::wait`] tells how it ended: `kept`, with a `reason` if it was not written.
    /// `godwit-vmm --incoming snapshot=N,…` makes a machine of them, which is paused at first.
    async fn snapshot(
        &self,
        core: OwnedFd,
        ram: Vec<OwnedFd>,
        states: HashMap<String, OwnedFd>,
    ) -> Result<(), Error> {
        self.0.snapshot(core, ram, states).await
    }

    /// Waits until no migration is under way. How the last one ended, as JSON: `result` (`moved`,
    /// `kept`, `undecided`; `arrived` at the destination and after a snapshot was restored),
    /// `reason`, `report`. A core whose machine has moved ends soon after.
    async fn wait(&self) -> Result<String, Error> {
        self.0.wait().await
    }

    /// Ends the migration that is under way; the machine stays. Too late after the commit.
    async fn cancel(&self) -> Result<(), Error> {
        self.0.cancel().await
    }

    /// Changes `max-downtime-ms` of the migration that is under way, to so many microseconds. It
    /// counts when the round of copying that runs is over.
    async fn set_max_downtime(&self, micros: u64) -> Result<(), Error> {
        self.0.set_max_downtime(micros)
    }

    /// Decides, after `undecided`, where the machine is: the caller has made sure that it runs at
    /// the destination, or that it does not and never will.
    async fn decide(&self, runs_there: bool) -> Result<(), Error> {
        self.0.decide(runs_there).await
    }

    /// How far it is, as JSON.
    async fn progress(&self) -> Result<String, Error> {
        self.0.progress()
    }

    /// The file that is guest memory, for a destination on this host.
    async fn memory(&self) -> Result<OwnedFd, Error> {
        self.0.memory()
    }
}
