//! Saved state of what KVM keeps: the VM's chips and clock, and each vCPU.
//!
//! KVM's own structures are its ABI and go as bytes; absent ones were not to be had
//! from the KVM that saved.

use std::fmt;
use std::time::Duration;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    Xsave, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::HypervisorError;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;

/// Interrupt controllers, timer chip and clock of a VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VmSavedState {
    /// kvmclock's time.
    pub clock: Option<kvm_clock_data>,
    /// 8259 master and slave, I/O APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// 8254.
    pub pit: Option<kvm_pit_state2>,
}

impl VmSavedState {
    /// Lets the clock go on.
    pub fn catch_up(&mut self, elapsed: Duration) {
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        if let Some(clock) = &mut self.clock {
            clock.clock = clock.clock.saturating_add(nanos);
        }
    }

    /// Refuses what KVM cannot have said.
    pub(super) fn check(&self) -> Result<(), HypervisorError> {
        let invalid = |why| {
            Err(HypervisorError::InvalidState {
                what: "interrupt controllers",
                why,
            })
        };
        if self.irqchips.len() > 3 {
            return invalid(format!("{} of them, there are 3", self.irqchips.len()));
        }
        match self.irqchips.iter().find(|chip| chip.chip_id > 2) {
            Some(chip) => invalid(format!("number {}, the last is 2", chip.chip_id)),
            None => Ok(()),
        }
    }
}

/// What KVM keeps of the guests of a guest.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NestedState(pub Box<KvmNestedStateBuffer>);

impl fmt::Debug for NestedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NestedState").finish_non_exhaustive()
    }
}

/// One vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuSavedState {
    /// Runnable, halted, waiting for INIT or SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers.
    pub sregs: kvm_sregs,
    /// FPU and vector registers, as XSAVE lays them out.
    pub xsave: Xsave,
    /// Extended control registers.
    pub xcrs: Option<kvm_xcrs>,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Pending exceptions, interrupts, NMI.
    pub events: kvm_vcpu_events,
    /// Model-specific registers: index, value.
    pub msrs: Vec<(u32, u64)>,
    /// Frequency of the time stamp counter, in kHz.
    #[serde(default)]
    pub tsc_khz: Option<u32>,
    /// What a guest that runs guests has told the processor of them.
    #[serde(default)]
    pub nested: Option<NestedState>,
}

impl VcpuSavedState {
    /// Lets the time stamp counter go on, if its frequency is known.
    pub fn catch_up(&mut self, elapsed: Duration) {
        let khz = u128::from(self.tsc_khz.unwrap_or(0));
        let ticks = elapsed.as_nanos().saturating_mul(khz) / 1_000_000;
        let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
        let counters = self.msrs.iter_mut().filter(|(index, _)| *index == TSC);
        for (_, value) in counters {
            *value = value.wrapping_add(ticks);
        }
    }

    /// Leaves the time stamp counter out. KVM takes one that is less than a second away from where
    /// the counter that was set last would be for the same one, and does not set it: a machine to
    /// come must be the first to set it.
    pub fn leave_counter_out(&mut self) {
        self.msrs.retain(|(index, _)| *index != TSC);
    }
}
