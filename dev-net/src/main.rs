//! `godwit-net`: a virtio network card over a tap, as a vhost-user back-end.
//!
//! Start reading at [`device`]; what its threads share is in [`shared`]. A packet's way is
//! [`tap`] → [`rx`] → guest and guest → [`tx`] → [`tap`]; a command's is [`worker`] →
//! [`control`] → [`shared`].

mod announce;
mod config;
mod config_space;
mod control;
mod device;
mod features;
mod filter;
mod mac;
mod metrics;
mod packet;
mod rx;
mod saved_state;
mod shared;
mod tap;
mod tx;
mod worker;

use std::process::ExitCode;

fn main() -> ExitCode {
    device_kit::run::<device::NetDevice>()
}
