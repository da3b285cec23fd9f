//! `godwit-blk`: a virtio block device over a raw image, as a vhost-user back-end.
//!
//! Start reading at [`device`]; a request's way is `engine` → `request` → io_uring → `engine`.

mod config;
mod device;
mod engine;
mod image;
mod metrics;
mod request;
mod saved_state;
mod uring;

use std::process::ExitCode;

fn main() -> ExitCode {
    device_kit::run::<device::Blk>()
}
