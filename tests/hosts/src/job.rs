//! A shell command in a host: `ID/cmd` on the share, and its `out`, `err` and `rc` beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::tail;
use crate::machine::Machine;
use crate::{Error, Result};

/// Beyond the command's own deadline, which the agent enforces, for the way there and back.
const GRACE: Duration = Duration::from_secs(15);

/// Exit statuses of `timeout` when it ended the command, by SIGTERM and by SIGKILL.
const TIMED_OUT: [i32; 2] = [124, 137];

/// Lines of what a command has printed that an error holds.
const LINES: usize = 100;

/// How a command in a host ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit status; 128 and the signal's number when a signal ended it.
    pub status: i32,
    /// What it printed on standard output; other bytes than UTF-8 are replaced.
    pub stdout: String,
    /// What it printed on standard error.
    pub stderr: String,
}

impl Output {
    /// That of a `command` which went well.
    pub(crate) fn expect(self, command: &str) -> Result<Self> {
        if self.status == 0 {
            return Ok(self);
        }
        Err(Error::CommandStatus {
            command: command.to_owned(),
            status: self.status,
            stdout: tail(&self.stdout, LINES),
            stderr: tail(&self.stderr, LINES),
        })
    }
}

/// A command that was started in a host and runs beside others.
#[derive(Debug)]
pub struct Job {
    folder: PathBuf,
    command: String,
    deadline: Duration,
}

impl Job {
    /// Puts the command on the share and tells the agent of it.
    pub(crate) fn start(machine: &Machine, command: &str, deadline: Duration) -> Result<Self> {
        let share = machine.files().share();
        let folder = tempfile::Builder::new()
            .prefix("job-")
            .tempdir_in(&share)
            .map_err(Error::io("creating a job's folder in", &share))?
            .keep();
        let script = folder.join("cmd");
        fs::write(&script, format!("{command}\n")).map_err(Error::io("writing", &script))?;
        let id = folder.file_name().unwrap_or_default().to_string_lossy();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        machine.tell_agent(&format!("{id} {now} {}", deadline.as_secs().max(1)))?;
        Ok(Self {
            folder,
            command: command.to_owned(),
            deadline,
        })
    }

    /// What the command has printed on standard output until now.
    #[must_use]
    pub fn stdout(&self) -> String {
        text(&self.folder.join("out"))
    }

    /// Waits for the command's end.
    pub(crate) fn wait(self, machine: &mut Machine) -> Result<Output> {
        let status_path = self.folder.join("rc");
        let waited = machine.wait_until(
            &format!("`{}`", self.command),
            self.deadline + GRACE,
            |_| Ok(status_path.exists()),
        );
        let status = match waited {
            Ok(()) => text(&status_path).trim().parse().unwrap_or(-1),
            Err(Error::Deadline { .. }) => TIMED_OUT[0],
            Err(error) => return Err(error),
        };
        let output = Output {
            status,
            stdout: text(&self.folder.join("out")),
            stderr: text(&self.folder.join("err")),
        };
        if TIMED_OUT.contains(&status) {
            return Err(Error::CommandDeadline {
                name: machine.name().to_owned(),
                command: self.command,
                deadline: self.deadline,
                stdout: tail(&output.stdout, LINES),
                stderr: tail(&output.stderr, LINES),
            });
        }
        Ok(output)
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
