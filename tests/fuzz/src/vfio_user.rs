//! What a hostile client says to the server of a vfio-user device, and a hostile server to its client.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vfio_user::{
    Area, Client, Device, DeviceFlags, DeviceInfo, DeviceState, DmaLog, DmaRange, DmaRegion, Errno,
    IrqAction, IrqData, IrqFlags, IrqInfo, Migration, MigrationFlags, Region, RegionFlags, serve,
};

/// Less than a socket holds.
const LONGEST: usize = 32 << 10;
const LONG: Duration = Duration::from_secs(10);
const SIZE: u64 = 64;
const IRQS: u32 = 70;
/// Commands, in the order in which the client sends them.
const ASKED: [u16; 18] = [
    1, 4, 5, 7, 8, 9, 10, 2, 3, 13, 16, 16, 16, 16, 16, 16, 17, 18,
];

/// It looks whether it is asked only for what it has.
struct Wary {
    memory: BTreeMap<u64, u64>,
    file: UnixStream,
    is_logging: bool,
}

impl Device for Wary {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            regions: 2,
            irqs: 2,
        }
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        assert!(index < 2);
        Ok(Region {
            flags: RegionFlags::all(),
            size: SIZE,
            offset: 0,
            areas: vec![Area { offset: 0, size: 8 }; index as usize],
            file: Some(self.file.as_fd()),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        assert!(index < 2);
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD | IrqFlags::MASKABLE,
            count: IRQS,
        })
    }

    fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction<OwnedFd>,
    ) -> Result<(), Errno> {
        assert!(index < 2);
        let (IrqAction::Trigger(data) | IrqAction::Mask(data) | IrqAction::Unmask(data)) = action
        else {
            assert_eq!(start, 0);
            return Ok(());
        };
        assert!((1..=IRQS as usize).contains(&(start as usize + data.count())));
        if let IrqData::Eventfds(eventfds) = data {
            let some = eventfds.iter().flatten().count();
            assert!(some == 0 || some == eventfds.len());
        }
        Ok(())
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.write(region, offset, data)
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        assert!(region < 2 && !data.is_empty() && offset + data.len() as u64 <= SIZE);
        Ok(())
    }

    fn dma_map(&mut self, region: DmaRegion, _: Option<OwnedFd>) -> Result<(), Errno> {
        let end = region.address + region.size;
        let overlaps =
            |(&address, &size): (&u64, &u64)| address < end && region.address < address + size;
        assert!(region.size > 0 && !self.memory.iter().any(overlaps));
        assert!(region.readable || region.writable);
        self.memory.insert(region.address, region.size);
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        assert_eq!(self.memory.remove(&address), Some(size));
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        Some(self)
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        Some(self)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
}

impl Migration for Wary {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }

    fn state(&self) -> Result<DeviceState, Errno> {
        Ok(DeviceState::Running)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), Errno> {
        use DeviceState::{Resuming, Running, Stop, StopCopy};
        assert!([Running, Stop, StopCopy, Resuming].contains(&state));
        Ok(())
    }

    fn read_state(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        Ok(data.len() / 2)
    }

    fn write_state(&mut self, data: &[u8]) -> Result<(), Errno> {
        assert!(data.len() < LONGEST);
        Ok(())
    }
}

impl DmaLog for Wary {
    fn start(&mut self, page: u64, ranges: &[DmaRange]) -> Result<u64, Errno> {
        let has_end = |it: &DmaRange| it.size > 0 && it.address.checked_add(it.size).is_some();
        assert!(page.is_power_of_two() && ranges.iter().all(has_end));
        assert!(!self.is_logging);
        self.is_logging = true;
        Ok(page)
    }

    fn stop(&mut self) -> Result<(), Errno> {
        assert!(self.is_logging);
        self.is_logging = false;
        Ok(())
    }

    fn report(&mut self, range: DmaRange, page: u64, bitmap: &mut [u64]) -> Result<(), Errno> {
        assert!(self.is_logging && page.is_power_of_two());
        assert_eq!(bitmap.len() as u64, range.size.div_ceil(page).div_ceil(64));
        Ok(())
    }
}

fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<_> = descriptors.iter().map(|it| it.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    assert_eq!(sent, bytes.len());
    Ok(())
}

