//! The broker's folders: sockets, state and logs, for this user alone.
//!
//! ```text
//! DIR/lock                      held by the broker that runs
//! DIR/bus  DIR/metrics          sockets
//! DIR/launch                    the socket to which units' processes come
//! DIR/machines/NAME/control     the core's socket, while it runs
//! DIR/machines/NAME/end         what the core said of its end
//! DIR/machines/NAME/state.json  what a new broker needs to adopt it
//! DIR/incoming/NAME/         the same of a machine that comes here, until it runs
//! DIR/jobs/N.json               a job that is kept
//! KEPT/defined/NAME.json        a machine that was made by a call
//! KEPT/arrivals.json            what became of machines that other brokers sent
//! KEPT/departures/NAME.json     where a machine went
//! KEPT/log/NAME/*.log           output of its processes and its console
//! ```
//! What KEPT holds outlives the host's reboots, if it is on a disk.
//!
//! Files of state are replaced whole: a broker that is killed leaves the old one or the new.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::name::MachineName;

/// Largest file of state, in bytes.
const MAX_STATE: u64 = 1 << 20;
/// Bytes of a log after which what there is becomes its predecessor, of which one is kept.
const MAX_LOG: u64 = 8 << 20;
/// The log of a broker that the command line has started.
const BROKER_LOG: &str = "broker.log";
/// Bytes at the end of a log that are looked at for a reason.
const LOG_TAIL: u64 = 4096;
/// Longest path of a socket.
const MAX_SOCKET_PATH: usize = 107;

/// The broker's folders. The one of what runs is locked as long as this lives.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    kept: PathBuf,
    _lock: Flock<File>,
}

fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn remove(path: &Path, result: io::Result<()>) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "it cannot be removed");
    }
}

impl Folder {
    /// Makes what is not there: `path` for what runs, `kept` for what is to outlive the host's
    /// reboots.
    ///
    /// # Errors
    /// It cannot be made, or another broker has it.
    pub fn open(path: &Path, kept: &Path) -> io::Result<Self> {
        for folder in [
            path.join("machines"),
            path.join("incoming"),
            path.join("jobs"),
            kept.join("defined"),
            kept.join("departures"),
            kept.join("log"),
        ] {
            make(&folder)?;
        }
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))?;
        let lock = take(lock).map_err(|errno| {
            let text = format!("another broker runs in {} ({errno})", path.display());
            io::Error::new(io::ErrorKind::AddrInUse, text)
        })?;
        Ok(Self {
            path: path.to_owned(),
            kept: kept.to_owned(),
            _lock: lock,
        })
    }

    /// Where machines that were made by calls are kept.
    pub fn defined(&self) -> PathBuf {
        self.kept.join("defined")
    }

    /// Where it is written down what became of machines that other brokers sent.
    pub fn arrivals(&self) -> PathBuf {
        self.kept.join("arrivals.json")
    }

    /// Where it is written down where a machine went.
    pub fn departure(&self, name: &MachineName) -> PathBuf {
        self.kept.join("departures").join(format!("{name}.json"))
    }

    /// A path in the one of what runs.
    pub fn join(&self, part: &str) -> PathBuf {
        self.path.join(part)
    }

    /// Where a running machine has its sockets.
    pub fn machine(&self, name: &MachineName) -> PathBuf {
        self.join("machines").join(name.as_str())
    }

    /// Where a machine has its sockets that comes here, until it runs here.
    pub fn incoming(&self, name: &MachineName) -> PathBuf {
        self.join("incoming").join(name.as_str())
    }

    /// Makes a folder for processes of a machine.
    ///
    /// # Errors
    /// It cannot be made, or its sockets' paths would be too long.
    pub fn make_place(&self, path: &Path, name: &MachineName) -> io::Result<()> {
        let socket = path.join("control");
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            let text = format!(
                "{} is longer than {MAX_SOCKET_PATH} bytes, the most that a socket's path may have",
                socket.display()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        make(path)?;
        make(&self.logs(name))
    }

    /// Makes `place` the folder of the machine, whose former one goes.
    pub fn settle(&self, place: &mut PathBuf, name: &MachineName) {
        let own = self.machine(name);
        if *place == own {
            return;
        }
        self.remove_place(&own);
        match fs::rename(&*place, &own) {
            Ok(()) => *place = own,
            Err(error) => {
                tracing::error!(machine = %name, %error, "another broker could not adopt it");
            }
        }
    }

    /// Removes a folder of processes that have ended.
    pub fn remove_place(&self, path: &Path) {
        remove(path, fs::remove_dir_all(path));
    }

    /// Removes the folder of a machine that has ended.
    pub fn remove_machine(&self, name: &MachineName) {
        self.remove_place(&self.machine(name));
    }

    /// Where a machine's logs are.
    pub fn logs(&self, name: &MachineName) -> PathBuf {
        self.kept.join("log").join(name.as_str())
    }

    /// Removes the logs of a machine that is forgotten.
    pub fn remove_logs(&self, name: &MachineName) {
        let path = self.logs(name);
        remove(&path, fs::remove_dir_all(&path));
    }

    /// A log to append to.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn log(&self, name: &MachineName, role: &str) -> io::Result<File> {
        let path = self.logs(name).join(format!("{role}.log"));
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
    }

    /// Shortens all logs that have grown too long. Blocks.
    pub fn bound_logs(&self) {
        let machines = list(&self.kept.join("log"));
        let logs = machines.iter().flat_map(|machine| list(machine));
        for log in logs.chain([self.join(BROKER_LOG)]) {
            if log.extension().is_some_and(|extension| extension == "log")
                && let Err(error) = bound(&log)
            {
                tracing::warn!(log = %log.display(), %error, "a log cannot be shortened");
            }
        }
    }
}

