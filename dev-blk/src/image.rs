//! The raw image: opened and examined before the sandbox, locked while the machine is here.
#![expect(unsafe_code, reason = "ioctl and locks on the image")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::thread;
use std::time::{Duration, Instant};

use device_kit::OptionError;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

use crate::config::{Lock, Options, SECTOR};

nix::ioctl_read!(block_device_size, 0x12, 114, u64);
nix::ioctl_read_bad!(
    block_device_sector,
    nix::request_code_none!(0x12, 104),
    libc::c_int
);

/// An open image and what it can do.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    /// The option that named it, and its value.
    named: (&'static str, String),
    locked: Lock,
    sectors: u64,
    block_size: u32,
    read_only: bool,
    discard: bool,
    write_zeroes: bool,
}

impl Image {
    /// Opens the image that the options name.
    pub(crate) fn open(options: &Options) -> Result<Self, OptionError> {
        let (option, value, file) = match (&options.source.blk_file, options.source.blk_fd) {
            (Some(path), _) => {
                let value = path.display().to_string();
                let file = OpenOptions::new()
                    .read(true)
                    .write(!options.read_only)
                    .open(path)
                    .map_err(|error| cannot_open(&value, options.read_only, &error))?;
                ("--blk-file", value, file)
            }
            (None, fd) => {
                let fd = fd.unwrap_or(-1);
                let file = device_kit::adopt(fd).map(File::from);
                let file = file.ok_or_else(|| OptionError {
                    option: "--blk-fd",
                    value: fd.to_string(),
                    problem: "is no open descriptor above 2; hand over an open image".to_owned(),
                })?;
                // Its path, where there is one, says more to a person.
                let path = std::fs::read_link(format!("/proc/self/fd/{fd}"));
                let value = path.map_or(fd.to_string(), |path| path.display().to_string());
                ("--blk-fd", value, file)
            }
        };
        let named = (option, value.clone());
        examine(file, named, options).map_err(|problem| OptionError {
            option,
            value,
            problem,
        })
    }

    /// Takes an open-file-description lock on the whole image, if it is to be locked: it lives as
    /// long as the open file does, and ends with this process however that ends.
    ///
    /// A process that was killed may hold its lock a moment longer than it lives: the kernel takes
    /// its io_uring instances apart, and with them their hold on the image, when it finds the time.
    /// So a lock that is taken is asked for again for as long as `patience`.
    pub(crate) fn lock(&self, patience: Duration) -> Result<(), OptionError> {
        let kind = if self.read_only {
            libc::F_RDLCK
        } else {
            libc::F_WRLCK
        };
        let deadline = Instant::now() + patience;
        let answer = loop {
            match self.set_lock(kind) {
                Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                answer => break answer,
            }
        };
        answer.map_err(|error| {
            self.problem(match error {
                Errno::EAGAIN | Errno::EACCES => {
                    "is locked by another process; stop the machine that uses it, or use \
                     --read-only in both"
                        .to_owned()
                }
                error => {
                    format!("cannot be locked: {error}; use --lock=off where nothing else uses it")
                }
            })
        })
    }

    /// Gives the lock up.
    pub(crate) fn unlock(&self) -> Result<(), OptionError> {
        self.set_lock(libc::F_UNLCK)
            .map_err(|error| self.problem(format!("cannot be unlocked: {error}; end this process")))
    }

    fn set_lock(&self, kind: libc::c_int) -> Result<(), Errno> {
        if self.locked == Lock::Off {
            return Ok(());
        }
        let range = libc::flock {
            l_type: i16::try_from(kind).unwrap_or_default(),
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range)).map(drop)
    }

    fn problem(&self, problem: String) -> OptionError {
        let (option, value) = self.named.clone();
        OptionError {
            option,
            value,
            problem,
        }
    }

    /// The descriptor, for io_uring.
    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Its size in sectors of 512 bytes.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The smallest block that can be read or written, in bytes.
    pub(crate) fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks of what is written without reading first, as a power of two: 4 KiB.
    pub(crate) fn physical_block_exponent(&self) -> u8 {
        (4096 / self.block_size.min(4096))
            .ilog2()
            .try_into()
            .unwrap_or(0)
    }

    /// Whether the guest may only read.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether ranges can be given back to the host.
    pub(crate) fn can_discard(&self) -> bool {
        self.discard
    }

    /// Whether ranges can be zeroed without writing them.
    pub(crate) fn can_write_zeroes(&self) -> bool {
        self.write_zeroes
    }
}

fn cannot_open(value: &str, read_only: bool, error: &io::Error) -> OptionError {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => "create it first, for example with truncate --size=1G",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
            "allow writing to it, or use --read-only"
        }
        _ => "give a raw image or a block device",
    };
    OptionError {
        option: "--blk-file",
        value: value.to_owned(),
        problem: format!("cannot be opened: {error}; {hint}"),
    }
}

