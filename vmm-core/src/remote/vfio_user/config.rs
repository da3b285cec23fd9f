//! What a vfio-user device of a machine is.

use std::time::Duration;

use crate::remote::DEFAULT_DEADLINE;

/// A PCI device that another process has.
#[derive(Clone, Debug)]
pub struct VfioUserConfig {
    /// Name in messages; unique in the machine.
    pub id: String,
    /// Time that the process has for an answer.
    pub deadline: Duration,
}

impl VfioUserConfig {
    /// A device of this name.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            deadline: DEFAULT_DEADLINE,
        }
    }
}
