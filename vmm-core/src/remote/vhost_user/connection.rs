//! Messages to one back-end, each with a deadline.
//!
//! Most go through the `vhost` crate. These do not: GET_CONFIG and SET_LOG_BASE, whose
//! answers differ in size between back-ends in the field (the crate would wait for bytes
//! that never come), GET_VRING_BASE, which is sent for all rings before the first
//! answer is read, and what the crate does not know ([`migration::rings`]).

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use migration::rings::MAX_REASON;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Error as ProtocolError, Frontend};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::watchdog::Watchdog;
use super::{VhostUserError, config};
use crate::costs;
use crate::transport::MAX_QUEUES;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const HEADER: usize = 12;
/// An answer that is there is read within this time, on a busy computer, too.
const MOMENT: Duration = Duration::from_millis(50);
/// Largest answer that is read: a whole device configuration (VU, «Communication»).
const MAX_ANSWER: usize = 4096;

/// A connection to a back-end.
pub(super) struct Connection {
    device: Arc<str>,
    socket: Arc<UnixStream>,
    frontend: Frontend,
    watchdog: Arc<Watchdog>,
    deadline: Duration,
    reply_ack: bool,
    /// Answers to come.
    owed: u32,
}

impl Connection {
    pub(super) fn new(
        device: Arc<str>,
        stream: UnixStream,
        watchdog: Arc<Watchdog>,
        deadline: Duration,
    ) -> Result<Self, VhostUserError> {
        let socket = stream
            .try_clone()
            .map_err(|e| config::system(&device, "duplicate its socket", e))?;
        Ok(Self {
            device,
            socket: Arc::new(socket),
            frontend: Frontend::from_stream(stream, MAX_QUEUES.into()),
            watchdog,
            deadline,
            reply_ack: false,
            owed: 0,
        })
    }

    /// From now on the back-end answers what it is asked to. Some answer without
    /// having agreed to, so none is asked before.
    pub(super) fn set_reply_ack(&mut self, negotiated: bool) {
        self.reply_ack = negotiated;
    }

    /// How long a message may take that has no deadline of its own.
    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// The socket, to watch it for a hang-up.
    pub(super) fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    /// Whether the other end is closed.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Sends one message, and waits for its answer if it has one.
    pub(super) fn call<T>(
        &mut self,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        self.call_within(self.deadline, message, call)
    }

    /// As [`Self::call`], with a deadline of the message's own.
    pub(super) fn call_within<T>(
        &mut self,
        deadline: Duration,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        costs::MESSAGES.add();
        let guard = self.watchdog.guard(&self.socket, deadline);
        let result = call(&mut self.frontend);
        let late = guard.has_fired();
        drop(guard);
        result.map_err(|error| self.explain(message, deadline, late, error))
    }

    /// As [`Self::call`], for a message that has an answer only on request. Without
    /// REPLY_ACK it is not waited for.
    pub(super) fn call_acked<T>(
        &mut self,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        if !self.reply_ack {
            return self.call(message, call);
        }
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let result = self.call(message, call);
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        result
    }

