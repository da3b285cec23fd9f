//! hypervisor (being built).
