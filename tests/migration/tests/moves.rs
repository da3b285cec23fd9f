//! Machines that move and lose nothing.

use anyhow::{Result, ensure};
use tempfile::TempDir;
use test_framework::machine::make_image;
use test_guest::{BlkMode, Idle, Workload};
use test_machine::work;
use test_migration::{Kind, Side, Spec, beat_on, finish};

/// A guest that dirties memory and says that it lives.
fn busy() -> Workload {
    Workload {
        heartbeat: 20,
        span: 16,
        dirty: 40,
        ..work()
    }
}

fn disk(folder: &TempDir, name: &str, queues: u16) -> Result<(std::path::PathBuf, u16)> {
    let image = folder.path().join(name);
    make_image(&image, 32)?;
    Ok((image, queues))
}

/// Moves a machine so many times, with heartbeats between.
fn there_and_back(spec: &Spec, times: u32) -> Result<Side> {
    let mut side = Side::boot(spec)?;
    let mut last = beat_on(&mut side)?;
    for _ in 0..times {
        beat_on(&mut side)?;
        side = side.move_on(spec)?.side;
        let beat = beat_on(&mut side)?;
        ensure!(beat > last, "heartbeat {beat} after {last}");
        last = beat;
    }
    Ok(side)
}

#[test]
fn memory_arrives_page_by_page() -> Result<()> {
    let side = there_and_back(&Spec::of(busy()), 1)?;
    assert_eq!(finish(side)?.0, 16 << 8);
    Ok(())
}

#[test]
fn ten_times_there_and_back_with_a_disk_at_work() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::of(Workload {
        blk: BlkMode::Loop,
        depth: 8,
        ..busy()
    });
    spec.cpus = 2;
    spec.disks = vec![disk(&folder, "a", 4)?, disk(&folder, "b", 1)?];
    let (pages, blocks, _) = finish(there_and_back(&spec, 10)?)?;
    assert_eq!(pages, 16 << 8);
    assert!(blocks.0 > 0 && blocks.1 > 0, "{blocks:?}");
    Ok(())
}

#[test]
fn four_vcpus_that_sleep_over_tcp() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::of(Workload {
        blk: BlkMode::Loop,
        idle: Idle::Halt,
        ..busy()
    });
    (spec.cpus, spec.channels, spec.kind) = (4, 4, Kind::Tcp);
    spec.disks = vec![disk(&folder, "a", 2)?];
    assert_eq!(finish(there_and_back(&spec, 3)?)?.0, 16 << 8);
    Ok(())
}
