//! A kernel image of anybody's making, loaded into memory.

use std::fs::File;
use std::io::Write as _;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_core::boot::acpi::AcpiConfig;
use vmm_core::boot::{BootSource, Kernel};

/// See the module.
pub fn kernel(data: &[u8]) {
    let Ok(file) = memfd_create("kernel", MFdFlags::empty()) else {
        return;
    };
    let mut file = File::from(file);
    if file.write_all(data).is_err() {
        return;
    }
    let Ok(kernel) = Kernel::from_file("kernel", file) else {
        return;
    };
    let Ok(source) = BootSource::new(kernel, None, "console=ttyS0") else {
        return;
    };
    let Ok(memory) = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]) else {
        return;
    };
    let _ = source.load(
        &memory,
        &AcpiConfig {
            apic_ids: vec![0, 1],
            mmio64: None,
        },
    );
}
