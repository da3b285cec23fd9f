//! The control link: `org.godwit.Device1`, and a balloon's `org.godwit.Balloon1`, peer to peer on
//! the socket of `--control-fd`.
//!
//! ```text
//! Link::new ── sandbox ──► Link::start ─► waiting for the peer ─► served ─► over
//! ```
//! It has a thread with a Tokio runtime of its own, both made only when the option is given. The
//! thread takes no lock that is held while somebody waits, so a peer that asks too much, or
//! nonsense, costs nobody but itself; when the link is over, for whatever reason, the device
//! serves on. What a peer can do at most is bounded by [`api::peer`].

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use api::balloon1::{self, Balloon1, BalloonProcess};
use api::device1::{self, Device1, DeviceProcess as _, PATH};
use tokio::runtime::Runtime;
use zbus::connection::Builder;

use crate::device::{HostError, OptionError};
use crate::health::Health;
use crate::listen::{self, Front};
use crate::program::spawn;
use crate::server::Server;

/// Shortest time between two signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(250);
/// Address space of the thread's stack.
const STACK: usize = 1 << 20;
const OPTION: &str = "--control-fd";

/// A link that is not yet served.
#[derive(Debug)]
pub(crate) struct Link {
    runtime: Runtime,
    connection: Builder<'static>,
}

impl Link {
    /// Takes over the socket, and makes what cannot be made inside the sandbox.
    pub(crate) fn new(fd: RawFd) -> Result<Self, OptionError> {
        let refuse = |problem: String| OptionError {
            option: OPTION,
            value: fd.to_string(),
            problem,
        };
        let Front::Connected(socket) = listen::inherit(OPTION, fd)? else {
            return Err(refuse(
                "listens; hand over one end of a connection".to_owned(),
            ));
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| refuse(format!("cannot be watched: {error}")))?;
        let connection = {
            let _context = runtime.enter();
            api::peer::server(socket)
                .map_err(|error| refuse(format!("cannot be watched: {error}")))?
        };
        Ok(Link {
            runtime,
            connection,
        })
    }

    /// Serves it on a thread of its own until it is over.
    pub(crate) fn start<S: Server>(self, server: Arc<S>, health: Health) -> Result<(), HostError> {
        let Link {
            runtime,
            connection,
        } = self;
        spawn("link".to_owned(), STACK, move || {
            match runtime.block_on(serve(connection, server, health)) {
                Ok(()) => tracing::info!("the control link is over"),
                Err(error) if is_hang_up(&error) => tracing::info!("the control link is over"),
                Err(error) => tracing::warn!(%error, "the control link has failed"),
            }
        })
    }
}

/// Whether the peer has just gone, while something was told to it.
fn is_hang_up(error: &zbus::Error) -> bool {
    let gone = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
    matches!(error, zbus::Error::InputOutput(error) if gone.contains(&error.kind()))
}

async fn serve<S: Server>(
    connection: Builder<'static>,
    server: Arc<S>,
    health: Health,
) -> zbus::Result<()> {
    let balloon = server.balloon();
    let served = tell(connection, &server, &health, balloon.as_ref()).await;
    if let Some(balloon) = balloon {
        // Nobody is left who wants them.
        balloon.end_hints();
    }
    served
}

/// Serves, and tells what changes, until the link is over.
async fn tell<S: Server>(
    mut connection: Builder<'static>,
    server: &Arc<S>,
    health: &Health,
    balloon: Option<&Arc<dyn BalloonProcess>>,
) -> zbus::Result<()> {
    let size = || balloon.map(|balloon| balloon.status()).unwrap_or_default();
    let mut told = (server.status(), size());
    connection = connection.serve_at(PATH, Device1(Arc::clone(server)));
    if let Some(balloon) = balloon {
        connection = connection.serve_at(PATH, Balloon1(Arc::clone(balloon)));
    }
    let connection = connection.build().await?;
    let interface = connection
        .object_server()
        .interface::<_, Device1<Arc<S>>>(PATH)
        .await?;
    loop {
        tokio::select! {
            () = connection.closed() => return Ok(()),
            () = health.changed() => {}
        }
        let now = (server.status(), size());
        device1::tell_changes(interface.signal_emitter(), &told.0, &now.0).await?;
        balloon1::tell_changes(interface.signal_emitter(), told.1, now.1).await?;
        told = now;
        tokio::time::sleep(SIGNAL_INTERVAL).await;
    }
}
