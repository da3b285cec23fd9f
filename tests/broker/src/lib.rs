//! Helpers for tests of the broker: one in a folder of its own, and clients of it.

mod guest;
mod manner;
mod others;
mod relay;

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

pub use self::guest::*;
pub use self::manner::Manner;
pub use self::others::{is_reached_again, starts_after};
pub use self::relay::Relay;
use anyhow::{Context as _, Result, bail, ensure};
use api::Dictionary;
use api::device::DeviceProxy;
use api::job::JobProxy;
use api::machine::{MachineProxy, REPLAY, State};
use api::manager::ManagerProxy;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tempfile::TempDir;
use test_framework::console::Console;
use test_framework::keeper::Keeper;
use test_framework::machine::{DEADLINE, make_image};
use test_framework::process::{Launch, Process};
use test_framework::programs::program;
use test_guest::Workload;
use zbus::connection::Builder;
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant};

/// How often something is looked at that nobody tells.
const LOOK: Duration = Duration::from_millis(10);

/// A broker, which ends with all of its machines when dropped.
#[derive(Debug)]
pub struct Broker {
    process: Option<Process>,
    /// Ends its machines, which outlive it.
    keeper: Option<Keeper>,
    folder: TempDir,
    options: Vec<(&'static str, String)>,
    manner: Manner,
}

impl Broker {
    /// Starts one, as [`Manner::of_tests`] says.
    pub fn start() -> Result<Self> {
        let mut broker = Self::new(Manner::of_tests()?)?;
        broker.start_again()?;
        Ok(broker)
    }

    fn new(manner: Manner) -> Result<Self> {
        let mut broker = Self {
            process: None,
            keeper: None,
            folder: TempDir::new().context("no folder for a broker")?,
            options: Vec::new(),
            manner,
        };
        let left = broker.manner.leftovers()?;
        ensure!(left.is_empty(), "an earlier test left {left:?}");
        fs::create_dir(broker.folder.path().join("config"))?;
        broker.keeper = Some(Keeper::of(&[broker.folder.path(), &broker.run()])?);
        Ok(broker)
    }

    /// Starts one to which machines may come, by [`Self::unix`] and [`Self::tcp`], from who has
    /// the same `key`.
    pub fn start_with_doors(key: &str) -> Result<Self> {
        Self::with_doors(key, Manner::of_tests()?)
    }

    /// The same beside another one on this host, which it leaves the names of units to: its own
    /// processes are children.
    pub fn start_beside(key: &str) -> Result<Self> {
        Self::with_doors(key, Manner::Direct)
    }

    fn with_doors(key: &str, manner: Manner) -> Result<Self> {
        let mut broker = Self::new(manner)?;
        let file = broker.folder.path().join("key");
        let mut options = fs::OpenOptions::new();
        let file_of_key = options.write(true).create_new(true).mode(0o600).open(&file);
        file_of_key?.write_all(key.as_bytes())?;
        broker.options = vec![
            ("--migration-listen", broker.unix()),
            ("--migration-listen", "tcp://127.0.0.1:0".into()),
            ("--migration-key", file.display().to_string()),
        ];
        broker.start_again()?;
        Ok(broker)
    }

    /// Where machines may come by a Unix socket.
    pub fn unix(&self) -> String {
        format!("unix:{}", self.folder.path().join("door").display())
    }

    /// Where machines may come by TCP.
    pub fn tcp(&self) -> Result<String> {
        let said = self.stderr();
        let words = said.split_whitespace();
        let uri = words
            .filter_map(|word| word.strip_prefix("uri="))
            .next_back();
        Ok(uri.with_context(|| said.clone())?.to_owned())
    }

    /// How it starts processes, and where it is called.
    pub fn manner(&self) -> Manner {
        self.manner
    }

    /// Starts another one in the place of one that has ended.
    pub fn start_again(&mut self) -> Result<()> {
        let mut launch = Launch::new(&program("godwit-broker")?)
            .option("--runtime-dir", self.run())
            .option("--config-dir", self.config());
        for option in self.manner.options() {
            launch = launch.arg(option);
        }
        for (option, value) in &self.options {
            launch = launch.option(option, value);
        }
        let mut process = launch.start()?;
        let end = Instant::now() + DEADLINE;
        while !process.stderr().contains(" ready") {
            ensure!(
                process.is_running(),
                "the broker ended: {}",
                process.stderr()
            );
            ensure!(
                Instant::now() < end,
                "the broker does not listen: {}",
                process.stderr()
            );
            std::thread::sleep(LOOK);
        }
        self.process = Some(process);
        Ok(())
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("there is no broker")?;
        process.signal(Signal::SIGKILL)?;
        process.wait(DEADLINE)?;
        Ok(())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.as_ref().map_or(0, Process::id)
    }

