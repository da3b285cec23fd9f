//! Readiness and watchdog, told to the service manager (sd_notify).
//!
//! The messages are made by `sd-notify`; they are sent on a socket that is connected before the
//! sandbox, since afterwards no socket can be made.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

/// The connection to the service manager, if there is one.
#[derive(Debug)]
pub(crate) struct Readiness {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Readiness {
    /// Connects to the socket that NOTIFY_SOCKET names.
    pub(crate) fn connect() -> io::Result<Self> {
        let socket = match env::var_os("NOTIFY_SOCKET") {
            None => None,
            Some(path) => {
                let socket = UnixDatagram::unbound()?;
                match path.as_bytes().strip_prefix(b"@") {
                    Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
                    None => socket.connect(&path)?,
                }
                socket.set_nonblocking(true)?;
                Some(socket)
            }
        };
        let watchdog = sd_notify::watchdog_enabled().filter(|_| socket.is_some());
        Ok(Readiness { socket, watchdog })
    }

    /// How often [`Readiness::alive`] is to be called.
    pub(crate) fn interval(&self) -> Option<Duration> {
        self.watchdog.map(|timeout| timeout / 2)
    }

    /// Front-ends can connect.
    pub(crate) fn ready(&self) {
        self.send(&NotifyState::Ready);
    }

    /// The process is not stuck.
    pub(crate) fn alive(&self) {
        self.send(&NotifyState::Watchdog);
    }

    /// The process is ending.
    pub(crate) fn stopping(&self) {
        self.send(&NotifyState::Stopping);
    }

    fn send(&self, state: &NotifyState<'_>) {
        if let Some(Err(error)) = self
            .socket
            .as_ref()
            .map(|socket| socket.send(state.to_string().as_bytes()))
        {
            tracing::warn!(%error, "the service manager was not told: {state}");
        }
    }
}
