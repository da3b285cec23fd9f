//! A type 0 header: who the function is, its command register and its BARs.
//!
//! The header decides where each BAR is decoded; its owner puts the ranges on the bus:
//! after each write and restore, [`Header::moves`] says what is to change.

use super::config::{CONFIG_SIZE, ConfigError, ConfigSpace};
use super::{BarAllocator, BarError, BarIndex};
use crate::layout::{MMIO32, MMIO32_HIGH};

const COMMAND: u8 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory, bus master, and interrupt disable: what the guest may set.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;

const HEADER_TYPE: u8 = 0x0e;
const MULTIFUNCTION: u8 = 1 << 7;
/// Registers, and their sizes, that say where the function is and how it interrupts: command, cache
/// line size, BARs, expansion ROM, interrupt line and pin.
const BARLESS: [(u8, usize); 5] = [(COMMAND, 2), (0x0c, 1), (0x10, 24), (0x30, 4), (0x3c, 2)];

/// Who a function is (PCI local bus 3.0, 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class, programming interface: 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A BAR that is to be decoded somewhere else, or no longer, or from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarMove {
    /// Which BAR.
    pub bar: BarIndex,
    /// Its size in bytes.
    pub size: u64,
    /// Where it was decoded.
    pub from: Option<u64>,
    /// Where it is decoded from now on.
    pub to: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    index: BarIndex,
    size: u32,
    /// The address that reset brings back.
    initial: u32,
    decoded: Option<u64>,
}

/// The header of a function.
#[derive(Clone, Debug)]
pub struct Header {
    config: ConfigSpace,
    bars: Vec<Bar>,
}

