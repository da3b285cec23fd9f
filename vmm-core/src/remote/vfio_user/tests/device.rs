//! A device for tests, on the protocol's own server.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_user::pci::{CONFIG_REGION, IRQS, MSI_IRQ, MSIX_IRQ, REGIONS};
use vfio_user::{
    Area, Device, DeviceFlags, DeviceInfo, DmaLog, DmaRegion, Ended, Errno, IrqAction, IrqData,
    IrqFlags, IrqInfo, Migration, Region, RegionFlags, serve,
};

/// Where its MSI and MSI-X capabilities are.
pub(super) const MSI: u8 = 0x50;
pub(super) const MSIX: u8 = 0x40;
/// In its second BAR.
pub(super) const TABLE: u64 = 0x8000;
pub(super) const PENDING: u64 = 0xc000;

/// What is told to the device, in order.
pub(super) type Log = Arc<Mutex<Vec<String>>>;

/// What it is.
#[derive(Clone)]
pub(super) struct Made {
    pub(super) registers: [u8; 256],
    pub(super) flags: DeviceFlags,
    pub(super) config_size: u64,
    pub(super) bar0_size: u64,
    pub(super) vectors: u32,
    pub(super) file_size: u64,
    pub(super) areas: Vec<Area>,
    /// The most memory that it reaches, in regions.
    pub(super) most_memory: usize,
}

impl Default for Made {
    fn default() -> Self {
        let mut registers = [0; 256];
        for (at, bytes) in [
            (0x00, &[0x34, 0x12, 0x77, 0x60][..]),
            (0x06, &[0x10]),
            (0x08, &[1, 0, 0, 0xff]),
            (0x0e, &[0x80]),
            (0x18, &[0x04]),
            (0x20, &[0x01]),
            (0x34, &[MSIX]),
            (0x3d, &[1]),
            (0x40, &[0x11, MSI, 3, 0, 0x02, 0x80, 0, 0, 0x02, 0xc0, 0, 0]),
            (0x50, &[0x05, 0, 0x84, 0x01]),
        ] {
            registers[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Self {
            registers,
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            config_size: 256,
            bar0_size: 0x1000,
            vectors: 4,
            file_size: 0x1_0000,
            areas: Vec::new(),
            most_memory: usize::MAX,
        }
    }
}

/// Holds a device up in the middle of a read.
#[derive(Default)]
pub(super) struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub(super) fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

pub(super) struct FakeDevice {
    made: Made,
    bar0: Vec<u8>,
    memory: File,
    events: Arc<Mutex<Vec<Option<EventFd>>>>,
    regions: usize,
    log: Log,
    gate: Arc<Gate>,
}

impl FakeDevice {
    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }
}

impl Device for FakeDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: self.made.flags,
            regions: REGIONS,
            irqs: IRQS,
        }
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        let region = |size| Region {
            flags: RegionFlags::READ | RegionFlags::WRITE,
            size,
            ..Region::default()
        };
        Ok(match index {
            0 => region(self.made.bar0_size),
            2 => Region {
                flags: RegionFlags::READ | RegionFlags::WRITE | RegionFlags::MMAP,
                areas: self.made.areas.clone(),
                file: Some(self.memory.as_fd()),
                ..region(0x1_0000)
            },
            // Ports.
            4 => region(0x100),
            CONFIG_REGION => region(self.made.config_size),
            _ => Region::default(),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        let count = match index {
            MSI_IRQ | MSIX_IRQ => self.made.vectors,
            _ => 0,
        };
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count,
        })
    }

    fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction<OwnedFd>,
    ) -> Result<(), Errno> {
        assert!(matches!(index, MSI_IRQ | MSIX_IRQ));
        let mut events = self.events.lock().unwrap();
        match action {
            IrqAction::Disable => events.clear(),
            IrqAction::Trigger(IrqData::Eventfds(given)) => {
                events.resize_with(self.made.vectors as usize, || None);
                let given = given.into_iter().map(|fd| {
                    // SAFETY: it is an eventfd of the test's own process.
                    fd.map(|fd| unsafe { EventFd::from_owned_fd(fd) })
                });
                for (event, given) in events[start as usize..].iter_mut().zip(given) {
                    *event = given;
                }
            }
            _ => return Err(Errno::ENOTSUP),
        }
        Ok(())
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.gate.pass();
        let from = match region {
            0 => &self.bar0,
            CONFIG_REGION => &self.made.registers[..],
            _ => return Err(Errno::EIO),
        };
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(from.get(at..at + data.len()).ok_or(Errno::EIO)?);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        match region {
            0 => self.bar0[at..at + data.len()].copy_from_slice(data),
            CONFIG_REGION => self.note(format!("config {offset:#x} {data:02x?}")),
            _ => return Err(Errno::EIO),
        }
        Ok(())
    }

    fn dma_map(&mut self, region: DmaRegion, memory: Option<OwnedFd>) -> Result<(), Errno> {
        if self.regions == self.made.most_memory {
            return Err(Errno::ENOMEM);
        }
        assert!(memory.is_some() && region.readable && region.writable);
        self.regions += 1;
        self.note(format!("reach {:#x}+{:#x}", region.address, region.size));
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, _: u64) -> Result<(), Errno> {
        self.regions -= 1;
        self.note(format!("leave {address:#x}"));
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        None
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        None
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.note("reset");
        Ok(())
    }
}

/// A process that serves it, as a thread.
pub(super) struct Server {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    pub(super) events: Arc<Mutex<Vec<Option<EventFd>>>>,
    pub(super) gate: Arc<Gate>,
}

impl Server {
    /// Serves on the other end of the socket that it returns.
    pub(super) fn start(made: Made, log: &Log) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stop = Arc::new(EventFd::new().unwrap());
        let events = Arc::default();
        let gate = Arc::default();
        let memory = memfd_create("bar2", MFdFlags::MFD_CLOEXEC).unwrap();
        let memory = File::from(memory);
        memory.set_len(made.file_size).unwrap();
        let mut device = FakeDevice {
            made,
            bar0: vec![0; 0x1000],
            memory,
            events: Arc::clone(&events),
            regions: 0,
            log: Arc::clone(log),
            gate: Arc::clone(&gate),
        };
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let deadline = Duration::from_secs(20);
            match serve(&theirs, &mut device, stopped.as_fd(), deadline) {
                Ok(Ended::ClientGone | Ended::Stopped) => {}
                Err(error) => panic!("{error:?}"),
            }
        });
        let server = Self {
            stop,
            thread: Some(thread),
            events,
            gate,
        };
        (server, ours)
    }

    /// Signals an interrupt; whether the device may.
    pub(super) fn interrupt(&self, vector: usize) -> bool {
        let events = self.events.lock().unwrap();
        match events.get(vector) {
            Some(Some(event)) => event.write(1).is_ok(),
            _ => false,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.gate.set_closed(false);
        // A thread that is gone does not have to be told.
        let _: io::Result<_> = self.stop.write(1).map_err(Into::into);
        let result = self.thread.take().unwrap().join();
        assert!(result.is_ok() || thread::panicking());
    }
}
