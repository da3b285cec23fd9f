//! Counters of the device: packets and bytes by queue pair and direction, drops by reason.
//!
//! `rx` is to the guest, `tx` from it, as the guest counts them.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

const REASONS: [Reason; 6] = [
    Reason::Filtered,
    Reason::Offload,
    Reason::Size,
    Reason::Runt,
    Reason::Refused,
    Reason::Stale,
];

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
    /// The driver changed what it takes while the packet waited for buffers.
    Stale,
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

    /// All of them by name, those of all pairs added up.
    pub(crate) fn totals(&self, pairs: u16) -> Vec<(&'static str, u64)> {
        // What was never counted has no counter, and gets none.
        let sum = |family: &Family<Flow, Counter>, direction| {
            let of = |pair| family.get(&Flow { pair, direction }).map(|c| c.get());
            (0..pairs).filter_map(of).sum()
        };
        let dropped = |direction| {
            let all = (0..pairs).flat_map(|pair| REASONS.map(|reason| (pair, reason)));
            let of = |(pair, reason)| {
                let drop = Drop {
                    pair,
                    direction,
                    reason,
                };
                self.drops.get(&drop).map(|c| c.get())
            };
            all.filter_map(of).sum()
        };
        vec![
            ("rx_packets", sum(&self.packets, Direction::Rx)),
            ("rx_bytes", sum(&self.bytes, Direction::Rx)),
            ("rx_dropped", dropped(Direction::Rx)),
            ("tx_packets", sum(&self.packets, Direction::Tx)),
            ("tx_bytes", sum(&self.bytes, Direction::Tx)),
            ("tx_dropped", dropped(Direction::Tx)),
            ("refused_commands", self.refused_commands.get()),
        ]
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