impl Header {
    /// A header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut config = ConfigSpace::default();
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        config.set(0x08, &[identity.revision]);
        config.set(0x09, &identity.class.to_le_bytes()[..3]);
        config.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        config.set(0x2e, &identity.subsystem.to_le_bytes());
        Self::of(config)
    }

    /// The header, and all that follows, of a function whose `registers` are known: without the
    /// BARs, the ROM and the interrupt pin that it has, and with a slot of its own.
    pub fn showing(registers: &[u8; CONFIG_SIZE]) -> Self {
        let mut config = ConfigSpace::default();
        config.set(0, registers);
        for (offset, size) in BARLESS {
            config.set(offset, &[0; 24][..size]);
        }
        config.set(
            HEADER_TYPE,
            &[registers[usize::from(HEADER_TYPE)] & !MULTIFUNCTION],
        );
        Self::of(config)
    }

    fn of(mut config: ConfigSpace) -> Self {
        config.set_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and interrupt line mean nothing to a device, but are kept.
        config.set_writable(0x0c, &[0xff]);
        config.set_writable(0x3c, &[0xff]);
        Self {
            config,
            bars: Vec::new(),
        }
    }

    /// Adds a 32-bit memory BAR of `size` bytes and gives it an address.
    pub fn add_bar(
        &mut self,
        index: BarIndex,
        size: u32,
        allocator: &BarAllocator,
    ) -> Result<(), BarError> {
        let initial = allocator.allocate(size)?;
        let mask = !(size - 1);
        self.config
            .set_writable(index.register(), &mask.to_le_bytes());
        self.config.set(index.register(), &initial.to_le_bytes());
        self.bars.push(Bar {
            index,
            size,
            initial,
            decoded: None,
        });
        Ok(())
    }

    /// Appends a capability, see [`ConfigSpace::add_capability`].
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, ConfigError> {
        self.config.add_capability(id, body, writable)
    }

    /// The registers.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// The registers, to change them as the device does.
    pub fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// Where `bar` is decoded now.
    pub fn decoded(&self, bar: BarIndex) -> Option<u64> {
        self.bars.iter().find(|b| b.index == bar)?.decoded
    }

    /// Compares where BARs are decoded with where the registers want them. The caller
    /// carries each move out and says with [`Self::settle`] what came of it.
    pub fn moves(&self) -> Vec<BarMove> {
        let enabled = self.config.u16(COMMAND) & COMMAND_MEMORY != 0;
        let mut moves = Vec::new();
        for bar in &self.bars {
            let base = u64::from(self.config.u32(bar.index.register()) & !(bar.size - 1));
            let end = base + u64::from(bar.size);
            let inside = [MMIO32, MMIO32_HIGH]
                .iter()
                .any(|window| base >= window.start && end <= window.end);
            let to = (enabled && inside).then_some(base);
            if to != bar.decoded {
                moves.push(BarMove {
                    bar: bar.index,
                    size: bar.size.into(),
                    from: bar.decoded,
                    to,
                });
            }
        }
        moves
    }

    /// Notes where `bar` is decoded from now on.
    pub fn settle(&mut self, bar: BarIndex, at: Option<u64>) {
        if let Some(bar) = self.bars.iter_mut().find(|b| b.index == bar) {
            bar.decoded = at;
        }
    }

    /// Command register and BARs as they were made.
    pub fn reset(&mut self) {
        self.config.set(COMMAND, &[0, 0]);
        self.config.set(0x0c, &[0]);
        self.config.set(0x3c, &[0]);
        for bar in &self.bars {
            let initial = bar.initial.to_le_bytes();
            self.config.set(bar.index.register(), &initial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1041,
        revision: 1,
        class: 0x02_0000,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1041,
    };

    fn header() -> Header {
        let bars = BarAllocator::new().unwrap();
        let mut header = Header::new(&IDENTITY);
        header.add_bar(BarIndex::Bar0, 0x4000, &bars).unwrap();
        header.add_bar(BarIndex::Bar1, 0x1000, &bars).unwrap();
        header
    }

    fn write32(header: &mut Header, offset: u16, value: u32) {
        header.config_mut().write(offset, &value.to_le_bytes());
    }

    #[test]
    fn identity_is_where_the_specification_says() {
        let header = header();
        assert_eq!(header.config().u32(0), 0x1041_1af4);
        assert_eq!(header.config().u32(8), 0x0200_0001);
        assert_eq!(header.config().u32(0x2c), 0x1041_1af4);
    }

    #[test]
    fn writing_ones_tells_the_size() {
        let mut header = header();
        write32(&mut header, 0x10, u32::MAX);
        write32(&mut header, 0x14, u32::MAX);
        write32(&mut header, 0x18, u32::MAX);
        assert_eq!(header.config().u32(0x10), 0xffff_c000);
        assert_eq!(header.config().u32(0x14), 0xffff_f000);
        assert_eq!(header.config().u32(0x18), 0, "no such BAR");
        assert_eq!(header.moves(), []);
    }

    fn carry_out(header: &mut Header) -> Vec<BarMove> {
        let moves = header.moves();
        for change in &moves {
            header.settle(change.bar, change.to);
        }
        moves
    }

    #[test]
    fn decoding_follows_the_command_register() {
        let mut header = header();
        assert_eq!(carry_out(&mut header), []);
        header.config_mut().write(4, &[0x06, 0]);
        let moves = carry_out(&mut header);
        assert_eq!(moves.len(), 2);
        assert_eq!((moves[0].from, moves[0].to), (None, Some(0xc000_0000)));
        assert_eq!(header.decoded(BarIndex::Bar1), Some(0xc000_4000));
        assert_eq!(carry_out(&mut header), []);

        write32(&mut header, 0x10, 0xd000_0000);
        let moves = carry_out(&mut header);
        assert_eq!(
            moves,
            [BarMove {
                bar: BarIndex::Bar0,
                size: 0x4000,
                from: Some(0xc000_0000),
                to: Some(0xd000_0000)
            }]
        );
        for (at, to) in [
            (0xdfff_c000, Some(0xdfff_c000)),
            (0xe000_0000, None),
            (0xe00f_c000, None),
            (0xe010_0000, Some(0xe010_0000)),
            (0xfebf_c000, Some(0xfebf_c000)),
            (u32::MAX, None),
        ] {
            write32(&mut header, 0x10, at);
            carry_out(&mut header);
            assert_eq!(header.decoded(BarIndex::Bar0), to, "{at:#x}");
        }
        header.reset();
        assert_eq!(carry_out(&mut header).len(), 1);
        assert_eq!(header.config().u32(0x10), 0xc000_0000);
    }
}
