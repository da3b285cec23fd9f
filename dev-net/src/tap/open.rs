//! Opens a tap by its name, or takes over queues that somebody opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;

use super::{MAX_PAIRS, Tap, TapQueue, ioctl};
use crate::features::Offloads;
use crate::packet::HEADER_LEN;

const TUN: &str = "/dev/net/tun";

/// A frame of Ethernet, no header of the kernel's own, and virtio's before it.
const QUEUE_FLAGS: ioctl::Flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A tap that cannot be used; what a person can do about it.
#[derive(Debug, Error)]
pub(crate) enum TapError {
    /// No interface can have this name.
    #[error("not an interface name; write 1 to {max} characters without '/', ':' or blanks", max = ioctl::MAX_NAME)]
    Name,
    /// The kernel has no tun driver here.
    #[error("{TUN} is missing; load the kernel's tun module or pass the device into the container")]
    NoTun,
    /// /dev/net/tun cannot be opened.
    #[error("cannot open {TUN} ({0}); run as a user who may, or hand over an open tap by --tap-fd")]
    Tun(Errno),
    /// There is no such interface, and this user cannot make one.
    #[error(
        "no such interface, and no permission to make it; make it with \
         `ip tuntap add dev {name} mode tap{option} user $USER`, or run with CAP_NET_ADMIN",
        option = if *multi { " multi_queue" } else { "" }
    )]
    Missing {
        /// Its name.
        name: String,
        /// Several queues are wanted.
        multi: bool,
    },
    /// It belongs to someone else.
    #[error(
        "no permission to use this tap; give it to this user when it is made (`ip tuntap add … user $USER`)"
    )]
    NotPermitted,
    /// Another process has it.
    #[error("busy: another process uses this tap; stop that process or name another tap")]
    Busy,
    /// It was made for one queue.
    #[error(
        "a tap of one queue, {pairs} queue pairs are wanted; make it anew with \
         `ip tuntap add dev {name} mode tap multi_queue`, or use --queue-pairs 1"
    )]
    OneQueue {
        /// Its name.
        name: String,
        /// Queue pairs wanted.
        pairs: u16,
    },
    /// Some other interface.
    #[error("not a tap interface; name one that `ip tuntap show` lists as tap")]
    NotTap,
    /// A descriptor that was handed over is not open, or a standard one.
    #[error(
        "descriptor {0} is not open in this process, or is a standard stream; hand over open tap queues"
    )]
    NotOpen(RawFd),
    /// A descriptor that was handed over twice.
    #[error("descriptor {0} is named twice")]
    Twice(RawFd),
    /// A descriptor that is no tap's.
    #[error("descriptor {0} is not a queue of a tap; open {TUN} and do TUNSETIFF on it first")]
    NotTapQueue(RawFd),
    /// A queue that was opened otherwise than it is used.
    #[error("descriptor {fd} of tap {name} was opened without {missing}")]
    Flags {
        /// The descriptor.
        fd: RawFd,
        /// The tap's name.
        name: String,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// Queues of several taps.
    #[error("descriptors of two taps, {0} and {1}; hand over the queues of one")]
    TwoTaps(String, String),
    /// Too few queues, or too many.
    #[error("{count} queues; a device has 1 to {MAX_PAIRS}")]
    Count {
        /// Queues handed over.
        count: usize,
    },
    /// Something that should not fail.
    #[error("cannot {what} ({errno})")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        errno: Errno,
    },
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> TapError {
    move |error| TapError::Failed {
        what,
        errno: errno(&error),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Tap {
    /// Opens `pairs` queues of the tap `name`. One that is not there is made, taken up, and goes
    /// with this process; this needs CAP_NET_ADMIN.
    pub(crate) fn open(name: &str, pairs: u16, mtu: Option<u16>) -> Result<Tap, TapError> {
        let plain = name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':' && byte != b'%');
        if !(1..=ioctl::MAX_NAME).contains(&name.len()) || !plain {
            return Err(TapError::Name);
        }
        let exists = nix::net::if_::if_nametoindex(name).is_ok();
        let multi = match open_queue(name, pairs > 1) {
            Ok(first) => return Tap::with_more(name, first, pairs, exists, mtu, pairs > 1),
            // A tap with several queues can serve one pair too, but has to be asked for them.
            Err(Errno::EINVAL) if exists => pairs == 1,
            Err(error) => return Err(name_error(name, pairs, exists, error)),
        };
        match (open_queue(name, multi), multi) {
            (Ok(first), true) => Tap::with_more(name, first, pairs, exists, mtu, true),
            (Ok(_), false) => Err(TapError::OneQueue {
                name: name.to_owned(),
                pairs,
            }),
            (Err(Errno::EINVAL), _) => Err(TapError::NotTap),
            // Busy with its one queue: it has no others.
            (Err(Errno::EBUSY), false) => Err(TapError::OneQueue {
                name: name.to_owned(),
                pairs,
            }),
            (Err(error), _) => Err(name_error(name, pairs, exists, error)),
        }
    }

    fn with_more(
        name: &str,
        first: OwnedFd,
        pairs: u16,
        existed: bool,
        mtu: Option<u16>,
        multi: bool,
    ) -> Result<Tap, TapError> {
        let mut queues = vec![first];
        for _ in 1..pairs {
            let queue =
                open_queue(name, multi).map_err(|error| name_error(name, pairs, existed, error))?;
            queues.push(queue);
        }
        if !existed {
            ioctl::take_up(name, mtu).map_err(failed("take the new tap up"))?;
        } else if !ioctl::is_up(name).map_err(failed("look at the tap"))? {
            tracing::warn!(
                tap = name,
                "the tap is down and passes nothing until `ip link set {name} up`"
            );
        }
        let queues = queues.into_iter().map(|fd| (fd, true)).collect();
        Tap::new(name.to_owned(), queues)
    }

    /// Takes over queues of one tap that were opened by whoever started this process.
    pub(crate) fn adopt(fds: &[RawFd]) -> Result<Tap, TapError> {
        if fds.is_empty() || fds.len() > usize::from(MAX_PAIRS) {
            return Err(TapError::Count { count: fds.len() });
        }
        let mut queues = Vec::with_capacity(fds.len());
        let mut tap: Option<String> = None;
        for (at, fd) in fds.iter().enumerate() {
            if fds[..at].contains(fd) {
                return Err(TapError::Twice(*fd));
            }
            let queue = device_kit::adopt(*fd).ok_or(TapError::NotOpen(*fd))?;
            let (name, flags) =
                ioctl::interface(queue.as_fd()).map_err(|_| TapError::NotTapQueue(*fd))?;
            let wanted = [
                (libc::IFF_TAP, "IFF_TAP"),
                (libc::IFF_NO_PI, "IFF_NO_PI"),
                (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
            ];
            if let Some((_, missing)) = wanted.iter().find(|(flag, _)| flags & flag == 0) {
                return Err(TapError::Flags {
                    fd: *fd,
                    name,
                    missing,
                });
            }
            match &tap {
                Some(first) if *first != name => {
                    return Err(TapError::TwoTaps(first.clone(), name));
                }
                _ => tap = Some(name),
            }
            queues.push((queue, flags & libc::IFF_DETACH_QUEUE == 0));
        }
        Tap::new(tap.unwrap_or_default(), queues)
    }

    /// Brings queues to the state in which a device starts: no offloads, the first attached.
    fn new(name: String, queues: Vec<(OwnedFd, bool)>) -> Result<Tap, TapError> {
        for (fd, _) in &queues {
            set_nonblocking(fd.as_fd()).map_err(failed("set a tap queue non-blocking"))?;
        }
        let first = queues[0].0.as_fd();
        ioctl::set_header_len(first, HEADER_LEN)
            .map_err(failed("set the size of the tap's virtio header"))?;
        ioctl::set_little_endian(first)
            .map_err(failed("set the byte order of the tap's virtio header"))?;
        let possible = probe(first);
        ioctl::set_offloads(first, Offloads::empty())
            .map_err(failed("turn the tap's offloads off"))?;
        let tap = Tap {
            name,
            queues: queues
                .into_iter()
                .map(|(fd, attached)| TapQueue::new(fd, attached))
                .collect(),
            possible,
        };
        tap.attach(1)
            .map_err(failed("attach the tap's first queue"))?;
        Ok(tap)
    }
}

/// The largest set of offloads that this kernel's taps have.
fn probe(fd: BorrowedFd<'_>) -> Offloads {
    let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
    [Offloads::all(), tcp, Offloads::CSUM]
        .into_iter()
        .find(|set| ioctl::set_offloads(fd, *set).is_ok())
        .unwrap_or_default()
}

fn open_queue(name: &str, multi: bool) -> Result<OwnedFd, Errno> {
    let tun = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|error| match errno(&error) {
            // Told apart from what the interface's name leads to.
            Errno::EPERM | Errno::EACCES => Errno::EACCES,
            other => other,
        })?;
    let flags = if multi {
        QUEUE_FLAGS | libc::IFF_MULTI_QUEUE
    } else {
        QUEUE_FLAGS
    };
    ioctl::set_interface(tun.as_fd(), name, flags).map_err(|error| errno(&error))?;
    Ok(tun.into())
}

fn name_error(name: &str, pairs: u16, exists: bool, error: Errno) -> TapError {
    match error {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => TapError::NoTun,
        Errno::EACCES => TapError::Tun(error),
        Errno::EPERM if exists => TapError::NotPermitted,
        Errno::EPERM => TapError::Missing {
            name: name.to_owned(),
            multi: pairs > 1,
        },
        Errno::EBUSY | Errno::E2BIG => TapError::Busy,
        Errno::EINVAL => TapError::NotTap,
        errno => TapError::Failed {
            what: "attach to the tap",
            errno,
        },
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn impossible_names_are_refused_before_anything_is_opened() {
        for bad in ["", "a/b", "a b", "tap%d", "sixteen-letters!"] {
            let error = Tap::open(bad, 1, None).unwrap_err();
            assert!(matches!(error, TapError::Name), "{bad}: {error}");
        }
    }

    #[test]
    fn each_failure_says_what_it_is() {
        let case = |exists, error| name_error("vm0", 4, exists, error).to_string();
        assert!(case(false, Errno::EPERM).contains("multi_queue user $USER"));
        assert!(case(true, Errno::EPERM).starts_with("no permission to use this tap"));
        assert!(case(true, Errno::EBUSY).starts_with("busy"));
        assert!(case(true, Errno::ENOENT).contains("/dev/net/tun is missing"));
        assert!(case(true, Errno::EINVAL).starts_with("not a tap"));
        for line in [case(true, Errno::ENOMEM), case(false, Errno::EACCES)] {
            assert!(!line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn descriptors_that_are_no_tap_queues_are_refused() {
        let count = Tap::adopt(&[]).unwrap_err();
        assert!(matches!(count, TapError::Count { count: 0 }));
        let standard = Tap::adopt(&[1]).unwrap_err();
        assert!(matches!(standard, TapError::NotOpen(1)));
        let closed = Tap::adopt(&[9999]).unwrap_err();
        assert!(matches!(closed, TapError::NotOpen(9999)));
        let file = File::open("/dev/null").unwrap().into_raw_fd();
        let no_tap = Tap::adopt(&[file]).unwrap_err();
        assert!(matches!(no_tap, TapError::NotTapQueue(fd) if fd == file));
    }
}
