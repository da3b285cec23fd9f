use std::fs::File;

use vm_memory::Bytes;

use super::*;
use crate::memory::{RegionDescription, SharedMapping};

const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn memfd(size: u64) -> File {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = File::from(nix::sys::memfd::memfd_create(c"test", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

/// A ring with its driver's side.
pub(crate) struct Guest {
    memory: Arc<Memory>,
    available: u16,
    event_idx: bool,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let region = |guest_address, user_address| RegionDescription {
            guest_address,
            size: 0x1_0000,
            user_address,
            file_offset: 0,
        };
        // Two regions that adjoin, so that buffers can cross their border.
        let memory = Memory::empty(Arc::default())
            .with(region(0, 0x10_0000), memfd(0x1_0000))
            .unwrap()
            .with(region(0x1_0000, 0x20_0000), memfd(0x1_0000))
            .unwrap();
        Guest {
            memory: Arc::new(memory),
            available: 0,
            event_idx: true,
        }
    }

    fn start(&self, base: u16, record: Option<InflightQueue>) -> Result<Queue, QueueError> {
        let mut queue = self.start_as(0, base, record)?;
        queue.refill_budget();
        Ok(queue)
    }

    pub(crate) fn start_as(
        &self,
        index: u16,
        base: u16,
        record: Option<InflightQueue>,
    ) -> Result<Queue, QueueError> {
        let layout = RingLayout {
            size: SIZE,
            descriptors: GuestAddress(DESCRIPTORS),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            event_idx: self.event_idx,
            indirect: true,
        };
        let memory = Arc::clone(&self.memory);
        let index = QueueIndex::new(index);
        Queue::start(index, layout, base, memory, record, QueueMetrics::default())
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory
            .guest()
            .write_obj(value, GuestAddress(at))
            .unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        self.memory.guest().read_obj(GuestAddress(at)).unwrap()
    }

    fn describe_in(&self, table: u64, index: u16, at: (u64, u32), flags: u16, next: u16) {
        let place = table + 16 * u64::from(index);
        self.put(place, at.0);
        self.put(place + 8, at.1);
        self.put(place + 12, flags);
        self.put(place + 14, next);
    }

    fn describe(&self, index: u16, at: (u64, u32), flags: u16, next: u16) {
        self.describe_in(DESCRIPTORS, index, at, flags, next);
    }

    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % SIZE);
        self.put(AVAILABLE + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, self.available);
    }

    /// A request of one writable buffer.
    pub(crate) fn request(&mut self, head: u16) {
        self.describe(head, (BUFFERS + 0x100 * u64::from(head), 0x100), WRITE, 0);
        self.offer(head);
    }

    /// What the guest says of calls: used_event, or without EVENT_IDX the available ring's flags.
    pub(crate) fn wish(&mut self, event_idx: bool, word: u16) {
        self.event_idx = event_idx;
        let used_event = AVAILABLE + 4 + 2 * u64::from(SIZE);
        self.put(if event_idx { used_event } else { AVAILABLE }, word);
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.get(USED + 2)
    }

    fn used(&self, slot: u64) -> (u16, u16) {
        (self.get(USED + 4 + 8 * slot), self.get(USED + 8 + 8 * slot))
    }
}

fn pop_all(queue: &mut Queue) -> Vec<u16> {
    let mut chain = Chain::default();
    let mut heads = Vec::new();
    while queue.pop(&mut chain).unwrap() {
        heads.push(chain.head());
    }
    heads
}

