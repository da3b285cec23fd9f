//! Between a person and a machine's console.
//!
//! ```text
//! stdin ──► escape? ──► socket        socket ──► stdout
//! ```
//! One thread moves both directions and waits in poll(2). stdin and stdout stay blocking: they
//! may be shared with other programs, and a file has no other mode. While it runs, a terminal is
//! in raw mode and Ctrl-C is a key of the guest; signals from outside end it properly.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Failure, Result};
use crate::job::Interrupts;
use crate::render;
use crate::terminal::Raw;
use crate::value::Escape;

/// Bytes moved at once.
const CHUNK: usize = 4096;
/// Most bytes that wait for the guest to read them.
const MAX_WAITING: usize = 64 << 10;

/// Why the console was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The person pressed the escape key.
    Escaped,
    /// The machine's end was closed.
    Closed,
    /// This program was asked to end.
    Interrupted,
}

/// How long the thread may take to end when it was asked to.
const STOP_DEADLINE: Duration = Duration::from_secs(1);

/// Connects stdin and stdout to a console until one of them is left.
///
/// Without `input` nothing is sent, but the escape key works.
///
/// # Errors
/// A descriptor fails.
pub async fn attach(console: OwnedFd, escape: Escape, input: bool) -> Result<Left> {
    let socket = UnixStream::from(console);
    socket.set_nonblocking(true).map_err(failed)?;
    let (stop, stopped) = UnixStream::pair().map_err(failed)?;
    let mut interrupts = Interrupts::new()?;
    let mut relay = tokio::task::spawn_blocking(move || {
        let stdin = io::stdin();
        let raw = Raw::enter(&stdin).map_err(failed)?;
        let relay = Relay {
            stdin: stdin.as_fd(),
            socket: &socket,
            stopped: stopped.as_fd(),
            // A file or a pipe may hold any byte.
            escape: raw.is_some().then_some(escape.0),
            input,
        };
        relay.run()
    });
    tokio::select! {
        left = &mut relay => return joined(left),
        _ = interrupts.next() => {}
    }
    drop(stop);
    // It may hang in writing to a terminal that was stopped.
    match tokio::time::timeout(STOP_DEADLINE, relay).await {
        Ok(left) => joined(left),
        Err(_) => Ok(Left::Interrupted),
    }
}

fn joined(left: std::result::Result<Result<Left>, tokio::task::JoinError>) -> Result<Left> {
    left.unwrap_or_else(|error| Err(failed(io::Error::other(error))))
}

fn failed(error: impl Into<io::Error>) -> Failure {
    Failure::io("the console fails")(error.into())
}

/// Moves bytes both ways.
struct Relay<'a> {
    stdin: BorrowedFd<'a>,
    socket: &'a UnixStream,
    /// It is readable when this has to end.
    stopped: BorrowedFd<'a>,
    /// The key that leaves, where stdin is a terminal.
    escape: Option<u8>,
    /// What is typed is sent.
    input: bool,
}

