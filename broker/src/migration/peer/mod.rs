//! Two brokers: one that has a machine, and one that is to have it.
//!
//! ```text
//! source                                                destination
//!   Hello (version, nonce) ──────────────────────────────►      by the key of both
//!   ◄────────────────────────────────────── Hello (nonce)
//!   Offer (name, definition, channels) ──────────────────►      by the key of this connection
//!   ◄───────────────── Refused (reasons) | Accepted (token)
//!   a connection for the cores, each memory channel and each device:
//!   Channel (token, name) ═══════════════════════════════►      by the same key, then raw
//!                                                     starts processes
//!   ◄────────────────────────── Refused (reasons) | Ready
//!   the cores talk
//! ```
//! In the place of an offer it may be asked what became of a machine that was offered before:
//! *Ask* (its id) is answered by its *Fate*.
//!
//! Whoever has the key may send machines here, and who has not learns nothing. What is sent on
//! the raw connections is neither hidden nor protected by it: the network must be trusted. On a
//! Unix socket the kernel says who the other is, and the key is empty.

pub(crate) mod frame;
mod listen;

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use api::Error;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UnixStream};

use self::frame::{Direction, Link, MAX_GREETING, Sealed, Stream};
pub use self::frame::{FrameError, Key};
pub use self::listen::{Listener, serve};
use super::Uri;
use super::arrivals::Fate;
use super::ends::Ends;

/// Version of what two brokers say to each other.
const VERSION: u32 = 1;
/// How long the other side may take to connect, and to say something that needs no work.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// How long all connections of a machine may take to come.
const CHANNELS_DEADLINE: Duration = Duration::from_secs(30);
/// How long the destination's processes may take to start.
const READY_DEADLINE: Duration = Duration::from_secs(180);
/// Least and most bytes of a secret.
const SECRET: std::ops::RangeInclusive<usize> = 16..=4096;
/// Most channels for memory.
const MAX_CHANNELS: usize = migration::ram::MAX_CHANNELS;

/// The first message of a connection.
#[derive(Debug, Serialize, Deserialize)]
enum First {
    /// A broker.
    Hello(Hello),
    /// A connection for a machine that was accepted.
    Channel {
        /// What it was accepted as.
        token: String,
        /// What the connection is for.
        name: String,
    },
}

/// How a broker greets.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
    nonce: String,
}

/// What a broker wants.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// To send a machine.
    Offer(Offer),
    /// To know what became of one.
    Ask(String),
}

/// A machine that is offered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// What it can be asked for by later.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// What it is, in TOML.
    pub(crate) definition: String,
    /// It is forgotten when it has ended.
    pub(crate) transient: bool,
    /// Connections for memory.
    pub(crate) channels: usize,
}

/// What the destination says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The machine may come; its connections are to have this token.
    Accepted(String),
    /// Its processes are there.
    Ready,
    /// It may not, and nothing of it is left.
    Refused(Vec<String>),
    /// What became of the machine that was asked for, if that is known.
    Fate(Option<Fate>),
}

/// A number that nobody has used or can guess, in hexadecimal digits.
pub(super) fn nonce() -> Result<String, FrameError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Reads the secret that both brokers have.
///
/// # Errors
/// It cannot be read, others may read it too, or it is too short or too long.
pub fn read_key(path: &Path) -> io::Result<Key> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(invalid(format!(
            "others may read or write it (mode {:o}): chmod 600 it",
            mode & 0o777
        )));
    }
    let mut secret = Vec::new();
    file.take(*SECRET.end() as u64 + 1)
        .read_to_end(&mut secret)?;
    let secret = secret.trim_ascii();
    if !SECRET.contains(&secret.len()) {
        return Err(invalid(format!(
            "a secret of {} bytes: put {} to {} there, as of openssl rand -hex 32",
            secret.len(),
            SECRET.start(),
            SECRET.end()
        )));
    }
    Key::new(secret).map_err(io::Error::other)
}

/// The key for connections of this kind.
fn key_for(uri: &Uri, key: Option<&Key>) -> Result<Key, FrameError> {
    match (uri, key) {
        (Uri::Tcp(_), Some(key)) => Ok(key.clone()),
        (Uri::Tcp(_), None) => Err(FrameError::Io(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "start both brokers with --migration-key FILE for tcp",
        ))),
        (Uri::Unix(_) | Uri::Local, _) => Key::new(&[]),
    }
}

/// A way to another broker.
pub(crate) struct Dial<'a> {
    /// Where it is.
    pub(crate) uri: &'a Uri,
    /// What both know.
    pub(crate) key: Option<&'a Key>,
}