    /// What it has printed.
    pub fn stderr(&self) -> String {
        self.process
            .as_ref()
            .map_or_else(String::new, Process::stderr)
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where its declared machines are.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("config")
    }

    /// Its runtime folder.
    pub fn run(&self) -> PathBuf {
        match self.manner {
            Manner::Direct => self.folder.path().join("run"),
            // Where units of declared machines find it.
            Manner::Units | Manner::SystemBus => "/run/godwit".into(),
        }
    }

    /// The socket of its bus.
    pub fn bus(&self) -> PathBuf {
        match self.manner {
            Manner::Direct | Manner::Units => self.run().join("bus"),
            Manner::SystemBus => "/run/dbus/system_bus_socket".into(),
        }
    }

    /// The same as a D-Bus address.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.bus().display())
    }

    /// A connection to its bus. A broker that was killed may take a few with it that its
    /// socket had let in.
    pub async fn connect(&self) -> Result<Connection> {
        let end = Instant::now() + DEADLINE;
        loop {
            let builder = Builder::address(self.address().as_str()).method_timeout(DEADLINE);
            match builder.build().await {
                Err(_) if Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(20)).await
                }
                result => {
                    return result.with_context(|| {
                        format!("no connection to the broker: {}", self.stderr())
                    });
                }
            }
        }
    }

    /// Everything in its runtime folder, for comparison.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.run()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    folders.push(entry.path());
                }
                files.push(entry.path());
            }
        }
        files.sort();
        files
    }

    /// Processes of its machines that run, and units that systemd knows when they have had time
    /// to go.
    pub fn left(&self) -> Result<Vec<String>> {
        let mut left = self.manner.leftovers()?;
        left.extend(self.programs());
        Ok(left)
    }

    /// Processes of its machines that run.
    pub fn programs(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(pid) = name.parse::<u32>() else {
                continue;
            };
            let open = fs::read_dir(entry.path().join("fd")).into_iter().flatten();
            let ours = open.flatten().any(|fd| {
                fs::read_link(fd.path()).is_ok_and(|link| {
                    link.starts_with(self.folder.path()) || link.starts_with(self.run())
                })
            });
            if ours && pid != self.id() && lives(pid) {
                found.push(fs::read_to_string(entry.path().join("comm")).unwrap_or_default());
            }
        }
        found
    }

    /// A disk of `mib` MiB of zeroes.
    pub fn image(&self, name: &str, mib: u64) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        make_image(&path, mib)?;
        Ok(path)
    }

    /// What its metrics socket says.
    pub fn metrics(&self) -> Result<String> {
        let mut stream = StdUnixStream::connect(self.run().join("metrics"))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Runs busctl on its bus.
    pub fn busctl(&self, arguments: &[&str]) -> Result<String> {
        let address = format!("--address={}", self.address());
        let mut words = vec![address.as_str()];
        words.extend(arguments);
        said(run("busctl", "systemd", &words)?)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.process = None;
        self.keeper = None;
        self.manner.forget_killed();
        // Only a folder in the temporary one goes by itself.
        let _ = fs::remove_dir_all(self.run());
    }
}

/// Runs a program of a Debian package.
pub fn run(program: &str, package: &str, arguments: &[&str]) -> Result<Output> {
    Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("{program} is missing: install the Debian package {package}"))
}

/// What a program said, if it ended well.
pub fn said(output: Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    bail!("{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// A value of a dictionary.
pub fn value(value: impl Into<Variant<'static>>) -> OwnedVariant {
    // Only descriptors cannot be owned.
    OwnedVariant::try_from(value.into()).unwrap_or_else(|_| OwnedVariant::from(0u8))
}

/// The definition of a machine with the bundled guest.
pub fn definition(workload: &Workload) -> Dictionary {
    let kernel = test_guest::program().display().to_string();
    HashMap::from([
        ("kernel".to_owned(), value(kernel)),
        ("cmdline".to_owned(), value(workload.to_string())),
        ("memory".to_owned(), value(64u64 << 20)),
    ])
}

/// Gives a machine disks.
pub fn with_disks(mut definition: Dictionary, images: &[PathBuf], queues: u32) -> Dictionary {
    let disk = |image: &PathBuf| -> HashMap<String, Variant<'static>> {
        HashMap::from([
            ("path".to_owned(), image.display().to_string().into()),
            ("queues".to_owned(), queues.into()),
        ])
    };
    let disks: Vec<_> = images.iter().map(disk).collect();
    definition.insert("disk".into(), value(disks));
    definition
}

/// The manager.
pub async fn manager(connection: &Connection) -> Result<ManagerProxy<'static>> {
    Ok(ManagerProxy::new(connection).await?)
}

