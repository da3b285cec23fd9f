//! Plain socket streams: what the kernel carries without any work of ours.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{
    Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap,
    ReadVolatile as _, WriteVolatile as _,
};

/// Bytes of one write: as much as a record of memory has.
const PART: usize = 256 << 10;

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

/// Has this computer touch twice so much memory that is free again afterwards. What is copied next is
/// written there: where the computer itself is a virtual machine, the first touch of memory that it has
/// given away costs many times what the copy costs.
pub(super) fn warm_up(bytes: usize) -> Result<()> {
    let memory = memory(2 * bytes)?;
    for part in parts(2 * bytes) {
        memory.write_slice(&[0x5a; PART], part)?;
    }
    Ok(())
}

fn parts(bytes: usize) -> impl Iterator<Item = GuestAddress> {
    (0..bytes).step_by(PART).map(|at| GuestAddress(at as u64))
}

/// New memory, in a file of its own as a machine's is.
fn memory(bytes: usize) -> Result<GuestMemoryMmap> {
    let file = memfd_create(c"stream", MFdFlags::MFD_CLOEXEC).context("no memory file")?;
    let file = File::from(file);
    file.set_len(bytes as u64)?;
    let range = (GuestAddress(0), bytes, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).context("memory cannot be mapped")
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
