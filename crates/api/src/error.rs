//! The names of what can go wrong.

/// A failure as the caller sees it: `org.godwit.Vmm1.Error.NAME` and one sentence.
#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.godwit.Vmm1.Error")]
pub enum Error {
    /// The connection itself failed.
    #[zbus(error)]
    ZBus(zbus::Error),
    /// The machine is not in a state in which this can be done.
    InvalidState(String),
    /// An argument that cannot be.
    InvalidArgument(String),
    /// A device did not do its part.
    DeviceFailed(String),
    /// Something took longer than it may.
    TimedOut(String),
    /// A fault of the program itself.
    Internal(String),
}
