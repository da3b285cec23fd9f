//! A running host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::job::{Job, Output};
use crate::machine::{Files, Machine, Memory, Storage, Wire};
use crate::template::Template;
use crate::{Assets, Error, Result};

/// Has the kernel draw from what was written to `/dev/urandom` (`linux/random.h`).
const RNDRESEEDCRNG: u32 = 0x5207;

/// How long a command may take when nothing else is said.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// What a host is to be.
#[derive(Clone, Debug)]
pub struct HostOptions {
    pub(crate) name: String,
    pub(crate) wire: Wire,
    /// Last part of its address on the wire, 10.8.0.x/24, and of its Ethernet address.
    pub(crate) number: u8,
    pub(crate) outlives_us: bool,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self::named("host")
    }
}

impl HostOptions {
    /// A host alone, with that host name: letters, digits and `-`.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            wire: Wire::None,
            number: 1,
            outlives_us: false,
        }
    }
}

/// An emulated Debian host: systemd, D-Bus, polkit, `/dev/kvm`, QEMU, and a Linux guest's files in
/// `/opt/guest`. Everything that it writes is forgotten when it is dropped.
#[derive(Debug)]
pub struct Host {
    // Ends before its folder goes.
    machine: Machine,
    folder: Folder,
}

/// The folder of a host's files.
#[derive(Debug)]
enum Folder {
    /// Removed with the host.
    Owned(TempDir),
    /// Left to whoever stops the host.
    Left(PathBuf),
}

impl Host {
    /// Starts a host and waits until it answers. Prepares what is missing first.
    ///
    /// # Errors
    ///
    /// When preparing fails, or the host does not answer in time; the error holds the end of its
    /// console.
    pub fn start(options: &HostOptions) -> Result<Self> {
        check_name(&options.name)?;
        let assets = Assets::prepare()?;
        let template = Template::ensure(&assets)?;
        let mut host = match Self::restore(&assets, &template, options) {
            Err(error @ Error::State { .. }) => {
                eprintln!("hosts: {error}; making a new template");
                let template = Template::renew(&assets)?;
                Self::restore(&assets, &template, options)?
            }
            started => started?,
        };
        host.give_identity(options)?;
        Ok(host)
    }

    fn restore(assets: &Assets, template: &Template, options: &HostOptions) -> Result<Self> {
        // A Unix socket's path is too short for many a cache folder's.
        let folder = tempfile::Builder::new()
            .prefix("godwit-host-")
            .tempdir()
            .map_err(Error::io("creating a folder in", &std::env::temp_dir()))?;
        let files = Files::new(folder.path().to_owned());
        fs::copy(template.disk(), files.disk()).map_err(Error::io("copying", &template.disk()))?;
        let storage = Storage {
            memory: Memory::CopyOf(template.memory()),
            disk: files.disk(),
        };
        let machine = Machine::spawn(
            assets,
            &options.name,
            files,
            &storage,
            &options.wire,
            options.outlives_us,
        )?;
        template.load_into(&machine)?;
        Ok(Self {
            machine,
            folder: Folder::Owned(folder),
        })
    }

    /// All hosts wake up as the same one; this makes them differ.
    fn give_identity(&mut self, options: &HostOptions) -> Result<()> {
        let HostOptions { name, number, .. } = options;
        // The host's own random numbers would be those of every other: Ethernet addresses, too.
        let uuid = Path::new("/proc/sys/kernel/random/uuid");
        let id = fs::read_to_string(uuid).map_err(Error::io("reading", uuid))?;
        let id = id.trim().replace('-', "");
        let mut commands = format!(
            "hostname {name} && echo {name} >/etc/hostname &&
             echo {id} | tee /etc/machine-id >/dev/urandom &&
             perl -e 'open R, \">\", \"/dev/urandom\"; ioctl(R, {RNDRESEEDCRNG}, 0) or die $!' &&
             ip link set lan0 address 52:54:00:08:00:{number:02x}"
        );
        // Without a wire nobody would take what the interface sends.
        if !matches!(options.wire, Wire::None) {
            commands +=
                &format!(" && ip addr add 10.8.0.{number}/24 dev lan0 && ip link set lan0 up");
        }
        self.run(&commands)?;
        Ok(())
    }

    /// Runs a command by the host's bash, as root, and waits for it, a minute at most.
    ///
    /// # Errors
    ///
    /// When its exit status is not 0, it takes too long, or the host ends.
    pub fn run(&mut self, command: &str) -> Result<Output> {
        self.run_for(command, COMMAND_DEADLINE)?.expect(command)
    }

