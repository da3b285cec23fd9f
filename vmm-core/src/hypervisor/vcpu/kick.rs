//! Getting a vCPU out of the guest.
#![expect(
    unsafe_code,
    reason = "signals another thread and sets a flag in a page shared with KVM"
)]

use std::ptr::addr_of_mut;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The signal that interrupts KVM_RUN; its handler does nothing.
const KICK: Signal = Signal::SIGUSR1;
/// How long a napping vCPU does not look whether it is wanted.
const NAP_STEP: Duration = Duration::from_micros(500);

/// Lets the kick signal interrupt system calls instead of ending the process.
pub(super) fn install() -> nix::Result<()> {
    extern "C" fn nothing(_: nix::libc::c_int) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing, which is safe at any point.
    unsafe { sigaction(KICK, &action) }.map(drop)
}

/// What another thread needs to get one vCPU out of the guest.
pub(super) struct Kick {
    wanted: AtomicBool,
    /// Microseconds that the vCPU shall stay out of the guest, once.
    nap: AtomicU64,
    thread: Pthread,
    /// `kvm_run.immediate_exit`. Valid as long as the vCPU's thread lives, which owns the
    /// mapping: [`super::VcpuSet`] kicks for the last time before it lets the thread go.
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is only used for atomic accesses to a byte that outlives this.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// For the calling thread, which runs `vcpu`.
    pub(super) fn for_this_thread(vcpu: &mut VcpuFd) -> Self {
        let immediate_exit = addr_of_mut!(vcpu.get_kvm_run().immediate_exit);
        Self {
            wanted: AtomicBool::new(false),
            nap: AtomicU64::new(0),
            thread: pthread_self(),
            immediate_exit,
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: see the field; the byte is aligned as every byte is.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }

    /// Another thread wants the vCPU out.
    pub(super) fn kick(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        self.get_out();
    }

    /// Another thread wants the vCPU to stay out of the guest for a while.
    pub(super) fn send_to_nap(&self, nap: Duration) {
        let micros = u64::try_from(nap.as_micros()).unwrap_or(u64::MAX);
        self.nap.store(micros, Ordering::SeqCst);
        self.get_out();
    }

    /// The vCPU's thread, out of the guest with nothing half done, takes a nap that was asked
    /// for, and ends it early when it is wanted. What is wanted must be asked afterwards: the
    /// flag that lets a vCPU leave the guest at once is forgotten here.
    pub(super) fn nap(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
        let end = Instant::now() + Duration::from_micros(self.nap.swap(0, Ordering::SeqCst));
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_wanted() {
                return;
            }
            thread::sleep(left.min(NAP_STEP));
        }
    }

    fn get_out(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        // It can only fail for a thread that is gone, which is out.
        let _ = pthread_kill(self.thread, KICK);
    }

    /// The vCPU's thread asks whether it should leave the guest.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Before a paused vCPU is told to run again: forgets a kick that came too late.
    pub(super) fn forget(&self) {
        self.nap.store(0, Ordering::SeqCst);
        self.immediate_exit().store(0, Ordering::SeqCst);
        self.wanted.store(false, Ordering::SeqCst);
    }
}
