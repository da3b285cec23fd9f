//! Counters of the block device, beside those that the kit has for every queue.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: Operation,
}

/// The counters; cloning gives another handle to the same.
#[derive(Clone, Debug)]
pub(crate) struct BlkMetrics {
    operations: [Counter; 7],
    /// I/O errors of the host, each of which failed a request.
    pub(crate) host_errors: Counter,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Read,
    Operation::Write,
    Operation::Flush,
    Operation::Discard,
    Operation::WriteZeroes,
    Operation::GetId,
    Operation::Unknown,
];

impl BlkMetrics {
    /// Registers them.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let family = Family::<OperationLabel, Counter>::default();
        registry.register("operations", "Requests taken, by operation", family.clone());
        let host_errors = Counter::default();
        registry.register("host_errors", "I/O errors of the host", host_errors.clone());
        BlkMetrics {
            operations: OPERATIONS
                .map(|operation| family.get_or_create(&OperationLabel { operation }).clone()),
            host_errors,
        }
    }

    /// All of them, by name.
    pub(crate) fn totals(&self) -> Vec<(&'static str, u64)> {
        let operations = OPERATIONS.map(|operation| {
            let name = match operation {
                Operation::Read => "reads",
                Operation::Write => "writes",
                Operation::Flush => "flushes",
                Operation::Discard => "discards",
                Operation::WriteZeroes => "zeroed_ranges",
                Operation::GetId => "id_requests",
                Operation::Unknown => "unknown_requests",
            };
            (name, self.operations[operation as usize].get())
        });
        let errors = ("host_errors", self.host_errors.get());
        operations.into_iter().chain([errors]).collect()
    }

    /// A request was taken.
    pub(crate) fn count(&self, operation: Operation) {
        self.operations[operation as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_has_its_own_counter() {
        for (at, operation) in OPERATIONS.into_iter().enumerate() {
            assert_eq!(operation as usize, at);
        }
    }
}