    /// Runs a command for `deadline` at most, counted in whole seconds, whatever its exit status.
    ///
    /// # Errors
    ///
    /// When it takes too long (it is killed), or the host ends.
    pub fn run_for(&mut self, command: &str, deadline: Duration) -> Result<Output> {
        let job = self.spawn(command, deadline)?;
        self.wait(job)
    }

    /// Runs `lines` of shell with the functions of `script`, for `deadline` at most; what they print.
    ///
    /// # Errors
    ///
    /// When their exit status is not 0, they take too long, or the host ends.
    pub fn call(&mut self, script: &str, lines: &str, deadline: Duration) -> Result<String> {
        let output = self.run_for(&format!("{script}\n{lines}"), deadline)?;
        Ok(output.expect(lines)?.stdout)
    }

    /// Starts a command that is killed after `deadline`. Several may run at the same time.
    ///
    /// # Errors
    ///
    /// When the host cannot be told of it.
    pub fn spawn(&self, command: &str, deadline: Duration) -> Result<Job> {
        Job::start(&self.machine, command, deadline)
    }

    /// Waits for the end of a command that was started with [`Host::spawn`].
    ///
    /// # Errors
    ///
    /// When it takes too long, or the host ends.
    pub fn wait(&mut self, job: Job) -> Result<Output> {
        job.wait(&mut self.machine)
    }

    /// The folder here that is `/share` in the host.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.machine.files().share()
    }

    /// Copies programs of this machine to the host's `/usr/local/bin`, without what is for
    /// debuggers.
    ///
    /// # Errors
    ///
    /// When a program cannot be read, or the host has no room for it.
    pub fn install(&mut self, programs: &[&Path]) -> Result<()> {
        for program in programs {
            let name = program.file_name().unwrap_or_default();
            let staged = self.share().join(name);
            strip(program, &staged)?;
            let name = name.to_string_lossy();
            self.run(&format!(
                "install -m 755 '/share/{name}' /usr/local/bin/ && rm '/share/{name}'"
            ))?;
        }
        Ok(())
    }

    /// Gives QEMU a command, such as `device_add` with a bus of `rp0` or `rp1`.
    ///
    /// # Errors
    ///
    /// When QEMU refuses it.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        self.machine.qmp()?.execute(command, arguments)
    }

    /// What the host has printed on its console, where the kernel's last words are.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.machine.files().console()).unwrap_or_default())
            .into_owned()
    }

    /// Lets the host run on when this program ends, and gives its folder.
    pub(crate) fn leave(mut self) -> PathBuf {
        self.machine.leave();
        match std::mem::replace(&mut self.folder, Folder::Left(PathBuf::new())) {
            Folder::Owned(folder) => folder.keep(),
            Folder::Left(path) => path,
        }
    }

    /// A host that another program has left running in `folder`.
    pub(crate) fn attach(name: &str, folder: PathBuf) -> Self {
        Self {
            machine: Machine::attach(name, Files::new(folder.clone())),
            folder: Folder::Left(folder),
        }
    }

    /// Whether QEMU still runs.
    pub(crate) fn alive(&mut self) -> bool {
        self.machine.alive()
    }

    /// Ends a host that was left running, and removes its files.
    pub(crate) fn stop(mut self) -> Result<()> {
        let folder = self.machine.files().folder().to_owned();
        if self.machine.alive() {
            self.machine.quit()?;
        }
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(Error::io("removing", &folder))?;
        }
        Ok(())
    }
}

/// Copies a program without its debug information, which is most of it, and slow to move into a
/// host.
///
/// # Errors
///
/// When `strip` of the C compiler's package binutils is missing or refuses the program.
pub fn strip(program: &Path, to: &Path) -> Result<()> {
    let output = Command::new("strip")
        .arg("-o")
        .args([to, program])
        .output()
        .map_err(Error::io("running strip for", program))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Program {
        program: "strip",
        status: output.status,
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// A name goes into shell commands and file names.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if (1..=32).contains(&name.len()) && name.bytes().all(good) && !name.starts_with('-') {
        return Ok(());
    }
    Err(Error::Name {
        name: name.to_owned(),
        problem: "is no name for a host: 1 to 32 letters, digits and -",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_more_than_a_word_are_refused() {
        assert!(check_name("host-a1").is_ok());
        for name in ["", "-a", "a b", "a;b", "../a", &"a".repeat(33)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
