//! Moving the machine: RAM, the core's state and the devices' from one core to another.
//!
//! | part | what it is |
//! |---|---|
//! | [`setup`] | what the owner hands over: sockets and options |
//! | [`mod@unit`] | a device as the migration sees it, and a thread for each |
//! | [`barrier`] | the points where everybody waits for everybody, with a deadline |
//! | [`definition`] | what the other side must have too |
//! | [`ram`] | dirty pages, and their way |
//! | [`free_pages`] | pages that need not be sent |
//! | [`saved_state`] | what the core saves |
//! | [`converge`] | when to stop: prediction and throttle |
//! | [`source`] | everything before the stop, on a thread of its own |
//! | [`switchover`] | the blackout, on the machine's main thread |
//! | [`destination`] | the other side |
//! | [`snapshot`] | the same, to files and from them |
//! | [`status`] | what the owner sees of it |
//! | [`without`] | mechanisms left out, for benchmarks |
//!
//! ```text
//! source thread     Hello ─ copy ─ copy ─ … ─ predicted blackout short, ▮A ─┐
//! source main       (serves the machine)                                    └ ▮B ▮C ▮D ▮E commit
//! device threads                                             stop ─ save ─▶ (socket to the twin)
//! destination main  definition ─ wire ahead ─ ▮A …  load core, wait for devices ▮E  start ▮F run
//! ```
//!
//! Order rules, with their reasons:
//! - A device's log is read once more after the device was saved: some write while they save.
//! - A page is cleared in KVM's log before it is read, and a device's log is taken before too:
//!   what is written meanwhile is in the next log.
//! - The core's state is saved after all devices have stopped: their last interrupts are in it.
//!   What is signalled later anyway is signalled again when queues are resumed.
//! - Who may run is decided by [`migration::commit`] and nothing else.

pub mod barrier;
pub mod converge;
pub mod definition;
pub mod destination;
mod error;
pub mod free_pages;
mod obstacles;
mod prediction;
pub mod ram;
pub mod saved_state;
pub mod setup;
pub mod snapshot;
pub mod source;
mod states;
pub mod status;
pub mod switchover;
pub mod unit;
pub mod view;
mod wake;
pub mod without;

use std::time::Duration;

pub use error::MigrationError;

/// How long the other side has for an answer while the guest runs.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// How long the other side has to become ready for the machine.
pub const READY_DEADLINE: Duration = Duration::from_secs(300);
/// How long the source waits between two rounds for the other side to become ready.
pub const READY_STEP: Duration = Duration::from_millis(50);
/// How long any single step of the blackout may take, before it is given up.
pub const BLACKOUT_DEADLINE: Duration = Duration::from_secs(30);
/// How long a memory channel may stand still.
pub const STALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long a side says nothing at most while it copies.
pub const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long the other side has to say why a channel ended at its end.
pub const REASON_DEADLINE: Duration = Duration::from_millis(100);
/// How long the last word is tried to be said when the migration has failed.
pub const LAST_WORD_DEADLINE: Duration = Duration::from_secs(1);
