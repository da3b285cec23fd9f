//! The loop of one vCPU: enter the guest, serve what it left for.

use std::fmt;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;
use nix::errno::Errno;

use super::kick::Kick;
use super::{Vcpu, VcpuBuses};

/// Why a vCPU does not run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest faulted while it handled a double fault.
    TripleFault {
        /// Where.
        rip: u64,
    },
    /// The processor refused the state that it should enter.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// The host's processor.
        cpu: u32,
    },
    /// KVM gave up.
    Internal {
        /// `kvm_run.internal.suberror`: 1 is an instruction that it cannot emulate.
        suberror: u32,
        /// Where.
        rip: u64,
    },
    /// KVM_RUN itself failed.
    Refused {
        /// With this.
        errno: Errno,
        /// Where.
        rip: u64,
    },
    /// The guest left for something that this program does not know.
    Unknown {
        /// KVM's exit, as text.
        exit: String,
    },
    /// The guest asked for a reset through KVM.
    Reset,
    /// The guest asked to be switched off through KVM.
    PowerOff,
    /// The guest said that it crashed.
    Crash,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault { rip } => write!(f, "triple fault at rip {rip:#x}"),
            Self::FailEntry { reason, cpu } => {
                write!(
                    f,
                    "the processor refused to enter the guest: reason {reason:#x} on host CPU {cpu}"
                )
            }
            Self::Internal { suberror: 1, rip } => {
                write!(f, "KVM cannot emulate the instruction at rip {rip:#x}")
            }
            Self::Internal { suberror, rip } => {
                write!(f, "KVM internal error {suberror} at rip {rip:#x}")
            }
            Self::Refused { errno, rip } => {
                write!(f, "KVM refused to run at rip {rip:#x}: {errno}")
            }
            Self::Unknown { exit } => write!(f, "KVM left the guest for an unknown reason: {exit}"),
            Self::Reset => write!(f, "reset"),
            Self::PowerOff => write!(f, "power off"),
            Self::Crash => write!(f, "the guest reported a crash"),
        }
    }
}

enum Step {
    /// Back into the guest.
    Again,
    /// Out of the guest, nothing left half done.
    Interrupted,
    Ended(Ended),
}

impl Vcpu {
    /// Runs until kicked (`None`) or ended. Afterwards the last access of the guest is
    /// complete and the state can be saved.
    pub(super) fn run(&mut self, kick: &Kick, buses: &VcpuBuses) -> Option<Ended> {
        loop {
            let wanted = kick.is_wanted();
            match self.step(buses) {
                Step::Ended(ended) => return Some(ended),
                // A kick that came before the step completed the last access and let the
                // guest do nothing else.
                Step::Interrupted if wanted || kick.is_wanted() => return None,
                Step::Interrupted | Step::Again => {}
            }
        }
    }

    fn step(&mut self, buses: &VcpuBuses) -> Step {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                buses.ports.write(port.into(), data);
                Step::Again
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                buses.ports.read(port.into(), data);
                Step::Again
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                buses.mmio.read(address, data);
                Step::Again
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                buses.mmio.write(address, data);
                Step::Again
            }
            Ok(VcpuExit::Intr) => Step::Interrupted,
            // After INIT a vCPU's first entry says EAGAIN.
            Err(errno) if errno.errno() == Errno::EINTR as i32 => Step::Interrupted,
            Err(errno) if errno.errno() == Errno::EAGAIN as i32 => Step::Interrupted,
            Ok(VcpuExit::Shutdown) => Step::Ended(Ended::TripleFault { rip: self.rip() }),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Step::Ended(Ended::FailEntry { reason, cpu }),
            Ok(VcpuExit::InternalError) => {
                let suberror = self.suberror();
                Step::Ended(Ended::Internal {
                    suberror,
                    rip: self.rip(),
                })
            }
            Ok(VcpuExit::SystemEvent(event, _)) => Step::Ended(match event {
                KVM_SYSTEM_EVENT_SHUTDOWN => Ended::PowerOff,
                KVM_SYSTEM_EVENT_RESET => Ended::Reset,
                KVM_SYSTEM_EVENT_CRASH => Ended::Crash,
                other => Ended::Unknown {
                    exit: format!("system event {other}"),
                },
            }),
            Ok(exit) => Step::Ended(Ended::Unknown {
                exit: format!("{exit:?}"),
            }),
            Err(errno) => {
                let errno = Errno::from_raw(errno.errno());
                Step::Ended(Ended::Refused {
                    errno,
                    rip: self.rip(),
                })
            }
        }
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }

    fn suberror(&mut self) -> u32 {
        let exit = self.fd.get_kvm_run().__bindgen_anon_1;
        #[expect(
            unsafe_code,
            reason = "reads the field of a union that the exit reason names"
        )]
        // SAFETY: the exit reason was an internal error, so this is the union's field.
        unsafe {
            exit.internal.suberror
        }
    }
}