#[test]
fn a_chain_is_read_and_written_across_regions() {
    let mut guest = Guest::new();
    guest.describe(0, (BUFFERS, 4), NEXT, 1);
    guest.describe(1, (0xfffe, 4), NEXT, 2);
    guest.describe(2, (0xfff8, 6), NEXT | WRITE, 3);
    guest.describe(3, (BUFFERS + 0x200, 3), WRITE, 0);
    guest.put(BUFFERS, *b"abcd");
    guest
        .memory
        .guest()
        .write_slice(b"efgh", GuestAddress(0xfffe))
        .unwrap();
    guest.offer(0);
    let mut queue = guest.start(0, None).unwrap();
    let mut chain = Chain::default();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!((chain.readable_len(), chain.writable_len()), (8, 9));
    let mut data = [0; 5];
    chain.read(2, &mut data).unwrap();
    assert_eq!(&data, b"cdefg");
    chain.write(4, b"WXYZ").unwrap();
    let mut written = [0; 2];
    guest
        .memory
        .guest()
        .read_slice(&mut written, GuestAddress(0xfffc))
        .unwrap();
    assert_eq!(&written, b"WX");
    assert!(chain.read(4, &mut data).is_err());
    assert!(chain.write(6, b"1234").is_err());
    let mut vectors = Vec::new();
    chain.readable_vectors(1, 7, &mut vectors).unwrap();
    let lengths: Vec<usize> = vectors.iter().map(|vector| vector.iov_len).collect();
    assert_eq!(lengths, [3, 2, 2]);
    queue.complete(&mut chain, 8).unwrap();
    assert_eq!((guest.used_index(), guest.used(0)), (1, (0, 8)));
}

#[test]
fn a_batch_becomes_visible_at_once() {
    let mut guest = Guest::new();
    (0..3).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, None).unwrap();
    assert_eq!(pop_all(&mut queue), [0, 1, 2]);
    assert_eq!(queue.in_flight(), 3);
    queue.answer(&[(2, 7), (0, 9)]).unwrap();
    assert_eq!(guest.used_index(), 2);
    assert_eq!((guest.used(0), guest.used(1)), ((2, 7), (0, 9)));
    assert_eq!((queue.in_flight(), queue.base()), (1, 3));
}

#[test]
fn what_is_put_back_is_taken_again_and_counts_as_not_taken() {
    let mut guest = Guest::new();
    (0..2).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, None).unwrap();
    let mut chain = Chain::default();
    queue.pop(&mut chain).unwrap();
    queue.unpop(&mut chain);
    assert_eq!((queue.in_flight(), queue.base()), (0, 0));
    assert_eq!(pop_all(&mut queue), [0, 1]);
    assert_eq!(queue.base(), 2);
}

#[test]
fn the_guest_is_called_by_its_event_index() {
    let mut guest = Guest::new();
    (0..3).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, None).unwrap();
    pop_all(&mut queue);
    assert!(!queue.wants_call().unwrap(), "nothing was answered");
    let used_event = AVAILABLE + 4 + 2 * u64::from(SIZE);
    guest.put(used_event, 1u16);
    queue.answer(&[(0, 0)]).unwrap();
    assert!(!queue.wants_call().unwrap(), "it waits for the second");
    queue.answer(&[(1, 0), (2, 0)]).unwrap();
    assert!(queue.wants_call().unwrap());
    assert!(!queue.wants_call().unwrap(), "it was called");
}

#[test]
fn without_event_index_the_flag_counts() {
    let mut guest = Guest::new();
    guest.event_idx = false;
    (0..2).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, None).unwrap();
    pop_all(&mut queue);
    guest.put(AVAILABLE, 1u16);
    queue.answer(&[(0, 0)]).unwrap();
    assert!(!queue.wants_call().unwrap());
    guest.put(AVAILABLE, 0u16);
    queue.answer(&[(1, 0)]).unwrap();
    assert!(queue.wants_call().unwrap());
    queue.disable_kicks().unwrap();
    assert_eq!(guest.get(USED), 1);
    assert!(!queue.enable_kicks().unwrap());
    assert_eq!(guest.get(USED), 0);
}

#[test]
fn a_request_between_the_look_and_the_wish_is_seen() {
    let mut guest = Guest::new();
    let mut queue = guest.start(0, None).unwrap();
    assert!(!queue.enable_kicks().unwrap());
    guest.request(0);
    assert!(queue.enable_kicks().unwrap());
}

#[test]
fn one_turn_takes_no_more_than_a_ring() {
    let mut guest = Guest::new();
    (0..SIZE).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, None).unwrap();
    let heads = pop_all(&mut queue);
    assert_eq!(heads.len(), usize::from(SIZE));
    queue.answer(&[(0, 0)]).unwrap();
    guest.request(0);
    assert!(pop_all(&mut queue).is_empty() && queue.out_of_budget());
    queue.refill_budget();
    assert_eq!(pop_all(&mut queue), [0]);
}

