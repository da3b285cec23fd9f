//! What a device is, and how its back-end is reached.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::VhostUserError;
use crate::transport::{DeviceKind, MAX_QUEUES};

/// Descriptors of a queue, where the definition does not say.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// How long a back-end has for an answer, where the definition does not say.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);

/// Largest split ring (virtio 1.3, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

/// Where a back-end is.
#[derive(Debug)]
pub enum Endpoint {
    /// It listens on this socket, and listens again after it was restarted.
    Path(PathBuf),
    /// A connected socket. After a disconnect somebody hands a new one over.
    Connected(OwnedFd),
}

/// What a vhost-user device of a machine is.
#[derive(Clone, Debug)]
pub struct VhostUserConfig {
    /// Device type.
    pub kind: DeviceKind,
    /// Name in messages; unique in the machine.
    pub id: String,
    /// Queues: pairs for net, request queues for blk, scsi, fs and crypto. What the
    /// back-end has, if not said.
    pub queues: Option<u16>,
    /// Descriptors of each queue: a power of two.
    pub queue_size: u16,
    /// Time that the back-end has for an answer.
    pub deadline: Duration,
    /// Network address, for a net back-end without a device configuration.
    pub mac: Option<[u8; 6]>,
    /// Name of the file system, for an fs back-end without a device configuration.
    pub tag: Option<String>,
    /// Bytes of device configuration, for types that this program does not know.
    pub config_size: Option<u16>,
}

impl VhostUserConfig {
    /// A device with everything optional left to the back-end.
    pub fn new(kind: DeviceKind, id: impl Into<String>) -> Self {
        Self {
            kind,
            id: id.into(),
            queues: None,
            queue_size: DEFAULT_QUEUE_SIZE,
            deadline: DEFAULT_DEADLINE,
            mac: None,
            tag: None,
            config_size: None,
        }
    }

    /// Whether the numbers can be.
    pub(super) fn check(&self) -> Result<(), VhostUserError> {
        let wrong = |what, value, possible: String| VhostUserError::Definition {
            device: self.id.clone(),
            what,
            value,
            possible,
        };
        if !self.queue_size.is_power_of_two() || self.queue_size > MAX_QUEUE_SIZE {
            let possible = format!("a power of two up to {MAX_QUEUE_SIZE} is");
            return Err(wrong("queue size", self.queue_size.into(), possible));
        }
        if let Some(queues) = self.queues
            && !(1..=MAX_QUEUES / 2).contains(&queues)
        {
            let possible = format!("1 to {} are", MAX_QUEUES / 2);
            return Err(wrong("number of queues", queues.into(), possible));
        }
        if let Some(size) = self.config_size
            && size > 3840
        {
            return Err(wrong(
                "configuration size",
                size.into(),
                "up to 3840 is".into(),
            ));
        }
        if let Some(tag) = &self.tag
            && (tag.is_empty() || tag.len() > 36)
        {
            let possible = "1 to 36 bytes are".into();
            return Err(wrong("length of the tag", tag.len() as u64, possible));
        }
        Ok(())
    }
}

/// Connects to a listening socket within `deadline`, however full its backlog is.
pub(super) fn connect_to(
    device: &str,
    path: &Path,
    deadline: Duration,
) -> Result<UnixStream, VhostUserError> {
    let failed = |errno: Errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => VhostUserError::NobodyListens {
            device: device.into(),
            socket: path.into(),
        },
        errno => VhostUserError::Connect {
            device: device.into(),
            socket: path.into(),
            source: errno.into(),
        },
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let end = Instant::now() + deadline;
    loop {
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                let blocking = stream.set_nonblocking(false);
                return blocking
                    .map(|()| stream)
                    .map_err(|source| system(device, "use its socket", source));
            }
            Err(Errno::EAGAIN) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            Err(Errno::EAGAIN) => {
                return Err(VhostUserError::Deadline {
                    device: device.into(),
                    message: "the connection",
                    deadline,
                });
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Takes a connected socket over that was handed to this process.
pub(super) fn adopt(device: &str, fd: OwnedFd) -> Result<UnixStream, VhostUserError> {
    let stream = UnixStream::from(fd);
    stream
        .peer_addr()
        .and_then(|_| stream.set_nonblocking(false))
        .map(|()| stream)
        .map_err(|source| {
            system(
                device,
                "use the descriptor it was given as a connected socket",
                source,
            )
        })
}

pub(super) fn system(device: &str, what: &'static str, source: io::Error) -> VhostUserError {
    VhostUserError::System {
        device: device.into(),
        what,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VhostUserConfig {
        VhostUserConfig::new(DeviceKind::BLK, "disk0")
    }

    #[test]
    fn numbers_are_checked() {
        config().check().unwrap();
        let mut wrong = config();
        wrong.queue_size = 100;
        assert_eq!(
            wrong.check().unwrap_err().to_string(),
            "device disk0: queue size 100 is not possible, a power of two up to 32768 is"
        );
        for queues in [0, 65] {
            let mut wrong = config();
            wrong.queues = Some(queues);
            assert!(wrong.check().is_err(), "{queues}");
        }
        let mut wrong = config();
        wrong.tag = Some("x".repeat(37));
        assert!(wrong.check().is_err());
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gone.sock");
        let expected = format!(
            "device disk0: nobody listens on {}; start its back-end first",
            path.display()
        );
        let connect = || {
            connect_to("disk0", &path, DEFAULT_DEADLINE)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(connect(), expected);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert_eq!(connect(), expected, "a socket file that was left behind");
    }

    #[test]
    fn a_full_backlog_ends_at_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("full.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut accepted = Vec::new();
        let refused = loop {
            match connect_to("disk0", &path, Duration::from_millis(30)) {
                Ok(stream) => accepted.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(
            refused.to_string(),
            "device disk0: no answer to the connection within 30 ms"
        );
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(adopt("disk0", file.into()).is_err());
    }
}
