//! Every way by which a machine moves, with one to four vCPUs, at work and idle: ten times there and
//! back, and nothing is lost.

use anyhow::{Result, ensure};
use tempfile::TempDir;
use test_framework::machine::DEADLINE;
use test_guest::{Activate, BlkMode, Idle, NetMode};
use test_machine::network;
use test_migration::{Kind, Side, Spec, beat_on, finish, warm_up};

const MOVES: u64 = 10;
/// Packets that are under way at most, and lost if they come while nobody has the tap.
const UNDER_WAY: u64 = 32;

/// Moves a machine with a disk and a network card. Its processors sleep, each until its own timer or
/// an interrupt; every page, block and packet is compared, and the clock never goes back.
fn moves(kind: Kind, cpus: u32, at_work: bool) -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[2])?;
    (spec.kind, spec.cpus) = (kind, cpus);
    network("matrix0", 4)?;
    spec.nics = vec![("matrix0".into(), 1)];
    spec.workload.idle = Idle::Halt;
    if at_work {
        (spec.workload.net, spec.workload.depth) = (NetMode::Loop, 8);
    } else {
        (spec.workload.blk, spec.workload.activate) = (BlkMode::Off, Activate::All);
        spec.workload.dirty = 1;
    }
    let mut side = Side::boot(&spec)?;
    side.console.fill(DEADLINE)?;
    let mut last = warm_up(&mut side)?;
    for _ in 0..MOVES {
        side = side.move_on(&spec)?.side;
        let beat = beat_on(&mut side)?;
        ensure!(beat > last, "heartbeat {beat} after {last}");
        last = beat;
    }
    let done = finish(side)?;
    ensure!(done.pages == 8 << 8, "{done:?}");
    let ((reads, writes), (sent, received)) = (done.blocks, done.packets);
    let works = reads > 0 && writes > 0 && received > 0;
    ensure!(works == at_work, "{done:?}");
    ensure!(sent - received <= MOVES * UNDER_WAY, "{done:?}");
    Ok(())
}

macro_rules! ways {
    ($($way:ident: $kind:ident,)*) => {$(
        mod $way {
            use super::{Kind, Result, moves};

            ways!($kind: one_vcpu 1 true, two_vcpus 2 true, three_vcpus 3 true, four_vcpus 4 true);
            mod idle {
                use super::{Kind, Result, moves};

                ways!($kind: one_vcpu 1 false, two_vcpus 2 false, three_vcpus 3 false,
                    four_vcpus 4 false);
            }
        }
    )*};
    ($kind:ident: $($name:ident $cpus:literal $at_work:literal),*) => {$(
        #[test]
        fn $name() -> Result<()> {
            moves(Kind::$kind, $cpus, $at_work)
        }
    )*};
}

ways! {
    over_tcp: Tcp,
    over_unix_sockets: Unix,
    within_a_host: Shared,
}

/// Each processor has one request in flight, and sleeps until its interrupt: one that is lost, or a
/// doorbell that is not heard, is not made up for by any other.
#[test]
fn a_hundred_moves_within_a_host_lose_no_interrupt() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[2])?;
    (spec.kind, spec.cpus) = (Kind::Shared, 3);
    let workload = &mut spec.workload;
    (workload.idle, workload.depth) = (Idle::Halt, 1);
    (workload.nap, workload.span) = (10_000, 0);
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    for _ in 0..100 {
        side = side.move_on(&spec)?.side;
        beat_on(&mut side)?;
    }
    let done = finish(side)?;
    ensure!(done.blocks.0 > 0 && done.blocks.1 > 0, "{done:?}");
    Ok(())
}
