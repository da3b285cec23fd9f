//! Where machines come in.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::unistd::geteuid;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};

use super::frame::{Direction, FrameError, Key, Link, MAX_GREETING, Sealed, Stream};
use super::{
    ANSWER_DEADLINE, Answer, CHANNELS_DEADLINE, First, Hello, MAX_CHANNELS, Offer, Request,
    VERSION, key_for, nonce,
};
use crate::broker::Broker;
use crate::migration::Uri;
use crate::migration::ends::Ends;
use crate::migration::receive::Arriving;

/// Most connections that are served at one time: a few machines with all their devices.
const MAX_CONNECTIONS: usize = 512;
/// How long an answer waits for a machine that is about to come; its asker waits longer.
const FATE_WAIT: Duration = Duration::from_secs(5);
/// Before it is tried again to accept when that fails.
const RETRY: Duration = Duration::from_millis(100);

/// A socket at which other brokers arrive.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    key: Key,
    /// Where it is.
    pub uri: Uri,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// It is impossible there, or without a key.
    pub async fn bind(uri: &Uri, key: Option<&Key>) -> io::Result<Self> {
        let key = key_for(uri, key).map_err(io::Error::other)?;
        let (socket, uri) = match uri {
            Uri::Tcp(address) => {
                let socket = TcpListener::bind(address).await?;
                // The port may have been left to the kernel.
                let uri = Uri::Tcp(socket.local_addr()?.to_string());
                (Socket::Tcp(socket), uri)
            }
            Uri::Unix(path) => {
                // Of a broker that was killed: the folder's lock says that this is the only one.
                match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                let socket = UnixListener::bind(path)?;
                fs::set_permissions(path, Permissions::from_mode(0o600))?;
                (Socket::Unix(socket), uri.clone())
            }
            Uri::Local => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        };
        Ok(Self { socket, key, uri })
    }

    async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                let user = stream.peer_cred()?.uid();
                if user != 0 && user != geteuid().as_raw() {
                    return Err(io::Error::from(io::ErrorKind::PermissionDenied));
                }
                Ok(Stream::Unix(stream))
            }
        }
    }
}

/// Machines that were accepted and whose connections come, by token.
#[derive(Debug, Default)]
struct Expected(Mutex<Tokens>);

/// The key of each, and where its connections go.
type Tokens = HashMap<String, (Key, mpsc::Sender<(String, OwnedFd)>)>;

