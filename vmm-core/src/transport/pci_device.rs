//! A virtio device as a PCI function (virtio 1.3, 4.1).
//!
//! ```text
//! BAR 0  0x0000  common configuration      BAR 1  0x0000  MSI-X table
//!        0x1000  interrupt status                 0x1000  pending bits
//!        0x2000  device configuration
//!        0x3000  doorbells, 4 bytes a queue
//! ```
//!
//! One lock guards the registers. It is held while the device is activated or reset, so
//! a second vCPU waits for it; what device threads change is outside of it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use thiserror::Error;

use super::common::{CONFIG_SOURCE, Common, Life, StateError, queue_source};
use super::doorbells::{DoorbellArea, MULTIPLIER};
use super::notifier::Notifier;
use super::saved_state::VirtioPciState;
use super::{DeviceError, DeviceNotifier, TroubleSink, VirtioDevice};
use crate::bus::{Bus, BusDevice};
use crate::interrupt::{Doorbells, MsiRouter};
use crate::pci::{
    BarAllocator, BarError, BarIndex, BarMove, ConfigError, ENTRY_SIZE, Header, Identity, Msix,
    MsixError, PciFunction,
};

/// Queues that a device may have here.
pub const MAX_QUEUES: u16 = 128;

const VENDOR: u16 = 0x1af4;
const VIRTIO_BAR: BarIndex = BarIndex::Bar0;
const MSIX_BAR: BarIndex = BarIndex::Bar1;
const VIRTIO_BAR_SIZE: u32 = 0x4000;
const MSIX_BAR_SIZE: u32 = 0x2000;
const PENDING: u32 = 0x1000;
const _: () = assert!((MAX_QUEUES as u64 + 1) * ENTRY_SIZE <= PENDING as u64);

