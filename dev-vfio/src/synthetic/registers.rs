//! The synthetic device's registers, behind BAR 0: little-endian, accessed by four bytes at a multiple
//! of four, or by eight. Others are read as zero, and writes to them ignored.
//!
//! | at | bytes | | what |
//! |---|---|---|---|
//! | 0x00 | 4 | r | identity, "GWDT" |
//! | 0x04 | 4 | r | version, 1 |
//! | 0x08 | 4 | rw | scratch |
//! | 0x0c | 4 | r | status of the last command: 0 none, 1 done, 2 failed |
//! | 0x10 | 8 | rw | source, a guest physical address |
//! | 0x18 | 8 | rw | destination, a guest physical address |
//! | 0x20 | 4 | rw | length in bytes, 1 to 1 MiB |
//! | 0x24 | 4 | rw | MSI-X vector that is signalled after a command |
//! | 0x28 | 4 | w | command: 1 copy, 2 only the interrupt |
//! | 0x2c | 4 | r | why the last command failed, [`Failure`] |
//! | 0x30 | 8 | r | copies since the last reset |
//! | 0x38 | 8 | r | bytes copied since the last reset |

/// Bytes of the registers; the rest of BAR 0 is zero.
const LEN: usize = 0x40;

const IDENTITY: u32 = u32::from_le_bytes(*b"GWDT");
const VERSION: u32 = 1;

const VERSION_AT: usize = 0x04;
const SCRATCH_AT: usize = 0x08;
const STATUS_AT: usize = 0x0c;
const SOURCE_AT: usize = 0x10;
const DESTINATION_AT: usize = 0x18;
const LENGTH_AT: usize = 0x20;
const VECTOR_AT: usize = 0x24;
const COMMAND_AT: usize = 0x28;
const ERROR_AT: usize = 0x2c;
const COPIES_AT: usize = 0x30;
const BYTES_AT: usize = 0x38;

const DONE: u32 = 1;
const FAILED: u32 = 2;

/// Most bytes of one copy.
pub(super) const MAX_LENGTH: u32 = 1 << 20;

/// What the guest wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Bytes are copied in the guest's memory.
    Copy {
        /// From here.
        source: u64,
        /// To here.
        destination: u64,
        /// So many bytes, which may be too many.
        length: u32,
    },
    /// Nothing but the interrupt.
    Interrupt,
    /// There is no such command.
    Unknown,
}

/// Why a command failed, by the number in its register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// No length, or one that is too large.
    Length = 1,
    /// The source is not all memory that the device may read.
    Source = 2,
    /// The destination is not all memory that the device may write.
    Destination = 3,
    /// The device must not access memory.
    NotBusMaster = 4,
    /// There is no such vector.
    Vector = 5,
    /// There is no such command.
    Command = 6,
}

/// The registers as they are now.
#[derive(Debug)]
pub(super) struct Registers {
    bytes: [u8; LEN],
}

impl Registers {
    /// After a reset.
    pub(super) fn new() -> Self {
        let mut registers = Registers { bytes: [0; LEN] };
        registers.set(0, IDENTITY);
        registers.set(VERSION_AT, VERSION);
        registers
    }

    /// Reads.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let range = place(offset, data.len());
        match range.and_then(|range| self.bytes.get(range)) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }

    /// Writes, and returns the command that this is, if it is one.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Command> {
        let start = place(offset, data.len())?.start;
        let mut command = None;
        for (at, word) in (start..).step_by(4).zip(data.chunks_exact(4)) {
            match at {
                SCRATCH_AT | SOURCE_AT..COMMAND_AT => self.bytes[at..at + 4].copy_from_slice(word),
                COMMAND_AT => command = Some(self.command(word)),
                _ => {}
            }
        }
        command
    }

    fn command(&self, word: &[u8]) -> Command {
        match word {
            [1, 0, 0, 0] => Command::Copy {
                source: self.get64(SOURCE_AT),
                destination: self.get64(DESTINATION_AT),
                length: self.get(LENGTH_AT),
            },
            [2, 0, 0, 0] => Command::Interrupt,
            _ => Command::Unknown,
        }
    }

    /// The vector that the guest chose.
    pub(super) fn vector(&self) -> u32 {
        self.get(VECTOR_AT)
    }

    /// Bytes were copied.
    pub(super) fn copied(&mut self, length: u32) {
        for (at, more) in [(COPIES_AT, 1), (BYTES_AT, length.into())] {
            let sum = self.get64(at).wrapping_add(more);
            self.bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
    }

    /// A command has ended.
    pub(super) fn ended(&mut self, result: Result<(), Failure>) {
        let (status, error) = match result {
            Ok(()) => (DONE, 0),
            Err(failure) => (FAILED, failure as u32),
        };
        self.set(STATUS_AT, status);
        self.set(ERROR_AT, error);
    }

    fn get(&self, at: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.bytes[at + i]))
    }

    fn get64(&self, at: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|i| self.bytes[at + i]))
    }

    fn set(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// Where an access is, if it is one that the registers know.
fn place(offset: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(len)?;
    (start.is_multiple_of(4) && matches!(len, 4 | 8) && end <= LEN).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(registers: &Registers, at: u64) -> u32 {
        let mut word = [0; 4];
        registers.read(at, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn a_copy_is_what_the_registers_say() {
        let mut registers = Registers::new();
        assert_eq!((word(&registers, 0), word(&registers, 4)), (IDENTITY, 1));
        registers.write(0x10, &0x1_2345_6780u64.to_le_bytes());
        // By halves, too.
        registers.write(0x1c, &[9, 0, 0, 0]);
        registers.write(0x18, &[8, 0, 0, 0]);
        registers.write(0x20, &[0, 0x10, 0, 0, 3, 0, 0, 0]);
        let command = registers.write(0x28, &[1, 0, 0, 0]);
        let copy = Command::Copy {
            source: 0x1_2345_6780,
            destination: 0x9_0000_0008,
            length: 0x1000,
        };
        assert_eq!((command, registers.vector()), (Some(copy), 3));
        assert_eq!(
            registers.write(0x28, &[2, 0, 0, 0]),
            Some(Command::Interrupt)
        );
        assert_eq!(registers.write(0x28, &[0, 1, 0, 0]), Some(Command::Unknown));
    }

    #[test]
    fn results_are_read_and_not_written() {
        let mut registers = Registers::new();
        registers.copied(5);
        registers.copied(7);
        registers.ended(Err(Failure::Destination));
        for at in (0..0x100).step_by(4).filter(|at| *at != 0x28) {
            assert_eq!(registers.write(at, &[0xee; 4]), None, "{at:#x}");
        }
        let read: Vec<u32> = (0..0x44)
            .step_by(4)
            .map(|at| word(&registers, at))
            .collect();
        const ANY: u32 = 0xeeee_eeee;
        assert_eq!(
            read,
            [
                IDENTITY, 1, ANY, 2, ANY, ANY, ANY, ANY, ANY, ANY, 0, 3, 2, 0, 12, 0, 0
            ]
        );
    }

    #[test]
    fn odd_accesses_are_nothing() {
        let mut registers = Registers::new();
        for (at, len) in [
            (1, 4),
            (0x28, 1),
            (0x28, 2),
            (0x3c, 8),
            (u64::MAX, 4),
            (0, 16),
        ] {
            let mut data = vec![1; len];
            assert_eq!(registers.write(at, &data), None, "{len} at {at:#x}");
            registers.read(at, &mut data);
            assert!(data.iter().all(|byte| *byte == 0), "{len} at {at:#x}");
        }
    }
}
