//! Messages between brokers: length, JSON, and a code that only who has the key can make.
//!
//! ```text
//! u32 length (little-endian) │ JSON │ HMAC-SHA-256 over direction, number, JSON
//! ```
//! Numbers count the messages of one direction from 0, so that none can be repeated, left out or
//! sent back. The code finds errors of transmission too.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

/// Longest message, in bytes.
const MAX_MESSAGE: usize = 1 << 20;
/// Longest message of somebody who is not known yet.
pub(super) const MAX_GREETING: usize = 512;
/// Bytes of a code.
const MAC: usize = 32;

/// Why a message did not pass.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The connection.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Nothing came.
    #[error("the other broker said nothing within {} s", .0.as_secs())]
    Late(Duration),
    /// Too much.
    #[error("a message of {0} bytes is too long")]
    Long(usize),
    /// The code is wrong.
    #[error("the other broker has another key, or the message was changed on its way")]
    Forged,
    /// It is no message.
    #[error("a message cannot be read: {0}")]
    Form(#[from] serde_json::Error),
}

/// A key.
#[derive(Clone)]
pub struct Key(Hmac<Sha256>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// Of a secret.
    ///
    /// # Errors
    /// Never, for any length.
    pub fn new(secret: &[u8]) -> Result<Self, FrameError> {
        Hmac::new_from_slice(secret)
            .map(Self)
            .map_err(|error| io::Error::other(error).into())
    }

    /// The key of one connection, to which both sides have added something new.
    pub(super) fn session(&self, nonces: [&str; 2]) -> Result<Self, FrameError> {
        let mut mac = self.0.clone();
        for nonce in nonces {
            mac.update(&(nonce.len() as u64).to_le_bytes());
            mac.update(nonce.as_bytes());
        }
        Self::new(&mac.finalize().into_bytes())
    }

    fn mac(&self, direction: Direction, number: u64, text: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(&[direction as u8]);
        mac.update(&number.to_le_bytes());
        mac.update(text);
        mac
    }
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From who has connected.
    Ask = 1,
    /// To who has connected.
    Answer = 2,
}

/// A connected socket.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    async fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.read_exact(bytes).await.map(drop),
            Self::Unix(stream) => stream.read_exact(bytes).await.map(drop),
        }
    }

    /// Reads what is there now, once something may be.
    async fn try_read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => {
                stream.readable().await?;
                stream.try_read(bytes)
            }
            Self::Unix(stream) => {
                stream.readable().await?;
                stream.try_read(bytes)
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Unix(stream) => stream.write_all(bytes).await,
        }
    }

    /// The socket, as a core or a device takes it.
    pub(super) fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                stream.into()
            }
            Self::Unix(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                stream.into()
            }
        })
    }
}

/// A message whose code was not looked at yet.
pub(super) struct Sealed {
    text: Vec<u8>,
    code: [u8; MAC],
}

impl Sealed {
    /// Reads one, of `most` bytes.
    pub(super) async fn read(
        stream: &mut Stream,
        most: usize,
        deadline: Duration,
    ) -> Result<Self, FrameError> {
        let read = async {
            let mut length = [0; 4];
            stream.read(&mut length).await?;
            let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
            if length > most {
                return Err(FrameError::Long(length));
            }
            let mut text = vec![0; length];
            stream.read(&mut text).await?;
            let mut code = [0; MAC];
            stream.read(&mut code).await?;
            Ok(Self { text, code })
        };
        tokio::time::timeout(deadline, read)
            .await
            .map_err(|_| FrameError::Late(deadline))?
    }

    /// What it says, which nobody has vouched for.
    pub(super) fn claim<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        Ok(serde_json::from_slice(&self.text)?)
    }

    /// What it says, if it is by who has the key.
    pub(super) fn open<T: DeserializeOwned>(
        &self,
        key: &Key,
        direction: Direction,
        number: u64,
    ) -> Result<T, FrameError> {
        let mac = key.mac(direction, number, &self.text);
        mac.verify_slice(&self.code)
            .map_err(|_| FrameError::Forged)?;
        self.claim()
    }
}

/// Sends one message.
pub(super) async fn write(
    stream: &mut Stream,
    key: &Key,
    (direction, number): (Direction, u64),
    message: &impl Serialize,
    deadline: Duration,
) -> Result<(), FrameError> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_MESSAGE {
        return Err(FrameError::Long(text.len()));
    }
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_le_bytes().to_vec();
    let code = key.mac(direction, number, &text).finalize().into_bytes();
    bytes.extend(text);
    bytes.extend(code);
    tokio::time::timeout(deadline, stream.write(&bytes))
        .await
        .map_err(|_| FrameError::Late(deadline))?
        .map_err(FrameError::from)
}

