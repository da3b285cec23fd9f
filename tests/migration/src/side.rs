//! A machine on one side: a core and its device processes.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use api::core::{CoreProxy, State};
use api::migration::MigrationProxy;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;
use test_framework::console::Console;
use test_framework::machine::DEADLINE;
use test_framework::process::{Launch, Process};
use test_framework::programs::program;
use test_guest::Workload;
use tokio::runtime::Runtime;
use zbus::{Connection, OwnedVariant, connection};

use super::devices::{Counter, Foreign, Recipe, script_path};
use super::wires::Ends;
use super::{Fault, Kind, Wires};

/// What a machine is, on both sides.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What its guest does.
    pub workload: Workload,
    /// What it starts in, in the place of that guest.
    pub firmware: Option<PathBuf>,
    /// vCPUs.
    pub cpus: u32,
    /// What they show of the host's processor.
    pub cpu: &'static str,
    /// MiB of RAM.
    pub memory_mib: u64,
    /// Disks: image and queues.
    pub disks: Vec<(PathBuf, u16)>,
    /// Network cards: tap and queue pairs.
    pub nics: Vec<(String, u16)>,
    /// Counting devices.
    pub counters: Vec<Counter>,
    /// Back-ends of others.
    pub foreign: Vec<Foreign>,
    /// Whether it has a balloon.
    pub balloon: bool,
    /// Whether the core may ask the balloon, for its size and for free pages.
    pub hints: bool,
    /// Memory channels.
    pub channels: usize,
    /// What carries a migration.
    pub kind: Kind,
    /// Options of a migration; the last of a name counts.
    pub options: Vec<(&'static str, u64)>,
    /// Flags of a migration.
    pub flags: Vec<&'static str>,
    /// Mechanisms that both cores leave out.
    pub without: Vec<String>,
}

impl Spec {
    /// With one vCPU, 64 MiB and nothing else. On a busy computer it may stand still for long, so
    /// that whether it moves does not depend on how busy that is.
    pub fn of(workload: Workload) -> Self {
        Self {
            workload,
            firmware: None,
            cpus: 1,
            cpu: "host",
            memory_mib: 64,
            disks: Vec::new(),
            nics: Vec::new(),
            counters: Vec::new(),
            foreign: Vec::new(),
            balloon: false,
            hints: true,
            channels: 2,
            kind: Kind::Unix,
            options: vec![("max-downtime-ms", 5000)],
            flags: Vec::new(),
            without: Vec::new(),
        }
    }

    /// The devices' ids, in order.
    pub fn ids(&self) -> Vec<String> {
        let disks = (0..self.disks.len()).map(|n| format!("disk{n}"));
        disks
            .chain((0..self.nics.len()).map(|n| format!("net{n}")))
            .chain(self.balloon.then(|| "balloon".to_owned()))
            .chain((0..self.counters.len()).map(|n| format!("count{n}")))
            .chain((0..self.foreign.len()).map(|n| format!("foreign{n}")))
            .collect()
    }
}

/// How a migration ended, as the source said.
pub type Outcome = Value;

/// A machine that has moved.
#[derive(Debug)]
pub struct Moved {
    /// Where it is.
    pub side: Side,
    /// What the source said.
    pub outcome: Outcome,
}

/// Where a machine comes from.
#[derive(Debug)]
enum Origin {
    Boot,
    Other(Ends, Option<OwnedFd>),
    Files(Ends),
}

/// The files of a snapshot.
fn files(spec: &Spec, folder: &Path, new: bool) -> Result<Ends> {
    let open = |name: String| -> Result<OwnedFd> {
        let path = folder.join(name);
        let mut options = File::options();
        let file = options.read(true).write(new).create(new).open(&path);
        Ok(file.with_context(|| path.display().to_string())?.into())
    };
    Ok(Ends {
        control: open("core".into())?,
        ram: (0..spec.channels)
            .map(|number| open(format!("ram{number}")))
            .collect::<Result<_>>()?,
        states: spec
            .ids()
            .into_iter()
            .map(|id| Ok((id.clone(), open(id)?)))
            .collect::<Result<_>>()?,
    })
}

