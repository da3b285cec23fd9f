//! A packet that tells a network where the guest is: a reverse ARP request (RFC 903) of its own
//! address, which nobody answers, and from which switches learn.

use std::io;

use device_kit::Announcer;

use crate::mac::MacAddress;
use crate::shared::Shared;

/// Bytes of an Ethernet frame without its checksum, at least.
const MIN_FRAME: usize = 60;

impl Announcer for Shared {
    fn announce(&self, mac: [u8; 6]) -> io::Result<()> {
        let packet = [vec![0; self.header_len()], rarp(MacAddress(mac))].concat();
        match nix::unistd::write(self.tap().queue(0), &packet) {
            Ok(len) if len == packet.len() => Ok(()),
            Ok(len) => Err(io::Error::other(format!("the tap took {len} bytes"))),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn rarp(MacAddress(mac): MacAddress) -> Vec<u8> {
    let MacAddress(everybody) = MacAddress::BROADCAST;
    let nobody = [0; 4];
    let mut frame = [&everybody[..], &mac].concat();
    // RARP; Ethernet, IPv4, 6 and 4 bytes of address; reverse request
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend([&mac[..], &nobody, &mac, &nobody].concat());
    frame.resize(MIN_FRAME, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_reverse_request_of_ones_own_address() {
        let mac = [2, 0, 0, 0, 0, 9];
        let frame = rarp(MacAddress(mac));
        assert_eq!(frame.len(), MIN_FRAME);
        assert_eq!(
            frame[..14],
            *b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x09\x80\x35"
        );
        assert_eq!(frame[20..22], [0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    }
}
