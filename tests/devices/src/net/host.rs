//! The host's side of the card: a network namespace of the test's own, with a tap in it.
//!
//! The namespace belongs to the thread that makes it and to the processes that the thread starts;
//! the machine's own network is never touched.
#![expect(unsafe_code, reason = "ioctls of a tap and packet sockets")]

use std::fs::{self, File};
use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

mod raw {
    nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_write_ptr_bad!(tunsetqueue, libc::TUNSETQUEUE, libc::ifreq);
    nix::ioctl_write_ptr_bad!(siocsifflags, libc::SIOCSIFFLAGS, libc::ifreq);
    nix::ioctl_write_ptr_bad!(siocsifaddr, libc::SIOCSIFADDR, libc::ifreq);
}

/// The protocol of the test's own frames: IEEE's "local experimental".
pub(super) const ETHERTYPE: u16 = 0x88b5;

/// Name of the tap.
pub(super) const TAP: &str = "card";

/// The namespace, its tap, and a socket for frames of [`ETHERTYPE`].
pub(super) struct Host {
    /// A queue of the tap that takes no packets: it keeps the tap there, with its carrier.
    _keeper: OwnedFd,
    frames: OwnedFd,
    interface: i32,
}

impl Host {
    /// Takes the calling thread to a namespace of its own and makes a tap of several queues.
    pub(super) fn new() -> Result<Host> {
        unshare(CloneFlags::CLONE_NEWNET)
            .context("a network namespace is needed: run the tests as root (CAP_SYS_ADMIN)")?;
        // The kernel's own chatter would fill receive buffers.
        let quiet = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
        if fs::exists(quiet)? {
            fs::write(quiet, "1").with_context(|| quiet.to_owned())?;
        }
        let keeper = make_tap(TAP, libc::IFF_MULTI_QUEUE)?;
        take_up(TAP)?;
        let detach = request("", libc::IFF_DETACH_QUEUE)?;
        // SAFETY: a live descriptor and a whole request.
        unsafe { raw::tunsetqueue(keeper.as_raw_fd(), &raw const detach) }?;
        let interface = i32::try_from(nix::net::if_::if_nametoindex(TAP)?)?;
        Ok(Host {
            _keeper: keeper,
            frames: packet_socket(interface)?,
            interface,
        })
    }

    /// Sends a frame to the guest.
    pub(super) fn send(&self, frame: &[u8]) -> Result<()> {
        let address = link_address(self.interface)?;
        // SAFETY: the buffers live through the call and have the lengths that are given.
        let sent = unsafe {
            libc::sendto(
                self.frames.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?,
            )
        };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        ensure!(sent == frame.len(), "{sent} bytes of a frame were sent");
        Ok(())
    }

    /// The next frame from the guest; `None` when none comes within `patience`.
    pub(super) fn receive(&self, patience: Duration) -> Result<Option<Vec<u8>>> {
        let mut fd = libc::pollfd {
            fd: self.frames.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one live entry.
        let ready = unsafe { libc::poll(&raw mut fd, 1, i32::try_from(patience.as_millis())?) };
        if ready == 0 {
            return Ok(None);
        }
        let mut frame = vec![0; 70_000];
        let len = nix::unistd::read(&self.frames, &mut frame)?;
        frame.truncate(len);
        Ok(Some(frame))
    }

    /// Gives the host's end of the card an address.
    pub(super) fn set_address(&self, address: Ipv4Addr) -> Result<()> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        let mut request = request(TAP, 0)?;
        let internet = libc::sockaddr_in {
            sin_family: libc::sa_family_t::try_from(libc::AF_INET)?,
            sin_port: 0,
            sin_addr: libc::in_addr {
                s_addr: u32::from_ne_bytes(address.octets()),
            },
            sin_zero: [0; 8],
        };
        // SAFETY: both are plain C structs of the same size, made to be read as each other.
        request.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(internet) };
        // SAFETY: a live descriptor and a whole request.
        unsafe { raw::siocsifaddr(socket.as_raw_fd(), &raw const request) }?;
        Ok(())
    }
}

/// Opens a queue of a new or an existing tap.
pub(super) fn make_tap(name: &str, more_flags: i32) -> Result<OwnedFd> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("/dev/net/tun is needed: load the tun module and run the tests as root")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more_flags;
    let request = request(name, flags)?;
    // SAFETY: a live descriptor and a whole request.
    unsafe { raw::tunsetiff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}

/// Takes an interface up.
pub(super) fn take_up(name: &str) -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let request = request(name, libc::IFF_UP)?;
    // SAFETY: a live descriptor and a whole request.
    unsafe { raw::siocsifflags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}

fn request(name: &str, flags: i32) -> Result<libc::ifreq> {
    // SAFETY: all bytes zero is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags)?;
    Ok(request)
}

fn packet_socket(interface: i32) -> Result<OwnedFd> {
    let protocol = i32::from(ETHERTYPE.to_be());
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, protocol) };
    ensure!(fd >= 0, "no packet socket: {}", io::Error::last_os_error());
    // SAFETY: it was just made and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = link_address(interface)?;
    // SAFETY: the address lives through the call and has the length that is given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?,
        )
    };
    ensure!(bound == 0, "bind: {}", io::Error::last_os_error());
    Ok(socket)
}

fn link_address(interface: i32) -> Result<libc::sockaddr_ll> {
    // SAFETY: all bytes zero is a valid value of this plain C struct.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    address.sll_protocol = ETHERTYPE.to_be();
    address.sll_ifindex = interface;
    Ok(address)
}
