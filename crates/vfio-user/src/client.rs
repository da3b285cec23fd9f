//! The side that uses a device.

mod migration;
#[cfg(test)]
mod tests;

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::Mutex;

use crate::description::{
    DeviceFlags, DeviceInfo, DmaRegion, IrqAction, IrqData, IrqFlags, IrqInfo, RegionInfo,
};
use crate::error::{Error, ProtocolError};
use crate::socket::{Awaited, Deadline, MOST_DESCRIPTORS, Message, receive, send};
use crate::wire::{
    Access, COMMAND, Capabilities, Command, DMA_READABLE, DMA_WRITABLE, DmaMap, DmaUnmap, ERROR,
    Header, Info, Irq, KIND, Layout, MOST_BYTES, MOST_TRANSFER, NO_REPLY, PAGE, REPLY, RegionReply,
    RegionRequest, SetIrqs, VERSION, Version,
};

/// Regions, and interrupt indices, of a device at most.
const MOST_INDICES: u32 = 256;
/// Bytes that are read about one region: a thousand areas.
const MOST_REGION_BYTES: u32 = 16 << 10;

/// A connection to a device's server.
///
/// Its methods may be called from several threads; one request is on its way at a time. Each ends
/// within the deadline. After every error but [`Error::Remote`] and [`Error::TooLong`] the connection
/// is of no more use, and all further requests fail at once.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    deadline: Duration,
    server: Capabilities,
    /// Id of the next request. Who holds it has the connection.
    next: Mutex<u16>,
}

impl Client {
    /// Agrees with the server on the protocol's version and capabilities. Each request has `deadline`
    /// from now on.
    ///
    /// # Errors
    /// When it is no server of this protocol, or hangs up.
    pub fn new(socket: UnixStream, deadline: Duration) -> Result<Self, Error> {
        let mut client = Self {
            socket,
            deadline,
            server: Capabilities::default(),
            next: Mutex::default(),
        };
        let (major, minor) = VERSION;
        let proposed = Version { major, minor }.bytes();
        let text = Capabilities::ours(MOST_DESCRIPTORS, PAGE).text();
        client.server = client.request(Command::VERSION, &[&proposed, &text], &[], |reply| {
            let (version, text) = Version::split(&reply.payload).ok_or("no version")?;
            if version.major != major || version.minor > minor {
                return Err(format!("version {}.{}", version.major, version.minor));
            }
            Capabilities::from_text(text)
        })?;
        Ok(client)
    }

    /// What the device is: with 256 regions and 256 interrupt indices at most.
    ///
    /// # Errors
    /// As for all requests: see [`Error`].
    pub fn device_info(&self) -> Result<DeviceInfo, Error> {
        let asked = Info {
            argsz: Info::size(),
            ..Info::default()
        };
        self.request(Command::DEVICE_GET_INFO, &[&asked.bytes()], &[], |reply| {
            let info: Info = fixed(reply)?;
            if info.regions > MOST_INDICES || info.irqs > MOST_INDICES {
                return Err(format!(
                    "{} regions and {} interrupt indices",
                    info.regions, info.irqs
                ));
            }
            Ok(DeviceInfo {
                flags: DeviceFlags::from_bits_truncate(info.flags),
                regions: info.regions,
                irqs: info.irqs,
            })
        })
    }

    /// One region. Its areas lie within it, and it has a file if it can be mapped.
    ///
    /// # Errors
    /// `EINVAL` without such a region.
    pub fn region_info(&self, index: u32) -> Result<RegionInfo, Error> {
        let asked = RegionRequest {
            argsz: MOST_REGION_BYTES,
            index,
            ..RegionRequest::default()
        };
        let command = Command::DEVICE_GET_REGION_INFO;
        self.request(command, &[&asked.bytes()], &[], |reply| {
            let count = reply.descriptors.len();
            let file = reply.descriptors.pop();
            if count > 1 {
                return Err(format!("{count} descriptors"));
            }
            RegionReply::read(&reply.payload, MOST_REGION_BYTES, index, file)
        })
    }

