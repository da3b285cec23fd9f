//! The outside of the first serial port: where its output goes and its input comes from.
//!
//! Output has a thread that writes, input one that reads; neither ever holds up a vCPU.
//! Where the outside is a socket that the owner gave, it can be replaced: the owner may die
//! and another take its place. Until then output waits in its buffer.
//! When the machine ends, what the guest has written last is still brought out, for as
//! long as [`FLUSH_DEADLINE`].

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

use super::config::SerialConfig;
use super::error::MachineError;
use crate::files;
use crate::platform::{OutputBuffer, SerialInput, SerialPort, Taken};

/// How long a reader that does not read may keep the process from ending.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// Bytes moved at once.
const CHUNK: usize = 4096;

/// Where output goes.
enum Sink {
    Nowhere,
    To(Arc<File>),
    /// Nowhere yet: it waits for the next socket that is handed over.
    Awaited,
    Closed,
}

/// The sink, which the owner may replace.
struct Outlet {
    sink: Mutex<Sink>,
    replaced: Condvar,
    /// A sink that fails is waited for.
    is_socket: bool,
}

impl Outlet {
    fn lock(&self) -> MutexGuard<'_, Sink> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `sink` in its place, and ends what is in the middle of the one before.
    fn replace(&self, sink: Sink) {
        let before = std::mem::replace(&mut *self.lock(), sink);
        if let (Sink::To(file), true) = (before, self.is_socket) {
            use std::os::fd::AsRawFd as _;
            // Its other end may be gone already.
            let _ = shutdown(file.as_raw_fd(), Shutdown::Both);
        }
        self.replaced.notify_all();
    }

    /// The file to write to now; none when output goes nowhere.
    fn current(&self) -> Option<Arc<File>> {
        let waited = self
            .replaced
            .wait_while(self.lock(), |sink| matches!(sink, Sink::Awaited))
            .unwrap_or_else(PoisonError::into_inner);
        match &*waited {
            Sink::To(file) => Some(Arc::clone(file)),
            _ => None,
        }
    }

    /// Takes note that nothing can be written to `file` any more.
    fn failed(&self, file: &Arc<File>) {
        let sink = &mut *self.lock();
        if matches!(sink, Sink::To(current) if Arc::ptr_eq(current, file)) {
            *sink = if self.is_socket {
                Sink::Awaited
            } else {
                Sink::Nowhere
            };
        }
    }
}

/// The threads of a serial port.
pub(super) struct Console {
    serial: Arc<SerialPort>,
    outlet: Arc<Outlet>,
    output: Arc<OutputBuffer>,
    written: Receiver<()>,
    _terminal: Option<Terminal>,
}

impl Console {
    /// Connects `serial`, whose output is `output`, to what `config` names.
    pub(super) fn start(
        config: &SerialConfig,
        serial: &Arc<SerialPort>,
        output: &Arc<OutputBuffer>,
    ) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Serial {
            to: name(config),
            source,
        };
        let (input, sink) = open(config).map_err(failed)?;
        let terminal = match (config, &input) {
            (SerialConfig::Stdio, Some(input)) => Terminal::take(input.as_fd()),
            _ => None,
        };
        let (done, written) = channel();
        let outlet = Arc::new(Outlet {
            sink: Mutex::new(sink.map_or(Sink::Nowhere, |file| Sink::To(Arc::new(file)))),
            replaced: Condvar::new(),
            is_socket: matches!(config, SerialConfig::Fd(_)),
        });
        let (source, to) = (Arc::clone(output), Arc::clone(&outlet));
        let writer = move || {
            write(&source, &to);
            // Nobody waits any more after the deadline.
            let _ = done.send(());
        };
        thread::Builder::new()
            .name("serial-out".into())
            .spawn(writer)
            .map_err(failed)?;
        if let Some(input) = input {
            start_reader(input, serial).map_err(failed)?;
        }
        Ok(Self {
            serial: Arc::clone(serial),
            outlet,
            output: Arc::clone(output),
            written,
            _terminal: terminal,
        })
    }

    /// Replaces the outside by `socket`. Only a socket can be replaced by one.
    pub(super) fn attach(&self, socket: OwnedFd) -> io::Result<()> {
        if !self.outlet.is_socket {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the serial port does not lead to a socket",
            ));
        }
        let input = File::from(socket.try_clone()?);
        start_reader(input, &self.serial)?;
        self.outlet.replace(Sink::To(Arc::new(File::from(socket))));
        Ok(())
    }

    /// Brings out what is left, and ends.
    pub(super) fn close(&self) {
        self.output.close();
        if matches!(*self.outlet.lock(), Sink::Awaited) {
            // There is nobody to bring it to.
            self.outlet.replace(Sink::Closed);
        }
        // A reader that is too slow loses the rest.
        let _ = self.written.recv_timeout(FLUSH_DEADLINE);
        let dropped = self.output.dropped();
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "bytes of serial output were dropped: nobody read them"
            );
        }
    }
}

