//! Messages on a socket, with their descriptors and a deadline.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::{Error, ProtocolError};
use crate::wire::{Command, Header, Layout as _};

/// Descriptors that this side receives in one message. Linux sends 253 at most.
pub(crate) const MOST_DESCRIPTORS: usize = 64;
/// As many as can come at once: what is received with less room is lost.
const ROOM: usize = 253;

/// A message, as it came.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Message {
    pub(crate) fn command(&self) -> Command {
        Command(self.header.command)
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Awaited {
    /// The reply to a command.
    Reply(Command),
    /// That the other side takes the reply to a command.
    Taken(Command),
    /// All of a message whose first byte has come.
    Rest,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply(command) => write!(f, "the reply to {command}"),
            Self::Taken(command) => write!(f, "the client to take the reply to {command}"),
            Self::Rest => f.write_str("the rest of a message"),
        }
    }
}

/// A wait that ends at some time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    end: Instant,
    within: Duration,
    what: Awaited,
}

impl Deadline {
    pub(crate) fn new(within: Duration, what: Awaited) -> Self {
        Self {
            end: Instant::now() + within,
            within,
            what,
        }
    }

    /// Waits until something can be sent or received.
    fn wait(&self, socket: &UnixStream, events: PollFlags) -> Result<(), Error> {
        loop {
            let left = self.end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    what: self.what.to_string(),
                    within: self.within,
                });
            }
            let timeout =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(socket.as_fd(), events)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
    }
}

fn failed(error: rustix::io::Errno) -> Error {
    use rustix::io::Errno;
    match error {
        Errno::PIPE | Errno::CONNRESET => Error::Closed,
        error => Error::Io(io::Error::from(error)),
    }
}

/// Sends one message of several parts.
pub(crate) fn send(
    socket: &UnixStream,
    parts: &[&[u8]],
    mut descriptors: &[BorrowedFd<'_>],
    deadline: Deadline,
) -> Result<(), Error> {
    let mut parts: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut parts = parts.as_mut_slice();
    // It leaves out what is empty.
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Error::Io(io::ErrorKind::InvalidInput.into()));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(socket, parts, &mut control, flags) {
            Ok(count) => {
                IoSlice::advance_slices(&mut parts, count);
                // They went with the first byte.
                descriptors = &[];
            }
            Err(rustix::io::Errno::AGAIN) => deadline.wait(socket, PollFlags::POLLOUT)?,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

/// Receives one message, of `most` bytes at most with its header. `Closed` if there is none.
pub(crate) fn receive(
    socket: &UnixStream,
    most: u32,
    deadline: Deadline,
) -> Result<Message, Error> {
    let mut descriptors = Vec::new();
    let mut header = [0; Header::SIZE];
    fill(socket, &mut header, &mut descriptors, deadline)?;
    let header = Header::whole(&header).unwrap_or_default();
    let least = Header::size();
    let payload = match header.size.checked_sub(least) {
        Some(payload) if header.size <= most => payload as usize,
        _ => {
            let size = header.size;
            return Err(ProtocolError::Length { size, least, most }.into());
        }
    };
    let mut payload = vec![0; payload];
    fill(socket, &mut payload, &mut descriptors, deadline)?;
    Ok(Message {
        header,
        payload,
        descriptors,
    })
}

fn fill(
    socket: &UnixStream,
    mut buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    deadline: Deadline,
) -> Result<(), Error> {
    while !buffer.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags);
        let received = match received {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN) => {
                deadline.wait(socket, PollFlags::POLLIN)?;
                continue;
            }
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(failed(error)),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        // Cut off: this process can hold no more.
        if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MOST_DESCRIPTORS {
            let most = MOST_DESCRIPTORS;
            return Err(ProtocolError::Descriptors { most }.into());
        }
        if received.bytes == 0 {
            return Err(Error::Closed);
        }
        buffer = &mut buffer[received.bytes..];
    }
    Ok(())
}
