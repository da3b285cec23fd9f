//! A vhost-user front-end without a guest: it starts a device process, hands it memory, and plays
//! the driver on its rings.
//!
//! ```text
//! DeviceProcess   the program, its socket and its log
//! Connection      the vhost-user messages, with a deadline for every answer
//! GuestRam        memory that both sides map
//! Ring            a virtqueue as its driver sees it
//! Machine         all of it together: start, stop, move, lose and reconnect a device
//! ```
//! It is written from the specification and shares no code with the device kit.

mod connection;
mod machine;
mod process;
mod ram;
mod ring;

pub use connection::Connection;
pub use machine::{Machine, MachineOptions};
pub use process::{DeviceProcess, DeviceSpec};
pub use ram::{DirtyBitmap, GuestRam};
pub use ring::{Buffer, Ring, Used};

use std::time::{Duration, Instant};

/// Nothing that a test waits for takes this long on a machine that works.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `done` gives something.
///
/// # Errors
/// When that takes longer than [`PATIENCE`].
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = done() {
            return Ok(result);
        }
        anyhow::ensure!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
