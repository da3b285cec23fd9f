//! The outside of the first serial port: where its output goes and its input comes from.
//!
//! Output has a thread that writes, input one that reads; neither ever holds up a vCPU.
//! When the machine ends, what the guest has written last is still brought out, for as
//! long as [`FLUSH_DEADLINE`].

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

use super::config::SerialConfig;
use super::error::MachineError;
use crate::platform::{OutputBuffer, SerialInput, SerialPort, Taken};

/// How long a reader that does not read may keep the process from ending.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// Bytes moved at once.
const CHUNK: usize = 4096;

/// The threads of a serial port.
pub(super) struct Console {
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
        let source = Arc::clone(output);
        let writer = move || {
            write(&source, sink);
            // Nobody waits any more after the deadline.
            let _ = done.send(());
        };
        thread::Builder::new()
            .name("serial-out".into())
            .spawn(writer)
            .map_err(failed)?;
        if let Some(input) = input {
            let serial = serial.input();
            let reader = move || {
                if let Err(error) = read(input, &serial) {
                    tracing::warn!(%error, "the serial port gets no more input");
                }
            };
            thread::Builder::new()
                .name("serial-in".into())
                .spawn(reader)
                .map_err(failed)?;
        }
        Ok(Self {
            output: Arc::clone(output),
            written,
            _terminal: terminal,
        })
    }

    /// Brings out what is left, and ends.
    pub(super) fn close(&self) {
        self.output.close();
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
        SerialConfig::File(path) => (None, Some(File::create(path)?)),
        SerialConfig::Fd(fd) => {
            let both = |fd: &OwnedFd| fd.try_clone().map(File::from);
            (Some(both(fd)?), Some(both(fd)?))
        }
    })
}

/// Brings output out until it ends. Output that nobody can take is dropped.
fn write(output: &OutputBuffer, mut sink: Option<File>) {
    let mut bytes = Vec::with_capacity(CHUNK);
    loop {
        bytes.clear();
        match output.take(&mut bytes, CHUNK, Duration::from_secs(3600)) {
            Taken::Closed => return,
            Taken::TimedOut => {}
            Taken::Bytes(_) => {
                if let Some(file) = &mut sink
                    && let Err(error) = file.write_all(&bytes)
                {
                    tracing::warn!(%error, "serial output goes nowhere from now on");
                    sink = None;
                }
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
                wait(input.as_fd())?;
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
                wait(serial.room().as_fd())?;
                let _ = serial.room().read();
            }
        }
    }
}

fn wait(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
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
