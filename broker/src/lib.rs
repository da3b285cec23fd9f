//! The broker: makes machines, watches them, and serves them as `org.godwit.Vmm1`.
//!
//! ```text
//!   D-Bus ──► service ──► broker ──► machine ──► launch ──► processes
//!     ▲                     │           │
//!     └───── publish ◄──────┴───────────┘            (what changed)
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`service`] | the D-Bus objects, and telling what changed |
//! | [`broker`] | all machines and jobs of a host |
//! | [`machine`] | one machine: start, supervision, adoption |
//! | [`migration`] | machines that leave, arrive, go into files and come out of them |
//! | [`launch`] | processes as children or as systemd units |
//! | [`visit`] | declared machines that systemd starts |
//! | [`definition`] | what a machine is, from TOML or a dictionary |
//! | [`resources`] | what is opened and handed to processes |
//! | [`jobs`], [`console`], [`policy`], [`metrics`], [`folder`] | what their names say |
//!
//! It is on no path of data: when it is killed, machines run on, and the next broker finds
//! them in its [`folder`] and takes them over.

pub mod broker;
pub mod console;
mod declared;
pub mod definition;
pub mod folder;
mod holders;
pub mod host;
pub mod jobs;
pub mod launch;
pub mod machine;
pub mod metrics;
pub mod migration;
pub mod name;
pub mod policy;
pub mod process;
pub mod publish;
pub mod resources;
pub mod service;
mod tap;
mod usage;
mod vfio;
pub mod visit;
