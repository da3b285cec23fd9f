//! One io_uring instance, for one queue thread and one image.
//!
//! It is made before the sandbox, disabled, and restricted to the few operations on the one image
//! that block requests need; its thread enables it. So the sandbox has no call that could make
//! another one, and this one can open nothing.
#![expect(unsafe_code, reason = "the kernel reads and writes where entries say")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use device_kit::HostError;
use io_uring::{IoUring, Probe, opcode, register::Restriction, squeue, types::Fixed};

/// The image's place in the table of registered files.
const IMAGE: Fixed = Fixed(0);

/// The instance.
pub(crate) struct Uring {
    ring: IoUring,
    unsubmitted: bool,
}

/// An operation on the image.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation<'a> {
    Read {
        vectors: &'a [libc::iovec],
        offset: u64,
    },
    Write {
        vectors: &'a [libc::iovec],
        offset: u64,
        /// Durable when it is done.
        through: bool,
    },
    Flush,
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
}

/// A finished operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    /// The tag that it was pushed with.
    pub(crate) tag: u64,
    /// Bytes moved, or a negative error number.
    pub(crate) result: i32,
}

impl Uring {
    /// Makes an instance with room for `depth` operations.
    pub(crate) fn new(image: RawFd, depth: u16) -> Result<Self, HostError> {
        let fail = |what, error| HostError::new(format!("io_uring cannot be {what}"), error);
        let ring = build(u32::from(depth)).map_err(|error| fail("set up", error))?;
        let submitter = ring.submitter();
        submitter
            .register_files(&[image])
            .map_err(|error| fail("given the image", error))?;
        let operations = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut probe = Probe::new();
        submitter
            .register_probe(&mut probe)
            .map_err(|error| fail("asked for its operations", error))?;
        if !operations.iter().all(|code| probe.is_supported(*code)) {
            let missing = io::Error::from(io::ErrorKind::Unsupported);
            return Err(fail("used on this kernel; Linux 5.10 is needed", missing));
        }
        let mut restrictions: Vec<Restriction> =
            operations.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_required(
            squeue::Flags::FIXED_FILE.bits(),
        ));
        submitter
            .register_restrictions(&mut restrictions)
            .map_err(|error| fail("restricted", error))?;
        Ok(Uring {
            ring,
            unsubmitted: false,
        })
    }

    /// Lets it work; called by the thread that uses it from then on.
    pub(crate) fn enable(&mut self) -> Result<(), HostError> {
        self.ring
            .submitter()
            .register_enable_rings()
            .map_err(|error| HostError::new("io_uring cannot be enabled", error))
    }

    /// Adds an operation to those that [`Uring::submit`] starts.
    ///
    /// # Safety
    /// The vectors, and the memory that they point to, stay as they are and valid until the
    /// completion with this tag was taken.
    pub(crate) unsafe fn push(
        &mut self,
        operation: Operation<'_>,
        tag: u64,
    ) -> Result<(), HostError> {
        let count = |vectors: &[libc::iovec]| u32::try_from(vectors.len()).unwrap_or(u32::MAX);
        let entry = match operation {
            Operation::Read { vectors, offset } => {
                opcode::Readv::new(IMAGE, vectors.as_ptr(), count(vectors))
                    .offset(offset)
                    .build()
            }
            Operation::Write {
                vectors,
                offset,
                through,
            } => opcode::Writev::new(IMAGE, vectors.as_ptr(), count(vectors))
                .offset(offset)
                .rw_flags(if through { libc::RWF_DSYNC } else { 0 })
                .build(),
            Operation::Flush => opcode::Fsync::new(IMAGE)
                .flags(io_uring::types::FsyncFlags::DATASYNC)
                .build(),
            Operation::Fallocate { mode, offset, len } => opcode::Fallocate::new(IMAGE, len)
                .offset(offset)
                .mode(mode)
                .build(),
        };
        let entry = entry.user_data(tag);
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the caller keeps what the entry points to until its completion.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| {
            let full = io::Error::from(io::ErrorKind::StorageFull);
            HostError::new("io_uring takes no more operations", full)
        })?;
        self.unsubmitted = true;
        Ok(())
    }

    /// Starts what was pushed, in one system call.
    pub(crate) fn submit(&mut self) -> Result<(), HostError> {
        while self.unsubmitted {
            match self.ring.submit() {
                Ok(_) => self.unsubmitted = !self.ring.submission().is_empty(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Completions must be taken first; the next turn goes on.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(HostError::new("io_uring cannot start I/O", error)),
            }
        }
        Ok(())
    }

    /// Takes a finished operation.
    pub(crate) fn completion(&mut self) -> Option<Completion> {
        self.ring.completion().next().map(|entry| Completion {
            tag: entry.user_data(),
            result: entry.result(),
        })
    }
}

fn build(depth: u32) -> io::Result<IoUring> {
    // Completions interrupt nobody: the thread looks for them when it waits.
    let modern = IoUring::builder()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .build(depth);
    match modern {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_r_disabled().build(depth)
        }
        result => result,
    }
}

impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the instance that is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}