/// A machine, whose properties are asked for each time.
pub async fn machine(
    connection: &Connection,
    path: OwnedObjectPath,
) -> Result<MachineProxy<'static>> {
    let builder = MachineProxy::builder(connection).path(path);
    Ok(builder
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?)
}

/// The device of this name.
pub async fn device(
    connection: &Connection,
    machine: &str,
    id: &str,
) -> Result<DeviceProxy<'static>> {
    let builder = DeviceProxy::builder(connection).path(api::path::device(machine, id));
    Ok(builder
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?)
}

/// A job, whose properties are asked for each time.
pub async fn job(connection: &Connection, path: OwnedObjectPath) -> Result<JobProxy<'static>> {
    let builder = JobProxy::builder(connection).path(path);
    Ok(builder
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?)
}

/// Waits for the end of a job, however it ends: its state and result.
pub async fn ended(
    connection: &Connection,
    path: OwnedObjectPath,
) -> Result<(api::job::State, Dictionary)> {
    let job = job(connection, path).await?;
    let end = Instant::now() + DEADLINE;
    loop {
        match job.state().await? {
            api::job::State::Running => {}
            state => return Ok((state, job.result().await?)),
        }
        ensure!(Instant::now() < end, "the job does not end");
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits for a job to end well.
pub async fn done(connection: &Connection, path: OwnedObjectPath) -> Result<()> {
    match ended(connection, path).await? {
        (api::job::State::Done, _) => Ok(()),
        (other, result) => bail!("the job is {}: {result:?}", other.as_str()),
    }
}

/// A text in a dictionary, or nothing.
pub fn text(dictionary: &Dictionary, key: &str) -> String {
    let text = dictionary
        .get(key)
        .and_then(|value| value.downcast_ref::<&str>().ok());
    text.unwrap_or_default().to_owned()
}

/// Makes a machine and waits until it runs.
pub async fn running(
    connection: &Connection,
    name: &str,
    definition: Dictionary,
) -> Result<MachineProxy<'static>> {
    let manager = manager(connection).await?;
    let path = manager.create_machine(name, definition, 0).await?;
    let machine = machine(connection, path).await?;
    let job = machine.start(0).await?;
    done(connection, job).await?;
    Ok(machine)
}

/// Waits for a state.
pub async fn becomes(machine: &MachineProxy<'_>, state: State) -> Result<()> {
    until(&format!("state {}", state.as_str()), async || {
        Ok(machine.state().await? == state)
    })
    .await
}

/// Waits until something holds.
pub async fn until(what: &str, holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !holds().await? {
        ensure!(Instant::now() < end, "{what} does not come");
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// The console, from what was printed lately on.
pub async fn console(machine: &MachineProxy<'_>) -> Result<Console> {
    let socket = machine.open_console("", REPLAY).await?;
    Console::new(StdUnixStream::from(std::os::fd::OwnedFd::from(socket)))
}

/// Whether there is a process of this number that has not ended.
pub fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z")
}

/// Sends a process SIGKILL.
pub fn kill_process(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGKILL)
}

/// Sends a process a signal.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    ensure!(pid != 0, "there is no process");
    let pid = i32::try_from(pid).context("a process id is too large")?;
    kill(Pid::from_raw(pid), signal).context("no such process")
}

/// Breaks every connection that a process has accepted at the Unix socket `path`; how many.
pub fn cut(pid: u32, path: &Path) -> Result<usize> {
    let table = fs::read_to_string("/proc/net/unix")?;
    let at = format!(" {}", path.display());
    // Of each: address, references, protocol, flags, type, state (3: connected), inode, path.
    let connected = |line: &&str| line.ends_with(&at) && line.split(' ').nth(5) == Some("03");
    let inodes = table.lines().filter(connected);
    let inodes = inodes.filter_map(|line| line.split_whitespace().nth(6));
    let sockets: Vec<_> = inodes.map(|inode| format!("socket:[{inode}]")).collect();
    let raw = i32::try_from(pid).context("a process id is too large")?;
    let process = rustix::process::Pid::from_raw(raw).context("there is no process")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut count = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if sockets.iter().any(|socket| link == Path::new(socket)) {
            let number = entry.file_name().to_string_lossy().parse()?;
            let socket = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
            StdUnixStream::from(socket).shutdown(Shutdown::Both)?;
            count += 1;
        }
    }
    Ok(count)
}

/// Memory of a process's own, in KiB: a core's does not count its guest's.
pub fn own_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.and_then(|n| n.parse().ok()).context("no RssAnon")
}