/// One side.
#[derive(Debug)]
pub struct Side {
    /// Its end of the console.
    pub console: Console,
    core: Process,
    devices: Vec<Process>,
    recipes: Vec<Recipe>,
    ids: Vec<String>,
    control: PathBuf,
    runtime: Runtime,
    folder: TempDir,
}

impl Side {
    /// A machine that boots.
    pub fn boot(spec: &Spec) -> Result<Self> {
        Self::start(spec, Origin::Boot)
    }

    /// A machine that is in the files of `folder`, paused.
    pub fn restore(spec: &Spec, folder: &Path) -> Result<Self> {
        Self::start(spec, Origin::Files(files(spec, folder, false)?))
    }

    /// Writes the machine into files in `folder`.
    pub fn snapshot(&self, spec: &Spec, folder: &Path) -> Result<()> {
        self.begin_snapshot(files(spec, folder, true)?)?;
        let outcome = self.outcome()?;
        ensure!(outcome["reason"].is_null(), "{outcome:#}");
        Ok(())
    }

    /// Begins to write the machine into these.
    pub fn begin_snapshot(&self, ends: Ends) -> Result<()> {
        let ram = ends.ram.into_iter().map(Into::into).collect();
        let states = ends.states.into_iter().map(|(id, fd)| (id, fd.into()));
        let states = states.collect();
        self.call(async |connection| {
            let mover = MigrationProxy::new(connection).await?;
            Ok(mover.snapshot(ends.control.into(), ram, states).await?)
        })
    }

    /// A machine that waits for one to come, with the other's memory if it is shared.
    pub fn expect(spec: &Spec, ends: Ends, memory: Option<OwnedFd>) -> Result<Self> {
        Self::start(spec, Origin::Other(ends, memory))
    }

    fn start(spec: &Spec, from: Origin) -> Result<Self> {
        let folder = TempDir::new().context("no folder for sockets")?;
        let core = Launch::new(&program("godwit-vmm")?);
        let core = match &spec.firmware {
            Some(image) => core.option("--firmware", image),
            None => core
                .option("--kernel", test_guest::program())
                .option("--cmdline", spec.workload.to_string()),
        };
        let mut core = core
            .option("--cpus", spec.cpus.to_string())
            .option("--cpu", spec.cpu)
            .option("--memory", format!("{}M", spec.memory_mib));
        if !spec.without.is_empty() {
            core = core.option("--without", spec.without.join(","));
        }
        let recipes = Recipe::all(spec, folder.path())?;
        let arrives = matches!(from, Origin::Other(..));
        let mut devices = Vec::new();
        for (id, recipe) in spec.ids().iter().zip(&recipes) {
            let (ours, theirs) = recipe.link()?.unzip();
            devices.push(recipe.start(arrives, theirs)?);
            let link = ours.map(|end| core.inherit(end));
            core = core.option("--vhost-user", recipe.for_core(id, link));
        }
        let from = match from {
            Origin::Boot => None,
            Origin::Other(ends, memory) => Some(("control", ends, memory)),
            Origin::Files(ends) => Some(("snapshot", ends, None)),
        };
        if let Some((key, ends, memory)) = from {
            let mut incoming = format!("{key}={}", core.inherit(ends.control));
            for ram in ends.ram {
                write!(incoming, ",ram={}", core.inherit(ram))?;
            }
            for (id, state) in ends.states {
                write!(incoming, ",state={id}:{}", core.inherit(state))?;
            }
            if let Some(memory) = memory {
                write!(incoming, ",memory={}", core.inherit(memory))?;
            }
            core = core.option("--incoming", incoming);
        }
        let (ours, theirs) = UnixStream::pair().context("no console")?;
        let console = core.inherit(theirs.into());
        let control = folder.path().join("control");
        let core = core
            .option("--serial", format!("fd={console}"))
            .option("--control-socket", &control)
            .start()?;
        Ok(Self {
            console: Console::new(ours)?,
            core,
            devices,
            recipes,
            ids: spec.ids(),
            control,
            runtime: Runtime::new().context("no runtime")?,
            folder,
        })
    }

