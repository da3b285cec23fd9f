//! Processes as children, each in a session of its own, so that neither the broker's end nor
//! a terminal's is theirs.
#![expect(
    unsafe_code,
    reason = "a child's session and descriptors are set between fork and exec"
)]

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::unistd::setsid;

use super::{LaunchError, Program};
use crate::process::Process;

/// Starts a program.
pub(super) fn start(program: Program) -> Result<Process, LaunchError> {
    let path = program.path.clone();
    spawn(program).map_err(|source| LaunchError::Start { path, source })
}

fn spawn(program: Program) -> io::Result<Process> {
    let numbers: Vec<RawFd> = program
        .descriptors
        .iter()
        .map(|fd| fd.as_raw_fd())
        .collect();
    let mut command = Command::new(&program.path);
    command
        .args(&program.args)
        .env_remove("NOTIFY_SOCKET")
        .env("NO_COLOR", "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(program.log.try_clone()?)
        .stderr(program.log);
    // SAFETY: only async-signal-safe calls, on descriptors that stay open until after exec.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            for number in &numbers {
                if libc::fcntl(*number, libc::F_SETFD, 0) < 0 {
                    return Err(Errno::last().into());
                }
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let process = Process::new(child.id(), String::new());
    if process.is_err() {
        // Nobody would watch it.
        let _ = child.kill();
        let _ = child.wait();
    }
    process
}
