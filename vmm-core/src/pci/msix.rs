//! MSI-X (PCI local bus 3.0, 6.8.2): vectors of a function, and what fires them.
//!
//! A *source* is something of the device that interrupts: a virtqueue, a configuration
//! change. It has an eventfd for life, which the device's process signals; the guest
//! points it to a *vector*, and several sources may share one.
//!
//! ```text
//!                       enabled, not masked, vector set
//!   counting (detached) ───────────────────────────────▶ live (attached to the route)
//!                       ◀───────────────────────────────
//!                          mask, disable, other vector
//! ```
//!
//! While a source is detached its eventfd counts: that count is the pending bit, and
//! attaching it again fires, so nothing is lost. Order in [`Msix::sync`]: detach, then
//! all routes in one call, then attach; a source never fires through a stale route.
#![expect(unsafe_code, reason = "an EventFd can be borrowed only by its number")]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::saved_state::{MsixEntryState, MsixState};
use super::{BarIndex, ConfigError, ConfigSpace, Header};
use crate::interrupt::{Gsi, InterruptError, MsiMessage, MsiRouter};

/// Vectors that a function may have.
pub const MAX_VECTORS: u16 = 2048;
/// The vector number that means none (virtio 1.3, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

const CAPABILITY: u8 = 0x11;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;
/// Bytes of the table for one vector.
pub const ENTRY_SIZE: u64 = 16;

/// Which source of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceIndex(pub usize);

/// Why MSI-X does not work.
#[derive(Debug, Error)]
pub enum MsixError {
    /// A number of vectors that the table does not have.
    #[error("{wanted} interrupt vectors wanted, 1 to {MAX_VECTORS} are possible")]
    Vectors {
        /// Vectors asked for.
        wanted: usize,
    },
    /// An eventfd could not be made or used.
    #[error("the eventfd of an interrupt vector failed")]
    Event(#[source] io::Error),
    /// The hypervisor refused.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// The saved state is of another device.
    #[error("saved MSI-X state has {found} {what}, this device has {expected}")]
    Shape {
        /// What was counted.
        what: &'static str,
        /// How many were saved.
        found: usize,
        /// How many there are here.
        expected: usize,
    },
}

struct Vector {
    gsi: Gsi,
    message: MsiMessage,
    masked: bool,
    routed: Option<MsiMessage>,
}

struct Source {
    event: Arc<EventFd>,
    vector: u16,
    /// The vector that reset brings back.
    initial: u16,
    attached: Option<Gsi>,
}

impl Source {
    /// Whether something was signalled while nobody was attached.
    fn is_pending(&self) -> Result<bool, MsixError> {
        if self.attached.is_some() {
            return Ok(false);
        }
        match self.event.read() {
            Ok(count) => {
                self.event.write(count).map_err(MsixError::Event)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(MsixError::Event(error)),
        }
    }
}

/// The vectors of one function.
pub struct Msix {
    router: Arc<dyn MsiRouter>,
    /// How many vectors.
    count: u16,
    vectors: Vec<Vector>,
    sources: Vec<Source>,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// `vectors` vectors for `sources` sources, which the guest points to them; routes are taken
    /// from `router`.
    pub fn new(
        router: Arc<dyn MsiRouter>,
        vectors: u16,
        sources: usize,
    ) -> Result<Self, MsixError> {
        Self::with_sources(router, vectors, std::iter::repeat_n(NO_VECTOR, sources))
    }

    /// `vectors` vectors, each with a source of its own that is always there.
    pub fn one_to_one(router: Arc<dyn MsiRouter>, vectors: u16) -> Result<Self, MsixError> {
        Self::with_sources(router, vectors, 0..vectors)
    }

    fn with_sources(
        router: Arc<dyn MsiRouter>,
        vectors: u16,
        sources: impl Iterator<Item = u16>,
    ) -> Result<Self, MsixError> {
        if vectors == 0 || vectors > MAX_VECTORS {
            let wanted = vectors.into();
            return Err(MsixError::Vectors { wanted });
        }
        let sources = sources
            .map(|initial| {
                Ok(Source {
                    event: Arc::new(EventFd::new(EFD_NONBLOCK).map_err(MsixError::Event)?),
                    vector: initial,
                    initial,
                    attached: None,
                })
            })
            .collect::<Result<_, MsixError>>()?;
        let count = vectors;
        let vectors = router
            .allocate(count.into())?
            .into_iter()
            .map(|gsi| Vector {
                gsi,
                message: MsiMessage::default(),
                masked: true,
                routed: None,
            })
            .collect();
        Ok(Self {
            router,
            count,
            vectors,
            sources,
            enabled: false,
            function_masked: false,
        })
    }

    /// Appends the capability to `header`: the table is at the start of `bar`, the pending bits at
    /// `pending`.
    pub fn add_capability(
        &self,
        header: &mut Header,
        bar: BarIndex,
        pending: u32,
    ) -> Result<u8, ConfigError> {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.count - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(bar as u32).to_le_bytes());
        body[6..].copy_from_slice(&(pending | bar as u32).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        header.add_capability(CAPABILITY, &body, &writable)
    }