    /// The core's process.
    pub fn core(&mut self) -> &mut Process {
        &mut self.core
    }

    /// The devices' processes.
    pub fn devices(&mut self) -> &mut [Process] {
        &mut self.devices
    }

    /// Ends a device's process, if it still runs, and starts another in its place, as the owner of
    /// a machine does.
    pub fn restart_device(&mut self, number: usize) -> Result<()> {
        if self.devices[number].is_running() {
            self.devices[number].signal(Signal::SIGKILL)?;
            self.devices[number].wait(DEADLINE)?;
        }
        let (ours, theirs) = self.recipes[number].link()?.unzip();
        self.devices[number] = self.recipes[number].start(false, theirs)?;
        if let Some(link) = ours {
            let id = &self.ids[number];
            self.call(async |connection| {
                let core = CoreProxy::new(connection).await?;
                Ok(core.attach_link(id, link.into()).await?)
            })?;
        }
        let id = self.recipes[number].id().into_owned();
        let end = Instant::now() + DEADLINE;
        let is_back = |side: &Side| {
            side.call(async |connection| {
                let core = CoreProxy::new(connection).await?;
                Ok(core.device_status(&id).await?.connected)
            })
        };
        while !is_back(self)? {
            ensure!(Instant::now() < end, "{id} is not found again");
        }
        Ok(())
    }

    /// Gives a counting device another script.
    pub fn script(&self, counter: usize, script: &str) -> Result<()> {
        Ok(std::fs::write(
            script_path(self.folder.path(), counter),
            script,
        )?)
    }

    /// Moves the machine; this side must be left without it in the end.
    pub fn move_on(self, spec: &Spec) -> Result<Moved> {
        let (mut source, destination, outcome) = self.try_move(spec, None)?;
        ensure!(
            outcome["result"] == "moved",
            "it did not move: {outcome:#}; the destination said: {}",
            destination.core.stderr()
        );
        // Its owner has heard how it ended, so nothing is waited for.
        source.terminate()?;
        Ok(Moved {
            side: destination,
            outcome,
        })
    }

    /// Tries to move the machine; both sides, and how the source says that it ended.
    pub fn try_move(
        self,
        spec: &Spec,
        fault: Option<(&str, Fault)>,
    ) -> Result<(Side, Side, Outcome)> {
        let destination = self.begin_move(spec, fault)?;
        let outcome = self.outcome()?;
        Ok((self, destination, outcome))
    }

    /// Starts to move the machine; the other side.
    pub fn begin_move(&self, spec: &Spec, fault: Option<(&str, Fault)>) -> Result<Side> {
        let wires = Wires::connect(spec.kind, spec.channels, &spec.ids(), fault)?;
        let memory = match spec.kind {
            Kind::Shared => Some(self.memory()?),
            _ => None,
        };
        let destination = Side::expect(spec, wires.destination, memory)?;
        self.migrate(spec, wires.source)?;
        Ok(destination)
    }

    /// Starts to move the machine on these connections.
    pub fn migrate(&self, spec: &Spec, ends: Ends) -> Result<()> {
        let number = |(key, value): &(&str, u64)| ((*key).to_owned(), OwnedVariant::from(*value));
        let flag = |key: &&str| ((*key).to_owned(), OwnedVariant::from(true));
        let mut options: HashMap<_, _> = spec.options.iter().map(number).collect();
        options.extend(spec.flags.iter().map(flag));
        if spec.kind == Kind::Shared {
            options.insert("shared-memory".into(), OwnedVariant::from(true));
        }
        let ram = ends.ram.into_iter().map(Into::into).collect();
        let states = ends.states.into_iter().map(|(id, fd)| (id, fd.into()));
        let states = states.collect();
        self.call(async |connection| {
            let mover = MigrationProxy::new(connection).await?;
            let started = mover.migrate(ends.control.into(), ram, states, options);
            Ok(started.await?)
        })
    }

