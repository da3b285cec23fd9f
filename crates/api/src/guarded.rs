//! A Unix socket under a D-Bus connection to somebody who may send anything.
//!
//! `zbus` takes memory for a message as soon as its head says how long it is, up to 128 MiB, and
//! panics on a handshake that is just a newline. Here everything is looked at before `zbus` sees
//! it; what is beyond the [`Limits`] ends the connection, or is answered with an error.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::mem::{self, MaybeUninit};
use std::net::Shutdown;
use std::num::NonZeroU32;
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
use zbus::message::{Flags, Type};

/// Longest exchange of words before the first message.
const MAX_HANDSHAKE: usize = 4096;
/// Length of the part of a message that says how long the message is (D-Bus specification,
/// «Message Format»).
const HEAD: usize = 16;
/// Name of the bus itself.
pub(crate) const DRIVER: &str = "org.freedesktop.DBus";
/// What a client is taken to have called that sent too long a message, with its size and the most
/// that is read. It is no secret: who calls it by itself is told the same.
pub(crate) const TOO_LONG: &str = "MessageTooLong";
/// Most descriptors of one `sendmsg` (SCM_MAX_FD).
const MOST_DESCRIPTORS: usize = 253;

/// What a peer may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How it says who it is.
    pub(crate) mechanism: AuthMechanism,
    /// Longest message, header and body.
    pub(crate) message: u64,
    /// Longest message in whose place a call of [`TOO_LONG`] is handed on, which is for the bus to
    /// answer. One that is longer ends the connection.
    pub(crate) skipped: u64,
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

/// Messages, whose sizes and number are looked at before they are handed on.
#[derive(Debug)]
struct Messages {
    link: Link,
    limits: Limits,
    /// What is handed on before more is read: as much as is there of the next message's head, or
    /// what stands for a message that is too long.
    ready: VecDeque<u8>,
    /// Bytes of the message that are still to come.
    left: u64,
    /// Descriptors that came with the message, and those that are still to be handed on.
    descriptors: usize,
    passed: Vec<OwnedFd>,
    /// Messages in the second that began then.
    rate: (Instant, u32),
}

impl Messages {
    fn new(link: Link, limits: Limits) -> Self {
        Self {
            link,
            limits,
            ready: VecDeque::new(),
            left: 0,
            descriptors: 0,
            passed: Vec::new(),
            rate: (Instant::now(), 0),
        }
    }

    /// Reads bytes of the message; none when the peer has gone.
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (len, descriptors) = self.link.read(buffer).await?;
        self.descriptors += descriptors.len();
        let most = self.limits.descriptors;
        if self.descriptors > most {
            return Err(refuse(format_args!(
                "more than {most} descriptors come with its message"
            )));
        }
        self.passed.extend(descriptors);
        Ok(len)
    }

    /// Reads the head of the next message that may be handed on; whether there is one.
    async fn begin(&mut self) -> io::Result<bool> {
        while self.ready.is_empty() {
            self.descriptors = 0;
            let mut head = [0; HEAD];
            let mut have = 0;
            while have < HEAD {
                match self.read(&mut head[have..]).await? {
                    0 => return Ok(false),
                    len => have += len,
                }
            }
            self.count()?;
            let head = Head(head);
            self.left = head.rest();
            let size = self.left + HEAD as u64;
            if size <= self.limits.message {
                self.ready.extend(head.0);
            } else if size <= self.limits.skipped {
                if !self.skip().await? {
                    return Ok(false);
                }
                self.ready.extend(head.too_long(size, self.limits.message)?);
            } else {
                let most = self.limits.message;
                return Err(refuse(format_args!(
                    "its message has {size} bytes, at most {most} are read"
                )));
            }
        }
        Ok(true)
    }

    /// Forgets the rest of the message; whether all of it came.
    async fn skip(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        while self.left > 0 {
            let len = bounded(buffer.len(), self.left);
            match self.read(&mut buffer[..len]).await? {
                0 => return Ok(false),
                len => self.left -= len as u64,
            }
        }
        self.passed.clear();
        Ok(true)
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
        if self.left == 0 && self.ready.is_empty() && !self.begin().await? {
            return Ok((0, Vec::new()));
        }
        let len = if self.ready.is_empty() {
            let len = bounded(buffer.len(), self.left);
            let len = self.read(&mut buffer[..len]).await?;
            self.left -= len as u64;
            len
        } else {
            self.ready.read(buffer)?
        };
        Ok((len, mem::take(&mut self.passed)))
    }
}

/// At most `left`.
fn bounded(len: usize, left: u64) -> usize {
    usize::try_from(left).map_or(len, |left| left.min(len))
}

