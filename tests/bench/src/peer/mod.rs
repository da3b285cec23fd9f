//! Other programs that run the same guest beside ours.

pub(crate) mod qemu;