impl Expected {
    fn with<T>(&self, work: impl FnOnce(&mut Tokens) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Takes machines in, until this is dropped.
pub async fn serve(broker: Arc<Broker>, listener: Listener) {
    let expected = Arc::new(Expected::default());
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(uri = %listener.uri, %error, "a connection was not accepted");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let (broker, expected) = (Arc::clone(&broker), Arc::clone(&expected));
        let (key, uri) = (listener.key.clone(), listener.uri.clone());
        tokio::spawn(async move {
            if let Err(error) = meet(&broker, &expected, &key, &uri, stream).await {
                tracing::warn!(%uri, %error, "a broker that came was sent away");
            }
            drop(permit);
        });
    }
}

async fn meet(
    broker: &Arc<Broker>,
    expected: &Expected,
    key: &Key,
    uri: &Uri,
    mut stream: Stream,
) -> Result<(), FrameError> {
    let sealed = Sealed::read(&mut stream, MAX_GREETING, ANSWER_DEADLINE).await?;
    match sealed.claim()? {
        First::Hello(_) => {
            let First::Hello(hello) = sealed.open(key, Direction::Ask, 0)? else {
                return Err(FrameError::Forged);
            };
            let link = greet(key, stream, hello).await?;
            serve_request(broker, expected, uri, link).await
        }
        First::Channel { token, name } => {
            let known = expected.with(|known| known.get(&token).cloned());
            let (key, channels) = known.ok_or(FrameError::Forged)?;
            let _: First = sealed.open(&key, Direction::Ask, 0)?;
            let fd = stream.into_fd()?;
            // Who waits for it may have given up.
            let _ = channels.try_send((name, fd));
            Ok(())
        }
    }
}

async fn greet(key: &Key, mut stream: Stream, hello: Hello) -> Result<Link, FrameError> {
    let ours = Hello {
        version: VERSION,
        nonce: nonce()?,
    };
    let at = (Direction::Answer, 0);
    super::frame::write(&mut stream, key, at, &ours, ANSWER_DEADLINE).await?;
    if hello.version != VERSION {
        return Err(FrameError::Io(io::Error::other(format!(
            "it speaks version {} of the protocol, this one {VERSION}",
            hello.version
        ))));
    }
    Ok(Link {
        stream,
        key: key.session([&hello.nonce, &ours.nonce])?,
        own: Direction::Answer,
        sent: 0,
        received: 0,
    })
}

async fn serve_request(
    broker: &Arc<Broker>,
    expected: &Expected,
    uri: &Uri,
    mut link: Link,
) -> Result<(), FrameError> {
    match link.receive(ANSWER_DEADLINE).await? {
        Request::Offer(offer) => take_offer(broker, expected, uri, link, offer).await,
        Request::Ask(id) => {
            let fate = broker.host.arrivals.ask(&id, FATE_WAIT).await;
            link.send(&Answer::Fate(fate), ANSWER_DEADLINE).await
        }
    }
}

async fn take_offer(
    broker: &Arc<Broker>,
    expected: &Expected,
    uri: &Uri,
    mut link: Link,
    offer: Offer,
) -> Result<(), FrameError> {
    let channels = offer.channels;
    let arriving = if (1..=MAX_CHANNELS).contains(&channels) {
        Arriving::accept(broker, uri, offer).await
    } else {
        Err(vec![format!(
            "{channels} memory channels: 1 to {MAX_CHANNELS} are possible"
        )])
    };
    let arriving = match arriving {
        Ok(arriving) => arriving,
        Err(reasons) => return refuse(&mut link, reasons).await,
    };
    let token = nonce()?;
    let names = arriving.names(channels);
    let (sender, came) = mpsc::channel(names.len());
    expected.with(|known| known.insert(token.clone(), (link.key.clone(), sender)));
    let answer = Answer::Accepted(token.clone());
    let ends = match link.send(&answer, ANSWER_DEADLINE).await {
        Ok(()) => collect_from(&link, names, came).await,
        Err(error) => Err(error.to_string()),
    };
    expected.with(|known| known.remove(&token));
    match arriving.start(ends).await {
        Ok(()) => link.send(&Answer::Ready, ANSWER_DEADLINE).await,
        Err(reason) => refuse(&mut link, vec![reason]).await,
    }
}

async fn refuse(link: &mut Link, reasons: Vec<String>) -> Result<(), FrameError> {
    link.send(&Answer::Refused(reasons), ANSWER_DEADLINE).await
}

/// Waits for the connections of who offers, as long as it is there.
async fn collect_from(
    link: &Link,
    names: Vec<String>,
    came: mpsc::Receiver<(String, OwnedFd)>,
) -> Result<Ends, String> {
    tokio::select! {
        biased;
        ends = collect(names, came) => ends,
        () = link.is_left() => Err("the other broker is gone".to_owned()),
        () = tokio::time::sleep(CHANNELS_DEADLINE) => {
            let seconds = CHANNELS_DEADLINE.as_secs();
            Err(format!("not all connections came within {seconds} s"))
        }
    }
}

/// Waits for one connection of each name.
async fn collect(
    mut names: Vec<String>,
    mut came: mpsc::Receiver<(String, OwnedFd)>,
) -> Result<Ends, String> {
    let mut ends = Vec::new();
    while !names.is_empty() {
        let Some((name, fd)) = came.recv().await else {
            break;
        };
        let Some(at) = names.iter().position(|wanted| *wanted == name) else {
            return Err(format!(
                "a connection for {name:?} is not wanted, or came twice"
            ));
        };
        names.swap_remove(at);
        ends.push((name, fd));
    }
    Ends::of(ends).ok_or_else(|| "connections are missing".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::frame::tests::{key, links};
    use super::*;

    fn names() -> Vec<String> {
        Ends::names(1, ["disk"].into_iter())
    }

    /// The end of who is offered something, and that of who has offered it.
    async fn offered() -> (Link, Link) {
        let (mut source, mut link) = links(key("k"), key("k"));
        source.send(&1, ANSWER_DEADLINE).await.unwrap();
        link.receive::<u32>(ANSWER_DEADLINE).await.unwrap();
        (link, source)
    }

    fn fd() -> OwnedFd {
        let (end, _) = std::os::unix::net::UnixStream::pair().unwrap();
        end.into()
    }

    #[tokio::test]
    async fn connections_come_in_any_order() {
        let (link, _source) = offered().await;
        let (sender, came) = mpsc::channel(3);
        for name in names().into_iter().rev() {
            sender.try_send((name, fd())).unwrap();
        }
        let ends = collect_from(&link, names(), came).await.unwrap();
        assert_eq!((ends.ram.len(), ends.states.len()), (1, 1));
    }

    #[tokio::test]
    async fn who_is_gone_is_not_waited_for() {
        let (link, source) = offered().await;
        let (sender, came) = mpsc::channel(3);
        sender.try_send((names().remove(0), fd())).unwrap();
        drop(source);
        let error = collect_from(&link, names(), came).await.unwrap_err();
        assert_eq!(error, "the other broker is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_has_a_deadline() {
        let (link, _source) = offered().await;
        let (_sender, came) = mpsc::channel(3);
        let begin = tokio::time::Instant::now();
        let error = collect_from(&link, names(), came).await.unwrap_err();
        assert_eq!(error, "not all connections came within 30 s");
        assert_eq!(begin.elapsed(), CHANNELS_DEADLINE);
    }
}
