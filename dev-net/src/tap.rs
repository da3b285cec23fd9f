//! A tap interface and its queues.
//!
//! A queue of a tap is a descriptor; each serves one queue pair of the device. A queue can be
//! detached: it stays open, and the kernel gives it no packet. Two facts rule when that is done:
//! - what a queue still held is lost when it is detached, so this is done when the driver does not
//!   use a pair, never because a ring stops;
//! - detaching takes a grace period of the kernel (milliseconds, under a lock that all interfaces
//!   share), attaching takes microseconds. So queues stay attached as they are opened, and those
//!   that are not used are detached once it is known which those are.
//!
//! Queues are attached in ascending order and detached in descending order: the kernel fills the
//! place of a detached queue with the last one, and their order would change otherwise.
#![expect(unsafe_code, reason = "ioctls and vectored I/O on a tap")]

mod ioctl;
mod open;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

pub(crate) use self::ioctl::IOCTLS;
pub(crate) use self::open::TapError;
use crate::features::Offloads;

/// Most queue pairs of a device.
pub(crate) const MAX_PAIRS: u16 = 32;

/// An open tap.
#[derive(Debug)]
pub(crate) struct Tap {
    name: String,
    queues: Vec<TapQueue>,
    possible: Offloads,
}

/// One queue of a tap.
#[derive(Debug)]
pub(crate) struct TapQueue {
    fd: OwnedFd,
    state: Mutex<QueueState>,
}

#[derive(Clone, Copy, Debug)]
struct QueueState {
    attached: bool,
    /// Its pair is served, at the wish of a front-end that has the control queue itself.
    claimed: bool,
}

/// How a read or a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// A packet of so many bytes, its header included, passed.
    Done(usize),
    /// There is no packet, or no room for one.
    WouldBlock,
    /// The kernel refused this packet; it is gone.
    Refused,
}

impl Tap {
    /// The interface's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues, which is that of the device's queue pairs.
    pub(crate) fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(MAX_PAIRS)
    }

    /// What may be left to the receiver of its packets.
    pub(crate) fn possible_offloads(&self) -> Offloads {
        self.possible
    }

    /// The queue of a pair, which is less than [`Tap::pairs`].
    pub(crate) fn queue(&self, pair: u16) -> &TapQueue {
        &self.queues[usize::from(pair)]
    }

    /// Leaves these to the guest, and does the others before a packet comes here.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        ioctl::set_offloads(self.queues[0].as_fd(), offloads)
    }

    /// Bytes of the virtio header before each packet.
    pub(crate) fn set_header_len(&self, len: usize) -> io::Result<()> {
        ioctl::set_header_len(self.queues[0].as_fd(), len)
    }

    /// Attaches the first `pairs` queues.
    pub(crate) fn attach(&self, pairs: u16) -> io::Result<()> {
        let mut used = self.queues.iter().take(usize::from(pairs));
        used.try_for_each(|queue| queue.set_attached(&mut queue.lock(), true))
    }

    /// Detaches all but the first `pairs` queues.
    pub(crate) fn detach_after(&self, pairs: u16) -> io::Result<()> {
        let mut idle = self.queues.iter().skip(usize::from(pairs)).rev();
        idle.try_for_each(|queue| queue.set_attached(&mut queue.lock(), false))
    }

    /// Detaches all queues that nobody claimed.
    pub(crate) fn detach_unclaimed(&self) -> io::Result<()> {
        for queue in self.queues.iter().rev() {
            let mut state = queue.lock();
            if !state.claimed {
                queue.set_attached(&mut state, false)?;
            }
        }
        Ok(())
    }

    /// Forgets all claims.
    pub(crate) fn release_claims(&self) {
        for queue in &self.queues {
            queue.lock().claimed = false;
        }
    }
}

impl TapQueue {
    fn new(fd: OwnedFd, attached: bool) -> TapQueue {
        let claimed = false;
        TapQueue {
            fd,
            state: Mutex::new(QueueState { attached, claimed }),
        }
    }

    /// Attaches it, and keeps it attached until the claims are released.
    pub(crate) fn claim(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.claimed = true;
        self.set_attached(&mut state, true)
    }

    fn set_attached(&self, state: &mut QueueState, wanted: bool) -> io::Result<()> {
        if state.attached != wanted {
            ioctl::set_queue_attached(self.as_fd(), wanted)?;
            state.attached = wanted;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next packet, its header first. What the vectors have no room for is cut off.
    ///
    /// # Errors
    /// When the tap is gone or broken: no packet will come from it any more.
    ///
    /// # Safety
    /// The vectors are memory that may be written, by anyone and at any time, until this returns.
    pub(crate) unsafe fn read(&self, vectors: &[libc::iovec]) -> io::Result<Transfer> {
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        outcome(|| {
            // SAFETY: the caller vouches for the vectors, and the count is theirs.
            unsafe { libc::readv(self.fd.as_raw_fd(), vectors.as_ptr(), count) }
        })
    }

    /// Sends one packet, its header first.
    ///
    /// # Errors
    /// When the tap is gone or broken: it will take no packet any more.
    ///
    /// # Safety
    /// The vectors are memory that may be read until this returns.
    pub(crate) unsafe fn write(&self, vectors: &[libc::iovec]) -> io::Result<Transfer> {
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        outcome(|| {
            // SAFETY: the caller vouches for the vectors, and the count is theirs.
            unsafe { libc::writev(self.fd.as_raw_fd(), vectors.as_ptr(), count) }
        })
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn outcome(mut call: impl FnMut() -> isize) -> io::Result<Transfer> {
    loop {
        if let Ok(len) = usize::try_from(call()) {
            return Ok(Transfer::Done(len));
        }
        match Errno::last() {
            Errno::EINTR => {}
            Errno::EAGAIN => return Ok(Transfer::WouldBlock),
            // The interface was deleted.
            Errno::EBADFD => return Err(Errno::EBADFD.into()),
            // A descriptor that is no tap's: ours, so never.
            Errno::EBADF => return Err(Errno::EBADF.into()),
            // An interface that is down (EIO), a header that makes no sense (EINVAL), memory that
            // the front-end cut off (EFAULT), no memory for the packet (ENOMEM): the next packet
            // may pass.
            _ => return Ok(Transfer::Refused),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tap_that_is_gone_is_an_error() {
        let cases = [
            (Errno::EAGAIN, Some(Transfer::WouldBlock)),
            (Errno::EIO, Some(Transfer::Refused)),
            (Errno::EINVAL, Some(Transfer::Refused)),
            (Errno::EBADFD, None),
        ];
        for (errno, expected) in cases {
            let result = outcome(|| {
                errno.set();
                -1
            });
            assert_eq!(result.ok(), expected, "{errno}");
        }
        let mut calls = 0;
        let result = outcome(|| {
            calls += 1;
            Errno::EINTR.set();
            if calls < 3 { -1 } else { 60 }
        });
        assert_eq!(result.unwrap(), Transfer::Done(60));
    }
}
