//! Descriptors for a process that somebody else starts: it comes for them on a socket, and
//! becomes the program.
//!
//! ```text
//! systemd ── starts ──► godwit-launch SOCKET ── connects ──► broker
//!                            ▲                                  │
//!                            └── order, log, descriptors ───────┘
//!                       exec of the program
//! ```
//! The order is its length (4 bytes, little-endian) and JSON. The first descriptor is the
//! log; the others get the numbers that the order names.
#![expect(
    unsafe_code,
    reason = "descriptors get the numbers that the program is told"
)]

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use super::Program;

/// How long either side waits for the other.
const DEADLINE: Duration = Duration::from_secs(30);
/// Largest order, in bytes.
const MAX_ORDER: usize = 1 << 20;
/// Most descriptors of a message (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

/// What a process is to become.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    path: PathBuf,
    args: Vec<String>,
    /// The number of each descriptor after the first.
    numbers: Vec<RawFd>,
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Hands a program to the process at the other end.
///
/// # Errors
/// The process is gone, or the program needs more than can be handed over.
pub fn give(mut stream: &UnixStream, program: &Program) -> io::Result<()> {
    stream.set_write_timeout(Some(DEADLINE))?;
    let order = Order {
        path: program.path.clone(),
        args: program.args.clone(),
        numbers: program
            .descriptors
            .iter()
            .map(|fd| fd.as_raw_fd())
            .collect(),
    };
    let text = serde_json::to_vec(&order)?;
    let count = program.descriptors.len() + 1;
    if text.len() > MAX_ORDER || count > MAX_DESCRIPTORS {
        let size = text.len();
        return Err(invalid(format!(
            "{size} bytes and {count} descriptors are more than can be handed over"
        )));
    }
    let mut descriptors = vec![program.log.as_raw_fd()];
    descriptors.extend(&order.numbers);
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&length)],
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != length.len() {
        return Err(invalid("the order's length was cut off".into()));
    }
    stream.write_all(&text)
}

/// Comes for a program at `socket` and becomes it. Returns only if that fails.
///
/// # Errors
/// Nobody is there, or what it hands over cannot be run.
pub fn become_program(socket: &Path) -> io::Error {
    match receive(socket) {
        Ok(mut command) => command.exec(),
        Err(error) => error,
    }
}

fn receive(socket: &Path) -> io::Result<Command> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut length = [0; 4];
    let mut descriptors = Vec::new();
    {
        let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(&mut length)];
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel has just made them for this process.
                let owned = |number| unsafe { OwnedFd::from_raw_fd(number) };
                descriptors.extend(numbers.into_iter().map(owned));
            }
        }
        if message.bytes != 4 {
            return Err(invalid("the order was cut off".into()));
        }
    }
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_ORDER {
        return Err(invalid(format!("an order of {length} bytes is too long")));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    drop(stream);
    let order: Order = serde_json::from_slice(&text)?;
    let wanted: Vec<RawFd> = [1].into_iter().chain(order.numbers).collect();
    if wanted.len() != descriptors.len() {
        return Err(invalid(format!(
            "{} descriptors came, {} were announced",
            descriptors.len(),
            wanted.len()
        )));
    }
    place(descriptors, &wanted)?;
    let mut command = Command::new(order.path);
    command.args(order.args).env("NO_COLOR", "1");
    Ok(command)
}

/// Gives each descriptor its number, where the program inherits it.
fn place(descriptors: Vec<OwnedFd>, wanted: &[RawFd]) -> io::Result<()> {
    let above = wanted.iter().copied().max().unwrap_or(2).max(2) + 1;
    // Out of the way of every wanted number first.
    let mut high = Vec::new();
    for descriptor in descriptors {
        let number = fcntl(&descriptor, FcntlArg::F_DUPFD_CLOEXEC(above))?;
        // SAFETY: the kernel has just made it for this process.
        high.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    for (descriptor, number) in high.iter().zip(wanted) {
        // SAFETY: no descriptor with one of these numbers has an owner here any more, but for
        // standard output, which is to be replaced.
        if unsafe { libc::dup2(descriptor.as_raw_fd(), *number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: standard error is to be replaced by standard output, which is the log.
    if unsafe { libc::dup2(1, 2) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
