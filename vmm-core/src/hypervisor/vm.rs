//! The VM object: capabilities, interrupt controllers, clock.

use std::fs::File;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap,
    kvm_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::saved_state::VmSavedState;
use super::{HypervisorError, refused};
use crate::files;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// Deleting one memory slot drops the page tables of all others, unless this quirk is off.
const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

const REQUIRED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Takes the KVM device from `descriptor`, or opens `path`, and checks that it will do.
pub fn open_kvm(path: &Path, descriptor: Option<OwnedFd>) -> Result<Kvm, HypervisorError> {
    let kvm = match descriptor {
        Some(descriptor) => descriptor,
        None => files::open(File::options().read(true).write(true), path)
            .map_err(|source| HypervisorError::Open {
                path: path.display().to_string(),
                source,
            })?
            .into(),
    };
    // SAFETY: the descriptor is open and nobody else's.
    #[expect(unsafe_code, reason = "Kvm takes a raw descriptor only")]
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(HypervisorError::ApiVersion {
            path: path.display().to_string(),
            version,
        });
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, capability)) => Err(HypervisorError::Missing { capability }),
        None => Ok(kvm),
    }
}

/// Dirty pages are cleared by whoever has read them, and all are dirty at first: turning the log
/// on touches no page table (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_INITIALLY_SET).
const MANUAL_DIRTY_LOG: u64 = 3;

/// A virtual machine of KVM with its interrupt controllers, and no vCPU yet.
pub struct Vm {
    fd: Arc<VmFd>,
    manual_dirty_log: bool,
}

impl Vm {
    /// Makes the VM.
    pub fn new(kvm: &Kvm) -> Result<Self, HypervisorError> {
        let fd = kvm.create_vm().map_err(refused("create a VM"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(refused("place its identity map"))?;
        fd.set_tss_address(usize::try_from(KVM_TSS).unwrap_or(usize::MAX))
            .map_err(refused("place its task state segment"))?;
        let quirks = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
        if u64::try_from(quirks).is_ok_and(|q| q & QUIRK_SLOT_ZAP_ALL != 0) {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_DISABLE_QUIRKS2,
                ..Default::default()
            };
            cap.args[0] = QUIRK_SLOT_ZAP_ALL;
            fd.enable_cap(&cap)
                .map_err(refused("disable the slot zap quirk"))?;
        }
        let manual = fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let manual = u64::try_from(manual).unwrap_or(0) & MANUAL_DIRTY_LOG;
        if manual != 0 {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = manual;
            fd.enable_cap(&cap)
                .map_err(refused("let the dirty log be cleared by hand"))?;
        }
        fd.create_irq_chip()
            .map_err(refused("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(refused("create the timer chip"))?;
        Ok(Self {
            fd: Arc::new(fd),
            manual_dirty_log: manual != 0,
        })
    }

    /// The model-specific registers that make up a vCPU's state.
    pub fn msrs(kvm: &Kvm) -> Result<Arc<[u32]>, HypervisorError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(refused("list model-specific registers"))?;
        Ok(list.as_slice().into())
    }

    /// The descriptor, for what hangs on it: slots, interrupts, doorbells, vCPUs.
    pub(super) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Whether dirty pages are cleared by hand; otherwise reading the log clears it.
    pub(super) fn has_manual_dirty_log(&self) -> bool {
        self.manual_dirty_log
    }

    /// Interrupt controllers, timer chip and clock, as far as this KVM tells them.
    /// All vCPUs must be paused.
    pub fn save(&self) -> Result<VmSavedState, HypervisorError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd.get_irqchip(&mut chip).map(|()| chip)
        };
        let ids = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        Ok(VmSavedState {
            clock: Some(self.fd.get_clock().map_err(refused("tell the clock"))?),
            // A KVM that keeps them elsewhere (a split irqchip) says so by an error.
            irqchips: ids.into_iter().filter_map(|id| chip(id).ok()).collect(),
            pit: self.fd.get_pit2().ok(),
        })
    }

    /// Takes a saved state over. All vCPUs must be paused.
    pub fn restore(&self, state: &VmSavedState) -> Result<(), HypervisorError> {
        state.check()?;
        if let Some(mut clock) = state.clock {
            // The guest's time goes on from where it was; how the source read it is its own affair.
            clock.flags = 0;
            self.fd
                .set_clock(&clock)
                .map_err(refused("set the clock"))?;
        }
        for chip in &state.irqchips {
            self.fd
                .set_irqchip(chip)
                .map_err(refused("set an interrupt controller"))?;
        }
        if let Some(pit) = &state.pit {
            self.fd
                .set_pit2(pit)
                .map_err(refused("set the timer chip"))?;
        }
        Ok(())
    }
}
