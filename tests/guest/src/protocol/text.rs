//! A short string that needs no allocator.

use core::fmt;

/// Up to [`Text::CAPACITY`] bytes of ASCII without spaces; what does not fit is cut off.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Text {
    bytes: [u8; Text::CAPACITY],
    length: u8,
}

impl Text {
    /// Bytes that a text can hold.
    pub const CAPACITY: usize = 48;

    /// Takes over `text`; bytes that would break a report line become `_`.
    pub fn new(text: &str) -> Self {
        Self::from_bytes(text.as_bytes())
    }

    /// As [`Text::new`], for bytes that come from a device.
    pub fn from_bytes(source: &[u8]) -> Self {
        let mut text = Self {
            bytes: [0; Self::CAPACITY],
            length: 0,
        };
        for (slot, &byte) in text.bytes.iter_mut().zip(source) {
            *slot = if byte.is_ascii_graphic() { byte } else { b'_' };
            text.length += 1;
        }
        text
    }

    /// The text itself.
    pub fn as_str(&self) -> &str {
        // Only ASCII is ever stored, so this cannot fail.
        core::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
