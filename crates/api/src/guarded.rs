//! A Unix socket under a D-Bus connection to somebody who may send anything.
//!
//! `zbus` takes memory for a message as soon as its head says how long it is, up to 128 MiB, and
//! panics on a handshake that is just a newline. Here everything is looked at before `zbus` sees
//! it; what is beyond the [`Limits`] ends the connection.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use zbus::Message;
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};
use zbus::connection::{AuthMechanism, Builder};
use zbus::export::async_trait::async_trait;
use zbus::fdo::ConnectionCredentials;

/// Longest exchange of words before the first message.
const MAX_HANDSHAKE: usize = 4096;
/// Length of the part of a message that says how long the message is (D-Bus specification,
/// «Message Format»).
const HEAD: usize = 16;
/// Most descriptors of one `sendmsg` (SCM_MAX_FD).
const MOST_DESCRIPTORS: usize = 253;

/// What a peer may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How it says who it is.
    pub(crate) mechanism: AuthMechanism,
    /// Longest message, header and body.
    pub(crate) message: u64,
    /// Most messages in a second.
    pub(crate) rate: u32,
    /// Most descriptors with a message; with 0, none are passed to it either.
    pub(crate) descriptors: usize,
    /// A peer that takes nothing for this long is given up.
    pub(crate) patience: Duration,
}

/// A connection on `socket`, to be built in the Tokio runtime that is current now.
pub(crate) fn builder(socket: StdUnixStream, limits: Limits) -> io::Result<Builder<'static>> {
    socket.set_nonblocking(true)?;
    let link = Link(Arc::new(UnixStream::from_std(socket)?));
    Ok(Builder::socket(Guarded { link, limits })
        .p2p()
        .validate_bodies()
        .auth_mechanism(limits.mechanism))
}

/// The socket.
#[derive(Clone, Debug)]
struct Link(Arc<UnixStream>);

impl Link {
    async fn read(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        loop {
            self.0.readable().await?;
            match self
                .0
                .try_io(Interest::READABLE, || receive(&self.0, buffer))
            {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    async fn write(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        loop {
            self.0.writable().await?;
            match self
                .0
                .try_io(Interest::WRITABLE, || send(&self.0, bytes, descriptors))
            {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    /// Ends both directions: the reader wakes too.
    fn hang_up(&self) -> io::Result<()> {
        let same = StdUnixStream::from(self.0.as_fd().try_clone_to_owned()?);
        same.shutdown(Shutdown::Both)
    }
}

fn receive(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let count = recvmsg(socket, &mut parts, &mut control, flags)?.bytes;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((count, descriptors))
}

fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let parts = [IoSlice::new(bytes)];
    Ok(sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)?)
}

#[derive(Debug)]
struct Guarded {
    link: Link,
    limits: Limits,
}

impl Socket for Guarded {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let reader = Reader {
            words: Words::default(),
            messages: Messages::new(self.link.clone(), self.limits),
        };
        let writer = Writer {
            link: self.link,
            limits: self.limits,
        };
        Split::new(reader, writer)
    }
}

/// Before the first message `zbus` calls `recvmsg`, and from then on `receive_message`.
#[derive(Debug)]
struct Reader {
    words: Words,
    messages: Messages,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn receive_message(
        &mut self,
        seq: u64,
        bytes: &mut Vec<u8>,
        fds: &mut Vec<OwnedFd>,
    ) -> zbus::Result<Message> {
        self.messages.receive_message(seq, bytes, fds).await
    }

    /// One byte at a time, so that no part of a message is taken for a part of the words.
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let byte = buffer.get_mut(..1).unwrap_or_default();
        let (len, descriptors) = self.messages.link.read(byte).await?;
        if !descriptors.is_empty() {
            return Err(refuse("descriptors come with its handshake"));
        }
        for byte in byte.iter().take(len) {
            self.words.take(*byte)?;
        }
        Ok((len, Vec::new()))
    }

    fn can_pass_unix_fd(&self) -> bool {
        self.messages.limits.descriptors > 0
    }

    async fn peer_credentials(&mut self) -> io::Result<ConnectionCredentials> {
        credentials(&self.messages.link)
    }
}

fn credentials(link: &Link) -> io::Result<ConnectionCredentials> {
    let peer = link.0.peer_cred()?;
    let known = ConnectionCredentials::default().set_unix_user_id(peer.uid());
    Ok(match peer.pid().and_then(|pid| u32::try_from(pid).ok()) {
        Some(process) => known.set_process_id(process),
        None => known,
    })
}

/// What was said before the first message.
#[derive(Debug, Default)]
struct Words {
    count: usize,
    last: u8,
}

impl Words {
    /// Lets a byte pass, or not: `zbus` panics on an empty line that has no carriage return.
    fn take(&mut self, byte: u8) -> io::Result<()> {
        self.count += 1;
        if self.count > MAX_HANDSHAKE {
            return Err(refuse("it does not come to its first message"));
        }
        if byte == b'\n' && self.last != b'\r' {
            return Err(refuse("a line of its handshake does not end as lines do"));
        }
        self.last = byte;
        Ok(())
    }
}

/// Messages, whose sizes and number are looked at as they pass.
#[derive(Debug)]
struct Messages {
    link: Link,
    limits: Limits,
    head: [u8; HEAD],
    /// Bytes of `head` that are there.
    have: usize,
    /// Bytes of the message that are still to come.
    left: u64,
    /// Descriptors that came with the message.
    descriptors: usize,
    /// Messages in the second that began then.
    rate: (Instant, u32),
}

impl Messages {
    fn new(link: Link, limits: Limits) -> Self {
        Self {
            link,
            limits,
            head: [0; HEAD],
            have: 0,
            left: 0,
            descriptors: 0,
            rate: (Instant::now(), 0),
        }
    }

    /// Takes note of bytes that were read.
    fn pass(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let len = usize::try_from(self.left).map_or(bytes.len(), |l| l.min(bytes.len()));
                self.left -= len as u64;
                bytes = &bytes[len..];
            } else {
                let len = bytes.len().min(HEAD - self.have);
                self.head[self.have..self.have + len].copy_from_slice(&bytes[..len]);
                self.have += len;
                bytes = &bytes[len..];
                if self.have < HEAD {
                    continue;
                }
                self.have = 0;
                self.left = self.rest()?;
                self.count()?;
            }
            if self.left == 0 {
                self.descriptors = 0;
            }
        }
        Ok(())
    }