    /// Waits for the end of the migration.
    pub fn outcome(&self) -> Result<Outcome> {
        let outcome = self.call(async |connection| {
            let mover = MigrationProxy::new(connection).await?;
            Ok(serde_json::from_str(&mover.wait().await?)?)
        });
        outcome.with_context(|| format!("no outcome; it is at {:?}", self.progress()))
    }

    /// Cancels the migration.
    pub fn cancel(&self) -> Result<()> {
        self.call(async |connection| Ok(MigrationProxy::new(connection).await?.cancel().await?))
    }

    /// Says where the machine is.
    pub fn decide(&self, runs_there: bool) -> Result<()> {
        self.call(async |connection| {
            let mover = MigrationProxy::new(connection).await?;
            Ok(mover.decide(runs_there).await?)
        })
    }

    /// How far the migration is.
    pub fn progress(&self) -> Result<Value> {
        self.call(async |connection| {
            let mover = MigrationProxy::new(connection).await?;
            Ok(serde_json::from_str(&mover.progress().await?)?)
        })
    }

    /// The file that is its memory.
    pub fn memory(&self) -> Result<OwnedFd> {
        self.call(async |connection| {
            let mover = MigrationProxy::new(connection).await?;
            Ok(mover.memory().await?.into())
        })
    }

    /// Asks for a balloon of so many bytes.
    pub fn set_balloon_target(&self, bytes: u64) -> Result<()> {
        self.call(async |connection| {
            let core = CoreProxy::new(connection).await?;
            Ok(core.set_balloon_target("balloon", bytes).await?)
        })
    }

    /// How large its balloon is to be, and is.
    pub fn balloon(&self) -> Result<(u64, u64)> {
        self.call(async |connection| {
            let core = CoreProxy::new(connection).await?;
            let (target, actual, _) = core.balloon("balloon").await?;
            Ok((target, actual))
        })
    }

    /// What its guest says of its memory.
    pub fn balloon_statistics(&self) -> Result<BTreeMap<String, u64>> {
        self.call(async |connection| {
            let core = CoreProxy::new(connection).await?;
            Ok(core.balloon("balloon").await?.2)
        })
    }

    /// Has its guest asked for that every so many seconds; 0: never.
    pub fn set_balloon_statistics_interval(&self, seconds: u32) -> Result<()> {
        self.call(async |connection| {
            let core = CoreProxy::new(connection).await?;
            let set = core.set_balloon_statistics_interval("balloon", seconds);
            Ok(set.await?)
        })
    }

    /// Where it is in its life.
    pub fn state(&self) -> Result<State> {
        self.call(async |connection| Ok(CoreProxy::new(connection).await?.state().await?))
    }

    /// Stops the machine.
    pub fn pause(&self) -> Result<()> {
        self.call(async |connection| Ok(CoreProxy::new(connection).await?.pause().await?))
    }

    /// Lets it run again.
    pub fn resume(&self) -> Result<()> {
        self.call(async |connection| Ok(CoreProxy::new(connection).await?.resume().await?))
    }

    /// Boots it again.
    pub fn reset(&self) -> Result<()> {
        self.call(async |connection| Ok(CoreProxy::new(connection).await?.reset().await?))
    }

    /// Ends the machine.
    pub fn terminate(&mut self) -> Result<()> {
        self.core.signal(Signal::SIGTERM)?;
        let status = self.core.wait(DEADLINE)?;
        ensure!(status.success(), "the core said {}", self.core.stderr());
        Ok(())
    }

    fn call<T>(&self, call: impl AsyncFnOnce(&Connection) -> Result<T>) -> Result<T> {
        let work = async {
            let stream = connect(&self.control).await.with_context(|| {
                format!("the core does not listen; it said: {}", self.core.stderr())
            })?;
            let connection = connection::Builder::unix_stream(stream)
                .p2p()
                .build()
                .await?;
            call(&connection).await
        };
        self.runtime
            .block_on(async { tokio::time::timeout(DEADLINE, work).await })
            .context("the core did not answer")?
            .with_context(|| format!("the core said: {}", self.core.stderr()))
    }
}

/// A core that has just been started does not listen at once.
async fn connect(path: &Path) -> Result<UnixStream> {
    let end = Instant::now() + DEADLINE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}
