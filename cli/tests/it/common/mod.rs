//! What the tests of the program share: running it, a terminal for it, a broker of the test's
//! own.

pub mod fake;
pub mod real;
pub mod terminal;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The program, for the broker at `bus`.
pub fn godwit(bus: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit"));
    command
        .arg("--bus")
        .arg(bus)
        .args(line.split_whitespace())
        .env_remove("GODWIT_BUS")
        .stdin(Stdio::null());
    command
}

/// What came of a command.
#[derive(Debug)]
pub struct Ended {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end.
pub fn run(mut command: Command) -> Ended {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    Ended {
        status: status.code().unwrap_or(-1),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

impl Ended {
    /// It succeeded; its stdout.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{self:?}");
        self.stdout
    }

    /// It succeeded, and printed JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// It failed with this status, and said this on stderr.
    #[track_caller]
    pub fn failed(self, status: u8, words: &str) {
        assert_eq!(self.status, i32::from(status), "{self:?}");
        assert!(self.stderr.contains(words), "{words:?} is not in {self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
    }
}
