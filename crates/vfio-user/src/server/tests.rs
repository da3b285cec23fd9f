//! A server with a client that says exactly what the test wants.

mod hostile;
mod migration;

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;

use super::Ended;
use crate::fake::{Fake, LONG, Served};
use crate::pci;
use crate::socket::{self, Awaited, Deadline};
use crate::wire::{
    Access, Command, DmaMap, DmaUnmap, ERROR, Header, Info, Irq, Layout as _, MOST_BYTES, NO_REPLY,
    REPLY, RegionRequest, SetIrqs, Version,
};

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 2;
const DATA_EVENTFD: u32 = 4;
const MASK: u32 = 8;
const TRIGGER: u32 = 32;

/// A client of words.
pub(super) struct Words(pub(super) UnixStream);

impl Words {
    pub(super) fn say(
        &self,
        command: Command,
        flags: u32,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) {
        let deadline = Deadline::new(LONG, Awaited::Reply(command));
        let message = message(command, flags, payload);
        socket::send(&self.0, &[&message], descriptors, deadline).unwrap();
    }

    pub(super) fn hear(&self) -> (Result<Vec<u8>, Errno>, Vec<OwnedFd>) {
        let deadline = Deadline::new(LONG, Awaited::Rest);
        let message = socket::receive(&self.0, MOST_BYTES, deadline).unwrap();
        let header = message.header;
        assert_eq!(header.id, 77);
        if header.flags == REPLY | ERROR {
            assert!(message.payload.is_empty());
            let errno = i32::try_from(header.error).unwrap();
            (Err(Errno::from_raw(errno)), message.descriptors)
        } else {
            assert_eq!((header.flags, header.error), (REPLY, 0));
            (Ok(message.payload), message.descriptors)
        }
    }

    pub(super) fn ask(&self, command: Command, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        self.ask_with(command, payload, &[])
    }

    pub(super) fn ask_with(
        &self,
        command: Command,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Errno> {
        self.say(command, 0, payload, descriptors);
        let (reply, descriptors) = self.hear();
        assert!(descriptors.is_empty());
        reply
    }

    pub(super) fn agreed(self) -> Self {
        let reply = self.ask(Command::VERSION, &version(0, 1, "{}\0"));
        let (version, text) = Version::split(reply.as_ref().unwrap()).unwrap();
        assert_eq!((version.major, version.minor), (0, 1));
        assert_eq!(text, b"{\"capabilities\":{}}\0");
        self
    }
}

pub(super) fn message(command: Command, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        id: 77,
        command: command.0,
        size: u32::try_from(Header::SIZE + payload.len()).unwrap(),
        flags,
        error: 0,
    };
    [&header.bytes(), payload].concat()
}

pub(super) fn version(major: u16, minor: u16, text: &str) -> Vec<u8> {
    [&Version { major, minor }.bytes(), text.as_bytes()].concat()
}

fn start() -> (Words, Served) {
    let (socket, served) = Served::start(Fake::new(), LONG);
    (Words(socket).agreed(), served)
}

fn map(address: u64, size: u64) -> DmaMap {
    DmaMap {
        argsz: DmaMap::size(),
        flags: 3,
        offset: 0,
        address,
        size,
    }
}

fn unmap(address: u64, size: u64) -> Vec<u8> {
    let unmap = DmaUnmap {
        argsz: DmaUnmap::size(),
        flags: 0,
        address,
        size,
    };
    unmap.bytes()
}

fn set(index: u32, flags: u32, start: u32, count: u32) -> Vec<u8> {
    let set = SetIrqs {
        argsz: SetIrqs::size(),
        flags,
        index,
        start,
        count,
    };
    set.bytes()
}

fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let access = Access {
        offset,
        region,
        count,
    };
    access.bytes()
}

fn none(reply: Result<Vec<u8>, Errno>) {
    assert_eq!(reply, Ok(Vec::new()));
}

