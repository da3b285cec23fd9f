//! How other threads end the process: by failure, or because nothing is left to do.

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Wakes the main thread for good. Clones are handles to the same.
#[derive(Clone, Debug)]
pub(crate) struct Ending(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: EventFd,
    failed: AtomicBool,
}

impl Ending {
    pub(crate) fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Ending(Arc::new(Inner {
            event: EventFd::from_flags(flags)?,
            failed: AtomicBool::new(false),
        })))
    }

    /// Logs why, and ends the process with a status that is not 0.
    pub(crate) fn fail(&self, error: &dyn Error) {
        tracing::error!("{}", chain(error));
        self.0.failed.store(true, Ordering::SeqCst);
        self.finish();
    }

    /// Ends the process.
    pub(crate) fn finish(&self) {
        // It fails only when the counter is full: then the main thread knows.
        let _ = self.0.event.write(1);
    }

    /// Whether a thread failed.
    pub(crate) fn failed(&self) -> bool {
        self.0.failed.load(Ordering::SeqCst)
    }
}

impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// An error and its causes, on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        // Transparent errors say their cause's words.
        if !line.ends_with(&inner_text) {
            line.push_str(": ");
            line.push_str(&inner_text);
        }
        cause = inner.source();
    }
    line
}
