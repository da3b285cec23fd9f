//! The initial RAM disk.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use super::image::{FileError, Image, ImageError};

const PAGE: u64 = 4096;

/// Why an initrd could not be used.
pub type InitrdError = FileError<InitrdProblem>;

/// What is wrong with an initrd.
#[derive(Debug, Error)]
pub enum InitrdProblem {
    /// The file itself.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file without content.
    #[error("is empty")]
    Empty,
    /// No room between the kernel and where the kernel or RAM ends.
    #[error("of {size:#x} bytes does not fit between the kernel's end at {low:#x} and {high:#x}")]
    TooBig {
        /// Its size in bytes.
        size: u64,
        /// First address that it may have.
        low: u64,
        /// First address that it may not have.
        high: u64,
    },
}

/// An initial RAM disk, to be loaded as often as the machine starts.
#[derive(Debug)]
pub struct Initrd {
    name: String,
    image: Image,
}

impl Initrd {
    /// Opens the initrd at `path`.
    ///
    /// # Errors
    /// The file cannot be read or is empty.
    pub fn open(path: &Path) -> Result<Self, InitrdError> {
        Self::new(path.display().to_string(), Image::open(path))
    }

    /// Takes the initrd in an open file; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_file(name: &str, file: File) -> Result<Self, InitrdError> {
        Self::new(name.to_owned(), Image::from_file(file))
    }

    fn new(name: String, image: Result<Image, ImageError>) -> Result<Self, InitrdError> {
        let problem = match image {
            Ok(image) if image.size() > 0 => return Ok(Self { name, image }),
            Ok(_) => InitrdProblem::Empty,
            Err(problem) => problem.into(),
        };
        Err(FileError::new("initrd", name, problem))
    }

    /// Copies it as high as it goes into `room`, and says where.
    pub(super) fn load(
        &self,
        memory: &GuestMemoryMmap<()>,
        room: Range<u64>,
    ) -> Result<Range<u64>, InitrdError> {
        let load = || -> Result<Range<u64>, InitrdProblem> {
            let size = self.image.size();
            let place = place(size, &room).ok_or(InitrdProblem::TooBig {
                size,
                low: room.start,
                high: room.end,
            })?;
            self.image
                .copy(memory, "the initrd", 0, size, place.start)?;
            Ok(place)
        };
        load().map_err(|problem| FileError::new("initrd", self.name.clone(), problem))
    }
}

/// The highest page-aligned place for `size` bytes within `room`.
fn place(size: u64, room: &Range<u64>) -> Option<Range<u64>> {
    let start = room.end.checked_sub(size)? / PAGE * PAGE;
    (start >= room.start).then(|| start..start + size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{file, memory};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_place_is_high_aligned_and_within_room() {
        assert_eq!(place(1, &(0x1000..0x5000)), Some(0x4000..0x4001));
        assert_eq!(place(0x1001, &(0x1000..0x5000)), Some(0x3000..0x4001));
        assert_eq!(place(0x4000, &(0x1000..0x5000)), Some(0x1000..0x5000));
        assert_eq!(place(0x4001, &(0x1000..0x5000)), None);
        assert_eq!(place(1, &(0x1001..0x1fff)), None);
        assert_eq!(place(u64::MAX, &(0x1000..0x5000)), None);
        #[expect(clippy::reversed_empty_ranges, reason = "a kernel above the limit")]
        let nothing = 0x5000..0x1000;
        assert_eq!(place(1, &nothing), None);
    }

    #[test]
    fn its_bytes_arrive() {
        let initrd = Initrd::from_file("i", file(b"cpio")).unwrap();
        let memory = memory(2);
        let at = initrd.load(&memory, 0x10_0000..0x20_0000).unwrap();
        assert_eq!(at, 0x1f_f000..0x1f_f004);
        let mut back = [0; 4];
        memory
            .read_slice(&mut back, GuestAddress(at.start))
            .unwrap();
        assert_eq!(&back, b"cpio");
    }

    #[test]
    fn errors_name_the_file_and_the_sizes() {
        let error = Initrd::from_file("i", file(b"")).unwrap_err();
        assert_eq!(error.to_string(), "initrd i is empty");
        let initrd = Initrd::from_file("i", file(&[0; 0x2000])).unwrap();
        let error = initrd.load(&memory(2), 0x10_0000..0x10_1fff).unwrap_err();
        assert_eq!(
            error.to_string(),
            "initrd i of 0x2000 bytes does not fit between the kernel's end at 0x100000 and 0x101fff"
        );
        let error = Initrd::open(Path::new("/nowhere/initrd")).unwrap_err();
        assert_eq!(error.to_string(), "initrd /nowhere/initrd cannot be opened");
    }
}
