//! Guest memory: the RAM of the machine and the layout that says what lies where.
//!
//! RAM is one memfd ([`Ram`]), shared with the devices that need it; a ROM is behind it in the
//! same file, and none of their business. Memory of a device that the guest may use without an exit
//! is in a file of its process. What the guest sees at which address is the *layout*: a list of
//! [`Region`]s that changes only through a [`Transaction`]:
//!
//! ```text
//! begin ── add / remove … ── commit ──► every listener told once ──► new view
//!   └─ begin (nested) … commit            (one refuses: all are told back)
//! ```
//!
//! Order rules:
//! - A commit computes the difference to the layout in force; an empty one tells nobody.
//! - Transactions of one thread nest and are one: only the outermost commit does
//!   anything. Another thread's `begin` waits for it.
//! - A transaction dropped without commit undoes itself, and the one around it fails.
//! - Listeners (KVM's memory slots first, then devices) are called in the order they
//!   subscribed; the previous view stays mapped until the last of them has agreed.

mod ram;
mod region;
mod transaction;

pub use ram::{HugePages, Ram, RamError, prefault};
pub use region::{Region, RegionKind};
pub use transaction::{LayoutChange, LayoutError, LayoutListener, Memory, Transaction};

/// The guest memory that one reads and writes through.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
