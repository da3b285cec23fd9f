//! What a device is, and what is asked of it, on both sides of the socket.

use std::os::fd::OwnedFd;

use bitflags::bitflags;

bitflags! {
    /// `VFIO_DEVICE_FLAGS_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// It can be reset.
        const RESET = 1 << 0;
        /// It is a PCI device.
        const PCI = 1 << 1;
    }

    /// `VFIO_REGION_INFO_FLAG_*`, but for `CAPS`, which follows from the areas.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// It can be read.
        const READ = 1 << 0;
        /// It can be written.
        const WRITE = 1 << 1;
        /// All of it, or its areas, can be mapped.
        const MMAP = 1 << 2;
    }

    /// `VFIO_IRQ_INFO_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct IrqFlags: u32 {
        /// They signal eventfds.
        const EVENTFD = 1 << 0;
        /// They can be masked and unmasked.
        const MASKABLE = 1 << 1;
        /// One that was triggered is masked until it is unmasked.
        const AUTOMASKED = 1 << 2;
        /// They are set up all at once: to add one, disable all first.
        const NORESIZE = 1 << 3;
    }
}

/// What a device is (VFU, «VFIO_USER_DEVICE_GET_INFO»).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it can do.
    pub flags: DeviceFlags,
    /// Number of its regions; a region's index is below it.
    pub regions: u32,
    /// Number of its interrupt indices; an index is below it.
    pub irqs: u32,
}

/// A part of a region that can be mapped (VFU, «VFIO region info cap sparse mmap»).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it begins in the region, in bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// A region (VFU, «VFIO_USER_DEVICE_GET_REGION_INFO»).
///
/// `F` is a descriptor: owned by the client, borrowed from the device.
#[derive(Debug)]
pub struct RegionInfo<F = OwnedFd> {
    /// What can be done with it.
    pub flags: RegionFlags,
    /// Bytes; none if the device does not have the region.
    pub size: u64,
    /// Where the region begins in `file`, in bytes.
    pub offset: u64,
    /// What of it can be mapped, each within the region; with [`RegionFlags::MMAP`] and no areas all
    /// of it.
    pub areas: Vec<Area>,
    /// What is mapped; there with [`RegionFlags::MMAP`], and only then.
    pub file: Option<F>,
}

impl<F> Default for RegionInfo<F> {
    fn default() -> Self {
        Self {
            flags: RegionFlags::default(),
            size: 0,
            offset: 0,
            areas: Vec::new(),
            file: None,
        }
    }
}

/// One index of interrupts (VFU, «VFIO_USER_DEVICE_GET_IRQ_INFO»).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// What can be done with them.
    pub flags: IrqFlags,
    /// How many.
    pub count: u32,
}

/// What is done with interrupts of one index (VFU, «VFIO_USER_DEVICE_SET_IRQS»).
///
/// `F` is a descriptor: borrowed by the client, owned by the server.
#[derive(Debug)]
pub enum IrqAction<F> {
    /// All of the index are disabled, and give up their eventfds. They begin at 0.
    Disable,
    /// They are triggered, or signal these eventfds from now on.
    Trigger(IrqData<F>),
    /// They are masked, or signal these eventfds when they are.
    Mask(IrqData<F>),
    /// They are unmasked, or signal these eventfds when they are.
    Unmask(IrqData<F>),
}

/// Which interrupts, from the first one on.
#[derive(Debug)]
pub enum IrqData<F> {
    /// This many.
    Count(u32),
    /// Those that have `true`.
    Chosen(Vec<bool>),
    /// Each signals its eventfd, or has none any more. To the server they come either all or none in
    /// one call.
    Eventfds(Vec<Option<F>>),
}

impl<F> IrqData<F> {
    /// How many interrupts it is about.
    pub fn count(&self) -> usize {
        match self {
            Self::Count(count) => *count as usize,
            Self::Chosen(chosen) => chosen.len(),
            Self::Eventfds(eventfds) => eventfds.len(),
        }
    }
}

/// Memory that the device may access (VFU, «VFIO_USER_DMA_MAP»).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRegion {
    /// First address, as the device uses it.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in its file, in bytes; 0 without one.
    pub offset: u64,
    /// Whether the device may read it.
    pub readable: bool,
    /// Whether the device may write it.
    pub writable: bool,
}
