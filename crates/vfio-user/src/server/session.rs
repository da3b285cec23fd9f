//! One client's time with a device.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Device, Ended};
use crate::description::{DeviceFlags, DeviceInfo, DmaRegion, IrqAction, IrqInfo, RegionFlags};
use crate::error::{Error, ProtocolError};
use crate::socket::{Awaited, Deadline, MOST_DESCRIPTORS, Message, receive, send};
use crate::wire::{
    Access, COMMAND, Capabilities, Command, DMA_READABLE, DMA_WRITABLE, DmaMap, DmaUnmap, Header,
    Info, Irq, KIND, Layout as _, MOST_BYTES, MOST_TRANSFER, NO_REPLY, PAGE, REPLY, RegionReply,
    RegionRequest, SetIrqs, VERSION, Version,
};

/// Pieces of memory at most (VFU, «VFIO_USER_VERSION», `max_dma_maps`).
const MOST_MAPS: usize = 65535;

/// What a command is answered with.
#[derive(Default)]
struct Reply {
    payload: Vec<u8>,
    file: Option<OwnedFd>,
}

impl From<Vec<u8>> for Reply {
    fn from(payload: Vec<u8>) -> Self {
        Self {
            payload,
            file: None,
        }
    }
}

pub(super) struct Session<'a, D> {
    socket: &'a UnixStream,
    pub(super) device: &'a mut D,
    deadline: Duration,
    info: DeviceInfo,
    /// Flags and bytes of each region.
    regions: Vec<Result<(RegionFlags, u64), Errno>>,
    irqs: Vec<Result<IrqInfo, Errno>>,
    /// Memory of the client: bytes by address.
    maps: BTreeMap<u64, u64>,
    /// Interrupts that have got eventfds of the client.
    wired: BTreeSet<u32>,
    /// Whether the device notes which memory it writes.
    pub(super) is_logging: bool,
    /// Whether the client knows states of which the specification does not.
    pub(super) has_p2p: bool,
}

impl<'a, D: Device> Session<'a, D> {
    pub(super) fn new(socket: &'a UnixStream, device: &'a mut D, deadline: Duration) -> Self {
        let info = device.info();
        let region = |index| device.region(index).map(|it| (it.flags, it.size));
        Self {
            info,
            regions: (0..info.regions).map(region).collect(),
            irqs: (0..info.irqs).map(|index| device.irq(index)).collect(),
            socket,
            device,
            deadline,
            maps: BTreeMap::new(),
            wired: BTreeSet::new(),
            is_logging: false,
            has_p2p: false,
        }
    }

    /// Answers commands until the client is gone, or `stop` can be read.
    pub(super) fn run(&mut self, stop: BorrowedFd<'_>) -> Result<Ended, Error> {
        let mut is_negotiated = false;
        loop {
            if self.is_stopped(stop)? {
                return Ok(Ended::Stopped);
            }
            let deadline = Deadline::new(self.deadline, Awaited::Rest);
            let message = match receive(self.socket, MOST_BYTES, deadline) {
                Err(Error::Closed) => return Ok(Ended::ClientGone),
                message => message?,
            };
            let header = message.header;
            if header.flags & KIND != COMMAND {
                let unexpected = ProtocolError::Unexpected {
                    what: header.to_string(),
                    due: "a command".into(),
                };
                return Err(unexpected.into());
            }
            let sent = if is_negotiated {
                let answer = self.answer(message);
                self.reply(header, answer)
            } else {
                is_negotiated = true;
                self.negotiate(&message)
            };
            match sent {
                Err(Error::Closed) => return Ok(Ended::ClientGone),
                sent => sent?,
            }
        }
    }

    /// Takes from the device what the client gave it.
    pub(super) fn release(&mut self) {
        // A device that cannot let go of something goes on to the next.
        if self.is_logging {
            let _ = self.stop_log();
        }
        for &index in &self.wired {
            let _ = self.device.set_irqs(index, 0, IrqAction::Disable);
        }
        for (&address, &size) in &self.maps {
            let _ = self.device.dma_unmap(address, size);
        }
    }

