//! Godwit's bare-metal test guest.
//!
//! A PVH kernel whose body runs at CPL3, so that it is fast even where CPL0 code is emulated; it
//! starts all CPUs, drives virtio-pci disks and network devices, dirties memory, and reports on
//! the serial console. See `tests/guest/README.md` for its command line and its reports.
//!
//! Start, on CPU 0 alone until `smp`:
//!
//! ```text
//! entry.s ─► pvh (copy start info) ─► memory ─► cpu, clock ─► acpi ─► apic ─► pci ─► smp ─► work
//! ```
//!
//! Whatever lies below 1 MiB (start info, ACPI tables) is read before `smp` writes there.

#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod apic;
mod clock;
mod console;
mod copier;
mod cpu;
mod interrupts;
mod memory;
mod mmio;
mod paging;
mod pci;
mod port;
mod power;
#[path = "../../src/protocol/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the host uses the other half")]
mod protocol;
mod pvh;
mod runtime;
mod smp;
mod sync;
mod virtio;
mod work;

use console::{fail, report};
use protocol::{Report, Text, Workload};

core::arch::global_asm!(include_str!("entry.s"));
core::arch::global_asm!(include_str!("traps.s"));

/// The first Rust code of every CPU, at CPL3.
#[unsafe(no_mangle)]
extern "C" fn rust_start(start_info: u64, cpu: u64) -> ! {
    if cpu == 0 {
        boot(start_info)
    } else {
        smp::application_processor()
    }
}

fn boot(start_info: u64) -> ! {
    clock::start();
    console::start();
    interrupts::install();
    let info = pvh::StartInfo::read(start_info);
    memory::init(&info);
    paging::map_ram(&info);
    let parsed = Workload::parse(info.command_line());
    let settings = parsed.clone().unwrap_or_default();
    clock::set_frequency(settings.tsc_khz);
    let tables = acpi::Tables::find(info.rsdp());
    power::init(&tables, settings.slp_typ);
    // Only now can a failure end in a power-off.
    let workload = parsed.unwrap_or_else(|bad| console::fail_with(Report::from(bad)));
    apic::enable();
    let functions = pci::scan(&tables, u64::from(workload.ecam_mib) << 20);
    let cpus = smp::start(&tables, workload.cpus);
    report(&Report::Up {
        cpus: cpus as u32,
        mem_mib: info.ram_bytes() >> 20,
        tsc_khz: clock::khz(),
        pci: functions.len() as u32,
        x2apic: apic::is_x2apic(),
        t_us: clock::since_start_us(),
    });
    work::run(workload, functions, info.low_ram_end(), cpus)
}

/// Entered by an exception (traps.s), with the machine in an unknown state.
#[unsafe(no_mangle)]
extern "C" fn exception_start(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    let mut what = *b"vector-00-error-00000000";
    for (digits, mut value, base) in [(7..9, vector, 10), (16..24, error, 16)] {
        for digit in what[digits].iter_mut().rev() {
            *digit = b"0123456789abcdef"[(value % base) as usize];
            value /= base;
        }
    }
    fail("exception", rip, cr2, Text::from_bytes(&what))
}
