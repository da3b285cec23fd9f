//! Requests in flight: a buffer in which the back-end notes them, kept here, and given
//! to the next back-end after this one is gone (VU, «Inflight I/O tracking»).

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::VhostUserError;
use super::config::system;
use super::connection::Connection;

/// Far more than the specification's layout needs for any device here.
const MAX_SIZE: u64 = 256 << 20;

/// A back-end's notes.
pub(super) struct Inflight {
    file: File,
    shape: VhostUserInflight,
}

impl Inflight {
    /// GET_INFLIGHT_FD: has the back-end make a buffer for so many rings.
    pub(super) fn get(
        connection: &mut Connection,
        rings: u16,
        queue_size: u16,
    ) -> Result<Self, VhostUserError> {
        const NAME: &str = "GET_INFLIGHT_FD";
        let wanted = VhostUserInflight::new(0, 0, rings, queue_size);
        let (shape, file) = connection.call(NAME, |f| f.get_inflight_fd(&wanted))?;
        let length = file
            .metadata()
            .map_err(|e| system(connection.device(), "look at its inflight buffer", e))?
            .len();
        let end = shape.mmap_offset.checked_add(shape.mmap_size);
        let sound = shape.mmap_size > 0
            && shape.mmap_size <= MAX_SIZE
            && end.is_some_and(|end| end <= length)
            && (shape.num_queues, shape.queue_size) == (rings, queue_size);
        if !sound {
            let what = format!(
                "{} bytes at {} of a file of {length} for {} rings of {}",
                shape.mmap_size, shape.mmap_offset, shape.num_queues, shape.queue_size
            );
            return Err(connection.nonsense(NAME, what));
        }
        Ok(Self { file, shape })
    }

    /// Whether it has room for rings of this shape.
    pub(super) fn fits(&self, rings: u16, queue_size: u16) -> bool {
        (self.shape.num_queues, self.shape.queue_size) == (rings, queue_size)
    }

    /// SET_INFLIGHT_FD: gives it to a back-end.
    pub(super) fn set(&self, connection: &mut Connection) -> Result<(), VhostUserError> {
        connection.call("SET_INFLIGHT_FD", |f| {
            f.set_inflight_fd(&self.shape, self.file.as_raw_fd())
        })
    }
}
