//! RAM: which pages are dirty, and their way to the other side.
//!
//! [`PageSet`] is a bit for each page of the machine; [`DirtyTracker`] fills one from KVM's log
//! and the devices'; [`RamSender`] and [`RamReceiver`] have a thread for each channel.

mod dirty;
mod holes;
mod pace;
mod page_set;
mod receiver;
mod sender;

pub use dirty::{CoreWrites, DirtyTracker};
pub use pace::Pace;
pub use page_set::PageSet;
pub use receiver::RamReceiver;
pub use sender::RamSender;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Pages in a word of a bitmap.
pub const WORD_PAGES: u64 = u64::BITS as u64;
