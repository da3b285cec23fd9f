//! What a queue thread waits for: wake-ups, kicks, and the descriptors of its worker.
//!
//! Kicks come and go with their rings. A worker names its descriptors anew each turn, mostly the
//! same: they stay registered, and one that is ready while it is not wanted is taken out.
#![expect(unsafe_code, reason = "a worker's descriptors are kept by number")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::Source;

/// What is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The control thread wants a turn.
    Wake,
    /// A kick of the queue at this place; of an older generation, of one that was there before.
    Kick { at: usize, generation: u32 },
    /// A descriptor of the worker, by its number.
    Worker(RawFd),
}

/// Above the place in the upper half of an event's number.
const KIND: u32 = 30;

impl Token {
    pub(super) fn of(event: &EpollEvent) -> Self {
        let [a, b, c, d, low @ ..] = event.data().to_be_bytes();
        let (high, low) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes(low));
        match high >> KIND {
            0 => Token::Wake,
            1 => Token::Kick {
                at: (high & ((1 << KIND) - 1)) as usize,
                generation: low,
            },
            _ => Token::Worker(low.cast_signed()),
        }
    }

    fn data(self) -> u64 {
        let (kind, at, low) = match self {
            Token::Wake => (0, 0, 0),
            // Queues of a device are few.
            Token::Kick { at, generation } => (1, at as u64, generation),
            Token::Worker(fd) => (2, 0, fd.cast_unsigned()),
        };
        (kind << KIND | at) << 32 | u64::from(low)
    }
}

/// The descriptors of one queue thread. Any thread may change what is waited for.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: Epoll,
    wake: EventFd,
}

impl Watch {
    pub(super) fn new() -> nix::Result<Self> {
        let watch = Watch {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        };
        watch.add(&watch.wake, EpollFlags::EPOLLIN, Token::Wake)?;
        Ok(watch)
    }

    /// Ends the wait, or the next one.
    pub(super) fn wake(&self) {
        // It fails only when the counter is full: then it is awake.
        let _ = self.wake.write(1);
    }

    /// The wake-up was seen.
    pub(super) fn woken(&self) {
        let _ = self.wake.read();
    }

    pub(super) fn add(&self, fd: impl AsFd, flags: EpollFlags, token: Token) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(flags, token.data()))
    }

    /// Waits for it no longer. It was waited for, or could not be.
    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = self.epoll.delete(fd);
    }

    /// Waits for a worker's descriptor with other flags than before, none of which may be left.
    fn change(&self, fd: BorrowedFd<'_>, from: EpollFlags, to: EpollFlags) -> nix::Result<()> {
        let token = Token::Worker(fd.as_raw_fd());
        if from.is_empty() {
            self.add(fd, to, token)
        } else if to.is_empty() {
            self.epoll.delete(fd)
        } else {
            let mut event = EpollEvent::new(to, token.data());
            self.epoll.modify(fd, &mut event)
        }
    }

    /// The number of events, none when the wait was interrupted.
    pub(super) fn wait(&self, events: &mut [EpollEvent], at_once: bool) -> nix::Result<usize> {
        let timeout = if at_once {
            EpollTimeout::ZERO
        } else {
            EpollTimeout::NONE
        };
        match self.epoll.wait(events, timeout) {
            Err(Errno::EINTR) => Ok(0),
            result => result,
        }
    }
}

#[derive(Debug)]
struct Entry {
    source: Source,
    fd: RawFd,
    flags: EpollFlags,
    wanted: bool,
}

/// The worker's descriptors that are waited for. One of them may be several sources.
#[derive(Debug, Default)]
pub(crate) struct Followed(Vec<Entry>);

impl Followed {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The source at this place, and whether it is wanted, if these are its descriptor and flags.
    pub(super) fn hit(&self, at: usize, fd: RawFd, flags: EpollFlags) -> Option<(Source, bool)> {
        let always = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        let entry = &self.0[at];
        (entry.fd == fd && flags.intersects(entry.flags | always))
            .then_some((entry.source, entry.wanted))
    }

