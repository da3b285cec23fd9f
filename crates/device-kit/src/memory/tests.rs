use std::io::Write;
use std::time::{Duration, Instant};

use vm_memory::Bytes;

use super::*;
use crate::health::Health;

fn memfd(size: u64) -> File {
    let fd =
        nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(size).unwrap();
    file
}

fn region(guest_address: u64, size: u64, user_address: u64) -> RegionDescription {
    RegionDescription {
        guest_address,
        size,
        user_address,
        file_offset: 0,
    }
}

fn log_with(bytes: u64) -> (Arc<DirtyLog>, File) {
    let file = memfd(bytes);
    let log = Arc::new(DirtyLog::default());
    log.set_bitmap(Some(SharedMapping::new(&file, 0, bytes).unwrap()));
    (log, file)
}

fn bits(file: &File) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn writes_are_logged_only_while_logging_is_on() {
    let (log, file) = log_with(4096);
    let memory = Memory::empty(Arc::clone(&log))
        .with(region(0x10_0000, 0x10_000, 0x7000_0000), memfd(0x10_000))
        .unwrap();
    memory
        .guest()
        .write_obj(1u8, GuestAddress(0x10_0000))
        .unwrap();
    assert!(bits(&file).iter().all(|byte| *byte == 0));
    log.set_on(true);
    memory
        .guest()
        .write_obj(1u64, GuestAddress(0x10_1ffc))
        .unwrap();
    memory.mark_dirty(GuestAddress(0x10_4000), 1);
    log.set_on(false);
    memory
        .guest()
        .write_obj(1u8, GuestAddress(0x10_8000))
        .unwrap();
    let bits = bits(&file);
    // Pages 0x101 and 0x102 by the write that crosses them, 0x104 by hand.
    assert_eq!(bits[0x100 / 8], 0b0001_0110);
    assert_eq!(bits.iter().map(|byte| byte.count_ones()).sum::<u32>(), 3);
}

#[test]
fn a_new_table_keeps_the_log() {
    let (log, file) = log_with(4096);
    log.set_on(true);
    let first = Memory::empty(Arc::clone(&log));
    let second = first
        .with(region(0, 0x4000, 0x1000), memfd(0x4000))
        .unwrap();
    second
        .guest()
        .write_obj(7u32, GuestAddress(0x3000))
        .unwrap();
    assert_eq!(bits(&file)[0], 0b1000);
}

#[test]
fn a_mark_past_the_bitmap_is_left_out() {
    let (log, file) = log_with(1);
    log.set_on(true);
    log.mark(6 * LOG_PAGE, u64::MAX);
    assert_eq!(bits(&file), [0b1100_0000]);
}

#[test]
fn user_addresses_are_translated() {
    let memory = Memory::empty(Arc::default())
        .with(region(0x1000, 0x1000, 0x7000_0000), memfd(0x1000))
        .unwrap()
        .with(region(0x8000, 0x1000, 0x6000_0000), memfd(0x1000))
        .unwrap();
    assert_eq!(
        memory.guest_address(0x7000_0010),
        Some(GuestAddress(0x1010))
    );
    assert_eq!(
        memory.guest_address(0x6000_0fff),
        Some(GuestAddress(0x8fff))
    );
    assert_eq!(memory.guest_address(0x7000_1000), None);
    assert_eq!(memory.guest_address(0), None);
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let memory = Memory::empty(Arc::default())
        .with(region(0x1000, 0x2000, 0x10_0000), memfd(0x2000))
        .unwrap();
    let refused = [
        region(0x10_000, 0, 0x20_0000),
        region(u64::MAX, 0x1000, 0x20_0000),
        region(0x10_000, 0x1000, u64::MAX),
        region(0x2000, 0x1000, 0x20_0000),
        region(0x10_000, 0x1000, 0x10_1000),
        region(0x10_000, 0x4000, 0x20_0000),
    ];
    for bad in refused {
        assert!(memory.with(bad, memfd(0x2000)).is_err(), "{bad:x?}");
    }
    assert!(memory.without(&region(0x1000, 0x1000, 0x10_0000)).is_err());
    let gone = memory.without(&region(0x1000, 0x2000, 0x10_0000)).unwrap();
    assert_eq!(gone.size(), 0);
    assert!(memory.guest().read_obj::<u8>(GuestAddress(0x1000)).is_ok());
}

