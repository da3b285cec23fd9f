//! A device process under test.

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::wait_for;
use crate::machine::DEADLINE;
use crate::process::{Launch, Process};
use crate::programs::program;

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
    process: Process,
    socket: PathBuf,
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
        let mut launch = Launch::new(&program(spec.program)?)
            .environment("GODWIT_LOG", "debug")
            .arg(format!("--socket-path={}", socket.display()));
        for argument in &spec.arguments {
            launch = launch.arg(argument);
        }
        let process = launch.start()?;
        Ok(DeviceProcess { process, socket })
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        self.process.stderr()
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
        Pid::from_raw(self.process.id().cast_signed())
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !self.process.is_running()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait(DEADLINE)
    }

    /// Kills it, with whatever it is doing.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let status = self.wait()?;
        ensure!(status.signal() == Some(9), "ended by itself: {status}");
        Ok(())
    }
}
