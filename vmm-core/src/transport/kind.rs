//! Device types (virtio 1.3, 5): numbers, names, and what PCI says of them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A device type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceKind(u16);

/// A device type that does not exist.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unknown device type {0:?}; use one of {names}, or a number from 1 to 63", names = names())]
pub struct UnknownKind(pub String);

/// PCI device IDs of virtio 1 start here (virtio 1.3, 4.1.2.1).
const FIRST_PCI_ID: u16 = 0x1040;

/// Number, name, PCI class code.
const KNOWN: [(u16, &str, u32); 15] = [
    (1, "net", 0x02_0000),
    (2, "blk", 0x01_0000),
    (3, "console", 0x07_8000),
    (4, "rng", 0x00_ff00),
    (5, "balloon", 0x00_ff00),
    (8, "scsi", 0x01_0000),
    (16, "gpu", 0x03_8000),
    (18, "input", 0x09_8000),
    (19, "vsock", 0x02_8000),
    (20, "crypto", 0x10_8000),
    (25, "sound", 0x04_0100),
    (26, "fs", 0x01_8000),
    (34, "i2c", 0x0c_8000),
    (36, "can", 0x0c_0900),
    (41, "gpio", 0x08_8000),
];

fn names() -> String {
    KNOWN.map(|(_, name, _)| name).join(", ")
}

impl DeviceKind {
    /// Network card.
    pub const NET: Self = Self(1);
    /// Block device.
    pub const BLK: Self = Self(2);
    /// Console.
    pub const CONSOLE: Self = Self(3);
    /// Entropy source.
    pub const RNG: Self = Self(4);
    /// Memory balloon.
    pub const BALLOON: Self = Self(5);
    /// SCSI host.
    pub const SCSI: Self = Self(8);
    /// Graphics.
    pub const GPU: Self = Self(16);
    /// Input device.
    pub const INPUT: Self = Self(18);
    /// Socket device.
    pub const VSOCK: Self = Self(19);
    /// Cryptography.
    pub const CRYPTO: Self = Self(20);
    /// Sound.
    pub const SOUND: Self = Self(25);
    /// File system.
    pub const FS: Self = Self(26);
    /// GPIO controller.
    pub const GPIO: Self = Self(41);

    /// The type with this number; PCI has room for 63.
    pub fn from_id(id: u16) -> Option<Self> {
        (1..=63).contains(&id).then_some(Self(id))
    }

    /// The type's number.
    pub fn id(self) -> u16 {
        self.0
    }

    /// PCI device ID.
    pub fn pci_device(self) -> u16 {
        FIRST_PCI_ID + self.0
    }

    /// PCI class code: 24 bits.
    pub fn pci_class(self) -> u32 {
        self.known().map_or(0x00_ff00, |(.., class)| class)
    }

    fn known(self) -> Option<(u16, &'static str, u32)> {
        KNOWN.into_iter().find(|&(id, ..)| id == self.0)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((_, name, _)) => f.write_str(name),
            None => self.0.fmt(f),
        }
    }
}

impl FromStr for DeviceKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let by_name = KNOWN.iter().find(|(_, name, _)| *name == text);
        match by_name {
            Some(&(id, ..)) => Ok(Self(id)),
            None => text
                .parse()
                .ok()
                .and_then(Self::from_id)
                .ok_or_else(|| UnknownKind(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_types() {
        assert_eq!("net".parse(), Ok(DeviceKind::NET));
        assert_eq!("26".parse(), Ok(DeviceKind::FS));
        assert_eq!(DeviceKind::FS.to_string(), "fs");
        assert_eq!(DeviceKind::from_id(30).unwrap().to_string(), "30");
        assert_eq!(DeviceKind::BLK.pci_device(), 0x1042);
        assert_eq!(DeviceKind::NET.pci_class(), 0x02_0000);
    }

    #[test]
    fn what_is_no_type_is_named() {
        for text in ["", "disk", "0", "64", "-1"] {
            let error = text.parse::<DeviceKind>().unwrap_err().to_string();
            let start = format!("unknown device type {text:?}; use one of net, blk,");
            assert!(error.starts_with(&start), "{error}");
        }
    }
}
