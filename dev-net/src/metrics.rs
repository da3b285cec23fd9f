//! Counters of the device: packets and bytes by queue pair and direction, drops by reason.
//!
//! `rx` is to the guest, `tx` from it, as the guest counts them.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Direction {
    /// To the guest.
    Rx,
    /// From the guest.
    Tx,
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Reason {
    /// The guest's receive filter does not want it.
    Filtered,
    /// It needs an offload that the driver did not accept.
    Offload,
    /// It does not fit the guest's buffers, or is larger than a packet can be.
    Size,
    /// It has no whole header.
    Runt,
    /// The kernel refused it.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Flow {
    pair: u16,
    direction: Direction,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Drop {
    pair: u16,
    direction: Direction,
    reason: Reason,
}

/// All counters of the device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    packets: Family<Flow, Counter>,
    bytes: Family<Flow, Counter>,
    drops: Family<Drop, Counter>,
    refused_commands: Counter,
}

impl Metrics {
    /// Registers them.
    pub(crate) fn register(registry: &mut Registry) -> Metrics {
        let metrics = Metrics::default();
        registry.register(
            "packets",
            "Packets passed, virtio's segmentation counted as one",
            metrics.packets.clone(),
        );
        registry.register(
            "packet_bytes",
            "Bytes of packets passed, without virtio's header",
            metrics.bytes.clone(),
        );
        registry.register("dropped_packets", "Packets dropped", metrics.drops.clone());
        registry.register(
            "refused_commands",
            "Control commands refused",
            metrics.refused_commands.clone(),
        );
        metrics
    }

    /// The counters of one direction of a pair.
    pub(crate) fn queue(&self, pair: u16, direction: Direction) -> QueueMetrics {
        let flow = Flow { pair, direction };
        QueueMetrics {
            packets: self.packets.get_or_create(&flow).clone(),
            bytes: self.bytes.get_or_create(&flow).clone(),
            drops: self.drops.clone(),
            pair,
            direction,
        }
    }

    /// A control command was refused.
    pub(crate) fn refused_command(&self) {
        self.refused_commands.inc();
    }
}

/// Counters of one direction of a pair.
#[derive(Debug)]
pub(crate) struct QueueMetrics {
    packets: Counter,
    bytes: Counter,
    drops: Family<Drop, Counter>,
    pair: u16,
    direction: Direction,
}

impl QueueMetrics {
    /// A packet of `len` bytes, virtio's header not counted, passed.
    pub(crate) fn passed(&self, len: usize) {
        self.packets.inc();
        self.bytes.inc_by(len as u64);
    }

    /// A packet was dropped.
    pub(crate) fn dropped(&self, reason: Reason) {
        let drop = Drop {
            pair: self.pair,
            direction: self.direction,
            reason,
        };
        self.drops.get_or_create(&drop).inc();
    }
}
