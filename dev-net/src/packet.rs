//! The first bytes of a packet: virtio's header, then Ethernet's.
//!
//! They are read into private memory, where the guest cannot change them between check and use.

use virtio_bindings::virtio_net as net;

use crate::features::Offloads;
use crate::mac::MacAddress;

/// Bytes of `struct virtio_net_hdr` with `num_buffers` (virtio 1.3, section 5.1.6).
pub(crate) const HEADER_LEN: usize = 12;
/// Without it.
pub(crate) const LEGACY_HEADER_LEN: usize = 10;
/// Bytes of an Ethernet header.
pub(crate) const ETHERNET_LEN: usize = 14;
/// Most bytes of an Ethernet frame: the largest IP packet, behind two VLAN tags.
pub(crate) const MAX_FRAME: usize = ETHERNET_LEN + 8 + 65_535;
/// Bytes that are looked at: both headers, and a VLAN tag.
pub(crate) const LEAD_LEN: usize = HEADER_LEN + ETHERNET_LEN + 4;

const VLAN_ETHERTYPE: [u8; 2] = [0x81, 0x00];
const VLAN_ID: u16 = 0x0fff;

/// `flags` and `gso_type` of virtio's header.
const FLAGS_AT: usize = 0;
const GSO_TYPE_AT: usize = 1;
/// `num_buffers`.
const BUFFERS_AT: usize = 10;

/// The first bytes of a packet from the tap.
#[derive(Debug)]
pub(crate) struct Lead<'a> {
    bytes: &'a mut [u8],
    header_len: usize,
}

impl<'a> Lead<'a> {
    /// `bytes` hold the virtio header and at least an Ethernet header; `None` when they do not.
    pub(crate) fn new(bytes: &'a mut [u8], header_len: usize) -> Option<Lead<'a>> {
        (bytes.len() >= header_len + ETHERNET_LEN).then_some(Lead { bytes, header_len })
    }

    /// Where the packet goes.
    pub(crate) fn destination(&self) -> MacAddress {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.bytes[self.header_len..self.header_len + 6]);
        MacAddress(mac)
    }

    /// Its VLAN, when it has a tag.
    pub(crate) fn vlan(&self) -> Option<u16> {
        let tag = self.header_len + ETHERNET_LEN - 2;
        match self.bytes[tag..] {
            [a, b, high, low, ..] if [a, b] == VLAN_ETHERTYPE => {
                Some(u16::from_be_bytes([high, low]) & VLAN_ID)
            }
            _ => None,
        }
    }

    /// Whether a driver with these offloads can take the packet. What is only a hint that it did
    /// not ask for is taken out.
    pub(crate) fn fit_to(&mut self, offloads: Offloads) -> bool {
        let flags = u32::from(self.bytes[FLAGS_AT]);
        if !offloads.contains(Offloads::CSUM) {
            if flags & net::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
                return false;
            }
            self.bytes[FLAGS_AT] = 0;
        }
        let gso_type = u32::from(self.bytes[GSO_TYPE_AT]);
        let ecn = gso_type & net::VIRTIO_NET_HDR_GSO_ECN != 0;
        if ecn && !offloads.contains(Offloads::ECN) {
            return false;
        }
        match gso_type & !net::VIRTIO_NET_HDR_GSO_ECN {
            net::VIRTIO_NET_HDR_GSO_NONE => true,
            net::VIRTIO_NET_HDR_GSO_TCPV4 => offloads.contains(Offloads::TSO4),
            net::VIRTIO_NET_HDR_GSO_TCPV6 => offloads.contains(Offloads::TSO6),
            net::VIRTIO_NET_HDR_GSO_UDP_L4 => offloads.intersects(Offloads::USO4 | Offloads::USO6),
            _ => false,
        }
    }
}

/// Sets the number of receive buffers in the header that `packet` begins with.
pub(crate) fn set_buffers(packet: &mut [u8], header_len: usize, buffers: u16) {
    if header_len == HEADER_LEN {
        packet[BUFFERS_AT..HEADER_LEN].copy_from_slice(&buffers.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(flags: u8, gso_type: u8) -> [u8; LEAD_LEN] {
        let mut bytes = [0; LEAD_LEN];
        bytes[FLAGS_AT] = flags;
        bytes[GSO_TYPE_AT] = gso_type;
        bytes
    }

    #[test]
    fn what_the_driver_cannot_take_is_seen() {
        let all = Offloads::all();
        for (flags, gso_type, offloads, fits) in [
            (0, 0, Offloads::empty(), true),
            (1, 0, Offloads::empty(), false),
            (1, 0, Offloads::CSUM, true),
            (1, 1, Offloads::CSUM, false),
            (1, 1, Offloads::CSUM | Offloads::TSO4, true),
            (1, 0x81, Offloads::CSUM | Offloads::TSO4, false),
            (1, 0x81, all, true),
            (1, 4, Offloads::CSUM | Offloads::TSO4, false),
            (1, 5, all, true),
            (1, 3, all, false),
            (1, 77, all, false),
        ] {
            let mut bytes = packet(flags, gso_type);
            let mut lead = Lead::new(&mut bytes, HEADER_LEN).unwrap();
            assert_eq!(
                lead.fit_to(offloads),
                fits,
                "{flags} {gso_type} {offloads:?}"
            );
        }
    }

    #[test]
    fn a_hint_that_nobody_asked_for_is_taken_out() {
        const DATA_VALID: u8 = 2;
        let mut bytes = packet(DATA_VALID, 0);
        assert!(
            Lead::new(&mut bytes, HEADER_LEN)
                .unwrap()
                .fit_to(Offloads::empty())
        );
        assert_eq!(bytes[FLAGS_AT], 0);
    }

    #[test]
    fn vlan_and_destination_are_found_behind_both_header_lengths() {
        for header_len in [LEGACY_HEADER_LEN, HEADER_LEN] {
            let mut bytes = vec![0; header_len];
            bytes.extend([2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 8, 0x81, 0, 0xe1, 0x23]);
            let lead = Lead::new(&mut bytes, header_len).unwrap();
            assert_eq!(lead.destination(), MacAddress([2, 0, 0, 0, 0, 7]));
            assert_eq!(lead.vlan(), Some(0x123));
        }
    }

    #[test]
    fn a_runt_is_no_packet() {
        let mut bytes = [0; HEADER_LEN + ETHERNET_LEN - 1];
        assert!(Lead::new(&mut bytes, HEADER_LEN).is_none());
        let mut bytes = [0; HEADER_LEN + ETHERNET_LEN];
        let lead = Lead::new(&mut bytes, HEADER_LEN).unwrap();
        assert_eq!(lead.vlan(), None);
    }

    #[test]
    fn a_legacy_header_has_no_number_of_buffers() {
        let mut bytes = [0; LEAD_LEN];
        set_buffers(&mut bytes, LEGACY_HEADER_LEN, 3);
        assert_eq!(bytes, [0; LEAD_LEN]);
        set_buffers(&mut bytes, HEADER_LEN, 0x102);
        assert_eq!(bytes[10..12], [2, 1]);
    }
}
