//! A D-Bus connection between two processes of a machine, without a bus.
//!
//! Each was given one end of a socket pair by who started both; that is all the authentication
//! there is (ANONYMOUS). Either side may have been taken over, so neither trusts the other:
//!
//! | what a peer may do | what follows |
//! |---|---|
//! | say nothing, for as long as it likes | nothing: calls have deadlines of their own |
//! | send a message of more than 64 KiB | the connection ends before memory is taken for it |
//! | send more than 2000 messages in a second | the connection ends |
//! | send more than one descriptor with a message | the connection ends |
//! | not read what it is sent for 5 s | the connection ends |
//! | send what is no D-Bus | the connection ends |

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zbus::Guid;
use zbus::connection::{AuthMechanism, Builder};

use crate::guarded::{self, Limits};

const LIMITS: Limits = Limits {
    mechanism: AuthMechanism::Anonymous,
    message: 64 << 10,
    skipped: 0,
    rate: 2000,
    descriptors: 1,
    patience: Duration::from_secs(5),
};

/// A connection to the peer that calls. To be built in the Tokio runtime that is current now.
///
/// # Errors
/// The socket cannot be watched.
pub fn server(socket: UnixStream) -> io::Result<Builder<'static>> {
    Ok(guarded::builder(socket, LIMITS)?.server(Guid::generate()))
}

/// A connection to the peer that is called. To be built in the Tokio runtime that is current now.
///
/// # Errors
/// The socket cannot be watched.
pub fn client(socket: UnixStream) -> io::Result<Builder<'static>> {
    guarded::builder(socket, LIMITS)
}

#[cfg(test)]
mod tests;
