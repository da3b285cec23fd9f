//! vhost-user front-end: a virtio device whose queues another process serves.
//!
//! For any device type and any back-end that keeps to the specification (QEMU,
//! `docs/interop/vhost-user.rst`, «VU» in this module).
//!
//! | part | what it is |
//! |---|---|
//! | `config` | what a device is |
//! | `connection`, `watchdog` | messages, each with a deadline |
//! | `negotiation`, `queues` | features, protocol features, number of rings |
//! | `device_config` | the device configuration, kept here for the guest to read |
//! | `memory`, `rings`, `inflight` | what a back-end needs to serve queues |
//! | `log`, `state` | dirty log and device state, for migration |
//! | `channel`, `monitor` | requests of the back-end, and its going away |
//! | `session`, `shared`, `device` | all of it together |
//! | `reconnect` | a back-end that goes away, and its successor |
//!
//! ```text
//!               hang-up, deadline, nonsense
//!   Connected ─────────────────────────────▶ Disconnected ─┐ retry, or a socket
//!       ▲                                        │  ▲      │ handed over
//!       └────────────────────────────────────────┤  └──────┘
//!           same features, memory and rings set   │ other features
//!                                                 ▼
//!                                              Failed
//! ```
//!
//! What the guest wants (features, enabled queues) is kept apart from the session with
//! the back-end. While there is none the guest sees a pause: an activation is kept, a
//! stop takes ring positions from guest memory, a reconnected back-end is set up from
//! both. Requests in flight survive if the back-end has INFLIGHT_SHMFD.
//!
//! Order of a start: features, memory, log, inflight, then per ring size, base,
//! addresses, call, kick; then all rings are enabled. None of these waits for an answer;
//! one round trip at the end tells that all were taken.

mod channel;
mod config;
mod connection;
mod device;
mod device_config;
mod error;
mod inflight;
mod log;
mod memory;
mod monitor;
mod negotiation;
mod queues;
mod reconnect;
mod rings;
mod session;
mod shared;
mod state;
#[cfg(test)]
mod tests;
mod watchdog;

pub use config::{DEFAULT_QUEUE_SIZE, VhostUserConfig};
pub use device::VhostUserDevice;
pub use error::VhostUserError;
pub use log::DirtyLog;
pub use state::StateDirection;
pub use watchdog::Watchdog;