impl Relay<'_> {
    fn run(&self) -> Result<Left> {
        let mut waiting = Vec::new();
        let mut listens = self.input || self.escape.is_some();
        loop {
            // A person must always be heard; a file can wait for the guest.
            let listens_now = listens && (self.escape.is_some() || waiting.len() < MAX_WAITING);
            let [socket, stopped, stdin] = self.wait(!waiting.is_empty(), listens_now)?;
            if !stopped.is_empty() {
                return Ok(Left::Interrupted);
            }
            if socket.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                && !self.bring_out()?
            {
                return Ok(Left::Closed);
            }
            if !stdin.is_empty() {
                match self.take_in(&mut waiting)? {
                    Typed::Text => {}
                    Typed::End => listens = false,
                    Typed::Escape => {
                        // What was typed before it is meant for the guest.
                        self.send(&mut waiting)?;
                        return Ok(Left::Escaped);
                    }
                }
            }
            self.send(&mut waiting)?;
        }
    }

    /// Waits until something can be done: of the socket, the stop, stdin.
    fn wait(&self, sends: bool, listens: bool) -> Result<[PollFlags; 3]> {
        let mut of_socket = PollFlags::POLLIN;
        of_socket.set(PollFlags::POLLOUT, sends);
        let mut fds = vec![
            PollFd::new(self.socket.as_fd(), of_socket),
            PollFd::new(self.stopped, PollFlags::POLLIN),
        ];
        if listens {
            fds.push(PollFd::new(self.stdin, PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let happened = |at: usize| {
            fds.get(at)
                .and_then(PollFd::revents)
                .unwrap_or(PollFlags::empty())
        };
        Ok([happened(0), happened(1), happened(2)])
    }

    /// Prints what the guest printed; whether there may be more.
    fn bring_out(&self) -> Result<bool> {
        let mut bytes = [0; CHUNK];
        let mut socket = self.socket;
        match socket.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => render::write(&bytes[..count]).map(|()| true),
            Err(error) if is_transient(&error) => Ok(true),
            // The other end went away with bytes that it never read.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Takes what was typed.
    fn take_in(&self, waiting: &mut Vec<u8>) -> Result<Typed> {
        let mut bytes = [0; CHUNK];
        let count = match nix::unistd::read(self.stdin, &mut bytes) {
            Ok(count) => count,
            Err(Errno::EINTR | Errno::EAGAIN) => return Ok(Typed::Text),
            // The terminal is gone.
            Err(Errno::EIO) => 0,
            Err(errno) => return Err(failed(errno)),
        };
        let typed = &bytes[..count];
        let end = self
            .escape
            .and_then(|escape| typed.iter().position(|&byte| byte == escape));
        if self.input {
            let text = &typed[..end.unwrap_or(count)];
            let room = match self.escape {
                // A guest that does not read loses what is typed.
                Some(_) => MAX_WAITING.saturating_sub(waiting.len()),
                None => text.len(),
            };
            waiting.extend_from_slice(&text[..text.len().min(room)]);
        }
        Ok(match end {
            Some(_) => Typed::Escape,
            None if count == 0 => Typed::End,
            None => Typed::Text,
        })
    }

    /// Sends what the guest takes now.
    fn send(&self, waiting: &mut Vec<u8>) -> Result<()> {
        let mut socket = self.socket;
        while !waiting.is_empty() {
            match socket.write(waiting) {
                Ok(count) => drop(waiting.drain(..count)),
                Err(error) if is_transient(&error) => return Ok(()),
                // The end of the output is what tells that it is over.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => waiting.clear(),
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }
}

enum Typed {
    Text,
    End,
    Escape,
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bed {
        keys: UnixStream,
        stdin: UnixStream,
        guest: UnixStream,
        socket: UnixStream,
        stop: Option<UnixStream>,
        stopped: UnixStream,
    }

    fn bed() -> Bed {
        let (keys, stdin) = UnixStream::pair().unwrap();
        let (guest, socket) = UnixStream::pair().unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        Bed {
            keys,
            stdin,
            guest,
            socket,
            stop: Some(stop),
            stopped,
        }
    }

    impl Bed {
        fn run(&self, escape: Option<u8>, input: bool) -> Left {
            let relay = Relay {
                stdin: self.stdin.as_fd(),
                socket: &self.socket,
                stopped: self.stopped.as_fd(),
                escape,
                input,
            };
            relay.run().unwrap()
        }

        fn received(mut self) -> String {
            drop(self.socket);
            let mut text = String::new();
            self.guest.read_to_string(&mut text).unwrap();
            text
        }
    }

    #[test]
    fn what_is_typed_before_the_escape_reaches_the_guest() {
        let mut bed = bed();
        bed.keys.write_all(b"stop\n\x1dnever").unwrap();
        assert_eq!(bed.run(Some(0x1d), true), Left::Escaped);
        assert_eq!(bed.received(), "stop\n");
    }

    #[test]
    fn a_reader_sends_nothing_and_can_leave() {
        let mut bed = bed();
        bed.keys.write_all(b"stop\n\x1d").unwrap();
        assert_eq!(bed.run(Some(0x1d), false), Left::Escaped);
        assert_eq!(bed.received(), "");
    }

    #[test]
    fn a_file_has_no_escape_and_its_end_is_not_the_end() {
        let mut bed = bed();
        bed.keys.write_all(b"a\x1db").unwrap();
        bed.keys.shutdown(std::net::Shutdown::Write).unwrap();
        let mut guest = bed.guest.try_clone().unwrap();
        let ender = std::thread::spawn(move || {
            let mut bytes = [0; 3];
            guest.read_exact(&mut bytes).unwrap();
            guest.shutdown(std::net::Shutdown::Both).unwrap();
            bytes
        });
        assert_eq!(bed.run(None, true), Left::Closed);
        assert_eq!(&ender.join().unwrap(), b"a\x1db");
    }

    #[test]
    fn it_ends_when_it_is_asked_to() {
        let mut bed = bed();
        drop(bed.stop.take());
        assert_eq!(bed.run(None, true), Left::Interrupted);
    }

    #[test]
    fn a_guest_that_does_not_read_holds_nobody() {
        let mut bed = bed();
        let keys = vec![b'x'; 4 << 20];
        let mut typist = bed.keys.try_clone().unwrap();
        let typist = std::thread::spawn(move || {
            typist.write_all(&keys).unwrap();
            typist.write_all(b"\x1d").unwrap();
        });
        assert_eq!(bed.run(Some(0x1d), true), Left::Escaped);
        typist.join().unwrap();
        bed.keys.flush().unwrap();
    }
}
