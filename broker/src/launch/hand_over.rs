//! Descriptors for a process that somebody else starts: it comes for them on a socket, and
//! becomes the program.
//!
//! ```text
//! systemd ── starts ──► godwit-launch SOCKET ── connects ──► broker
//!                            ▲                                  │
//!                            └── answer, log, descriptors ──────┘
//!                       exec of the program
//! ```
//! The answer is its length (4 bytes, little-endian) and JSON: an order, or why there is none.
//! With an order come descriptors. The first is the log; the others get the numbers that the
//! order names.
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

/// How long the broker waits for a process that takes nothing.
const GIVE_DEADLINE: Duration = Duration::from_secs(30);
/// How long a process waits for the broker, which may have other processes to start before.
const RECEIVE_DEADLINE: Duration = Duration::from_secs(170);
/// Largest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// Most descriptors of a message (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

/// What a process is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Become(Order),
    Refused(String),
}

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
pub fn give(stream: &UnixStream, program: &Program) -> io::Result<()> {
    let order = Order {
        path: program.path.clone(),
        args: program.args.clone(),
        numbers: program
            .descriptors
            .iter()
            .map(|fd| fd.as_raw_fd())
            .collect(),
    };
    let mut descriptors = vec![program.log.as_raw_fd()];
    descriptors.extend(&order.numbers);
    answer(stream, &Answer::Become(order), &descriptors)
}

/// Tells the process at the other end why it gets nothing.
///
/// # Errors
/// The process is gone.
pub fn refuse(stream: &UnixStream, why: &str) -> io::Result<()> {
    answer(stream, &Answer::Refused(why.to_owned()), &[])
}

fn answer(mut stream: &UnixStream, answer: &Answer, descriptors: &[RawFd]) -> io::Result<()> {
    stream.set_write_timeout(Some(GIVE_DEADLINE))?;
    let text = serde_json::to_vec(answer)?;
    let (size, count) = (text.len(), descriptors.len());
    if size > MAX_ANSWER || count > MAX_DESCRIPTORS {
        return Err(invalid(format!(
            "{size} bytes and {count} descriptors are more than can be handed over"
        )));
    }
    let length = u32::try_from(size).unwrap_or(u32::MAX).to_le_bytes();
    let rights = [ControlMessage::ScmRights(descriptors)];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&length)],
        &rights[..usize::from(count > 0)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != length.len() {
        return Err(invalid("the answer's length was cut off".into()));
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
    let mut stream = UnixStream::connect(socket).map_err(|error| {
        let text = format!("no broker at {}: {error}", socket.display());
        io::Error::new(error.kind(), text)
    })?;
    stream.set_read_timeout(Some(RECEIVE_DEADLINE))?;
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
        match message.bytes {
            4 => {}
            0 => return Err(invalid("the broker has ended".into())),
            _ => return Err(invalid("the answer was cut off".into())),
        }
    }
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_ANSWER {
        return Err(invalid(format!("an answer of {length} bytes is too long")));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    drop(stream);
    let order = match serde_json::from_slice(&text)? {
        Answer::Become(order) => order,
        Answer::Refused(why) => return Err(io::Error::other(why)),
    };
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
