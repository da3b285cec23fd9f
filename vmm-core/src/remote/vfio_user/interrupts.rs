//! How the device interrupts: by MSI-X, or by MSI if it has nothing else.
//!
//! Either capability is the machine's. With MSI-X messages and masks are in a table, with MSI in the
//! capability itself; behind both is the same [`Msix`], whose sources are what the device signals.

use std::ops::Range;

use vfio_user::pci::{MSI_IRQ, MSIX_IRQ};

use super::Unusable;
use crate::interrupt::MsiMessage;
use crate::pci::{BarIndex, CONFIG_SIZE, ConfigSpace, ENTRY_SIZE, Msix, MsixError};

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;
/// The most capabilities that a list in these registers can have.
const MOST_CAPABILITIES: usize = 48;

const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;

/// Message control of MSI (PCI local bus 3.0, 6.8.1.3).
const MSI_ENABLE: u16 = 1 << 0;
const MSI_CAPABLE: u16 = 0b111 << 1;
const MSI_ENABLED: u16 = 0b111 << 4;
const MSI_WIDE: u16 = 1 << 7;
/// The most vectors of MSI, as a power of two.
const MOST_MSI: u16 = 5;

/// What the device has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interrupts {
    /// Offset of the capability.
    at: u8,
    pub(super) vectors: u16,
    kind: Kind,
    /// Offsets of capabilities that are not shown.
    pub(super) hidden: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Msix {
        table: Place,
        pending: Place,
    },
    Msi {
        /// Whether messages have addresses of 64 bits.
        is_wide: bool,
    },
}

/// A part of a BAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) bar: u8,
    pub(super) range: Range<u64>,
}

/// A part of MSI-X that an access leads to, and where in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MsixPart {
    Table(u64),
    Pending(u64),
}

impl Place {
    fn find(&self, bar: BarIndex, offset: u64) -> Option<u64> {
        let inside = self.bar == bar as u8 && self.range.contains(&offset);
        inside.then(|| offset - self.range.start)
    }
}

impl Interrupts {
    /// Finds them in a device's configuration space.
    pub(super) fn of(registers: &[u8; CONFIG_SIZE]) -> Result<Self, Unusable> {
        let capabilities = capabilities(registers);
        let find = |id| capabilities.iter().find(|it| it.0 == id).map(|it| it.1);
        match (find(MSIX), find(MSI)) {
            (Some(at), _) => Self::msix(registers, at, &capabilities),
            (None, Some(at)) => Self::msi(registers, at),
            (None, None) => Err(Unusable::NoInterrupts),
        }
    }

    fn msix(
        registers: &[u8; CONFIG_SIZE],
        at: u8,
        capabilities: &[(u8, u8)],
    ) -> Result<Self, Unusable> {
        let [_, _, c0, c1, t0, t1, t2, t3, p0, p1, p2, p3] = body(registers, at)?;
        let vectors = (u16::from_le_bytes([c0, c1]) & 0x7ff) + 1;
        let place = |dword: [u8; 4], size| {
            let start = u64::from(u32::from_le_bytes(dword) & !7);
            Place {
                bar: dword[0] & 7,
                range: start..start + size,
            }
        };
        let kind = Kind::Msix {
            table: place([t0, t1, t2, t3], u64::from(vectors) * ENTRY_SIZE),
            pending: place([p0, p1, p2, p3], u64::from(vectors).div_ceil(64) * 8),
        };
        let other = |&(id, at): &(u8, u8)| (id == MSI).then_some(at);
        Ok(Self {
            at,
            vectors,
            kind,
            hidden: capabilities.iter().filter_map(other).collect(),
        })
    }

    fn msi(registers: &[u8; CONFIG_SIZE], at: u8) -> Result<Self, Unusable> {
        let [_, _, c0, c1] = body(registers, at)?;
        let control = u16::from_le_bytes([c0, c1]);
        let power = ((control & MSI_CAPABLE) >> 1).min(MOST_MSI);
        let is_wide = control & MSI_WIDE != 0;
        match is_wide {
            false => body::<10>(registers, at).map(drop)?,
            true => body::<14>(registers, at).map(drop)?,
        }
        Ok(Self {
            at,
            vectors: 1 << power,
            kind: Kind::Msi { is_wide },
            hidden: Vec::new(),
        })
    }

