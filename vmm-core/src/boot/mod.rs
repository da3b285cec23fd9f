//! boot (being built).