    /// Waits for a command; whether it should not be waited for any more.
    fn is_stopped(&self, stop: BorrowedFd<'_>) -> Result<bool, Error> {
        let mut fds = [stop, self.socket.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return Ok(fds[0].any().unwrap_or(true)),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
    }

    fn reply(&self, command: Header, answer: Result<Reply, Errno>) -> Result<(), Error> {
        if command.flags & NO_REPLY != 0 {
            return Ok(());
        }
        let (header, reply) = match answer {
            Ok(reply) => {
                let size = Header::SIZE + reply.payload.len();
                let header = Header {
                    size: u32::try_from(size).unwrap_or(u32::MAX),
                    flags: REPLY,
                    error: 0,
                    ..command
                };
                (header, reply)
            }
            Err(errno) => (command.refusal(errno), Reply::default()),
        };
        let file: Option<BorrowedFd<'_>> = reply.file.as_ref().map(OwnedFd::as_fd);
        let taken = Awaited::Taken(Command(command.command));
        send(
            self.socket,
            &[&header.bytes(), &reply.payload],
            file.as_slice(),
            Deadline::new(self.deadline, taken),
        )
    }

    /// The first message has to be the client's version (VFU, «VFIO_USER_VERSION»).
    fn negotiate(&mut self, message: &Message) -> Result<(), Error> {
        let command = message.command();
        if command != Command::VERSION {
            let unexpected = ProtocolError::Unexpected {
                what: message.header.to_string(),
                due: Command::VERSION.to_string(),
            };
            return Err(unexpected.into());
        }
        let refused = |what: String| {
            // The client is told, if it still listens.
            let _ = self.reply(message.header, Err(Errno::EINVAL));
            Error::Protocol(ProtocolError::Payload { command, what })
        };
        let (proposed, text) =
            Version::split(&message.payload).ok_or_else(|| refused("no version".into()))?;
        let client = Capabilities::from_text(text).map_err(refused)?;
        if proposed.major != VERSION.0 {
            let version = format!("version {}.{}", proposed.major, proposed.minor);
            return Err(refused(version));
        }
        let agreed = Version {
            major: VERSION.0,
            minor: VERSION.1.min(proposed.minor),
        };
        let ours = Capabilities::ours(MOST_DESCRIPTORS, PAGE).answer_to(&client);
        self.has_p2p = ours.has_p2p();
        let payload = [agreed.bytes(), ours.text()].concat();
        self.reply(message.header, Ok(payload.into()))
    }

    fn answer(&mut self, message: Message) -> Result<Reply, Errno> {
        let command = message.command();
        let (payload, descriptors) = (message.payload.as_slice(), message.descriptors);
        let takes_descriptors = [Command::DMA_MAP, Command::DEVICE_SET_IRQS].contains(&command);
        if !descriptors.is_empty() && !takes_descriptors {
            return Err(Errno::EINVAL);
        }
        match command {
            Command::DMA_MAP => self.dma_map(payload, descriptors),
            Command::DMA_UNMAP => self.dma_unmap(payload),
            Command::DEVICE_GET_INFO => self.device_info(payload),
            Command::DEVICE_GET_REGION_INFO => self.region_info(payload),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(payload),
            Command::DEVICE_SET_IRQS => self.set_irqs(payload, descriptors),
            Command::REGION_READ => self.read(payload),
            Command::REGION_WRITE => self.write(payload),
            Command::DEVICE_RESET => self.reset(payload),
            Command::DEVICE_FEATURE => self.feature(payload).map(Reply::from),
            Command::MIG_DATA_READ => self.read_state(payload).map(Reply::from),
            Command::MIG_DATA_WRITE => self.write_state(payload).map(Reply::from),
            Command::VERSION => Err(Errno::EINVAL),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn dma_map(&mut self, payload: &[u8], descriptors: Vec<OwnedFd>) -> Result<Reply, Errno> {
        let map = DmaMap::whole(payload).ok_or(Errno::EINVAL)?;
        let is_paged = [map.address, map.size, map.offset]
            .iter()
            .all(|bytes| bytes.is_multiple_of(PAGE));
        let end = map.address.checked_add(map.size);
        let file_end = map.offset.checked_add(map.size);
        let (true, Some(end), Some(_)) = (is_paged && map.size > 0, end, file_end) else {
            return Err(Errno::EINVAL);
        };
        if ![1, 2, 3].contains(&map.flags) || descriptors.len() > 1 {
            return Err(Errno::EINVAL);
        }
        // The last one that begins before its end.
        let before = self.maps.range(..end).next_back();
        if before.is_some_and(|(address, size)| address + size > map.address) {
            return Err(Errno::EEXIST);
        }
        if self.maps.len() == MOST_MAPS {
            return Err(Errno::ENOSPC);
        }
        let region = DmaRegion {
            address: map.address,
            size: map.size,
            offset: map.offset,
            readable: map.flags & DMA_READABLE != 0,
            writable: map.flags & DMA_WRITABLE != 0,
        };
        self.device
            .dma_map(region, descriptors.into_iter().next())?;
        self.maps.insert(map.address, map.size);
        Ok(Reply::default())
    }

    fn dma_unmap(&mut self, payload: &[u8]) -> Result<Reply, Errno> {
        let unmap = DmaUnmap::whole(payload).ok_or(Errno::EINVAL)?;
        if unmap.flags != 0 {
            return Err(Errno::EINVAL);
        }
        if self.maps.get(&unmap.address) != Some(&unmap.size) {
            return Err(Errno::ENOENT);
        }
        self.device.dma_unmap(unmap.address, unmap.size)?;
        self.maps.remove(&unmap.address);
        Ok(unmap.bytes().into())
    }

    fn device_info(&self, payload: &[u8]) -> Result<Reply, Errno> {
        let asked = Info::whole(payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < Info::size() {
            return Err(Errno::EINVAL);
        }
        let info = Info {
            argsz: Info::size(),
            flags: self.info.flags.bits(),
            regions: self.info.regions,
            irqs: self.info.irqs,
        };
        Ok(info.bytes().into())
    }

    fn region_info(&self, payload: &[u8]) -> Result<Reply, Errno> {
        let asked = RegionRequest::whole(payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < RegionRequest::size() || asked.index >= self.info.regions {
            return Err(Errno::EINVAL);
        }
        let region = self.device.region(asked.index)?;
        let reply = RegionReply::new(asked.index, asked.argsz, &region);
        let file = match region.file {
            Some(file) if reply.is_whole => {
                let file = file.try_clone_to_owned();
                Some(file.map_err(|error| Errno::try_from(error).unwrap_or(Errno::EIO))?)
            }
            _ => None,
        };
        Ok(Reply {
            payload: reply.bytes,
            file,
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        *self.irqs.get(index as usize).ok_or(Errno::EINVAL)?
    }

    fn irq_info(&self, payload: &[u8]) -> Result<Reply, Errno> {
        let asked = Irq::whole(payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < Irq::size() {
            return Err(Errno::EINVAL);
        }
        let irq = self.irq(asked.index)?;
        let irq = Irq {
            argsz: Irq::size(),
            flags: irq.flags.bits(),
            index: asked.index,
            count: irq.count,
        };
        Ok(irq.bytes().into())
    }

    fn set_irqs(&mut self, payload: &[u8], eventfds: Vec<OwnedFd>) -> Result<Reply, Errno> {
        let (set, booleans) = SetIrqs::split(payload).ok_or(Errno::EINVAL)?;
        let irq = self.irq(set.index)?;
        let gives = !eventfds.is_empty();
        let action = set.action(booleans, eventfds, irq)?;
        if gives {
            self.wired.insert(set.index);
        }
        self.device.set_irqs(set.index, set.start, action)?;
        Ok(Reply::default())
    }

    /// What follows an access that lies within a region that allows it.
    fn access<'p>(
        &self,
        payload: &'p [u8],
        needs: RegionFlags,
    ) -> Result<(Access, &'p [u8]), Errno> {
        let (access, data) = Access::split(payload).ok_or(Errno::EINVAL)?;
        let region = self.regions.get(access.region as usize);
        let (flags, size) = (*region.ok_or(Errno::EINVAL)?)?;
        let end = access.offset.checked_add(access.count.into());
        if access.count > MOST_TRANSFER
            || !flags.contains(needs)
            || end.is_none_or(|end| end > size)
        {
            return Err(Errno::EINVAL);
        }
        Ok((access, data))
    }

    fn read(&mut self, payload: &[u8]) -> Result<Reply, Errno> {
        let (access, rest) = self.access(payload, RegionFlags::READ)?;
        if !rest.is_empty() {
            return Err(Errno::EINVAL);
        }
        let mut payload = access.bytes();
        payload.resize(Access::SIZE + access.count as usize, 0);
        let data = &mut payload[Access::SIZE..];
        if !data.is_empty() {
            self.device.read(access.region, access.offset, data)?;
        }
        Ok(payload.into())
    }

    fn write(&mut self, payload: &[u8]) -> Result<Reply, Errno> {
        let (access, data) = self.access(payload, RegionFlags::WRITE)?;
        if data.len() != access.count as usize {
            return Err(Errno::EINVAL);
        }
        if !data.is_empty() {
            self.device.write(access.region, access.offset, data)?;
        }
        Ok(access.bytes().into())
    }

    fn reset(&mut self, payload: &[u8]) -> Result<Reply, Errno> {
        if !payload.is_empty() {
            return Err(Errno::EINVAL);
        }
        if !self.info.flags.contains(DeviceFlags::RESET) {
            return Err(Errno::EOPNOTSUPP);
        }
        self.device.reset()?;
        Ok(Reply::default())
    }
}
