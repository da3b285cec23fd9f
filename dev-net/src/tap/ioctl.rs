//! The ioctls of /dev/net/tun and of a network interface (linux/if_tun.h, netdevice(7)).

use std::ffi::{c_int, c_short, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::features::Offloads;

mod raw {
    nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_read_bad!(tungetiff, libc::TUNGETIFF, libc::ifreq);
    nix::ioctl_write_ptr_bad!(tunsetqueue, libc::TUNSETQUEUE, libc::ifreq);
    nix::ioctl_write_int_bad!(tunsetoffload, libc::TUNSETOFFLOAD);
    nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, libc::TUNSETVNETHDRSZ, libc::c_int);
    nix::ioctl_write_ptr_bad!(tunsetvnetle, libc::TUNSETVNETLE, libc::c_int);
    nix::ioctl_read_bad!(siocgifflags, libc::SIOCGIFFLAGS, libc::ifreq);
    nix::ioctl_write_ptr_bad!(siocsifflags, libc::SIOCSIFFLAGS, libc::ifreq);
    nix::ioctl_write_ptr_bad!(siocsifmtu, libc::SIOCSIFMTU, libc::ifreq);
}

/// Those that are made while the guest runs.
pub(crate) const IOCTLS: [u32; 3] = [
    request_number(libc::TUNSETOFFLOAD),
    request_number(libc::TUNSETVNETHDRSZ),
    request_number(libc::TUNSETQUEUE),
];

#[expect(
    clippy::cast_possible_truncation,
    reason = "ioctl numbers have 32 bits"
)]
const fn request_number(request: libc::Ioctl) -> u32 {
    request as u32
}

/// Most bytes of an interface's name.
pub(super) const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// What a queue is to be, and what it is: `IFF_` flags.
pub(super) type Flags = c_int;

/// A request about the interface `name`, which is at most [`MAX_NAME`] bytes long.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: all bytes zero is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(MAX_NAME).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

fn request_with_flags(name: &str, flags: Flags) -> io::Result<libc::ifreq> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        c_short::try_from(flags).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(request)
}

fn flags_of(request: &libc::ifreq) -> Flags {
    // SAFETY: the kernel filled this member of the union, and any bit pattern is valid for it.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // The flags are 16 bits without a sign.
    Flags::from(u16::from_ne_bytes(flags.to_ne_bytes()))
}

/// Makes `fd`, just opened from /dev/net/tun, a queue of the tap `name`.
pub(super) fn set_interface(fd: BorrowedFd<'_>, name: &str, flags: Flags) -> io::Result<()> {
    let request = request_with_flags(name, flags)?;
    // SAFETY: a live descriptor and a whole request; the kernel writes the name back at most.
    unsafe { raw::tunsetiff(fd.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// The name and the flags of the tap that `fd` is a queue of.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, Flags)> {
    let mut request = request("");
    // SAFETY: a live descriptor and a whole request to be filled.
    unsafe { raw::tungetiff(fd.as_raw_fd(), &raw mut request) }?;
    let name = request
        .ifr_name
        .iter()
        .map(|byte| byte.to_ne_bytes()[0])
        .take_while(|byte| *byte != 0)
        .collect::<Vec<_>>();
    Ok((
        String::from_utf8_lossy(&name).into_owned(),
        flags_of(&request),
    ))
}

/// Attaches or detaches a queue.
pub(super) fn set_queue_attached(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let request = request_with_flags("", flag)?;
    // SAFETY: a live descriptor and a whole request.
    unsafe { raw::tunsetqueue(fd.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// Sets what the reader of the tap's packets does itself.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let table = [
        (Offloads::CSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::ECN, libc::TUN_F_TSO_ECN),
        (Offloads::USO4, libc::TUN_F_USO4),
        (Offloads::USO6, libc::TUN_F_USO6),
    ];
    let flags = table
        .into_iter()
        .filter(|(offload, _)| offloads.contains(*offload))
        .fold(0, |all: c_uint, (_, flag)| all | flag);
    // SAFETY: a live descriptor; the argument is a number.
    unsafe { raw::tunsetoffload(fd.as_raw_fd(), flags.cast_signed()) }?;
    Ok(())
}

/// Sets the bytes of the virtio header.
pub(super) fn set_header_len(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = c_int::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a live descriptor and a number that outlives the call.
    unsafe { raw::tunsetvnethdrsz(fd.as_raw_fd(), &raw const len) }?;
    Ok(())
}

/// The virtio header is little-endian.
pub(super) fn set_little_endian(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: as above.
    unsafe { raw::tunsetvnetle(fd.as_raw_fd(), &raw const on) }?;
    Ok(())
}

/// Whether the interface is up.
pub(super) fn is_up(name: &str) -> io::Result<bool> {
    let socket = any_socket()?;
    let mut request = request(name);
    // SAFETY: a live descriptor and a whole request.
    unsafe { raw::siocgifflags(socket.as_raw_fd(), &raw mut request) }?;
    Ok(flags_of(&request) & libc::IFF_UP != 0)
}

/// Takes an interface up that was just made, with this MTU.
pub(super) fn take_up(name: &str, mtu: Option<u16>) -> io::Result<()> {
    let socket = any_socket()?;
    if let Some(mtu) = mtu {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = c_int::from(mtu);
        // SAFETY: as above.
        unsafe { raw::siocsifmtu(socket.as_raw_fd(), &raw const request) }?;
    }
    let request = request_with_flags(name, libc::IFF_UP)?;
    // SAFETY: as above.
    unsafe { raw::siocsifflags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}

fn any_socket() -> io::Result<std::os::fd::OwnedFd> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}