/// The first bytes of a message.
#[derive(Debug)]
struct Head([u8; HEAD]);

impl Head {
    fn word(&self, at: usize) -> u32 {
        let bytes = [self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]];
        match self.0[0] {
            b'B' => u32::from_be_bytes(bytes),
            _ => u32::from_le_bytes(bytes),
        }
    }

    /// Bytes of the message that follow.
    fn rest(&self) -> u64 {
        let (body, fields) = (u64::from(self.word(4)), u64::from(self.word(12)));
        fields.next_multiple_of(8) + body
    }

    /// What stands for this message of `size` bytes, of which `most` are read: a call with the
    /// same number, which the bus answers with an error. Nothing where nobody waits for an answer.
    fn too_long(&self, size: u64, most: u64) -> io::Result<Vec<u8>> {
        let (kind, flags) = (self.0[1], self.0[2]);
        if kind != Type::MethodCall as u8 || flags & Flags::NO_REPLY_EXPECTED.bits() != 0 {
            return Ok(Vec::new());
        }
        let wrong = |_| refuse("its message has no number");
        let serial = NonZeroU32::try_from(self.word(8)).map_err(wrong)?;
        let call = Message::method_call("/", TOO_LONG)
            .destination(DRIVER)
            .interface(DRIVER)
            .serial(serial)
            .build(&(size, most));
        Ok(call.map_err(io::Error::other)?.data().to_vec())
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
    use std::io::Write as _;

    use super::*;

    /// Longest message that is read, and that is skipped.
    const MOST: u32 = 64 << 10;
    const SKIPPED: u32 = 256 << 10;

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
            message: MOST.into(),
            skipped: SKIPPED.into(),
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

    /// Everything that is handed on of what a peer sends.
    fn handed_on(
        runtime: &tokio::runtime::Runtime,
        messages: &mut Messages,
    ) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let mut buffer = [0; 100];
            match runtime.block_on(messages.recvmsg(&mut buffer))?.0 {
                0 => return Ok(all),
                len => all.extend_from_slice(&buffer[..len]),
            }
        }
    }

    #[test]
    fn sizes_are_known_however_the_bytes_come() {
        let runtime = runtime();
        let _context = runtime.enter();
        // A message of 16 + 8 + 3 bytes, twice, then one that is too long.
        let mut good = call(5, 3);
        good.extend([0; 11]);
        let good = good.repeat(2);
        let bytes = [good.clone(), call(0, SKIPPED)].concat();
        for step in 1..bytes.len() {
            let (mut messages, mut peer) = messages(0);
            for part in bytes[..good.len()].chunks(step) {
                peer.write_all(part).unwrap();
            }
            let mut read = vec![0; good.len()];
            let mut have = 0;
            while have < read.len() {
                let got = runtime.block_on(messages.recvmsg(&mut read[have..]));
                have += got.unwrap().0;
            }
            assert_eq!(read, good, "in steps of {step}");
            for part in bytes[good.len()..].chunks(step) {
                peer.write_all(part).unwrap();
            }
            let last = handed_on(&runtime, &mut messages);
            assert!(last.is_err(), "in steps of {step}: {last:?}");
        }
    }

    #[test]
    fn in_the_place_of_a_long_message_stands_a_short_one() {
        let runtime = runtime();
        let _context = runtime.enter();
        let (mut messages, mut peer) = messages(0);
        let long = |kind: u8, flags: u8| {
            let mut long = call(0, MOST);
            (long[1], long[2]) = (kind, flags);
            long.resize(HEAD + MOST as usize, 7);
            long
        };
        let mut last = call(1, 0);
        last.resize(HEAD + 8, 0);
        let sent = [long(1, 0), long(4, 0), long(1, 1), last.clone()].concat();
        let sender = std::thread::spawn(move || peer.write_all(&sent).unwrap());
        let read = handed_on(&runtime, &mut messages).unwrap();
        sender.join().unwrap();
        // One has an answer to wait for.
        let short = Head(call(0, MOST).try_into().unwrap());
        let short = short
            .too_long(u64::from(MOST) + 16, u64::from(MOST))
            .unwrap();
        assert_eq!(read, [short, last].concat());
    }

    #[test]
    fn descriptors_are_counted_for_each_message() {
        let runtime = runtime();
        let _context = runtime.enter();
        let (mut messages, peer) = messages(2);
        peer.set_nonblocking(true).unwrap();
        let peer = UnixStream::from_std(peer).unwrap();
        let bytes = call(0, 0);
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
        for byte in &bytes[..3] {
            send(&peer, &[*byte], &[null.as_fd()]).unwrap();
        }
        assert!(read().is_err());
    }
}
