//! The links to our device processes: `org.godwit.Device1`, peer to peer, one for each.
//!
//! ```text
//!            the process answers            it hangs up, or misbehaves
//!   Waiting ─────────────────────► Up ──────────────────────────────► Lost
//!      ▲                                                                │
//!      └──────────────── a new socket is handed over ◄──────────────────┘
//! ```
//!
//! What the device protocols have no word for goes here, and nothing that a machine needs to
//! run: a device without a link, or whose link is lost, works. A process may have been taken over
//! by its guest, so what it sends is bounded ([`api::peer`]), what it says is cleaned, each
//! question has a deadline, and all of it is handled on one thread that does nothing else.

mod balloon;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use api::core::Link;
use api::device1::Device1Proxy;
use futures_core::Stream as _;
use tokio::runtime::{Builder, Handle};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use zbus::proxy::CacheProperties;
use zbus::{Connection, MatchRule, MessageStream, message};

pub use self::balloon::{Balloon, BalloonSize};

/// How long a process has for its answers.
const DEADLINE: Duration = Duration::from_secs(1);
/// Shortest time between two changes of one device that are passed on.
const CHANGE_INTERVAL: Duration = Duration::from_millis(250);
/// Changes that may wait to be passed on.
const CHANGES: usize = 64;
/// Longest sentence and longest name that are believed, in characters.
const MAX_TEXT: usize = 500;
const MAX_NAME: usize = 64;
/// Most counters.
const MAX_COUNTERS: usize = 256;

/// The links of a machine, by the names of its devices.
#[derive(Debug)]
pub struct DeviceLinks {
    inner: Mutex<Inner>,
    changes: mpsc::Sender<String>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The thread of all links, which is started with the first one.
    runtime: Option<Handle>,
    links: BTreeMap<String, OneLink>,
}

#[derive(Debug)]
struct OneLink {
    phase: Arc<Mutex<Phase>>,
    task: AbortHandle,
}

impl Drop for OneLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone, Debug)]
enum Phase {
    Waiting,
    Up(Connection),
    Lost,
}

/// What a process says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Where the device is in its life, by VFIO's names.
    pub state: String,
    /// What went wrong last, or empty.
    pub last_error: String,
    /// Bytes of guest memory that are mapped.
    pub mapped: u64,
    /// How many of them its prefault thread has been through.
    pub prefaulted: u64,
    /// Its counters.
    pub statistics: BTreeMap<String, u64>,
}

impl DeviceLinks {
    /// No links yet; and where the names of devices of which something changed come out.
    pub fn new() -> (Self, mpsc::Receiver<String>) {
        let (changes, changed) = mpsc::channel(CHANGES);
        let inner = Mutex::default();
        (Self { inner, changes }, changed)
    }

    /// Takes `socket` as the link to the process of `device`, in the place of the one that there
    /// was. The process takes it up when it likes.
    ///
    /// # Errors
    /// It is no connected Unix socket, or there is no thread to be had.
    pub fn attach(&self, device: &str, socket: OwnedFd) -> io::Result<()> {
        let socket = UnixStream::from(socket);
        socket.peer_addr()?;
        let mut inner = self.lock();
        let runtime = match &inner.runtime {
            Some(runtime) => runtime.clone(),
            None => inner.runtime.insert(start_thread()?).clone(),
        };
        let phase = Arc::new(Mutex::new(Phase::Waiting));
        let work = hold(
            device.to_owned(),
            socket,
            Arc::clone(&phase),
            self.changes.clone(),
        );
        let task = runtime.spawn(work).abort_handle();
        inner
            .links
            .insert(device.to_owned(), OneLink { phase, task });
        Ok(())
    }

