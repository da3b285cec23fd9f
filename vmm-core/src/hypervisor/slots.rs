//! KVM's memory slots, kept equal to the memory layout.
#![expect(unsafe_code, reason = "a memory slot hands a mapping to the kernel")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::{HypervisorError, Vm, refused};
use crate::memory::{LayoutChange, LayoutListener, Region};

/// The slots of one VM: guest-physical address of a region → its slot.
pub struct MemorySlots {
    vm: Arc<VmFd>,
    used: Mutex<BTreeMap<u64, (u32, Region)>>,
}

impl MemorySlots {
    /// No slot yet; subscribe it to the memory.
    pub fn new(vm: &Vm) -> Self {
        Self {
            vm: Arc::clone(vm.fd()),
            used: Mutex::default(),
        }
    }

    fn set(&self, slot: u32, region: &Region, size: u64) -> Result<(), HypervisorError> {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.gpa(),
            memory_size: size,
            userspace_addr: region.host(),
        };
        // SAFETY: the region is mapped, and this object keeps it mapped as long as the
        // slot exists.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(refused("change a memory slot"))
    }
}

impl LayoutListener for MemorySlots {
    fn name(&self) -> String {
        "KVM".into()
    }

    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        for region in change.removed {
            if let Some((slot, region)) = used.remove(&region.gpa()) {
                self.set(slot, &region, 0)?;
            }
        }
        for region in change.added {
            let slot = (0..)
                .find(|slot| used.values().all(|(s, _)| s != slot))
                .unwrap_or(u32::MAX);
            self.set(slot, region, region.size())?;
            used.insert(region.gpa(), (slot, region.clone()));
        }
        Ok(())
    }
}
