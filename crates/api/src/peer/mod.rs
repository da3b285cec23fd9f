//! A D-Bus connection between two processes of a machine, without a bus.
//!
//! Each was given one end of a socket pair by who started both; that is all the authentication
//! there is (ANONYMOUS). The one that is called takes descriptors, one with a message; the one that
//! calls takes none. Either side may have been taken over, so neither trusts the other:
//!
//! | what a peer may do | what follows |
//! |---|---|
//! | say nothing, for as long as it likes | nothing: calls have deadlines of their own |
//! | send a message of more than 64 KiB | the connection ends before memory is taken for it |
//! | send more than 2000 messages in a second | the connection ends |
//! | not read what it is sent for 5 s | the connection ends |
//! | send what is no D-Bus | the connection ends |

mod descriptors;

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};
use zbus::connection::{AuthMechanism, Builder};
use zbus::export::async_trait::async_trait;
use zbus::{Guid, Message};

/// Longest message, header and body.
const MAX_MESSAGE: u64 = 64 << 10;
/// Longest exchange of words before the first message.
const MAX_HANDSHAKE: usize = 4096;
/// Most messages in a second.
const MAX_RATE: u32 = 2000;
/// A peer that takes nothing for this long is given up.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// Length of the part of a message that says how long the message is (D-Bus specification,
/// «Message Format»).
const HEAD: usize = 16;

/// A connection to the peer that calls. To be built in the Tokio runtime that is current now.
///
/// # Errors
/// The socket cannot be watched.
pub fn server(socket: StdUnixStream) -> io::Result<Builder<'static>> {
    Ok(builder(socket, true)?.server(Guid::generate()))
}

/// A connection to the peer that is called. To be built in the Tokio runtime that is current now.
///
/// # Errors
/// The socket cannot be watched.
pub fn client(socket: StdUnixStream) -> io::Result<Builder<'static>> {
    builder(socket, false)
}

fn builder(socket: StdUnixStream, takes_descriptors: bool) -> io::Result<Builder<'static>> {
    socket.set_nonblocking(true)?;
    let link = Link {
        socket: Arc::new(UnixStream::from_std(socket)?),
        takes_descriptors,
    };
    Ok(Builder::socket(link)
        .p2p()
        .validate_bodies()
        .auth_mechanism(AuthMechanism::Anonymous))
}

/// The socket.
#[derive(Clone, Debug)]
struct Link {
    socket: Arc<UnixStream>,
    takes_descriptors: bool,
}

impl Link {
    /// Descriptors that came with bytes read here are closed.
    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let socket = &self.socket;
        socket
            .async_io(Interest::READABLE, || socket.try_read(buffer))
            .await
    }

    async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        if !self.takes_descriptors {
            return Ok((self.read(buffer).await?, Vec::new()));
        }
        let socket = &self.socket;
        let receive = || descriptors::receive(socket.as_fd(), buffer);
        socket.async_io(Interest::READABLE, receive).await
    }

    async fn write(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let socket = &self.socket;
        let send = || descriptors::send(socket.as_fd(), bytes, fds);
        socket.async_io(Interest::WRITABLE, send).await
    }

    /// Ends both directions: the reader wakes too.
    fn hang_up(&self) -> io::Result<()> {
        let same = StdUnixStream::from(self.socket.as_fd().try_clone_to_owned()?);
        same.shutdown(Shutdown::Both)
    }
}

impl Socket for Link {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let reader = Reader {
            words: Words::default(),
            messages: Messages::new(self.clone()),
        };
        Split::new(reader, Writer(self))
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
        let len = self.messages.link.read(byte).await?;
        for byte in byte.iter().take(len) {
            self.words.take(*byte)?;
        }
        Ok((len, Vec::new()))
    }

    /// Without this nothing could be sent with a descriptor either.
    fn can_pass_unix_fd(&self) -> bool {
        true
    }

    fn auth_mechanism(&self) -> AuthMechanism {
        AuthMechanism::Anonymous
    }
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
    head: [u8; HEAD],
    /// Bytes of `head` that are there.
    have: usize,
    /// Bytes of the message that are still to come.
    left: u64,
    /// Messages in the second that began then.
    rate: (Instant, u32),
}

impl Messages {
    fn new(link: Link) -> Self {
        Self {
            link,
            head: [0; HEAD],
            have: 0,
            left: 0,
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
                continue;
            }
            let len = bytes.len().min(HEAD - self.have);
            self.head[self.have..self.have + len].copy_from_slice(&bytes[..len]);
            self.have += len;
            bytes = &bytes[len..];
            if self.have == HEAD {
                self.have = 0;
                self.left = rest(&self.head)?;
                self.count()?;
            }
        }
        Ok(())
    }

    fn count(&mut self) -> io::Result<()> {
        let (since, count) = &mut self.rate;
        if since.elapsed() >= Duration::from_secs(1) {
            (*since, *count) = (Instant::now(), 0);
        }
        *count += 1;
        if *count > MAX_RATE {
            return Err(refuse("it sends too many messages"));
        }
        Ok(())
    }
}

#[async_trait]
impl ReadHalf for Messages {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let (len, descriptors) = self.link.receive(buffer).await?;
        self.pass(&buffer[..len])?;
        Ok((len, descriptors))
    }
}

/// Bytes of a message that follow its head.
fn rest(head: &[u8; HEAD]) -> io::Result<u64> {
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
    if rest + HEAD as u64 > MAX_MESSAGE {
        return Err(refuse(format_args!(
            "its message has {} bytes, at most {MAX_MESSAGE} are read",
            rest + HEAD as u64
        )));
    }
    Ok(rest)
}

fn refuse(what: impl fmt::Display) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the peer misbehaves: {what}"),
    )
}

#[derive(Debug)]
struct Writer(Link);

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        match timeout(WRITE_DEADLINE, self.0.write(bytes, fds)).await {
            Ok(result) => result,
            Err(_) => {
                self.0.hang_up()?;
                Err(io::Error::from(io::ErrorKind::TimedOut))
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.hang_up()
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
