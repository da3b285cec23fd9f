//! Devices in other processes.

pub mod device1;
pub mod vhost_user;
