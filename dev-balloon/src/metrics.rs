//! Counters of the balloon, beside those that the kit has for every queue.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The counters; cloning gives another handle to the same. Pages are of 4 KiB.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    /// Pages that the guest gave.
    pub(crate) inflated: Counter,
    /// Pages that the guest took back.
    pub(crate) deflated: Counter,
    /// Pages that the guest reported as free for now.
    pub(crate) reported: Counter,
    /// Pages marked as not to be moved.
    pub(crate) hinted: Counter,
    /// Hints of a round that was over.
    pub(crate) late_hints: Counter,
    /// Bytes given back to the host.
    pub(crate) returned_bytes: Counter,
    /// Pages named that are no memory.
    pub(crate) no_memory: Counter,
    /// Reports of statistics.
    pub(crate) statistics: Counter,
    /// Times that the host could not take memory back.
    pub(crate) host_errors: Counter,
    /// Bytes in the balloon.
    held: Gauge,
}

impl Metrics {
    /// Registers them.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        for (name, help, counter) in metrics.counters() {
            registry.register(name, help, counter.clone());
        }
        let help = "Bytes in the balloon, as its requests say";
        registry.register("held_bytes", help, metrics.held.clone());
        metrics
    }

    fn counters(&self) -> [(&'static str, &'static str, &Counter); 9] {
        [
            ("inflated_pages", "Pages given", &self.inflated),
            ("deflated_pages", "Pages taken back", &self.deflated),
            ("reported_pages", "Pages reported as free", &self.reported),
            (
                "hinted_pages",
                "Pages marked as not to be moved",
                &self.hinted,
            ),
            (
                "late_hints",
                "Hints of a round that was over",
                &self.late_hints,
            ),
            (
                "returned_bytes",
                "Bytes given back to the host",
                &self.returned_bytes,
            ),
            (
                "no_memory_pages",
                "Pages named that are no memory",
                &self.no_memory,
            ),
            (
                "statistics_reports",
                "Reports of statistics",
                &self.statistics,
            ),
            (
                "host_errors",
                "Times that the host could not take memory back",
                &self.host_errors,
            ),
        ]
    }

    /// The balloon holds so many pages.
    pub(crate) fn set_held(&self, pages: u64) {
        let bytes = pages.saturating_mul(crate::config::PAGE);
        self.held.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// All counters, by name.
    pub(crate) fn totals(&self) -> Vec<(&'static str, u64)> {
        let counters = self.counters().into_iter();
        counters.map(|(name, _, c)| (name, c.get())).collect()
    }
}