    /// One index of interrupts.
    ///
    /// # Errors
    /// `EINVAL` without such an index.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, Error> {
        let asked = Irq {
            argsz: Irq::size(),
            index,
            ..Irq::default()
        };
        let command = Command::DEVICE_GET_IRQ_INFO;
        self.request(command, &[&asked.bytes()], &[], |reply| {
            let irq: Irq = fixed(reply)?;
            if irq.index != index {
                return Err(format!("interrupt index {} in place of {index}", irq.index));
            }
            Ok(IrqInfo {
                flags: IrqFlags::from_bits_truncate(irq.flags),
                count: irq.count,
            })
        })
    }

    /// Does something with interrupts of an index, from `start` on: in as many messages as the server
    /// needs to take all descriptors. It gets those that follow one another without a gap, as many
    /// at once as it takes.
    ///
    /// # Errors
    /// `EINVAL` without such interrupts, or when they cannot do that.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: &IrqAction<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        let (all, booleans) = SetIrqs::new(index, start, action);
        let (IrqAction::Trigger(IrqData::Eventfds(eventfds))
        | IrqAction::Mask(IrqData::Eventfds(eventfds))
        | IrqAction::Unmask(IrqData::Eventfds(eventfds))) = action
        else {
            return self.set(&all, &booleans, &[]);
        };
        let most = self.server.descriptors().min(MOST_DESCRIPTORS);
        let mut set = all;
        for run in eventfds.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let most = if run[0].is_some() { most } else { run.len() };
            for part in run.chunks(most) {
                set.count = u32::try_from(part.len()).unwrap_or(u32::MAX);
                let descriptors: Vec<_> = part.iter().copied().flatten().collect();
                self.set(&set, &[], &descriptors)?;
                // What wraps around is refused by the server.
                set.start = set.start.wrapping_add(set.count);
            }
        }
        Ok(())
    }

    fn set(&self, set: &SetIrqs, booleans: &[u8], eventfds: &[BorrowedFd]) -> Result<(), Error> {
        let parts = [&set.bytes(), booleans];
        self.request(Command::DEVICE_SET_IRQS, &parts, eventfds, nothing)
    }

    /// Reads from a region, in as many messages as it takes.
    ///
    /// # Errors
    /// `EINVAL` outside of the region.
    pub fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut offset = offset;
        for part in data.chunks_mut(self.transfer()) {
            let access = access(index, offset, part.len());
            let command = Command::REGION_READ;
            self.request(
                command,
                &[&access.bytes()],
                &[],
                |reply| match Access::split(&reply.payload) {
                    Some((read, data)) if read == access && data.len() == part.len() => {
                        part.copy_from_slice(data);
                        Ok(())
                    }
                    _ => Err(format!("another reply than to {access:?}")),
                },
            )?;
            offset = offset.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes to a region, in as many messages as it takes.
    ///
    /// # Errors
    /// `EINVAL` outside of the region.
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let mut offset = offset;
        for part in data.chunks(self.transfer()) {
            let access = access(index, offset, part.len());
            let parts = [&access.bytes(), part];
            self.request(Command::REGION_WRITE, &parts, &[], |reply| {
                if Access::whole(&reply.payload) == Some(access) {
                    Ok(())
                } else {
                    Err(format!("another reply than to {access:?}"))
                }
            })?;
            offset = offset.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Lets the device access memory, which it maps if it gets the file. A second more than for other
    /// requests is given for each GiB: all of it may have to be made and pinned.
    ///
    /// # Errors
    /// `EEXIST` where there is some already.
    pub fn dma_map(&self, region: DmaRegion, memory: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let map = DmaMap {
            argsz: DmaMap::size(),
            flags: flag(region.readable, DMA_READABLE) | flag(region.writable, DMA_WRITABLE),
            offset: region.offset,
            address: region.address,
            size: region.size,
        };
        let within = self.deadline_of(region.size);
        let memory = memory.as_slice();
        self.request_within(within, Command::DMA_MAP, &[&map.bytes()], memory, nothing)
    }

    /// Takes memory back, all of what one [`Self::dma_map`] gave, in the same time. When it returns,
    /// the device accesses it no more.
    ///
    /// # Errors
    /// `ENOENT` where there is no such memory.
    pub fn dma_unmap(&self, address: u64, size: u64) -> Result<(), Error> {
        let unmap = DmaUnmap {
            argsz: DmaUnmap::size(),
            flags: 0,
            address,
            size,
        };
        let within = self.deadline_of(size);
        let parts = [&*unmap.bytes()];
        self.request_within(within, Command::DMA_UNMAP, &parts, &[], |reply| {
            let unmapped: DmaUnmap = fixed(reply)?;
            if (unmapped.address, unmapped.size) == (address, size) {
                Ok(())
            } else {
                Err(format!("another reply than to {unmap:?}"))
            }
        })
    }

    /// Resets the device.
    ///
    /// # Errors
    /// What the device says.
    pub fn reset(&self) -> Result<(), Error> {
        self.request(Command::DEVICE_RESET, &[], &[], nothing)
    }

    /// Gives the connection up: requests on their way, and all others, fail with [`Error::Closed`].
    pub fn close(&self) {
        // It fails only when the other side is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Bytes of data in one message.
    fn transfer(&self) -> usize {
        self.server.transfer().min(MOST_TRANSFER) as usize
    }

    /// How long it may take to map so many bytes.
    fn deadline_of(&self, bytes: u64) -> Duration {
        let more = Duration::from_secs(bytes >> 30);
        self.deadline.saturating_add(more)
    }

    fn request<T>(
        &self,
        command: Command,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
        read: impl FnOnce(&mut Message) -> Result<T, String>,
    ) -> Result<T, Error> {
        self.request_within(self.deadline, command, parts, descriptors, read)
    }

    /// Sends a command and reads its reply. What `read` says is wrong with that ends the connection.
    fn request_within<T>(
        &self,
        within: Duration,
        command: Command,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
        read: impl FnOnce(&mut Message) -> Result<T, String>,
    ) -> Result<T, Error> {
        let mut next = self.next.lock();
        let id = *next;
        *next = id.wrapping_add(1);
        let result = self
            .exchange(id, within, command, parts, descriptors)
            .and_then(|mut reply| {
                read(&mut reply).map_err(|what| ProtocolError::Payload { command, what }.into())
            });
        if let Err(error) = &result
            && error.ends_connection()
        {
            // Nothing can be sent any more.
            self.close();
        }
        result
    }

    fn exchange(
        &self,
        id: u16,
        within: Duration,
        command: Command,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Message, Error> {
        let size = Header::SIZE + parts.iter().map(|part| part.len()).sum::<usize>();
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        if size > MOST_BYTES {
            return Err(Error::TooLong { command });
        }
        let header = Header {
            id,
            command: command.0,
            size,
            ..Header::default()
        };
        let header = header.bytes();
        let mut whole = vec![header.as_slice()];
        whole.extend(parts);
        let deadline = Deadline::new(within, Awaited::Reply(command));
        send(&self.socket, &whole, descriptors, deadline)?;
        loop {
            let message = receive(&self.socket, MOST_BYTES, deadline)?;
            let header = message.header;
            match header.flags & KIND {
                // The server may want to access memory without a file, of which there is none.
                COMMAND => self.refuse(header, deadline)?,
                REPLY if (header.id, header.command) == (id, command.0) => {
                    if header.flags & ERROR == 0 {
                        return Ok(message);
                    }
                    let errno = match i32::try_from(header.error) {
                        Ok(errno @ 1..) => Errno::from_raw(errno),
                        // It is optional.
                        _ => Errno::EIO,
                    };
                    return Err(Error::Remote { command, errno });
                }
                _ => {
                    let unexpected = ProtocolError::Unexpected {
                        what: header.to_string(),
                        due: format!("reply {id} to {command}"),
                    };
                    return Err(unexpected.into());
                }
            }
        }
    }

    fn refuse(&self, command: Header, deadline: Deadline) -> Result<(), Error> {
        if command.flags & NO_REPLY != 0 {
            return Ok(());
        }
        let reply = command.refusal(Errno::EOPNOTSUPP).bytes();
        send(&self.socket, &[&reply], &[], deadline)
    }
}

impl AsFd for Client {
    /// The socket, to watch it for the server's end (`POLLHUP`); nothing else is to be done with it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn access(region: u32, offset: u64, count: usize) -> Access {
    Access {
        offset,
        region,
        count: u32::try_from(count).unwrap_or(u32::MAX),
    }
}

/// A reply that is one structure.
fn fixed<T: Layout>(reply: &Message) -> Result<T, String> {
    T::whole(&reply.payload).ok_or_else(|| format!("{} bytes", reply.payload.len()))
}

/// A reply that is nothing but a header.
fn nothing(reply: &mut Message) -> Result<(), String> {
    match reply.payload.len() {
        0 => Ok(()),
        more => Err(format!("{more} bytes")),
    }
}
