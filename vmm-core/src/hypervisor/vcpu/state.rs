//! Saving and restoring one vCPU.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{Msrs, Xsave, kvm_msr_entry, kvm_xsave};

use migration::wire::same_frequency;

use super::Vcpu;
use crate::hypervisor::saved_state::{NestedState, VcpuSavedState};
use crate::hypervisor::{HypervisorError, refused};

/// More registers than any KVM lists: a longer saved list is refused.
const MOST_MSRS: usize = 4096;
/// IA32_TSC_DEADLINE. KVM drops a write while the local APIC's timer is in another mode, which
/// it is until the local APIC was restored.
const TSC_DEADLINE: u32 = 0x6e0;

impl Vcpu {
    /// Everything KVM knows of the vCPU. It must be paused.
    pub fn save(&self) -> Result<VcpuSavedState, HypervisorError> {
        Ok(VcpuSavedState {
            mp_state: self
                .fd
                .get_mp_state()
                .map_err(refused("tell a vCPU's run state"))?,
            regs: self
                .fd
                .get_regs()
                .map_err(refused("tell a vCPU's registers"))?,
            sregs: self
                .fd
                .get_sregs()
                .map_err(refused("tell a vCPU's control registers"))?,
            xsave: self.save_xsave()?,
            xcrs: self.fd.get_xcrs().ok(),
            debugregs: self
                .fd
                .get_debug_regs()
                .map_err(refused("tell a vCPU's debug registers"))?,
            lapic: self.fd.get_lapic().map_err(refused("tell a local APIC"))?,
            events: self
                .fd
                .get_vcpu_events()
                .map_err(refused("tell a vCPU's events"))?,
            msrs: self.save_msrs()?,
            tsc_khz: self.tsc_khz(),
            nested: self.save_nested(),
        })
    }

    /// Takes a saved state over. The vCPU must be paused.
    ///
    /// The counter's frequency comes before its value. Control registers come before what depends
    /// on the modes that they switch on, and before model-specific ones, those before the local
    /// APIC (its base is one of them), its timer's deadline after it, events and run state last.
    pub fn restore(&self, state: &VcpuSavedState) -> Result<(), HypervisorError> {
        if state.msrs.len() > MOST_MSRS {
            return Err(HypervisorError::InvalidState {
                what: "model-specific registers",
                why: format!("{} of them", state.msrs.len()),
            });
        }
        self.set_tsc_frequency(state.tsc_khz)?;
        if let Some(xcrs) = &state.xcrs {
            self.fd
                .set_xcrs(xcrs)
                .map_err(refused("set a vCPU's extended control registers"))?;
        }
        self.restore_xsave(&state.xsave)?;
        self.fd
            .set_sregs(&state.sregs)
            .map_err(refused("set a vCPU's control registers"))?;
        if let Some(nested) = &state.nested {
            self.fd
                .set_nested_state(&nested.0)
                .map_err(refused("set the state of a guest's guest"))?;
        }
        self.fd
            .set_regs(&state.regs)
            .map_err(refused("set a vCPU's registers"))?;
        self.set_msrs(&state.msrs)?;
        self.fd
            .set_lapic(&state.lapic)
            .map_err(refused("set a local APIC"))?;
        let timer: Vec<_> = state
            .msrs
            .iter()
            .filter(|(index, deadline)| *index == TSC_DEADLINE && *deadline != 0)
            .copied()
            .collect();
        self.set_msrs(&timer)?;
        self.fd
            .set_debug_regs(&state.debugregs)
            .map_err(refused("set a vCPU's debug registers"))?;
        self.fd
            .set_vcpu_events(&state.events)
            .map_err(refused("set a vCPU's events"))?;
        self.fd
            .set_mp_state(state.mp_state)
            .map_err(refused("set a vCPU's run state"))
    }

