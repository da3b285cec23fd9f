//! A device made of nothing, for tests and demonstrations: it copies the guest's memory and raises
//! MSI-X interrupts.
//!
//! ```text
//! BAR 0    4 KiB   registers; every access is served here
//! BAR 2   64 KiB   0x0000 memory, which the guest's owner maps
//!                  0x8000 MSI-X table, 0xc000 pending bits: those of whoever virtualises MSI-X
//! ```
//! A command ends before the write that gave it is answered.

mod config_space;
mod dma;
mod registers;

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use device_kit::HostError;
use device_kit::memory::SharedMapping;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::write;
use vfio_user::{
    Area, Device, DeviceFlags, DeviceInfo, DmaLog, DmaRegion, Errno, IrqAction, IrqData, IrqFlags,
    IrqInfo, Migration, Region, RegionFlags, pci,
};

use self::config_space::{ConfigSpace, MEMORY_BAR_LEN, MEMORY_LEN, REGISTERS_LEN, VECTORS};
use self::dma::Dma;
use self::registers::{Command, Failure, Registers};
use crate::metrics::Metrics;

const REGISTERS_REGION: u32 = pci::BAR0_REGION;
const MEMORY_REGION: u32 = pci::BAR0_REGION + 2;

/// The device.
#[derive(Debug)]
pub(crate) struct Synthetic {
    config: ConfigSpace,
    registers: Registers,
    memory_file: File,
    memory: SharedMapping,
    dma: Dma,
    vectors: [Option<OwnedFd>; VECTORS as usize],
    metrics: Metrics,
}

impl Synthetic {
    /// Makes it.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub(crate) fn new(metrics: Metrics) -> Result<Self, HostError> {
        let failed = |error: std::io::Error| HostError::new("no memory for the device", error);
        let file = memfd_create(c"bar2", MFdFlags::MFD_CLOEXEC).map_err(|e| failed(e.into()))?;
        let memory_file = File::from(file);
        memory_file.set_len(MEMORY_LEN.into()).map_err(failed)?;
        let memory = SharedMapping::new(&memory_file, 0, MEMORY_LEN.into()).map_err(failed)?;
        Ok(Synthetic {
            config: ConfigSpace::new(),
            registers: Registers::new(),
            memory_file,
            memory,
            dma: Dma::new(),
            vectors: Default::default(),
            metrics,
        })
    }

    fn execute(&mut self, command: Command) {
        let done = match command {
            Command::Copy { .. } if !self.config.is_bus_master() => Err(Failure::NotBusMaster),
            Command::Copy {
                source,
                destination,
                length,
            } => {
                let copied = self.dma.copy(source, destination, length);
                if copied.is_ok() {
                    self.registers.copied(length);
                    self.metrics.copied_bytes.inc_by(length.into());
                }
                copied
            }
            Command::Interrupt => Ok(()),
            Command::Unknown => Err(Failure::Command),
        };
        let vector = usize::try_from(self.registers.vector()).ok();
        match vector.filter(|vector| *vector < self.vectors.len()) {
            Some(vector) => {
                // What the guest finds when the interrupt comes.
                self.registers.ended(done);
                self.signal(vector);
            }
            None => self.registers.ended(done.and(Err(Failure::Vector))),
        }
    }

    /// Raises the interrupt of a vector that exists, if it has an eventfd.
    fn signal(&self, vector: usize) {
        let Some(eventfd) = &self.vectors[vector] else {
            return;
        };
        // One whose counter is full has been signalled often enough, and would block.
        let mut ready = [PollFd::new(eventfd.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut ready, PollTimeout::ZERO) != Ok(1) {
            return;
        }
        match write(eventfd, &1u64.to_ne_bytes()) {
            Ok(_) => _ = self.metrics.interrupts.inc(),
            Err(error) => tracing::warn!(%error, vector, "an interrupt cannot be raised"),
        }
    }

    /// Bytes of BAR 2 from `offset`, where it is memory.
    fn memory_at(&self, offset: u64) -> &[std::sync::atomic::AtomicU8] {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        self.memory.bytes().get(offset..).unwrap_or_default()
    }
}

impl Device for Synthetic {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            regions: pci::REGIONS,
            irqs: pci::IRQS,
        }
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        let accessed = RegionFlags::READ | RegionFlags::WRITE;
        let plain = |size: u64| Region {
            flags: accessed,
            size,
            ..Region::default()
        };
        Ok(match index {
            REGISTERS_REGION => plain(REGISTERS_LEN.into()),
            MEMORY_REGION => Region {
                flags: accessed | RegionFlags::MMAP,
                areas: vec![Area {
                    offset: 0,
                    size: MEMORY_LEN.into(),
                }],
                file: Some(self.memory_file.as_fd()),
                ..plain(MEMORY_BAR_LEN.into())
            },
            pci::CONFIG_REGION => plain(config_space::LEN as u64),
            _ => Region::default(),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        Ok(match index {
            pci::MSIX_IRQ => IrqInfo {
                flags: IrqFlags::EVENTFD | IrqFlags::NORESIZE,
                count: VECTORS.into(),
            },
            _ => IrqInfo::default(),
        })
    }

    fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction<OwnedFd>,
    ) -> Result<(), Errno> {
        if index != pci::MSIX_IRQ {
            return Err(Errno::EINVAL);
        }
        let start = usize::try_from(start).map_err(|_| Errno::EINVAL)?;
        match action {
            IrqAction::Disable => self.vectors = Default::default(),
            IrqAction::Trigger(IrqData::Eventfds(eventfds)) => {
                let vectors = self.vectors.get_mut(start..).ok_or(Errno::EINVAL)?;
                for (vector, eventfd) in vectors.iter_mut().zip(eventfds) {
                    *vector = eventfd;
                }
            }
            IrqAction::Trigger(data) => {
                for vector in start..(start + data.count()).min(self.vectors.len()) {
                    let chosen = match &data {
                        IrqData::Chosen(chosen) => chosen[vector - start],
                        _ => true,
                    };
                    if chosen {
                        self.signal(vector);
                    }
                }
            }
            // Its table masks them.
            IrqAction::Mask(_) | IrqAction::Unmask(_) => return Err(Errno::EOPNOTSUPP),
        }
        Ok(())
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        match region {
            REGISTERS_REGION => self.registers.read(offset, data),
            MEMORY_REGION => {
                data.fill(0);
                for (byte, memory) in data.iter_mut().zip(self.memory_at(offset)) {
                    *byte = memory.load(Ordering::Relaxed);
                }
            }
            pci::CONFIG_REGION => self.config.read(offset, data),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        match region {
            REGISTERS_REGION => {
                if let Some(command) = self.registers.write(offset, data) {
                    self.execute(command);
                }
            }
            MEMORY_REGION => {
                for (byte, memory) in data.iter().zip(self.memory_at(offset)) {
                    memory.store(*byte, Ordering::Relaxed);
                }
            }
            pci::CONFIG_REGION => self.config.write(offset, data),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn dma_map(&mut self, region: DmaRegion, memory: Option<OwnedFd>) -> Result<(), Errno> {
        // What has no file is reached by messages, which this device does not send.
        memory.map_or(Ok(()), |file| self.dma.map(region, file))
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        self.dma.unmap(address, size);
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        None
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        None
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.config = ConfigSpace::new();
        self.registers = Registers::new();
        for byte in self.memory.bytes() {
            byte.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
