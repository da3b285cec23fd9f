//! The socket of a session: messages are taken from it until it ends.
//!
//! Every message goes to the protocol library but those that it does not know ([`wired`],
//! SEND_RARP), and SET_BACKEND_REQ_FD, whose channel the library would wrap into a type that cannot
//! send CONFIG_CHANGE_MSG. They are recognised by a look ahead. The look ahead also bounds the time
//! that a message may take to arrive: the library
//! retries for ever when a header comes in halves.

use std::io::{IoSliceMut, Read};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::channel::Cancel;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send, sockopt};
use vhost::vhost_user::{
    BackendReqHandler, Error as ProtocolError, VhostUserProtocolFeatures as Protocol,
};

use super::error::SessionError;
use super::{Services, Session, wired};
use crate::device::Device;
use crate::ending::chain;
use crate::server::ServeResult;

/// A message that has begun arrives within this time.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
pub(super) const HEADER: usize = 12;

const SEND_RARP: u32 = 19;
const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
pub(super) const VERSION_1: u32 = 1;

/// Serves one front-end until it goes or errs.
///
/// # Errors
/// When there is no descriptor left for a session, or it cannot be ended: requests are in flight that
/// do not end.
pub(crate) fn serve<D: Device>(stream: UnixStream, services: &Arc<Services<D>>) -> ServeResult {
    services.metrics.sessions.inc();
    services.health.set_connected(true);
    tracing::info!("front-end connected");
    let end = Cancel::at_end_of(stream.try_clone()?);
    let session = Arc::new(Session::new(Arc::clone(services), end));
    match messages(stream, &session) {
        Ok(()) => tracing::info!("front-end disconnected"),
        Err(error) => {
            services.metrics.sessions_failed.inc();
            let reason = chain(&error);
            tracing::warn!(reason, "session ended by an error");
            services.health.error(&reason);
        }
    }
    let ended = session.end();
    services.health.set_connected(false);
    Ok(ended?)
}

fn messages<D: Device>(stream: UnixStream, session: &Arc<Session<D>>) -> Result<(), ProtocolError> {
    let failed = |source| ProtocolError::from(SessionError::Connection(source));
    stream
        .set_read_timeout(Some(MESSAGE_DEADLINE))
        .map_err(failed)?;
    let peek = stream.try_clone().map_err(failed)?;
    let mut library = BackendReqHandler::from_stream(stream, Arc::clone(session));
    loop {
        session.await_message(&peek)?;
        let Some(header) = next_header(&peek)? else {
            return Ok(());
        };
        let request = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
        match request {
            SET_BACKEND_REQ_FD => session.backend_channel(&peek)?,
            SEND_RARP => session.send_rarp(&peek)?,
            request if wired::is_one(request) => session.wired_rings(&peek)?,
            _ => library.handle_request()?,
        }
    }
}

/// Looks at the header of a message that begins to come; `None` when the front-end is gone.
fn next_header(stream: &UnixStream) -> Result<Option<[u8; HEADER]>, SessionError> {
    let failed = |error: Errno| SessionError::Connection(error.into());
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
    fn has(&self, feature: Protocol) -> bool {
        self.protocol_features() & feature.bits() != 0
    }

    /// Takes SEND_RARP from the socket and answers it. A network that is down is no failure of the
    /// session.
    fn send_rarp(&self, stream: &UnixStream) -> Result<(), SessionError> {
        let message = take_message(stream, 8..=8)?;
        if !message.fds.is_empty() {
            return Err(SessionError::Rarp("it has a descriptor"));
        }
        let announcer = self.services.device.announcer();
        let Some(announcer) = announcer.filter(|_| self.has(Protocol::RARP)) else {
            return Err(SessionError::Rarp("it was not negotiated"));
        };
        let [a, b, c, d, e, f, ..] = message.body[..] else {
            return Err(SessionError::Rarp("it has no address"));
        };
        if let Err(error) = announcer.announce([a, b, c, d, e, f]) {
            tracing::warn!(%error, "the network was not told where the guest is");
            self.services.health.error(&error);
        }
        self.acknowledge(stream, SEND_RARP, message.flags)
    }

    /// Takes SET_BACKEND_REQ_FD from the socket and answers it.
    fn backend_channel(&self, stream: &UnixStream) -> Result<(), SessionError> {
        let Message { flags, mut fds, .. } = take_message(stream, 0..=0)?;
        if !self.has(Protocol::BACKEND_REQ) {
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
        self.acknowledge(stream, SET_BACKEND_REQ_FD, flags)
    }

    /// Answers a message that was a success, if it asks for that.
    fn acknowledge(
        &self,
        stream: &UnixStream,
        request: u32,
        flags: u32,
    ) -> Result<(), SessionError> {
        if flags & FLAG_NEED_REPLY != 0 && self.has(Protocol::REPLY_ACK) {
            answer_success(stream, request)?;
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

/// A message that was taken from the socket.
pub(super) struct Message {
    pub(super) request: u32,
    flags: u32,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Takes a message whose header is known to be there, with a body of one of these `sizes`.
pub(super) fn take_message(
    stream: &UnixStream,
    sizes: RangeInclusive<usize>,
) -> Result<Message, SessionError> {
    let mut header = [0; HEADER];
    let mut space = nix::cmsg_space!([RawFd; 32]);
    let failed = |error: Errno| SessionError::Connection(error.into());
    let mut parts = [IoSliceMut::new(&mut header)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).map_err(failed)?;
    let mut fds = Vec::new();
    for control in message.cmsgs().map_err(failed)? {
        if let ControlMessageOwned::ScmRights(received) = control {
            fds.extend(received.into_iter().map(own));
        }
    }
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| header[at + i]));
    let (request, flags, size) = (word(0), word(4), word(8) as usize);
    if flags & 3 != VERSION_1 || flags & FLAG_REPLY != 0 || !sizes.contains(&size) {
        return Err(SessionError::Malformed { request });
    }
    let mut body = vec![0; size];
    // Within the socket's own deadline.
    let mut stream = stream;
    stream
        .read_exact(&mut body)
        .map_err(SessionError::Connection)?;
    Ok(Message {
        request,
        flags,
        body,
        fds,
    })
}

#[expect(unsafe_code, reason = "descriptors arrive as numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