fn examine(file: File, named: (&'static str, String), options: &Options) -> Result<Image, String> {
    let read_only = options.read_only;
    check_mode(&file, read_only)?;
    let metadata = file
        .metadata()
        .map_err(|error| format!("cannot be examined: {error}"))?;
    let kind = metadata.file_type();
    let (size, block_size) = if kind.is_block_device() {
        block_device(&file).map_err(|error| format!("cannot be examined: {error}"))?
    } else if kind.is_file() {
        // The guest's smallest block stays 512 bytes, whatever lies below the page cache.
        (metadata.size(), 512)
    } else {
        return Err("is neither a file nor a block device; give a raw image".to_owned());
    };
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(format!(
            "is {size} bytes long, which is no whole number of {SECTOR}-byte sectors; it may be \
             truncated, or no raw image"
        ));
    }
    let can = |mode| !read_only && (kind.is_block_device() || probe(&file, size, mode));
    Ok(Image {
        sectors: size / SECTOR,
        block_size,
        read_only,
        discard: can(FallocateFlags::FALLOC_FL_PUNCH_HOLE),
        write_zeroes: can(FallocateFlags::FALLOC_FL_ZERO_RANGE),
        named,
        locked: options.lock,
        file,
    })
}

/// An image that was handed over is open as it needs to be.
fn check_mode(file: &File, read_only: bool) -> Result<(), String> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|error| format!("is unusable: {error}"))?;
    match flags & libc::O_ACCMODE {
        libc::O_RDWR => Ok(()),
        libc::O_RDONLY if read_only => Ok(()),
        libc::O_RDONLY => Err("is open for reading only; use --read-only".to_owned()),
        _ => Err("is not open for reading; open it for reading and writing".to_owned()),
    }
    .and_then(|()| {
        if flags & OFlag::O_APPEND.bits() != 0 {
            return Err("is open for appending; open it without O_APPEND".to_owned());
        }
        Ok(())
    })
}

fn block_device(file: &File) -> Result<(u64, u32), Errno> {
    let mut size = 0;
    let mut sector = 0;
    // SAFETY: the request fills one u64.
    unsafe { block_device_size(file.as_raw_fd(), &raw mut size) }?;
    // SAFETY: the request fills one int.
    unsafe { block_device_sector(file.as_raw_fd(), &raw mut sector) }?;
    let sector = u32::try_from(sector).ok().filter(|size| *size >= 512);
    Ok((size, sector.unwrap_or(512)))
}

/// Whether the file system can do this, tried past the end of the image where nothing is.
fn probe(file: &File, size: u64, mode: FallocateFlags) -> bool {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let Ok(end) = i64::try_from(size) else {
        return false;
    };
    let works = fallocate(file, mode | keep, end, 4096).is_ok();
    if works && mode != FallocateFlags::FALLOC_FL_PUNCH_HOLE {
        // What the probe may have allocated is given back; if not, it is one block.
        let _ = fallocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep, end, 4096);
    }
    works
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Serial, Source};

    const LONG: Duration = Duration::from_secs(60);

    fn options(path: &Path, read_only: bool) -> Options {
        Options {
            source: Source {
                blk_file: Some(path.to_owned()),
                blk_fd: None,
            },
            read_only,
            num_queues: 1,
            queue_size: 128,
            serial: Serial([0; 20]),
            lock: Lock::On,
        }
    }

    fn image(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn a_second_writer_is_refused_and_readers_share() {
        let file = image(4096);
        let open = |read_only| Image::open(&options(file.path(), read_only)).unwrap();
        let (writer, other, reader) = (open(false), open(false), open(true));
        writer.lock(LONG).unwrap();
        let error = other.lock(Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("is locked by another process"), "{error}");
        assert!(reader.lock(Duration::ZERO).is_err());
        writer.unlock().unwrap();
        reader.lock(LONG).unwrap();
        open(true).lock(LONG).unwrap();
        assert!(other.lock(Duration::ZERO).is_err());
        drop(reader);
        other.lock(LONG).unwrap();
        drop(other);
        writer.lock(LONG).unwrap();
    }

    #[test]
    fn sizes_that_are_no_sectors_are_refused() {
        for len in [0, 1, 511, 513] {
            let file = image(len);
            let error = Image::open(&options(file.path(), false))
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("is {len} bytes long")), "{error}");
        }
        let file = image(1536);
        assert_eq!(
            Image::open(&options(file.path(), false)).unwrap().sectors(),
            3
        );
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for path in [Path::new("/dev/null"), Path::new("/no/such"), folder.path()] {
            assert!(
                Image::open(&options(path, true)).is_err(),
                "{}",
                path.display()
            );
        }
    }

    #[test]
    fn probing_leaves_the_image_as_it_was() {
        let file = image(4096);
        let _image = Image::open(&options(file.path(), false)).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }
}
