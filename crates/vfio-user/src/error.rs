//! What can go wrong between a client and a server.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;

use crate::wire::Command;

/// Why a request has failed, or a server has ended.
#[derive(Debug, Error)]
pub enum Error {
    /// The server has answered that it will not. The connection goes on.
    #[error("the device's process refused {command}: {}", errno.desc())]
    Remote {
        /// What.
        command: Command,
        /// Why.
        errno: Errno,
    },
    /// It cannot be sent. The connection goes on.
    #[error("{command} does not fit into a message")]
    TooLong {
        /// What.
        command: Command,
    },
    /// The connection is at its end.
    #[error("the other side of the device's socket has hung up")]
    Closed,
    /// Nothing came, or went, in time. The connection is given up.
    #[error("waited {} ms for {what}", within.as_millis())]
    Timeout {
        /// What was waited for, in words.
        what: String,
        /// How long it had.
        within: Duration,
    },
    /// What came is not of the protocol. The connection is given up.
    #[error("the other side of the device's socket does not keep to vfio-user")]
    Protocol(#[from] ProtocolError),
    /// The kernel refused something. The connection is given up.
    #[error("the device's socket failed")]
    Io(#[source] io::Error),
}

/// What is wrong with what came.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// A length that no message has.
    #[error("a message of {size} bytes; it may have {least} to {most}")]
    Length {
        /// Bytes, as its header says.
        size: u32,
        /// At least.
        least: u32,
        /// At most.
        most: u32,
    },
    /// A header that is not of the kind that is due.
    #[error("{what} in place of {due}")]
    Unexpected {
        /// What came.
        what: String,
        /// What should have.
        due: String,
    },
    /// What follows the header is not what belongs there.
    #[error("{command} with {what}")]
    Payload {
        /// The message.
        command: Command,
        /// What is wrong with it.
        what: String,
    },
    /// Descriptors that cannot be received.
    #[error("a message with more than {most} descriptors, or than this process can hold")]
    Descriptors {
        /// At most.
        most: usize,
    },
}

impl Error {
    /// Whether the connection cannot be used any more.
    pub(crate) fn ends_connection(&self) -> bool {
        !matches!(self, Self::Remote { .. } | Self::TooLong { .. })
    }
}
