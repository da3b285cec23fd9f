//! What can go wrong with an emulated host.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Why a host could not be prepared, started or used.
#[derive(thiserror::Error)]
pub enum Error {
    /// A file or process operation of this machine failed.
    #[error("{action} {path} failed")]
    Io {
        /// What was tried, as a gerund.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The preparation script ended with an error; it has printed which.
    #[error("preparing the emulated hosts ended with {status}; the log ends with:\n{log}")]
    Prepare {
        /// How the script ended.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// Another process holds the cache for too long.
    #[error("{path} is still locked by another process after {waited:?}")]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long this process waited.
        waited: Duration,
    },
    /// A program of this machine failed.
    #[error("{program} ended with {status}: {message}")]
    Program {
        /// Its name.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        message: String,
    },
    /// QEMU ended although nobody asked it to.
    #[error(
        "host {name} ended by itself; QEMU said:\n{qemu}\nand its console ends with:\n{console}"
    )]
    Died {
        /// Name of the host.
        name: String,
        /// QEMU's messages.
        qemu: String,
        /// The last lines of the host's console.
        console: String,
    },
    /// Something in a host did not happen in time.
    #[error("host {name}: {what} took more than {deadline:?}; its console ends with:\n{console}")]
    Deadline {
        /// Name of the host.
        name: String,
        /// What was waited for.
        what: String,
        /// For how long.
        deadline: Duration,
        /// The last lines of the host's console.
        console: String,
    },
    /// A command in a host did not end in time and was killed.
    #[error(
        "host {name}: `{command}` took more than {deadline:?}; it printed:\n{stdout}\n{stderr}"
    )]
    CommandDeadline {
        /// Name of the host.
        name: String,
        /// The command.
        command: String,
        /// For how long it was waited for.
        deadline: Duration,
        /// The last lines of its standard output.
        stdout: String,
        /// The last lines of its standard error.
        stderr: String,
    },
    /// A command in a host ended with another status than 0.
    #[error("`{command}` ended with status {status}; it printed:\n{stdout}\n{stderr}")]
    CommandStatus {
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// The last lines of its standard output.
        stdout: String,
        /// The last lines of its standard error.
        stderr: String,
    },
    /// QEMU refused a QMP command.
    #[error("QEMU refused {command}: {description}")]
    QmpRefused {
        /// Name of the command.
        command: String,
        /// QEMU's reason.
        description: String,
    },
    /// QEMU said something on its QMP socket that is no QMP.
    #[error("QEMU answered {command} with `{answer}`, which is no QMP answer")]
    QmpAnswer {
        /// Name of the command.
        command: String,
        /// What came, shortened.
        answer: String,
    },
    /// Saving or restoring a host's state failed.
    #[error("migrating a host's state failed: {reason}")]
    State {
        /// QEMU's reason.
        reason: String,
    },
    /// A name of a host that is not usable, not there, or there already.
    #[error("host `{name}` {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is the matter with it.
        problem: &'static str,
    },
    /// A guest's results are not those of a workload that went well.
    #[error("the guest's workload went wrong: {reason}; the whole output is:\n{output}")]
    Workload {
        /// What is missing or differs.
        reason: String,
        /// The output of host and guest.
        output: String,
    },
}

/// What a test prints that unwraps it: logs with their lines, and the causes.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut error: &dyn std::error::Error = self;
        while let Some(cause) = error.source() {
            write!(f, ": {cause}")?;
            error = cause;
        }
        Ok(())
    }
}

impl Error {
    /// Turns an I/O error into ours, with what was tried on which path.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Error + use<'a> {
        move |source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The last `lines` lines of a text file; a file that cannot be read is said to be so.
pub(crate) fn tail_of(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => tail(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("({}: {error})", path.display()),
    }
}

/// The last `lines` lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_last_lines_only() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\nb", 5), "a\nb");
        assert_eq!(tail("", 5), "");
    }

    #[test]
    fn tail_of_a_missing_file_names_it() {
        assert!(tail_of(Path::new("/nonexistent/log"), 3).contains("/nonexistent/log"));
    }
}