/// One message of each command, which the fake device does.
pub(super) fn right() -> Vec<(Command, Vec<u8>)> {
    let region = RegionRequest {
        argsz: 4096,
        index: 1,
        ..RegionRequest::default()
    };
    let info = Info {
        argsz: 16,
        ..Info::default()
    };
    let irq = Irq {
        argsz: 16,
        index: 2,
        ..Irq::default()
    };
    vec![
        (Command::DMA_MAP, map(0x1000, 0x1000).bytes()),
        (Command::DMA_UNMAP, unmap(0x1000, 0x1000)),
        (Command::DEVICE_GET_INFO, info.bytes()),
        (Command::DEVICE_GET_REGION_INFO, region.bytes()),
        (Command::DEVICE_GET_IRQ_INFO, irq.bytes()),
        (
            Command::DEVICE_SET_IRQS,
            [set(0, DATA_BOOL | MASK, 0, 1), vec![1]].concat(),
        ),
        (Command::REGION_READ, access(0, 8, 4)),
        (
            Command::REGION_WRITE,
            [access(0, 8, 4), vec![1, 2, 3, 4]].concat(),
        ),
        (Command::DEVICE_RESET, Vec::new()),
    ]
}

#[test]
fn a_client_is_told_only_of_what_it_has_named() {
    let (socket, served) = Served::start(Fake::new(), LONG);
    let words = Words(socket);
    let text =
        r#"{"capabilities":{"max_msg_fds":3,"pgsizes":4096,"twin_socket":{"supported":true}}}"#;
    let reply = words.ask(Command::VERSION, &version(0, 9, text)).unwrap();
    let (version, text) = Version::split(&reply).unwrap();
    assert_eq!((version.major, version.minor), (0, 1));
    let told = "{\"capabilities\":{\"max_msg_fds\":64,\"pgsizes\":4096}}\0";
    assert_eq!(text, told.as_bytes());
    // Once is enough.
    let again = words.ask(Command::VERSION, &self::version(0, 1, ""));
    assert_eq!(again, Err(Errno::EINVAL));
    drop(words);
    assert_eq!(served.ended().0.unwrap(), Ended::ClientGone);
}

#[test]
fn memory_must_not_overlap_and_is_given_back_as_it_was_given() {
    let (words, served) = start();
    let (command, unmapped) = (Command::DMA_MAP, Command::DMA_UNMAP);
    none(words.ask(command, &map(0x10000, 0x4000).bytes()));
    none(words.ask(command, &map(0x14000, 0x1000).bytes()));
    none(words.ask(command, &map(0xf000, 0x1000).bytes()));
    for (address, size) in [
        (0x10000, 0x4000),
        (0x11000, 0x1000),
        (0x0, 0x1_0000_0000),
        (0x13000, 0x10000),
        (0xe000, 0x2000),
    ] {
        let refused = words.ask(command, &map(address, size).bytes());
        assert_eq!(refused, Err(Errno::EEXIST), "{address:#x} {size:#x}");
    }
    let wrong = [
        map(0x20000, 0),
        map(0x20001, 0x1000),
        map(0x20000, 0x1001),
        map(u64::MAX - 0xfff, 0x1000),
        map(0x20000, u64::MAX - 0xfff),
        DmaMap {
            offset: 1,
            ..map(0x20000, 0x1000)
        },
        DmaMap {
            offset: u64::MAX - 0xfff,
            ..map(0x20000, 0x1000)
        },
        DmaMap {
            flags: 0,
            ..map(0x20000, 0x1000)
        },
        DmaMap {
            flags: 4,
            ..map(0x20000, 0x1000)
        },
    ];
    for wrong in wrong {
        let refused = words.ask(command, &wrong.bytes());
        assert_eq!(refused, Err(Errno::EINVAL), "{wrong:?}");
    }
    for (address, size) in [
        (0x10000, 0x1000),
        (0x11000, 0x3000),
        (0x10000, 0x5000),
        (0x20000, 0x1000),
        (0, 0),
    ] {
        let refused = words.ask(unmapped, &unmap(address, size));
        assert_eq!(refused, Err(Errno::ENOENT), "{address:#x} {size:#x}");
    }
    let original = unmap(0x10000, 0x4000);
    let mut flagged = original.clone();
    flagged[4] = 1;
    assert_eq!(words.ask(unmapped, &flagged), Err(Errno::EINVAL));
    assert_eq!(words.ask(unmapped, &original), Ok(original.clone()));
    assert_eq!(words.ask(unmapped, &original), Err(Errno::ENOENT));
    // There is room again; what the device refuses is not there.
    none(words.ask(command, &map(0x11000, 0x1000).bytes()));
    let bad = map(crate::fake::NO_MEMORY, 0x1000).bytes();
    assert_eq!(words.ask(command, &bad), Err(Errno::ENOMEM));
    assert_eq!(words.ask(command, &bad), Err(Errno::ENOMEM));
    drop(words);
    let (ended, mut device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::ClientGone);
    let calls = device.taken();
    let left = [
        "unmap (61440, 4096)",
        "unmap (69632, 4096)",
        "unmap (81920, 4096)",
    ];
    assert_eq!(calls[calls.len() - 3..], left);
    assert_eq!(calls.len(), 8, "{calls:?}");
}

