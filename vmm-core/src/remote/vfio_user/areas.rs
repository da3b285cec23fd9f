//! Parts of BARs that the guest may use without an exit, in its memory layout while their BAR is
//! decoded.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::description::{Backing, Bar};
use crate::memory::{LayoutError, Memory, Region, RegionKind};
use crate::pci::{BarIndex, Header};

/// Why areas are not mapped.
#[derive(Debug, Error)]
pub(super) enum AreasError {
    #[error("its file cannot be mapped")]
    File(#[from] io::Error),
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// The areas of one device.
pub(super) struct Areas {
    memory: Arc<Memory>,
    /// By BAR, what its areas are mapped from.
    files: Vec<Backing>,
    /// Those in the layout: their BARs and addresses.
    mapped: Vec<(BarIndex, u64)>,
}

impl Areas {
    /// None is mapped.
    pub(super) fn new(memory: &Arc<Memory>, files: Vec<Backing>) -> Self {
        Self {
            memory: Arc::clone(memory),
            files,
            mapped: Vec::new(),
        }
    }

    /// From now on they are mapped from other files.
    pub(super) fn replace_files(&mut self, files: Vec<Backing>) {
        self.files = files;
    }

    /// They cannot be mapped any more, and leave nothing open.
    pub(super) fn drop_files(&mut self) {
        self.files.fill(None);
    }

    /// Puts those of `bars` that are decoded into the layout, all or none.
    pub(super) fn map(
        &mut self,
        bars: &[Bar],
        header: &Header,
        which: impl Fn(BarIndex) -> bool,
    ) -> Result<(), AreasError> {
        let mut mapped = Vec::new();
        let mut layout = self.memory.begin();
        for (bar, file) in bars.iter().zip(&self.files) {
            let base = header.decoded(bar.index);
            let (Some(base), Some(file), true) = (base, file, which(bar.index)) else {
                continue;
            };
            for area in &bar.areas {
                let (address, size) = (base + area.start, area.end - area.start);
                let region = Region::map(address, size, Arc::clone(file), bar.in_file(area))?;
                layout.add(region.of_kind(RegionKind::Device))?;
                mapped.push((bar.index, address));
            }
        }
        layout.commit()?;
        self.mapped.extend(mapped);
        Ok(())
    }

    /// Takes those of some BARs out of the layout.
    pub(super) fn unmap(&mut self, which: impl Fn(BarIndex) -> bool) -> Result<(), AreasError> {
        let mut layout = self.memory.begin();
        for (_, address) in self.mapped.extract_if(.., |(bar, _)| which(*bar)) {
            layout.remove(address)?;
        }
        Ok(layout.commit()?)
    }
}
