//! The broker.

pub mod definition;
pub mod name;
