//! vCPUs: each a thread of its own, all stopped and started together.
//!
//! ```text
//!            run                    exit
//! Paused ─────────► Running      any ───► gone
//!    ▲                 │
//!    └──── kick ───────┘   out of KVM_RUN, its last port or MMIO access completed
//! ```
//!
//! Order rules:
//! - A kick sets the vCPU's flag, then `immediate_exit`, then signals its thread: a
//!   vCPU that is about to enter the guest leaves at once, one inside is interrupted.
//! - State is read and written by the vCPU's own thread, while it is paused, all
//!   vCPUs at the same time.
//! - A vCPU that ends (triple fault, refused by KVM) says so once and is then paused.

mod kick;
mod run;
mod set;
mod state;
mod throttle;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use thiserror::Error;

use super::{HypervisorError, Vm, refused};
use crate::boot::EntryPoint;
use crate::bus::Bus;

pub use run::Ended;
pub use set::VcpuSet;
pub use throttle::Throttle;

/// Where a vCPU's accesses go.
#[derive(Clone)]
pub struct VcpuBuses {
    /// Ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
}

/// Who is told that a vCPU ended. Called on its thread; must not block.
pub trait VcpuEvents: Send + Sync {
    /// The vCPU will not run on.
    fn ended(&self, vcpu: u32, ended: Ended);
}

/// Why vCPUs did not do what they were told.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// A thread could not be made.
    #[error("a thread for vCPU {vcpu} cannot be started")]
    Thread {
        /// Which vCPU.
        vcpu: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// vCPUs did not answer.
    #[error("vCPUs {vcpus:?} did not {what} within {} ms", deadline.as_millis())]
    Deadline {
        /// Which ones.
        vcpus: Vec<u32>,
        /// What they should have done.
        what: &'static str,
        /// How long they had.
        deadline: Duration,
    },
    /// KVM refused something.
    #[error("vCPU {vcpu}")]
    Hypervisor {
        /// Which vCPU.
        vcpu: u32,
        /// What it refused.
        #[source]
        source: HypervisorError,
    },
}

/// One vCPU, in the hands of its thread.
pub struct Vcpu {
    id: u32,
    pub(in crate::hypervisor) fd: VcpuFd,
    /// Registers that this KVM lets one read.
    msrs: Arc<[u32]>,
    /// Bytes of the XSAVE area.
    xsave_bytes: usize,
}

impl Vcpu {
    /// Makes vCPU `id`.
    pub fn new(
        kvm: &Kvm,
        vm: &Vm,
        id: u32,
        cpuid: &CpuId,
        msrs: &Arc<[u32]>,
    ) -> Result<Self, HypervisorError> {
        let fd = vm
            .fd()
            .create_vcpu(id.into())
            .map_err(refused("create a vCPU"))?;
        fd.set_cpuid2(cpuid)
            .map_err(refused("set a vCPU's CPUID"))?;
        let xsave_bytes =
            usize::try_from(kvm.check_extension_int(kvm_ioctls::Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            id,
            fd,
            msrs: Arc::clone(msrs),
            xsave_bytes,
        })
    }

    /// Its number, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The frequency of its time stamp counter, if KVM tells.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok()
    }

    /// Makes the vCPU start a kernel.
    pub fn enter_at(&self, entry: &EntryPoint) -> Result<(), HypervisorError> {
        let sregs = self
            .fd
            .get_sregs()
            .map_err(refused("tell a vCPU's control registers"))?;
        self.fd
            .set_sregs(&entry.sregs(&sregs))
            .map_err(refused("set a vCPU's control registers"))?;
        self.fd
            .set_regs(&entry.regs())
            .map_err(refused("set a vCPU's registers"))
    }

    /// Sets model-specific registers, skipping those that this KVM does not take.
    pub fn set_msrs(&self, msrs: &[(u32, u64)]) -> Result<(), HypervisorError> {
        let entry = |&(index, data): &(u32, u64)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let entries: Vec<_> = msrs.iter().map(entry).collect();
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(256)];
            let list = Msrs::from_entries(chunk).map_err(|_| HypervisorError::InvalidState {
                what: "model-specific registers",
                why: format!("{} of them", chunk.len()),
            })?;
            let set = self
                .fd
                .set_msrs(&list)
                .map_err(refused("set model-specific registers"))?;
            if set < chunk.len() {
                tracing::debug!(
                    vcpu = self.id,
                    msr = format_args!("{:#x}", chunk[set].index),
                    "not settable"
                );
            }
            rest = &rest[(set + usize::from(set < chunk.len()))..];
        }
        Ok(())
    }
}