    /// Their index in the protocol.
    pub(super) fn index(&self) -> u32 {
        match self.kind {
            Kind::Msix { .. } => MSIX_IRQ,
            Kind::Msi { .. } => MSI_IRQ,
        }
    }

    /// Parts of BARs that are the machine's, by their names.
    pub(super) fn places(&self) -> Vec<(&'static str, &Place)> {
        match &self.kind {
            Kind::Msix { table, pending } => {
                vec![("MSI-X table", table), ("MSI-X pending bits", pending)]
            }
            Kind::Msi { .. } => Vec::new(),
        }
    }

    /// What of them is at `offset` of a BAR, if anything.
    pub(super) fn part(&self, bar: BarIndex, offset: u64) -> Option<MsixPart> {
        let Kind::Msix { table, pending } = &self.kind else {
            return None;
        };
        let table = table.find(bar, offset).map(MsixPart::Table);
        table.or_else(|| pending.find(bar, offset).map(MsixPart::Pending))
    }

    /// Registers that are the machine's.
    pub(super) fn registers(&self) -> Range<u16> {
        let at = u16::from(self.at);
        match self.kind {
            Kind::Msix { .. } => at + 2..at + 4,
            Kind::Msi { is_wide: false } => at + 2..at + 10,
            Kind::Msi { is_wide: true } => at + 2..at + 14,
        }
    }

    /// Makes the capability in `config` the machine's, as after power-on.
    pub(super) fn begin(&self, config: &mut ConfigSpace) {
        let Kind::Msi { is_wide } = self.kind else {
            Msix::take_capability(config, self.at);
            return;
        };
        // Without masks and pending bits, which the device may have.
        let control = config.u16(self.at + 2) & (MSI_CAPABLE | MSI_WIDE);
        config.set(self.at + 2, &control.to_le_bytes());
        config.set_writable(self.at + 2, &(MSI_ENABLE | MSI_ENABLED).to_le_bytes());
        let writable: &[u8] = match is_wide {
            false => &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff],
            true => &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        };
        config.set(self.at + 4, &[0; 10][..writable.len()]);
        config.set_writable(self.at + 4, writable);
    }

    /// Vectors that the guest uses: with MSI no more than it wants, as a host may not have all.
    pub(super) fn used(&self, config: &ConfigSpace) -> u16 {
        match self.kind {
            Kind::Msix { .. } => self.vectors,
            Kind::Msi { .. } => {
                let power = (config.u16(self.at + 2) & MSI_ENABLED) >> 4;
                (1 << power.min(MOST_MSI)).min(self.vectors)
            }
        }
    }

    /// Takes over what the guest has written.
    pub(super) fn follow(&self, config: &ConfigSpace, msix: &mut Msix) -> Result<(), MsixError> {
        let control = config.u16(self.at + 2);
        let Kind::Msi { is_wide } = self.kind else {
            return msix.set_control(control);
        };
        let (high, data) = match is_wide {
            false => (0, self.at + 8),
            true => (config.u32(self.at + 8), self.at + 12),
        };
        let address = u64::from(config.u32(self.at + 4)) | u64::from(high) << 32;
        let data = config.u16(data);
        let used = self.used(config);
        let message = |vector| MsiMessage {
            address,
            data: u32::from(data & !(used - 1) | vector),
        };
        let messages: Vec<_> = (0..used).map(message).collect();
        msix.set_messages(&messages)?;
        msix.set_enabled(control & MSI_ENABLE != 0)
    }
}

/// Identifiers and offsets of capabilities, of which there may be any number of each.
fn capabilities(registers: &[u8; CONFIG_SIZE]) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    let mut at = registers[CAPABILITY_POINTER] & !3;
    if registers[STATUS] & STATUS_CAPABILITIES == 0 {
        at = 0;
    }
    while at >= 0x40 && found.len() < MOST_CAPABILITIES {
        found.push((registers[usize::from(at)], at));
        at = registers[usize::from(at) + 1] & !3;
    }
    found
}

fn body<const N: usize>(registers: &[u8; CONFIG_SIZE], at: u8) -> Result<[u8; N], Unusable> {
    let rest = registers[usize::from(at)..].first_chunk();
    rest.copied().ok_or(Unusable::NoInterrupts)
}
