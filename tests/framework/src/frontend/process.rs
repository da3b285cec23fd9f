//! A device process under test.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::wait_for;

/// The path of a program of this workspace, which is built beside the test that asks.
///
/// # Errors
/// When it was not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let path = test
        .ancestors()
        .nth(2)
        .context("the test has no folder")?
        .join(name);
    ensure!(
        path.exists(),
        "{} is missing; build it with cargo build --workspace --bins",
        path.display()
    );
    Ok(path)
}

/// Which program is started, and how.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    /// Name of the program.
    pub program: &'static str,
    /// Its own options; the socket is added.
    pub arguments: Vec<String>,
}

/// A running device process; it is killed when it is dropped.
#[derive(Debug)]
pub struct DeviceProcess {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl DeviceProcess {
    /// Starts the program with its socket in `folder` and waits until it listens.
    pub fn start(spec: &DeviceSpec, folder: &Path) -> Result<Self> {
        let mut process = Self::spawn(spec, folder)?;
        wait_for("the device process listens", || {
            let up = UnixStream::connect(&process.socket).is_ok();
            (up || process.has_ended()).then_some(())
        })?;
        ensure!(
            !process.has_ended(),
            "{} ended at its start: {}",
            spec.program,
            process.log()
        );
        Ok(process)
    }

    /// Starts the program and waits for nothing.
    pub fn spawn(spec: &DeviceSpec, folder: &Path) -> Result<Self> {
        let socket = folder.join("socket");
        let log = folder.join("log");
        let output = File::options().create(true).append(true).open(&log)?;
        let child = Command::new(program(spec.program)?)
            .arg(format!("--socket-path={}", socket.display()))
            .args(&spec.arguments)
            .env("GODWIT_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()?;
        Ok(DeviceProcess { child, socket, log })
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has said this.
    ///
    /// # Errors
    /// When it does not; the error has all that it did say.
    pub fn wait_log(&self, text: &str) -> Result<()> {
        wait_for(text, || self.log().contains(text).then_some(()))
            .with_context(|| format!("{text:?} is not in: {}", self.log()))
    }

    /// Its process id.
    pub fn id(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)) | Err(_))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.id(), signal)?)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        wait_for("the device process ends", || {
            self.child.try_wait().transpose()
        })?
        .context("the device process cannot be waited for")
    }

    /// Kills it, with whatever it is doing.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let status = self.wait()?;
        ensure!(status.signal() == Some(9), "ended by itself: {status}");
        Ok(())
    }
}

impl Drop for DeviceProcess {
    fn drop(&mut self) {
        if !self.has_ended() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
