//! The link between two cores: messages in both directions of one socket.
//!
//! ```text
//! message   u32 magic "GWLK", u32 length, u32 CRC-32C of the payload,
//!           u32 CRC-32C of the twelve bytes before it, payload (MessagePack)
//! ```
//! Numbers are little-endian. A header is checked before its length is believed, and the length
//! before anything is allocated for it. Every send and receive has a deadline. After an error the
//! link is of no more use.

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::channel::{Cancel, StateChannel};

/// Longest payload, in bytes.
pub const MAX_MESSAGE: usize = 32 << 20;

const MAGIC: [u8; 4] = *b"GWLK";
const HEADER: usize = 16;
/// Where the header's own checksum is.
const CHECKED: usize = 12;

/// Why the link is of no more use.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The other side closed it, or the connection broke.
    #[error("the link to the other core is lost")]
    Lost(#[source] io::Error),
    /// Nothing came, or went, in time.
    #[error("the other core said nothing for {} ms", within.as_millis())]
    Deadline {
        /// How long it had.
        within: Duration,
    },
    /// Somebody on this side cancelled.
    #[error("cancelled")]
    Cancelled,
    /// What came is no message.
    #[error("the other core sent no message: {why}")]
    Nonsense {
        /// What is wrong with it.
        why: String,
    },
    /// A message of this side cannot be sent.
    #[error("a message cannot be sent: {why}")]
    Unsendable {
        /// Why.
        why: String,
    },
}

impl LinkError {
    fn new(error: io::Error, within: Duration) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Deadline { within },
            io::ErrorKind::ConnectionAborted => Self::Cancelled,
            _ => Self::Lost(error),
        }
    }
}

/// One end of the link.
#[derive(Debug)]
pub struct Link {
    channel: StateChannel,
}

impl Link {
    /// On a connected stream socket. `cancel` ends every wait.
    pub fn new(socket: OwnedFd, cancel: Cancel) -> Self {
        Self {
            channel: StateChannel::new(socket, Duration::ZERO, cancel),
        }
    }

    /// From now on waits end by another cancel.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.channel.set_cancel(cancel);
    }

    /// How long a message takes there and back, as far as the kernel knows; nothing on one host.
    pub fn round_trip(&self) -> Duration {
        self.channel.round_trip()
    }

    /// Whether something has come, or the other side has closed.
    pub fn has_message(&self) -> bool {
        self.channel.is_readable()
    }

    /// Waits until something has come, but no longer than this. Whether it has.
    pub fn await_message(&mut self, within: Duration) -> Result<bool, LinkError> {
        self.channel.set_deadline(within);
        match self.channel.await_readable() {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
            Err(error) => Err(LinkError::new(error, within)),
        }
    }

    /// Sends one message.
    pub fn send<T: Serialize>(&mut self, message: &T, within: Duration) -> Result<(), LinkError> {
        let unsendable = |why: String| LinkError::Unsendable { why };
        let mut bytes = vec![0; HEADER];
        rmp_serde::encode::write_named(&mut bytes, message)
            .map_err(|error| unsendable(error.to_string()))?;
        let length = bytes.len() - HEADER;
        if length > MAX_MESSAGE {
            return Err(unsendable(format!("{length} bytes are too many")));
        }
        let crc = crc32c::crc32c(&bytes[HEADER..]);
        bytes[..4].copy_from_slice(&MAGIC);
        // Bounded above.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..CHECKED].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..CHECKED]);
        bytes[CHECKED..HEADER].copy_from_slice(&crc.to_le_bytes());
        self.channel.set_deadline(within);
        self.channel
            .write_all(&bytes)
            .map_err(|error| LinkError::new(error, within))
    }

    /// Receives one message.
    pub fn receive<T: DeserializeOwned>(&mut self, within: Duration) -> Result<T, LinkError> {
        let nonsense = |why: String| LinkError::Nonsense { why };
        self.channel.set_deadline(within);
        let mut header = [0; HEADER];
        self.fill(&mut header, within)?;
        if !header.starts_with(&MAGIC) {
            return Err(nonsense(format!("it begins with {header:02x?}")));
        }
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let (said, is) = (word(CHECKED), crc32c::crc32c(&header[..CHECKED]));
        if said != is {
            return Err(nonsense(format!(
                "checksum {is:08x} of its header instead of {said:08x}"
            )));
        }
        let length = word(4) as usize;
        if length > MAX_MESSAGE {
            return Err(nonsense(format!("{length} bytes are too many")));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload, within)?;
        let (said, is) = (word(8), crc32c::crc32c(&payload));
        if said != is {
            return Err(nonsense(format!("checksum {is:08x} instead of {said:08x}")));
        }
        rmp_serde::from_slice(&payload).map_err(|error| nonsense(error.to_string()))
    }

    fn fill(&mut self, bytes: &mut [u8], within: Duration) -> Result<(), LinkError> {
        self.channel
            .read_exact(bytes)
            .map_err(|error| LinkError::new(error, within))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    fn link(socket: UnixStream) -> Link {
        Link::new(socket.into(), Cancel::new().unwrap())
    }

    fn sent(text: &str) -> Vec<u8> {
        let (a, mut b) = UnixStream::pair().unwrap();
        link(a).send(&text, LONG).unwrap();
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut b, &mut bytes).unwrap();
        bytes
    }

    fn received(bytes: &[u8]) -> Result<String, LinkError> {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(bytes).unwrap();
        drop(b);
        link(a).receive(LONG)
    }

    #[test]
    fn a_message_arrives() {
        assert_eq!(received(&sent("hello")).unwrap(), "hello");
    }

    #[test]
    fn a_flipped_bit_of_a_header_is_noticed_without_waiting_for_more() {
        let bytes = sent("hello");
        for bit in 0..HEADER * 8 {
            let mut wrong = bytes.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            let (a, mut b) = UnixStream::pair().unwrap();
            b.write_all(&wrong).unwrap();
            let error = link(a).receive::<String>(LONG).unwrap_err();
            assert!(matches!(error, LinkError::Nonsense { .. }), "bit {bit}");
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = sent("hello");
        for bit in 0..bytes.len() * 8 {
            let mut wrong = bytes.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(received(&wrong).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(matches!(
                received(&bytes[..length]),
                Err(LinkError::Lost(_))
            ));
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_it_is_believed() {
        let mut bytes = sent("hello");
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..CHECKED]);
        bytes[CHECKED..HEADER].copy_from_slice(&crc.to_le_bytes());
        let error = received(&bytes).unwrap_err().to_string();
        assert!(error.contains("4294967295 bytes are too many"), "{error}");
    }

    #[test]
    fn silence_and_cancel_end_a_wait() {
        let (a, _b) = UnixStream::pair().unwrap();
        let cancel = Cancel::new().unwrap();
        let mut link = Link::new(a.into(), cancel.clone());
        assert!(!link.has_message());
        assert!(!link.await_message(SHORT).unwrap());
        let error = link.receive::<String>(SHORT).unwrap_err();
        assert!(matches!(error, LinkError::Deadline { .. }));
        cancel.cancel();
        let error = link.receive::<String>(LONG).unwrap_err();
        assert!(matches!(error, LinkError::Cancelled));
        link.set_cancel(Cancel::new().unwrap());
        let error = link.receive::<String>(SHORT).unwrap_err();
        assert!(matches!(error, LinkError::Deadline { .. }));
    }
}
