//! `godwit-vfio`: a PCI device that is passed through to a guest, as a vfio-user server.
//!
//! Start reading at [`device`]; the devices that it serves are [`kernel`],
//! one of the host, and [`synthetic`].

mod config;
mod device;
mod kernel;
mod memory;
mod metrics;
mod synthetic;

use std::process::ExitCode;

fn main() -> ExitCode {
    device_kit::run_server::<device::Vfio>()
}
