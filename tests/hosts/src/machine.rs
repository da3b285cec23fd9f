//! The QEMU machine that every host is: its command line and its process.
//!
//! States: *booting* (from the prepared disk) or *incoming* (from the template), then *running*.
//! A process that is dropped is killed and reaped.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::stat::Mode;
use serde_json::json;

use crate::error::tail_of;
use crate::qmp::Qmp;
use crate::{Assets, Error, Result};

/// Memory of a host in MiB. It costs only what the host touches.
const MEMORY_MIB: u32 = 4096;

/// Ethernet address of `lan0` in a host that was not yet told its own; `prepare/host/lan0.link`
/// finds the interface by it.
const MAC: &str = "52:54:00:08:00:01";

/// A machine with an IOMMU for device assignment, no mitigations, and nothing said at boot.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 systemd.show_status=0 quiet panic=-1 \
    mitigations=off nokaslr audit=0 selinux=0 apparmor=0 intel_iommu=on iommu=pt";

/// Lines of a console that are shown of a host that failed: a panic's first line says what it is.
const CONSOLE_LINES: usize = 80;

const POLL: Duration = Duration::from_millis(10);
const SOCKET_DEADLINE: Duration = Duration::from_secs(20);

/// What is the same for every host, so that all fit the template. A host has one processor: with two,
/// each a thread of the emulator, its KVM breaks (README.md, "What to know").
pub(crate) fn fixed_arguments(assets: &Assets) -> Vec<String> {
    let folder = assets.folder().display();
    format!(
        "-accel tcg,tb-size=512 -machine q35,memory-backend=ram \
         -cpu EPYC-Rome,+svm,+npt -smp 1 -m {MEMORY_MIB} \
         -nodefaults -no-user-config -display none -no-reboot \
         -device virtio-blk-pci,drive=root -device virtio-9p-pci,fsdev=share,mount_tag=share \
         -device virtio-serial-pci -device virtserialport,chardev=agent,name=agent \
         -device virtio-net-pci,netdev=lan,mac={MAC},romfile= -device virtio-rng-pci \
         -device intel-iommu,intremap=on \
         -device pcie-root-port,id=rp0,chassis=1 -device pcie-root-port,id=rp1,chassis=2"
    )
    .split_whitespace()
    .map(str::to_owned)
    .chain([
        "-kernel".to_owned(),
        format!("{folder}/vmlinux"),
        "-initrd".to_owned(),
        format!("{folder}/initrd"),
        "-append".to_owned(),
        KERNEL_ARGUMENTS.to_owned(),
    ])
    .collect()
}

/// Where a machine's memory comes from.
pub(crate) enum Memory {
    /// A new file, which becomes the template's.
    New(PathBuf),
    /// The template's file, copied page by page on the first write; the machine waits for the rest
    /// of its state.
    CopyOf(PathBuf),
}

/// What a machine keeps its bytes in.
pub(crate) struct Storage {
    /// RAM.
    pub(crate) memory: Memory,
    /// The qcow2 file of the root disk.
    pub(crate) disk: PathBuf,
}

/// How a machine is attached to a wire with another.
#[derive(Clone, Debug, Default)]
pub(crate) enum Wire {
    /// Not at all.
    #[default]
    None,
    /// As the side that listens on the Unix socket.
    Listen(PathBuf),
    /// As the side that connects to the Unix socket.
    Connect(PathBuf),
}

impl Wire {
    fn netdev(&self) -> String {
        let stream = |server: &str, path: &Path| {
            format!(
                "stream,id=lan,server={server},addr.type=unix,addr.path={}",
                path.display()
            )
        };
        match self {
            Wire::None => "hubport,id=lan,hubid=0".to_owned(),
            Wire::Listen(path) => stream("on", path),
            Wire::Connect(path) => stream("off", path),
        }
    }
}

/// The files of a machine, all in one folder.
#[derive(Clone, Debug)]
pub(crate) struct Files(PathBuf);

impl Files {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self(folder)
    }
    pub(crate) fn folder(&self) -> &Path {
        &self.0
    }
    pub(crate) fn disk(&self) -> PathBuf {
        self.0.join("disk.qcow2")
    }
    pub(crate) fn share(&self) -> PathBuf {
        self.0.join("share")
    }
    pub(crate) fn qmp(&self) -> PathBuf {
        self.0.join("qmp")
    }
    pub(crate) fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }
    fn qemu_log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }
    fn agent_input(&self) -> PathBuf {
        self.0.join("agent.in")
    }
    fn agent_output(&self) -> PathBuf {
        self.0.join("agent.out")
    }
}

/// Who waits for the QEMU process.
#[derive(Debug)]
enum Process {
    /// We do, and kill it when dropped.
    Child(Child),
    /// Nobody; it was started by a program that has ended.
    Foreign,
}

/// A QEMU process and its files.
#[derive(Debug)]
pub(crate) struct Machine {
    name: String,
    files: Files,
    process: Process,
}

