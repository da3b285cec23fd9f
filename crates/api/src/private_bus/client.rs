//! One client of a private bus.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::watch;
use tokio::time::Instant;
use zbus::message::{Header, Type};
use zbus::names::OwnedUniqueName;
use zbus::{Connection, Message, MessageStream, OwnedMatchRule};

use super::{DRIVER, Shared, driver};

/// Most messages that wait for a client to read them.
const MAX_QUEUED: usize = 1024;
/// Most bytes that wait for a client to read them.
const MAX_QUEUED_BYTES: usize = 16 << 20;
/// Most calls of a client that have no reply yet.
const MAX_OWED: usize = 64;
/// Most calls of a client, in [`UNANSWERED_TIME`], that want no reply.
const MAX_UNANSWERED: u32 = 1000;
const UNANSWERED_TIME: Duration = Duration::from_secs(60);
/// Most match rules of a client.
const MAX_RULES: usize = 512;

/// Who a client is, as the kernel says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credentials {
    pub(super) user: u32,
    pub(super) process: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) credentials: Credentials,
    rules: Mutex<Vec<OwnedMatchRule>>,
    /// It knows that it is on a bus.
    greeted: AtomicBool,
    /// It has said something else than Hello: if that was first it knows of no bus, and gets every
    /// signal. What has not spoken gets none: to a client of a bus the first is the reply to Hello.
    spoke: AtomicBool,
    monitor: AtomicBool,
    queue: Sender<Message>,
    /// Bytes of all that is queued.
    queued: AtomicUsize,
    /// Calls whose replies it has not been sent.
    owed: watch::Sender<usize>,
    /// Calls that wanted no reply since then.
    unanswered: Mutex<(Instant, u32)>,
    /// It did not read, or must not go on.
    ended: tokio::sync::Notify,
}

impl Client {
    /// Sends it a message, or ends it if it does not read.
    pub(super) fn send(&self, message: Message) {
        let size = message.data().len();
        let queued = self.queued.fetch_add(size, Ordering::SeqCst) + size;
        if queued > MAX_QUEUED_BYTES || self.queue.try_send(message).is_err() {
            self.ended.notify_one();
        }
    }

    /// Whether a signal without destination is for it.
    pub(super) fn wants(&self, signal: &Message) -> bool {
        if !self.greeted.load(Ordering::Relaxed) {
            return self.spoke.load(Ordering::Relaxed);
        }
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules
            .iter()
            .any(|rule| rule.matches(signal).unwrap_or(false))
    }

    /// Whether it waits for a reply.
    pub(super) fn is_owed(&self) -> bool {
        *self.owed.borrow() > 0
    }

    /// Waits until it has been sent enough replies to be owed another, and notes that one.
    async fn owe(&self) {
        // The sender is this client's own.
        let mut owed = self.owed.subscribe();
        let _ = owed.wait_for(|owed| *owed < MAX_OWED).await;
        self.owed.send_modify(|owed| *owed += 1);
    }

    /// Notes a call that wants no reply; whether there may be one more.
    fn need_not_answer(&self) -> bool {
        let mut unanswered = self
            .unanswered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if unanswered.0.elapsed() > UNANSWERED_TIME {
            *unanswered = (Instant::now(), 0);
        }
        unanswered.1 += 1;
        unanswered.1 <= MAX_UNANSWERED
    }

    pub(super) fn is_monitor(&self) -> bool {
        self.monitor.load(Ordering::Relaxed)
    }

    pub(super) fn become_monitor(&self) {
        self.monitor.store(true, Ordering::Relaxed);
        self.rules
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Notes its Hello; whether it is the first.
    pub(super) fn greet(&self) -> bool {
        !self.greeted.swap(true, Ordering::Relaxed)
    }

    /// Adds a rule; whether there was room for it.
    pub(super) fn add_rule(&self, rule: OwnedMatchRule) -> bool {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let room = rules.len() < MAX_RULES;
        if room {
            rules.push(rule);
        }
        room
    }

    /// Removes one such rule; whether there was one.
    pub(super) fn remove_rule(&self, rule: &OwnedMatchRule) -> bool {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let found = rules.iter().position(|other| other == rule);
        found.map(|at| rules.swap_remove(at)).is_some()
    }
}

/// Takes the client off the bus, however its task ends.
struct Membership<'a> {
    bus: &'a Shared,
    name: &'a OwnedUniqueName,
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        self.bus.clients().remove(self.name);
    }
}

