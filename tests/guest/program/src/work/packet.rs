//! Just enough of Ethernet, ARP, IPv4, ICMP echo and UDP to talk to one peer.

use crate::virtio::net::MAX_FRAME;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const ICMP: usize = 8;
const UDP: usize = 8;
const ARP: usize = 28;
const TYPE_ARP: [u8; 2] = [8, 6];
const TYPE_IPV4: [u8; 2] = [8, 0];
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_UDP: u8 = 17;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Payload bytes that fit into a frame of any kind here.
pub const MAX_PAYLOAD: usize = 1400;

/// Who we are and whom we talk to.
#[derive(Clone, Copy)]
pub struct Addresses {
    pub mac: [u8; 6],
    pub ip: [u8; 4],
    pub peer: [u8; 4],
    /// Not known before the peer has answered ARP.
    pub peer_mac: Option<[u8; 6]>,
}

/// What an incoming frame means to us.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// The peer's hardware address, from its ARP request or reply.
    PeerMac([u8; 6]),
    /// Somebody asks for our address: answer with [`Frame::arp_reply`].
    ArpRequest { mac: [u8; 6], ip: [u8; 4] },
    /// A ping: answer with [`Frame::echo_reply`].
    EchoRequest {
        mac: [u8; 6],
        ip: [u8; 4],
        body: &'a [u8],
    },
    /// Our ping came back.
    EchoReply(&'a [u8]),
    /// A datagram from the peer.
    Udp(&'a [u8]),
    /// None of our business.
    Other,
}

impl Addresses {
    /// Reads a frame. Anything malformed is `Other`: a network may carry anything.
    pub fn read<'a>(&self, frame: &'a [u8]) -> Incoming<'a> {
        self.read_arp(frame)
            .or_else(|| self.read_ipv4(frame))
            .unwrap_or(Incoming::Other)
    }

    fn read_arp<'a>(&self, frame: &'a [u8]) -> Option<Incoming<'a>> {
        let arp = frame.get(ETHERNET..ETHERNET + ARP)?;
        if frame[12..14] != TYPE_ARP || arp[..7] != [0, 1, 8, 0, 6, 4, 0] || arp[24..28] != self.ip
        {
            return None;
        }
        let mac: [u8; 6] = arp[8..14].try_into().ok()?;
        let ip: [u8; 4] = arp[14..18].try_into().ok()?;
        match arp[7] {
            1 => Some(Incoming::ArpRequest { mac, ip }),
            2 if ip == self.peer => Some(Incoming::PeerMac(mac)),
            _ => None,
        }
    }

    fn read_ipv4<'a>(&self, frame: &'a [u8]) -> Option<Incoming<'a>> {
        if frame.get(12..14)? != TYPE_IPV4 {
            return None;
        }
        let packet = frame.get(ETHERNET..)?;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        let header = packet.get(..IPV4)?;
        let body = packet.get(IPV4..total)?;
        let fragmented = header[6] & 0x3f != 0 || header[7] != 0;
        if header[0] != 0x45 || fragmented || header[16..20] != self.ip || checksum(&[header]) != 0
        {
            return None;
        }
        let ip: [u8; 4] = header[12..16].try_into().ok()?;
        match header[9] {
            PROTOCOL_ICMP if body.len() >= ICMP && checksum(&[body]) == 0 => match body[0] {
                ECHO_REQUEST => Some(Incoming::EchoRequest {
                    mac: frame[6..12].try_into().ok()?,
                    ip,
                    body,
                }),
                ECHO_REPLY if ip == self.peer => Some(Incoming::EchoReply(&body[ICMP..])),
                _ => None,
            },
            PROTOCOL_UDP if ip == self.peer && body.len() >= UDP => {
                let length = usize::from(u16::from_be_bytes([body[4], body[5]]));
                Some(Incoming::Udp(body.get(UDP..length)?))
            }
            _ => None,
        }
    }
}

/// An outgoing frame.
pub struct Frame {
    bytes: [u8; MAX_FRAME],
    length: usize,
}

impl Frame {
    fn new(to: [u8; 6], from: &Addresses, kind: [u8; 2]) -> Self {
        let mut frame = Self {
            bytes: [0; MAX_FRAME],
            length: 0,
        };
        frame.push(&to).push(&from.mac).push(&kind);
        frame
    }

    fn push(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
        self
    }

    /// The frame, without padding: the device or the wire adds that.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Asks for the peer's hardware address.
    pub fn arp_request(from: &Addresses) -> Self {
        let mut frame = Self::new(BROADCAST, from, TYPE_ARP);
        frame
            .push(&[0, 1, 8, 0, 6, 4, 0, 1])
            .push(&from.mac)
            .push(&from.ip)
            .push(&[0; 6])
            .push(&from.peer);
        frame
    }

    /// Tells our hardware address.
    pub fn arp_reply(from: &Addresses, mac: [u8; 6], ip: [u8; 4]) -> Self {
        let mut frame = Self::new(mac, from, TYPE_ARP);
        frame
            .push(&[0, 1, 8, 0, 6, 4, 0, 2])
            .push(&from.mac)
            .push(&from.ip)
            .push(&mac)
            .push(&ip);
        frame
    }

    fn ipv4(from: &Addresses, mac: [u8; 6], ip: [u8; 4], protocol: u8, body: usize) -> Self {
        let mut frame = Self::new(mac, from, TYPE_IPV4);
        let total = ((IPV4 + body) as u16).to_be_bytes();
        let mut header = [
            0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        header[12..16].copy_from_slice(&from.ip);
        header[16..20].copy_from_slice(&ip);
        let sum = checksum(&[&header]).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        frame.push(&header);
        frame
    }

    /// Pings the peer.
    pub fn echo_request(from: &Addresses, mac: [u8; 6], sequence: u16, payload: &[u8]) -> Self {
        let [high, low] = sequence.to_be_bytes();
        let header = [ECHO_REQUEST, 0, 0, 0, b'G', b'W', high, low];
        Self::icmp(from, mac, from.peer, header, payload)
    }

    /// Answers a ping; `body` is the whole ICMP message.
    pub fn echo_reply(from: &Addresses, mac: [u8; 6], ip: [u8; 4], body: &[u8]) -> Self {
        let body = &body[..body.len().min(ICMP + MAX_PAYLOAD)];
        let header = [ECHO_REPLY, 0, 0, 0, body[4], body[5], body[6], body[7]];
        Self::icmp(from, mac, ip, header, &body[ICMP..])
    }

    fn icmp(
        from: &Addresses,
        mac: [u8; 6],
        ip: [u8; 4],
        mut header: [u8; ICMP],
        payload: &[u8],
    ) -> Self {
        let sum = checksum(&[&header, payload]).to_be_bytes();
        header[2..4].copy_from_slice(&sum);
        let mut frame = Self::ipv4(from, mac, ip, PROTOCOL_ICMP, ICMP + payload.len());
        frame.push(&header).push(payload);
        frame
    }

    /// A datagram to the peer. It has no checksum: its payload is compared by the test itself.
    pub fn udp(from: &Addresses, mac: [u8; 6], source: u16, port: u16, payload: &[u8]) -> Self {
        let mut frame = Self::ipv4(from, mac, from.peer, PROTOCOL_UDP, UDP + payload.len());
        let length = (UDP + payload.len()) as u16;
        frame
            .push(&source.to_be_bytes())
            .push(&port.to_be_bytes())
            .push(&length.to_be_bytes())
            .push(&[0, 0]);
        frame.push(payload);
        frame
    }
}

/// The Internet checksum of parts of even length (but for the last): 0 over what includes a right
/// one.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
