//! Features: what the back-end has, and what of it the guest is offered.

use migration::rings;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_config::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_HASH_REPORT, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_RSS, VIRTIO_NET_F_SPEED_DUPLEX,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::connection::Connection;
use super::queues::QueuePlan;
use super::{VhostUserConfig, VhostUserError};
use crate::transport::DeviceKind;

/// F_LOG_ALL: every write to guest memory is logged.
pub(super) const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// The back-end has protocol features, and rings that start disabled.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const CONSOLE_F_SIZE: u32 = 0;
const CONSOLE_F_MULTIPORT: u32 = 1;
const FS_F_NOTIFICATION: u32 = 0;

/// Rings of the back-end are wired ahead, and start and stop at once.
pub(super) const WIRED_RINGS: Protocol = Protocol::from_bits_retain(rings::FEATURE);

/// What this front-end speaks. Not STATUS: the field's back-ends have no handler for it.
const SPOKEN: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::DEVICE_STATE)
    .union(Protocol::RARP)
    .union(WIRED_RINGS);

/// Regions in a SET_MEM_TABLE (VU, «Memory region description»).
pub(super) const TABLE_REGIONS: usize = 8;

/// What a back-end has, once agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Negotiated {
    /// Feature bits of the back-end.
    pub(super) features: u64,
    /// Protocol features of both.
    pub(super) protocol: Protocol,
    /// Rings that it says that it serves.
    pub(super) rings: Option<u64>,
    /// Memory regions that it takes.
    pub(super) memory_slots: usize,
}

impl Negotiated {
    pub(super) fn has(&self, feature: Protocol) -> bool {
        self.protocol.contains(feature)
    }
}

/// Opens a session: owner, features, protocol features, and the numbers behind them.
pub(super) fn negotiate(connection: &mut Connection) -> Result<Negotiated, VhostUserError> {
    connection.call("SET_OWNER", |f| f.set_owner())?;
    let features = connection.call("GET_FEATURES", |f| f.get_features())?;
    let device = || connection.device().to_string();
    if features & 1 << VIRTIO_F_VERSION_1 == 0 {
        return Err(VhostUserError::Legacy { device: device() });
    }
    let mut negotiated = Negotiated {
        features,
        protocol: Protocol::empty(),
        rings: None,
        memory_slots: TABLE_REGIONS,
    };
    if features & PROTOCOL_FEATURES == 0 {
        return Ok(negotiated);
    }
    let protocol = offered(connection)? & SPOKEN;
    negotiated.protocol = protocol;
    connection.call("SET_PROTOCOL_FEATURES", |f| {
        f.set_protocol_features(protocol)
    })?;
    connection.set_reply_ack(protocol.contains(Protocol::REPLY_ACK));
    if protocol.contains(Protocol::MQ) {
        negotiated.rings = Some(connection.call("GET_QUEUE_NUM", |f| f.get_queue_num())?);
    }
    if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
        let slots = connection.call("GET_MAX_MEM_SLOTS", |f| f.get_max_mem_slots())?;
        negotiated.memory_slots = usize::try_from(slots).unwrap_or(usize::MAX);
    }
    Ok(negotiated)
}

/// GET_PROTOCOL_FEATURES, with bits that the library does not know.
fn offered(connection: &mut Connection) -> Result<Protocol, VhostUserError> {
    const NAME: &str = "GET_PROTOCOL_FEATURES";
    let request = FrontendReq::GET_PROTOCOL_FEATURES as u32;
    let answers = connection.exchange(request, NAME, &[Vec::new()])?;
    let bits = answers.first().and_then(|a| a.as_slice().try_into().ok());
    bits.map(|bits| Protocol::from_bits_retain(u64::from_ne_bytes(bits)))
        .ok_or_else(|| connection.nonsense(NAME, "it has not 8 bytes"))
}

/// Whether the back-end offers a network card's control queue.
pub(super) fn offers_control(kind: DeviceKind, features: u64) -> bool {
    kind == DeviceKind::NET && features & 1 << VIRTIO_NET_F_CTRL_VQ != 0
}

