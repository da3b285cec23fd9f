//! The device as a PCI function.
//!
//! Configuration space is the device's own, but for what says where it is and how it interrupts:
//! command, BARs, MSI-X or MSI. An access to a BAR goes to its process, but for MSI-X's table and
//! pending bits, which are here, and for areas, which the guest has mapped.
//!
//! Order: when the guest turns memory decoding off, areas are unmapped before the device hears of it,
//! and when it turns it on, after.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_user::pci::CONFIG_REGION;
use vfio_user::{Client, IrqAction, IrqData};

use super::areas::Areas;
use super::description::{Description, Shape};
use super::interrupts::MsixPart;
use super::process::{Process, is_lost};
use super::{VfioUserError, open};
use crate::bus::{Bus, BusDevice};
use crate::machine::chain;
use crate::memory::Memory;
use crate::pci::{BarIndex, BarMove, CONFIG_SIZE, Header, Msix, MsixError, PciFunction};
use crate::remote::endpoint::adopt;
use crate::transport::{TroubleSink, Wiring};

const COMMAND: u8 = 0x04;
const BARS: Range<u16> = 0x10..0x28;
const ROM: Range<u16> = 0x30..0x34;
/// What the header has, whatever the device has there: command; header type; BARs; ROM; interrupt
/// line and pin.
const OURS: [Range<u16>; 5] = [0x04..0x06, 0x0e..0x0f, BARS, ROM, 0x3c..0x3e];

/// What a capability is that is not shown (PCI Code and ID Assignment 1.11, 2).
const CAPABILITY_NULL: u8 = 0;

struct Registers {
    header: Header,
    msix: Msix,
    areas: Areas,
}

/// A device of another process on the PCI bus.
pub(super) struct Function {
    process: Arc<Process>,
    shape: Shape,
    registers: Mutex<Registers>,
    mmio: Arc<Bus>,
    trouble: Arc<dyn TroubleSink>,
    /// For the monitor.
    wake: EventFd,
    ended: AtomicBool,
    this: Weak<Self>,
}

