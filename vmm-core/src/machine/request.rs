//! What the guest asks of its machine by way of a device.

/// A wish of the guest, carried out by the machine's control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Start again from the boot of the kernel.
    Reset,
    /// Stop for good: the machine is over.
    PowerOff,
}

/// Takes the guest's wishes from a vCPU thread; must not block.
pub trait RequestSink: Send + Sync {
    /// Notes a request; the vCPU goes on until the control thread stops it.
    fn request(&self, request: Request);
}