    /// Lets the guest know that it stood still, so that its watchdogs do not bark. A guest without
    /// kvmclock has none that KVM could tell.
    pub fn was_stopped(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    fn set_tsc_frequency(&self, wanted: Option<u32>) -> Result<(), HypervisorError> {
        match (wanted, self.tsc_khz()) {
            (Some(wanted), Some(here)) if !same_frequency(wanted, here) => self
                .fd
                .set_tsc_khz(wanted)
                .map_err(refused("scale the time stamp counter")),
            _ => Ok(()),
        }
    }

    fn save_nested(&self) -> Option<NestedState> {
        let mut nested = Box::new(KvmNestedStateBuffer::empty());
        // A KVM that runs no guests in guests has no such state.
        let told = self.fd.nested_state(&mut nested);
        told.ok().map(|_| NestedState(nested))
    }

    fn save_msrs(&self) -> Result<Vec<(u32, u64)>, HypervisorError> {
        let entry = |&index: &u32| kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut saved = Vec::with_capacity(self.msrs.len());
        let mut rest = &self.msrs[..];
        while !rest.is_empty() {
            let entries: Vec<_> = rest.iter().take(256).map(entry).collect();
            let Ok(mut list) = Msrs::from_entries(&entries) else {
                break;
            };
            let got = self
                .fd
                .get_msrs(&mut list)
                .map_err(refused("tell model-specific registers"))?;
            saved.extend(
                list.as_slice()[..got]
                    .iter()
                    .map(|msr| (msr.index, msr.data)),
            );
            // KVM stops at one that is listed and still not readable: that one is left out.
            rest = &rest[got + usize::from(got < entries.len())..];
        }
        Ok(saved)
    }

    /// Words of an XSAVE area beyond the 4 KiB that every KVM has.
    fn xsave_extra_words(&self) -> usize {
        self.xsave_bytes
            .saturating_sub(size_of::<kvm_xsave>())
            .div_ceil(4)
    }

    fn save_xsave(&self) -> Result<Xsave, HypervisorError> {
        let mut xsave = xsave_of(self.xsave_extra_words())?;
        #[expect(
            unsafe_code,
            reason = "the kernel writes as many bytes as it said it would"
        )]
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 named.
        let got = unsafe { self.fd.get_xsave2(&mut xsave) };
        if got.is_err() {
            // A KVM without KVM_GET_XSAVE2 has the 4 KiB only.
            let fixed = self
                .fd
                .get_xsave()
                .map_err(refused("tell a vCPU's vector registers"))?;
            xsave = xsave_of(0)?;
            #[expect(
                unsafe_code,
                reason = "the wrapper gives its header away only as unsafe"
            )]
            // SAFETY: the length field stays as it is.
            unsafe {
                xsave.as_mut_fam_struct().xsave = fixed;
            }
        }
        Ok(xsave)
    }

    fn restore_xsave(&self, xsave: &Xsave) -> Result<(), HypervisorError> {
        let (has, wants) = (xsave.as_slice().len(), self.xsave_extra_words());
        let longer;
        let xsave = if has < wants {
            // What this processor has more is in its initial state.
            longer = lengthened(xsave, wants)?;
            &longer
        } else {
            xsave
        };
        #[expect(
            unsafe_code,
            reason = "the kernel reads as many bytes as it said it would"
        )]
        // SAFETY: the area is at least as long as KVM_CAP_XSAVE2 named.
        unsafe { self.fd.set_xsave2(xsave) }.map_err(refused("set a vCPU's vector registers"))
    }
}

/// An XSAVE area of 4 KiB and so many words.
fn xsave_of(words: usize) -> Result<Xsave, HypervisorError> {
    Xsave::new(words).map_err(|error| HypervisorError::InvalidState {
        what: "vector registers",
        why: format!("{error:?}"),
    })
}

/// The same with zeroes behind it, up to so many words beyond 4 KiB.
fn lengthened(xsave: &Xsave, words: usize) -> Result<Xsave, HypervisorError> {
    let mut longer = xsave_of(words)?;
    let has = xsave.as_slice();
    longer.as_mut_slice()[..has.len()].copy_from_slice(has);
    #[expect(
        unsafe_code,
        reason = "the wrapper gives its header away only as unsafe"
    )]
    // SAFETY: the length field stays as it is.
    unsafe {
        longer.as_mut_fam_struct().xsave.region = xsave.as_fam_struct_ref().xsave.region;
    }
    Ok(longer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_a_processor_with_less_is_filled_up_with_zeroes() {
        let mut xsave = xsave_of(2).unwrap();
        xsave.as_mut_slice().copy_from_slice(&[7, 8]);
        #[expect(unsafe_code, reason = "a header to compare")]
        // SAFETY: the length field stays as it is.
        unsafe {
            xsave.as_mut_fam_struct().xsave.region[1023] = 6;
        }
        let longer = lengthened(&xsave, 5).unwrap();
        assert_eq!(longer.as_slice(), [7, 8, 0, 0, 0]);
        assert_eq!(longer.as_fam_struct_ref().xsave.region[1023], 6);
    }
}
