//! The bundled guest, for a machine without a kernel of one's own.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Failure, Result};
use crate::options::Define;
use crate::value::{Disk, Size};

/// File name of the guest, where it is installed.
const GUEST: &str = "godwit-demo-guest";
/// Makes it use its disk until it is told to stop, and give of its memory what is wanted.
pub const CMDLINE: &str =
    "heartbeat=1000 poweroff=1 blk=loop blk_mib=16 balloon=follow balloon_mib=128";
/// Its disk.
pub const DISK: &str = "disk0";
/// Bytes of its disk.
pub const DISK_SIZE: u64 = 64 << 20;
/// Its RAM, unless another is wanted.
const MEMORY: Size = Size(256 << 20);

/// Completes a definition with the guest, where no kernel is given, a balloon, and a disk that goes
/// with the folder which is returned: a running machine has it open.
///
/// # Errors
/// The guest is not installed, or there is no room for its disk.
pub fn complete(define: &mut Define) -> Result<TempDir> {
    if define.kernel.is_none() {
        define.kernel = Some(installed().ok_or(Failure::NoDemoGuest)?);
    }
    define.cmdline.get_or_insert_with(|| CMDLINE.into());
    define.memory.get_or_insert(MEMORY);
    define.balloon.get_or_insert(Size(0));
    let folder = TempDir::with_prefix("godwit-demo-").map_err(Failure::io("no scratch folder"))?;
    let path = scratch_disk(folder.path())?;
    define.disk.push(Disk {
        path,
        id: Some(DISK.into()),
        ..Disk::default()
    });
    Ok(folder)
}

/// The guest beside this program, or in ../lib/godwit.
fn installed() -> Option<PathBuf> {
    let program = env::current_exe().ok()?;
    let folder = program.parent()?;
    let places = [folder.join(GUEST), folder.join("../lib/godwit").join(GUEST)];
    let guest = places.into_iter().find(|guest| guest.is_file())?;
    // A definition takes no path with `..` in it.
    guest.canonicalize().ok()
}

fn scratch_disk(folder: &Path) -> Result<PathBuf> {
    let image = folder.join("disk");
    File::create(&image)
        .and_then(|file| file.set_len(DISK_SIZE))
        .map_err(Failure::io(format!(
            "no scratch disk at {}",
            image.display()
        )))?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use test_guest::{BalloonMode, BlkMode, Workload};

    #[test]
    fn the_bundled_guest_knows_what_it_is_told() {
        let workload = Workload::parse(CMDLINE).unwrap();
        assert_eq!(workload.blk, BlkMode::Loop);
        assert!(u64::from(workload.blk_mib) << 20 <= DISK_SIZE);
        assert!(workload.heartbeat > 0 && workload.seconds == 0);
        assert_eq!(workload.balloon, BalloonMode::Follow);
        assert!(u64::from(workload.balloon_mib) << 20 < MEMORY.0);
    }

    #[test]
    fn what_is_given_stays() {
        let mut define = Define {
            kernel: Some("/k".into()),
            memory: Some(Size(1 << 30)),
            ..Define::default()
        };
        let folder = complete(&mut define).unwrap();
        assert_eq!(define.kernel.as_deref(), Some(Path::new("/k")));
        assert_eq!(define.memory, Some(Size(1 << 30)));
        assert_eq!(define.cmdline.as_deref(), Some(CMDLINE));
        assert!(define.disk[0].path.starts_with(folder.path()));
    }
}
