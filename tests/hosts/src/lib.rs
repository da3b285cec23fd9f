//! Emulated hosts with a KVM of their own, for tests with Linux guests.
//!
//! QEMU's TCG emulates AMD SVM, so a Debian system in it has a real `/dev/kvm` with nested paging,
//! whatever machine it runs on. Stock Linux guests boot there in seconds, and systemd, D-Bus,
//! polkit, taps, VFIO and a second host on the same wire are all real.
//!
//! ```text
//! Assets::prepare ──► kernels, disks, QEMU      once for each change of `prepare/`, a minute
//!                └──► template: a booted host    once for each machine, half a minute
//! Host::start     ──► the template, copy-on-write, in about a second
//! Host::run       ──► a shell command inside, its output and status
//! drop            ──► the host is killed and its files are removed
//! ```
//!
//! Order rules: the 9p share is mounted by a host's first job, never before the template is saved,
//! because QEMU refuses to save a machine with a mounted share. Devices are the same for every
//! host, because saved state fits only the machine that it was saved from; what a test needs
//! beyond them is hot-plugged through [`Host::qmp`] into the root ports `rp0` and `rp1`.

mod assets;
pub mod commands;
mod error;
mod host;
mod job;
pub mod linux_guest;
mod machine;
mod pair;
mod qmp;
mod template;

pub use assets::Assets;
pub use error::Error;
pub use host::{Host, HostOptions, strip};
pub use job::{Job, Output};
pub use pair::Pair;
pub use qmp::Qmp;

/// What functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;