fn message(id: u16, command: u16, is_reply: bool, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + payload.len()).unwrap_or(u32::MAX);
    let mut message = id.to_le_bytes().to_vec();
    message.extend(command.to_le_bytes());
    message.extend(size.to_le_bytes());
    message.extend(u32::from(is_reply).to_le_bytes());
    message.extend([0; 4]);
    message.extend(payload);
    message
}

/// `VFIO_DEVICE_FEATURE_GET` and `VFIO_DEVICE_FEATURE_SET`.
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;

const VERSION: &[u8] = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8}}\0";

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|it| it.to_le_bytes()).collect()
}

/// What is right: the payloads of all commands and of their replies, in the order of [`ASKED`].
fn payloads() -> [(Vec<u8>, Vec<u8>); 18] {
    let access = words(&[8, 0, 1, 4]);
    let accessed = [access.clone(), vec![1, 2, 3, 4]].concat();
    let region = |argsz, flags, offset| words(&[argsz, flags, 1, offset, 64, 0, 0, 0]);
    let area = words(&[1 | 1 << 16, 0, 1, 0, 0, 0, 8, 0]);
    let log = words(&[40, SET | 6, 4096, 0, 1, 0, 0x1000, 0, 0x3000, 0]);
    let report = |bits: &[u32]| {
        let report = words(&[40, GET | 8, 0x1000, 0, 0x3000, 0, 4096, 0]);
        [report, words(bits)].concat()
    };
    let unmap = words(&[24, 0, 0x1000, 0, 0x2000, 0]);
    [
        (VERSION.to_vec(), VERSION.to_vec()),
        (words(&[16, 0, 0, 0]), words(&[16, 3, 2, 2])),
        (region(4096, 0, 0), [region(64, 15, 32), area].concat()),
        (words(&[16, 0, 1, 0]), words(&[16, 1, 1, 7])),
        (words(&[20, 36, 1, 0, 3]), Vec::new()),
        (access.clone(), accessed.clone()),
        (accessed, access),
        (words(&[32, 3, 0, 0, 0x1000, 0, 0x2000, 0]), Vec::new()),
        (unmap.clone(), unmap),
        (Vec::new(), Vec::new()),
        (words(&[16, GET | 1]), words(&[16, GET | 1, 1, 0])),
        (words(&[16, GET | 2]), words(&[16, GET | 2, 2, 0])),
        (words(&[16, SET | 2, 3, 0]), words(&[16, SET | 2, 3, 0])),
        (log.clone(), log),
        (report(&[]), report(&[5, 0])),
        (words(&[8, SET | 7]), words(&[8, SET | 7])),
        (words(&[16, 8]), words(&[16, 8, 1, 2])),
        (words(&[16, 8, 1, 2]), Vec::new()),
    ]
}

/// What clients say who keep to the protocol.
pub fn vfio_user_requests() -> Vec<Vec<u8>> {
    let requests = ASKED.iter().zip(payloads());
    let requests: Vec<_> = requests
        .map(|(&command, (asked, _))| message(5, command, false, &asked))
        .collect();
    let mut seeds = vec![requests.concat(), requests[1..].concat()];
    seeds.extend(requests);
    seeds
}

/// What servers reply who keep to the protocol: as bytes, and as payloads with their lengths.
pub fn vfio_user_replies() -> Vec<Vec<u8>> {
    let (mut whole, mut lengths) = (Vec::new(), Vec::new());
    for (id, (&command, (_, reply))) in (0..).zip(ASKED.iter().zip(payloads())) {
        whole.extend(message(id, command, true, &reply));
        lengths.push(u8::try_from(reply.len()).unwrap_or(u8::MAX));
        lengths.extend(reply);
    }
    vec![whole, lengths]
}

fn served(first: &[u8], data: &[u8], descriptors: usize) -> io::Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let (file, _other) = UnixStream::pair()?;
    let descriptors = vec![file.as_fd(); descriptors];
    send(&theirs, first, &[])?;
    send(&theirs, data, &descriptors)?;
    theirs.shutdown(Shutdown::Write)?;
    let (_stop, stopped) = UnixStream::pair()?;
    let mut device = Wary {
        memory: BTreeMap::new(),
        file: file.try_clone()?,
        is_logging: false,
    };
    thread::scope(|scope| {
        // Replies are no matter, but somebody has to take them.
        scope.spawn(move || io::copy(&mut &theirs, &mut io::sink()));
        let _ = serve(&ours, &mut device, stopped.as_fd(), LONG);
        drop(ours);
    });
    assert!(device.memory.is_empty() && !device.is_logging);
    Ok(())
}

