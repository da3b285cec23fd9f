//! A state channel: a pipe, socket or file whose reads and writes have a deadline and can be
//! cancelled.
//!
//! The descriptor comes from elsewhere and may be shared, so its own mode is left as it is: every
//! access first waits until it cannot block, and then moves no more than is possible at once.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};

/// A pipe that can be written takes this much without blocking (PIPE_BUF).
const PIPE_SAFE: usize = 4096;

/// Ends the waits of the channels that were made with it, from any thread.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<Signal>);

#[derive(Debug)]
enum Signal {
    Event(EventFd),
    /// The end of a connection.
    Connection(UnixStream),
}

impl Cancel {
    /// A cancel that was not called yet.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Cancel(Arc::new(Signal::Event(event))))
    }

    /// A cancel that is called by the end of a connection, on either side.
    pub fn at_end_of(connection: UnixStream) -> Self {
        Cancel(Arc::new(Signal::Connection(connection)))
    }

    fn poll_fd(&self) -> PollFd<'_> {
        match &*self.0 {
            Signal::Event(event) => PollFd::new(event.as_fd(), PollFlags::POLLIN),
            // Its end is told unasked (POLLHUP); what comes on it is no matter.
            Signal::Connection(socket) => PollFd::new(socket.as_fd(), PollFlags::empty()),
        }
    }

    /// Whether it was called.
    pub fn is_cancelled(&self) -> bool {
        matches!(poll(&mut [self.poll_fd()], PollTimeout::ZERO), Ok(1))
    }

    /// Ends every present and future wait with an error of kind `Interrupted`'s sibling,
    /// [`io::ErrorKind::ConnectionAborted`].
    pub fn cancel(&self) {
        match &*self.0 {
            // It fails only when the counter is full: then it is cancelled already.
            Signal::Event(event) => drop(event.write(1)),
            // It fails only when the other side is gone already.
            Signal::Connection(socket) => drop(socket.shutdown(Shutdown::Both)),
        }
    }
}

/// A channel with a deadline for all that is done on it.
#[derive(Debug)]
pub struct StateChannel {
    fd: OwnedFd,
    deadline: Instant,
    cancel: Cancel,
    /// Whether `send` works on it; found out at the first write.
    socket: bool,
}

impl StateChannel {
    /// Takes over a descriptor. Reads and writes fail with [`io::ErrorKind::TimedOut`] once
    /// `within` has passed from now.
    pub fn new(fd: OwnedFd, within: Duration, cancel: Cancel) -> Self {
        StateChannel {
            fd,
            deadline: Instant::now() + within,
            cancel,
            socket: true,
        }
    }

    /// From now on reads and writes fail once `within` has passed.
    pub fn set_deadline(&mut self, within: Duration) {
        self.deadline = Instant::now() + within;
    }

    /// From now on waits end by another cancel.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// How long a byte takes there and back, as far as the kernel knows.
    pub(crate) fn round_trip(&self) -> Duration {
        crate::round_trip::of(self.fd.as_fd())
    }

    /// Whether a read would not wait: bytes have come, or the other end has closed.
    pub fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
    }

    /// Waits until a read would not, by the deadline.
    pub fn await_readable(&self) -> io::Result<()> {
        self.wait(PollFlags::POLLIN)
    }

    fn wait(&self, events: PollFlags) -> io::Result<()> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer did not go on in time",
                ));
            }
            let timeout =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.fd.as_fd(), events), self.cancel.poll_fd()];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [channel, cancel] = fds.map(|fd| fd.any().unwrap_or(true));
            if cancel {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "cancelled",
                ));
            }
            if channel {
                return Ok(());
            }
        }
    }
}

impl Read for StateChannel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLIN)?;
            match nix::unistd::read(&self.fd, buffer) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

impl Write for StateChannel {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLOUT)?;
            let result = if self.socket {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                send(self.fd.as_raw_fd(), buffer, flags)
            } else {
                nix::unistd::write(&self.fd, &buffer[..buffer.len().min(PIPE_SAFE)])
            };
            match result {
                Err(Errno::ENOTSOCK) if self.socket => self.socket = false,
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn channel(fd: OwnedFd, within: Duration) -> (StateChannel, Cancel) {
        let cancel = Cancel::new().unwrap();
        (StateChannel::new(fd, within, cancel.clone()), cancel)
    }

    fn pairs() -> [(OwnedFd, OwnedFd); 2] {
        let (a, b) = UnixStream::pair().unwrap();
        [(a.into(), b.into()), nix::unistd::pipe().unwrap()]
    }

    #[test]
    fn more_than_the_kernel_buffers_goes_through() {
        for (reading, writing) in pairs() {
            let data: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[0]).collect();
            let sent = data.clone();
            let writer = thread::spawn(move || channel(writing, LONG).0.write_all(&sent));
            let mut received = Vec::new();
            channel(reading, LONG).0.read_to_end(&mut received).unwrap();
            writer.join().unwrap().unwrap();
            assert!(received == data);
        }
    }

    #[test]
    fn a_silent_peer_and_a_full_one_run_into_the_deadline() {
        for (reading, writing) in pairs() {
            let (mut read, _) = channel(reading, Duration::from_millis(20));
            let error = read.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let (mut write, _) = channel(writing, Duration::from_millis(20));
            let error = write.write_all(&[0; 1 << 22]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
    }

    #[test]
    fn a_wait_can_be_cancelled() {
        for (reading, _writing) in pairs() {
            let (mut read, cancel) = channel(reading, LONG);
            let waiting = thread::spawn(move || read.read(&mut [0]).unwrap_err().kind());
            cancel.cancel();
            assert_eq!(waiting.join().unwrap(), io::ErrorKind::ConnectionAborted);
        }
    }

    #[test]
    fn a_wait_ends_with_a_connection() {
        for (reading, _writing) in pairs() {
            let (here, there) = UnixStream::pair().unwrap();
            (&there).write_all(b"no end").unwrap();
            let cancel = Cancel::at_end_of(here);
            assert!(!cancel.is_cancelled());
            let mut read = StateChannel::new(reading, LONG, cancel.clone());
            let waiting = thread::spawn(move || read.read(&mut [0]).unwrap_err().kind());
            drop(there);
            assert_eq!(waiting.join().unwrap(), io::ErrorKind::ConnectionAborted);
            assert!(cancel.is_cancelled());
        }
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_no_signal() {
        for (reading, writing) in pairs() {
            drop(reading);
            let (mut write, _) = channel(writing, LONG);
            let error = write.write_all(b"x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}
