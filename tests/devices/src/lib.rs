//! Conformance of device processes, driven without a guest.
