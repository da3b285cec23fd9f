//! Plain socket streams: what the kernel carries without any work of ours.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use vm_memory::{Bytes as _, GuestMemoryBackend as _, ReadVolatile as _, WriteVolatile as _};

use crate::memory::{PART, memory, parts, warm_up};

/// Sends `bytes` over so many Unix sockets, from memory that was written before into memory that is
/// new, as a destination's is; how many it were, and how long that took.
pub(super) fn carry(streams: usize, bytes: usize) -> Result<(usize, Duration)> {
    let share = bytes / streams / PART * PART;
    let mut ways = Vec::with_capacity(streams);
    for _ in 0..streams {
        let (from, to) = (memory(share)?, memory(share)?);
        for part in parts(share) {
            from.write_slice(&[0x5a; PART], part)?;
        }
        ways.push((from, to, UnixStream::pair().context("no socket pair")?));
    }
    warm_up(bytes)?;
    let begin = Instant::now();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (from, to, (mut out, mut into)) in ways {
            // Each has its socket to itself, so that the other sees it end.
            threads.push(scope.spawn(move || -> Result<()> {
                for part in parts(share) {
                    out.write_all_volatile(&from.get_slice(part, PART)?)?;
                }
                Ok(())
            }));
            threads.push(scope.spawn(move || -> Result<()> {
                for part in parts(share) {
                    into.read_exact_volatile(&mut to.get_slice(part, PART)?)?;
                }
                Ok(())
            }));
        }
        for thread in threads {
            match thread.join() {
                Ok(carried) => carried.context("a stream failed")?,
                Err(_) => bail!("a thread of a stream panicked"),
            }
        }
        Ok((share * streams, begin.elapsed()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_carried() {
        let (bytes, time) = carry(3, 4 << 20).unwrap();
        assert_eq!(bytes, 3 * 5 * PART);
        assert!(!time.is_zero());
    }
}