#[test]
fn interrupts_do_only_what_they_can() {
    let (words, served) = start();
    let command = Command::DEVICE_SET_IRQS;
    let (here, _there) = UnixStream::pair().unwrap();
    let (msix, intx, error) = (pci::MSIX_IRQ, pci::INTX_IRQ, pci::ERROR_IRQ);
    none(words.ask(command, &set(msix, DATA_NONE | TRIGGER, 149, 1)));
    none(words.ask(command, &set(msix, DATA_NONE | TRIGGER, 0, 0)));
    none(words.ask(command, &set(intx, DATA_NONE | MASK, 0, 1)));
    none(words.ask(command, &set(msix, DATA_EVENTFD | TRIGGER, 0, 150)));
    let wrong = [
        // No such interrupts.
        set(msix, DATA_NONE | TRIGGER, 149, 2),
        set(msix, DATA_NONE | TRIGGER, u32::MAX, 2),
        set(msix, DATA_NONE | TRIGGER, 0, u32::MAX),
        set(msix, DATA_NONE | TRIGGER, 1, 0),
        set(5, DATA_NONE | TRIGGER, 0, 0),
        set(u32::MAX, DATA_NONE | TRIGGER, 0, 0),
        // They cannot.
        set(msix, DATA_NONE | MASK, 0, 1),
        set(error, DATA_EVENTFD | TRIGGER, 0, 1),
        // Not one action on one kind of data.
        set(msix, DATA_NONE | DATA_BOOL | TRIGGER, 0, 1),
        set(msix, DATA_NONE | TRIGGER | MASK, 0, 1),
        set(intx, DATA_NONE, 0, 1),
        set(intx, TRIGGER, 0, 1),
        set(intx, DATA_NONE | TRIGGER | 64, 0, 1),
        set(intx, DATA_NONE | MASK, 0, 0),
        set(intx, DATA_EVENTFD | TRIGGER, 0, 0),
        // Other data than that.
        set(msix, DATA_BOOL | TRIGGER, 0, 1),
        [set(msix, DATA_NONE | TRIGGER, 0, 1), vec![1]].concat(),
        [set(msix, DATA_BOOL | TRIGGER, 0, 1), vec![1, 1]].concat(),
    ];
    for wrong in wrong {
        assert_eq!(words.ask(command, &wrong), Err(Errno::EINVAL), "{wrong:?}");
    }
    let eventfd = here.as_fd();
    for (wrong, eventfds) in [
        (set(msix, DATA_NONE | TRIGGER, 0, 1), vec![eventfd]),
        (set(msix, DATA_EVENTFD | TRIGGER, 0, 2), vec![eventfd]),
        (set(msix, DATA_EVENTFD | TRIGGER, 0, 1), vec![eventfd; 2]),
    ] {
        let refused = words.ask_with(command, &wrong, &eventfds);
        assert_eq!(refused, Err(Errno::EINVAL), "{wrong:?}");
    }
    assert_eq!(
        words.ask(command, &set(pci::REQUEST_IRQ, DATA_NONE | TRIGGER, 0, 1)),
        Err(Errno::EREMOTEIO)
    );
    drop(words);
    let calls = served.ended().1.taken();
    let done = [
        "trigger (2, 149, 1)",
        "disable (2, 0)",
        "mask (0, 0, 1)",
        "trigger (2, 0, 0, 150)",
    ];
    assert_eq!(calls, done);
}

