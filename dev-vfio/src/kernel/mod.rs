//! A PCI device of the host, through the kernel's VFIO.
//!
//! What a front-end asks is asked of the kernel, which knows what may be done to the device; this
//! process keeps what the kernel wants as a whole: the guest's memory mapped as long as it is pinned,
//! and all eventfds of an index, since a kernel may set up its interrupts only all at once.

mod ioctl;
mod open;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use device_kit::{HostError, OpenError};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
};
use vfio_user::{
    Area, Device, DeviceFlags, DeviceInfo, DmaLog, DmaRegion, Errno, IrqAction, IrqData, IrqFlags,
    IrqInfo, Migration, Region, RegionFlags,
};
use vm_memory::mmap::MmapRegion;

pub(crate) use self::ioctl::AT_WORK;
use crate::config::HostFds;
use crate::memory;

/// What can be mapped is so in pages.
const PAGE: u64 = 4096;
/// Most regions and interrupt indices that are asked for: those of PCI are 9 and 5.
const MAX_INDICES: u32 = 64;

/// The device.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: File,
    container: OwnedFd,
    /// The device is this process's as long as it is open.
    _group: OwnedFd,
    flags: DeviceFlags,
    regions: Vec<KernelRegion>,
    irqs: Vec<Irq>,
    /// By their addresses.
    memory: BTreeMap<u64, MmapRegion>,
}

/// What the kernel says of a region.
#[derive(Debug, Default)]
struct KernelRegion {
    flags: RegionFlags,
    size: u64,
    /// Where it begins in the device's file.
    offset: u64,
    areas: Vec<Area>,
}

/// One index of interrupts.
#[derive(Debug)]
struct Irq {
    info: IrqInfo,
    /// As many as are set up.
    eventfds: Vec<Option<OwnedFd>>,
}

impl Kernel {
    /// Opens the device at a PCI address.
    ///
    /// # Errors
    /// What is in the way, and what to do.
    pub(crate) fn open(address: &str, handed: Option<HostFds>) -> Result<Self, OpenError> {
        let opened = open::open(address, handed)?;
        lift_memory_limit();
        let failed = |error: Errno| HostError::new(format!("{address} cannot be examined"), error);
        let device = opened.device.as_fd();
        let info = ioctl::device_info(device).map_err(failed)?;
        let mut regions = Vec::new();
        for index in 0..info.num_regions.min(MAX_INDICES) {
            regions.push(match KernelRegion::of(device, index) {
                // It has no such region, as most have none for VGA.
                Err(Errno::EINVAL) => KernelRegion::default(),
                region => region.map_err(failed)?,
            });
        }
        let mut irqs = Vec::new();
        for index in 0..info.num_irqs.min(MAX_INDICES) {
            irqs.push(match ioctl::irq_info(device, index) {
                Err(Errno::EINVAL) => Irq::of(0, 0),
                info => info
                    .map(|info| Irq::of(info.flags, info.count))
                    .map_err(failed)?,
            });
        }
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(OpenError::Device(format!("{address} is no PCI device")));
        }
        Ok(Kernel {
            device: opened.device.into(),
            container: opened.container,
            _group: opened.group,
            flags: DeviceFlags::from_bits_truncate(info.flags),
            regions,
            irqs,
            memory: BTreeMap::new(),
        })
    }

    fn at(&self, region: u32, offset: u64) -> Result<u64, Errno> {
        let region = self.regions.get(region as usize).ok_or(Errno::EINVAL)?;
        region.offset.checked_add(offset).ok_or(Errno::EINVAL)
    }

    /// Makes the eventfds those of interrupts from `start` on.
    fn signal_to(
        &mut self,
        index: u32,
        start: u32,
        eventfds: Vec<Option<OwnedFd>>,
    ) -> Result<(), Errno> {
        let device = self.device.as_fd();
        let irq = self.irqs.get_mut(index as usize).ok_or(Errno::EINVAL)?;
        let first = start as usize;
        let end = first + eventfds.len();
        if end > irq.info.count as usize {
            return Err(Errno::EINVAL);
        }
        let more = end > irq.eventfds.len();
        let set_up = !irq.eventfds.is_empty();
        if more {
            irq.eventfds.resize_with(end, || None);
        }
        for (slot, eventfd) in irq.eventfds[first..end].iter_mut().zip(eventfds) {
            *slot = eventfd;
        }
        if !more {
            return set_eventfds(device, index, start, &irq.eventfds[first..end]);
        }
        if set_up && irq.info.flags.contains(IrqFlags::NORESIZE) {
            disable(device, index)?;
        }
        set_eventfds(device, index, 0, &irq.eventfds)
    }
}

impl KernelRegion {
    fn of(device: BorrowedFd<'_>, index: u32) -> Result<Self, Errno> {
        let (info, areas) = ioctl::region_info(device, index)?;
        let mut flags = RegionFlags::from_bits_truncate(info.flags);
        // Of one that is no whole page the kernel maps what is not the device's.
        if !info.size.is_multiple_of(PAGE) {
            flags.remove(RegionFlags::MMAP);
        }
        Ok(KernelRegion {
            flags,
            size: info.size,
            offset: info.offset,
            areas,
        })
    }
}

impl Irq {
    fn of(flags: u32, count: u32) -> Self {
        Irq {
            info: IrqInfo {
                flags: IrqFlags::from_bits_truncate(flags),
                count,
            },
            eventfds: Vec::new(),
        }
    }
}

