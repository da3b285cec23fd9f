//! A machine: a core and the processes that are its devices.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use api::core::{CoreProxy, DeviceStatus, State};
use api::migration::MigrationProxy;
use tempfile::TempDir;
use test_guest::Workload;
use tokio::runtime::Runtime;
use zbus::{Connection, connection};

use crate::console::Console;
use crate::process::{Launch, Process};
use crate::programs::program;

/// How long any single thing may take on a slow and busy computer.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A device of a machine.
#[derive(Clone, Debug)]
pub enum Device {
    /// A block device on a raw image.
    Blk {
        /// The image.
        image: PathBuf,
        /// Queues.
        queues: u16,
    },
    /// A memory balloon; without links nobody but its guest has to do with it.
    Balloon,
    /// A back-end that listens already, of whoever's making.
    Foreign {
        /// Its device type, as the core names it.
        kind: &'static str,
        /// Where it listens.
        socket: PathBuf,
    },
    /// A PCI device that copies memory: the synthetic one of `godwit-vfio`.
    Copier,
    /// A network device on a tap.
    Net {
        /// The tap.
        tap: String,
        /// Queue pairs.
        pairs: u16,
    },
}

/// A machine to start.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Kernel; the bundled guest by default.
    pub kernel: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u32,
    /// MiB of RAM.
    pub memory_mib: u64,
    /// Devices, in order.
    pub devices: Vec<Device>,
    /// Whether the core has a link to each device process that is ours.
    pub links: bool,
    /// More options of the core.
    pub options: Vec<String>,
}

impl Definition {
    /// The bundled guest with this to do, one vCPU and 64 MiB.
    pub fn of(workload: &Workload) -> Self {
        Self {
            kernel: test_guest::program().to_owned(),
            cmdline: workload.to_string(),
            cpus: 1,
            memory_mib: 64,
            devices: Vec::new(),
            links: false,
            options: Vec::new(),
        }
    }
}

/// An image of `mib` MiB of zeroes at `path`.
pub fn make_image(path: &Path, mib: u64) -> Result<()> {
    let image = File::create(path).with_context(|| format!("no image at {}", path.display()))?;
    image
        .set_len(mib << 20)
        .with_context(|| format!("{mib} MiB do not fit at {}", path.display()))
}

/// A machine that runs.
#[derive(Debug)]
pub struct Machine {
    /// Our end of its console.
    pub console: Console,
    /// When the first of its processes was started.
    pub started: Instant,
    core: Process,
    devices: Vec<Process>,
    control: PathBuf,
    runtime: Runtime,
    folder: TempDir,
}

impl Machine {
    /// Starts the processes of a machine, all at once.
    pub fn start(definition: &Definition) -> Result<Self> {
        let folder = TempDir::new().context("no folder for sockets")?;
        let started = Instant::now();
        let mut core = Launch::new(&program("godwit-vmm")?)
            .option("--kernel", &definition.kernel)
            .option("--cmdline", &definition.cmdline)
            .option("--cpus", definition.cpus.to_string())
            .option("--memory", format!("{}M", definition.memory_mib));
        let mut devices = Vec::new();
        for (number, device) in definition.devices.iter().enumerate() {
            let mut link = None;
            let (kind, socket) = match device {
                Device::Foreign { kind, socket } => (*kind, socket.clone()),
                Device::Balloon | Device::Blk { .. } | Device::Copier | Device::Net { .. } => {
                    let socket = folder.path().join(format!("device{number}"));
                    // The device takes over a socket that listens already, so nobody has to wait.
                    let listener = UnixListener::bind(&socket).context("no socket for a device")?;
                    let theirs = if definition.links {
                        let (ours, theirs) = UnixStream::pair().context("no link")?;
                        link = Some(core.inherit(ours.into()));
                        Some(theirs)
                    } else {
                        None
                    };
                    devices.push(start_device(device, listener, theirs)?);
                    (device.kind(), socket)
                }
            };
            let link = link.map_or(String::new(), |fd| format!(",control-fd={fd}"));
            let value = format!("socket={},id=device{number}{link}", socket.display());
            core = match device {
                Device::Copier => core.option("--vfio-user", value),
                _ => core.option("--vhost-user", format!("{kind},{value}")),
            };
        }
        let (ours, theirs) = UnixStream::pair().context("no console")?;
        let console = core.inherit(theirs.into());
        let control = folder.path().join("control");
        core = core
            .option("--serial", format!("fd={console}"))
            .option("--control-socket", &control);
        for option in &definition.options {
            core = core.arg(option);
        }
        let core = core.start()?;
        let runtime = Runtime::new().context("no runtime")?;
        let console = Console::new(ours)?;
        Ok(Self {
            console,
            started,
            core,
            devices,
            control,
            runtime,
            folder,
        })
    }

    /// Where its sockets are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The core's process.
    pub fn core(&mut self) -> &mut Process {
        &mut self.core
    }

    /// The processes of its devices that are ours, in order.
    pub fn devices(&mut self) -> &mut [Process] {
        &mut self.devices
    }