/// The files and folders in `folder`, by name.
pub fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Replaces a file of state.
///
/// # Errors
/// It cannot be written; the old one is still there.
pub fn save(path: &Path, state: &impl Serialize) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    drop(file);
    fs::rename(new, path)
}

/// Reads a file of state.
///
/// # Errors
/// It is not there, too large, or of another form.
pub fn load<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_STATE).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Copies the end of a log that has grown too long away, and empties it. Who writes to it appends,
/// and who reads it sees that it has become shorter.
///
/// # Errors
/// It cannot be copied; it is as it was.
fn bound(log: &Path) -> io::Result<()> {
    let size = match fs::metadata(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?.len(),
    };
    if size <= MAX_LOG {
        return Ok(());
    }
    let mut file = OpenOptions::new().read(true).write(true).open(log)?;
    file.seek(SeekFrom::Start(size - MAX_LOG))?;
    let mut old = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(log.with_extension("log.1"))?;
    io::copy(&mut (&mut file).take(MAX_LOG), &mut old)?;
    file.set_len(0)
}

/// The last line of a file, without control characters.
pub fn last_line(path: &Path) -> Option<String> {
    last_matching(path, |line| !line.trim().is_empty())
}

/// Whether the core of this folder has said that its machine came, whatever it did then.
pub fn has_arrived(place: &Path) -> bool {
    let mut said = Vec::new();
    let read =
        File::open(place.join("end")).and_then(|end| end.take(LOG_TAIL).read_to_end(&mut said));
    read.is_ok() && said.starts_with(b"arrived\n")
}

/// From now on no machine comes to the core of this folder, unless it has: of what the core and
/// this append to one file the first line counts, and the core looks before it runs the machine.
pub fn forestall(place: &Path) {
    let end = OpenOptions::new().append(true).open(place.join("end"));
    match end.and_then(|mut end| end.write_all(b"unawaited\n")) {
        // There was no core yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::error!(place = %place.display(), %error, "a machine may still come there")
        }
        Ok(()) => {}
    }
}

/// The last complaint in the log of a process: what is only information is none.
pub fn last_words(log: &Path) -> Option<String> {
    let quiet = [" INFO ", " DEBUG ", " TRACE "];
    last_matching(log, |line| {
        !line.trim().is_empty() && !quiet.iter().any(|level| line.contains(level))
    })
}

fn last_matching(log: &Path, wanted: impl Fn(&str) -> bool) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL)))
        .ok()?;
    let mut text = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rev().find(|line| wanted(line))?;
    let plain: String = line.chars().filter(|c| !c.is_control()).take(500).collect();
    Some(plain.trim().to_owned())
}

/// Removes a file that may not be there.
pub fn remove_file(path: &Path) {
    remove(path, fs::remove_file(path));
}

/// Takes the lock of a folder. A broker that was killed while it started a process leaves the
/// lock with that process until it has become another program: [`LOCK_PATIENCE`] is more than that.
fn take(mut file: File) -> Result<Flock<File>, Errno> {
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((again, Errno::EWOULDBLOCK)) if Instant::now() < end => {
                file = again;
                thread::sleep(Duration::from_millis(10));
            }
            result => return result.map_err(|(_, errno)| errno),
        }
    }
}

/// How long the lock may still be held by what is left of another broker.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_broker_has_a_folder() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path(), place.path()).unwrap();
        let error = Folder::open(place.path(), place.path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("another broker runs"), "{error}");
        drop(folder);
        Folder::open(place.path(), place.path()).unwrap();
    }

    #[test]
    fn logs_are_bounded_under_who_writes_them() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path(), place.path()).unwrap();
        let name = MachineName::new("vm").unwrap();
        folder.make_place(&folder.machine(&name), &name).unwrap();
        let mut log = folder.log(&name, "core").unwrap();
        let path = folder.logs(&name).join("core.log");
        for round in 0..4 {
            let line = format!("round {round}\n");
            let piece = vec![b'x'; 1 << 20];
            for _ in 0..10 {
                log.write_all(&piece).unwrap();
            }
            log.write_all(line.as_bytes()).unwrap();
            folder.bound_logs();
            assert_eq!(fs::metadata(&path).unwrap().len(), 0);
            let old = path.with_extension("log.1");
            assert_eq!(fs::metadata(&old).unwrap().len(), MAX_LOG);
            assert!(fs::read(&old).unwrap().ends_with(line.as_bytes()));
        }
        log.write_all(b"more\n").unwrap();
        folder.bound_logs();
        assert_eq!(fs::read(&path).unwrap(), b"more\n");
    }

    #[test]
    fn the_last_words_of_a_process_are_found() {
        let place = tempfile::tempdir().unwrap();
        let log = place.path().join("x.log");
        fs::write(&log, "one\ntwo \x1b[1mbold\n\n").unwrap();
        assert_eq!(last_line(&log).unwrap(), "two [1mbold");
        fs::write(&log, "oh no\n2026 INFO all is well\n").unwrap();
        assert_eq!(last_words(&log).unwrap(), "oh no");
        fs::write(&log, "x".repeat(100_000)).unwrap();
        assert_eq!(last_line(&log).unwrap().len(), 500);
        fs::write(&log, "").unwrap();
        assert_eq!(last_line(&log), None);
    }
}