fn name(config: &SerialConfig) -> String {
    match config {
        SerialConfig::Stdio => "stdio".into(),
        SerialConfig::Null => "null".into(),
        SerialConfig::File(path) => path.display().to_string(),
        SerialConfig::Fd(fd) => format!("descriptor {}", std::os::fd::AsRawFd::as_raw_fd(fd)),
    }
}

fn open(config: &SerialConfig) -> io::Result<(Option<File>, Option<File>)> {
    let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    Ok(match config {
        SerialConfig::Null => (None, None),
        SerialConfig::Stdio => (
            Some(owned(io::stdin().as_fd())?),
            Some(owned(io::stdout().as_fd())?),
        ),
        SerialConfig::File(path) => {
            let mut options = File::options();
            options.write(true).create(true).truncate(true);
            (None, Some(files::open(&options, path)?))
        }
        SerialConfig::Fd(fd) => {
            let both = |fd: &OwnedFd| fd.try_clone().map(File::from);
            (Some(both(fd)?), Some(both(fd)?))
        }
    })
}

/// Passes what `input` says on, on a thread of its own that ends with it.
fn start_reader(input: File, serial: &Arc<SerialPort>) -> io::Result<()> {
    let serial = serial.input();
    let reader = move || {
        if let Err(error) = read(input, &serial) {
            tracing::warn!(%error, "the serial port gets no more input");
        }
    };
    thread::Builder::new()
        .name("serial-in".into())
        .spawn(reader)
        .map(drop)
}

/// Brings output out until it ends. Output that nobody can ever take is dropped.
fn write(output: &OutputBuffer, outlet: &Outlet) {
    let mut bytes = Vec::with_capacity(CHUNK);
    loop {
        bytes.clear();
        match output.take(&mut bytes, CHUNK, Duration::from_secs(3600)) {
            Taken::Closed => return,
            Taken::TimedOut => {}
            Taken::Bytes(_) => bring_out(&bytes, outlet),
        }
    }
}

/// Writes all of `bytes`, to the next sink what this one does not take.
fn bring_out(mut bytes: &[u8], outlet: &Outlet) {
    while !bytes.is_empty() {
        let Some(file) = outlet.current() else { return };
        match (&*file).write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // What is wrong with it shows at the next write.
                let _ = wait(file.as_fd(), PollFlags::POLLOUT);
            }
            Err(error) => {
                tracing::warn!(%error, "serial output goes nowhere");
                outlet.failed(&file);
            }
        }
    }
}

/// Passes input on until it ends.
fn read(mut input: File, serial: &SerialInput) -> io::Result<()> {
    let mut bytes = [0; CHUNK];
    loop {
        let count = match input.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(input.as_fd(), PollFlags::POLLIN)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut rest = &bytes[..count];
        while !rest.is_empty() {
            let taken = serial.push(rest);
            rest = &rest[taken..];
            if !rest.is_empty() {
                // The event is taken before the next try, so that none is missed.
                wait(serial.room().as_fd(), PollFlags::POLLIN)?;
                let _ = serial.room().read();
            }
        }
    }
}

fn wait(fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<()> {
    let mut fds = [PollFd::new(fd, events)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A terminal that passes keys on at once and unseen; back to what it was when dropped.
/// Ctrl-C stays a signal: it is how a person ends the machine.
struct Terminal {
    tty: OwnedFd,
    before: Termios,
}

impl Terminal {
    fn take(tty: BorrowedFd<'_>) -> Option<Self> {
        let before = tcgetattr(tty).ok()?;
        let mut raw = before.clone();
        raw.local_flags
            .remove(LocalFlags::ICANON | LocalFlags::ECHO);
        tcsetattr(tty, SetArg::TCSANOW, &raw).ok()?;
        Some(Self {
            tty: tty.try_clone_to_owned().ok()?,
            before,
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(&self.tty, SetArg::TCSANOW, &self.before);
    }
}
