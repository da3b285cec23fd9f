//! A bus with one service on a Unix socket, for where no bus daemon is.
//!
//! ```text
//!  client ─┐ Unix socket                       socket pair
//!  client ─┼──────────────► bus (this module) ◄───────────► the service's connection
//!  client ─┘
//! ```
//! The service has one connection and one object server, as on a real bus, however many
//! clients there are. Clients find what they find on a bus: a unique name, the driver
//! `org.freedesktop.DBus`, match rules, a service with a well-known name. Clients that
//! speak peer to peer, without Hello, are served as well and get every signal once they have spoken.
//!
//! Clients call the service and nobody else; what they send otherwise is refused. Only the
//! user that the bus belongs to, and root, may call; others are told so. None of them is trusted
//! with the bus itself:
//!
//! | what a client may do | what follows |
//! |---|---|
//! | take more than 10 s for its handshake | it is disconnected |
//! | send a message of more than 256 KiB | it is told an error; no memory is taken for it |
//! | send one of more than 16 MiB, or with more than 64 descriptors | it is disconnected |
//! | send what is no D-Bus | it is disconnected |
//! | call again while 64 of its calls have no reply | no more is read of it until they have |
//! | call more than 1000 times in a minute without wanting a reply | it is disconnected |
//! | not read what it is sent: 1024 messages, 16 MiB, or for 30 s | it is disconnected |
//! | add more than 512 match rules, or one of more than 1024 bytes | it is told an error |
//! | connect when there are 256 clients | it is disconnected |

mod client;
mod driver;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use zbus::connection::{AuthMechanism, Builder};
use zbus::message::Type;
use zbus::names::{BusName, OwnedUniqueName, UniqueName};
use zbus::{Guid, Message, OwnedGuid};

use self::client::{Client, Credentials};
use crate::guarded::{self, DRIVER, Limits};

/// Unique name of the service.
const SERVICE_UNIQUE_NAME: &str = ":1.0";
/// How long a client may take to authenticate itself.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Most clients at a time.
const MAX_CLIENTS: usize = 256;
/// Calls of all clients that wait for the service to read them.
const MAX_CALLS: usize = 64;
/// How long to wait before looking again whether a reply is out.
const DRAIN_PAUSE: Duration = Duration::from_millis(1);
/// How long to wait before the next client when one could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Of a client of the bus. How fast it may call is bounded by its replies.
const CLIENT_LIMITS: Limits = Limits {
    mechanism: AuthMechanism::External,
    message: 256 << 10,
    skipped: 16 << 20,
    rate: u32::MAX,
    // A migration takes one for the cores, 16 for memory and one a device.
    descriptors: 64,
    patience: Duration::from_secs(30),
};
/// Of a service that is called from another process.
const SERVICE_LIMITS: Limits = Limits {
    message: 1 << 20,
    skipped: 0,
    rate: 10_000,
    ..CLIENT_LIMITS
};

/// A connection to the service of such a bus, without Hello: it hears every signal from its first
/// call on. The service is not trusted more than its clients are. To be built in the Tokio runtime
/// that is current now.
///
/// # Errors
/// The socket cannot be watched.
pub fn dial(socket: StdUnixStream) -> std::io::Result<Builder<'static>> {
    guarded::builder(socket, SERVICE_LIMITS)
}

/// A bus with one service. Clones are the same bus; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct PrivateBus(Arc<Shared>);

/// What clients and service share.
#[derive(Debug)]
struct Shared {
    /// Well-known name of the service.
    service: &'static str,
    /// Who may call, beside root.
    owner: u32,
    guid: OwnedGuid,
    /// To the service.
    calls: mpsc::Sender<Message>,
    clients: Mutex<HashMap<OwnedUniqueName, Arc<Client>>>,
    /// For one client each, also for one that has not said who it is.
    seats: Semaphore,
    next: AtomicU64,
}

