//! QEMU with the bundled guest, in its microvm, the fastest of its machines.

mod devices;
mod moves;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use test_framework::console::Console;
use test_framework::machine::Device;
use test_framework::process::{Launch, Process};
use test_guest::Workload;

const PROGRAM: &str = "qemu-system-x86_64";

/// Whether it is there.
pub(crate) fn is_installed() -> bool {
    Command::new(PROGRAM)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok()
}

/// Who serves its disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disks {
    /// QEMU itself.
    Own,
    /// A qemu-storage-daemon, over vhost-user.
    StorageDaemon,
}

/// A machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// What its guest does.
    pub workload: Workload,
    /// vCPUs.
    pub cpus: u32,
    /// MiB of RAM.
    pub memory_mib: u64,
    /// Devices; those of a disk or a network are QEMU's own or as `disks` says.
    pub devices: Vec<Device>,
    /// Who serves disks.
    pub disks: Disks,
}

/// One that runs.
pub(crate) struct Running {
    pub process: Process,
    pub console: Console,
    /// When QEMU was started.
    pub started: Instant,
    /// Where it takes commands.
    qmp: PathBuf,
    /// Serves its disks.
    _daemon: Option<Process>,
    folder: TempDir,
}

impl Machine {
    /// Starts it.
    pub(crate) fn start(&self) -> Result<Running> {
        self.launch(false)
    }

    fn launch(&self, incoming: bool) -> Result<Running> {
        let folder = TempDir::new().context("no folder for sockets")?;
        // What the guest cannot find out there: microvm has no MCFG and another sleep type.
        let workload = Workload {
            ecam_mib: 3584,
            slp_typ: 5,
            ..self.workload.clone()
        };
        let daemon = match self.disks {
            Disks::Own => None,
            Disks::StorageDaemon => devices::storage_daemon(&self.devices, folder.path())?,
        };
        let (ours, theirs) = UnixStream::pair().context("no console")?;
        let qmp = folder.path().join("qmp");
        let listener = UnixListener::bind(&qmp).context("no socket for QEMU's commands")?;
        let mut launch = Launch::new(Path::new(PROGRAM));
        let (console, commands) = (
            launch.inherit(theirs.into()),
            launch.inherit(listener.into()),
        );
        let memory = self.memory_mib;
        let mut machine = "microvm,accel=kvm,pcie=on,rtc=on".to_owned();
        if self.disks == Disks::StorageDaemon {
            let shared = format!("memory-backend-memfd,id=ram,size={memory}M,share=on");
            launch = launch.option("-object", shared);
            machine += ",memory-backend=ram";
        }
        launch = launch
            .option("-machine", machine)
            .option("-cpu", "host,-arch-capabilities")
            .option("-m", format!("{memory}M"))
            .option("-smp", self.cpus.to_string())
            .arg("-nodefaults")
            .arg("-no-user-config")
            .option("-display", "none")
            .arg("-no-reboot")
            .option("-chardev", format!("socket,id=console,fd={console}"))
            .option("-serial", "chardev:console")
            .option(
                "-chardev",
                format!("socket,id=commands,fd={commands},server=on,wait=off"),
            )
            .option("-mon", "chardev=commands,mode=control")
            .option("-kernel", test_guest::program())
            .option("-append", workload.to_string());
        launch = devices::options(launch, &self.devices, self.disks, folder.path())?;
        if incoming {
            launch = launch.option("-incoming", "defer");
        }
        let started = Instant::now();
        Ok(Running {
            process: launch.start()?,
            console: Console::new(ours)?,
            started,
            qmp,
            _daemon: daemon,
            folder,
        })
    }
}
