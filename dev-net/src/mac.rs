//! MAC addresses.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use thiserror::Error;

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MacAddress(pub(crate) [u8; 6]);

impl MacAddress {
    /// The address that everybody listens to.
    pub(crate) const BROADCAST: MacAddress = MacAddress([0xff; 6]);

    /// A new one for a card: random, locally administered, of one station.
    pub(crate) fn random() -> io::Result<MacAddress> {
        let mut bytes = [0; 6];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[0] = bytes[0] & !0x01 | 0x02;
        Ok(MacAddress(bytes))
    }

    /// Whether it stands for a group of stations; broadcast is one.
    pub(crate) fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a card can have it: one station's, and not all zeroes.
    pub(crate) fn is_station(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is no MAC address.
#[derive(Debug, Error)]
pub(crate) enum MacError {
    /// Not six bytes.
    #[error("not a MAC address; write six bytes in hexadecimal, as in 52:54:00:12:34:56")]
    Form,
    /// A group's address, or zeroes.
    #[error("not an address that a card can have: the first byte is odd, or all bytes are zero")]
    Station,
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(MacError::Form)?;
            let plain = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            if !plain {
                return Err(MacError::Form);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError::Form)?;
        }
        if parts.next().is_some() {
            return Err(MacError::Form);
        }
        let mac = MacAddress(bytes);
        mac.is_station().then_some(mac).ok_or(MacError::Station)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_there_and_back() {
        let mac: MacAddress = "52:54:00:12:AB:56".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:ab:56");
    }

    #[test]
    fn what_no_card_can_have_is_refused() {
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "52:54:00:12:34:5",
            "52:54:00:12:34:+5",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_random_one_is_a_station_s() {
        let mac = MacAddress::random().unwrap();
        assert!(mac.is_station());
        assert_eq!(mac.0[0] & 2, 2, "{mac}");
    }
}
