//! `org.godwit.Vmm1.Machine` at `/org/godwit/Vmm1/machine/NAME`: one machine.
//!
//! ```text
//!         Start                    Pause
//!  off ─────────► starting ─► running ⇄ paused
//!   ▲                 │          │ Resume │
//!   │                 ▼          ▼        ▼
//!   ├──────────── failed      stopping (PowerOff, Terminate, the guest, a failure)
//!   └────────────────────────────┘
//! ```
//! From `failed` a machine can be started or removed as from `off`.

use std::collections::BTreeMap;
use std::future::Future;

use serde::{Deserialize, Serialize};
use zbus::message::Header;
use zbus::{OwnedFd, OwnedObjectPath, OwnedVariant, Type, Variant};

use crate::{Caller, Dictionary, Error};

/// Flag of [`MachineProxy::start`]: make it, and leave it paused.
pub const PAUSED: u64 = 1;
/// Flag of [`MachineProxy::open_console`]: only read.
pub const READ_ONLY: u64 = 1;
/// Flag of [`MachineProxy::open_console`]: take the console from who writes to it now. Of
/// [`MachineProxy::start`]: start it although it has moved to another host.
pub const FORCE: u64 = 2;
/// Flag of [`MachineProxy::open_console`]: begin with what was printed lately.
pub const REPLAY: u64 = 4;

/// Where a machine is in its life.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Type, Variant, OwnedVariant,
)]
#[zbus(signature = "s", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// No process of it runs.
    Off,
    /// Its processes start.
    Starting,
    /// All vCPUs run.
    Running,
    /// No vCPU runs; devices have stopped.
    Paused,
    /// Its processes end.
    Stopping,
    /// It ended by a failure; `Reason` says which.
    Failed,
}

impl State {
    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        }
    }
}

/// What a machine is and does now.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Name.
    pub name: String,
    /// UUID in its usual form.
    pub uuid: String,
    /// State.
    pub state: State,
    /// Why it is in this state, in one sentence; empty when there is nothing to say.
    pub reason: String,
    /// Name of the systemd unit of its core; empty when it has none.
    pub unit: String,
    /// Process id of its core; 0 when there is none.
    pub process: u32,
    /// Paths of its devices.
    pub devices: Vec<OwnedObjectPath>,
    /// Path of the job that works on it, or of [`crate::path::NOTHING`].
    pub job: OwnedObjectPath,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// When it was started, microseconds since 1970; 0 when it does not run.
    pub started_usec: u64,
    /// It is forgotten when it has ended.
    pub transient: bool,
    /// It is started with the broker.
    pub autostart: bool,
    /// Its definition, with every default filled in.
    pub definition: Dictionary,
}

/// What a broker does for one machine.
pub trait OneMachine: Send + Sync + 'static {
    /// See [`MachineProxy::start`].
    fn start(
        &self,
        caller: Caller,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`MachineProxy::power_off`].
    fn power_off(
        &self,
        caller: Caller,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`MachineProxy::terminate`].
    fn terminate(
        &self,
        caller: Caller,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`MachineProxy::reset`].
    fn reset(&self, caller: Caller, flags: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MachineProxy::pause`].
    fn pause(&self, caller: Caller, flags: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MachineProxy::resume`].
    fn resume(&self, caller: Caller, flags: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MachineProxy::remove`].
    fn remove(&self, caller: Caller, flags: u64) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MachineProxy::migrate`].
    fn migrate(
        &self,
        caller: Caller,
        uri: &str,
        options: Dictionary,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`MachineProxy::snapshot`].
    fn snapshot(
        &self,
        caller: Caller,
        folder: &str,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`MachineProxy::decide`].
    fn decide(
        &self,
        caller: Caller,
        runs_there: bool,
        flags: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`MachineProxy::open_console`].
    fn open_console(
        &self,
        caller: Caller,
        console: &str,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedFd, Error>> + Send;
    /// See [`MachineProxy::open_log`].
    fn open_log(
        &self,
        caller: Caller,
        source: &str,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedFd, Error>> + Send;
    /// See [`MachineProxy::statistics`].
    fn statistics(&self) -> impl Future<Output = Result<BTreeMap<String, u64>, Error>> + Send;
    /// What the properties are now. Must not block.
    fn facts(&self) -> Facts;
}

/// The interface on [`OneMachine`].
#[derive(Debug)]
pub struct Machine<M>(pub M);

/// One machine.
#[zbus::interface(
    name = "org.godwit.Vmm1.Machine",
    proxy(default_service = "org.godwit.Vmm1")
)]
impl<M: OneMachine> Machine<M> {
    /// Starts it. Flag 1 leaves it paused. One that has moved to another host, or may be there, is
    /// only started with flag 2. The job ends when the guest runs.
    #[zbus(out_args("job"), proxy(allow_interactive_auth))]
    async fn start(
        &self,
        #[zbus(header)] header: Header<'_>,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        self.0.start(Caller::from(&header), flags).await
    }

