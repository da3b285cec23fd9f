//! Opens the queues of a tap interface.
#![expect(unsafe_code, reason = "TUNSETIFF and SIOCSIFFLAGS are ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::resources::ResourceError;

const TUN: &str = "/dev/net/tun";

/// A frame of Ethernet with virtio's header before it, as `godwit-net` wants it.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// An interface request with a name and flags (netdevice(7)).
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zeroes are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    request
}

fn open_queue(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)?;
    let request = request(name, flags);
    // SAFETY: the request is a whole ifreq, which the kernel only reads and writes in place.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// Takes the interface up, as a new one is down.
fn take_up(name: &str) -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut request = request(name, 0);
    // SAFETY: the request is a whole ifreq, and the kernel fills in its flags.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let up = libc::c_short::try_from(libc::IFF_UP).unwrap_or_default();
    // SAFETY: the call before has filled in the flags.
    unsafe { request.ifr_ifru.ifru_flags |= up };
    // SAFETY: as above; the kernel only reads it.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Opens `queues` queues of the tap `name`. One that does not exist is made and taken up; it
/// goes with its last descriptor.
///
/// # Errors
/// It is busy, no tap, of one queue where several are wanted, or may not be used or made.
pub(crate) fn open(name: &str, queues: u32) -> Result<Vec<OwnedFd>, ResourceError> {
    let existed = nix::net::if_::if_nametoindex(name).is_ok();
    let failed = |source: io::Error| ResourceError::Tap {
        name: name.to_owned(),
        advice: advice(name, queues, existed, &source),
        source,
    };
    let single = (queues == 1).then_some(FLAGS);
    let multi = FLAGS | libc::IFF_MULTI_QUEUE;
    // A tap that was made for several queues serves one too, but must be asked for it.
    let (first, flags) = match single.map(|flags| open_queue(name, flags)) {
        Some(Ok(queue)) => (queue, FLAGS),
        Some(Err(error)) if error.raw_os_error() != Some(libc::EINVAL) => {
            return Err(failed(error));
        }
        _ => (open_queue(name, multi).map_err(failed)?, multi),
    };
    let mut opened = vec![first];
    for _ in 1..queues {
        opened.push(open_queue(name, flags).map_err(failed)?);
    }
    if !existed {
        take_up(name).map_err(failed)?;
    }
    Ok(opened)
}

/// What a person can do about it.
fn advice(name: &str, queues: u32, existed: bool, error: &io::Error) -> String {
    let option = if queues > 1 { " multi_queue" } else { "" };
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => {
            format!("{TUN} is missing: load the kernel's tun module or pass the device in")
        }
        Some(Errno::EBUSY) => {
            "another process uses it: stop that process or name another tap".into()
        }
        Some(Errno::EINVAL) => format!(
            "it is no tap of {queues} queues: make it with `ip tuntap add dev {name} mode tap{option}`"
        ),
        Some(Errno::EPERM | Errno::EACCES) if existed => {
            "give it to the broker's user when it is made (`ip tuntap add … user NAME`)".into()
        }
        _ => format!(
            "make it with `ip tuntap add dev {name} mode tap{option} user NAME`, or run the broker with CAP_NET_ADMIN"
        ),
    }
}
