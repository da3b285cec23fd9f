//! The vfio-user protocol, version 0.1: a device of VFIO's kind served by another process over a
//! Unix socket.
//!
//! A program that has a device implements [`Device`] and calls [`serve`]; one that uses it makes a
//! [`Client`]. Both are blocking, for threads of their own; every wait has a deadline, but for the
//! server's wait for the next command, which ends when it is told to stop. What comes from the other
//! side is bounded and checked before it is believed: neither side trusts the other.
//!
//! Beyond the specification there is one capability, `"org.godwit.p2p": true`: where both sides name it,
//! a device may have the states `RunningP2p` and `PreCopyP2p`, and is told to go there.
//!
//! The specification is QEMU's `docs/interop/vfio-user.rst`, cited as VFU with a section's name;
//! what it takes over from Linux is in `include/uapi/linux/vfio.h`.

mod client;
mod description;
mod error;
#[cfg(test)]
mod fake;
mod migration;
pub mod pci;
mod server;
mod socket;
mod wire;

pub use client::Client;
pub use description::{
    Area, DeviceFlags, DeviceInfo, DmaRegion, IrqAction, IrqData, IrqFlags, IrqInfo, RegionFlags,
    RegionInfo,
};
pub use error::{Error, ProtocolError};
pub use migration::{DeviceState, DmaLog, DmaRange, Migration, MigrationFlags};
pub use nix::errno::Errno;
pub use server::{Device, Ended, Region, serve};
pub use wire::Command;