    /// Presses its power button. The job ends when the guest is off; to cancel it is to wait
    /// no longer.
    #[zbus(out_args("job"), proxy(allow_interactive_auth))]
    async fn power_off(
        &self,
        #[zbus(header)] header: Header<'_>,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        self.0.power_off(Caller::from(&header), flags).await
    }

    /// Ends it at once, without asking the guest. The job ends when no process is left.
    #[zbus(out_args("job"), proxy(allow_interactive_auth))]
    async fn terminate(
        &self,
        #[zbus(header)] header: Header<'_>,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        self.0.terminate(Caller::from(&header), flags).await
    }

    /// Boots it again at once, without asking the guest.
    #[zbus(proxy(allow_interactive_auth))]
    async fn reset(&self, #[zbus(header)] header: Header<'_>, flags: u64) -> Result<(), Error> {
        self.0.reset(Caller::from(&header), flags).await
    }

    /// Stops all vCPUs, then all devices.
    #[zbus(proxy(allow_interactive_auth))]
    async fn pause(&self, #[zbus(header)] header: Header<'_>, flags: u64) -> Result<(), Error> {
        self.0.pause(Caller::from(&header), flags).await
    }

    /// Lets it run on.
    #[zbus(proxy(allow_interactive_auth))]
    async fn resume(&self, #[zbus(header)] header: Header<'_>, flags: u64) -> Result<(), Error> {
        self.0.resume(Caller::from(&header), flags).await
    }

    /// Forgets it. It must be off; files and disks stay.
    #[zbus(proxy(allow_interactive_auth))]
    async fn remove(&self, #[zbus(header)] header: Header<'_>, flags: u64) -> Result<(), Error> {
        self.0.remove(Caller::from(&header), flags).await
    }

    /// Moves it while it runs: to the broker that listens at `tcp://HOST:PORT` or `unix:PATH`, or
    /// with `local:` to new processes of this host, which may be of another version. Options:
    /// `max-downtime-ms` (t, 300), `channels` (t, 2), `auto-converge` (b), `patience-s` (t, 60: how
    /// long a migration that does not converge goes on), `blackout-limit-ms` (t, 10000: a stop that
    /// lasts longer is given up), `max-bandwidth` (t, bytes of memory a second while the guest
    /// runs, at least 1048576; else as many as the link carries). The job has `org.godwit.Vmm1.Job.Migration` as well, and its result
    /// says where the machine is. A machine that has moved to another broker is forgotten here.
    #[zbus(out_args("job"))]
    async fn migrate(
        &self,
        #[zbus(header)] header: Header<'_>,
        uri: &str,
        options: Dictionary,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        let caller = Caller::from(&header);
        self.0.migrate(caller, uri, options, flags).await
    }

    /// Writes it into a new folder, from which RestoreMachine of the manager makes it again. It
    /// stands still meanwhile and then goes on; its disks are not in it.
    #[zbus(out_args("job"))]
    async fn snapshot(
        &self,
        #[zbus(header)] header: Header<'_>,
        folder: &str,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        self.0.snapshot(Caller::from(&header), folder, flags).await
    }

