//! The notification area: a doorbell for each queue, wherever the BAR is.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::queue::Queue;
use crate::interrupt::Doorbells;

/// Bytes between the doorbells of two queues.
pub(super) const MULTIPLIER: u32 = 4;

/// Doorbells that are registered now. Where registration fails, the guest's write comes
/// to this process and rings the same eventfd, only slower.
pub(super) struct DoorbellArea {
    doorbells: Arc<dyn Doorbells>,
    registered: Vec<(u64, EventFd)>,
}

impl DoorbellArea {
    pub(super) fn new(doorbells: Arc<dyn Doorbells>) -> Self {
        Self {
            doorbells,
            registered: Vec::new(),
        }
    }

    /// The area is at guest-physical `base` now, or nowhere.
    pub(super) fn place(&mut self, base: Option<u64>, queues: &[Queue]) {
        for (address, kick) in self.registered.drain(..) {
            if let Err(error) = self.doorbells.unregister(address, &kick) {
                tracing::warn!(%error, address, "a doorbell could not be taken down");
            }
        }
        let Some(base) = base else { return };
        let addresses = (base..).step_by(MULTIPLIER as usize);
        for (address, queue) in addresses.zip(queues) {
            let registered = queue.kick.try_clone().map_err(|e| e.to_string());
            let registered = registered.and_then(|kick| {
                self.doorbells
                    .register(address, &kick)
                    .map_err(|e| e.to_string())?;
                Ok(kick)
            });
            match registered {
                Ok(kick) => self.registered.push((address, kick)),
                Err(error) => {
                    tracing::warn!(%error, address, "a doorbell takes the slow way");
                }
            }
        }
    }
}

impl Drop for DoorbellArea {
    fn drop(&mut self) {
        self.place(None, &[]);
    }
}