#[test]
fn wrong_chains_are_named() {
    type Damage = fn(&mut Guest);
    let fault = |damage: Damage| {
        let mut guest = Guest::new();
        damage(&mut guest);
        let mut queue = guest.start(0, None).unwrap();
        let fault = queue.pop(&mut Chain::default()).unwrap_err().fault;
        assert_eq!(queue.in_flight(), 0);
        fault.to_string()
    };
    let cases: [(Damage, &str); 10] = [
        (
            |guest| {
                guest.describe(0, (BUFFERS, 1), NEXT, 0);
                guest.offer(0);
            },
            "descriptor chain at 0 is a loop or longer than 8 descriptors",
        ),
        (
            |guest| {
                guest.describe(0, (BUFFERS, 1), NEXT, 8);
                guest.offer(0);
            },
            "descriptor 8 is outside the table of 8",
        ),
        (
            |guest| guest.offer(9),
            "descriptor 9 is outside the table of 8",
        ),
        (
            |guest| {
                guest.describe(0, (0x1_fffc, 8), WRITE, 0);
                guest.offer(0);
            },
            "buffer of 0x8 bytes at guest address 0x1fffc is not guest memory",
        ),
        (
            |guest| {
                guest.describe(0, (BUFFERS, 0), 0, 0);
                guest.offer(0);
            },
            "buffer of 0x0 bytes at guest address 0x8000 is not guest memory",
        ),
        (
            |guest| {
                guest.describe(0, (BUFFERS, 1), WRITE | NEXT, 1);
                guest.describe(1, (BUFFERS, 1), 0, 0);
                guest.offer(0);
            },
            "descriptor chain at 0 has a readable buffer after a writable one",
        ),
        (
            |guest| {
                guest.describe(0, (0x4000, 15), INDIRECT, 0);
                guest.offer(0);
            },
            "indirect table of 15 bytes in the chain at 0 is not allowed",
        ),
        (
            |guest| {
                guest.describe(0, (0x4000, 16), INDIRECT, 0);
                guest.describe_in(0x4000, 0, (0x4000, 16), INDIRECT, 0);
                guest.offer(0);
            },
            "indirect table of 16 bytes in the chain at 0 is not allowed",
        ),
        (
            |guest| {
                guest.describe(0, (0x1_fff0, 32), INDIRECT, 0);
                guest.describe_in(0x1_fff0, 0, (BUFFERS, 1), NEXT, 1);
                guest.offer(0);
            },
            "ring memory at guest address 0x20000 is not accessible",
        ),
        (
            |guest| guest.put(AVAILABLE + 2, 9u16),
            "available index 9 is more than 8 ahead of 0",
        ),
    ];
    for (damage, expected) in cases {
        assert_eq!(fault(damage), expected);
    }
}

#[test]
fn a_head_in_flight_cannot_be_taken_again() {
    let mut guest = Guest::new();
    guest.request(3);
    guest.request(3);
    let mut queue = guest.start(0, None).unwrap();
    let mut chain = Chain::default();
    assert!(queue.pop(&mut chain).unwrap());
    let error = queue.pop(&mut Chain::default()).unwrap_err();
    assert!(matches!(error.fault, QueueFault::HeadInFlight { head: 3 }));
}

#[test]
fn a_ring_outside_memory_does_not_start() {
    let guest = Guest::new();
    let layout = RingLayout {
        size: SIZE,
        descriptors: GuestAddress(0x1_fff8),
        available: GuestAddress(AVAILABLE),
        used: GuestAddress(USED),
        event_idx: true,
        indirect: true,
    };
    let memory = Arc::clone(&guest.memory);
    let index = QueueIndex::new(0);
    assert!(Queue::start(index, layout, 0, memory, None, QueueMetrics::default()).is_err());
}

/// An in-flight file for one ring, as a front-end holds it over the lives of device processes.
struct Record(File);

impl Record {
    fn new() -> Self {
        Record(memfd(InflightFile::len(1, SIZE, 0)))
    }

