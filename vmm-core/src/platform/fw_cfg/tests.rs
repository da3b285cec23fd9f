use std::sync::Arc;

use super::*;
use crate::memory::Ram;

/// Of the machine's RAM; its ROM is a page.
const RAM: u64 = 1 << 20;
const ROM: u64 = (1 << 32) - 4096;

struct Rig {
    device: FwCfg,
    memory: Arc<Memory>,
}

fn rig() -> Rig {
    let memory = Arc::new(Memory::default());
    let ram = Ram::allocate(RAM + 4096, None).unwrap();
    let mut layout = memory.begin();
    for region in ram.with_rom(RAM, 4096).regions().unwrap() {
        layout.add(region).unwrap();
    }
    layout.commit().unwrap();
    let files = vec![("etc/a", vec![1, 2, 3]), ("etc/b", vec![0xbb; 0x1000])];
    let (shared, writes) = (Arc::clone(&memory), CoreWrites::default());
    Rig {
        device: FwCfg::new(3, files, shared, writes),
        memory,
    }
}

impl Rig {
    fn select(&self, key: u16) {
        self.device.write(0, &key.to_le_bytes());
    }

    fn bytes(&self, key: u16, count: usize) -> Vec<u8> {
        self.select(key);
        let byte = || {
            let mut byte = [0];
            self.device.read(1, &mut byte);
            byte[0]
        };
        (0..count).map(|_| byte()).collect()
    }

    /// Begins the access that is described at `at`.
    fn begin(&self, at: u64) {
        let (high, low) = (at >> 32, at & 0xffff_ffff);
        for (offset, half) in [(4, high), (8, low)] {
            self.device.write(offset, &half.to_be_bytes()[4..]);
        }
    }

    /// An access described at 0x100; what became of its control word.
    fn access(&self, control: u32, length: u32, target: u64) -> u32 {
        let guest = self.memory.guest();
        let mut words = [control, length].map(u32::to_be_bytes).concat();
        words.extend(target.to_be_bytes());
        guest.write_slice(&words, GuestAddress(0x100)).unwrap();
        self.begin(0x100);
        let mut result = [0; 4];
        guest.read_slice(&mut result, GuestAddress(0x100)).unwrap();
        u32::from_be_bytes(result)
    }

    fn memory(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let guest = self.memory.guest();
        guest.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

const fn select(key: u32) -> u32 {
    key << 16 | SELECT
}

#[test]
fn a_firmware_finds_the_device_and_its_files() {
    let rig = rig();
    assert_eq!(rig.bytes(0, 6), *b"QEMU\0\0");
    assert_eq!(rig.bytes(1, 4), [3, 0, 0, 0]);
    assert_eq!(
        (rig.bytes(5, 2), rig.bytes(15, 2)),
        (vec![3, 0], vec![3, 0])
    );
    let directory = rig.bytes(0x19, 4 + 2 * 64);
    assert_eq!(directory[..4], [0, 0, 0, 2]);
    assert_eq!(directory[4..17], *b"\0\0\0\x03\0\x20\0\0etc/a");
    assert_eq!(directory[68..81], *b"\0\0\x10\0\0\x21\0\0etc/b");
    assert_eq!(rig.bytes(0x20, 5), [1, 2, 3, 0, 0]);
    assert_eq!(rig.bytes(0x22, 2), [0, 0], "there is no such item");
    let mut string = [0; 4];
    rig.select(0);
    rig.device.read(1, &mut string);
    assert_eq!(string, *b"QEMU");
    let mut signature = [0; 4];
    rig.device.read(8, &mut signature);
    assert_eq!(signature, *b" CFG");
}

#[test]
fn dma_reads_skips_and_selects() {
    let rig = rig();
    assert_eq!(rig.access(select(0x20) | READ, 2, 0x2000), 0);
    assert_eq!(rig.memory(0x2000, 3), [1, 2, 0]);
    assert_eq!(
        rig.access(READ, 3, 0x2000),
        0,
        "it goes on, and behind the end is nothing"
    );
    assert_eq!(rig.memory(0x2000, 3), [3, 0, 0]);
    assert_eq!(rig.access(select(0x20) | SKIP, 1, 0), 0);
    assert_eq!(rig.access(READ, 1, 0x2000), 0);
    assert_eq!(rig.memory(0x2000, 1), [2]);
    assert_eq!(rig.access(select(0x21), 0, 0), 0);
    assert_eq!(rig.bytes(0x21, 1), [0xbb]);
}

#[test]
fn dma_reaches_no_more_than_ram() {
    let rig = rig();
    let fails = |control, length, target| {
        assert_eq!(
            rig.access(control, length, target),
            ERROR,
            "{target:#x}+{length:#x}"
        );
    };
    let read = select(0x21) | READ;
    for target in [RAM, RAM - 3, ROM, u64::MAX, u64::MAX - 2] {
        fails(read, 4, target);
    }
    fails(read, MOST + 1, 0);
    fails(read, u32::MAX, 0);
    fails(select(0x21) | WRITE, 4, 0x2000);
    assert_eq!(rig.access(read, 4, RAM - 4), 0);
    assert_eq!(rig.memory(ROM, 4096), [0; 4096]);
    // Where no access is described nothing happens.
    for at in [RAM, RAM - 15, ROM, u64::MAX, u64::MAX - 15] {
        rig.begin(at);
    }
    assert_eq!(rig.memory(ROM, 4096), [0; 4096]);
}

#[test]
fn no_offset_wraps() {
    let rig = rig();
    rig.select(0x20);
    for _ in 0..3 {
        assert_eq!(rig.access(SKIP, u32::MAX, 0), 0);
    }
    assert_eq!(rig.access(READ, 3, 0x2000), 0);
    assert_eq!(rig.memory(0x2000, 3), [0; 3]);
    assert_eq!(rig.device.save().offset, u32::MAX);
}

#[test]
fn half_an_address_and_half_an_item_survive() {
    let (source, destination) = (rig(), rig());
    source.select(0x20);
    source.device.read(1, &mut [0]);
    source.device.write(4, &[0, 0, 0, 1]);
    let saved = source.device.save();
    assert_eq!((saved.key, saved.offset, saved.address_high), (0x20, 1, 1));
    destination.device.restore(saved);
    let mut rest = [0; 2];
    destination.device.read(1, &mut rest);
    assert_eq!(rest, [2, 3]);
    destination.device.reset();
    assert_eq!(destination.device.save(), FwCfgSavedState::default());
}

#[test]
fn no_access_panics() {
    let rig = rig();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut data = seed.to_le_bytes();
        let len = 1 << (seed >> 60 & 3);
        let offset = seed >> 20 & 0xf;
        rig.device.write(offset, &data[..len]);
        rig.device.read(offset, &mut data[..len]);
        // Whatever may be described there.
        let at = GuestAddress(seed >> 30 & 0xf_fff0);
        rig.memory.guest().write_slice(&data, at).unwrap();
        rig.begin(at.0);
    }
}
