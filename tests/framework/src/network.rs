//! A network of the test's own: a namespace with a tap in it, and a UDP echo service.
//!
//! Nothing of the host's network is seen or changed. No privilege is needed where user
//! namespaces are allowed.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use nix::unistd::{Gid, Uid, geteuid, read};

/// Moves the calling thread, and what it starts from now on, into a network of its own.
/// A process that is not root must do this before it starts its second thread.
pub fn enter() -> Result<()> {
    let (user, group) = (Uid::current(), Gid::current());
    if geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNET).context("this root may not make a network namespace")?;
    } else {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context(
            "this user may not make a network namespace: allow user namespaces \
             (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces), or be root",
        )?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    }
    ip(&["link", "set", "lo", "up"])
}

/// Makes a tap with `queues` queues if more than one, with an address on this side.
pub fn add_tap(name: &str, address: Ipv4Addr, queues: u16) -> Result<()> {
    let mut add = vec!["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"];
    if queues > 1 {
        add.push("multi_queue");
    }
    ip(&add)?;
    ip(&["address", "add", &format!("{address}/24"), "dev", name])?;
    ip(&["link", "set", name, "up"])
}

/// Answers every datagram to `address:port` with itself, as long as the process lives.
pub fn echo(address: Ipv4Addr, port: u16) -> Result<()> {
    let socket = UdpSocket::bind((address, port))
        .with_context(|| format!("no echo service at {address}:{port}"))?;
    thread::spawn(move || {
        let mut bytes = [0; 65536];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            // The sender notices a lost answer.
            let _ = socket.send_to(&bytes[..count], from);
        }
    });
    Ok(())
}

/// The frames that pass in this network, on any interface, from now on.
#[derive(Debug)]
pub struct Frames(OwnedFd);

impl Frames {
    /// Listens.
    pub fn listen() -> Result<Self> {
        let fd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )
        .context("frames cannot be listened to")?;
        Ok(Self(fd))
    }

    /// Waits for a frame that is `wanted`.
    pub fn wait(&self, wanted: impl Fn(&[u8]) -> bool, patience: Duration) -> Result<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut bytes = [0; 65536];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout)? == 0 {
                bail!("no such frame came within {} s", patience.as_secs());
            }
            let count = read(&self.0, &mut bytes)?;
            if wanted(&bytes[..count]) {
                return Ok(bytes[..count].to_vec());
            }
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("ip cannot be started: install iproute2")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("ip {} failed: {}", arguments.join(" "), why.trim());
    }
    Ok(())
}
