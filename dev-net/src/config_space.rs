//! The configuration space: `struct virtio_net_config` (virtio 1.3, section 5.1.4).

use crate::mac::MacAddress;

/// Bytes up to the last field of a feature that is offered.
const LEN: usize = 12;

/// Bits of `status`: VIRTIO_NET_S_LINK_UP, VIRTIO_NET_S_ANNOUNCE.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// The fields of the features that are offered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConfigSpace {
    /// The card's address now.
    pub(crate) mac: MacAddress,
    /// The driver shall announce itself.
    pub(crate) announce: bool,
    /// Most queue pairs.
    pub(crate) max_pairs: u16,
    /// MTU in bytes; 0 when it is not offered.
    pub(crate) mtu: u16,
}

impl ConfigSpace {
    fn bytes(self) -> [u8; LEN] {
        let status = LINK_UP | if self.announce { ANNOUNCE } else { 0 };
        let mut bytes = [0; LEN];
        bytes[..6].copy_from_slice(&self.mac.0);
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.max_pairs.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }

    /// Fills `data` from `offset`; zeroes past the end.
    pub(crate) fn read(self, offset: u32, data: &mut [u8]) {
        let bytes = self.bytes();
        let tail = usize::try_from(offset)
            .ok()
            .and_then(|offset| bytes.get(offset..))
            .unwrap_or_default();
        let len = tail.len().min(data.len());
        data[..len].copy_from_slice(&tail[..len]);
        data[len..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: ConfigSpace = ConfigSpace {
        mac: MacAddress([2, 1, 2, 3, 4, 5]),
        announce: true,
        max_pairs: 0x0102,
        mtu: 1500,
    };

    #[test]
    fn fields_are_where_the_driver_looks() {
        let mut data = [0xee; 16];
        SPACE.read(0, &mut data);
        assert_eq!(data, [2, 1, 2, 3, 4, 5, 3, 0, 2, 1, 0xdc, 5, 0, 0, 0, 0]);
    }

    #[test]
    fn any_offset_and_length_can_be_read() {
        let mut whole = [0; 24];
        SPACE.read(0, &mut whole);
        for offset in 0..20 {
            let mut data = [0xee; 4];
            SPACE.read(u32::try_from(offset).unwrap(), &mut data);
            assert_eq!(data, whole[offset..offset + 4]);
        }
        let mut data = [0xee; 4];
        SPACE.read(u32::MAX, &mut data);
        assert_eq!(data, [0; 4]);
        SPACE.read(3, &mut []);
    }
}
