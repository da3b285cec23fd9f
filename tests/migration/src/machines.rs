//! Machines that most tests want.

use anyhow::Result;
use tempfile::TempDir;
use test_framework::machine::{DEADLINE, make_image};
use test_guest::{BlkMode, Workload};
use test_machine::work;

use super::{Side, Spec, warm_up};

/// A guest that dirties memory and says that it lives.
pub fn busy() -> Workload {
    Workload {
        heartbeat: 20,
        span: 8,
        dirty: 20,
        ..work()
    }
}

impl Spec {
    /// Of a guest that is [`busy`], also with disks of so many queues each; their images are in
    /// `folder`.
    pub fn with_disks(folder: &TempDir, queues: &[u16]) -> Result<Self> {
        let mut spec = Spec::of(Workload {
            blk: BlkMode::Loop,
            ..busy()
        });
        for (number, &queues) in queues.iter().enumerate() {
            let image = folder.path().join(format!("image{number}"));
            make_image(&image, 16)?;
            spec.disks.push((image, queues));
        }
        Ok(spec)
    }
}

/// A machine whose guest has done all of its work at least once.
pub fn at_work(spec: &Spec) -> Result<Side> {
    let mut side = Side::boot(spec)?;
    warm_up(&mut side)?;
    if spec.workload.span > 0 {
        side.console.fill(DEADLINE)?;
    }
    Ok(side)
}
