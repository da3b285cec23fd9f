//! What every Godwit device process stands on.
//!
//! A `dev-*` implements [`Device`] and [`Worker`], and calls [`run`]; the kit brings the socket, the
//! vhost-user protocol, rings, dirty log, in-flight record, prefaulting, state streams, sandbox,
//! metrics, control link and readiness. Start reading at [`device`].
//!
//! A device that is served over another protocol implements [`Server`] instead, and calls
//! [`run_server`]: it has socket, sandbox, metrics, control link and readiness, and nothing of virtio.

pub mod device;
mod ending;
mod features;
mod front;
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
mod server;
mod session;

pub use api::Error as LinkError;
pub use api::balloon1::{BalloonProcess, Status as BalloonStatus};
pub use api::device1::{DeviceProcess, Identity, Prefault, Status};
pub use device::{
    Announcer, Assignment, BulkState, Capabilities, ConfigError, ConfigWriter, Device, Forecast,
    HostError, Interest, Keepsake, Kit, MAX_KEPT, MAX_QUEUE_SIZE, MAX_QUEUES, OptionError,
    Progress, Queues, Source, StateError, Worker, WorkerError,
};
pub use ending::chain;
pub use health::{Health, Standing};
pub use listen::adopt;
pub use program::run_server;
pub use queue::{Chain, Kept, Queue, QueueError, QueueFault, QueueIndex};
pub use server::{Lent, OpenError, ServeResult, Server};
pub use session::{ConfigChange, run};