#[test]
fn prefault_allocates_nothing_where_there_is_no_data() {
    use std::os::unix::fs::MetadataExt;
    let mut file = memfd(64 << 20);
    file.write_all(&[1; 8192]).unwrap();
    let kept = file.try_clone().unwrap();
    let memory = Arc::new(
        Memory::empty(Arc::default())
            .with(region(0, 64 << 20, 0), file)
            .unwrap(),
    );
    let prefaulter = Prefaulter::new(PrefaultMode::Data, Health::default());
    let walked = || {
        wait_until(|| !prefaulter.progress().running);
        let progress = prefaulter.progress();
        (progress.mapped, progress.done)
    };
    prefaulter.use_memory(Arc::clone(&memory));
    assert_eq!(walked(), (64 << 20, 64 << 20));
    assert_eq!(kept.metadata().unwrap().blocks() * 512, 8192);
    prefaulter.set_mode(PrefaultMode::All);
    assert_eq!(walked(), (64 << 20, 64 << 20));
    assert_eq!(kept.metadata().unwrap().blocks() * 512, 64 << 20);
    prefaulter.set_mode(PrefaultMode::Off);
    assert_eq!(walked(), (64 << 20, 0));
    prefaulter.forget();
    assert_eq!(walked(), (0, 0));
    wait_until(|| Arc::strong_count(&memory) == 1);
}

#[test]
fn a_walk_that_is_cancelled_ends_early() {
    let memory = Memory::empty(Arc::default()).with(region(0, 256 << 20, 0), memfd(256 << 20));
    let prefaulter = Prefaulter::new(PrefaultMode::All, Health::default());
    prefaulter.use_memory(Arc::new(memory.unwrap()));
    prefaulter.cancel();
    wait_until(|| !prefaulter.progress().running);
    assert!(prefaulter.progress().done < 256 << 20);
}

fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "the prefault thread did not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn whole_pages_are_given_back_and_read_as_zero() {
    use std::os::unix::fs::MetadataExt;
    let file = memfd(0x10_0000);
    let view = file.try_clone().unwrap();
    let blocks = || view.metadata().unwrap().blocks() * 512;
    let memory = Memory::empty(Arc::default())
        .with(region(0x10_0000, 0x8_0000, 0x7000_0000), file)
        .unwrap();
    memory
        .guest()
        .write_slice(&[0xa5; 0x8_0000], GuestAddress(0x10_0000))
        .unwrap();
    assert_eq!(blocks(), 0x8_0000);
    // Half a page at each end stays.
    let discarded = memory.discard(GuestAddress(0x10_0800), 0x3000).unwrap();
    assert_eq!((discarded, blocks()), (0x2000, 0x7_e000));
    let mut found = [0; 0x4000];
    memory
        .guest()
        .read_slice(&mut found, GuestAddress(0x10_0000))
        .unwrap();
    let expected = |at: usize| {
        if (0x1000..0x3000).contains(&at) {
            0
        } else {
            0xa5
        }
    };
    assert!(
        found
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == expected(at))
    );
    // What is no memory is passed over, and no address is too wild.
    assert_eq!(memory.discard(GuestAddress(0), u64::MAX).unwrap(), 0x8_0000);
    assert_eq!(memory.discard(GuestAddress(u64::MAX), 0x1000).unwrap(), 0);
    let around = |at| memory.page_around(GuestAddress(at));
    assert_eq!(around(0x10_1fff), Some((GuestAddress(0x10_1000), 0x1000)));
    assert_eq!(around(0x18_0000), None);
}
