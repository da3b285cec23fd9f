//! The console of a machine: one socket to the core, any number of readers, one writer.
//!
//! ```text
//!          ┌─► log file
//! core ──► ├─► what was printed lately
//!          └─► readers, each with a queue      core ◄── the writer
//! ```
//! A reader that does not read is let go; it never holds up the guest or another reader.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::Error;
use api::machine::{FORCE, READ_ONLY, REPLAY};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::{self, Receiver, Sender};

/// Bytes that are kept for who comes later.
const RECENT: usize = 256 << 10;
/// Pieces that wait for a reader, each of up to [`PIECE`] bytes.
const MAX_WAITING: usize = 256;
/// Most readers of a console.
const MAX_READERS: usize = 32;
/// Bytes moved at once.
const PIECE: usize = 4096;

/// The way to another core, for what clients type.
#[derive(Debug)]
pub struct Switch(Sender<Vec<u8>>);

/// A machine's console. Clones are the same console.
#[derive(Clone, Debug)]
pub struct Console(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    hub: Mutex<Hub>,
}

#[derive(Debug)]
struct Hub {
    recent: VecDeque<u8>,
    readers: Vec<Reader>,
    writer: Option<u64>,
    next: u64,
    log: Option<File>,
    /// To the core that has the machine.
    input: Sender<Vec<u8>>,
    /// Cores that may print.
    cores: usize,
}

#[derive(Debug)]
struct Reader {
    number: u64,
    queue: Sender<Arc<[u8]>>,
}

impl Console {
    /// On our end of the core's console, with a log at `log`. It ends when the core closes its
    /// end.
    ///
    /// # Errors
    /// The socket or the log cannot be used.
    pub fn new(core: StdUnixStream, log: &Path) -> io::Result<Self> {
        let (from_core, input) = connect(core)?;
        let console = Self(Arc::new(Shared {
            hub: Mutex::new(Hub {
                recent: VecDeque::new(),
                readers: Vec::new(),
                writer: None,
                next: 0,
                log: Some(OpenOptions::new().create(true).append(true).open(log)?),
                input,
                cores: 1,
            }),
        }));
        tokio::spawn(console.clone().bring_out(from_core));
        Ok(console)
    }

    /// The same console, on which another core prints as well: the one to which the machine
    /// goes. What clients type goes to the former core until the switch.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn also_from(&self, core: StdUnixStream) -> io::Result<Switch> {
        let (from_core, input) = connect(core)?;
        self.hub().cores += 1;
        tokio::spawn(self.clone().bring_out(from_core));
        Ok(Switch(input))
    }

    /// Lets what clients type go to another core from now on.
    pub fn switch(&self, to: Switch) {
        self.hub().input = to.0;
    }

    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.0.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn bring_out(self, mut core: OwnedReadHalf) {
        let mut bytes = vec![0; PIECE];
        while let Ok(count @ 1..) = core.read(&mut bytes).await {
            self.hub().print(&bytes[..count]);
        }
        let hub = &mut *self.hub();
        hub.cores -= 1;
        if hub.cores == 0 {
            // Its readers see the end.
            hub.readers.clear();
            hub.log = None;
        }
    }

    /// A socket to the console, see [`api::machine::MachineProxy::open_console`].
    ///
    /// # Errors
    /// Somebody else writes to it, or there are too many readers.
    pub fn open(&self, flags: u64) -> Result<OwnedFd, Error> {
        let internal =
            |error: io::Error| Error::Internal(format!("no socket is to be had: {error}"));
        let (ours, theirs) = StdUnixStream::pair().map_err(internal)?;
        ours.set_nonblocking(true).map_err(internal)?;
        let ours = UnixStream::from_std(ours).map_err(internal)?;
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        let number = {
            let hub = &mut *self.hub();
            if hub.readers.len() >= MAX_READERS {
                return Err(Error::LimitsExceeded(format!(
                    "{MAX_READERS} clients read the console already"
                )));
            }
            let number = hub.next;
            hub.next += 1;
            if flags & READ_ONLY == 0 {
                if hub.writer.is_some() && flags & FORCE == 0 {
                    return Err(Error::InvalidState(
                        "another client writes to the console: take it by force, or only read"
                            .into(),
                    ));
                }
                hub.writer = Some(number);
            }
            if flags & REPLAY != 0 && !hub.recent.is_empty() {
                let recent: Vec<u8> = hub.recent.iter().copied().collect();
                // The queue is empty.
                let _ = queue.try_send(recent.into());
            }
            hub.readers.push(Reader { number, queue });
            number
        };
        let (from_client, to_client) = ours.into_split();
        tokio::spawn(show(waiting, to_client));
        tokio::spawn(self.clone().listen(number, from_client));
        Ok(theirs.into())
    }

    /// Takes what a client types, until it leaves.
    async fn listen(self, number: u64, mut client: OwnedReadHalf) {
        let mut bytes = vec![0; PIECE];
        while let Ok(count @ 1..) = client.read(&mut bytes).await {
            let input = {
                let hub = self.hub();
                (hub.writer == Some(number)).then(|| hub.input.clone())
            };
            if let Some(input) = input
                && input.send(bytes[..count].to_vec()).await.is_err()
            {
                break;
            }
        }
        let hub = &mut *self.hub();
        hub.readers.retain(|reader| reader.number != number);
        if hub.writer == Some(number) {
            hub.writer = None;
        }
    }
}

