//! Sets up the devices and hands their queues out as tasks.

use super::{Spread, balloon, block, copy, counter, net};
use crate::clock;
use crate::console::{fail, report};
use crate::copier::Copier;
use crate::pci::{Function, Window};
use crate::protocol::{Activate, BalloonMode, BlkMode, Idle, NetMode, Report, Text, Workload};
use crate::virtio::Setup;
use crate::virtio::balloon::Balloon;
use crate::virtio::counter::Counter;
use crate::virtio::net::Nic;
use crate::virtio::transport::{Kind, kind_of};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// What a work can say of itself while it runs.
pub trait Account: Send + Sync {
    fn report(&self) -> Report;
}

/// The works that can be asked.
pub type Progress = Vec<Arc<dyn Account>>;

/// Sets up all devices that the workload needs.
///
/// All are started before any is described: the lines would cost more time than the devices.
pub fn set_up(
    workload: &Workload,
    functions: &[Function],
    low_ram_end: u64,
    spread: &mut Spread,
) -> Progress {
    let setup = setup(workload, spread);
    let all = workload.activate == Activate::All;
    let mut window = Window::new(functions, low_ram_end);
    let (mut disks, mut nics) = (Vec::new(), Vec::new());
    let (mut counters, mut balloons) = (Vec::new(), Vec::new());
    let mut copiers = Vec::new();
    for function in functions {
        if workload.copies > 0 && Copier::is(function) {
            copiers.push(Copier::start(function, &mut window, setup, spread));
        }
        match kind_of(function) {
            Some(Kind::Block) if all || workload.blk != BlkMode::Off => {
                disks.push(block::start(
                    function,
                    &mut window,
                    setup,
                    spread,
                    workload,
                    disks.is_empty(),
                ));
            }
            Some(Kind::Net) if all || workload.net != NetMode::Off => {
                nics.push(Nic::start(function, &mut window, setup, spread));
            }
            Some(Kind::Counter) if workload.count > 0 => {
                counters.push(Counter::start(function, &mut window, setup, spread));
            }
            Some(Kind::Balloon) if workload.balloon != BalloonMode::Off => {
                let poisons = workload.balloon == BalloonMode::Poison;
                let balloon = Balloon::start(function, &mut window, setup, spread, poisons);
                balloons.push(balloon);
            }
            _ => {}
        }
    }
    report(&Report::Active {
        devices: (disks.len() + nics.len() + counters.len() + balloons.len() + copiers.len())
            as u32,
        queues: spread.dealt() as u32,
        t_us: clock::since_start_us(),
    });
    if disks.is_empty() && workload.blk != BlkMode::Off
        || nics.is_empty() && workload.net != NetMode::Off
        || counters.is_empty() && workload.count > 0
        || balloons.is_empty() && workload.balloon != BalloonMode::Off
        || copiers.is_empty() && workload.copies > 0
    {
        fail(
            "device-missing",
            functions.len() as u64,
            0,
            Text::new("blk-net-counter-balloon-copy"),
        );
    }
    let mut progress = Progress::new();
    for (number, disk) in (0..).zip(disks) {
        progress.extend(block::assign(number, disk, workload));
    }
    for (number, nic) in (0..).zip(nics) {
        progress.extend(net::assign(number, nic, workload));
    }
    for (number, device) in (0..).zip(counters) {
        progress.push(counter::assign(number, device, workload));
    }
    for (number, device) in (0..).zip(copiers) {
        progress.push(copy::assign(number, device, workload));
    }
    let assign = |balloon| balloon::assign(balloon, workload);
    progress.extend(balloons.into_iter().map(assign));
    progress
}

fn setup(workload: &Workload, spread: &Spread) -> Setup {
    let ring = workload.ring;
    if !ring.is_power_of_two() || ring < 4 {
        fail(
            "ring-size",
            ring.into(),
            0,
            Text::new("power-of-two-from-4"),
        );
    }
    let interrupts = match workload.idle {
        Idle::Poll => false,
        Idle::Halt => true,
        Idle::Mixed => spread.cpus() > 1,
    };
    if interrupts && !workload.msix {
        fail("halt-needs-msix", 0, 0, Text::new("idle"));
    }
    Setup {
        ring,
        queues: if workload.queues == 0 {
            u16::MAX
        } else {
            workload.queues
        },
        msix: workload.msix,
        event_idx: workload.event_idx,
        interrupts,
        timeout_us: u64::from(workload.timeout) * 1000,
    }
}
