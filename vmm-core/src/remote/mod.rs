//! remote (being built).
