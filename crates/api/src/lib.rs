//! D-Bus interfaces of Godwit: what each side of a connection may call, from one
//! definition for server and client.
//!
//! | module | interface | between |
//! |---|---|---|
//! | [`manager`] | `org.godwit.Vmm1.Manager` | the broker and its clients |
//! | [`machine`] | `org.godwit.Vmm1.Machine` | the broker and its clients |
//! | [`device`] | `org.godwit.Vmm1.Device` | the broker and its clients |
//! | [`balloon`] | `org.godwit.Vmm1.Balloon` | the broker and its clients |
//! | [`job`] | `org.godwit.Vmm1.Job` | the broker and its clients |
//! | [`job_migration`] | `org.godwit.Vmm1.Job.Migration` | the broker and its clients |
//! | [`core`] | `org.godwit.Core1` | a machine's core and who started it |
//! | [`migration`] | `org.godwit.Core1.Migration` | the same two, moving the machine |
//! | [`device1`] | `org.godwit.Device1` | a device process and its machine's core |
//! | [`balloon1`] | `org.godwit.Balloon1` | a balloon process and its machine's core |
//!
//! An interface is a generic struct, [`manager::Manager`] for one, on a trait that a
//! server implements; the proxy, [`manager::ManagerProxy`] for one, comes from the same
//! definition. [`private_bus`] makes a bus of a Unix socket, on which every D-Bus client
//! finds the one service that is there; [`peer`] is a connection between two processes alone.
//!
//! Rules: only methods, properties, signals and dictionary keys are ever added; bulk
//! never travels in messages, only descriptors do; every failure has a name of [`Error`].
//! Flags that a server does not know are refused.

pub mod balloon;
pub mod balloon1;
pub mod core;
pub mod definition;
pub mod device;
pub mod device1;
mod error;
mod guarded;
pub mod job;
pub mod job_migration;
pub mod machine;
pub mod manager;
pub mod migration;
pub mod path;
pub mod peer;
pub mod private_bus;

use std::collections::HashMap;

use zbus::OwnedVariant;
use zbus::message::{Flags, Header};

pub use error::Error;

/// Well-known name of the broker.
pub const SERVICE: &str = "org.godwit.Vmm1";

/// A dictionary of named values, `a{sv}`.
pub type Dictionary = HashMap<String, OwnedVariant>;

/// Who called, as far as the message tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Unique name of its connection to the bus; none between two peers without a bus.
    pub sender: Option<String>,
    /// It allows that a person is asked before it is answered.
    pub interactive: bool,
}

impl Caller {
    /// Who sets a property.
    ///
    /// # Errors
    /// Nobody is known to.
    pub(crate) fn of_property(header: Option<&Header<'_>>) -> Result<Self, Error> {
        let nobody = || Error::Internal("nobody is known to have asked for it".into());
        header.map(Self::from).ok_or_else(nobody)
    }
}

impl From<&Header<'_>> for Caller {
    fn from(header: &Header<'_>) -> Self {
        Self {
            sender: header.sender().map(ToString::to_string),
            interactive: header
                .primary()
                .flags()
                .contains(Flags::ALLOW_INTERACTIVE_AUTH),
        }
    }
}

/// The next element of a stream, as of signals or of changes of a property.
pub async fn next<S: futures_core::Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| std::pin::Pin::new(&mut *stream).poll_next(context)).await
}

/// Refuses flags other than those in `known`.
///
/// # Errors
/// [`Error::InvalidArgs`] with the bits that are unknown.
pub fn only_flags(flags: u64, known: u64) -> Result<(), Error> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::InvalidArgs(format!(
            "flags {unknown:#x} are unknown: possible are the bits of {known:#x}"
        ))),
    }
}
