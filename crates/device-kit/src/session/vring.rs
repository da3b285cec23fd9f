//! What the front-end has said about one ring.

use super::error::SessionError;
use crate::memory::Memory;
use crate::metrics::{Metrics, QueueMetrics};
use crate::queue::{QueueIndex, RingLayout};

/// Ring addresses, as the front-end's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UserAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A ring runs while it is enabled and has addresses and a kick descriptor.
#[derive(Debug)]
pub(super) struct Vring {
    pub(super) index: QueueIndex,
    pub(super) size: u16,
    pub(super) addresses: Option<UserAddresses>,
    /// Next chain to be taken, while it does not run.
    pub(super) base: u16,
    pub(super) enabled: bool,
    /// Looked up with its addresses.
    metrics: Option<QueueMetrics>,
    /// Its thread has a kick descriptor.
    pub(super) kick: bool,
    pub(super) running: bool,
}

impl Vring {
    pub(super) fn new(index: QueueIndex, max_size: u16) -> Self {
        Vring {
            index,
            size: max_size,
            addresses: None,
            base: 0,
            enabled: false,
            metrics: None,
            kick: false,
            running: false,
        }
    }

    /// Whether it is to run.
    pub(super) fn wanted(&self) -> bool {
        self.enabled && self.kick && self.addresses.is_some()
    }

    /// Its counters, which it takes a while to find.
    pub(super) fn metrics(&mut self, all: &Metrics) -> QueueMetrics {
        self.metrics
            .get_or_insert_with(|| all.queue(self.index))
            .clone()
    }

    /// Where it lies in guest memory.
    pub(super) fn layout(
        &self,
        memory: &Memory,
        event_idx: bool,
        indirect: bool,
    ) -> Result<RingLayout, SessionError> {
        let user = self.addresses.unwrap_or(UserAddresses {
            descriptors: 0,
            available: 0,
            used: 0,
        });
        let translate = |part, address| {
            memory.guest_address(address).ok_or(SessionError::Address {
                queue: self.index,
                part,
                address,
            })
        };
        Ok(RingLayout {
            size: self.size,
            descriptors: translate("descriptor table", user.descriptors)?,
            available: translate("available ring", user.available)?,
            used: translate("used ring", user.used)?,
            event_idx,
            indirect,
        })
    }
}