impl PrivateBus {
    /// Makes a bus for the service of this name, which belongs to the user `owner`. The
    /// builder is of the service's connection; the bus serves nobody before it is built.
    ///
    /// # Errors
    /// There is no socket to be had.
    pub fn new(service: &'static str, owner: u32) -> zbus::Result<(Self, Builder<'static>)> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        let (calls, queue) = mpsc::channel(MAX_CALLS);
        let shared = Arc::new(Shared {
            service,
            owner,
            guid: Guid::generate().into(),
            calls,
            clients: Mutex::default(),
            seats: Semaphore::new(MAX_CLIENTS),
            next: AtomicU64::new(1),
        });
        let bus = Arc::downgrade(&shared);
        tokio::spawn(async move {
            if let Err(error) = serve_service(ours, queue, bus).await {
                tracing::error!(%error, "the bus has lost its service");
            }
        });
        let service = Builder::unix_stream(theirs).p2p();
        Ok((Self(shared), service))
    }

    /// Takes clients from `listener` for ever.
    pub async fn listen(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let bus = self.clone();
                    tokio::spawn(async move { bus.serve(stream).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "a client could not connect");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Waits until every call has its reply, as long as `deadline` at most: a service that
    /// ends with its process does not leave a caller without an answer.
    pub async fn drain(&self, deadline: Duration) {
        let drained = async {
            while self.0.clients().values().any(|client| client.is_owed()) {
                tokio::time::sleep(DRAIN_PAUSE).await;
            }
        };
        let _ = tokio::time::timeout(deadline, drained).await;
    }

    /// Serves one client until it leaves.
    pub async fn serve(&self, stream: UnixStream) {
        if let Err(error) = self.0.serve(stream).await {
            tracing::debug!(%error, "a client was disconnected");
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, HashMap<OwnedUniqueName, Arc<Client>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self: &Arc<Self>, stream: UnixStream) -> zbus::Result<()> {
        let peer = stream.peer_cred()?;
        let credentials = Credentials {
            user: peer.uid(),
            process: peer.pid().and_then(|pid| u32::try_from(pid).ok()),
        };
        let Ok(_seat) = self.seats.try_acquire() else {
            tracing::debug!(MAX_CLIENTS, "a client was refused: there are too many");
            return Ok(());
        };
        let messages = guarded::builder(stream.into_std()?, CLIENT_LIMITS)?
            .server(self.guid.clone())
            .build_message_stream();
        let Ok(messages) = tokio::time::timeout(HANDSHAKE_DEADLINE, messages).await else {
            return Ok(());
        };
        let name = format!(":1.{}", self.next.fetch_add(1, Ordering::Relaxed));
        let name = OwnedUniqueName::try_from(name)?;
        client::serve(self, name, credentials, messages?).await
    }

    /// Whether this user may call.
    fn permits(&self, user: u32) -> bool {
        user == self.owner || user == 0
    }

    /// Whether a message to this name is one to the service.
    fn is_service(&self, destination: Option<&BusName<'_>>) -> bool {
        destination.is_none_or(|name| {
            name.as_str() == self.service || name.as_str() == SERVICE_UNIQUE_NAME
        })
    }

    /// Passes a message of the service on to whom it is for.
    fn route(&self, message: &Message) {
        let header = message.header();
        let clients = self.clients();
        if let Some(BusName::Unique(name)) = header.destination() {
            if let Some(client) = clients.get(&OwnedUniqueName::from(name.to_owned())) {
                client.send(message.clone());
            }
        } else if message.message_type() == Type::Signal {
            for client in clients.values().filter(|client| client.wants(message)) {
                client.send(message.clone());
            }
        }
        self.show(&clients, message);
    }

    /// Shows a message to those who watch the bus.
    fn show(&self, clients: &HashMap<OwnedUniqueName, Arc<Client>>, message: &Message) {
        for client in clients.values().filter(|client| client.is_monitor()) {
            client.send(message.clone());
        }
    }
}

/// Passes calls on to the service, and what it answers to the clients.
async fn serve_service(
    stream: StdUnixStream,
    mut calls: mpsc::Receiver<Message>,
    bus: Weak<Shared>,
) -> zbus::Result<()> {
    let mut messages = Builder::unix_stream(stream)
        .server(Guid::generate())
        .p2p()
        .build_message_stream()
        .await?;
    let connection = zbus::Connection::from(&messages);
    let sender = UniqueName::try_from(SERVICE_UNIQUE_NAME)?;
    tokio::spawn(async move {
        while let Some(call) = calls.recv().await {
            if connection.send(&call).await.is_err() {
                return;
            }
        }
        // The last handle to the bus is gone.
        let _ = connection.close().await;
    });
    while let Some(message) = crate::next(&mut messages).await {
        let Some(bus) = bus.upgrade() else { break };
        bus.route(&message?.with_sender(&sender)?);
    }
    Ok(())
}
