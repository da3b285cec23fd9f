//! The feature bits that the kit itself offers, for every device.

use migration::rings;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

/// VIRTIO_RING_F_INDIRECT_DESC.
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub(crate) const VERSION_1: u64 = 1 << 32;
/// VHOST_F_LOG_ALL: guest memory writes are to be logged.
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Offered besides the device's own. Not offered: packed rings (bit 34), an IOMMU (33).
pub(crate) const KIT_FEATURES: u64 =
    INDIRECT_DESC | EVENT_IDX | VERSION_1 | LOG_ALL | PROTOCOL_FEATURES;

/// Features of the ring's form, which cannot change under a running ring.
pub(crate) const RING_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;

/// Protocol features offered, [`migration::rings::FEATURE`] among them. Not offered: STATUS, which the protocol library does not carry.
pub(crate) const PROTOCOL: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::DEVICE_STATE)
    .union(Protocol::from_bits_retain(rings::FEATURE));
