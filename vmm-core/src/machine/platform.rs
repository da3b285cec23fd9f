//! What every machine has besides PCI, on its ports.

use std::io;
use std::sync::Arc;

use super::error::MachineError;
use super::request::RequestSink;
use crate::bus::Bus;
use crate::hypervisor::Interrupts;
use crate::layout::{
    ACPI_PM_PORT, FW_CFG_PORT, I8042_PORT, RTC_PORT, SCI_IRQ, SERIAL_IRQ, SERIAL_PORT,
};
use crate::platform::{Cmos, FwCfg, I8042, OutputBuffer, PowerManagement, RamSize, SerialPort};

/// Bytes of serial output that wait for a slow reader before the oldest are dropped.
const SERIAL_BUFFER: usize = 1 << 20;

/// The platform's devices.
pub(super) struct Platform {
    /// First serial port.
    pub(super) serial: Arc<SerialPort>,
    /// What it has sent.
    pub(super) output: Arc<OutputBuffer>,
    /// Power button and soft-off.
    pub(super) power: Arc<PowerManagement>,
    /// Real-time clock.
    pub(super) cmos: Arc<Cmos>,
    /// What a firmware asks, if there is one.
    pub(super) fw_cfg: Option<Arc<FwCfg>>,
}

impl Platform {
    /// Puts the devices of a machine with `ram` bytes of RAM on `ports`.
    pub(super) fn new(
        ports: &Bus,
        interrupts: &Interrupts,
        requests: &Arc<dyn RequestSink>,
        ram: u64,
        fw_cfg: Option<FwCfg>,
    ) -> Result<Self, MachineError> {
        let no_serial = |source: io::Error| MachineError::Serial {
            to: "the guest".into(),
            source,
        };
        let output = OutputBuffer::new(SERIAL_BUFFER);
        let serial =
            SerialPort::new(interrupts.line(SERIAL_IRQ), Arc::clone(&output)).map_err(no_serial)?;
        let serial = Arc::new(serial);
        let power = Arc::new(PowerManagement::new(
            interrupts.line(SCI_IRQ),
            Arc::clone(requests),
        ));
        let cmos = Arc::new(Cmos::new(RamSize::of(ram)));
        let i8042 = Arc::new(I8042::new(Arc::clone(requests)));
        for (range, device) in [
            (
                SERIAL_PORT,
                Arc::clone(&serial) as Arc<dyn crate::bus::BusDevice>,
            ),
            (ACPI_PM_PORT, Arc::clone(&power) as _),
            (RTC_PORT, Arc::clone(&cmos) as _),
            (I8042_PORT, i8042),
        ] {
            ports.insert(range.start, range.end - range.start, device)?;
        }
        let fw_cfg = fw_cfg.map(Arc::new);
        if let Some(device) = &fw_cfg {
            let size = FW_CFG_PORT.end - FW_CFG_PORT.start;
            ports.insert(FW_CFG_PORT.start, size, Arc::clone(device) as _)?;
        }
        Ok(Self {
            serial,
            output,
            power,
            cmos,
            fw_cfg,
        })
    }

    /// As after power-on.
    pub(super) fn reset(&self) {
        self.serial.reset();
        self.power.reset();
        self.cmos.reset();
        if let Some(device) = &self.fw_cfg {
            device.reset();
        }
    }
}
