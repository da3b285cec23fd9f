//! The sockets that a device process serves: made at a path, or handed over.
#![expect(unsafe_code, reason = "a descriptor is handed over by its number")]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, UnixAddr, getsockname, getsockopt, sockopt,
};

use crate::device::OptionError;

/// Where front-ends come from.
#[derive(Debug)]
pub(crate) enum Front {
    /// One after the other.
    Listening(UnixListener),
    /// This one, and no other.
    Connected(UnixStream),
}

/// Makes a listening socket. One that a process left behind is replaced; one that a process
/// listens on is not.
pub(crate) fn bind(option: &'static str, path: &Path) -> Result<UnixListener, OptionError> {
    let refuse = |problem: String| OptionError {
        option,
        value: path.display().to_string(),
        problem,
    };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(refuse(
                "exists and is no socket; choose another path or remove it".to_owned(),
            ));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(|error| {
                    refuse(format!(
                        "a socket is left there and cannot be removed: {error}"
                    ))
                })?;
            }
            Ok(_) => {
                return Err(refuse(
                    "another process listens there; stop it or choose another path".to_owned(),
                ));
            }
            Err(error) => {
                return Err(refuse(format!(
                    "a socket is there and cannot be examined: {error}; choose another path"
                )));
            }
        },
        Err(_) => {}
    }
    UnixListener::bind(path).map_err(|error| {
        refuse(format!(
            "cannot listen there: {error}; its folder must exist and be writable, and the path be \
             shorter than 108 bytes"
        ))
    })
}

/// Takes over the descriptor that the option names.
pub(crate) fn inherit(option: &'static str, fd: RawFd) -> Result<Front, OptionError> {
    let refuse = |problem: &str| OptionError {
        option,
        value: fd.to_string(),
        problem: format!("{problem}; hand over a Unix stream socket"),
    };
    let fd = adopt(fd).ok_or_else(|| refuse("is no open descriptor above 2"))?;
    let local = getsockname::<UnixAddr>(fd.as_raw_fd());
    let unix = matches!(&local, Ok(address) if address.family() == Some(AddressFamily::Unix));
    if !unix || getsockopt(&fd, sockopt::SockType) != Ok(SockType::Stream) {
        return Err(refuse("is no Unix stream socket"));
    }
    // It may come from a program that polls it.
    set_blocking(&fd).map_err(|error| refuse(&format!("cannot be made to block: {error}")))?;
    match getsockopt(&fd, sockopt::AcceptConn) {
        Ok(true) => Ok(Front::Listening(fd.into())),
        Ok(false) => Ok(Front::Connected(fd.into())),
        Err(error) => Err(refuse(&format!("cannot be examined: {error}"))),
    }
}

fn set_blocking(fd: &OwnedFd) -> Result<(), Errno> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Makes a descriptor named on the command line this process's own; `None` when it is not open or
/// is one of the standard three. To be called once per number, before threads are started.
pub fn adopt(fd: RawFd) -> Option<OwnedFd> {
    if fd <= 2 {
        return None;
    }
    // SAFETY: the number is only looked up; a closed one is an error and changes nothing.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    if !open {
        return None;
    }
    // SAFETY: it is open, and it was handed over on the command line to be ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    Some(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(bind("--socket-path", &path).unwrap());
        let _listener = bind("--socket-path", &path).unwrap();
        let error = bind("--socket-path", &path).unwrap_err().to_string();
        assert!(error.contains("another process listens there"), "{error}");
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(bind("--socket-path", &path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"data");
        assert!(bind("--socket-path", &folder.path().join("no/such")).is_err());
    }
}
