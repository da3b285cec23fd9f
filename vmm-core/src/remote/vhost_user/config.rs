//! What a device is.

use std::io;
use std::time::Duration;

use super::VhostUserError;
use crate::remote::DEFAULT_DEADLINE;
use crate::transport::{DeviceKind, MAX_QUEUES};

/// Descriptors of a queue, where the definition does not say.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;

/// Largest split ring (virtio 1.3, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

/// What a vhost-user device of a machine is.
#[derive(Clone, Debug)]
pub struct VhostUserConfig {
    /// Device type.
    pub kind: DeviceKind,
    /// Name in messages; unique in the machine.
    pub id: String,
    /// Queues: pairs for net, request queues for blk, scsi, fs and crypto. What the
    /// back-end has, if not said.
    pub queues: Option<u16>,
    /// Descriptors of each queue: a power of two.
    pub queue_size: u16,
    /// Time that the back-end has for an answer.
    pub deadline: Duration,
    /// Network address, for a net back-end without a device configuration.
    pub mac: Option<[u8; 6]>,
    /// Name of the file system, for an fs back-end without a device configuration.
    pub tag: Option<String>,
    /// Bytes of device configuration, for types that this program does not know.
    pub config_size: Option<u16>,
}

impl VhostUserConfig {
    /// A device with everything optional left to the back-end.
    pub fn new(kind: DeviceKind, id: impl Into<String>) -> Self {
        Self {
            kind,
            id: id.into(),
            queues: None,
            queue_size: DEFAULT_QUEUE_SIZE,
            deadline: DEFAULT_DEADLINE,
            mac: None,
            tag: None,
            config_size: None,
        }
    }

    /// Whether the numbers can be.
    pub(super) fn check(&self) -> Result<(), VhostUserError> {
        let wrong = |what, value, possible: String| VhostUserError::Definition {
            device: self.id.clone(),
            what,
            value,
            possible,
        };
        if !self.queue_size.is_power_of_two() || self.queue_size > MAX_QUEUE_SIZE {
            let possible = format!("a power of two up to {MAX_QUEUE_SIZE} is");
            return Err(wrong("queue size", self.queue_size.into(), possible));
        }
        if let Some(queues) = self.queues
            && !(1..=MAX_QUEUES / 2).contains(&queues)
        {
            let possible = format!("1 to {} are", MAX_QUEUES / 2);
            return Err(wrong("number of queues", queues.into(), possible));
        }
        if let Some(size) = self.config_size
            && size > 3840
        {
            return Err(wrong(
                "configuration size",
                size.into(),
                "up to 3840 is".into(),
            ));
        }
        if let Some(tag) = &self.tag
            && (tag.is_empty() || tag.len() > 36)
        {
            let possible = "1 to 36 bytes are".into();
            return Err(wrong("length of the tag", tag.len() as u64, possible));
        }
        Ok(())
    }
}

pub(super) fn system(device: &str, what: &'static str, source: io::Error) -> VhostUserError {
    VhostUserError::System {
        device: device.into(),
        what,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VhostUserConfig {
        VhostUserConfig::new(DeviceKind::BLK, "disk0")
    }

    #[test]
    fn numbers_are_checked() {
        config().check().unwrap();
        let mut wrong = config();
        wrong.queue_size = 100;
        assert_eq!(
            wrong.check().unwrap_err().to_string(),
            "device disk0: queue size 100 is not possible, a power of two up to 32768 is"
        );
        for queues in [0, 65] {
            let mut wrong = config();
            wrong.queues = Some(queues);
            assert!(wrong.check().is_err(), "{queues}");
        }
        let mut wrong = config();
        wrong.tag = Some("x".repeat(37));
        assert!(wrong.check().is_err());
    }
}
