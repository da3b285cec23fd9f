//! The registers of one function: bytes, each with a mask of what the guest may write.

use thiserror::Error;

/// Bytes of a conventional configuration space (PCI local bus 3.0, 6.1).
pub const CONFIG_SIZE: usize = 256;

/// First byte where capabilities may stand.
const FIRST_CAPABILITY: u8 = 0x40;
const STATUS: u8 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_POINTER: u8 = 0x34;

/// Why a configuration space could not be made or restored.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No room for another capability.
    #[error("capability {id:#x} of {size} bytes does not fit into the configuration space")]
    Full {
        /// The capability's number.
        id: u8,
        /// Its size in bytes.
        size: usize,
    },
    /// Saved registers of another length.
    #[error("saved configuration space has {found} bytes, expected {CONFIG_SIZE}")]
    Length {
        /// The length found.
        found: usize,
    },
    /// A register that the guest cannot have changed is not as it is here.
    #[error(
        "saved configuration byte {offset:#x} is {found:#04x}, this device has {expected:#04x}"
    )]
    Differs {
        /// Offset of the byte.
        offset: usize,
        /// The saved byte.
        found: u8,
        /// The byte of this device.
        expected: u8,
    },
}

/// Configuration registers.
///
/// Offsets from [`CONFIG_SIZE`] on read as all ones, which says that there is no
/// extended space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    last_capability: u8,
    next_free: usize,
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            last_capability: 0,
            next_free: usize::from(FIRST_CAPABILITY),
        }
    }
}

impl ConfigSpace {
    /// Fills `data` with the registers at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self
                .bytes
                .get(usize::from(offset) + i)
                .copied()
                .unwrap_or(0xff);
        }
    }

    /// Takes a guest's write: bits that are not writable stay.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, &value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    /// The 16-bit register at `offset`.
    pub fn u16(&self, offset: u8) -> u16 {
        let mut data = [0; 2];
        self.read(u16::from(offset), &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32-bit register at `offset`.
    pub fn u32(&self, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.read(u16::from(offset), &mut data);
        u32::from_le_bytes(data)
    }

    /// Sets registers as the device does, whatever the guest may write.
    pub fn set(&mut self, offset: u8, data: &[u8]) {
        for (byte, &value) in self.bytes[usize::from(offset)..].iter_mut().zip(data) {
            *byte = value;
        }
    }

    /// Says which bits from `offset` on the guest may write.
    pub fn set_writable(&mut self, offset: u8, mask: &[u8]) {
        for (byte, &value) in self.writable[usize::from(offset)..].iter_mut().zip(mask) {
            *byte = value;
        }
    }

    /// Appends a capability; `body` and its write mask start behind the two bytes of the
    /// list. Returns where the capability stands.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, ConfigError> {
        let size = body.len() + 2;
        let full = ConfigError::Full { id, size };
        if self.next_free + size > CONFIG_SIZE {
            return Err(full);
        }
        let at = u8::try_from(self.next_free).map_err(|_| full)?;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.set_writable(at + 2, writable);
        let link = match self.last_capability {
            0 => CAPABILITY_POINTER,
            last => last + 1,
        };
        self.set(link, &[at]);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        self.last_capability = at;
        self.next_free = (self.next_free + size).next_multiple_of(4);
        Ok(at)
    }

    /// Every register as it is now.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes saved registers over, if this is the same device.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), ConfigError> {
        let saved: &[u8; CONFIG_SIZE] = saved
            .try_into()
            .map_err(|_| ConfigError::Length { found: saved.len() })?;
        for (offset, &found) in saved.iter().enumerate() {
            let expected = self.bytes[offset];
            if (found ^ expected) & !self.writable[offset] != 0 {
                return Err(ConfigError::Differs {
                    offset,
                    found,
                    expected,
                });
            }
        }
        self.bytes = *saved;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_bits_change() {
        let mut config = ConfigSpace::default();
        config.set(0x10, &[0xa0, 0x01]);
        config.set_writable(0x10, &[0xf0, 0x00]);
        config.write(0x10, &[0x5f, 0xff]);
        assert_eq!(config.u16(0x10), 0x0150);
    }

    #[test]
    fn accesses_beyond_the_end_are_harmless() {
        let mut config = ConfigSpace::default();
        config.set_writable(0xfc, &[0xff; 4]);
        config.write(0xfe, &[1, 2, 3, 4]);
        let mut data = [0; 4];
        config.read(0xfe, &mut data);
        assert_eq!(data, [1, 2, 0xff, 0xff]);
        config.write(0xffff, &[0; 8]);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut config = ConfigSpace::default();
        let first = config.add_capability(0x11, &[1, 2, 3], &[0xff]).unwrap();
        let second = config.add_capability(0x09, &[4], &[]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(
            config.u16(STATUS) & STATUS_CAPABILITIES,
            STATUS_CAPABILITIES
        );
        assert_eq!(config.u32(0x34) & 0xff, 0x40);
        assert_eq!(config.u32(0x40), 0x0201_4811);
        assert_eq!(config.u16(0x48), 0x0009);
        let full = config.add_capability(9, &[0; 200], &[]);
        assert_eq!(full, Err(ConfigError::Full { id: 9, size: 202 }));
    }

    #[test]
    fn saved_registers_must_be_of_this_device() {
        let mut config = ConfigSpace::default();
        config.set(0, &[0xf4, 0x1a]);
        config.set_writable(4, &[0x06]);
        config.write(4, &[0x06]);
        let saved = config.save();
        config.write(4, &[0]);
        config.restore(&saved).unwrap();
        assert_eq!(config.u16(4), 6);

        let mut other = saved.clone();
        other[1] = 0x1b;
        let refused = config.restore(&other).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "saved configuration byte 0x1 is 0x1b, this device has 0x1a"
        );
        let short = config.restore(&saved[1..]);
        assert_eq!(short, Err(ConfigError::Length { found: 255 }));
    }
}
