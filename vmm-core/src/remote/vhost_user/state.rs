//! Device state, which goes from one back-end to another by a descriptor that both are
//! given (VU, «Migrating back-end state»). Its bytes never pass through this process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

use super::VhostUserError;
use super::connection::Connection;

/// Which way state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDirection {
    /// Out of the back-end.
    Save,
    /// Into the back-end.
    Load,
}

/// SET_DEVICE_STATE_FD. A descriptor that comes back is to be used instead.
pub(super) fn begin(
    connection: &mut Connection,
    direction: StateDirection,
    fd: OwnedFd,
) -> Result<Option<File>, VhostUserError> {
    let direction = match direction {
        StateDirection::Save => VhostTransferStateDirection::SAVE,
        StateDirection::Load => VhostTransferStateDirection::LOAD,
    };
    connection.call("SET_DEVICE_STATE_FD", |f| {
        f.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, fd)
    })
}

/// CHECK_DEVICE_STATE: waits for the end of the transfer, whose time is its own.
pub(super) fn check(connection: &mut Connection, deadline: Duration) -> Result<(), VhostUserError> {
    connection.call_within(deadline, "CHECK_DEVICE_STATE", |f| f.check_device_state())
}
