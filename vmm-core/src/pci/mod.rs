//! pci (being built).
