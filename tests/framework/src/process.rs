//! One process of a test.
#![expect(
    unsafe_code,
    reason = "a child's descriptors and its death signal are set between fork and exec"
)]

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A program to start.
#[derive(Debug)]
pub struct Launch {
    name: String,
    command: Command,
    inherited: Vec<OwnedFd>,
}

impl Launch {
    /// Of the program at `path`.
    pub fn new(path: &Path) -> Self {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self {
            name,
            command: Command::new(path),
            inherited: Vec::new(),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds an option and its value.
    #[must_use]
    pub fn option(self, option: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(option).arg(value)
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Lets the program inherit `descriptor` under its present number, which is returned.
    pub fn inherit(&mut self, descriptor: OwnedFd) -> RawFd {
        let number = descriptor.as_raw_fd();
        self.inherited.push(descriptor);
        number
    }

    /// Starts it. Its output is kept, and it ends when this thread does.
    pub fn start(mut self) -> Result<Process> {
        let inherited: Vec<_> = self.inherited.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: only async-signal-safe calls, on descriptors that are open here.
        unsafe {
            self.command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                for fd in &inherited {
                    let fd = std::os::fd::BorrowedFd::borrow_raw(*fd);
                    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
                }
                Ok(())
            })
        };
        self.command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = self
            .command
            .spawn()
            .with_context(|| format!("{} cannot be started", self.name))?;
        let mut stderr = child.stderr.take().context("a child without stderr")?;
        let output = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&output);
        let reader = thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]);
                kept.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&text);
            }
        });
        Ok(Process {
            name: self.name,
            child,
            output,
            reader: Some(reader),
        })
    }
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// The program's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed on stderr so far.
    pub fn stderr(&self) -> String {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.id()).context("a process id is too large")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("{} takes no {signal}", self.name))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.child.try_wait()? {
                if let Some(reader) = self.reader.take() {
                    // All that it printed is there when its end is known.
                    let _ = reader.join();
                }
                return Ok(status);
            }
            if Instant::now() > end {
                bail!(
                    "{} did not end within {} s; it said: {}",
                    self.name,
                    deadline.as_secs(),
                    self.stderr()
                );
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
