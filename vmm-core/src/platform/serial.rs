//! The first serial port: a 16550A, with its two ends outside of the guest.
//!
//! ```text
//! guest ⇄ SerialPort ─→ OutputBuffer ─→ a thread that writes to a descriptor
//!              ↑
//!         SerialInput ←─ a thread that reads from a descriptor
//! ```
//!
//! A vCPU never waits for either thread. Output goes to a bounded buffer; when nobody
//! takes it and it is full, the oldest bytes are dropped, because what a guest said last
//! is what one wants to read, and they are counted. Input is taken as far as the
//! receiver's FIFO has room; the reading thread keeps the rest, and waits for
//! [`SerialInput::room`].

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::interrupt::{InterruptError, IrqLine};

use super::saved_state::{InvalidState, SerialSavedState};

/// Modem control register.
const MODEM_CONTROL: u64 = 4;
/// Bits of the interrupt enable register.
const INTERRUPT_ENABLE_BITS: u8 = 0x0f;
/// No interrupt, or transmitter empty, data received, and both.
const INTERRUPT_IDENTIFICATIONS: [u8; 4] = [1, 2, 4, 6];
const LINE_STATUS_DATA_READY: u8 = 1;
/// What the receiver holds.
const FIFO: usize = 64;

/// What became of a wait for output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// So many bytes, at least 1.
    Bytes(usize),
    /// None came in time.
    TimedOut,
    /// The buffer is empty and closed.
    Closed,
}

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    dropped: u64,
    closed: bool,
}

/// What the guest has written and nobody has taken yet.
pub struct OutputBuffer {
    output: Mutex<Output>,
    arrived: Condvar,
    capacity: usize,
}

