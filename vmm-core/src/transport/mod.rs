//! Virtio over PCI (virtio 1.3, 4.1): the registers that a driver sees, for any device
//! type, whoever serves its queues.
//!
//! The transport holds the registers; a [`VirtioDevice`] holds the device. Once queues
//! are activated neither notifications nor interrupts pass through this process: the
//! guest's doorbells are ioeventfds, the device's interrupts irqfds.
//!
//! ```text
//!           DRIVER_OK                stop
//!   Idle ──────────────▶ Running ──────────▶ Stopped
//!    ▲  ◀──────────────    ▲  ◀──────────────   │
//!    │    status = 0             resume          │ restore
//!    └─ activation failed: DEVICE_NEEDS_RESET    └─ (save only here or in Idle)
//! ```
//!
//! Order: a stop covers the activated queues and nothing else; a resume kicks each of
//! them once, as the guest may have rung while nobody listened, and signals each once,
//! as a device may have used buffers whose signal it had held back.

mod common;
mod device;
mod doorbells;
mod kind;
mod notifier;
mod pci_device;
mod queue;
pub mod saved_state;

pub use device::{
    ActivatedQueue, DeviceError, DeviceNotifier, QueueIndex, RingBase, StoppedQueue, TroubleSink,
    VirtioDevice,
};
pub use kind::{DeviceKind, UnknownKind};
pub use pci_device::{MAX_QUEUES, TransportError, VirtioPciDevice, Wiring};
pub use queue::QueueError;
