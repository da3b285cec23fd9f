//! Devices in other processes.

pub mod vhost_user;
