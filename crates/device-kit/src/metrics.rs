//! Counters of a device process, in OpenMetrics terms.
//!
//! The kit counts what it does for every device; a device registers its own beside them, under its
//! kind as prefix.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::queue::QueueIndex;

/// Which queue a counter belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueLabel {
    queue: u16,
}

/// Counters of one queue. Cloning gives another handle to the same counters.
#[derive(Clone, Debug, Default)]
pub struct QueueMetrics {
    /// Requests answered.
    pub requests: Counter,
    /// Bytes that the guest received.
    pub bytes_to_guest: Counter,
    /// Bytes that the guest gave.
    pub bytes_from_guest: Counter,
    /// Requests answered with an error.
    pub failed: Counter,
    /// Times that the guest kicked.
    pub kicks: Counter,
    /// Times that the guest was called.
    pub calls: Counter,
    /// Times that the ring was found broken.
    pub broken: Counter,
}

/// Counters of the process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    requests: Family<QueueLabel, Counter>,
    bytes_to_guest: Family<QueueLabel, Counter>,
    bytes_from_guest: Family<QueueLabel, Counter>,
    failed: Family<QueueLabel, Counter>,
    kicks: Family<QueueLabel, Counter>,
    calls: Family<QueueLabel, Counter>,
    broken: Family<QueueLabel, Counter>,
    /// Front-ends served until now.
    pub(crate) sessions: Counter,
    /// Sessions that ended by a front-end's error.
    pub(crate) sessions_failed: Counter,
    /// Bytes of guest memory mapped.
    pub(crate) memory: Gauge,
    /// Saved states written and read.
    pub(crate) states_saved: Counter,
    /// States taken over.
    pub(crate) states_loaded: Counter,
}

impl Metrics {
    /// Registers the kit's counters.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        let m = &metrics;
        let families = [
            ("queue_requests", "Requests answered", &m.requests),
            (
                "queue_to_guest_bytes",
                "Bytes that the guest received",
                &m.bytes_to_guest,
            ),
            (
                "queue_from_guest_bytes",
                "Bytes that the guest gave",
                &m.bytes_from_guest,
            ),
            (
                "queue_failed_requests",
                "Requests answered with an error",
                &m.failed,
            ),
            ("queue_kicks", "Kicks by the guest", &m.kicks),
            ("queue_calls", "Calls to the guest", &m.calls),
            ("queue_broken", "Times a ring was found broken", &m.broken),
        ];
        for (name, help, family) in families {
            registry.register(name, help, family.clone());
        }
        registry.register("sessions", "Front-ends served", m.sessions.clone());
        registry.register(
            "sessions_failed",
            "Sessions ended by an error of the front-end",
            m.sessions_failed.clone(),
        );
        registry.register(
            "guest_memory_mapped_bytes",
            "Guest memory mapped",
            m.memory.clone(),
        );
        registry.register(
            "states_saved",
            "Saved states written",
            m.states_saved.clone(),
        );
        registry.register(
            "states_loaded",
            "Saved states taken over",
            m.states_loaded.clone(),
        );
        metrics
    }

    /// The counters of the process, those of all queues added up, by name.
    pub(crate) fn totals(&self, queues: u16) -> Vec<(&'static str, u64)> {
        let sum = |family: &Family<QueueLabel, Counter>| {
            // A queue that never ran has no counter, and gets none.
            let of = |queue| {
                family
                    .get(&QueueLabel { queue })
                    .map(|counter| counter.get())
            };
            (0..queues).filter_map(of).sum()
        };
        vec![
            ("requests", sum(&self.requests)),
            ("failed_requests", sum(&self.failed)),
            ("bytes_to_guest", sum(&self.bytes_to_guest)),
            ("bytes_from_guest", sum(&self.bytes_from_guest)),
            ("kicks", sum(&self.kicks)),
            ("calls", sum(&self.calls)),
            ("broken_rings", sum(&self.broken)),
            ("sessions", self.sessions.get()),
            ("failed_sessions", self.sessions_failed.get()),
            ("states_saved", self.states_saved.get()),
            ("states_loaded", self.states_loaded.get()),
        ]
    }

    /// The counters of one queue.
    pub(crate) fn queue(&self, queue: QueueIndex) -> QueueMetrics {
        let label = QueueLabel { queue: queue.get() };
        let of = |family: &Family<QueueLabel, Counter>| family.get_or_create(&label).clone();
        QueueMetrics {
            requests: of(&self.requests),
            bytes_to_guest: of(&self.bytes_to_guest),
            bytes_from_guest: of(&self.bytes_from_guest),
            failed: of(&self.failed),
            kicks: of(&self.kicks),
            calls: of(&self.calls),
            broken: of(&self.broken),
        }
    }
}
