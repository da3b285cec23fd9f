//! What can go wrong with a back-end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::remote::EndpointError;

/// Each says which device.
#[derive(Debug, Error)]
pub enum VhostUserError {
    /// The back-end is not reached.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The kernel refused something that needs no back-end.
    #[error("device {device}: cannot {what}")]
    System {
        /// Which device.
        device: String,
        /// A verb phrase.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No answer in time. The connection is given up.
    #[error("device {device}: no answer to {message} within {} ms", deadline.as_millis())]
    Deadline {
        /// Which device.
        device: String,
        /// The message.
        message: &'static str,
        /// The time it had.
        deadline: Duration,
    },
    /// The back-end closed the connection.
    #[error("device {device}: the back-end hung up at {message}")]
    HungUp {
        /// Which device.
        device: String,
        /// The message.
        message: &'static str,
    },
    /// The back-end answered that it will not.
    #[error("device {device}: the back-end refused {message}")]
    Refused {
        /// Which device.
        device: String,
        /// The message.
        message: &'static str,
    },
    /// The back-end answered that it cannot, and why.
    #[error("device {device}: {message} failed: {why}")]
    Declined {
        /// Which device.
        device: String,
        /// The message.
        message: &'static str,
        /// What the back-end says.
        why: String,
    },
    /// An answer that is none. The connection is given up.
    #[error("device {device}: impossible answer to {message}: {what}")]
    Nonsense {
        /// Which device.
        device: String,
        /// The message.
        message: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// There is no back-end now.
    #[error("device {device}: the back-end is away")]
    Away {
        /// Which device.
        device: String,
    },
    /// A back-end that came back was another.
    #[error("device {device}: the back-end came back without features {missing:#x}")]
    FeaturesLost {
        /// Which device.
        device: String,
        /// Bits that the guest was offered.
        missing: u64,
    },
    /// A back-end came back that cannot take the device over.
    #[error("device {device} has no usable back-end any more")]
    Failed {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: Arc<VhostUserError>,
    },
    /// A device of virtio's first version only.
    #[error("device {device}: the back-end does not offer VIRTIO_F_VERSION_1")]
    Legacy {
        /// Which device.
        device: String,
    },
    /// Something is wanted that the back-end does not have.
    #[error("device {device}: the back-end does not offer {what}")]
    Unsupported {
        /// Which device.
        device: String,
        /// What it would take.
        what: &'static str,
    },
    /// Fewer rings than the definition needs.
    #[error("device {device}: {wanted} queues wanted, the back-end serves {offered}")]
    TooFewQueues {
        /// Which device.
        device: String,
        /// Rings that the definition needs.
        wanted: u16,
        /// Rings that the back-end has.
        offered: u64,
    },
    /// A number in the definition that cannot be.
    #[error("device {device}: {what} {value} is not possible, {possible}")]
    Definition {
        /// Which device.
        device: String,
        /// The setting.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What would be.
        possible: String,
    },
    /// The device configuration has to come from somewhere.
    #[error("device {device}: the back-end has no device configuration{hint}")]
    NoConfig {
        /// Which device.
        device: String,
        /// What to do.
        hint: &'static str,
    },
    /// More memory regions than the back-end takes.
    #[error("device {device}: {regions} memory regions, the back-end takes {slots}")]
    TooManyRegions {
        /// Which device.
        device: String,
        /// Regions of the layout.
        regions: usize,
        /// Most it takes.
        slots: usize,
    },
    /// A ring outside of memory.
    #[error("device {device}: ring {queue} has {area} at {address:#x}, where there is no memory")]
    RingOutside {
        /// Which device.
        device: String,
        /// Which ring.
        queue: u16,
        /// Which part.
        area: &'static str,
        /// Guest-physical address.
        address: u64,
    },
    /// State can only be moved while no ring runs.
    #[error("device {device}: rings run; stop it before its state is moved")]
    RingsRun {
        /// Which device.
        device: String,
    },
}

impl VhostUserError {
    /// Whether the connection cannot be used any more.
    pub(super) fn ends_connection(&self) -> bool {
        matches!(
            self,
            Self::Deadline { .. } | Self::HungUp { .. } | Self::Nonsense { .. }
        )
    }

    /// Whether another attempt to connect may end otherwise.
    pub(super) fn may_pass(&self) -> bool {
        self.ends_connection() || matches!(self, Self::System { .. })
    }

    /// Whether waiting for the back-end to come back may help.
    pub(super) fn is_hang_up(&self) -> bool {
        matches!(self, Self::HungUp { .. } | Self::Away { .. })
    }
}
