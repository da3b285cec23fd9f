//! polkit's agent for a terminal, which asks for a password where the policy wants one.

use std::io::{IsTerminal as _, Read as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

const PROGRAM: &str = "pkttyagent";
/// How long it may take until it is known to polkit.
const DEADLINE: Duration = Duration::from_secs(10);

/// An agent for this process, until it is dropped.
#[derive(Debug)]
pub struct Agent(Child);

impl Agent {
    /// Starts one, where a person sits at a terminal. Without one polkit refuses what it would
    /// have to ask for, and the broker says so.
    pub async fn start() -> Option<Self> {
        let person = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        if geteuid().is_root() || !person {
            return None;
        }
        // It talks to the terminal itself, and closes this descriptor when it is ready. An agent with
        // --fallback would not be found where the process is in no session.
        let mut child = Command::new(PROGRAM)
            .args(["--notify-fd", "1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let ready = child.stdout.take();
        let agent = Self(child);
        let ready = tokio::task::spawn_blocking(move || {
            // Whether it is ready or has ended, there is no more.
            ready.map(|mut ready| ready.read_to_end(&mut Vec::new()))
        });
        tokio::time::timeout(DEADLINE, ready).await.ok()?.ok()?;
        Some(agent)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // By a signal that it heeds: it may have turned the terminal's echo off.
        if let Ok(process) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(process), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}
