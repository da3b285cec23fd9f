//! The machine: all parts together, with its life.

pub mod request;
