//! Godwit's core process: it runs the vCPUs of one machine and coordinates the
//! processes that are its devices.
//!
//! | module | what it is |
//! |---|---|
//! | [`hypervisor`] | KVM: the VM, vCPU threads, interrupts, dirty log |
//! | [`memory`] | guest RAM and the layout transaction |
//! | [`bus`] | who answers a port or MMIO access |
//! | [`interrupt`] | what a device needs to interrupt a vCPU, without KVM |
//! | [`pci`] | configuration space, BARs, MSI-X |
//! | [`transport`] | virtio over PCI |
//! | [`remote`] | devices in other processes: vhost-user |
//! | [`platform`] | what a PC has besides PCI: serial, RTC, power, reset |
//! | [`boot`] | kernels, ACPI tables, start of a vCPU |
//! | [`costs`] | what must not be done while a machine stands still, counted |
//! | [`files`] | where files are opened, counted |
//! | [`migration`] | moving all of it to another core |
//! | [`machine`] | all of it together, with its life |

#![cfg_attr(
    test,
    expect(clippy::disallowed_methods, reason = "a test is no part of a stop")
)]

pub mod boot;
pub mod bus;
pub mod costs;
pub mod files;
pub mod hypervisor;
pub mod interrupt;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod pci;
pub mod platform;
pub mod remote;
pub mod transport;
