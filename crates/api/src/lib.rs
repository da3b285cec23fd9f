//! D-Bus interfaces of Godwit: what each side of a connection may call, from one
//! definition for server and client.
//!
//! | module | interface | between |
//! |---|---|---|
//! | [`core`] | `org.godwit.Core1` | a machine's core and who started it, peer to peer |
//! | [`migration`] | `org.godwit.Core1.Migration` | the same two, moving the machine |
//!
//! Rules: only methods, properties, signals and dictionary keys are ever added; bulk
//! never travels in messages, only descriptors do; every failure has a name of [`Error`].

pub mod core;
mod error;
pub mod migration;

pub use error::Error;