    /// Lets the guest write what it may of a capability that `config` has at `at`, of any device, and
    /// nothing is enabled.
    pub fn take_capability(config: &mut ConfigSpace, at: u8) {
        let [_, writable] = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        let [_, found] = config.u16(at + 2).to_le_bytes();
        config.set(at + 3, &[found & !writable]);
        config.set_writable(at + 3, &[writable]);
    }

    /// Takes over what the guest wrote into the message control register.
    pub fn set_control(&mut self, control: u16) -> Result<(), MsixError> {
        let enabled = control & CONTROL_ENABLE != 0;
        let masked = control & CONTROL_FUNCTION_MASK != 0;
        if (enabled, masked) == (self.enabled, self.function_masked) {
            return Ok(());
        }
        (self.enabled, self.function_masked) = (enabled, masked);
        self.sync()
    }

    /// Turns all vectors on or off.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<(), MsixError> {
        self.set_control(if enabled { CONTROL_ENABLE } else { 0 })
    }

    /// Gives the first vectors these messages, as a guest does that unmasks them; others are masked.
    pub fn set_messages(&mut self, messages: &[MsiMessage]) -> Result<(), MsixError> {
        for (number, vector) in self.vectors.iter_mut().enumerate() {
            vector.masked = number >= messages.len();
            vector.message = messages.get(number).copied().unwrap_or_default();
        }
        self.sync()
    }

    /// Whether the guest uses MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The eventfds with which sources are signalled, in order.
    pub fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sources.iter().map(|source| {
            // SAFETY: the eventfd is open as long as it is borrowed from its source.
            unsafe { BorrowedFd::borrow_raw(source.event.as_raw_fd()) }
        })
    }

    /// A copy of the eventfd with which a source is signalled.
    pub fn event(&self, source: SourceIndex) -> Result<Arc<EventFd>, MsixError> {
        let gone = || MsixError::Event(io::ErrorKind::NotFound.into());
        let source = self.sources.get(source.0).ok_or_else(gone)?;
        Ok(Arc::clone(&source.event))
    }

    /// The vector of a source, or [`NO_VECTOR`].
    pub fn vector(&self, source: SourceIndex) -> u16 {
        self.sources.get(source.0).map_or(NO_VECTOR, |s| s.vector)
    }

    /// Points a source to a vector; one that does not exist counts as [`NO_VECTOR`].
    pub fn set_vector(&mut self, source: SourceIndex, vector: u16) -> Result<(), MsixError> {
        let exists = usize::from(vector) < self.vectors.len();
        let vector = if exists { vector } else { NO_VECTOR };
        match self.sources.get_mut(source.0) {
            Some(source) if source.vector != vector => {
                source.vector = vector;
                self.sync()
            }
            _ => Ok(()),
        }
    }

    /// Whether the source has signalled and no vector will ever tell; forgets it.
    /// This is what remains for an interrupt status register.
    pub fn take_unrouted(&mut self, source: SourceIndex) -> bool {
        match self.sources.get(source.0) {
            Some(s) if !self.enabled || s.vector == NO_VECTOR => s.event.read().is_ok(),
            _ => false,
        }
    }

