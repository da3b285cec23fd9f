//! Machines that leave this host, come to it, go from one generation of processes to another,
//! into files and out of them.
//!
//! | part | what it is |
//! |---|---|
//! | `uri`, `options` | what a caller says |
//! | `ends` | what cores and devices are connected by |
//! | `peer` | two brokers that agree and connect their cores |
//! | `source` | a machine that leaves |
//! | `arrival`, `receive` | a machine that comes |
//! | `departure`, `arrivals` | where it went and what came, for brokers that ask each other later |
//! | `elsewhere` | machines that are, or may be, at another host |
//! | `snapshot` | files |
//! | `mover`, `record` | how far it is, and what it took |
//! | `resume` | what a broker does that was started in the middle |
//!
//! Brokers prepare and clean up; who runs the machine is decided between the two cores, and a
//! broker that is killed on the way changes nothing about it.

mod arrival;
mod arrivals;
mod departure;
mod elsewhere;
pub mod ends;
mod mover;
mod options;
pub mod peer;
mod receive;
pub(crate) mod record;
mod resume;
mod snapshot;
mod source;
mod uri;

use std::time::Duration;

pub use self::arrivals::Arrivals;
pub(crate) use self::arrivals::Fate;
pub(crate) use self::departure::Departure;
pub(crate) use self::mover::Mover;
pub(crate) use self::options::Options;
pub(crate) use self::receive::Awaited;
pub(crate) use self::resume::Pending;
pub(crate) use self::source::Leaving;
pub use self::uri::Uri;

/// How long a core that has failed may take to end.
const END_DEADLINE: Duration = Duration::from_secs(5);
