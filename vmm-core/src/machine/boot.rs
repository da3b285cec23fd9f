//! What a machine starts in, and with it what only such a machine has.

use std::sync::Arc;

use super::config::{BootConfig, ImageSource};
use crate::boot::acpi::AcpiConfig;
use crate::boot::{
    BootError, BootSource, EntryPoint, Firmware, FirmwareError, Initrd, InitrdError, Kernel,
    KernelError, firmware_map,
};
use crate::layout::SERIAL_PORT;
use crate::memory::Memory;
use crate::migration::ram::CoreWrites;
use crate::platform::FwCfg;

/// What a machine starts in.
pub(super) enum Boot {
    Kernel(Box<BootSource>),
    Firmware(Firmware),
}

impl Boot {
    /// Opens what is not open, and checks all of it.
    pub(super) fn open(config: BootConfig) -> Result<Self, BootError> {
        match config {
            BootConfig::Kernel {
                kernel,
                initrd,
                cmdline,
            } => {
                let kernel: Result<_, KernelError> = match kernel.file {
                    Some(file) => Kernel::from_file(&kernel.path.display().to_string(), file),
                    None => Kernel::open(&kernel.path),
                };
                let open = |image: ImageSource| -> Result<_, InitrdError> {
                    match image.file {
                        Some(file) => Initrd::from_file(&image.path.display().to_string(), file),
                        None => Initrd::open(&image.path),
                    }
                };
                let initrd = initrd.map(open).transpose()?;
                let source = BootSource::new(kernel?, initrd, &cmdline)?;
                Ok(Self::Kernel(Box::new(source)))
            }
            BootConfig::Firmware(image) => {
                let firmware: Result<_, FirmwareError> = match image.file {
                    Some(file) => Firmware::from_file(&image.path.display().to_string(), file),
                    None => Firmware::open(&image.path),
                };
                Ok(Self::Firmware(firmware?))
            }
        }
    }

    /// Bytes of ROM that the machine has.
    pub(super) fn rom(&self) -> u64 {
        match self {
            Self::Kernel(_) => 0,
            Self::Firmware(firmware) => firmware.size(),
        }
    }

    /// What a firmware asks about the machine; its writes to `memory` are noted in `writes`.
    pub(super) fn fw_cfg(
        &self,
        acpi: &AcpiConfig,
        memory: &Arc<Memory>,
        writes: &CoreWrites,
    ) -> Result<Option<FwCfg>, BootError> {
        if let Self::Kernel(_) = self {
            return Ok(None);
        }
        let mut files = Vec::from(acpi.for_firmware()?.files);
        files.push(("etc/e820", firmware_map(&memory.guest())));
        // Where SeaBIOS has its console, in the place of a screen.
        let console = SERIAL_PORT.start.to_le_bytes().to_vec();
        files.push(("etc/sercon-port", console));
        let cpus = u16::try_from(acpi.apic_ids.len()).unwrap_or(u16::MAX);
        let (memory, writes) = (Arc::clone(memory), writes.clone());
        Ok(Some(FwCfg::new(cpus, files, memory, writes)))
    }

    /// Fills the ROM of a machine that is new.
    pub(super) fn fill_rom(&self, memory: &Memory) -> Result<(), BootError> {
        match self {
            Self::Kernel(_) => Ok(()),
            Self::Firmware(firmware) => Ok(firmware.fill_rom(&memory.guest())?),
        }
    }

    /// Fills memory for a start of the machine. Where its first vCPU begins; nowhere else than any
    /// processor does without.
    pub(super) fn load(
        &self,
        memory: &Memory,
        acpi: &AcpiConfig,
    ) -> Result<Option<EntryPoint>, BootError> {
        match self {
            Self::Kernel(kernel) => Ok(Some(kernel.load(&memory.guest(), acpi)?)),
            Self::Firmware(firmware) => {
                firmware.load(&memory.guest())?;
                Ok(None)
            }
        }
    }
}