impl Function {
    /// Puts registers before a device. It decodes no BAR before the guest says so.
    pub(super) fn new(
        process: Arc<Process>,
        description: Description,
        wiring: &Wiring,
        memory: &Arc<Memory>,
    ) -> Result<Arc<Self>, VfioUserError> {
        let Description {
            shape,
            registers,
            files,
        } = description;
        let device = process.id().to_owned();
        let msix = Msix::one_to_one(Arc::clone(&wiring.router), shape.interrupts.vectors);
        let msix = msix.map_err(|source| VfioUserError::Msix {
            device: device.clone(),
            source,
        })?;
        let mut header = Header::showing(&registers);
        for bar in &shape.bars {
            header
                .add_bar(bar.index, bar.size, &wiring.bars)
                .map_err(|source| VfioUserError::Bar {
                    device: device.clone(),
                    source,
                })?;
        }
        let config = header.config_mut();
        shape.interrupts.begin(config);
        for &capability in &shape.interrupts.hidden {
            config.set(capability, &[CAPABILITY_NULL]);
        }
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wake = wake.map_err(|errno| VfioUserError::System {
            device,
            what: "make an eventfd",
            source: errno.into(),
        })?;
        Ok(Arc::new_cyclic(|this| Self {
            process,
            shape,
            registers: Mutex::new(Registers {
                header,
                msix,
                areas: Areas::new(memory, files),
            }),
            mmio: Arc::clone(&wiring.mmio),
            trouble: Arc::clone(&wiring.trouble),
            wake,
            ended: AtomicBool::new(false),
            this: this.clone(),
        }))
    }

    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Nobody is to be watched any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake_monitor();
    }

    fn wake_monitor(&self) {
        // Fails only when it is full of wakes.
        let _ = self.wake.write(1);
    }

    /// The process is gone, and with it everything that was mapped from its files.
    pub(super) fn lose(&self, client: &Arc<Client>) {
        let Some(error) = self.process.lose(client) else {
            return;
        };
        let registers = &mut *self.registers();
        self.unmap(registers, |_| true);
        registers.areas.drop_files();
        self.report(&error);
    }

    /// Puts a process into the place of the one that there was. Its device is as new; the guest finds
    /// it where it was, and reset.
    pub(super) fn attach(&self, socket: OwnedFd) -> Result<(), VfioUserError> {
        let stream = adopt(self.process.id(), socket)?;
        let (client, description) = open(self.process.config(), stream)?;
        if description.shape != self.shape {
            let device = self.process.id().into();
            return Err(VfioUserError::Another { device });
        }
        if let Some(client) = self.process.client() {
            client.close();
            self.lose(&client);
        }
        let registers = &mut *self.registers();
        self.process
            .replace(client)
            .map_err(self.failed("reach the machine's memory"))?;
        registers.areas.replace_files(description.files);
        let command = registers.header.config().u16(COMMAND);
        self.write_process(CONFIG_REGION, COMMAND.into(), &command.to_le_bytes());
        if registers.msix.is_enabled() {
            self.set_irqs(registers);
        }
        self.map(registers, |_| true);
        self.wake_monitor();
        Ok(())
    }

    /// As after power-on, with BARs back at their first addresses.
    pub(super) fn reset(&self) {
        let registers = &mut *self.registers();
        registers.header.reset();
        self.shape.interrupts.begin(registers.header.config_mut());
        let moves = registers.header.moves();
        self.take_down(registers, &moves);
        // No access to memory is under way when the device is reset.
        self.write_process(CONFIG_REGION, COMMAND.into(), &[0, 0]);
        self.follow_interrupts(registers);
        self.note(registers.msix.reset());
        if self.shape.resets
            && let Err(source) = self.process.ask(Client::reset)
            && !is_lost(&source)
        {
            self.report(&self.failed("reset it")(source));
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(vfio_user::Error) -> VfioUserError {
        let device = self.process.id().into();
        move |source| VfioUserError::Process {
            device,
            what,
            source,
        }
    }

    fn report(&self, error: &VfioUserError) {
        self.trouble.trouble(self.process.id(), error);
    }

    /// An interrupt that cannot be set up is trouble, not a wrong access of the guest.
    fn note(&self, result: Result<(), MsixError>) {
        if let Err(source) = result {
            let device = self.process.id().into();
            self.report(&VfioUserError::Msix { device, source });
        }
    }

    /// Fills `data` from a region, with ones where nobody answers.
    fn read_process(&self, region: u32, offset: u64, data: &mut [u8]) {
        let read = |client: &Client| client.region_read(region, offset, data);
        if let Err(error) = self.process.ask(read) {
            tracing::debug!(%error, region, offset, "a read is not answered");
            data.fill(0xff);
        }
    }

    /// Writes to a region, if anybody is there.
    fn write_process(&self, region: u32, offset: u64, data: &[u8]) {
        let write = |client: &Client| client.region_write(region, offset, data);
        if let Err(error) = self.process.ask(write) {
            tracing::debug!(%error, region, offset, "a write is lost");
        }
    }

    /// Whether configuration space has this byte from the header.
    fn is_ours(&self, offset: u16) -> bool {
        let interrupts = &self.shape.interrupts;
        OURS.iter().any(|range| range.contains(&offset))
            || interrupts.registers().contains(&offset)
            || interrupts.hidden.iter().any(|at| u16::from(*at) == offset)
    }

    /// Has the device signal what the guest wants it to.
    fn follow_interrupts(&self, registers: &mut Registers) {
        let Registers { header, msix, .. } = registers;
        let was_enabled = msix.is_enabled();
        self.note(self.shape.interrupts.follow(header.config(), msix));
        if msix.is_enabled() != was_enabled {
            self.set_irqs(registers);
        }
    }

    fn set_irqs(&self, registers: &Registers) {
        let (interrupts, msix) = (&self.shape.interrupts, &registers.msix);
        let used = usize::from(interrupts.used(registers.header.config()));
        let action = match msix.is_enabled() {
            true => {
                let events = msix.events().take(used).map(Some);
                IrqAction::Trigger(IrqData::Eventfds(events.collect()))
            }
            false => IrqAction::Disable,
        };
        let set = |client: &Client| client.set_irqs(interrupts.index(), 0, &action);
        if let Err(source) = self.process.ask(set)
            && !is_lost(&source)
        {
            self.report(&self.failed("set its interrupts up")(source));
        }
    }

    /// Takes BARs from where they were.
    fn take_down(&self, registers: &mut Registers, moves: &[BarMove]) {
        self.unmap(registers, |bar| moves.iter().any(|m| m.bar == bar));
        for change in moves {
            if let Some(base) = change.from {
                self.mmio.remove(base);
            }
            registers.header.settle(change.bar, None);
        }
    }

    /// Puts BARs where they are to be. Where another device answers, the BAR is not decoded, and tried
    /// again at the next write.
    fn put_up(&self, registers: &mut Registers, moves: &[BarMove]) {
        for change in moves {
            let decoded = change.to.filter(|&base| {
                let window = Arc::new(Window {
                    function: self.this.clone(),
                    bar: change.bar,
                });
                self.mmio.insert(base, change.size, window).is_ok()
            });
            registers.header.settle(change.bar, decoded);
        }
        self.map(registers, |bar| moves.iter().any(|m| m.bar == bar));
    }

    /// Lets the guest use what can be mapped of decoded BARs; otherwise accesses take the slow way.
    fn map(&self, registers: &mut Registers, which: impl Fn(BarIndex) -> bool) {
        let Registers { header, areas, .. } = registers;
        if let Err(error) = areas.map(&self.shape.bars, header, which) {
            let (device, error) = (self.process.id(), chain(&error));
            tracing::warn!(device, error, "its memory takes the slow way");
        }
    }

    fn unmap(&self, registers: &mut Registers, which: impl Fn(BarIndex) -> bool) {
        if let Err(error) = registers.areas.unmap(which) {
            let (device, error) = (self.process.id(), chain(&error));
            tracing::error!(device, error, "its memory cannot be taken from the guest");
        }
    }

    fn read_bar(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        match self.shape.interrupts.part(bar, offset) {
            Some(MsixPart::Table(at)) => self.registers().msix.read_table(at, data),
            Some(MsixPart::Pending(at)) => {
                let result = self.registers().msix.read_pending(at, data);
                self.note(result);
            }
            None => self.read_process(bar as u32, offset, data),
        }
    }

    fn write_bar(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        match self.shape.interrupts.part(bar, offset) {
            Some(MsixPart::Table(at)) => {
                let result = self.registers().msix.write_table(at, data);
                self.note(result);
            }
            Some(MsixPart::Pending(_)) => {}
            None => self.write_process(bar as u32, offset, data),
        }
    }
}

impl PciFunction for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        // There are no extended registers.
        if usize::from(offset) + data.len() > CONFIG_SIZE {
            data.fill(0xff);
            return;
        }
        self.read_process(CONFIG_REGION, offset.into(), data);
        if self.process.client().is_none() {
            return;
        }
        let registers = &*self.registers();
        for (at, byte) in (offset..).zip(data) {
            if self.is_ours(at) {
                registers
                    .header
                    .config()
                    .read(at, std::slice::from_mut(byte));
            }
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let touched = usize::from(offset)..usize::from(offset) + data.len();
        if touched.end > CONFIG_SIZE {
            return;
        }
        let registers = &mut *self.registers();
        registers.header.config_mut().write(offset, data);
        let moves = registers.header.moves();
        self.take_down(registers, &moves);
        let touches = |range: &Range<u16>| {
            touched.start < range.end.into() && usize::from(range.start) < touched.end
        };
        // What the guest may not write, the device knows.
        if !touches(&BARS) && !touches(&ROM) {
            self.write_process(CONFIG_REGION, offset.into(), data);
        }
        self.put_up(registers, &moves);
        self.follow_interrupts(registers);
    }
}

/// A decoded BAR on the bus.
struct Window {
    function: Weak<Function>,
    bar: BarIndex,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.function.upgrade() {
            Some(function) => function.read_bar(self.bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.function.upgrade() {
            function.write_bar(self.bar, offset, data);
        }
    }
}