impl Machine {
    /// Starts QEMU with its sockets, logs and share in `files`. A machine that is to outlive this
    /// program gets a process group of its own.
    pub(crate) fn spawn(
        assets: &Assets,
        name: &str,
        files: Files,
        storage: &Storage,
        wire: &Wire,
        outlives_us: bool,
    ) -> Result<Self> {
        let folder = files.folder().display();
        fs::create_dir(files.share()).map_err(Error::io("creating", &files.share()))?;
        for fifo in [files.agent_input(), files.agent_output()] {
            nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)
                .map_err(|errno| Error::io("creating", &fifo)(errno.into()))?;
        }
        let log_path = files.qemu_log();
        let log = File::create(&log_path).map_err(Error::io("creating", &log_path))?;
        let memory = match &storage.memory {
            Memory::New(path) => format!("mem-path={},share=on", path.display()),
            Memory::CopyOf(path) => format!("mem-path={},share=off", path.display()),
        };
        let mut command: Command = assets.qemu("qemu-system-x86_64");
        command
            .args(["-name", name])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=ram,size={MEMORY_MIB}M,{memory}"
            ))
            .arg("-drive")
            .arg(format!(
                "file={},if=none,id=root,cache=unsafe",
                storage.disk.display()
            ))
            .arg("-fsdev")
            .arg(format!(
                "local,id=share,path={folder}/share,security_model=none"
            ))
            .arg("-chardev")
            .arg(format!("pipe,id=agent,path={folder}/agent"))
            .args(["-netdev", &wire.netdev()])
            .args(["-serial", &format!("file:{folder}/console.log")])
            .args(["-qmp", &format!("unix:{folder}/qmp,server=on,wait=off")])
            .args(fixed_arguments(assets))
            .stdout(log.try_clone().map_err(Error::io("opening", &log_path))?)
            .stderr(log);
        if matches!(storage.memory, Memory::CopyOf(_)) {
            command.args(["-incoming", "defer"]);
        }
        if outlives_us {
            command.process_group(0);
        }
        let child = command
            .spawn()
            .map_err(Error::io("starting", Path::new(command.get_program())))?;
        let mut machine = Self {
            name: name.to_owned(),
            files,
            process: Process::Child(child),
        };
        let socket = machine.files.qmp();
        machine.wait_until("QEMU's start", SOCKET_DEADLINE, |_| {
            Ok(UnixStream::connect(&socket).is_ok())
        })?;
        Ok(machine)
    }

    /// A machine that another program started in `files`.
    pub(crate) fn attach(name: &str, files: Files) -> Self {
        Self {
            name: name.to_owned(),
            files,
            process: Process::Foreign,
        }
    }

    /// Lets QEMU run on after this program.
    pub(crate) fn leave(&mut self) {
        self.process = Process::Foreign;
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    pub(crate) fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.files.qmp())
    }

    /// Whether QEMU still runs.
    pub(crate) fn alive(&mut self) -> bool {
        match &mut self.process {
            Process::Child(child) => matches!(child.try_wait(), Ok(None)),
            Process::Foreign => UnixStream::connect(self.files.qmp()).is_ok(),
        }
    }

    /// Waits until `done` says so; ends early when QEMU does.
    pub(crate) fn wait_until(
        &mut self,
        what: &str,
        deadline: Duration,
        mut done: impl FnMut(&Files) -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        while !done(&self.files)? {
            if !self.alive() {
                return Err(Error::Died {
                    name: self.name.clone(),
                    qemu: tail_of(&self.files.qemu_log(), 10),
                    console: tail_of(&self.files.console(), CONSOLE_LINES),
                });
            }
            if start.elapsed() > deadline {
                return Err(Error::Deadline {
                    name: self.name.clone(),
                    what: what.to_owned(),
                    deadline,
                    console: tail_of(&self.files.console(), CONSOLE_LINES),
                });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until the agent of a booting host says that it is there.
    pub(crate) fn wait_for_agent(&mut self, deadline: Duration) -> Result<()> {
        let path = self.files.agent_output();
        let mut port = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(Error::io("opening", &path))?;
        self.wait_until("the start of its agent", deadline, |_| {
            let mut byte = [0];
            Ok(matches!(port.read(&mut byte), Ok(1)))
        })
    }

    /// Sends the agent one line.
    pub(crate) fn tell_agent(&self, line: &str) -> Result<()> {
        let path = self.files.agent_input();
        // Without O_NONBLOCK an open would wait for a QEMU that has ended.
        OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .and_then(|mut port| port.write_all(format!("{line}\n").as_bytes()))
            .map_err(Error::io("writing to", &path))
    }

    /// Ends QEMU and waits for its end.
    pub(crate) fn quit(mut self) -> Result<()> {
        self.qmp()?.execute("quit", json!({}))?;
        let start = Instant::now();
        while self.alive() {
            if start.elapsed() > SOCKET_DEADLINE {
                return Err(Error::Deadline {
                    name: self.name.clone(),
                    what: "QEMU's end".to_owned(),
                    deadline: SOCKET_DEADLINE,
                    console: tail_of(&self.files.console(), CONSOLE_LINES),
                });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Process::Child(child) = &mut self.process {
            // It may have ended already; then there is nothing to do but reap it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