    /// Says where it is after a migration whose end nobody heard of: with `true` it runs at the
    /// destination and is forgotten here, with `false` it does not and never will, and goes on here.
    async fn decide(
        &self,
        #[zbus(header)] header: Header<'_>,
        runs_there: bool,
        flags: u64,
    ) -> Result<(), Error> {
        let caller = Caller::from(&header);
        self.0.decide(caller, runs_there, flags).await
    }

    /// Opens its console, `serial0` or empty: a socket, both ways. One client may write at a
    /// time, any number may read. Flags: 1 only reads, 2 takes the console from who writes
    /// now, 4 begins with what was printed lately.
    #[zbus(out_args("console"), proxy(allow_interactive_auth))]
    async fn open_console(
        &self,
        #[zbus(header)] header: Header<'_>,
        console: &str,
        flags: u64,
    ) -> Result<OwnedFd, Error> {
        let caller = Caller::from(&header);
        self.0.open_console(caller, console, flags).await
    }

    /// Opens the log of one of its processes, for reading: of `core`, of a device by its
    /// name, or `console` for what the guest printed.
    #[zbus(out_args("log"), proxy(allow_interactive_auth))]
    async fn open_log(
        &self,
        #[zbus(header)] header: Header<'_>,
        source: &str,
        flags: u64,
    ) -> Result<OwnedFd, Error> {
        let caller = Caller::from(&header);
        self.0.open_log(caller, source, flags).await
    }

    /// What its core uses, `cpu_usec`, `resident_bytes` (with the guest's memory), `own_bytes`
    /// (without); `uptime_usec`; and the sums over its devices of `requests`, `failed_requests`,
    /// `bytes_to_guest`, `bytes_from_guest` and `reconnects`. Empty when it does not run. Takes a
    /// few seconds at most.
    #[zbus(out_args("statistics"))]
    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        self.0.statistics().await
    }

    /// Its name.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn name(&self) -> String {
        self.0.facts().name
    }

    /// Its UUID.
    #[zbus(property(emits_changed_signal = "const"), name = "UUID")]
    async fn uuid(&self) -> String {
        self.0.facts().uuid
    }

    /// Where it is in its life: `off`, `starting`, `running`, `paused`, `stopping` or
    /// `failed`.
    #[zbus(property)]
    async fn state(&self) -> State {
        self.0.facts().state
    }

    /// Why it is in this state, in one sentence, or empty.
    #[zbus(property)]
    async fn reason(&self) -> String {
        self.0.facts().reason
    }

    /// The systemd unit of its core, or empty.
    #[zbus(property)]
    async fn unit(&self) -> String {
        self.0.facts().unit
    }

    /// Process id of its core, or 0.
    #[zbus(property)]
    async fn process(&self) -> u32 {
        self.0.facts().process
    }

    /// Its devices.
    #[zbus(property)]
    async fn devices(&self) -> Vec<OwnedObjectPath> {
        self.0.facts().devices
    }

    /// The job that works on it now, or `/`.
    #[zbus(property)]
    async fn job(&self) -> OwnedObjectPath {
        self.0.facts().job
    }

    /// Number of vCPUs.
    #[zbus(property)]
    async fn vcpus(&self) -> u32 {
        self.0.facts().vcpus
    }

    /// Bytes of RAM.
    #[zbus(property)]
    async fn memory(&self) -> u64 {
        self.0.facts().memory
    }

    /// When it was started, in microseconds since 1970, or 0.
    #[zbus(property, name = "StartedUSec")]
    async fn started_usec(&self) -> u64 {
        self.0.facts().started_usec
    }

    /// Whether it is forgotten when it has ended.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn transient(&self) -> bool {
        self.0.facts().transient
    }

    /// Whether it is started with the broker.
    #[zbus(property)]
    async fn autostart(&self) -> bool {
        self.0.facts().autostart
    }

    /// Its definition, with every default filled in.
    #[zbus(property)]
    async fn definition(&self) -> Dictionary {
        self.0.facts().definition
    }
}
