//! `godwit-balloon`: a virtio memory balloon, as a vhost-user back-end.
//!
//! Start reading at [`device`]; a request's way is [`worker`] → [`request`] → the host's memory, or
//! → [`hinting`] → the core. What its threads share is in [`shared`].

mod config;
mod device;
mod hinting;
mod metrics;
mod page_set;
mod request;
mod saved_state;
mod shared;
mod statistics;
mod worker;

use std::process::ExitCode;

fn main() -> ExitCode {
    device_kit::run::<device::BalloonDevice>()
}