    /// Starts the process of device `number` again, on its socket. The core finds it there, but for
    /// that of a PCI device, which it is given.
    pub fn restart_device(&mut self, definition: &Definition, number: usize) -> Result<()> {
        let device = definition
            .devices
            .get(number)
            .context("there is no such device")?;
        let socket = self.folder.path().join(format!("device{number}"));
        // Nobody is left who listens there.
        std::fs::remove_file(&socket).context("the device's socket is gone")?;
        let listener = UnixListener::bind(&socket).context("no socket for a device")?;
        let link = if definition.links {
            let (ours, theirs) = UnixStream::pair().context("no link")?;
            self.attach_link(&format!("device{number}"), ours.into())?;
            Some(theirs)
        } else {
            None
        };
        self.devices[number] = start_device(device, listener, link)?;
        if let Device::Copier = device {
            let connection = UnixStream::connect(&socket).context("the device does not listen")?;
            self.attach_backend(&format!("device{number}"), connection.into())?;
        }
        Ok(())
    }

    /// Gives a device a new process on a connected socket.
    pub fn attach_backend(&self, device: &str, socket: OwnedFd) -> Result<()> {
        self.call(async |core| core.attach_backend(device, socket.into()).await)
    }

    /// Gives the core a new link to the process of a device.
    pub fn attach_link(&self, device: &str, socket: OwnedFd) -> Result<()> {
        self.call(async |core| core.attach_link(device, socket.into()).await)
    }

    /// How a device does, as the core sees it.
    pub fn device_status(&self, device: &str) -> Result<DeviceStatus> {
        self.call(async |core| core.device_status(device).await)
    }

    /// The names of the machine's devices.
    pub fn device_names(&self) -> Result<Vec<String>> {
        self.call(async |core| Ok(core.devices().await?))
    }

    /// Waits for the end of the core.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.core.wait(DEADLINE)
    }

    /// Waits for the end of the core, which must be a good one.
    pub fn wait_for_power_off(&mut self) -> Result<()> {
        let status = self.wait()?;
        if !status.success() {
            bail!("the core ended with {status}: {}", self.core.stderr());
        }
        Ok(())
    }

    /// Stops vCPUs and devices.
    pub fn pause(&self) -> Result<()> {
        self.call(async |core| core.pause().await)
    }

    /// Starts them again.
    pub fn resume(&self) -> Result<()> {
        self.call(async |core| core.resume().await)
    }

    /// Boots again.
    pub fn reset(&self) -> Result<()> {
        self.call(async |core| core.reset().await)
    }

    /// Presses the power button.
    pub fn power_button(&self) -> Result<()> {
        self.call(async |core| core.power_button().await)
    }

    /// Ends the machine.
    pub fn terminate(&self) -> Result<()> {
        self.call(async |core| core.terminate().await)
    }

    /// Where it is in its life.
    pub fn state(&self) -> Result<State> {
        self.call(async |core| Ok(core.state().await?))
    }

    fn call<T>(&self, call: impl AsyncFnOnce(CoreProxy<'_>) -> Result<T, api::Error>) -> Result<T> {
        self.connected(async |connection| Ok(call(CoreProxy::new(connection).await?).await?))
    }

    /// Asks what moves the machine for something.
    pub fn move_by<T>(
        &self,
        call: impl AsyncFnOnce(MigrationProxy<'_>) -> Result<T, api::Error>,
    ) -> Result<T> {
        self.connected(async |connection| Ok(call(MigrationProxy::new(connection).await?).await?))
    }

    fn connected<T>(&self, call: impl AsyncFnOnce(&Connection) -> Result<T>) -> Result<T> {
        let work = async {
            let stream = UnixStream::connect(&self.control).with_context(|| {
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
    }
}

impl Device {
    fn kind(&self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
            Self::Blk { .. } => "blk",
            Self::Copier => "vfio",
            Self::Net { .. } => "net",
            Self::Foreign { kind, .. } => kind,
        }
    }
}

fn start_device(
    device: &Device,
    listener: UnixListener,
    link: Option<UnixStream>,
) -> Result<Process> {
    let mut launch = Launch::new(&program(&format!("godwit-{}", device.kind()))?);
    let socket = launch.inherit(listener.into());
    launch = launch.option("--fd", socket.to_string());
    if let Some(link) = link {
        let link = launch.inherit(link.into());
        launch = launch.option("--control-fd", link.to_string());
    }
    launch = match device {
        Device::Balloon => launch.option("--statistics-interval", "1"),
        Device::Blk { image, queues } => launch
            .option("--blk-file", image)
            .option("--num-queues", queues.to_string()),
        Device::Copier => launch.arg("--synthetic"),
        Device::Net { tap, pairs } => launch
            .option("--tap", tap)
            .option("--queue-pairs", pairs.to_string()),
        Device::Foreign { .. } => bail!("a foreign back-end is started by whoever wants it"),
    };
    launch.start()
}
