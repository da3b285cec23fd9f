//! What a device is, as its process describes it.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use vfio_user::pci::{CONFIG_REGION, MSIX_IRQ};
use vfio_user::{Area, Client, DeviceFlags, RegionFlags};

use super::Unusable;
use super::interrupts::Interrupts;
use crate::layout::MMIO32;
use crate::pci::{BarIndex, CONFIG_SIZE};

const PAGE: u64 = 4096;

const HEADER_TYPE: usize = 0x0e;
const BAR_IS_IO: u8 = 1;
/// Registers that tell one device from another: vendor, device; revision, class; subsystem.
const IDENTITY: [Range<usize>; 3] = [0x00..0x04, 0x08..0x0c, 0x2c..0x30];

/// What areas of a BAR are mapped from, if it has any.
pub(super) type Backing = Option<Arc<File>>;

/// A device.
pub(super) struct Description {
    /// What must be the same in any process that takes the place of this one.
    pub(super) shape: Shape,
    /// Configuration space, as it was when it was read.
    pub(super) registers: [u8; CONFIG_SIZE],
    /// By BAR of the shape, what its areas are mapped from.
    pub(super) files: Vec<Backing>,
}

/// What does not change about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    identity: Vec<u8>,
    pub(super) bars: Vec<Bar>,
    pub(super) interrupts: Interrupts,
    /// Whether it can be reset.
    pub(super) resets: bool,
}

/// A BAR for memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) index: BarIndex,
    /// Bytes: a power of two.
    pub(super) size: u32,
    /// Where its region begins in its file.
    offset: u64,
    /// Whole pages that the guest may use without an exit.
    pub(super) areas: Vec<Range<u64>>,
}

impl Bar {
    /// Where an area is in the file.
    pub(super) fn in_file(&self, area: &Range<u64>) -> u64 {
        self.offset + area.start
    }
}

impl Description {
    /// Asks a device's process for it, and refuses what no machine can have.
    pub(super) fn of(client: &Client) -> Result<Self, Unusable> {
        let info = client.device_info()?;
        let has_all = info.regions > CONFIG_REGION && info.irqs > MSIX_IRQ;
        if !info.flags.contains(DeviceFlags::PCI) || !has_all {
            return Err(Unusable::NotPci);
        }
        let size = client.region_info(CONFIG_REGION)?.size;
        if size < CONFIG_SIZE as u64 {
            return Err(Unusable::Config { size });
        }
        let mut registers = [0; CONFIG_SIZE];
        client.region_read(CONFIG_REGION, 0, &mut registers)?;
        let found = registers[HEADER_TYPE] & 0x7f;
        if found != 0 {
            return Err(Unusable::HeaderType { found });
        }
        let interrupts = Interrupts::of(&registers)?;
        let (vectors, served) = (
            interrupts.vectors,
            client.irq_info(interrupts.index())?.count,
        );
        if served < vectors.into() {
            return Err(Unusable::Vectors { vectors, served });
        }
        let (mut bars, mut files) = (Vec::new(), Vec::new());
        for index in BarIndex::ALL {
            if registers[usize::from(index.register())] & BAR_IS_IO == 0
                && let Some((bar, file)) = bar(client, index, &interrupts)?
            {
                bars.push(bar);
                files.push(file);
            }
        }
        for (what, place) in interrupts.places() {
            let bar = bars.iter().find(|bar| bar.index as u8 == place.bar);
            if bar.is_none_or(|bar| place.range.end > bar.size.into()) {
                let (bar, offset) = (place.bar, place.range.start);
                return Err(Unusable::MsixPlace { what, bar, offset });
            }
        }
        let shape = Shape {
            identity: IDENTITY.map(|range| registers[range].to_vec()).concat(),
            bars,
            interrupts,
            resets: info.flags.contains(DeviceFlags::RESET),
        };
        Ok(Self {
            shape,
            registers,
            files,
        })
    }
}

/// One BAR, if the device has it, and what it is mapped from.
fn bar(
    client: &Client,
    index: BarIndex,
    interrupts: &Interrupts,
) -> Result<Option<(Bar, Backing)>, Unusable> {
    let number = index as u32;
    let info = client.region_info(number)?;
    if info.size == 0 {
        return Ok(None);
    }
    let shown = info.size.max(16).checked_next_power_of_two();
    let shown = shown.filter(|size| *size <= MMIO32.end - MMIO32.start);
    let size = shown.and_then(|size| u32::try_from(size).ok());
    let size = size.ok_or(Unusable::BarSize {
        bar: number,
        size: info.size,
    })?;
    let whole = Area {
        offset: 0,
        size: info.size,
    };
    let mut areas = match (info.flags.contains(RegionFlags::MMAP), &*info.areas) {
        (false, _) => Vec::new(),
        (true, []) => vec![whole],
        (true, areas) => areas.to_vec(),
    };
    if !info.offset.is_multiple_of(PAGE) {
        areas.clear();
    }
    let places = interrupts.places().into_iter();
    let here = places.filter(|(_, place)| place.bar == index as u8);
    let holes: Vec<_> = here.map(|(_, place)| place.range.clone()).collect();
    let bar = Bar {
        index,
        size,
        offset: info.offset,
        areas: areas.iter().flat_map(|area| pages(*area, &holes)).collect(),
    };
    let file = info.file.map(File::from);
    let long_enough = |file: &File| match file.metadata() {
        // Only a plain file has a length.
        Ok(data) if data.is_file() => bar.areas.iter().all(|area| {
            let end = info.offset.checked_add(area.end);
            end.is_some_and(|end| end <= data.len())
        }),
        _ => true,
    };
    if !file.as_ref().is_none_or(long_enough) {
        return Err(Unusable::ShortFile { bar: number });
    }
    Ok(Some((bar, file.map(Arc::new))))
}

/// The whole pages of `area`, without those that have a part of a hole.
fn pages(area: Area, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let end = area.offset.saturating_add(area.size) / PAGE * PAGE;
    let whole = area.offset.next_multiple_of(PAGE)..end;
    let mut parts = vec![whole];
    for hole in holes {
        let (from, to) = (hole.start / PAGE * PAGE, hole.end.next_multiple_of(PAGE));
        let around = |part: Range<u64>| {
            let before = part.start..part.end.min(from);
            [before, part.start.max(to)..part.end]
        };
        parts = parts.into_iter().flat_map(around).collect();
    }
    parts.retain(|part| part.start < part.end);
    parts
}