#[test]
fn a_device_sees_no_access_outside_of_its_regions() {
    let (words, served) = start();
    let end = crate::fake::SIZE as u64;
    let (read, write) = (Command::REGION_READ, Command::REGION_WRITE);
    let reply = words.ask(read, &access(0, end - 4, 4)).unwrap();
    assert_eq!(reply, [access(0, end - 4, 4), vec![0; 4]].concat());
    for (region, offset, count) in [
        (0, end - 3, 4),
        (0, end, 1),
        (0, u64::MAX, 1),
        (0, u64::MAX, u32::MAX),
        (0, 0, (1 << 20) + 1),
        (0, 0, u32::MAX),
        (6, 0, 1),
        (9, 0, 1),
        (u32::MAX, 0, 1),
        (crate::fake::WRITE_ONLY, 0, 1),
    ] {
        let refused = words.ask(read, &access(region, offset, count));
        assert_eq!(refused, Err(Errno::EINVAL), "{region} {offset} {count}");
    }
    for (region, offset, count, data) in [
        (0, end - 3, 4, 4),
        (crate::fake::READ_ONLY, 0, 4, 4),
        (0, 0, 4, 3),
        (0, 0, 4, 5),
        (0, 0, u32::MAX, 4),
    ] {
        let message = [access(region, offset, count), vec![0; data]].concat();
        let refused = words.ask(write, &message);
        assert_eq!(refused, Err(Errno::EINVAL), "{region} {offset} {count}");
    }
    let broken = words.ask(read, &access(crate::fake::BROKEN, 0, 1));
    assert_eq!(broken, Err(Errno::EREMOTEIO));
    // Nothing is done, and nobody is asked.
    assert_eq!(words.ask(read, &access(0, 4, 0)), Ok(access(0, 4, 0)));
    assert_eq!(words.ask(write, &access(0, 4, 0)), Ok(access(0, 4, 0)));
    drop(words);
    let calls = served.ended().1.taken();
    assert_eq!(calls, [format!("read {:?}", (0, end - 4, 4))]);
}

#[test]
fn a_client_that_reads_too_little_learns_how_much_there_is() {
    let (words, served) = start();
    let ask = |argsz, index| {
        let region = RegionRequest {
            argsz,
            index,
            ..RegionRequest::default()
        };
        words.say(Command::DEVICE_GET_REGION_INFO, 0, &region.bytes(), &[]);
        words.hear()
    };
    for (index, length) in [
        (crate::fake::SPARSE, 32 + 16 + 32),
        (crate::fake::MAPPED, 32),
    ] {
        for argsz in [32, length - 1, length, length + 1] {
            if argsz < 32 {
                continue;
            }
            let (reply, files) = ask(argsz, index);
            let reply = reply.unwrap();
            let (region, _) = RegionRequest::split(&reply).unwrap();
            assert_eq!((region.argsz, region.index), (length, index));
            let is_whole = argsz >= length;
            assert_eq!(files.len(), usize::from(is_whole));
            assert_eq!(reply.len(), if is_whole { length as usize } else { 32 });
            let has_areas = is_whole && length > 32;
            let caps = if has_areas { (8, 32) } else { (0, 0) };
            assert_eq!((region.flags & 8, region.cap_offset), caps);
        }
    }
    assert_eq!(ask(31, 0).0, Err(Errno::EINVAL));
    assert_eq!(ask(32, 9).0, Err(Errno::EINVAL));
    assert_eq!(ask(32, crate::fake::BROKEN).0, Err(Errno::EREMOTEIO));
    drop(words);
    assert_eq!(served.ended().0.unwrap(), Ended::ClientGone);
}