    /// Bytes of the message that follow its head.
    fn rest(&self) -> io::Result<u64> {
        let head = &self.head;
        let word = |at: usize| -> u64 {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            let word = match head[0] {
                b'B' => u32::from_be_bytes(bytes),
                _ => u32::from_le_bytes(bytes),
            };
            word.into()
        };
        let (body, fields) = (word(4), word(12));
        let rest = fields.next_multiple_of(8) + body;
        let (size, most) = (rest + HEAD as u64, self.limits.message);
        if size > most {
            return Err(refuse(format_args!(
                "its message has {size} bytes, at most {most} are read"
            )));
        }
        Ok(rest)
    }

    fn count(&mut self) -> io::Result<()> {
        let (since, count) = &mut self.rate;
        if since.elapsed() >= Duration::from_secs(1) {
            (*since, *count) = (Instant::now(), 0);
        }
        *count += 1;
        if *count > self.limits.rate {
            return Err(refuse("it sends too many messages"));
        }
        Ok(())
    }
}

#[async_trait]
impl ReadHalf for Messages {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let (len, descriptors) = self.link.read(buffer).await?;
        self.descriptors += descriptors.len();
        let most = self.limits.descriptors;
        if self.descriptors > most {
            return Err(refuse(format_args!(
                "more than {most} descriptors come with its message"
            )));
        }
        self.pass(&buffer[..len])?;
        Ok((len, descriptors))
    }
}

fn refuse(what: impl fmt::Display) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the peer misbehaves: {what}"),
    )
}

#[derive(Debug)]
struct Writer {
    link: Link,
    limits: Limits,
}

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        if !fds.is_empty() && !self.can_pass_unix_fd() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        match timeout(self.limits.patience, self.link.write(bytes, fds)).await {
            Ok(result) => result,
            Err(_) => {
                self.link.hang_up()?;
                Err(io::Error::from(io::ErrorKind::TimedOut))
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.link.hang_up()
    }

    fn can_pass_unix_fd(&self) -> bool {
        self.limits.descriptors > 0
    }

    async fn peer_credentials(&mut self) -> io::Result<ConnectionCredentials> {
        credentials(&self.link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    }

    fn messages(descriptors: usize) -> (Messages, StdUnixStream) {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let link = Link(Arc::new(UnixStream::from_std(ours).unwrap()));
        let limits = Limits {
            mechanism: AuthMechanism::External,
            message: 64 << 10,
            rate: 100,
            descriptors,
            patience: Duration::from_secs(5),
        };
        (Messages::new(link, limits), theirs)
    }

    /// A call without a body, but for what its head says of it.
    fn call(fields: u32, body: u32) -> Vec<u8> {
        let mut head = vec![b'l', 1, 0, 1];
        for word in [body, 1, fields] {
            head.extend(word.to_le_bytes());
        }
        head
    }

    #[test]
    fn sizes_are_known_however_the_bytes_come() {
        let runtime = runtime();
        let _context = runtime.enter();
        // A message of 16 + 8 + 3 bytes, twice, then one that is too long.
        let mut bytes = call(5, 3);
        bytes.extend([0; 11]);
        bytes = bytes.repeat(2);
        bytes.extend(call(0, 64 << 10));
        for step in 1..bytes.len() {
            let (mut messages, _peer) = messages(0);
            let parts: Vec<_> = bytes.chunks(step).collect();
            let last = parts.len() - 1;
            for (at, part) in parts.into_iter().enumerate() {
                assert_eq!(
                    messages.pass(part).is_err(),
                    at == last,
                    "in steps of {step}"
                );
            }
        }
    }

    #[test]
    fn descriptors_are_counted_for_each_message() {
        let runtime = runtime();
        let (mut messages, peer) = {
            let _context = runtime.enter();
            messages(2)
        };
        peer.set_nonblocking(true).unwrap();
        let peer = {
            let _context = runtime.enter();
            UnixStream::from_std(peer).unwrap()
        };
        let mut bytes = call(0, 0);
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut read = || {
            let mut buffer = [0; HEAD];
            runtime.block_on(messages.recvmsg(&mut buffer))
        };
        // One message after the other with as many as there may be.
        for _ in 0..3 {
            send(&peer, &bytes, &[null.as_fd(), null.as_fd()]).unwrap();
            assert_eq!(read().unwrap().1.len(), 2);
        }
        // One message with a descriptor for each of its bytes.
        bytes.truncate(3);
        for (at, byte) in bytes.iter().enumerate() {
            send(&peer, &[*byte], &[null.as_fd()]).unwrap();
            assert_eq!(read().is_err(), at == 2);
        }
    }
}
