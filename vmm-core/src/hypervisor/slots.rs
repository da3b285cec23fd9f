//! KVM's memory slots, kept equal to the memory layout, and their dirty log.
//!
//! ```text
//! start_log ──▶ read_log ──▶ clear_log (chunk) ──▶ the chunk's pages are read … ──▶ stop_log
//!                   ▲                                     │
//!                   └─────────────────────────────────────┘
//! ```
//! A page that was read from the log must be cleared *before* its content is read: a write that
//! comes between the two is then in the next log. Where KVM clears by itself, reading the log is
//! what clears it.
#![expect(
    unsafe_code,
    reason = "a memory slot hands a mapping to the kernel, and clearing its log a bitmap"
)]

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_clear_dirty_log, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;

use super::{HypervisorError, Vm, refused};
use crate::costs;
use crate::memory::{LayoutChange, LayoutListener, Region, RegionKind};

const PAGE: u64 = 4096;
const PAGES_PER_WORD: u64 = u64::BITS as u64;
/// KVM's ioctls have this type, and clearing the dirty log this number.
const KVMIO: u8 = 0xae;
const CLEAR_DIRTY_LOG: u8 = 0xc0;

nix::ioctl_readwrite!(clear_dirty_log, KVMIO, CLEAR_DIRTY_LOG, kvm_clear_dirty_log);

struct Slots {
    /// Guest-physical address of a region → its slot.
    used: BTreeMap<u64, (u32, Region)>,
    logging: bool,
}

/// The slots of one VM.
pub struct MemorySlots {
    vm: Arc<VmFd>,
    manual: bool,
    slots: Mutex<Slots>,
}

impl MemorySlots {
    /// No slot yet; subscribe it to the memory.
    pub fn new(vm: &Vm) -> Self {
        Self {
            vm: Arc::clone(vm.fd()),
            manual: vm.has_manual_dirty_log(),
            slots: Mutex::new(Slots {
                used: BTreeMap::new(),
                logging: false,
            }),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(
        &self,
        slot: u32,
        region: &Region,
        size: u64,
        logging: bool,
    ) -> Result<(), HypervisorError> {
        let log = if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let rom = match region.kind() {
            RegionKind::Rom => KVM_MEM_READONLY,
            RegionKind::Ram | RegionKind::Device => 0,
        };
        let slot = kvm_userspace_memory_region {
            slot,
            flags: log | rom,
            guest_phys_addr: region.gpa(),
            memory_size: size,
            userspace_addr: region.host(),
        };
        costs::MEMORY_SLOTS.add();
        // SAFETY: the region is mapped, and this object keeps it mapped as long as the
        // slot exists.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(refused("change a memory slot"))
    }

    /// Logs the guest's writes from now on; what was written before may be in the log or not.
    pub fn start_log(&self) -> Result<(), HypervisorError> {
        self.set_logging(true)
    }

    /// Ends logging.
    pub fn stop_log(&self) -> Result<(), HypervisorError> {
        self.set_logging(false)
    }

    fn set_logging(&self, logging: bool) -> Result<(), HypervisorError> {
        let slots = &mut *self.slots();
        if slots.logging != logging {
            slots.logging = logging;
            for (slot, region) in slots.used.values() {
                self.set(*slot, region, region.size(), logging)?;
            }
        }
        Ok(())
    }

    /// Reads the log: `dirty` is called for each slot with the number of its first page and a bit
    /// for each of its pages, in words of 64.
    pub fn read_log(&self, mut dirty: impl FnMut(u64, &[u64])) -> Result<(), HypervisorError> {
        for (gpa, (slot, region)) in &self.slots().used {
            let size = usize::try_from(region.size()).unwrap_or(usize::MAX);
            let bits = self
                .vm
                .get_dirty_log(*slot, size)
                .map_err(refused("tell which pages are dirty"))?;
            dirty(gpa / PAGE, &bits);
        }
        Ok(())
    }

    /// Clears pages that were read from the log: `bits` from page `first` on, a multiple of 64
    /// pages from the start of its region, all in one region. Must come before their content is
    /// read.
    pub fn clear_log(&self, first: u64, bits: &[u64]) -> Result<(), HypervisorError> {
        if !self.manual || bits.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let slots = self.slots();
        let found = slots.used.range(..=first * PAGE).next_back();
        let Some((gpa, (slot, region))) = found.filter(|_| slots.logging) else {
            return Ok(());
        };
        let offset = first - gpa / PAGE;
        let rest = (region.size() / PAGE).saturating_sub(offset);
        let pages = rest.min(bits.len() as u64 * PAGES_PER_WORD);
        let mut log = kvm_clear_dirty_log {
            slot: *slot,
            num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
            first_page: offset,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
        // SAFETY: the kernel reads `num_pages` bits, of which there are as many.
        unsafe { clear_dirty_log(self.vm.as_raw_fd(), &raw mut log) }
            .map(drop)
            .map_err(|errno| HypervisorError::Refused {
                what: "clear dirty pages",
                source: io::Error::from(errno),
            })
    }
}

impl LayoutListener for MemorySlots {
    fn name(&self) -> String {
        "KVM".into()
    }

    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Slots { used, logging } = &mut *self.slots();
        for region in change.removed {
            if let Some((slot, region)) = used.remove(&region.gpa()) {
                self.set(slot, &region, 0, false)?;
            }
        }
        for region in change.added {
            let slot = (0..)
                .find(|slot| used.values().all(|(s, _)| s != slot))
                .unwrap_or(u32::MAX);
            self.set(slot, region, region.size(), *logging)?;
            used.insert(region.gpa(), (slot, region.clone()));
        }
        Ok(())
    }
}
