//! Where the process of a device is, and how it is reached.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use thiserror::Error;

/// How long the process of a device has for an answer, where the definition does not say.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);

/// Where a back-end is.
#[derive(Debug)]
pub enum Endpoint {
    /// It listens on this socket, and listens again after it was restarted.
    Path(PathBuf),
    /// A connected socket. After a disconnect somebody hands a new one over.
    Connected(OwnedFd),
}

/// Why a process is not reached.
#[derive(Debug, Error)]
pub enum EndpointError {
    /// The socket is not there, or nobody accepts.
    #[error("device {device}: nobody listens on {}; start its back-end first", socket.display())]
    NobodyListens {
        /// Which device.
        device: String,
        /// Where it should be.
        socket: PathBuf,
    },
    /// Another failure to connect.
    #[error("device {device}: cannot connect to {}", socket.display())]
    Connect {
        /// Which device.
        device: String,
        /// Where.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody accepts in time.
    #[error("device {device}: no answer to the connection within {} ms", deadline.as_millis())]
    Deadline {
        /// Which device.
        device: String,
        /// The time it had.
        deadline: Duration,
    },
    /// What was handed over is no connection.
    #[error("device {device}: cannot use the descriptor it was given as a connected socket")]
    NotConnected {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Endpoint {
    /// Connects, within `deadline`; and where to look for the process again, if anywhere.
    pub(super) fn connect(
        self,
        device: &str,
        deadline: Duration,
    ) -> Result<(UnixStream, Option<PathBuf>), EndpointError> {
        match self {
            Self::Path(path) => Ok((connect_to(device, &path, deadline)?, Some(path))),
            Self::Connected(fd) => Ok((adopt(device, fd)?, None)),
        }
    }
}

/// Connects to a listening socket within `deadline`, however full its backlog is.
pub(super) fn connect_to(
    device: &str,
    path: &Path,
    deadline: Duration,
) -> Result<UnixStream, EndpointError> {
    let failed = |errno: Errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => EndpointError::NobodyListens {
            device: device.into(),
            socket: path.into(),
        },
        errno => EndpointError::Connect {
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
                    .map_err(|source| EndpointError::Connect {
                        device: device.into(),
                        socket: path.into(),
                        source,
                    });
            }
            Err(Errno::EAGAIN) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            Err(Errno::EAGAIN) => {
                return Err(EndpointError::Deadline {
                    device: device.into(),
                    deadline,
                });
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Takes a connected socket over that was handed to this process.
pub(super) fn adopt(device: &str, fd: OwnedFd) -> Result<UnixStream, EndpointError> {
    let stream = UnixStream::from(fd);
    stream
        .peer_addr()
        .and_then(|_| stream.set_nonblocking(false))
        .map(|()| stream)
        .map_err(|source| EndpointError::NotConnected {
            device: device.into(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

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
