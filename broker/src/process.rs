//! A process by its pidfd: it is never mistaken for another that got its number later.
#![expect(
    unsafe_code,
    reason = "pidfd_open and pidfd_send_signal have no wrapper"
)]

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;

use crate::launch::systemd::Unit;

/// Which process, across the life of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's boot.
    pub start: u64,
    /// The systemd unit that it is in, or empty.
    pub unit: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Status(i32),
    /// By a signal.
    Signal(Signal),
    /// It is not our child, and nobody told.
    Unknown,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "it ended with status {status}"),
            Self::Signal(signal) => write!(f, "it was killed by {signal}"),
            Self::Unknown => write!(f, "it ended"),
        }
    }
}

/// A running or ended process.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    /// The kernel tells its end once, and here it may be asked for again.
    result: OnceCell<Ended>,
    /// Tells its end if it is not our child.
    unit: Option<Unit>,
}

impl Process {
    /// A process that was just started and cannot have been reaped yet.
    ///
    /// # Errors
    /// There is no such process, or no descriptor to be had.
    pub fn new(pid: u32, unit: String) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        // The pidfd is open: if this is the start time of another process, ours has ended.
        let start = start_time(pid)?;
        // SAFETY: it owns an open descriptor, and gives out no other way to close it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        Ok(Self {
            id: ProcessId { pid, start, unit },
            pidfd: pidfd.map_err(io::Error::from)?,
            result: OnceCell::new(),
            unit: None,
        })
    }

    /// The same one, which is in a unit of systemd.
    #[must_use]
    pub fn in_unit(mut self, name: &str) -> Self {
        self.id.unit = name.to_owned();
        self
    }

    /// The same one, whose unit will tell how it ended.
    pub(crate) fn watched_as(mut self, unit: Unit) -> Self {
        self.unit = Some(unit);
        self
    }

    /// A process that a broker before this one started.
    ///
    /// # Errors
    /// It has ended.
    pub fn adopt(id: &ProcessId) -> io::Result<Self> {
        let process = Self::new(id.pid, id.unit.clone())?;
        // One that nobody has reaped yet has ended as well.
        if process.id.start == id.start && !process.has_ended() {
            Ok(process)
        } else {
            Err(Errno::ESRCH.into())
        }
    }

    /// Which one it is.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.get_ref().as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// Waits for its end, and reaps it if it is our child.
    pub async fn ended(&self) -> Ended {
        if self.pidfd.readable().await.is_err() {
            return Ended::Unknown;
        }
        let learn = async || match &self.unit {
            Some(unit) => unit.ended(self.id.pid).await,
            None => self.reap(),
        };
        *self.result.get_or_init(learn).await
    }

    fn reap(&self) -> Ended {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        match waitid(Id::PIDFd(self.pidfd.get_ref().as_fd()), flags) {
            Ok(WaitStatus::Exited(_, status)) => Ended::Status(status),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ended::Signal(signal),
            _ => Ended::Unknown,
        }
    }

    /// Sends it a signal. One that has ended takes none, which is no error.
    pub fn signal(&self, signal: Signal) {
        let fd = self.pidfd.get_ref().as_raw_fd();
        // SAFETY: the descriptor is open, and no siginfo is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                fd,
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result < 0 && Errno::last() != Errno::ESRCH {
            let error = io::Error::last_os_error();
            tracing::warn!(pid = self.id.pid, %signal, %error, "a process cannot be signalled");
        }
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| Errno::ESRCH)?;
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// When the process was started (proc_pid_stat(5), field 22).
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field may hold anything, in parentheses.
    let after = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    after
        .split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc gives no start time"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn the_end_of_a_child_is_known() {
        let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let process = Process::new(child.id(), String::new()).unwrap();
        assert_eq!(process.ended().await, Ended::Status(7));
        assert_eq!(process.ended().await, Ended::Status(7));
        assert!(child.wait().is_err(), "it is reaped");
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::new(child.id(), String::new()).unwrap();
        process.signal(Signal::SIGKILL);
        assert_eq!(process.ended().await, Ended::Signal(Signal::SIGKILL));
        process.signal(Signal::SIGKILL);
        assert!(child.wait().is_err(), "it is reaped");
    }

    #[tokio::test]
    async fn another_process_of_the_same_number_is_not_adopted() {
        let own = Process::new(std::process::id(), String::new()).unwrap();
        Process::adopt(own.id()).unwrap();
        let mut other = own.id().clone();
        other.start += 1;
        assert!(Process::adopt(&other).is_err());
    }
}