/// Feature bits for the guest: what the back-end has, less what belongs to the
/// protocol, to transports that this is not (packed rings, IOMMU, notification data,
/// queue reset), and to parts of the device that are missing.
pub(super) fn offer(config: &VhostUserConfig, plan: &QueuePlan, negotiated: &Negotiated) -> u64 {
    let bits = |list: &[u32]| list.iter().fold(0_u64, |all, &bit| all | 1 << bit);
    // Bits of device types (virtio 1.3, 2.2); 24 to 49 are reserved or the transport's.
    let device_type = 0x00ff_ffff | u64::MAX << 50;
    let transport = bits(&[
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
        VIRTIO_F_IN_ORDER,
        VIRTIO_F_ORDER_PLATFORM,
    ]);
    let mut offer = negotiated.features & (device_type | transport);
    let local_config = !negotiated.has(Protocol::CONFIG);
    match config.kind {
        DeviceKind::NET => {
            if !plan.has_control {
                offer &= !bits(&[
                    VIRTIO_NET_F_CTRL_VQ,
                    VIRTIO_NET_F_CTRL_RX,
                    VIRTIO_NET_F_CTRL_VLAN,
                    VIRTIO_NET_F_CTRL_RX_EXTRA,
                    VIRTIO_NET_F_CTRL_MAC_ADDR,
                    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
                    VIRTIO_NET_F_GUEST_ANNOUNCE,
                    VIRTIO_NET_F_MQ,
                    VIRTIO_NET_F_RSS,
                    VIRTIO_NET_F_HASH_REPORT,
                ]);
            }
            if local_config {
                offer &= !bits(&[
                    VIRTIO_NET_F_MTU,
                    VIRTIO_NET_F_SPEED_DUPLEX,
                    VIRTIO_NET_F_RSS,
                    VIRTIO_NET_F_HASH_REPORT,
                ]);
                offer |= bits(&[VIRTIO_NET_F_MAC]);
            }
        }
        DeviceKind::CONSOLE => {
            offer &= !bits(&[CONSOLE_F_MULTIPORT]);
            if local_config {
                offer &= !bits(&[CONSOLE_F_SIZE]);
            }
        }
        DeviceKind::FS => offer &= !bits(&[FS_F_NOTIFICATION]),
        _ => {}
    }
    offer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(kind: DeviceKind, features: u64, protocol: Protocol, control: bool) -> u64 {
        let config = VhostUserConfig::new(kind, "dev");
        let plan = QueuePlan {
            counted: 1,
            rings: 2 + u16::from(control),
            served: 2,
            has_control: control,
        };
        let negotiated = Negotiated {
            features,
            protocol,
            rings: None,
            memory_slots: 8,
        };
        offer(&config, &plan, &negotiated)
    }

    #[test]
    fn the_guest_sees_nothing_of_the_protocol() {
        let offer = offered(DeviceKind::BLK, u64::MAX, Protocol::CONFIG, false);
        for hidden in [24, 26, 27, 30, 31, 33, 34, 37, 38, 39, 40, 41, 49] {
            assert_eq!(offer & 1 << hidden, 0, "bit {hidden}");
        }
        for shown in [0, 9, 12, 23, 28, 29, 32, 35, 36, 50, 63] {
            assert_ne!(offer & 1 << shown, 0, "bit {shown}");
        }
    }

    #[test]
    fn what_a_net_device_lacks_is_not_offered() {
        let all = offered(DeviceKind::NET, u64::MAX, Protocol::CONFIG, true);
        assert_eq!(all & 0xff_ffff, 0xff_ffff);
        let without_control = offered(DeviceKind::NET, u64::MAX, Protocol::CONFIG, false);
        assert_eq!(without_control & (1 << 17 | 1 << 22 | 1 << 60), 0);
        let local = offered(DeviceKind::NET, 1 << 32 | 1 << 3, Protocol::empty(), false);
        assert_eq!(local, 1 << 32 | 1 << 5, "an address, but no MTU");
    }
}
