//! A way between two brokers that is lost when something certain is said on it.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// How often it is looked whether what waits may pass.
const LOOK: Duration = Duration::from_millis(5);

/// How the way is.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    /// With this word, which does not arrive, the connection is lost.
    last_word: Option<&'static str>,
    /// After that nobody gets through any more.
    then_closed: bool,
    closed: bool,
    /// What is said with this word does not arrive.
    muted: Option<&'static str>,
    /// What is said with this word waits, with all that comes after it.
    held: Option<&'static str>,
    /// Something waits.
    holds: bool,
}

/// Leads connections to a broker's Unix socket.
#[derive(Debug)]
pub struct Relay {
    path: PathBuf,
    way: Arc<Mutex<Way>>,
}

fn lock(way: &Mutex<Way>) -> MutexGuard<'_, Way> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Relay {
    /// One in `folder` to the broker that listens at `door`, a `unix:` URI.
    pub fn start(folder: &Path, door: &str) -> Result<Self> {
        let door = PathBuf::from(door.strip_prefix("unix:").context("no Unix socket")?);
        let path = folder.join("relay");
        let listener = UnixListener::bind(&path)?;
        let way = Arc::new(Mutex::new(Way::default()));
        let shared = Arc::clone(&way);
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if lock(&shared).closed {
                    continue;
                }
                // A broker that is not there is a way that ends.
                if let Ok(far) = UnixStream::connect(&door) {
                    let ends = (near.try_clone(), far.try_clone());
                    let ways = (Arc::clone(&shared), Arc::clone(&shared));
                    if let (Ok(back_near), Ok(back_far)) = ends {
                        thread::spawn(move || pass(near, far, &ways.0));
                        thread::spawn(move || pass(back_far, back_near, &ways.1));
                    }
                }
            }
        });
        Ok(Self { path, way })
    }

    /// Where it is.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// The connection on which a core says `word` is lost instead, once; if `then_closed`, nobody
    /// gets through afterwards.
    pub fn lose(&self, word: &'static str, then_closed: bool) {
        let way = &mut *lock(&self.way);
        (way.last_word, way.then_closed) = (Some(word), then_closed);
    }

    /// From now on a core's message with `word` is lost, and nothing else; with none all arrive.
    pub fn mute(&self, word: Option<&'static str>) {
        lock(&self.way).muted = word;
    }

    /// A core's message with `word` waits until [`Self::open`].
    pub fn hold(&self, word: &'static str) {
        lock(&self.way).held = Some(word);
    }

    /// Whether one waits.
    pub fn holds(&self) -> bool {
        lock(&self.way).holds
    }

    /// Lets connections through again, and what waits.
    pub fn open(&self) {
        let way = &mut *lock(&self.way);
        (way.closed, way.held, way.holds) = (false, None, false);
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, way: &Mutex<Way>) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        let bytes = &bytes[..count];
        let waits = {
            let way = &mut *lock(way);
            // What cores say begins with this; memory may hold any word.
            let says = |word: &str| {
                bytes.starts_with(b"GWLK")
                    && bytes
                        .windows(word.len())
                        .any(|part| part == word.as_bytes())
            };
            if way.last_word.is_some_and(says) {
                way.last_word = None;
                way.closed = way.then_closed;
                break;
            }
            if way.muted.is_some_and(says) {
                continue;
            }
            let waits = way.held.is_some_and(says);
            way.holds |= waits;
            waits
        };
        while waits && lock(way).holds {
            thread::sleep(LOOK);
        }
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    // What is closed already stays so.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
