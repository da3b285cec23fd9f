//! The machine's fixed addresses.
//!
//! ```text
//! 0x0000_0000  RAM (tables of the boot protocol below 1 MiB)
//! 0xc000_0000  32-bit BARs
//! 0xe000_0000  PCI configuration space (ECAM), bus 0
//! 0xe010_0000  32-bit BARs that firmware moves
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0xfeff_c000  pages that KVM needs for itself
//! 0xff00_0000  firmware, which ends at 4 GiB
//! 0x1_0000_0000  the rest of RAM
//! ```

use std::ops::Range;

/// End of the RAM below 4 GiB; what a machine has beyond it continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM continues above the hole.
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// Guest-physical addresses from which 32-bit BARs are given.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration space of bus 0 (PCI Express base specification, 7.2.2).
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// Guest-physical addresses of 32-bit BARs as well, to which a firmware may move them: a BIOS
/// begins at the I/O APIC and goes down.
pub const MMIO32_HIGH: Range<u64> = 0xe010_0000..0xfec0_0000;
/// I/O APIC registers.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for KVM's identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for KVM's task state segment.
pub const KVM_TSS: u64 = 0xfeff_d000;
/// Where firmware is, which ends where this does: processors start 16 bytes before.
pub const ROM: Range<u64> = 0xff00_0000..HIGH_RAM;

/// Conventional memory ends here; up to 1 MiB is reserved.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI's root pointer (found by scanning from here, ACPI 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// Where conventional high memory starts, and kernels are loaded at the least.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First interrupt of message-signalled routes; below are the I/O APIC's inputs.
pub const FIRST_MSI_GSI: u32 = 24;
/// I/O APIC input of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// I/O APIC input of the real-time clock.
pub const RTC_IRQ: u32 = 8;
/// I/O APIC input of ACPI's system control interrupt, level-triggered.
pub const SCI_IRQ: u32 = 9;

/// First serial port.
pub const SERIAL_PORT: Range<u64> = 0x3f8..0x400;
/// Real-time clock and CMOS.
pub const RTC_PORT: Range<u64> = 0x70..0x72;
/// Keyboard controller, of which there is only the reset line.
pub const I8042_PORT: Range<u64> = 0x60..0x65;
/// ACPI fixed hardware: PM1 event and control blocks.
pub const ACPI_PM_PORT: Range<u64> = 0x600..0x608;
/// QEMU's firmware configuration device.
pub const FW_CFG_PORT: Range<u64> = 0x510..0x51c;
/// PCI configuration mechanism 1; byte 0xcf9 is the reset register.
pub const PCI_CONFIG_PORT: Range<u64> = 0xcf8..0xd00;
