//! What every Godwit device process stands on.
//!
//! A `dev-*` implements [`Device`] and [`Worker`], and calls [`run`]; the kit brings the socket, the
//! vhost-user protocol, rings, dirty log, in-flight record, prefaulting, state streams, sandbox,
//! metrics, control link and readiness. Start reading at [`device`].

pub mod device;
mod ending;
mod features;
mod health;
mod link;
mod listen;
pub mod memory;
pub mod metrics;
mod metrics_server;
mod options;
mod program;
pub mod queue;
mod queue_thread;
mod queue_threads;
mod readiness;
mod sandbox;
mod session;

pub use api::Error as LinkError;
pub use api::balloon1::{BalloonProcess, Status as BalloonStatus};
pub use device::{
    Announcer, Assignment, BulkState, Capabilities, ConfigError, ConfigWriter, Device, Forecast,
    HostError, Interest, Keepsake, Kit, MAX_KEPT, MAX_QUEUE_SIZE, MAX_QUEUES, OptionError,
    Progress, Queues, Source, StateError, Worker, WorkerError,
};
pub use health::Health;
pub use listen::adopt;
pub use program::run;
pub use queue::{Chain, Kept, Queue, QueueError, QueueFault, QueueIndex};
pub use session::ConfigChange;
