//! Machines with back-ends of others that move.

use anyhow::{Result, ensure};
use tempfile::TempDir;
use test_framework::machine::{DEADLINE, make_image};
use test_guest::{BlkMode, Workload};
use test_migration::{Foreign, Kind, Side, Spec, Wires, answers, at_work, beat_on, busy, finish};

/// Its state is carried as it is, whatever it is.
#[test]
fn a_back_end_with_state_moves() -> Result<()> {
    for kind in [Kind::Tcp, Kind::Shared] {
        let mut spec = Spec::of(Workload {
            count: 500,
            ..busy()
        });
        spec.kind = kind;
        spec.foreign = vec![Foreign::Counter {
            log: true,
            state: true,
        }];
        let mut side = at_work(&spec)?;
        for _ in 0..3 {
            side = side.move_on(&spec)?.side;
            beat_on(&mut side)?;
        }
        while answers(&mut side)? <= 100 {
            beat_on(&mut side)?;
        }
        let done = finish(side)?;
        ensure!(done.counts.0 > 100, "{done:?}");
        assert_eq!(done.counts.1, 0, "it began anew");
        assert_eq!(done.pages, 8 << 8);
    }
    Ok(())
}

/// What it has in flight is finished before the machine goes.
#[test]
fn a_back_end_without_state_moves() -> Result<()> {
    let folder = TempDir::new()?;
    let image = folder.path().join("disk");
    make_image(&image, 16)?;
    let mut spec = Spec::of(Workload {
        blk: BlkMode::Loop,
        depth: 8,
        ..busy()
    });
    spec.foreign = vec![Foreign::StorageDaemon(image)];
    let mut side = at_work(&spec)?;
    for _ in 0..3 {
        side = side.move_on(&spec)?.side;
        beat_on(&mut side)?;
    }
    let done = finish(side)?;
    assert!(done.blocks.0 > 0 && done.blocks.1 > 0, "{done:?}");
    assert_eq!(done.pages, 8 << 8);
    Ok(())
}

/// It is named before anything is copied, and works on.
#[test]
fn a_back_end_that_cannot_move_is_named() -> Result<()> {
    let mut spec = Spec::of(Workload {
        count: 500,
        ..busy()
    });
    spec.foreign = vec![Foreign::Counter {
        log: false,
        state: true,
    }];
    let mut side = at_work(&spec)?;
    let wires = Wires::connect(spec.kind, spec.channels, &spec.ids(), None)?;
    let mut destination = Side::expect(&spec, wires.destination, None)?;
    let started = side.migrate(&spec, wires.source);
    let reason = match started.and_then(|()| side.outcome()) {
        Ok(outcome) => outcome["reason"].to_string(),
        Err(error) => format!("{error:#}"),
    };
    ensure!(reason.contains("foreign0"), "{reason}");
    destination.core().wait(DEADLINE)?;
    beat_on(&mut side)?;
    assert_eq!(finish(side)?.counts.1, 0, "it began anew");
    Ok(())
}
