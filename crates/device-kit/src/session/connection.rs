//! The socket of a session: messages are taken from it until it ends.
//!
//! Every message goes to the protocol library but those that it does not know ([`wired`]), and
//! SET_BACKEND_REQ_FD, whose channel the library would wrap into a type that cannot send
//! CONFIG_CHANGE_MSG. They are recognised by a look ahead. The look ahead also bounds the time that a message may take to arrive: the library
//! retries for ever when a header comes in halves.

use std::io::IoSliceMut;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send, sockopt};
use vhost::vhost_user::{
    BackendReqHandler, Error as ProtocolError, VhostUserProtocolFeatures as Protocol,
};

use super::error::SessionError;
use super::{Services, Session, wired};
use crate::device::Device;
use crate::ending::chain;
use crate::features::PROTOCOL;

/// A message that has begun arrives within this time.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
pub(super) const HEADER: usize = 12;

const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
pub(super) const VERSION_1: u32 = 1;

/// The connection that is being served, for whoever must end it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connection(Arc<Mutex<Option<UnixStream>>>);

impl Connection {
    /// Ends the connection; the session follows. False when there is none.
    pub(crate) fn shut_down(&self) -> bool {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = current.as_ref() {
            // It fails only when the front-end is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        current.is_some()
    }

    fn set(&self, stream: Option<UnixStream>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

/// Serves one front-end until it goes or errs.
///
/// # Errors
/// When the session cannot be ended: requests are in flight that do not end.
pub(crate) fn serve<D: Device>(
    stream: UnixStream,
    services: &Arc<Services<D>>,
    connection: &Connection,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    services.metrics.sessions.inc();
    services.health.set_connected(true);
    tracing::info!("front-end connected");
    let session = Arc::new(Session::new(Arc::clone(services)));
    match messages(stream, &session, connection) {
        Ok(()) => tracing::info!("front-end disconnected"),
        Err(error) => {
            services.metrics.sessions_failed.inc();
            let reason = chain(&error);
            tracing::warn!(reason, "session ended by an error");
            services.health.error(&reason);
        }
    }
    let ended = session.end();
    connection.set(None);
    services.health.set_connected(false);
    Ok(ended?)
}

fn messages<D: Device>(
    stream: UnixStream,
    session: &Arc<Session<D>>,
    connection: &Connection,
) -> Result<(), ProtocolError> {
    let failed = |source| ProtocolError::from(SessionError::Connection(source));
    stream
        .set_read_timeout(Some(MESSAGE_DEADLINE))
        .map_err(failed)?;
    connection.set(Some(stream.try_clone().map_err(failed)?));
    let peek = stream.try_clone().map_err(failed)?;
    let mut library = BackendReqHandler::from_stream(stream, Arc::clone(session));
    while let Some(header) = next_header(&peek)? {
        let request = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
        if request == SET_BACKEND_REQ_FD {
            session.backend_channel(&peek)?;
        } else if wired::is_one(request) {
            session.wired_rings(&peek)?;
        } else {
            library.handle_request()?;
        }
    }
    Ok(())
}

/// Waits for a message and looks at its header; `None` when the front-end is gone.
fn next_header(stream: &UnixStream) -> Result<Option<[u8; HEADER]>, SessionError> {
    let failed = |error: Errno| SessionError::Connection(error.into());
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    // No deadline: a front-end may be silent for days, and `Connection` ends the wait.
    while let Err(error) = poll(&mut fds, PollTimeout::NONE) {
        if error != Errno::EINTR {
            return Err(failed(error));
        }
    }
    let deadline = Instant::now() + MESSAGE_DEADLINE;
    loop {
        let mut header = [0; HEADER];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(stream.as_raw_fd(), &mut header, flags) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(None),
            Ok(HEADER) => return Ok(Some(header)),
            Ok(got) if Instant::now() >= deadline => {
                return Err(SessionError::HalfMessage { got });
            }
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

impl<D: Device> Session<D> {
    /// Takes SET_BACKEND_REQ_FD from the socket and answers it.
    fn backend_channel(&self, stream: &UnixStream) -> Result<(), SessionError> {
        let (header, mut fds) = take_message(stream)?;
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| header[at + i]));
        let (flags, size) = (word(4), word(8));
        if flags & 3 != VERSION_1 || flags & FLAG_REPLY != 0 || size != 0 {
            return Err(SessionError::Channel("the message is malformed"));
        }
        let negotiated = self.protocol_features() & PROTOCOL.bits();
        let has = |feature: Protocol| negotiated & feature.bits() != 0;
        if !has(Protocol::BACKEND_REQ) {
            return Err(SessionError::Channel("it was not negotiated"));
        }
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return Err(SessionError::Channel("it needs one descriptor"));
        };
        let family = nix::sys::socket::getsockopt(&fd, sockopt::SockType);
        if family != Ok(nix::sys::socket::SockType::Stream) {
            return Err(SessionError::Channel("it is not a stream socket"));
        }
        self.services
            .config_change
            .set_channel(Some(UnixStream::from(fd)));
        if flags & FLAG_NEED_REPLY != 0 && has(Protocol::REPLY_ACK) {
            answer_success(stream, SET_BACKEND_REQ_FD)?;
        }
        Ok(())
    }
}

fn answer_success(stream: &UnixStream, request: u32) -> Result<(), SessionError> {
    let mut reply = [0; HEADER + 8];
    reply[..4].copy_from_slice(&request.to_ne_bytes());
    reply[4..8].copy_from_slice(&(VERSION_1 | FLAG_REPLY).to_ne_bytes());
    reply[8..12].copy_from_slice(&8u32.to_ne_bytes());
    match send(stream.as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL) {
        Ok(sent) if sent == reply.len() => Ok(()),
        Ok(_) => Err(SessionError::Channel("the answer was cut off")),
        Err(error) => Err(SessionError::Connection(error.into())),
    }
}

/// Takes a header, which is known to be there, and the descriptors that came with it.
pub(super) fn take_message(
    stream: &UnixStream,
) -> Result<([u8; HEADER], Vec<OwnedFd>), SessionError> {
    let mut header = [0; HEADER];
    let mut space = nix::cmsg_space!([RawFd; 32]);
    let mut parts = [IoSliceMut::new(&mut header)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let failed = |error: Errno| SessionError::Connection(error.into());
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).map_err(failed)?;
    let mut fds = Vec::new();
    for control in message.cmsgs().map_err(failed)? {
        if let ControlMessageOwned::ScmRights(received) = control {
            fds.extend(received.into_iter().map(own));
        }
    }
    Ok((header, fds))
}

#[expect(unsafe_code, reason = "descriptors arrive as numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