/// A client's messages: as they are, and once a version is agreed, with descriptors.
pub fn vfio_user_server(data: &[u8]) {
    let data = &data[..data.len().min(LONGEST)];
    let Some((&first, rest)) = data.split_first() else {
        return;
    };
    let _ = served(&[], data, 0);
    let version = message(0, 1, false, VERSION);
    let _ = served(&version, data, 0);
    let _ = served(&version, data, usize::from(first % 4));
    let _ = served(&version, rest, 70);
}

/// How many requests of a client are answered as they should be.
fn asked(replies: &[(Vec<u8>, bool)]) -> io::Result<usize> {
    let (ours, theirs) = UnixStream::pair()?;
    let (file, _other) = UnixStream::pair()?;
    for (reply, with_file) in replies {
        let file = file.as_fd();
        let files = if *with_file { &[file][..] } else { &[] };
        send(&theirs, reply, files)?;
    }
    theirs.shutdown(Shutdown::Write)?;
    let Ok(client) = Client::new(ours, LONG) else {
        return Ok(0);
    };
    let info = client.device_info().inspect(|info| {
        assert!(info.regions <= 256 && info.irqs <= 256);
    });
    let region = client.region_info(1).inspect(|region| {
        for area in &region.areas {
            assert!(area.size > 0 && area.offset + area.size <= region.size);
        }
        let is_mapped = region.flags.contains(RegionFlags::MMAP);
        assert_eq!(region.file.is_some(), is_mapped);
        assert!(is_mapped || region.areas.is_empty());
    });
    let eventfds = IrqData::Eventfds(vec![Some(file.as_fd()); 3]);
    let memory = DmaRegion {
        address: 0x1000,
        size: 0x2000,
        offset: 0,
        readable: true,
        writable: true,
    };
    let range = DmaRange {
        address: 0x1000,
        size: 0x3000,
    };
    let answered = [
        info.is_ok(),
        region.is_ok(),
        client.irq_info(1).is_ok(),
        client.set_irqs(1, 0, &IrqAction::Trigger(eventfds)).is_ok(),
        client.region_read(1, 8, &mut [0; 4]).is_ok(),
        client.region_write(1, 8, &[1, 2, 3, 4]).is_ok(),
        client.dma_map(memory, Some(file.as_fd())).is_ok(),
        client.dma_unmap(0x1000, 0x2000).is_ok(),
        client.reset().is_ok(),
        client.migration().is_ok(),
        client.state().is_ok(),
        client.set_state(DeviceState::StopCopy).is_ok(),
        client.start_dma_log(4096, &[range]).is_ok(),
        client
            .dma_log(range, 4096)
            .inspect(|bitmap| assert!(bitmap.len() == 1 && bitmap[0] < 1 << 3))
            .is_ok(),
        client.stop_dma_log().is_ok(),
        client
            .read_state(&mut [0; 8])
            .inspect(|count| assert!(*count <= 8))
            .is_ok(),
        client.write_state(&[0; 8]).is_ok(),
    ];
    Ok(1 + answered.iter().filter(|it| **it).count())
}

/// Replies from payloads, each of which has its length before it.
fn replies(mut bytes: &[u8]) -> Vec<(Vec<u8>, bool)> {
    let mut replies = Vec::new();
    for (id, &command) in (0..).zip(&ASKED) {
        let Some((&length, rest)) = bytes.split_first() else {
            break;
        };
        let (payload, rest) = rest.split_at(rest.len().min(length.into()));
        replies.push((message(id, command, true, payload), command == 5));
        bytes = rest;
    }
    replies
}

/// A server's replies: as they are, and as payloads each of which has its length before it.
pub fn vfio_user_client(data: &[u8]) {
    let data = &data[..data.len().min(LONGEST)];
    let _ = asked(&[(data.to_vec(), false)]);
    let version = message(0, 1, true, VERSION);
    let _ = asked(&[(version, false), (data.to_vec(), true)]);
    let _ = asked(&replies(data));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_is_taken() {
        let [_, lengths] = vfio_user_replies().try_into().unwrap();
        assert_eq!(asked(&replies(&lengths)).unwrap(), ASKED.len());
    }
}
