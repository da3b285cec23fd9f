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

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use api::balloon1::{self, Balloon1, BalloonProcess};
use api::device1::{self, Device1, DeviceProcess, Identity, PATH, Status};
use migration::schema::Schema;
use tokio::runtime::Runtime;
use zbus::connection::Builder;

use crate::device::{Device, HostError, OptionError};
use crate::listen::{self, Front};
use crate::memory::PrefaultMode;
use crate::program::spawn;
use crate::session::Services;

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
    pub(crate) fn start<D: Device>(self, services: Arc<Services<D>>) -> Result<(), HostError> {
        let Link {
            runtime,
            connection,
        } = self;
        spawn("link".to_owned(), STACK, move || {
            match runtime.block_on(serve(connection, View(services))) {
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

async fn serve<D: Device>(connection: Builder<'static>, view: View<D>) -> zbus::Result<()> {
    let balloon = view.0.device.balloon();
    let served = tell(connection, &view, balloon.as_ref()).await;
    if let Some(balloon) = balloon {
        // Nobody is left who wants them.
        balloon.end_hints();
    }
    served
}

/// Serves, and tells what changes, until the link is over.
async fn tell<D: Device>(
    mut connection: Builder<'static>,
    view: &View<D>,
    balloon: Option<&Arc<dyn BalloonProcess>>,
) -> zbus::Result<()> {
    let size = || balloon.map(|balloon| balloon.status()).unwrap_or_default();
    let mut told = (view.status(), size());
    connection = connection.serve_at(PATH, Device1(view.clone()));
    if let Some(balloon) = balloon {
        connection = connection.serve_at(PATH, Balloon1(Arc::clone(balloon)));
    }
    let connection = connection.build().await?;
    let interface = connection
        .object_server()
        .interface::<_, Device1<View<D>>>(PATH)
        .await?;
    loop {
        tokio::select! {
            () = connection.closed() => return Ok(()),
            () = view.0.health.changed() => {}
        }
        let now = (view.status(), size());
        device1::tell_changes(interface.signal_emitter(), &told.0, &now.0).await?;
        balloon1::tell_changes(interface.signal_emitter(), told.1, now.1).await?;
        told = now;
        tokio::time::sleep(SIGNAL_INTERVAL).await;
    }
}

/// The process as the link's peer sees it.
#[derive(Debug)]
struct View<D>(Arc<Services<D>>);

impl<D> Clone for View<D> {
    fn clone(&self) -> Self {
        View(Arc::clone(&self.0))
    }
}

impl<D: Device> DeviceProcess for View<D> {
    fn identity(&self) -> Identity {
        Identity {
            kind: <D::SavedState as Schema>::KIND.to_owned(),
            unit: self.0.unit.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn status(&self) -> Status {
        let standing = self.0.health.standing();
        let prefault = self.0.prefault.progress();
        Status {
            state: standing.state.to_string(),
            connected: standing.connected,
            last_error: standing.last_error,
            mapped: prefault.mapped,
            prefaulted: prefault.done,
            prefaulting: prefault.running,
        }
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let own = self.0.metrics.totals(self.0.device.queue_count());
        let errors = ("errors", self.0.health.standing().errors);
        let device = self.0.device.statistics();
        own.into_iter()
            .chain([errors])
            .chain(device)
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    }

    fn prefault(&self, mode: device1::Prefault) -> Result<(), api::Error> {
        self.0.prefault.set_mode(match mode {
            device1::Prefault::Off => PrefaultMode::Off,
            device1::Prefault::Data => PrefaultMode::Data,
            device1::Prefault::All => PrefaultMode::All,
        });
        Ok(())
    }

    fn cancel_prefault(&self) {
        self.0.prefault.cancel();
    }
}