impl Hub {
    fn print(&mut self, bytes: &[u8]) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.write_all(bytes)
        {
            tracing::warn!(%error, "the console is not logged any more");
            self.log = None;
        }
        let excess = (self.recent.len() + bytes.len()).saturating_sub(RECENT);
        self.recent.drain(..excess.min(self.recent.len()));
        self.recent.extend(bytes);
        let piece: Arc<[u8]> = bytes.into();
        self.readers
            .retain(|reader| reader.queue.try_send(Arc::clone(&piece)).is_ok());
    }
}

/// One end of a core's console: what it prints, and where it is typed.
fn connect(core: StdUnixStream) -> io::Result<(OwnedReadHalf, Sender<Vec<u8>>)> {
    core.set_nonblocking(true)?;
    let (from_core, to_core) = UnixStream::from_std(core)?.into_split();
    let (input, typed) = mpsc::channel(16);
    tokio::spawn(bring_in(typed, to_core));
    Ok((from_core, input))
}

async fn bring_in(mut typed: Receiver<Vec<u8>>, mut core: OwnedWriteHalf) {
    while let Some(bytes) = typed.recv().await {
        if core.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn show(mut waiting: Receiver<Arc<[u8]>>, mut client: OwnedWriteHalf) {
    while let Some(piece) = waiting.recv().await {
        if client.write_all(&piece).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn client(console: &Console, flags: u64) -> Result<UnixStream, Error> {
        let stream = StdUnixStream::from(console.open(flags)?);
        stream.set_nonblocking(true).unwrap();
        Ok(UnixStream::from_std(stream).unwrap())
    }

    async fn read(client: &mut UnixStream, count: usize) -> String {
        let mut bytes = vec![0; count];
        client.read_exact(&mut bytes).await.unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[tokio::test]
    async fn many_read_and_one_writes() {
        let folder = tempfile::tempdir().unwrap();
        let (core, ours) = StdUnixStream::pair().unwrap();
        let console = Console::new(ours, &folder.path().join("console.log")).unwrap();
        core.set_nonblocking(true).unwrap();
        let mut core = UnixStream::from_std(core).unwrap();
        let mut writer = client(&console, 0).await.unwrap();
        let mut reader = client(&console, READ_ONLY).await.unwrap();
        core.write_all(b"login: ").await.unwrap();
        assert_eq!(read(&mut writer, 7).await, "login: ");
        assert_eq!(read(&mut reader, 7).await, "login: ");
        assert!(matches!(
            client(&console, 0).await,
            Err(Error::InvalidState(_))
        ));
        reader.write_all(b"nobody").await.unwrap();
        writer.write_all(b"root").await.unwrap();
        assert_eq!(read(&mut core, 4).await, "root");
        let mut taker = client(&console, FORCE | REPLAY).await.unwrap();
        assert_eq!(read(&mut taker, 7).await, "login: ");
        writer.write_all(b"late").await.unwrap();
        taker.write_all(b"new!").await.unwrap();
        assert_eq!(read(&mut core, 4).await, "new!");
        drop(core);
        let mut rest = Vec::new();
        taker.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
        let logged = std::fs::read(folder.path().join("console.log")).unwrap();
        assert_eq!(logged, b"login: ");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut hub = Hub {
            recent: VecDeque::new(),
            readers: Vec::new(),
            writer: None,
            next: 0,
            log: None,
            input: mpsc::channel(1).0,
            cores: 0,
        };
        for _ in 0..(3 * RECENT / PIECE) {
            hub.print(&[b'x'; PIECE]);
        }
        assert_eq!(hub.recent.len(), RECENT);
    }
}
