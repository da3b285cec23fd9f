//! Two hosts on one wire.

use tempfile::TempDir;

use crate::host::{Host, HostOptions};
use crate::machine::Wire;
use crate::{Error, Result};

/// Hosts `a` (10.8.0.1) and `b` (10.8.0.2), joined by their interfaces `lan0`.
#[derive(Debug)]
pub struct Pair {
    /// 10.8.0.1
    pub a: Host,
    /// 10.8.0.2
    pub b: Host,
    _wire: TempDir,
}

impl Pair {
    /// Starts both.
    ///
    /// # Errors
    ///
    /// When either does not start.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("godwit-wire-")
            .tempdir()
            .map_err(Error::io("creating a folder in", &std::env::temp_dir()))?;
        let socket = folder.path().join("wire");
        // QEMU listens before it answers, so the second finds the socket.
        let a = Host::start(&HostOptions {
            wire: Wire::Listen(socket.clone()),
            number: 1,
            ..HostOptions::named("a")
        })?;
        let b = Host::start(&HostOptions {
            wire: Wire::Connect(socket),
            number: 2,
            ..HostOptions::named("b")
        })?;
        Ok(Self {
            a,
            b,
            _wire: folder,
        })
    }
}
