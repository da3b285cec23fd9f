//! Counters of what a front-end asks of the device, and of what the device does.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The counters; cloning gives another handle to the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    /// Reads and writes of regions that are not mapped.
    pub(crate) requests: Counter,
    /// Those that failed.
    pub(crate) failed: Counter,
    /// Bytes that were read.
    pub(crate) bytes_to_guest: Counter,
    /// Bytes that were written.
    pub(crate) bytes_from_guest: Counter,
    /// Front-ends served until now.
    pub(crate) sessions: Counter,
    /// Sessions that ended by an error.
    pub(crate) failed_sessions: Counter,
    /// Resets.
    pub(crate) resets: Counter,
    /// Times that memory was given to the device.
    pub(crate) dma_maps: Counter,
    /// Bytes that a synthetic device copied.
    pub(crate) copied_bytes: Counter,
    /// Interrupts that a synthetic device raised.
    pub(crate) interrupts: Counter,
    /// Bytes of memory that the device may access now.
    pub(crate) dma_bytes: Gauge,
}

impl Metrics {
    /// Registers them.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        for (name, help, counter) in metrics.counters() {
            registry.register(name, help, counter.clone());
        }
        let help = "Memory that the device may access";
        registry.register("dma_mapped_bytes", help, metrics.dma_bytes.clone());
        metrics
    }

    fn counters(&self) -> [(&'static str, &'static str, &Counter); 10] {
        [
            ("requests", "Accesses to regions", &self.requests),
            (
                "failed_requests",
                "Accesses to regions that failed",
                &self.failed,
            ),
            (
                "bytes_to_guest",
                "Bytes read from regions",
                &self.bytes_to_guest,
            ),
            (
                "bytes_from_guest",
                "Bytes written to regions",
                &self.bytes_from_guest,
            ),
            ("sessions", "Front-ends served", &self.sessions),
            (
                "failed_sessions",
                "Sessions ended by an error",
                &self.failed_sessions,
            ),
            ("resets", "Resets of the device", &self.resets),
            (
                "dma_maps",
                "Times that memory was given to the device",
                &self.dma_maps,
            ),
            (
                "copied_bytes",
                "Bytes that the synthetic device copied",
                &self.copied_bytes,
            ),
            (
                "interrupts",
                "Interrupts that the synthetic device raised",
                &self.interrupts,
            ),
        ]
    }

    /// All counters, by name.
    pub(crate) fn totals(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters()
            .into_iter()
            .map(|(name, _, counter)| (name, counter.get()))
    }
}