    fn open(&self) -> InflightQueue {
        let mapping = SharedMapping::new(&self.0, 0, InflightFile::len(1, SIZE, 0)).unwrap();
        let file = InflightFile::new(mapping, SIZE);
        file.queue(QueueIndex::new(0), SIZE).unwrap()
    }
}

#[test]
fn a_successor_takes_up_what_was_in_flight_in_its_order() {
    let mut guest = Guest::new();
    let record = Record::new();
    [5, 2, 7, 0]
        .into_iter()
        .for_each(|head| guest.request(head));
    let mut queue = guest.start(0, Some(record.open())).unwrap();
    let mut chain = Chain::default();
    for _ in 0..3 {
        queue.pop(&mut chain).unwrap();
    }
    queue.answer(&[(2, 0)]).unwrap();
    drop(queue);
    // The front-end knows the used index only.
    let mut successor = guest.start(1, Some(record.open())).unwrap();
    assert_eq!(pop_all(&mut successor), [5, 7, 0]);
    successor.answer(&[(7, 0), (0, 0), (5, 0)]).unwrap();
    assert_eq!(guest.used_index(), 4);
    drop(successor);
    let mut third = guest.start(4, Some(record.open())).unwrap();
    assert!(pop_all(&mut third).is_empty());
}

#[test]
fn a_batch_published_before_the_end_is_not_done_again() {
    let mut guest = Guest::new();
    let record = Record::new();
    (0..3).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, Some(record.open())).unwrap();
    pop_all(&mut queue);
    // The process dies after the used index is out and before the record knows.
    let mut dying = record.open();
    dying.answering([0u16, 2].into_iter());
    guest.put(USED + 2, 2u16);
    drop(queue);
    let mut successor = guest.start(2, Some(record.open())).unwrap();
    assert_eq!(pop_all(&mut successor), [1]);
}

#[test]
fn a_batch_not_published_before_the_end_is_done_again() {
    let mut guest = Guest::new();
    let record = Record::new();
    (0..2).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, Some(record.open())).unwrap();
    pop_all(&mut queue);
    record.open().answering([0u16, 1].into_iter());
    drop(queue);
    let mut successor = guest.start(0, Some(record.open())).unwrap();
    assert_eq!(pop_all(&mut successor), [0, 1]);
}

#[test]
fn a_record_full_of_nonsense_is_survived() {
    use std::os::unix::fs::FileExt;
    let mut guest = Guest::new();
    let record = Record::new();
    drop(guest.start(0, Some(record.open())).unwrap());
    let len = InflightFile::len(1, SIZE, 0);
    // All but the version and the size, which are checked.
    record.0.write_all_at(&[0xff; 4], 12).unwrap();
    let entries = usize::try_from(len - 16).unwrap();
    record.0.write_all_at(&vec![0xff; entries], 16).unwrap();
    (0..SIZE).for_each(|head| guest.request(head));
    let mut queue = guest.start(0, Some(record.open())).unwrap();
    let mut chain = Chain::default();
    while let Ok(true) = queue.pop(&mut chain) {}
    assert!(queue.in_flight() <= SIZE);
}

#[test]
fn a_record_of_another_form_is_refused() {
    use std::os::unix::fs::FileExt;
    let guest = Guest::new();
    let record = Record::new();
    drop(guest.start(0, Some(record.open())).unwrap());
    let mapping = || SharedMapping::new(&record.0, 0, InflightFile::len(1, SIZE, 0)).unwrap();
    let index = QueueIndex::new(0);
    let smaller = InflightFile::new(mapping(), SIZE).queue(index, SIZE / 2);
    assert!(matches!(smaller, Err(InflightError::Size { .. })));
    let beyond = InflightFile::new(mapping(), SIZE).queue(QueueIndex::new(1), SIZE);
    assert!(matches!(beyond, Err(InflightError::Short { .. })));
    record.0.write_all_at(&[9, 0], 8).unwrap();
    let newer = InflightFile::new(mapping(), SIZE).queue(index, SIZE);
    assert!(matches!(
        newer,
        Err(InflightError::Version { version: 9, .. })
    ));
}