    /// Waits no longer for the source at this place.
    pub(super) fn forget(&mut self, at: usize, watch: &Watch) -> nix::Result<()> {
        let from = self.flags_of(self.0[at].fd);
        let fd = self.0.swap_remove(at).fd;
        // SAFETY: by the contract of `Worker::wait_for` it is open as long as the worker lives,
        // which lives as long as this.
        let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
        watch.change(descriptor, from, self.flags_of(fd))
    }

    fn flags_of(&self, fd: RawFd) -> EpollFlags {
        let entries = self.0.iter().filter(|entry| entry.fd == fd);
        entries.fold(EpollFlags::empty(), |flags, entry| flags | entry.flags)
    }
}

/// The descriptors that a worker waits for, besides kicks.
#[derive(Debug)]
pub struct Interest<'a> {
    watch: &'a Watch,
    followed: &'a mut Followed,
    failed: Option<Errno>,
}

impl<'a> Interest<'a> {
    pub(super) fn new(watch: &'a Watch, followed: &'a mut Followed) -> Self {
        for entry in &mut followed.0 {
            entry.wanted = false;
        }
        Interest {
            watch,
            followed,
            failed: None,
        }
    }

    /// Waits until `fd` can be read.
    pub fn readable(&mut self, source: Source, fd: BorrowedFd<'_>) {
        self.want(source, fd, EpollFlags::EPOLLIN);
    }

    /// Waits until `fd` can be written.
    pub fn writable(&mut self, source: Source, fd: BorrowedFd<'_>) {
        self.want(source, fd, EpollFlags::EPOLLOUT);
    }

    fn want(&mut self, source: Source, fd: BorrowedFd<'_>, flags: EpollFlags) {
        let entries = &mut self.followed.0;
        if let Some(entry) = entries.iter_mut().find(|entry| entry.source == source) {
            debug_assert_eq!((entry.fd, entry.flags), (fd.as_raw_fd(), flags));
            entry.wanted = true;
            return;
        }
        let from = self.followed.flags_of(fd.as_raw_fd());
        if let Err(errno) = self.watch.change(fd, from, from | flags) {
            self.failed = Some(errno);
            return;
        }
        self.followed.0.push(Entry {
            source,
            fd: fd.as_raw_fd(),
            flags,
            wanted: true,
        });
    }

    /// Whether all can be waited for.
    pub(super) fn end(self) -> nix::Result<()> {
        self.failed.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn tokens_come_back_from_their_numbers() {
        for token in [
            Token::Wake,
            Token::Kick {
                at: 127,
                generation: u32::MAX,
            },
            Token::Worker(1023),
        ] {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token.data());
            assert_eq!(Token::of(&event), token);
        }
    }

    #[test]
    fn a_source_that_is_not_wanted_any_more_is_taken_out_and_comes_back() {
        let watch = Watch::new().unwrap();
        let mut followed = Followed::default();
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut events = [EpollEvent::empty(); 4];
        let look = |events: &mut [EpollEvent]| watch.wait(events, true).unwrap();

        let mut interest = Interest::new(&watch, &mut followed);
        interest.readable(Source(0), reader.as_fd());
        interest.writable(Source(1), reader.as_fd());
        interest.end().unwrap();
        assert_eq!(look(&mut events), 1);
        let fd = reader.as_raw_fd();
        assert_eq!(Token::of(&events[0]), Token::Worker(fd));
        assert_eq!(followed.hit(0, fd, events[0].events()), None);
        let hit = followed.hit(1, fd, events[0].events());
        assert_eq!(hit, Some((Source(1), true)));

        // Only reading is wanted: writing is still seen once, and not again.
        let mut interest = Interest::new(&watch, &mut followed);
        interest.readable(Source(0), reader.as_fd());
        interest.end().unwrap();
        assert_eq!(look(&mut events), 1);
        let hit = followed.hit(1, fd, events[0].events());
        assert_eq!(hit, Some((Source(1), false)));
        followed.forget(1, &watch).unwrap();
        assert_eq!(look(&mut events), 0);
        (&writer).write_all(b"x").unwrap();
        assert_eq!(look(&mut events), 1);
        followed.forget(0, &watch).unwrap();
        assert_eq!(look(&mut events), 0);

        let mut interest = Interest::new(&watch, &mut followed);
        interest.readable(Source(0), reader.as_fd());
        interest.end().unwrap();
        assert_eq!(look(&mut events), 1);
    }
}
