//! Emulated hosts with a KVM of their own, for tests with Linux guests.
