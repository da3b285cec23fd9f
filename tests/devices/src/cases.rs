//! The cases, by what they look at.

pub(crate) mod compat;
pub(crate) mod hostile;
pub(crate) mod life;
pub(crate) mod link;
pub(crate) mod program;
pub(crate) mod session;
pub(crate) mod state;
pub(crate) mod wired;
