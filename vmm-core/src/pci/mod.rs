//! PCI: configuration space, BARs, MSI-X, and bus 0 that holds the functions.
//!
//! | part | what it is |
//! |---|---|
//! | [`ConfigSpace`] | registers with write masks and the capability list |
//! | [`BarAllocator`], [`Header`] | a type 0 header whose BARs the guest may move |
//! | [`Msix`] | vectors, masks and pending bits, over [`crate::interrupt::MsiRouter`] |
//! | [`Root`] | bus 0: ECAM, configuration mechanism 1, the reset register |
//! | [`HostBridge`] | the function at 00:00.0 |
//!
//! A BAR has an address from the start, but memory decoding is off until the guest
//! turns it on: nobody pays for mappings that a guest's sizing of BARs would undo.
//! Nothing decodes outside of [`crate::layout::MMIO32`] and [`crate::layout::MMIO32_HIGH`], as behind a real host bridge.

mod bar;
mod config;
mod header;
mod host_bridge;
mod msix;
mod root;
pub mod saved_state;
#[cfg(test)]
pub(crate) mod testing;

pub use bar::{BarAllocator, BarError, BarIndex};
pub use config::{CONFIG_SIZE, ConfigError, ConfigSpace};
pub use header::{BarMove, Header, Identity};
pub use host_bridge::HostBridge;
pub use msix::{ENTRY_SIZE, MAX_VECTORS, Msix, MsixError, NO_VECTOR, SourceIndex};
pub use root::{MAX_DEVICES, PciAddress, PciFunction, Root, RootError};