    /// SEND_RARP, which is not answered: the back-end tells its network where the guest is.
    pub(super) fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), VhostUserError> {
        let message = "SEND_RARP";
        let [a, b, c, d, e, f] = mac;
        let body = [a, b, c, d, e, f, 0, 0];
        self.within(message, self.deadline, |socket| {
            send(socket, FrontendReq::SEND_RARP as u32, &body, None)
        })
    }

    /// Waits until everything sent before was taken: messages are handled in order.
    pub(super) fn sync(&mut self, message: &'static str) -> Result<(), VhostUserError> {
        self.call(message, |f| f.get_features()).map(|_| ())
    }

    /// Sends several messages of one kind, then reads the answers, in order.
    pub(super) fn exchange(
        &mut self,
        request: u32,
        message: &'static str,
        bodies: &[Vec<u8>],
    ) -> Result<Vec<Vec<u8>>, VhostUserError> {
        self.within(message, self.deadline, |socket| {
            for body in bodies {
                costs::MESSAGES.add();
                send(socket, request, body, None)?;
            }
            bodies.iter().map(|_| receive(socket, request)).collect()
        })
    }

    /// Sends a message, perhaps with a descriptor. [`Self::answer`] must be asked before any other
    /// message is sent that has an answer.
    pub(super) fn order(
        &mut self,
        request: u32,
        message: &'static str,
        body: &[u8],
        fd: Option<RawFd>,
    ) -> Result<(), VhostUserError> {
        costs::MESSAGES.add();
        self.owed += 1;
        self.within(message, self.deadline, |socket| {
            send(socket, request, body, fd)
        })
    }

    /// The message that was sent last has one answer more.
    pub(super) fn expect_another(&mut self) {
        self.owed += 1;
    }

    /// Whether there are answers to come, so that no other message may be sent.
    pub(super) fn is_owed(&self) -> bool {
        self.owed > 0
    }

    /// Waits for an answer to what was sent by [`Self::order`]; a moment even if the time is over, as
    /// it may be there, and who is heard late must not be taken for gone.
    pub(super) fn answer(
        &mut self,
        request: u32,
        message: &'static str,
        deadline: Duration,
    ) -> Result<Vec<u8>, VhostUserError> {
        self.owed = self.owed.saturating_sub(1);
        self.within(message, deadline.max(MOMENT), |socket| {
            receive(socket, request)
        })
    }

    /// Does something with the socket that ends with it.
    fn within<T>(
        &self,
        message: &'static str,
        deadline: Duration,
        work: impl FnOnce(&UnixStream) -> Result<T, ProtocolError>,
    ) -> Result<T, VhostUserError> {
        let guard = self.watchdog.guard(&self.socket, deadline);
        let result = work(&self.socket);
        let late = guard.has_fired();
        drop(guard);
        result.map_err(|error| self.explain(message, deadline, late, error.into()))
    }

    /// Sends one of our own requests, whose answer is nothing, or why not.
    pub(super) fn ask(
        &mut self,
        request: u32,
        message: &'static str,
        body: &[u8],
        deadline: Duration,
    ) -> Result<(), VhostUserError> {
        self.order(request, message, body, None)?;
        self.hear(request, message, deadline)
    }

    /// Waits for an answer to one of our own requests that is nothing, or why not.
    pub(super) fn hear(
        &mut self,
        request: u32,
        message: &'static str,
        deadline: Duration,
    ) -> Result<(), VhostUserError> {
        let why = self.answer(request, message, deadline)?;
        if why.is_empty() {
            return Ok(());
        }
        let why = why.get(..MAX_REASON).unwrap_or(&why);
        // Somebody else's text, to be shown on one line.
        let why = String::from_utf8_lossy(why).replace(char::is_control, " ");
        Err(VhostUserError::Declined {
            device: self.device.to_string(),
            message,
            why,
        })
    }

    /// An answer that has the right form and says something impossible.
    pub(super) fn nonsense(
        &self,
        message: &'static str,
        what: impl Into<String>,
    ) -> VhostUserError {
        self.close();
        VhostUserError::Nonsense {
            device: self.device.to_string(),
            message,
            what: what.into(),
        }
    }

    pub(super) fn refused(&self, message: &'static str) -> VhostUserError {
        VhostUserError::Refused {
            device: self.device.to_string(),
            message,
        }
    }

    /// Gives the connection up.
    fn close(&self) {
        // It fails only when the peer is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn explain(
        &self,
        message: &'static str,
        deadline: Duration,
        late: bool,
        error: vhost::Error,
    ) -> VhostUserError {
        let device = self.device.to_string();
        let error = match error {
            _ if late => {
                return VhostUserError::Deadline {
                    device,
                    message,
                    deadline,
                };
            }
            vhost::Error::VhostUserProtocol(error) => error,
            other => return self.nonsense(message, other.to_string()),
        };
        match error {
            ProtocolError::BackendInternalError => self.refused(message),
            ProtocolError::Disconnected
            | ProtocolError::PartialMessage
            | ProtocolError::SocketBroken(_)
            | ProtocolError::SocketError(_) => {
                self.close();
                VhostUserError::HungUp { device, message }
            }
            other => self.nonsense(message, other.to_string()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

fn send(
    mut socket: &UnixStream,
    request: u32,
    body: &[u8],
    fd: Option<RawFd>,
) -> Result<(), ProtocolError> {
    let size = u32::try_from(body.len()).map_err(|_| ProtocolError::OversizedMsg)?;
    let mut message = Vec::with_capacity(HEADER + body.len());
    for word in [request, VERSION, size] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(body);
    // Descriptors travel with the first byte.
    let sent = match fd {
        Some(fd) => socket
            .send_with_fds(&[message.as_slice()], &[fd])
            .map_err(|error| ProtocolError::SocketError(error.into()))?,
        None => 0,
    };
    socket
        .write_all(&message[sent..])
        .map_err(ProtocolError::SocketError)
}

fn receive(mut socket: &UnixStream, request: u32) -> Result<Vec<u8>, ProtocolError> {
    let mut read = |buffer: &mut [u8]| {
        socket
            .read_exact(buffer)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => ProtocolError::Disconnected,
                _ => ProtocolError::SocketError(error),
            })
    };
    let mut header = [0; HEADER];
    read(&mut header)?;
    let word =
        |i: usize| u32::from_ne_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let (answered, flags, size) = (word(0), word(4), word(8) as usize);
    if answered != request || flags & 0xf != VERSION | REPLY || size > MAX_ANSWER {
        return Err(ProtocolError::InvalidMessage);
    }
    let mut body = vec![0; size];
    read(&mut body)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_there_is_heard_though_the_time_is_over() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let watchdog = Watchdog::start().unwrap();
        let minute = Duration::from_secs(60);
        let mut connection = Connection::new("disk0".into(), here, watchdog, minute).unwrap();
        // The watchdog's thread would be faster now and then.
        for _ in 0..1000 {
            for word in [7, VERSION | REPLY, 0] {
                there.write_all(&word.to_ne_bytes()).unwrap();
            }
            connection.order(7, "ASK", &[], None).unwrap();
            there.read_exact(&mut [0; 12]).unwrap();
            assert!(connection.is_owed());
            let answer = connection.answer(7, "ASK", Duration::ZERO).unwrap();
            assert!(answer.is_empty() && !connection.is_owed());
            assert!(!connection.has_hung_up(), "it was cut off");
        }
    }
}
