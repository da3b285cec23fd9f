//! Memory as machines have it, and the computer's share in what copying costs.

use std::fs::File;

use anyhow::{Context as _, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap};

/// Bytes of one write: as much as a record of memory has.
pub(crate) const PART: usize = 256 << 10;

/// Has this computer touch twice so much memory that is free again afterwards. What is copied next is
/// written there: where the computer itself is a virtual machine, the first touch of memory that it has
/// given away costs many times what the copy costs, and falls on whoever comes first.
pub(crate) fn warm_up(bytes: usize) -> Result<()> {
    let memory = memory(2 * bytes)?;
    for part in parts(2 * bytes) {
        memory.write_slice(&[0x5a; PART], part)?;
    }
    Ok(())
}

/// New memory, in a file of its own as a machine's is.
pub(crate) fn memory(bytes: usize) -> Result<GuestMemoryMmap> {
    let file = memfd_create(c"bench", MFdFlags::MFD_CLOEXEC).context("no memory file")?;
    let file = File::from(file);
    file.set_len(bytes as u64)?;
    let range = (GuestAddress(0), bytes, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).context("memory cannot be mapped")
}

/// Where its parts begin.
pub(crate) fn parts(bytes: usize) -> impl Iterator<Item = GuestAddress> {
    (0..bytes).step_by(PART).map(|at| GuestAddress(at as u64))
}
