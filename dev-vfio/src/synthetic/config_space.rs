//! The synthetic device's configuration space (PCI Local Bus 3.0, chapter 6).

/// Bytes of it.
pub(super) const LEN: usize = 256;

/// Bytes of the registers behind BAR 0.
pub(super) const REGISTERS_LEN: u32 = 4 << 10;
/// Bytes behind BAR 2.
pub(super) const MEMORY_BAR_LEN: u32 = 64 << 10;
/// Bytes of it that are memory, from its beginning.
pub(super) const MEMORY_LEN: u32 = 32 << 10;
/// Number of MSI-X vectors.
pub(super) const VECTORS: u16 = 4;

/// A vendor that the PCI-SIG has not given out; emulators use it.
const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x6077;
const REVISION: u8 = 1;
/// "Does not fit in any defined class".
const CLASS: u8 = 0xff;

const COMMAND_AT: usize = 0x04;
const STATUS_AT: usize = 0x06;
const BAR0_AT: usize = 0x10;
const BAR2_AT: usize = 0x18;
const MSIX_AT: u8 = 0x40;

const BUS_MASTER: u16 = 1 << 2;
/// What of the command register can be set: memory, bus master.
const COMMAND_MASK: u16 = 1 << 1 | BUS_MASTER;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR_64_BIT: u32 = 0b100;
const CAPABILITY_MSIX: u8 = 0x11;
/// Table and pending bits are behind this BAR.
const MSIX_BAR: u32 = 2;
const TABLE_OFFSET: u32 = 0x8000;
const PENDING_OFFSET: u32 = 0xc000;

/// The space as it is now.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; LEN],
}

impl ConfigSpace {
    /// After a reset.
    pub(super) fn new() -> Self {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0x00, &VENDOR.to_le_bytes());
        put(0x02, &DEVICE.to_le_bytes());
        put(STATUS_AT, &STATUS_CAPABILITIES.to_le_bytes());
        put(0x08, &[REVISION, 0, 0, CLASS]);
        put(BAR2_AT, &BAR_64_BIT.to_le_bytes());
        put(0x2c, &VENDOR.to_le_bytes());
        put(0x2e, &DEVICE.to_le_bytes());
        put(0x34, &[MSIX_AT]);
        let msix = usize::from(MSIX_AT);
        put(msix, &[CAPABILITY_MSIX, 0]);
        put(msix + 2, &(VECTORS - 1).to_le_bytes());
        put(msix + 4, &(TABLE_OFFSET | MSIX_BAR).to_le_bytes());
        put(msix + 8, &(PENDING_OFFSET | MSIX_BAR).to_le_bytes());
        ConfigSpace { bytes }
    }

    /// Whether the device may access memory.
    pub(super) fn is_bus_master(&self) -> bool {
        let command = [self.bytes[COMMAND_AT], self.bytes[COMMAND_AT + 1]];
        u16::from_le_bytes(command) & BUS_MASTER != 0
    }

    /// Reads what is in the space; zeroes past its end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).ok();
            *byte = at.and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes what can be written of it.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            let Ok(at) = usize::try_from(at) else { return };
            let mask = writable(at);
            if let Some(byte) = self.bytes.get_mut(at) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }
}

/// The bits of a byte that can be written.
fn writable(at: usize) -> u8 {
    let of = |start: usize, mask: u64| mask.to_le_bytes().get(at - start).copied().unwrap_or(0);
    match at {
        COMMAND_AT..STATUS_AT => of(COMMAND_AT, COMMAND_MASK.into()),
        BAR0_AT..BAR1_AT => of(BAR0_AT, (!(REGISTERS_LEN - 1)).into()),
        BAR2_AT..BAR4_AT => of(BAR2_AT, !(u64::from(MEMORY_BAR_LEN) - 1)),
        _ => 0,
    }
}

const BAR1_AT: usize = BAR0_AT + 4;
const BAR4_AT: usize = BAR2_AT + 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn word(space: &ConfigSpace, at: u64) -> u32 {
        let mut word = [0; 4];
        space.read(at, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn bars_say_how_large_they_are() {
        let mut space = ConfigSpace::new();
        for at in (0x10..0x28).step_by(4) {
            space.write(at, &[0xff; 4]);
        }
        let sizes: Vec<u32> = (0x10..0x28).step_by(4).map(|at| word(&space, at)).collect();
        let memory = [0xffff_0004, 0xffff_ffff];
        assert_eq!(sizes, [0xffff_f000, 0, memory[0], memory[1], 0, 0]);
    }

    #[test]
    fn only_the_command_and_bars_can_be_written() {
        let mut space = ConfigSpace::new();
        let before = space.bytes;
        assert!(!space.is_bus_master());
        space.write(0, &[0xff; LEN + 4]);
        assert!(space.is_bus_master());
        let changed = |at: &usize| space.bytes[*at] != before[*at];
        let changed: Vec<usize> = (0..LEN).filter(changed).collect();
        assert_eq!(
            changed,
            [0x04, 0x11, 0x12, 0x13, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]
        );
        assert_eq!(word(&space, 0x04), 0x0010_0006);
    }

    #[test]
    fn msix_is_the_only_capability() {
        let space = ConfigSpace::new();
        assert_eq!(word(&space, 0), 0x6077_1234);
        assert_eq!(word(&space, 0x34) & 0xff, 0x40);
        assert_eq!(word(&space, 0x40), 0x0003_0011);
        assert_eq!(word(&space, 0x44), 0x8002);
        assert_eq!(word(&space, 0x48), 0xc002);
        assert_eq!(word(&space, 0xfe), 0);
    }
}
