//! What a virtio PCI device saves of its transport. The device's own state is its own.

use serde::{Deserialize, Serialize};

use crate::pci::saved_state::MsixState;

/// One queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Descriptors.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver area.
    pub driver: u64,
    /// Guest-physical address of the device area.
    pub device: u64,
    /// MSI-X vector, 0xffff for none.
    pub vector: u16,
    /// Where the device goes on in the ring.
    pub base: u16,
}

/// The registers of virtio 1.3, 4.1.4.3.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Device status as the driver has written it.
    pub status: u8,
    /// Whether the device asks for a reset.
    pub needs_reset: bool,
    /// Features accepted.
    pub driver_features: u64,
    /// Selector of offered features.
    pub device_feature_select: u32,
    /// Selector of accepted features.
    pub driver_feature_select: u32,
    /// Selected queue.
    pub queue_select: u16,
    /// Vector of configuration changes, 0xffff for none.
    pub config_vector: u16,
    /// Generation of the device configuration.
    pub config_generation: u8,
    /// Whether a configuration change stands in the interrupt status register.
    pub config_changed: bool,
    /// Every queue.
    pub queues: Vec<QueueState>,
}

/// Saved state of [`super::VirtioPciDevice`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciState {
    /// Configuration space, with command register and BARs.
    pub registers: Vec<u8>,
    /// Vectors and what is pending.
    pub msix: MsixState,
    /// Virtio's registers.
    pub transport: TransportState,
}
