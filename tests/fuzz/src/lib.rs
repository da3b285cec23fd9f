//! What reads bytes from outside of its process, one function each: given anything, it may refuse it,
//! and must do nothing else.
//!
//! `tests/hostile.rs` gives them what is right and [`mutated`]; `guided` has them under libFuzzer.

mod core_state;
mod kernel;
mod link;
mod mutated;
mod platform_state;
mod ram;
mod state_frame;
mod vfio_user;

pub use core_state::core_state;
pub use kernel::kernel;
pub use link::{framed, link};
pub use mutated::mutated;
pub use platform_state::{platform_seeds, platform_state};
pub use ram::ram;
pub use state_frame::{frame, state_frame};
pub use vfio_user::{vfio_user_client, vfio_user_replies, vfio_user_requests, vfio_user_server};