/// A connection on which both sides have shown that they have the key.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) stream: Stream,
    pub(super) key: Key,
    /// What this side sends.
    pub(super) own: Direction,
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Link {
    /// Sends a message.
    pub(super) async fn send(
        &mut self,
        message: &impl Serialize,
        deadline: Duration,
    ) -> Result<(), FrameError> {
        let at = (self.own, self.sent);
        self.sent += 1;
        write(&mut self.stream, &self.key, at, message, deadline).await
    }

    /// Receives a message.
    pub(super) async fn receive<T: DeserializeOwned>(
        &mut self,
        deadline: Duration,
    ) -> Result<T, FrameError> {
        let sealed = Sealed::read(&mut self.stream, MAX_MESSAGE, deadline).await?;
        let theirs = match self.own {
            Direction::Ask => Direction::Answer,
            Direction::Answer => Direction::Ask,
        };
        let number = self.received;
        self.received += 1;
        sealed.open(&self.key, theirs, number)
    }

    /// Waits until the other side is gone, which is not to say anything now.
    pub(super) async fn is_left(&self) {
        // Whatever else can be read, or not, is of no use either.
        while let Err(error) = self.stream.try_read(&mut [0]).await
            && error.kind() == io::ErrorKind::WouldBlock
        {}
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    pub(in crate::migration::peer) fn key(secret: &str) -> Key {
        Key::new(secret.as_bytes()).unwrap()
    }

    pub(in crate::migration::peer) fn links(ours: Key, theirs: Key) -> (Link, Link) {
        let (a, b) = UnixStream::pair().unwrap();
        let link = |stream, key, own| Link {
            stream: Stream::Unix(stream),
            key,
            own,
            sent: 0,
            received: 0,
        };
        (
            link(a, ours, Direction::Ask),
            link(b, theirs, Direction::Answer),
        )
    }

    #[tokio::test]
    async fn messages_pass_in_order() {
        let (mut a, mut b) = links(key("k"), key("k"));
        for number in 0..3u32 {
            a.send(&number, SOON).await.unwrap();
            assert_eq!(b.receive::<u32>(SOON).await.unwrap(), number);
            b.send(&"yes", SOON).await.unwrap();
            assert_eq!(a.receive::<String>(SOON).await.unwrap(), "yes");
        }
    }

    #[tokio::test]
    async fn another_key_is_found_out() {
        let (mut a, mut b) = links(key("k"), key("other"));
        a.send(&1, SOON).await.unwrap();
        let error = b.receive::<u32>(SOON).await.unwrap_err();
        assert!(matches!(error, FrameError::Forged), "{error}");
    }

    #[tokio::test]
    async fn a_message_cannot_be_repeated_or_sent_back() {
        let (mut a, mut b) = links(key("k"), key("k"));
        a.send(&1, SOON).await.unwrap();
        b.receive::<u32>(SOON).await.unwrap();
        a.sent = 0;
        a.send(&1, SOON).await.unwrap();
        let error = b.receive::<u32>(SOON).await.unwrap_err();
        assert!(matches!(error, FrameError::Forged), "{error}");
        let (mut a, mut b) = links(key("k"), key("k"));
        b.own = Direction::Ask;
        b.send(&1, SOON).await.unwrap();
        let error = a.receive::<u32>(SOON).await.unwrap_err();
        assert!(matches!(error, FrameError::Forged), "{error}");
    }

    #[tokio::test]
    async fn lengths_are_bounded_before_anything_is_allocated() {
        let (a, mut b) = links(key("k"), key("k"));
        let Stream::Unix(mut raw) = a.stream else {
            panic!("a Unix socket")
        };
        raw.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        let error = b.receive::<u32>(SOON).await.unwrap_err();
        assert!(matches!(error, FrameError::Long(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_an_end() {
        let (_a, mut b) = links(key("k"), key("k"));
        let error = b.receive::<u32>(SOON).await.unwrap_err();
        assert!(matches!(error, FrameError::Late(_)), "{error}");
    }

    #[test]
    fn sessions_differ_by_what_either_side_adds() {
        let code = |key: &Key| key.mac(Direction::Ask, 0, b"x").finalize().into_bytes();
        let base = key("k");
        let session = base.session(["a", "b"]).unwrap();
        assert_ne!(code(&session), code(&base));
        for other in [["a", "c"], ["c", "b"], ["ab", ""], ["", "ab"]] {
            assert_ne!(code(&session), code(&base.session(other).unwrap()));
        }
    }
}