    /// Asks the process of `device` how it does, within `DEADLINE`.
    pub async fn ask(&self, device: &str) -> (Link, Words) {
        let (phase, runtime) = {
            let inner = self.lock();
            let phase = inner.links.get(device).map(|link| current(&link.phase));
            (phase, inner.runtime.clone())
        };
        let (Some(phase), Some(runtime)) = (phase, runtime) else {
            return (Link::None, Words::default());
        };
        let connection = match phase {
            Phase::Waiting => return (Link::Waiting, Words::default()),
            Phase::Lost => return (Link::Lost, Words::default()),
            Phase::Up(connection) => connection,
        };
        let question = runtime.spawn(async move { timeout(DEADLINE, words(&connection)).await });
        match question.await {
            Ok(Ok(Ok(words))) => (Link::Up, words),
            Ok(Err(_)) => (Link::Silent, Words::default()),
            Ok(Ok(Err(error))) => {
                tracing::warn!(device, %error, "its process gives no sensible answer");
                (Link::Lost, Words::default())
            }
            Err(error) => {
                tracing::error!(device, %error, "its process could not be asked");
                (Link::Lost, Words::default())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread lives as long as the process.
fn start_thread() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new()
        .name("device-links".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

fn current(phase: &Mutex<Phase>) -> Phase {
    phase.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn enter(phase: &Mutex<Phase>, next: Phase) {
    *phase.lock().unwrap_or_else(PoisonError::into_inner) = next;
}

/// Holds a link until it is lost.
async fn hold(
    device: String,
    socket: UnixStream,
    phase: Arc<Mutex<Phase>>,
    changes: mpsc::Sender<String>,
) {
    match serve(&device, socket, &phase, &changes).await {
        Ok(()) => tracing::info!(device, "its process has ended the link"),
        Err(error) => tracing::warn!(device, %error, "the link to its process is lost"),
    }
    enter(&phase, Phase::Lost);
    // Nobody hears of it any more when the machine has ended.
    let _ = changes.send(device).await;
}

async fn serve(
    device: &str,
    socket: UnixStream,
    phase: &Mutex<Phase>,
    changes: &mpsc::Sender<String>,
) -> zbus::Result<()> {
    let connection = api::peer::client(socket)?.build().await?;
    let rule = MatchRule::builder()
        .msg_type(message::Type::Signal)
        .interface("org.freedesktop.DBus.Properties")
        .member("PropertiesChanged")
        .build()?;
    let mut signals = MessageStream::for_match_rule(rule, &connection, None).await?;
    enter(phase, Phase::Up(connection));
    // That it is up is news too.
    loop {
        if changes.send(device.to_owned()).await.is_err() {
            return Ok(());
        }
        tokio::time::sleep(CHANGE_INTERVAL).await;
        let Some(signal) = next(&mut signals).await else {
            return Ok(());
        };
        signal?;
        // Those that came meanwhile are the same news, and behind a full queue no answer is heard.
        while let Some(signal) = waiting(&mut signals) {
            signal?;
        }
    }
}

/// A signal that is there already.
fn waiting(signals: &mut MessageStream) -> Option<zbus::Result<zbus::Message>> {
    let mut nobody = Context::from_waker(Waker::noop());
    match std::pin::Pin::new(signals).poll_next(&mut nobody) {
        Poll::Ready(signal) => signal,
        Poll::Pending => None,
    }
}

async fn next(signals: &mut MessageStream) -> Option<zbus::Result<zbus::Message>> {
    std::future::poll_fn(|context| std::pin::Pin::new(&mut *signals).poll_next(context)).await
}

async fn words(connection: &Connection) -> zbus::Result<Words> {
    let process = Device1Proxy::builder(connection)
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    let statistics = process.statistics().await?;
    Ok(Words {
        state: clean(&process.state().await?, MAX_NAME),
        last_error: clean(&process.last_error().await?, MAX_TEXT),
        mapped: process.mapped_bytes().await?,
        prefaulted: process.prefaulted_bytes().await?,
        statistics: statistics
            .into_iter()
            .filter(|(name, _)| is_name(name))
            .take(MAX_COUNTERS)
            .collect(),
    })
}

/// Text that can be logged and shown on a terminal.
fn clean(text: &str, most: usize) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(most).map(shown).collect()
}

fn is_name(name: &str) -> bool {
    let fits = (1..=MAX_NAME).contains(&name.len());
    fits && name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests;
