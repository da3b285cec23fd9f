//! A device that notes what is asked of it, and its server, for tests.

use std::fmt::Debug;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{
    Area, Device, DeviceFlags, DeviceInfo, DeviceState, DmaLog, DmaRange, DmaRegion, Ended, Error,
    IrqAction, IrqData, IrqFlags, IrqInfo, Migration, MigrationFlags, Region, RegionFlags, pci,
    serve,
};

/// Far longer than anything takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Its areas are in the region of this index.
pub(crate) const SPARSE: u32 = 1;
/// All of it can be mapped.
pub(crate) const MAPPED: u32 = 2;
pub(crate) const READ_ONLY: u32 = 3;
pub(crate) const WRITE_ONLY: u32 = 4;
/// Whoever asks for it is told that it is broken.
pub(crate) const BROKEN: u32 = 5;
/// Bytes of region 0, more than a message carries.
pub(crate) const SIZE: usize = (5 << 19) + 12;
/// It cannot be mapped.
pub(crate) const NO_MEMORY: u64 = 0xbad_0000;
pub(crate) const AREAS: [Area; 2] = [
    Area {
        offset: 0x1000,
        size: 0x1000,
    },
    Area {
        offset: 0x3000,
        size: 0x2000,
    },
];

pub(crate) struct Fake {
    pub(crate) info: DeviceInfo,
    pub(crate) content: Vec<u8>,
    file: File,
    /// What was asked of it.
    pub(crate) calls: Vec<String>,
    /// Eventfds that it has, with what is signalled.
    pub(crate) eventfds: Vec<(u32, u32, File)>,
    /// Files of memory that it has, by address.
    pub(crate) memory: Vec<(u64, Option<File>)>,
    /// Whether it can be moved, and notes what it writes.
    pub(crate) moves: bool,
    pub(crate) state: DeviceState,
    /// What is read and written of it.
    pub(crate) saved: Vec<u8>,
    /// Addresses that it has written.
    pub(crate) written: Vec<u64>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let mut file = File::from(memfd_create("region", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(&vec![7; 0x8000]).unwrap();
        Self {
            info: DeviceInfo {
                flags: DeviceFlags::PCI | DeviceFlags::RESET,
                regions: pci::REGIONS,
                irqs: pci::IRQS,
            },
            content: vec![0; SIZE],
            file,
            calls: Vec::new(),
            eventfds: Vec::new(),
            memory: Vec::new(),
            moves: true,
            state: DeviceState::Running,
            saved: Vec::new(),
            written: Vec::new(),
        }
    }

    fn note(&mut self, call: &str, with: impl Debug) {
        self.calls.push(format!("{call} {with:?}"));
    }

    /// What was asked since the last time.
    pub(crate) fn taken(&mut self) -> Vec<String> {
        std::mem::take(&mut self.calls)
    }
}

impl Device for Fake {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        let read_write = RegionFlags::READ | RegionFlags::WRITE;
        let region = |flags, size| Region {
            flags,
            size,
            ..Region::default()
        };
        let mapped = |areas: &[Area]| Region {
            offset: 0x1000,
            areas: areas.to_vec(),
            file: Some(self.file.as_fd()),
            ..region(read_write | RegionFlags::MMAP, 0x5000)
        };
        match index {
            0 => Ok(region(read_write, SIZE as u64)),
            SPARSE => Ok(mapped(&AREAS)),
            MAPPED => Ok(mapped(&[])),
            READ_ONLY => Ok(region(RegionFlags::READ, 16)),
            WRITE_ONLY => Ok(region(RegionFlags::WRITE, 16)),
            BROKEN => Err(Errno::EREMOTEIO),
            _ => Ok(Region::default()),
        }
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        let (flags, count) = match index {
            pci::INTX_IRQ => (
                IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED,
                1,
            ),
            pci::MSIX_IRQ => (IrqFlags::EVENTFD | IrqFlags::NORESIZE, 150),
            pci::ERROR_IRQ => (IrqFlags::empty(), 1),
            pci::REQUEST_IRQ => return Err(Errno::EREMOTEIO),
            _ => (IrqFlags::EVENTFD, 0),
        };
        Ok(IrqInfo { flags, count })
    }

    fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction<OwnedFd>,
    ) -> Result<(), Errno> {
        let (name, data) = match action {
            IrqAction::Disable => {
                self.note("disable", (index, start));
                self.eventfds.retain(|it| it.0 != index);
                return Ok(());
            }
            IrqAction::Trigger(data) => ("trigger", data),
            IrqAction::Mask(data) => ("mask", data),
            IrqAction::Unmask(data) => ("unmask", data),
        };
        match data {
            IrqData::Count(count) => self.note(name, (index, start, count)),
            IrqData::Chosen(chosen) => self.note(name, (index, start, chosen)),
            IrqData::Eventfds(eventfds) => {
                let some = eventfds.iter().flatten().count();
                let none = eventfds.len() - some;
                self.note(name, (index, start, some, none));
                for (at, eventfd) in (start..).zip(eventfds) {
                    self.eventfds.retain(|it| (it.0, it.1) != (index, at));
                    self.eventfds
                        .extend(eventfd.map(|it| (index, at, it.into())));
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.note("read", (region, offset, data.len()));
        let offset = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.content[offset..][..data.len()]);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.note("write", (region, offset, data.len()));
        let offset = usize::try_from(offset).unwrap();
        self.content[offset..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(&mut self, region: DmaRegion, memory: Option<OwnedFd>) -> Result<(), Errno> {
        if region.address == NO_MEMORY {
            return Err(Errno::ENOMEM);
        }
        let DmaRegion {
            address,
            size,
            offset,
            readable,
            writable,
        } = region;
        self.note("map", (address, size, offset, readable, writable));
        self.memory.push((address, memory.map(File::from)));
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        self.note("unmap", (address, size));
        self.memory.retain(|it| it.0 != address);
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        self.moves.then_some(self)
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.moves.then_some(self)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.note("reset", ());
        Ok(())
    }
}

impl Migration for Fake {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::all()
    }

    fn state(&self) -> Result<DeviceState, Errno> {
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), Errno> {
        if (self.state, state) == (DeviceState::StopCopy, DeviceState::PreCopy) {
            return Err(Errno::EREMOTEIO);
        }
        self.state = state;
        Ok(())
    }

    fn read_state(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        self.note("read state", data.len());
        let count = data.len().min(self.saved.len());
        data[..count].copy_from_slice(&self.saved[..count]);
        self.saved.drain(..count);
        Ok(count)
    }

    fn write_state(&mut self, data: &[u8]) -> Result<(), Errno> {
        if self.state != DeviceState::Resuming {
            return Err(Errno::EREMOTEIO);
        }
        self.note("write state", data.len());
        self.saved.extend(data);
        Ok(())
    }
}

impl DmaLog for Fake {
    fn start(&mut self, page: u64, ranges: &[DmaRange]) -> Result<u64, Errno> {
        let ranges: Vec<_> = ranges.iter().map(|it| (it.address, it.size)).collect();
        self.note("start log", (page, ranges));
        Ok(page.max(4096))
    }

    fn stop(&mut self) -> Result<(), Errno> {
        self.note("stop log", ());
        Ok(())
    }

    fn report(&mut self, range: DmaRange, page: u64, bitmap: &mut [u64]) -> Result<(), Errno> {
        self.note("report", (range.address, range.size, page));
        let range = range.address..range.address + range.size;
        self.written.retain(|address| {
            if !range.contains(address) {
                return true;
            }
            let at = usize::try_from((address - range.start) / page).unwrap();
            bitmap[at / 64] |= 1 << (at % 64);
            false
        });
        Ok(())
    }
}

/// A server on a thread of its own.
pub(crate) struct Served {
    stop: UnixStream,
    thread: JoinHandle<(Result<Ended, Error>, Fake)>,
}

impl Served {
    /// Serves a device to who has the socket.
    pub(crate) fn start(mut device: Fake, deadline: Duration) -> (UnixStream, Self) {
        let (client, socket) = UnixStream::pair().unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let ended = serve(&socket, &mut device, stopped.as_fd(), deadline);
            (ended, device)
        });
        (client, Self { stop, thread })
    }

    /// Tells it to stop.
    pub(crate) fn stop(&self) {
        (&self.stop).write_all(b"x").unwrap();
    }

    /// Waits for its end.
    pub(crate) fn ended(self) -> (Result<Ended, Error>, Fake) {
        self.thread.join().unwrap()
    }
}