const COMMON: Range<u32> = 0x0000..0x0040;
const ISR: Range<u32> = 0x1000..0x1001;
/// What GET_CONFIG of any device can fill (4096 bytes less the transport's 256).
const DEVICE: Range<u32> = 0x2000..0x2f00;
const NOTIFY: u32 = 0x3000;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Kinds of capability (virtio 1.3, 4.1.4).
const CAP_VENDOR: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// Why there is no such PCI device, or it does not do what it shall.
#[derive(Debug, Error)]
pub enum TransportError {
    /// A number of queues that cannot be.
    #[error("device {device} has {queues} queues, 1 to {MAX_QUEUES} are possible")]
    Queues {
        /// Which device.
        device: String,
        /// How many it has.
        queues: u16,
    },
    /// A queue size that cannot be.
    #[error("device {device} has queues of {size} entries, a power of two up to 32768 is possible")]
    QueueSize {
        /// Which device.
        device: String,
        /// Its queue size.
        size: u16,
    },
    /// An eventfd could not be made.
    #[error("an eventfd for device {device} could not be made")]
    Event {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No address for a BAR.
    #[error(transparent)]
    Bar(#[from] BarError),
    /// Configuration space is full, or saved registers are of another device.
    #[error("configuration space of device {device}")]
    Config {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// Interrupts do not work, or their saved state is of another device.
    #[error("interrupts of device {device}")]
    Msix {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: MsixError,
    },
    /// Saved registers cannot be.
    #[error("saved state of device {device}")]
    State {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: StateError,
    },
    /// Asked to save or restore a device that runs.
    #[error("device {device} runs; it must be stopped first")]
    Running {
        /// Which device.
        device: String,
    },
    /// The device itself failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What a PCI device is wired to.
#[derive(Clone)]
pub struct Wiring {
    /// Gives BARs their first addresses.
    pub bars: Arc<BarAllocator>,
    /// Where decoded BARs are put.
    pub mmio: Arc<Bus>,
    /// Interrupts.
    pub router: Arc<dyn MsiRouter>,
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Whom to tell of failures.
    pub trouble: Arc<dyn TroubleSink>,
}

struct Registers {
    header: Header,
    msix: Msix,
    msix_control: u8,
    pci_access: u8,
    common: Common,
    doorbells: DoorbellArea,
}

/// A virtio device on the PCI bus.
pub struct VirtioPciDevice {
    name: String,
    device: Arc<dyn VirtioDevice>,
    notifier: Arc<Notifier>,
    mmio: Arc<Bus>,
    registers: Mutex<Registers>,
    this: Weak<Self>,
}

impl VirtioPciDevice {
    /// Puts registers before `device`. It decodes no BAR before the guest says so.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        wiring: &Wiring,
    ) -> Result<Arc<Self>, TransportError> {
        let name = device.name();
        let queues = device.queues();
        if queues == 0 || queues > MAX_QUEUES {
            let device = name;
            return Err(TransportError::Queues { device, queues });
        }
        let size = device.max_queue_size();
        if !size.is_power_of_two() {
            let device = name;
            return Err(TransportError::QueueSize { device, size });
        }
        let event_error = |source| TransportError::Event {
            device: name.clone(),
            source,
        };
        let msix_error = |source| TransportError::Msix {
            device: name.clone(),
            source,
        };
        let config_error = |source| TransportError::Config {
            device: name.clone(),
            source,
        };

        let sources = usize::from(queues) + 1;
        let msix =
            Msix::new(Arc::clone(&wiring.router), queues + 1, sources).map_err(msix_error)?;
        let kind = device.kind();
        let mut header = Header::new(&Identity {
            vendor: VENDOR,
            device: kind.pci_device(),
            revision: 1,
            class: kind.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: kind.pci_device(),
        });
        header.add_bar(VIRTIO_BAR, VIRTIO_BAR_SIZE, &wiring.bars)?;
        header.add_bar(MSIX_BAR, MSIX_BAR_SIZE, &wiring.bars)?;
        let msix_control = msix
            .add_capability(&mut header, MSIX_BAR, PENDING)
            .map_err(config_error)?
            + 2;
        let pci_access = add_capabilities(&mut header, queues).map_err(config_error)?;

        let event = msix.event(CONFIG_SOURCE).map_err(msix_error)?;
        let trouble = Arc::clone(&wiring.trouble);
        let notifier = Arc::new(Notifier::new(name.clone(), trouble, event));
        device.set_notifier(Arc::clone(&notifier) as Arc<dyn DeviceNotifier>);
        let common =
            Common::new(Arc::clone(&device), Arc::clone(&notifier)).map_err(event_error)?;
        let registers = Mutex::new(Registers {
            header,
            msix,
            msix_control,
            pci_access,
            common,
            doorbells: DoorbellArea::new(Arc::clone(&wiring.doorbells)),
        });
        Ok(Arc::new_cyclic(|this| Self {
            name,
            device,
            notifier,
            mmio: Arc::clone(&wiring.mmio),
            registers,
            this: this.clone(),
        }))
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stops the device's activated queues, drained. Fine when it is stopped, or idle.
    pub fn stop(&self) -> Result<(), TransportError> {
        Ok(self.registers().common.stop()?)
    }

    /// Goes on after [`Self::stop`] or [`Self::restore`]; every enabled queue is kicked
    /// and signalled once.
    pub fn resume(&self) -> Result<(), TransportError> {
        let registers = &mut *self.registers();
        Ok(registers.common.resume(&registers.msix)?)
    }

    /// Has the device go on, if it can be ordered to: then [`Self::resumed`] awaits it.
    pub fn order_resume(&self) -> Result<bool, TransportError> {
        let registers = &mut *self.registers();
        Ok(registers.common.order_resume(&registers.msix)?)
    }

    /// Waits until the device goes on that was ordered to. If it does not, it is stopped.
    pub fn resumed(&self, within: Duration) -> Result<(), TransportError> {
        let registers = &mut *self.registers();
        Ok(registers.common.resumed(&registers.msix, within)?)
    }

    /// Prepares the device to resume after [`Self::restore`], as far as it can be done ahead.
    pub fn wire_ahead(&self) -> Result<(), TransportError> {
        let registers = &*self.registers();
        Ok(registers.common.wire(&registers.msix)?)
    }

    /// As after power-on, with BARs back at their first addresses.
    pub fn reset(&self) -> Result<(), TransportError> {
        let registers = &mut *self.registers();
        registers.header.reset();
        let control = registers.msix_control;
        registers.header.config_mut().set(control + 1, &[0]);
        self.move_bars(registers);
        let result = registers.common.reset(&mut registers.msix);
        self.notifier.set_generation(0);
        result
            .and_then(|()| registers.msix.reset())
            .map_err(|source| self.msix_error(source))
    }

    /// The registers, of a device that is stopped or idle.
    pub fn save(&self) -> Result<VirtioPciState, TransportError> {
        let registers = &*self.registers();
        if registers.common.life() == Life::Running {
            return Err(self.running());
        }
        self.read_registers(registers)
    }

    /// The registers as they are now, of a device that may run: how another one can be wired
    /// ahead. Ring positions and pending interrupts are not those that it stops with.
    pub fn wiring(&self) -> Result<VirtioPciState, TransportError> {
        let mut state = self.read_registers(&self.registers())?;
        state.msix.pending.fill(false);
        Ok(state)
    }

    fn read_registers(&self, registers: &Registers) -> Result<VirtioPciState, TransportError> {
        let msix = registers.msix.save().map_err(|e| self.msix_error(e))?;
        Ok(VirtioPciState {
            registers: registers.header.config().save(),
            msix,
            transport: registers.common.save(&registers.msix),
        })
    }

    /// Takes saved registers over and wires BARs, doorbells and interrupts as they say; what
    /// an earlier call has wired in the same way is left alone.
    /// The device runs after [`Self::resume`]. On an error nothing runs; reset it.
    pub fn restore(&self, state: &VirtioPciState) -> Result<(), TransportError> {
        let registers = &mut *self.registers();
        if registers.common.life() == Life::Running {
            return Err(self.running());
        }
        registers
            .common
            .check(&state.transport)
            .map_err(|source| TransportError::State {
                device: self.name.clone(),
                source,
            })?;
        registers
            .header
            .config_mut()
            .restore(&state.registers)
            .map_err(|source| TransportError::Config {
                device: self.name.clone(),
                source,
            })?;
        let queue_vectors = state.transport.queues.iter().map(|q| q.vector);
        let vectors: Vec<_> = std::iter::once(state.transport.config_vector)
            .chain(queue_vectors)
            .collect();
        let control = registers.header.config().u16(registers.msix_control);
        registers
            .msix
            .restore(&state.msix, control, &vectors)
            .map_err(|e| self.msix_error(e))?;
        registers.common.restore(&state.transport);
        self.move_bars(registers);
        Ok(())
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn msix_error(&self, source: MsixError) -> TransportError {
        TransportError::Msix {
            device: self.name.clone(),
            source,
        }
    }

    fn running(&self) -> TransportError {
        TransportError::Running {
            device: self.name.clone(),
        }
    }

    /// Puts BARs where the header wants them. Where another device answers, the BAR is
    /// not decoded, and tried again at the next write.
    fn move_bars(&self, registers: &mut Registers) {
        for BarMove {
            bar,
            size,
            from,
            to,
        } in registers.header.moves()
        {
            if from.is_some() && bar == VIRTIO_BAR {
                registers.doorbells.place(None, &[]);
            }
            if let Some(base) = from {
                self.mmio.remove(base);
            }
            let decoded = to.filter(|&base| {
                let window = Arc::new(Window {
                    device: self.this.clone(),
                    bar,
                });
                self.mmio.insert(base, size, window).is_ok()
            });
            registers.header.settle(bar, decoded);
            if let Some(base) = decoded
                && bar == VIRTIO_BAR
            {
                let queues = &registers.common.queues;
                registers
                    .doorbells
                    .place(Some(base + u64::from(NOTIFY)), queues);
            }
        }
    }

    /// An interrupt that cannot be set up is trouble, not a wrong access of the guest.
    fn note(&self, result: Result<(), MsixError>) {
        if let Err(source) = result {
            self.notifier.trouble(&self.msix_error(source));
        }
    }

    fn read_bar(&self, registers: &mut Registers, bar: BarIndex, offset: u32, data: &mut [u8]) {
        data.fill(0);
        if bar == MSIX_BAR {
            match offset.checked_sub(PENDING) {
                None => registers.msix.read_table(offset.into(), data),
                Some(at) => self.note(registers.msix.read_pending(at.into(), data)),
            }
        } else if COMMON.contains(&offset) {
            registers.common.read(offset.into(), data, &registers.msix);
        } else if ISR.contains(&offset) {
            if let Some(byte) = data.first_mut() {
                *byte = self.take_isr(registers);
            }
        } else if DEVICE.contains(&offset) {
            self.device.read_config(offset - DEVICE.start, data);
        }
    }

    fn write_bar(&self, registers: &mut Registers, bar: BarIndex, offset: u32, data: &[u8]) {
        if bar == MSIX_BAR {
            if offset < PENDING {
                self.note(registers.msix.write_table(offset.into(), data));
            }
        } else if COMMON.contains(&offset) {
            self.note(
                registers
                    .common
                    .write(offset.into(), data, &mut registers.msix),
            );
        } else if DEVICE.contains(&offset) {
            let at = offset - DEVICE.start;
            if let Err(error) = self.device.write_config(at, data) {
                self.notifier.trouble(&error);
            }
        } else if let Some(at) = offset.checked_sub(NOTIFY) {
            let queue = (at / MULTIPLIER) as usize;
            if let Some(queue) = registers.common.queues.get(queue) {
                // Fails only at 2^64 unheard rings, which one more would not change.
                let _ = queue.kick.write(1);
            }
        }
    }

    /// Interrupt status, which reading clears. What MSI-X tells is not told here.
    fn take_isr(&self, registers: &mut Registers) -> u8 {
        let msix = &mut registers.msix;
        let queues = 0..registers.common.queues.len();
        let mut isr = 0;
        for queue in queues {
            if msix.take_unrouted(queue_source(queue)) {
                isr |= ISR_QUEUE;
            }
        }
        let signalled = msix.take_unrouted(CONFIG_SOURCE);
        if self.notifier.take_config_changed() || signalled {
            isr |= ISR_CONFIG;
        }
        isr
    }

    /// Where the window of the PCI configuration access capability (virtio 1.3, 4.1.4.9)
    /// leads, if it does and the access touches its data.
    fn pci_access(
        registers: &Registers,
        offset: u16,
        len: usize,
    ) -> Option<(BarIndex, u32, usize)> {
        let at = registers.pci_access;
        let data = u16::from(at) + 16;
        if offset >= data + 4 || usize::from(offset) + len <= usize::from(data) {
            return None;
        }
        let config = registers.header.config();
        let bar = match config.u32(at + 4) & 0xff {
            0 => VIRTIO_BAR,
            1 => MSIX_BAR,
            _ => return None,
        };
        let (target, length) = (config.u32(at + 8), config.u32(at + 12));
        let size = if bar == VIRTIO_BAR {
            VIRTIO_BAR_SIZE
        } else {
            MSIX_BAR_SIZE
        };
        let inside = target.checked_add(length).is_some_and(|end| end <= size);
        (matches!(length, 1 | 2 | 4) && target.is_multiple_of(length) && inside).then_some((
            bar,
            target,
            length as usize,
        ))
    }
}

impl PciFunction for VirtioPciDevice {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let registers = &mut *self.registers();
        if let Some((bar, target, len)) = Self::pci_access(registers, offset, data.len()) {
            let mut value = [0; 4];
            self.read_bar(registers, bar, target, &mut value[..len]);
            let at = registers.pci_access + 16;
            registers.header.config_mut().set(at, &value);
        }
        registers.header.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let registers = &mut *self.registers();
        registers.header.config_mut().write(offset, data);
        if let Some((bar, target, len)) = Self::pci_access(registers, offset, data.len()) {
            let value = registers.header.config().u32(registers.pci_access + 16);
            self.write_bar(registers, bar, target, &value.to_le_bytes()[..len]);
        }
        let control = registers.header.config().u16(registers.msix_control);
        self.note(registers.msix.set_control(control));
        self.move_bars(registers);
    }
}

impl Drop for VirtioPciDevice {
    fn drop(&mut self) {
        let registers = self
            .registers
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for bar in [VIRTIO_BAR, MSIX_BAR] {
            if let Some(base) = registers.header.decoded(bar) {
                self.mmio.remove(base);
            }
        }
    }
}

/// A decoded BAR on the bus.
struct Window {
    device: Weak<VirtioPciDevice>,
    bar: BarIndex,
}

impl Window {
    /// Lets the device answer at `offset`; whether it is there.
    fn access(
        &self,
        offset: u64,
        access: impl FnOnce(&VirtioPciDevice, &mut Registers, u32),
    ) -> bool {
        // BARs are far smaller than 4 GiB.
        let (Some(device), Ok(offset)) = (self.device.upgrade(), u32::try_from(offset)) else {
            return false;
        };
        access(&device, &mut device.registers(), offset);
        true
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let answered = self.access(offset, |device, registers, offset| {
            device.read_bar(registers, self.bar, offset, data);
        });
        if !answered {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(offset, |device, registers, offset| {
            device.write_bar(registers, self.bar, offset, data);
        });
    }
}

/// Says where each structure is; returns where the configuration access capability is.
fn add_capabilities(header: &mut Header, queues: u16) -> Result<u8, ConfigError> {
    let doorbells = u32::from(queues) * MULTIPLIER;
    let parts = [
        (CAP_COMMON, COMMON, None),
        (CAP_NOTIFY, NOTIFY..NOTIFY + doorbells, Some(MULTIPLIER)),
        (CAP_ISR, ISR, None),
        (CAP_DEVICE, DEVICE, None),
    ];
    for (kind, range, extra) in parts {
        let body = capability(kind, &range, extra);
        header.add_capability(CAP_VENDOR, &body, &[])?;
    }
    let body = capability(CAP_PCI, &(0..0), Some(0));
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    header.add_capability(CAP_VENDOR, &body, &writable)
}

/// `struct virtio_pci_cap` behind its first two bytes, with one more dword for some.
fn capability(kind: u8, range: &Range<u32>, extra: Option<u32>) -> Vec<u8> {
    let length = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![length, kind, VIRTIO_BAR as u8, 0, 0, 0];
    body.extend(range.start.to_le_bytes());
    body.extend((range.end - range.start).to_le_bytes());
    body.extend(extra.into_iter().flat_map(u32::to_le_bytes));
    body
}

#[cfg(test)]
mod tests;