impl Dial<'_> {
    /// Offers a machine, and connects to the processes that wait for it there.
    ///
    /// # Errors
    /// Nobody answers who has the key, or the machine may not come.
    pub(crate) async fn offer<'a>(
        &self,
        offer: Offer,
        devices: impl Iterator<Item = &'a str>,
    ) -> Result<Ends, Error> {
        let unreachable = |error: FrameError| {
            Error::DestinationUnreachable(format!("{} does not take it: {error}", self.uri))
        };
        let mut link = self.link().await.map_err(unreachable)?;
        let (name, channels) = (offer.name.clone(), offer.channels);
        link.send(&Request::Offer(offer), ANSWER_DEADLINE)
            .await
            .map_err(unreachable)?;
        let token = match link.receive(ANSWER_DEADLINE).await.map_err(unreachable)? {
            Answer::Accepted(token) => token,
            other => return Err(self.refused(&name, other)),
        };
        let mut ends = Vec::new();
        for channel in Ends::names(channels, devices) {
            let fd = self.channel(&link, &token, &channel).await;
            ends.push((channel, fd.map_err(unreachable)?));
        }
        match link.receive(READY_DEADLINE).await.map_err(unreachable)? {
            Answer::Ready => {}
            other => return Err(self.refused(&name, other)),
        }
        Ends::of(ends)
            .ok_or_else(|| Error::Internal("a connection has another name than it should".into()))
    }

    /// Asks what became of a machine that was offered; `None` if that is not known there.
    ///
    /// # Errors
    /// Nobody answers who has the key.
    pub(crate) async fn ask(&self, id: &str) -> Result<Option<Fate>, FrameError> {
        let mut link = self.link().await?;
        link.send(&Request::Ask(id.to_owned()), ANSWER_DEADLINE)
            .await?;
        match link.receive(ANSWER_DEADLINE).await? {
            Answer::Fate(fate) => Ok(fate),
            other => Err(FrameError::Io(io::Error::other(format!(
                "it said {other:?} out of turn"
            )))),
        }
    }

    fn refused(&self, name: &str, answer: Answer) -> Error {
        let reasons = match answer {
            Answer::Refused(reasons) => reasons.join("; "),
            other => format!("it said {other:?} out of turn"),
        };
        let short: String = reasons.chars().take(4000).collect();
        Error::NotMigratable(format!(
            "{name} stays where it was, {} does not take it: {short}",
            self.uri
        ))
    }

    async fn connect(&self) -> Result<Stream, FrameError> {
        let connect = async {
            Ok(match self.uri {
                Uri::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Stream::Tcp(stream)
                }
                Uri::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
                Uri::Local => return Err(io::Error::from(io::ErrorKind::Unsupported)),
            })
        };
        let connected = tokio::time::timeout(ANSWER_DEADLINE, connect).await;
        connected
            .map_err(|_| FrameError::Late(ANSWER_DEADLINE))?
            .map_err(FrameError::from)
    }

    async fn link(&self) -> Result<Link, FrameError> {
        let key = key_for(self.uri, self.key)?;
        let mut stream = self.connect().await?;
        let ours = Hello {
            version: VERSION,
            nonce: nonce()?,
        };
        let first = First::Hello(ours);
        let at = (Direction::Ask, 0);
        frame::write(&mut stream, &key, at, &first, ANSWER_DEADLINE).await?;
        let First::Hello(ours) = first else {
            return Err(FrameError::Forged);
        };
        let sealed = Sealed::read(&mut stream, MAX_GREETING, ANSWER_DEADLINE).await?;
        let theirs: Hello = sealed.open(&key, Direction::Answer, 0)?;
        if theirs.version != VERSION {
            return Err(FrameError::Io(io::Error::other(format!(
                "that broker speaks version {} of the protocol, this one {VERSION}",
                theirs.version
            ))));
        }
        Ok(Link {
            stream,
            key: key.session([&ours.nonce, &theirs.nonce])?,
            own: Direction::Ask,
            sent: 0,
            received: 0,
        })
    }

    async fn channel(
        &self,
        link: &Link,
        token: &str,
        name: &str,
    ) -> Result<std::os::fd::OwnedFd, FrameError> {
        let mut stream = self.connect().await?;
        let first = First::Channel {
            token: token.into(),
            name: name.into(),
        };
        let at = (Direction::Ask, 0);
        frame::write(&mut stream, &link.key, at, &first, ANSWER_DEADLINE).await?;
        Ok(stream.into_fd()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_secret_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let put = |text: &[u8], mode: u32| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            read_key(&path)
        };
        put(b"0123456789abcdef\n", 0o600).unwrap();
        let error = put(b"0123456789abcdef\n", 0o640).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        let error = put(b"short\n", 0o600).unwrap_err().to_string();
        assert!(error.contains("a secret of 5 bytes"), "{error}");
        assert!(put(&[b'x'; 5000], 0o600).is_err());
    }
}
