//! Holes of guest memory: pages that nobody has written since the machine began or since they were
//! given back. They read as zero, and would become real by being read.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::{PAGE, WORD_PAGES};
use crate::memory::{Memory, Region};

/// Finds holes, from the first page to the last.
///
/// To find the end of a stretch of data takes as long as the stretch is, so each is measured once,
/// however many pieces of it are asked for. What becomes a hole meanwhile counts as data.
#[derive(Debug, Default)]
pub(super) struct Holes {
    /// The last stretch of data, in guest-physical addresses.
    data: Range<u64>,
}

impl Holes {
    /// Of the pages `words`, from page `first` on, those that are holes. Right only for pages whose
    /// writes from now on are noted.
    pub(super) fn among(
        &mut self,
        memory: &Memory,
        first: u64,
        words: &[u64],
    ) -> io::Result<Vec<u64>> {
        let regions = memory.regions();
        let start = first * PAGE;
        let of = |region: &&Region| (region.gpa()..region.gpa() + region.size()).contains(&start);
        let Some(region) = regions.iter().find(of) else {
            return Ok(vec![0; words.len()]);
        };
        let pages = words.len() as u64 * WORD_PAGES;
        let end = (start + pages * PAGE).min(region.gpa() + region.size());
        let mut holes = words.to_vec();
        let mut at = start;
        while at < end {
            if !self.data.contains(&at) {
                let Some(data) = next_data(region, at..end)? else {
                    break;
                };
                self.data = data;
            }
            let data = self.data.start.max(at)..self.data.end.min(end);
            for page in data.start / PAGE..data.end.div_ceil(PAGE) {
                let page = page - first;
                if let Ok(word) = usize::try_from(page / WORD_PAGES) {
                    holes[word] &= !(1 << (page % WORD_PAGES));
                }
            }
            at = self.data.end;
        }
        Ok(holes)
    }

    /// Measures anew what is asked for from now on.
    pub(super) fn forget(&mut self) {
        self.data = 0..0;
    }
}

/// The first stretch of data that begins within these guest-physical addresses, to its end within the
/// region.
fn next_data(region: &Region, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let file = region.file();
    let in_file = |gpa: u64| region.offset() + (gpa - region.gpa());
    let in_guest = |offset: u64| region.gpa() + (offset - region.offset());
    let start = match seek(file, in_file(within.start), Whence::SeekData) {
        Ok(data) => in_guest(data),
        Err(Errno::ENXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if start >= within.end {
        return Ok(None);
    }
    let end = in_guest(seek(file, in_file(start), Whence::SeekHole)?);
    Ok(Some(start..end.min(region.gpa() + region.size())))
}

fn seek(file: &File, at: u64, whence: Whence) -> nix::Result<u64> {
    let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
    let found = lseek(file, at, whence)?;
    u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::sync::Arc;

    use nix::fcntl::{FallocateFlags, fallocate};

    use super::*;
    use crate::memory::Ram;

    const HIGH: u64 = (1 << 32) / PAGE;

    /// 128 pages at 0 and 64 at 4 GiB, of which these pages of the file are written.
    fn memory(written: &[u64]) -> (Memory, Arc<File>) {
        let ram = Ram::allocate(192 * PAGE, None).unwrap();
        let file = Arc::clone(ram.file());
        write(&file, written);
        let memory = Memory::default();
        let mut layout = memory.begin();
        for (gpa, pages, offset) in [(0, 128, 0), (HIGH * PAGE, 64, 128)] {
            let size = pages * PAGE;
            let region = Region::map(gpa, size, Arc::clone(&file), offset * PAGE).unwrap();
            layout.add(region).unwrap();
        }
        layout.commit().unwrap();
        (memory, file)
    }

    fn write(file: &File, pages: &[u64]) {
        for page in pages {
            file.write_all_at(&[1], page * PAGE).unwrap();
        }
    }

    #[test]
    fn what_was_asked_for_and_never_written_is_a_hole() {
        let (memory, _) = memory(&[1, 64]);
        let mut holes = Holes::default();
        let found = holes.among(&memory, 0, &[0b1011, 0b11]).unwrap();
        assert_eq!(found, [0b1001, 0b10]);
    }

    #[test]
    fn data_that_goes_over_several_pieces_and_regions_is_none() {
        let (memory, _) = memory(&(60..140).collect::<Vec<_>>());
        let mut holes = Holes::default();
        for (first, found) in [(0, !0 >> 4), (64, 0), (HIGH, !0 << 12)] {
            assert_eq!(holes.among(&memory, first, &[!0]).unwrap(), [found]);
        }
    }

    #[test]
    fn a_hole_that_is_written_before_it_is_asked_for_is_none() {
        let (memory, file) = memory(&[127]);
        let mut holes = Holes::default();
        assert_eq!(holes.among(&memory, 0, &[!0]).unwrap(), [!0]);
        write(&file, &[66]);
        let found = holes.among(&memory, 64, &[!0]).unwrap();
        assert_eq!(found, [!(1 << 2 | 1 << 63)]);
    }

    #[test]
    fn what_is_given_back_is_a_hole_when_it_is_measured_anew() {
        let (memory, file) = memory(&(0..128).collect::<Vec<_>>());
        let mut holes = Holes::default();
        assert_eq!(holes.among(&memory, 0, &[!0]).unwrap(), [0]);
        let given_back = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let half = 64 * i64::try_from(PAGE).unwrap();
        fallocate(&*file, given_back, half, half).unwrap();
        assert_eq!(
            holes.among(&memory, 64, &[!0]).unwrap(),
            [0],
            "as it was measured"
        );
        holes.forget();
        assert_eq!(holes.among(&memory, 64, &[!0]).unwrap(), [!0]);
    }

    #[test]
    fn what_is_no_memory_is_no_hole() {
        let (memory, _) = memory(&[]);
        assert_eq!(Holes::default().among(&memory, 128, &[!0]).unwrap(), [0]);
    }
}
