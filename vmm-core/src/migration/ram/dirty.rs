//! Which pages must be sent: KVM's log, the devices' logs, and what the core itself has written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::holes::Holes;
use super::{PAGE, PageSet};
use crate::hypervisor::{HypervisorError, MemorySlots};
use crate::memory::Memory;
use crate::migration::MigrationError;
use crate::migration::error::system;
use crate::remote::vhost_user::DirtyLog;

/// Words of a chunk: 64 MiB of memory, which KVM clears in half a millisecond.
const CHUNK_WORDS: usize = 256;

/// Notes that the core itself has written to guest memory, as a reset does: nobody else logs that.
#[derive(Clone, Debug, Default)]
pub struct CoreWrites(Arc<AtomicBool>);

impl CoreWrites {
    /// It has, somewhere.
    pub fn note(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

/// Collects dirty pages, and gives them out.
pub struct DirtyTracker {
    memory: Arc<Memory>,
    slots: Arc<MemorySlots>,
    logs: Vec<Arc<DirtyLog>>,
    core: CoreWrites,
    pending: PageSet,
    /// Pages that KVM has told and that are not cleared in its log.
    uncleared: PageSet,
    holes: Holes,
}

impl DirtyTracker {
    /// Starts KVM's log. Every page is to be sent. `logs` are the devices', which run already.
    pub fn start(
        memory: &Arc<Memory>,
        slots: &Arc<MemorySlots>,
        logs: Vec<Arc<DirtyLog>>,
        core: &CoreWrites,
    ) -> Result<Self, HypervisorError> {
        let mut pending = PageSet::new(&memory.regions());
        let mut uncleared = pending.clone();
        // Whatever was written so far is sent anyway.
        core.take();
        pending.fill();
        slots.start_log()?;
        // Where all is dirty at first, the first round has all of it to clear.
        slots.read_log(|first, bits| uncleared.insert(first, bits))?;
        Ok(Self {
            memory: Arc::clone(memory),
            slots: Arc::clone(slots),
            logs,
            core: core.clone(),
            pending,
            uncleared,
            holes: Holes::default(),
        })
    }

    /// Every page of a machine that stands still, without any log.
    pub fn everything(memory: &Arc<Memory>, slots: &Arc<MemorySlots>) -> Self {
        let mut pending = PageSet::new(&memory.regions());
        let uncleared = pending.clone();
        pending.fill();
        Self {
            memory: Arc::clone(memory),
            slots: Arc::clone(slots),
            logs: Vec::new(),
            core: CoreWrites::default(),
            pending,
            uncleared,
            holes: Holes::default(),
        }
    }

    /// Clears in KVM's log whatever is dirty there: a page that is written from now on is in the
    /// next log, whether it has been sent before or not.
    pub fn arm(&mut self) -> Result<(), HypervisorError> {
        while let Some((first, words)) = self.uncleared.take_chunk(CHUNK_WORDS) {
            self.slots.clear_log(first, &words)?;
        }
        Ok(())
    }

    /// Reads every log; what is dirty is pending.
    pub fn collect(&mut self) -> Result<(), HypervisorError> {
        let (pending, uncleared) = (&mut self.pending, &mut self.uncleared);
        self.slots.read_log(|first, bits| {
            pending.insert(first, bits);
            uncleared.insert(first, bits);
        })?;
        self.collect_from_devices();
        self.holes.forget();
        Ok(())
    }

    /// As [`Self::collect`], when no vCPU can have written since.
    pub fn collect_from_devices(&mut self) {
        for log in &self.logs {
            log.take(|first, bits| self.pending.insert(first, &[bits]));
        }
        if self.core.take() {
            self.pending.fill();
        }
    }

    /// Bytes that are pending.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.count() * PAGE
    }

    /// Takes some pending pages out, ready to be read: the first page, and words of 64 bits.
    pub fn take_chunk(&mut self) -> Result<Option<(u64, Vec<u64>)>, HypervisorError> {
        let Some((first, words)) = self.pending.take_chunk(CHUNK_WORDS) else {
            return Ok(None);
        };
        let uncleared = self.uncleared.take(first, &words);
        self.slots.clear_log(first, &uncleared)?;
        Ok(Some((first, words)))
    }

    /// As [`Self::take_chunk`], when no vCPU can write any more: nothing has to be cleared.
    pub fn take_last_chunk(&mut self) -> Option<(u64, Vec<u64>)> {
        self.pending.take_chunk(CHUNK_WORDS)
    }

    /// Of the pages `words`, from page `first` on, which were taken, those that are holes of memory.
    pub fn holes(&mut self, first: u64, words: &[u64]) -> Result<Vec<u64>, MigrationError> {
        let holes = self.holes.among(&self.memory, first, words);
        holes.map_err(system("the holes of guest memory"))
    }
}
