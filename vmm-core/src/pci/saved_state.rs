//! What PCI functions save. Plain data: the runtime types check it before they use it.

use serde::{Deserialize, Serialize};

/// Saved state of [`super::HostBridge`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostBridgeState {
    /// Configuration space.
    pub registers: Vec<u8>,
}

/// Saved state of [`super::Root`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootState {
    /// The address register of mechanism 1 (port 0xcf8).
    pub config_address: u32,
    /// The reset control register (port 0xcf9).
    pub reset_control: u8,
}

/// One entry of an MSI-X table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixEntryState {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Whether the vector is masked.
    pub masked: bool,
}

/// Saved state of [`super::Msix`]. Enable and function mask are in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// The table.
    pub entries: Vec<MsixEntryState>,
    /// By source: whether it has signalled what no vCPU has heard yet.
    pub pending: Vec<bool>,
}