impl OutputBuffer {
    /// A buffer for `capacity` bytes, which are allocated as they are needed.
    #[must_use]
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self {
            output: Mutex::default(),
            arrived: Condvar::new(),
            capacity: capacity.max(1),
        })
    }

    /// Moves up to `max` bytes to the end of `into`, waiting for the first of them.
    pub fn take(&self, into: &mut Vec<u8>, max: usize, timeout: Duration) -> Taken {
        let (mut output, _) = self
            .arrived
            .wait_timeout_while(self.lock(), timeout, |o| o.bytes.is_empty() && !o.closed)
            .unwrap_or_else(PoisonError::into_inner);
        let count = output.bytes.len().min(max);
        into.extend(output.bytes.drain(..count));
        match count {
            0 if output.closed => Taken::Closed,
            0 => Taken::TimedOut,
            n => Taken::Bytes(n),
        }
    }

    /// Says that no more will come, once the machine has ended.
    pub fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    /// Bytes that were lost because nobody took them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn push(&self, bytes: &[u8]) {
        let mut output = self.lock();
        let was_empty = output.bytes.is_empty();
        for &byte in bytes {
            if output.bytes.len() == self.capacity {
                output.bytes.pop_front();
                output.dropped += 1;
            }
            output.bytes.push_back(byte);
        }
        drop(output);
        if was_empty {
            self.arrived.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The transmitter's end of the buffer.
struct Transmitter(Arc<OutputBuffer>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt output, an edge for each new reason.
struct Interrupt(Arc<dyn IrqLine>);

impl Trigger for Interrupt {
    type E = InterruptError;

    fn trigger(&self) -> Result<(), InterruptError> {
        self.0.pulse()
    }
}

/// Tells the reading thread that the receiver is empty.
struct Room(Arc<EventFd>);

impl Room {
    fn signal(&self) {
        // It fails only when it has been signalled 2^64 times without a wait.
        let _ = self.0.write(1);
    }
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.signal();
    }
}

type Uart = Serial<Interrupt, Room, Transmitter>;

/// A 16550A.
pub struct SerialPort {
    uart: Mutex<Uart>,
    irq: Arc<dyn IrqLine>,
    output: Arc<OutputBuffer>,
    room: Arc<EventFd>,
    /// An interrupt that failed was reported: the guest could fill the log otherwise.
    reported: AtomicBool,
}

impl SerialPort {
    /// A port that interrupts by `irq` and sends to `output`.
    ///
    /// # Errors
    /// There is no descriptor left for the event of [`SerialInput::room`].
    pub fn new(irq: Arc<dyn IrqLine>, output: Arc<OutputBuffer>) -> io::Result<Self> {
        let room = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
        )?);
        let uart = Serial::with_events(
            Interrupt(Arc::clone(&irq)),
            Room(Arc::clone(&room)),
            Transmitter(Arc::clone(&output)),
        );
        Ok(Self {
            uart: Mutex::new(uart),
            irq,
            output,
            room,
            reported: AtomicBool::new(false),
        })
    }

    /// The receiver's end outside of the guest.
    #[must_use]
    pub fn input(self: &Arc<Self>) -> SerialInput {
        SerialInput(Arc::clone(self))
    }

    /// Returns to the state after power-on; what was received is lost, what was sent not.
    pub fn reset(&self) {
        self.replace(&SerialState::default());
    }

    /// What it was doing. Output that nobody has taken yet stays with this process.
    #[must_use]
    pub fn save(&self) -> SerialSavedState {
        let state = self.lock().state();
        SerialSavedState {
            divisor: u16::from_le_bytes([state.baud_divisor_low, state.baud_divisor_high]),
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            modem_control: state.modem_control,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Goes on from saved state. A pending interrupt comes again.
    ///
    /// # Errors
    /// More was received than the receiver holds, or a register has bits that it
    /// cannot have.
    pub fn restore(&self, saved: &SerialSavedState) -> Result<(), InvalidState> {
        let invalid = |field, value: u64, rule| {
            Err(InvalidState {
                device: "serial port",
                field,
                value,
                rule,
            })
        };
        if saved.received.len() > FIFO {
            let len = saved.received.len() as u64;
            return invalid("received", len, "more bytes than the 64 that fit");
        }
        if saved.interrupt_enable & !INTERRUPT_ENABLE_BITS != 0 {
            let value = saved.interrupt_enable.into();
            return invalid("interrupt_enable", value, "which has reserved bits");
        }
        if !INTERRUPT_IDENTIFICATIONS.contains(&saved.interrupt_identification) {
            let value = saved.interrupt_identification.into();
            return invalid("interrupt_identification", value, "not 1, 2, 4 or 6");
        }
        let [baud_divisor_low, baud_divisor_high] = saved.divisor.to_le_bytes();
        let idle = SerialState::default();
        let ready = if saved.received.is_empty() {
            0
        } else {
            LINE_STATUS_DATA_READY
        };
        self.replace(&SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: idle.line_status | ready,
            modem_control: saved.modem_control,
            modem_status: idle.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received.clone(),
        });
        Ok(())
    }

    /// Puts another UART in place, which interrupts if its state says so.
    fn replace(&self, state: &SerialState) {
        let mut uart = self.lock();
        let made = Serial::from_state(
            state,
            Interrupt(Arc::clone(&self.irq)),
            Room(Arc::clone(&self.room)),
            Transmitter(Arc::clone(&self.output)),
        );
        match made {
            Ok(made) => *uart = made,
            Err(error) => self.report(&error),
        }
        uart.events().signal();
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, error: &vm_superio::serial::Error<InterruptError>) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the serial port could not interrupt");
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = u8::try_from(at).map_or(0xff, |at| uart.read(at));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.lock();
        for (at, &byte) in (offset..).zip(data) {
            let Ok(register) = u8::try_from(at) else {
                return;
            };
            if let Err(error) = uart.write(register, byte) {
                self.report(&error);
            }
            if at == MODEM_CONTROL {
                // It may have left the loop, in which nothing is received from outside.
                uart.events().signal();
            }
        }
    }
}

/// Where bytes go in, from outside of the guest.
#[derive(Clone)]
pub struct SerialInput(Arc<SerialPort>);

impl SerialInput {
    /// Passes bytes to the guest; how many of them, from the first on, had room.
    pub fn push(&self, bytes: &[u8]) -> usize {
        use vm_superio::serial::Error;
        let mut uart = self.0.lock();
        let before = uart.fifo_capacity();
        match uart.enqueue_raw_bytes(bytes) {
            Ok(_) | Err(Error::FullFifo) => {}
            Err(error) => self.0.report(&error),
        }
        before - uart.fifo_capacity()
    }

    /// Readable when [`Self::push`] may take bytes again; to be read before it is tried.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.0.room
    }
}

#[cfg(test)]
mod tests;
