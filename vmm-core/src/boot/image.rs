//! An image file, read by position: a descriptor that came from elsewhere may share its
//! file offset with other processes.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::files;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What is wrong with a file, and which file it is.
///
/// The problem is part of the sentence, so the source is the problem's cause.
#[derive(Debug)]
pub struct FileError<P> {
    what: &'static str,
    name: String,
    problem: P,
}

impl<P> FileError<P> {
    pub(super) fn new(what: &'static str, name: String, problem: P) -> Self {
        Self {
            what,
            name,
            problem,
        }
    }

    /// What is wrong.
    pub fn problem(&self) -> &P {
        &self.problem
    }
}

impl<P: fmt::Display> fmt::Display for FileError<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.what, self.name, self.problem)
    }
}

impl<P: Error> Error for FileError<P> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem.source()
    }
}

/// What is copied at once: small enough to stay in the cache.
const CHUNK: usize = 256 << 10;

/// Why an image file could not be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It could not be opened or asked for its size.
    #[error("cannot be opened")]
    Open(#[source] io::Error),
    /// A directory, device or pipe.
    #[error("is no regular file")]
    NotAFile,
    /// It ends before what it says is in it.
    #[error("is truncated: {what} ends at byte {end:#x}, the file at {size:#x}")]
    Truncated {
        /// What lies beyond the end.
        what: &'static str,
        /// Where that ends, in bytes from the start.
        end: u128,
        /// Size of the file in bytes.
        size: u64,
    },
    /// Reading failed, or the file has shrunk since it was opened.
    #[error("cannot be read at byte {offset:#x}")]
    Read {
        /// Where, in bytes from the start.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was to be put where there is no RAM.
    #[error("does not fit into RAM at {address:#x}")]
    NoRam {
        /// Guest-physical address.
        address: u64,
    },
}

/// A regular file of a known size.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    size: u64,
}

impl Image {
    /// Opens a file by its path, without waiting for the writer of a pipe.
    pub(super) fn open(path: &Path) -> Result<Self, ImageError> {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = files::open(&options, path).map_err(ImageError::Open)?;
        Self::from_file(file)
    }

    pub(super) fn from_file(file: File) -> Result<Self, ImageError> {
        let metadata = file.metadata().map_err(ImageError::Open)?;
        if !metadata.is_file() {
            return Err(ImageError::NotAFile);
        }
        Ok(Self {
            file,
            size: metadata.len(),
        })
    }

    /// Size in bytes, when the file was opened.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// That `offset..offset + len` is inside of the file; `what` names it in the error.
    pub(super) fn check(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let end = u128::from(offset) + u128::from(len);
        if end > u128::from(self.size) {
            return Err(ImageError::Truncated {
                what,
                end,
                size: self.size,
            });
        }
        Ok(())
    }

    /// Fills `data` from `offset`; `what` names it in the error.
    pub(super) fn read(
        &self,
        what: &'static str,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ImageError> {
        self.check(what, offset, data.len() as u64)?;
        self.file
            .read_exact_at(data, offset)
            .map_err(|source| ImageError::Read { offset, source })
    }

    /// Copies `len` bytes from `offset` to guest-physical `address`.
    pub(super) fn copy(
        &self,
        memory: &GuestMemoryMmap<()>,
        what: &'static str,
        offset: u64,
        len: u64,
        address: u64,
    ) -> Result<(), ImageError> {
        self.check(what, offset, len)?;
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < len {
            let part = chunk(len - done);
            let bytes = &mut buffer[..part];
            self.read(what, offset + done, bytes)?;
            put(memory, bytes, address, done)?;
            done += part as u64;
        }
        Ok(())
    }
}

/// Clears `len` bytes of guest memory.
pub(super) fn clear(
    memory: &GuestMemoryMmap<()>,
    address: u64,
    len: u64,
) -> Result<(), ImageError> {
    let zeros = vec![0; chunk(len)];
    let mut done = 0;
    while done < len {
        let part = chunk(len - done);
        put(memory, &zeros[..part], address, done)?;
        done += part as u64;
    }
    Ok(())
}

fn chunk(left: u64) -> usize {
    usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK))
}

fn put(
    memory: &GuestMemoryMmap<()>,
    bytes: &[u8],
    address: u64,
    done: u64,
) -> Result<(), ImageError> {
    let no_ram = ImageError::NoRam { address };
    let Some(at) = address.checked_add(done) else {
        return Err(no_ram);
    };
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|_| no_ram)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(bytes: &[u8]) -> Image {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Image::from_file(file).unwrap()
    }

    #[test]
    fn reads_are_bounded_by_the_size() {
        let image = image(b"abcd");
        let mut data = [0; 2];
        image.read("it", 2, &mut data).unwrap();
        assert_eq!(&data, b"cd");
        let error = image.read("it", 3, &mut data).unwrap_err();
        assert_eq!(
            error.to_string(),
            "is truncated: it ends at byte 0x5, the file at 0x4"
        );
        assert!(image.check("it", u64::MAX, u64::MAX).is_err());
    }

    #[test]
    fn a_file_larger_than_a_chunk_arrives_whole() {
        let bytes: Vec<u8> = (0..CHUNK + 5).map(|i| i.to_le_bytes()[0]).collect();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        image(&bytes)
            .copy(&memory, "it", 0, bytes.len() as u64, 0x1001)
            .unwrap();
        let mut back = vec![0; bytes.len()];
        memory.read_slice(&mut back, GuestAddress(0x1001)).unwrap();
        assert!(back == bytes);
        clear(&memory, 0x1001, CHUNK as u64 + 4).unwrap();
        memory.read_slice(&mut back, GuestAddress(0x1001)).unwrap();
        assert!(back[..CHUNK + 4].iter().all(|&b| b == 0));
        assert_eq!(back[CHUNK + 4], bytes[CHUNK + 4]);
    }

    #[test]
    fn nothing_is_written_beyond_ram() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let image = image(&[1; 16]);
        for address in [0xff8, 0x1000, u64::MAX] {
            let error = image.copy(&memory, "it", 0, 16, address).unwrap_err();
            assert!(matches!(error, ImageError::NoRam { .. }), "{error:?}");
        }
        assert!(clear(&memory, 0xfff, 2).is_err());
    }

    #[test]
    fn a_directory_is_no_image() {
        let error = Image::open(Path::new("/")).unwrap_err();
        assert_eq!(error.to_string(), "is no regular file");
        let error = Image::open(Path::new("/nowhere/at/all")).unwrap_err();
        assert_eq!(error.to_string(), "cannot be opened");
    }
}