#[test]
fn what_is_not_built_is_refused_and_so_is_what_nobody_knows() {
    let (words, served) = start();
    let moves = [
        Command::DEVICE_FEATURE,
        Command::MIG_DATA_READ,
        Command::MIG_DATA_WRITE,
    ];
    for command in (0..40).chain([0xff, 0x8000, 0xffff]).map(Command) {
        let is_built = command == Command::VERSION || moves.contains(&command);
        if is_built || right().iter().any(|it| it.0 == command) {
            continue;
        }
        for payload in [0, 8, 100] {
            let refused = words.ask(command, &vec![1; payload]);
            assert_eq!(refused, Err(Errno::EOPNOTSUPP), "{command}");
        }
    }
    drop(words);
    let (ended, mut device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::ClientGone);
    assert!(device.taken().is_empty());
}

#[test]
fn a_device_that_cannot_be_reset_is_not() {
    let mut device = Fake::new();
    device.info.flags = crate::DeviceFlags::PCI;
    let (socket, served) = Served::start(device, LONG);
    let words = Words(socket).agreed();
    let reset = words.ask(Command::DEVICE_RESET, &[]);
    assert_eq!(reset, Err(Errno::EOPNOTSUPP));
    drop(words);
    assert!(served.ended().1.taken().is_empty());
}

#[test]
fn commands_without_a_reply_are_done_before_the_next() {
    let (words, served) = start();
    for (command, payload) in right() {
        words.say(command, NO_REPLY, &payload, &[]);
        // One that fails has none either.
        words.say(command, NO_REPLY, &[&payload[..], b"more"].concat(), &[]);
    }
    let read = words.ask(Command::REGION_READ, &access(0, 8, 4)).unwrap();
    assert_eq!(read[16..], [1, 2, 3, 4]);
    drop(words);
    let calls = served.ended().1.taken();
    let done = [
        "map (4096, 4096, 0, true, true)",
        "unmap (4096, 4096)",
        "mask (0, 0, [true])",
        "read (0, 8, 4)",
        "write (0, 8, 4)",
        "reset ()",
        "read (0, 8, 4)",
    ];
    assert_eq!(calls, done);
}

#[test]
fn a_device_keeps_its_state_and_gives_back_what_was_the_client_s() {
    let (words, served) = start();
    let (here, there) = UnixStream::pair().unwrap();
    let eventfds = set(pci::MSIX_IRQ, DATA_EVENTFD | TRIGGER, 1, 1);
    none(words.ask_with(Command::DEVICE_SET_IRQS, &eventfds, &[here.as_fd()]));
    let memory = map(0x1000, 0x1000).bytes();
    none(words.ask_with(Command::DMA_MAP, &memory, &[here.as_fd()]));
    let write = [access(0, 0, 2), vec![5, 6]].concat();
    words.ask(Command::REGION_WRITE, &write).unwrap();
    drop(here);
    served.stop();
    let (ended, mut device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::Stopped);
    assert_eq!(device.content[..2], [5, 6]);
    let calls = device.taken();
    assert_eq!(calls[3..], ["disable (2, 0)", "unmap (4096, 4096)"]);
    assert!(device.eventfds.is_empty() && device.memory.is_empty());
    // Nobody has the other end any more.
    let mut end = File::from(OwnedFd::from(there));
    assert_eq!(end.read(&mut [0]).unwrap(), 0);
    // The next client finds what the last one left.
    let (socket, served) = Served::start(device, LONG);
    let next = Words(socket).agreed();
    let read = next.ask(Command::REGION_READ, &access(0, 0, 2)).unwrap();
    assert_eq!(read[16..], [5, 6]);
    none(next.ask(Command::DMA_MAP, &memory));
    drop(next);
    assert_eq!(served.ended().0.unwrap(), Ended::ClientGone);
}
