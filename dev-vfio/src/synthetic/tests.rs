//! The device as a client has it.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;

const CONFIG_COMMAND: u64 = 4;
const MEMORY: u64 = 0x10_0000;
const SIZE: u64 = 0x1_0000;

struct Bench {
    device: Synthetic,
    memory: File,
    events: Vec<EventFd>,
}

impl Bench {
    /// A device with memory and interrupts.
    fn new() -> Self {
        let mut device = Synthetic::new(Metrics::default()).unwrap();
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(SIZE).unwrap();
        let region = DmaRegion {
            address: MEMORY,
            size: SIZE,
            offset: 0,
            readable: true,
            writable: true,
        };
        let file = memory.try_clone().unwrap().into();
        device.dma_map(region, Some(file)).unwrap();
        let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let events: Vec<EventFd> = (0..VECTORS).map(|_| event()).collect();
        let handed = events
            .iter()
            .map(|event| Some(event.as_fd().try_clone_to_owned().unwrap()));
        let action = IrqAction::Trigger(IrqData::Eventfds(handed.collect()));
        device.set_irqs(pci::MSIX_IRQ, 0, action).unwrap();
        Bench {
            device,
            memory,
            events,
        }
    }

    fn config_command(&mut self, command: u16) {
        self.device
            .write(pci::CONFIG_REGION, CONFIG_COMMAND, &command.to_le_bytes())
            .unwrap();
    }

    fn set(&mut self, at: u64, value: u32) {
        self.device
            .write(REGISTERS_REGION, at, &value.to_le_bytes())
            .unwrap();
    }

    fn get(&mut self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.device.read(REGISTERS_REGION, at, &mut word).unwrap();
        u32::from_le_bytes(word)
    }

    /// Copies, and returns status and error.
    fn copy(&mut self, source: u64, destination: u64, length: u32) -> (u32, u32) {
        for (at, address) in [(0x10, source), (0x18, destination)] {
            self.device
                .write(REGISTERS_REGION, at, &address.to_le_bytes())
                .unwrap();
        }
        self.set(0x20, length);
        self.set(0x28, 1);
        (self.get(0x0c), self.get(0x2c))
    }

    fn interrupts(&self) -> Vec<u64> {
        self.events
            .iter()
            .map(|event| event.read().unwrap_or(0))
            .collect()
    }
}

#[test]
fn it_copies_and_interrupts() {
    let mut bench = Bench::new();
    bench.memory.write_all(b"godwit").unwrap();
    bench.config_command(1 << 2);
    bench.set(0x24, 2);
    assert_eq!(bench.copy(MEMORY, MEMORY + 0x8000, 6), (1, 0));
    let mut found = [0; 6];
    bench.memory.seek(SeekFrom::Start(0x8000)).unwrap();
    bench.memory.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"godwit");
    assert_eq!(bench.interrupts(), [0, 0, 1, 0]);
    assert_eq!((bench.get(0x30), bench.get(0x38)), (1, 6));
}

#[test]
fn it_accesses_no_memory_that_it_may_not() {
    let mut bench = Bench::new();
    assert_eq!(bench.copy(MEMORY, MEMORY + 8, 8), (2, 4));
    bench.config_command(1 << 2);
    assert_eq!(bench.copy(MEMORY, MEMORY + SIZE - 7, 8), (2, 3));
    assert_eq!(bench.copy(MEMORY - 1, MEMORY, 8), (2, 2));
    assert_eq!(bench.interrupts(), [3, 0, 0, 0]);
    bench.set(0x24, 4);
    assert_eq!(bench.copy(MEMORY, MEMORY + 8, 8), (2, 5));
    assert_eq!(bench.interrupts(), [0; 4]);
    bench.device.dma_unmap(MEMORY, SIZE).unwrap();
    bench.set(0x24, 0);
    assert_eq!(bench.copy(MEMORY, MEMORY + 8, 8), (2, 2));
}

#[test]
fn a_full_counter_holds_nobody_up() {
    let mut bench = Bench::new();
    let full = EventFd::new().unwrap();
    full.write(u64::MAX - 1).unwrap();
    let handed = vec![Some(full.as_fd().try_clone_to_owned().unwrap())];
    let action = IrqAction::Trigger(IrqData::Eventfds(handed));
    bench.device.set_irqs(pci::MSIX_IRQ, 3, action).unwrap();
    bench.set(0x24, 3);
    bench.set(0x28, 2);
    assert_eq!((bench.get(0x0c), bench.get(0x2c)), (1, 0));
}

#[test]
fn interrupts_can_be_tried_and_disabled() {
    let mut bench = Bench::new();
    let mut trigger = |start, data| {
        let action = IrqAction::Trigger(data);
        bench.device.set_irqs(pci::MSIX_IRQ, start, action).unwrap();
        bench.interrupts()
    };
    assert_eq!(trigger(1, IrqData::Count(2)), [0, 1, 1, 0]);
    let chosen = IrqData::Chosen(vec![true, false, false, true]);
    assert_eq!(trigger(0, chosen), [1, 0, 0, 1]);
    bench
        .device
        .set_irqs(pci::MSIX_IRQ, 0, IrqAction::Disable)
        .unwrap();
    bench.set(0x28, 2);
    assert_eq!(bench.interrupts(), [0; 4]);
}

#[test]
fn memory_is_the_file_that_is_mapped_and_ends_with_it() {
    let mut bench = Bench::new();
    let last = u64::from(MEMORY_LEN) - 2;
    bench.device.write(MEMORY_REGION, last, b"abcd").unwrap();
    let mut found = [1; 4];
    bench.device.read(MEMORY_REGION, last, &mut found).unwrap();
    assert_eq!(&found, b"ab\0\0");
    let region = bench.device.region(MEMORY_REGION).unwrap();
    let mut file = File::from(region.file.unwrap().try_clone_to_owned().unwrap());
    file.seek(SeekFrom::Start(last)).unwrap();
    let mut mapped = Vec::new();
    file.read_to_end(&mut mapped).unwrap();
    assert_eq!(mapped, b"ab");
}

#[test]
fn a_reset_forgets_all_but_memory_and_interrupts() {
    let mut bench = Bench::new();
    bench.config_command(1 << 2);
    bench.set(0x08, 77);
    bench.device.write(MEMORY_REGION, 0, b"x").unwrap();
    bench.device.reset().unwrap();
    assert_eq!(
        (bench.get(0), bench.get(0x08)),
        (u32::from_le_bytes(*b"GWDT"), 0)
    );
    let mut byte = [1];
    bench.device.read(MEMORY_REGION, 0, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert_eq!(bench.copy(MEMORY, MEMORY + 8, 8), (2, 4));
    bench.config_command(1 << 2);
    assert_eq!(bench.copy(MEMORY, MEMORY + 8, 8), (1, 0));
    assert_eq!(bench.interrupts(), [2, 0, 0, 0]);
}
