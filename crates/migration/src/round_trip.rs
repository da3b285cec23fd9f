//! How long a connection takes there and back, by the kernel's own measurement.
#![expect(
    unsafe_code,
    reason = "getsockopt of a structure that no library wraps"
)]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::Duration;

use nix::libc;

/// The smoothed round trip of a TCP connection; zero for whatever is none, which is on this host.
pub(crate) fn of(socket: BorrowedFd<'_>) -> Duration {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes, which the structure has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Duration::ZERO;
    }
    // SAFETY: every bit pattern is one of this structure, and it was zeroed.
    let info = unsafe { info.assume_init() };
    Duration::from_micros(info.tcpi_rtt.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_a_network_takes_time() {
        let (unix, _other) = UnixStream::pair().unwrap();
        assert_eq!(of(unix.as_fd()), Duration::ZERO);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.write_all(&[1]).unwrap();
        far.read_exact(&mut [0]).unwrap();
        assert_ne!(of(near.as_fd()), Duration::ZERO);
    }
}