    /// Fills `data` from the table at `offset`, with zeros beyond its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.table_dword(at / 4).to_le_bytes()[(at % 4) as usize];
        }
    }

    /// Fills `data` from the pending bits at `offset`, with zeros beyond their end.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) -> Result<(), MsixError> {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.pending_dword(at / 4)?.to_le_bytes()[(at % 4) as usize];
        }
        Ok(())
    }

    /// Takes a write of 4 or 8 aligned bytes to the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Result<(), MsixError> {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return Ok(());
        }
        let mut changed = false;
        for (i, dword) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([dword[0], dword[1], dword[2], dword[3]]);
            changed |= self.write_dword(offset / 4 + i as u64, value);
        }
        if changed { self.sync() } else { Ok(()) }
    }

    fn table_dword(&self, index: u64) -> u32 {
        let Some(vector) = self.vectors.get((index * 4 / ENTRY_SIZE) as usize) else {
            return 0;
        };
        match index % 4 {
            0 => low(vector.message.address) & !3,
            1 => low(vector.message.address >> 32),
            2 => vector.message.data,
            _ => vector.masked.into(),
        }
    }

    /// Whether the write can change where a vector that may fire leads, or if it may.
    fn write_dword(&mut self, index: u64, value: u32) -> bool {
        let Some(vector) = self.vectors.get_mut((index * 4 / ENTRY_SIZE) as usize) else {
            return false;
        };
        let before = (vector.message, vector.masked);
        let address = vector.message.address;
        match index % 4 {
            0 => vector.message.address = address & !0xffff_ffff | u64::from(value & !3),
            1 => vector.message.address = address & 0xffff_ffff | u64::from(value) << 32,
            2 => vector.message.data = value,
            _ => vector.masked = value & 1 != 0,
        }
        (vector.message, vector.masked) != before && !(before.1 && vector.masked)
    }

    fn pending_dword(&self, index: u64) -> Result<u32, MsixError> {
        let mut bits = 0;
        let first = index * 32;
        for source in &self.sources {
            let vector = u64::from(source.vector);
            if source.vector != NO_VECTOR
                && (first..first + 32).contains(&vector)
                && source.is_pending()?
            {
                bits |= 1 << (vector - first);
            }
        }
        Ok(bits)
    }

    /// Where a source shall be attached now.
    fn wanted(&self, source: &Source) -> Option<Gsi> {
        let vector = self.vectors.get(usize::from(source.vector))?;
        let live = self.enabled && !self.function_masked && !vector.masked;
        live.then_some(vector.gsi)
    }

    /// Makes the hypervisor do what the registers say.
    fn sync(&mut self) -> Result<(), MsixError> {
        let wanted: Vec<_> = self.sources.iter().map(|s| self.wanted(s)).collect();
        for (source, &wanted) in self.sources.iter_mut().zip(&wanted) {
            if let Some(gsi) = source.attached
                && wanted != Some(gsi)
            {
                self.router.detach(gsi, &source.event)?;
                source.attached = None;
            }
        }
        let live: BTreeSet<Gsi> = wanted.iter().flatten().copied().collect();
        let stale = |v: &&mut Vector| live.contains(&v.gsi) && v.routed != Some(v.message);
        let changes: Vec<_> = self
            .vectors
            .iter_mut()
            .filter(stale)
            .map(|v| (v.gsi, Some(v.message)))
            .collect();
        if !changes.is_empty() {
            self.router.route(&changes)?;
            for vector in self.vectors.iter_mut().filter(stale) {
                vector.routed = Some(vector.message);
            }
        }
        for (source, wanted) in self.sources.iter_mut().zip(wanted) {
            if let Some(gsi) = wanted
                && source.attached.is_none()
            {
                self.router.attach(gsi, &source.event)?;
                source.attached = Some(gsi);
            }
        }
        Ok(())
    }

    /// As after power-on: nothing pending, everything masked, no vector set.
    pub fn reset(&mut self) -> Result<(), MsixError> {
        (self.enabled, self.function_masked) = (false, false);
        for vector in &mut self.vectors {
            vector.message = MsiMessage::default();
            vector.masked = true;
        }
        self.reset_sources()
    }

    /// No vector set but those that are always, and nothing pending, as a reset of the device
    /// behind leaves it.
    pub fn reset_sources(&mut self) -> Result<(), MsixError> {
        for source in &mut self.sources {
            source.vector = source.initial;
        }
        self.sync()?;
        for source in &self.sources {
            // Empty is what it shall be.
            let _ = source.event.read();
        }
        Ok(())
    }

    /// Table and pending bits. The device must be stopped, or bits get lost.
    pub fn save(&self) -> Result<MsixState, MsixError> {
        Ok(MsixState {
            entries: self
                .vectors
                .iter()
                .map(|v| MsixEntryState {
                    address: v.message.address,
                    data: v.message.data,
                    masked: v.masked,
                })
                .collect(),
            pending: self
                .sources
                .iter()
                .map(Source::is_pending)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Takes saved state over, with the control register and the vector of each source,
    /// and commits what is different to the hypervisor at once. What was pending fires if it may.
    pub fn restore(
        &mut self,
        state: &MsixState,
        control: u16,
        vectors: &[u16],
    ) -> Result<(), MsixError> {
        let shape = |what, found, expected| {
            if found == expected {
                Ok(())
            } else {
                Err(MsixError::Shape {
                    what,
                    found,
                    expected,
                })
            }
        };
        shape("vectors", state.entries.len(), self.vectors.len())?;
        shape("pending bits", state.pending.len(), self.sources.len())?;
        shape("sources", vectors.len(), self.sources.len())?;
        for source in self.sources.iter().filter(|s| s.attached.is_none()) {
            // Empty is what it shall be.
            let _ = source.event.read();
        }
        for (vector, saved) in self.vectors.iter_mut().zip(&state.entries) {
            vector.message = MsiMessage {
                address: saved.address & !3,
                data: saved.data,
            };
            vector.masked = saved.masked;
        }
        for (source, &vector) in self.sources.iter_mut().zip(vectors) {
            let exists = usize::from(vector) < self.vectors.len();
            source.vector = if exists { vector } else { NO_VECTOR };
        }
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        self.sync()?;
        for (source, _) in self.sources.iter().zip(&state.pending).filter(|(_, p)| **p) {
            source.event.write(1).map_err(MsixError::Event)?;
        }
        Ok(())
    }
}

/// The lower half.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl Drop for Msix {
    fn drop(&mut self) {
        self.enabled = false;
        if let Err(error) = self.sync() {
            tracing::warn!(%error, "interrupt vectors could not be given back");
            return;
        }
        let gsis: Vec<_> = self.vectors.iter().map(|v| v.gsi).collect();
        let nowhere: Vec<_> = gsis.iter().map(|&gsi| (gsi, None)).collect();
        if let Err(error) = self.router.route(&nowhere) {
            tracing::warn!(%error, "interrupt routes could not be taken down");
        }
        self.router.free(&gsis);
    }
}

#[cfg(test)]
mod tests;
