//! `godwit-fault`: a device process that fails, hangs, dies or dawdles on request, at each point of
//! its life.
//!
//! It counts. A request is up to 8 bytes that it reads, a token, and room that it fills with, again
//! and again, the token and a number: the queue's in the highest 16 bits, and below it how many
//! requests of this queue came before. A driver sees a request that was lost, done twice, out of
//! order or mixed up with another. The counters are its saved state, so that a driver also sees a
//! state that was not taken over.
//!
//! Besides them it saves as many bytes as it is told, see [`ballast`].
//!
//! Its virtio type is 63, which no specification has: only the bundled guest drives it. Started
//! without a script it behaves, and passes the conformance suite. See [`script`] for what it can
//! be told.

mod ballast;
mod config;
mod device;
mod saved_state;
mod script;

use std::process::ExitCode;

fn main() -> ExitCode {
    device_kit::run::<device::Counter>()
}
