//! Godwit core process.