/// Serves a client that has authenticated itself.
pub(super) async fn serve(
    bus: &Arc<Shared>,
    name: OwnedUniqueName,
    credentials: Credentials,
    mut messages: MessageStream,
) -> zbus::Result<()> {
    let connection = Connection::from(&messages);
    let (queue, waiting) = mpsc::channel(MAX_QUEUED);
    let client = Arc::new(Client {
        credentials,
        rules: Mutex::default(),
        greeted: AtomicBool::new(false),
        spoke: AtomicBool::new(false),
        monitor: AtomicBool::new(false),
        queue,
        queued: AtomicUsize::new(0),
        owed: watch::Sender::new(0),
        unanswered: Mutex::new((Instant::now(), 0)),
        ended: tokio::sync::Notify::new(),
    });
    bus.clients().insert(name.clone(), Arc::clone(&client));
    let _member = Membership { bus, name: &name };
    tokio::select! {
        result = write(&connection, &client, waiting) => result,
        () = client.ended.notified() => Ok(()),
        result = async {
            while let Some(message) = crate::next(&mut messages).await {
                take(bus, &name, &client, message?).await?;
            }
            Ok(())
        } => result,
    }
}

async fn write(
    connection: &Connection,
    client: &Client,
    mut waiting: Receiver<Message>,
) -> zbus::Result<()> {
    while let Some(message) = waiting.recv().await {
        connection.send(&message).await?;
        client
            .queued
            .fetch_sub(message.data().len(), Ordering::SeqCst);
        if matches!(message.message_type(), Type::MethodReturn | Type::Error) {
            // A monitor sees replies that are not its own.
            client
                .owed
                .send_modify(|owed| *owed = owed.saturating_sub(1));
        }
    }
    Ok(())
}

/// Acts on a message of a client.
async fn take(
    bus: &Arc<Shared>,
    name: &OwnedUniqueName,
    client: &Client,
    message: Message,
) -> zbus::Result<()> {
    // The service calls nobody, and signals are its alone.
    if message.message_type() != Type::MethodCall {
        return Ok(());
    }
    let message = message.with_sender(name)?;
    let header = message.header();
    if client.is_monitor() {
        return Ok(());
    }
    if !is_hello(&header) {
        client.spoke.store(true, Ordering::Relaxed);
    }
    let wants_reply = !header
        .primary()
        .flags()
        .contains(zbus::message::Flags::NO_REPLY_EXPECTED);
    if wants_reply {
        client.owe().await;
    } else if !client.need_not_answer() {
        client.ended.notify_one();
        return Ok(());
    }
    let reply = if !bus.permits(client.credentials.user) {
        let (user, owner) = (client.credentials.user, bus.owner);
        refuse(
            &header,
            "org.freedesktop.DBus.Error.AccessDenied",
            &format!(
                "user {user} may not call here: {} belongs to user {owner}",
                bus.service
            ),
        )?
    } else if is_for_driver(&header) {
        driver::answer(bus, name, client, &message)?
    } else if bus.is_service(header.destination()) {
        bus.show(&bus.clients(), &message);
        if bus.calls.send(message).await.is_err() {
            client.ended.notify_one();
        }
        return Ok(());
    } else {
        let destination = header.destination().map(ToString::to_string);
        refuse(
            &header,
            "org.freedesktop.DBus.Error.ServiceUnknown",
            &format!(
                "{} is not here: there is {}",
                destination.unwrap_or_default(),
                bus.service
            ),
        )?
    };
    if wants_reply {
        client.send(reply);
    }
    Ok(())
}

fn is_hello(header: &Header<'_>) -> bool {
    is_for_driver(header) && header.member().is_some_and(|member| member == "Hello")
}

fn is_for_driver(header: &Header<'_>) -> bool {
    match header.destination() {
        Some(name) => name.as_str() == DRIVER,
        None => header
            .interface()
            .is_some_and(|name| name.as_str() == DRIVER),
    }
}

/// An error from the bus.
pub(super) fn refuse(call: &Header<'_>, name: &'static str, text: &str) -> zbus::Result<Message> {
    Message::error(call, name).sender(DRIVER).build(&(text,))
}