fn set_eventfds(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    eventfds: &[Option<OwnedFd>],
) -> Result<(), Errno> {
    let count = u32::try_from(eventfds.len()).map_err(|_| Errno::EINVAL)?;
    let number = |eventfd: &Option<OwnedFd>| eventfd.as_ref().map_or(-1, |fd| fd.as_raw_fd());
    let data: Vec<u8> = eventfds
        .iter()
        .flat_map(|eventfd| number(eventfd).to_ne_bytes())
        .collect();
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    ioctl::set_irqs(device, flags, index, (start, count), &data)
}

fn disable(device: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    ioctl::set_irqs(device, flags, index, (0, 0), &[])
}

impl Device for Kernel {
    fn info(&self) -> DeviceInfo {
        let count = |len: usize| u32::try_from(len).unwrap_or(MAX_INDICES);
        DeviceInfo {
            flags: self.flags,
            regions: count(self.regions.len()),
            irqs: count(self.irqs.len()),
        }
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        let region = self.regions.get(index as usize).ok_or(Errno::EINVAL)?;
        let mapped = region.flags.contains(RegionFlags::MMAP);
        Ok(Region {
            flags: region.flags,
            size: region.size,
            offset: region.offset,
            areas: region.areas.clone(),
            file: mapped.then(|| self.device.as_fd()),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        let irq = self.irqs.get(index as usize).ok_or(Errno::EINVAL)?;
        Ok(irq.info)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction<OwnedFd>,
    ) -> Result<(), Errno> {
        let (flag, data) = match action {
            IrqAction::Disable => {
                let irq = self.irqs.get_mut(index as usize).ok_or(Errno::EINVAL)?;
                irq.eventfds.clear();
                return disable(self.device.as_fd(), index);
            }
            IrqAction::Trigger(IrqData::Eventfds(eventfds)) => {
                return self.signal_to(index, start, eventfds);
            }
            IrqAction::Trigger(data) => (VFIO_IRQ_SET_ACTION_TRIGGER, data),
            IrqAction::Mask(data) => (VFIO_IRQ_SET_ACTION_MASK, data),
            IrqAction::Unmask(data) => (VFIO_IRQ_SET_ACTION_UNMASK, data),
        };
        let count = u32::try_from(data.count()).map_err(|_| Errno::EINVAL)?;
        let (kind, bytes) = match &data {
            IrqData::Count(_) => (VFIO_IRQ_SET_DATA_NONE, Vec::new()),
            IrqData::Chosen(chosen) => (
                VFIO_IRQ_SET_DATA_BOOL,
                chosen.iter().map(|chosen| u8::from(*chosen)).collect(),
            ),
            IrqData::Eventfds(eventfds) => (
                VFIO_IRQ_SET_DATA_EVENTFD,
                eventfds
                    .iter()
                    .flat_map(|fd| fd.as_ref().map_or(-1, |fd| fd.as_raw_fd()).to_ne_bytes())
                    .collect(),
            ),
        };
        ioctl::set_irqs(
            self.device.as_fd(),
            kind | flag,
            index,
            (start, count),
            &bytes,
        )
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = self.at(region, offset)?;
        self.device.read_exact_at(data, at).map_err(errno)
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = self.at(region, offset)?;
        self.device.write_all_at(data, at).map_err(errno)
    }

    fn dma_map(&mut self, region: DmaRegion, file: Option<OwnedFd>) -> Result<(), Errno> {
        // What has no file is reached by messages, which a device of the host cannot send.
        let Some(file) = file else { return Ok(()) };
        let mapping = memory::map(&region, file)?;
        pin(&self.container, &region, &mapping)?;
        self.memory.insert(region.address, mapping);
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        let Some(mapping) = self.memory.remove(&address) else {
            return Ok(());
        };
        let unpinned = ioctl::unmap_dma(self.container.as_fd(), address, size);
        if unpinned.is_err() {
            // The device may still write there.
            self.memory.insert(address, mapping);
        }
        unpinned
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        None
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        None
    }

    fn reset(&mut self) -> Result<(), Errno> {
        ioctl::reset(self.device.as_fd())
    }
}

/// Lets the device access memory that is mapped, all of which is pinned.
#[expect(unsafe_code, reason = "memory is handed to a device")]
fn pin(container: &OwnedFd, region: &DmaRegion, mapping: &MmapRegion) -> Result<(), Errno> {
    // SAFETY: it is a mapping of this size, which nothing in this process refers to, and which is
    // kept until the device has lost it.
    unsafe { ioctl::map_dma(container.as_fd(), region, mapping.as_ptr()) }
}

/// What the guest has as memory is locked; the capability that goes without limit is given up with
/// the sandbox.
fn lift_memory_limit() {
    let limit = Resource::RLIMIT_MEMLOCK;
    if setrlimit(limit, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
        return;
    }
    let raised = getrlimit(limit).and_then(|(_, most)| {
        setrlimit(limit, most, most)?;
        Ok(most)
    });
    match raised {
        Ok(RLIM_INFINITY) => {}
        Ok(bytes) => tracing::info!(bytes, "no more of the guest's memory can be locked"),
        Err(error) => tracing::warn!(%error, "the limit of locked memory is not known"),
    }
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
