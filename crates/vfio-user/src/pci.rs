//! Numbers of a PCI device's regions and interrupt indices (`enum` constants of Linux's
//! `include/uapi/linux/vfio.h`).

/// First base address register; the others follow.
pub const BAR0_REGION: u32 = 0;
/// Last base address register.
pub const BAR5_REGION: u32 = 5;
/// Expansion ROM.
pub const ROM_REGION: u32 = 6;
/// Configuration space.
pub const CONFIG_REGION: u32 = 7;
/// Legacy VGA.
pub const VGA_REGION: u32 = 8;
/// Number of these regions.
pub const REGIONS: u32 = 9;

/// Interrupt by pin.
pub const INTX_IRQ: u32 = 0;
/// Message-signalled interrupts.
pub const MSI_IRQ: u32 = 1;
/// The same with a table.
pub const MSIX_IRQ: u32 = 2;
/// The device has met an uncorrectable error.
pub const ERROR_IRQ: u32 = 3;
/// The host wants the device back.
pub const REQUEST_IRQ: u32 = 4;
/// Number of these indices.
pub const IRQS: u32 = 5;
