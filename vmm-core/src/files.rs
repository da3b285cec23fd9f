//! The one place where this process opens files, so that each is counted.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use crate::costs;

/// Opens a file.
pub fn open(options: &OpenOptions, path: impl AsRef<Path>) -> io::Result<File> {
    costs::FILES.add();
    #[expect(clippy::disallowed_methods, reason = "counted")]
    options.open(path)
}
