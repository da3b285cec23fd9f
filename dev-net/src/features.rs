//! Feature bits of a network device (virtio 1.3, section 5.1.3) and the offloads among them.
//!
//! Not offered: UFO (the kernel produces none any more), RSS, hash reports, notification
//! coalescing, speed and duplex.

use bitflags::bitflags;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;

bitflags! {
    /// The bits that this device offers or looks at.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        /// Takes packets whose checksum is still to be made.
        const CSUM = 1 << net::VIRTIO_NET_F_CSUM;
        /// The driver takes such packets.
        const GUEST_CSUM = 1 << net::VIRTIO_NET_F_GUEST_CSUM;
        /// The driver can change its offloads later.
        const CTRL_GUEST_OFFLOADS = 1 << net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
        /// The configuration space has an MTU.
        const MTU = 1 << net::VIRTIO_NET_F_MTU;
        /// The configuration space has a MAC address.
        const MAC = 1 << net::VIRTIO_NET_F_MAC;
        /// The driver takes TCP over IPv4 segmented late.
        const GUEST_TSO4 = 1 << net::VIRTIO_NET_F_GUEST_TSO4;
        /// The driver takes TCP over IPv6 segmented late.
        const GUEST_TSO6 = 1 << net::VIRTIO_NET_F_GUEST_TSO6;
        /// The driver takes such TCP with ECN.
        const GUEST_ECN = 1 << net::VIRTIO_NET_F_GUEST_ECN;
        /// Takes TCP over IPv4 to be segmented.
        const HOST_TSO4 = 1 << net::VIRTIO_NET_F_HOST_TSO4;
        /// Takes TCP over IPv6 to be segmented.
        const HOST_TSO6 = 1 << net::VIRTIO_NET_F_HOST_TSO6;
        /// Takes such TCP with ECN.
        const HOST_ECN = 1 << net::VIRTIO_NET_F_HOST_ECN;
        /// A packet may be put into several receive buffers.
        const MRG_RXBUF = 1 << net::VIRTIO_NET_F_MRG_RXBUF;
        /// The configuration space has a status.
        const STATUS = 1 << net::VIRTIO_NET_F_STATUS;
        /// There is a control queue.
        const CTRL_VQ = 1 << net::VIRTIO_NET_F_CTRL_VQ;
        /// Receive modes and MAC tables.
        const CTRL_RX = 1 << net::VIRTIO_NET_F_CTRL_RX;
        /// VLAN filtering.
        const CTRL_VLAN = 1 << net::VIRTIO_NET_F_CTRL_VLAN;
        /// More receive modes.
        const CTRL_RX_EXTRA = 1 << net::VIRTIO_NET_F_CTRL_RX_EXTRA;
        /// The driver announces itself when asked.
        const GUEST_ANNOUNCE = 1 << net::VIRTIO_NET_F_GUEST_ANNOUNCE;
        /// Several queue pairs.
        const MQ = 1 << net::VIRTIO_NET_F_MQ;
        /// The MAC address is set by command.
        const CTRL_MAC_ADDR = 1 << net::VIRTIO_NET_F_CTRL_MAC_ADDR;
        /// The device is not a legacy one.
        const VERSION_1 = 1 << VIRTIO_F_VERSION_1;
        /// The driver takes UDP over IPv4 segmented late.
        const GUEST_USO4 = 1 << net::VIRTIO_NET_F_GUEST_USO4;
        /// The driver takes UDP over IPv6 segmented late.
        const GUEST_USO6 = 1 << net::VIRTIO_NET_F_GUEST_USO6;
        /// Takes UDP to be segmented.
        const HOST_USO = 1 << net::VIRTIO_NET_F_HOST_USO;
    }
}

impl Features {
    /// Bytes of the header before each packet: `num_buffers` is missing in a legacy device without
    /// merged buffers (section 5.1.6.1).
    pub(crate) fn header_len(self) -> usize {
        if self.intersects(Features::VERSION_1 | Features::MRG_RXBUF) {
            crate::packet::HEADER_LEN
        } else {
            crate::packet::LEGACY_HEADER_LEN
        }
    }

    /// What a tap that can do `offloads` lets the device offer.
    pub(crate) fn of_tap(offloads: Offloads) -> Features {
        let pairs = [
            (Offloads::CSUM, Features::CSUM | Features::GUEST_CSUM),
            (Offloads::TSO4, Features::HOST_TSO4 | Features::GUEST_TSO4),
            (Offloads::TSO6, Features::HOST_TSO6 | Features::GUEST_TSO6),
            (Offloads::ECN, Features::HOST_ECN | Features::GUEST_ECN),
            (Offloads::USO4, Features::HOST_USO | Features::GUEST_USO4),
            (Offloads::USO6, Features::HOST_USO | Features::GUEST_USO6),
        ];
        pairs
            .into_iter()
            .filter(|(offload, _)| offloads.contains(*offload))
            .fold(Features::empty(), |all, (_, features)| all | features)
    }
}

bitflags! {
    /// What may be left to the receiver of a packet. The bits are those of the `GUEST_` features,
    /// as the command that sets them has them (section 5.1.6.5.6.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Offloads: u64 {
        /// The checksum.
        const CSUM = Features::GUEST_CSUM.bits();
        /// Segmentation of TCP over IPv4.
        const TSO4 = Features::GUEST_TSO4.bits();
        /// Segmentation of TCP over IPv6.
        const TSO6 = Features::GUEST_TSO6.bits();
        /// Segmentation of TCP with ECN.
        const ECN = Features::GUEST_ECN.bits();
        /// Segmentation of UDP over IPv4.
        const USO4 = Features::GUEST_USO4.bits();
        /// Segmentation of UDP over IPv6.
        const USO6 = Features::GUEST_USO6.bits();
    }
}

impl Offloads {
    /// Those that the driver accepted.
    pub(crate) fn accepted(features: Features) -> Offloads {
        Offloads::from_bits_truncate(features.bits())
    }

    /// Without those that lack what they need (section 5.1.3.1), or that the kernel's tap has only
    /// together.
    pub(crate) fn consistent(mut self) -> Offloads {
        if !self.contains(Offloads::CSUM) {
            return Offloads::empty();
        }
        if !self.intersects(Offloads::TSO4 | Offloads::TSO6) {
            self.remove(Offloads::ECN);
        }
        let uso = Offloads::USO4 | Offloads::USO6;
        if !self.contains(uso) {
            self.remove(uso);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offload_goes_without_what_it_needs() {
        assert_eq!(
            (Offloads::TSO4 | Offloads::USO4).consistent(),
            Offloads::empty()
        );
        assert_eq!(
            (Offloads::CSUM | Offloads::ECN | Offloads::USO6).consistent(),
            Offloads::CSUM
        );
        assert_eq!(Offloads::all().consistent(), Offloads::all());
    }

    #[test]
    fn a_tap_without_uso_offers_none() {
        let offered = Features::of_tap(Offloads::CSUM | Offloads::TSO4);
        assert_eq!(
            offered,
            Features::CSUM | Features::GUEST_CSUM | Features::HOST_TSO4 | Features::GUEST_TSO4
        );
    }

    #[test]
    fn only_a_legacy_device_has_the_short_header() {
        assert_eq!(Features::empty().header_len(), 10);
        assert_eq!(Features::VERSION_1.header_len(), 12);
        assert_eq!(Features::MRG_RXBUF.header_len(), 12);
    }
}
