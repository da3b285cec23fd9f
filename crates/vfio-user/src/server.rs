//! The side that has a device.

mod migration;
mod session;
#[cfg(test)]
mod tests;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;

use crate::description::{DeviceInfo, DmaRegion, IrqAction, IrqInfo, RegionInfo};
use crate::error::Error;
use crate::migration::{DmaLog, Migration};
use session::Session;

/// A region as a device describes it: see [`RegionInfo`].
pub type Region<'a> = RegionInfo<BorrowedFd<'a>>;

/// A device that is served.
///
/// What it is (information about it, its regions and interrupts) does not change while it is served.
/// It is asked only for what it has: a region's index is below [`DeviceInfo::regions`], and so on.
/// What it refuses is told to the client, and nothing else comes of it.
pub trait Device {
    /// What it is.
    fn info(&self) -> DeviceInfo;

    /// One region.
    fn region(&self, index: u32) -> Result<Region<'_>, Errno>;

    /// One index of interrupts.
    fn irq(&self, index: u32) -> Result<IrqInfo, Errno>;

    /// Does something with interrupts, which it has, from `start` on.
    fn set_irqs(&mut self, index: u32, start: u32, action: IrqAction<OwnedFd>)
    -> Result<(), Errno>;

    /// Reads at least one byte, all within the region, which can be read.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes at least one byte, all within the region, which can be written.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// It may access memory from now on, which is of one byte or more, does not wrap around, and
    /// overlaps no other. Whether the file is as long as that is not known.
    fn dma_map(&mut self, region: DmaRegion, memory: Option<OwnedFd>) -> Result<(), Errno>;

    /// It accesses this memory, which it was given, no more when this returns.
    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Errno>;

    /// What can be moved of it, if anything can. A device keeps to one answer.
    fn migration(&mut self) -> Option<&mut dyn Migration>;

    /// What notes which memory it writes, if anything does. A device keeps to one answer.
    fn dma_log(&mut self) -> Option<&mut dyn DmaLog>;

    /// It is as new, but for memory and eventfds, which it keeps.
    fn reset(&mut self) -> Result<(), Errno>;
}

/// Why a server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The client has hung up.
    ClientGone,
    /// It was told to.
    Stopped,
}

/// Serves a device to one client until that hangs up, or `stop` can be read. What of a message has not
/// come or gone within `deadline` does not come any more.
///
/// Then, however it ends, the device's memory is unmapped and its interrupts disabled; its state is
/// kept for the next client (VFU, «Client Disconnection»).
///
/// # Errors
/// When the client does not keep to the protocol, or the kernel refuses something.
pub fn serve(
    socket: &UnixStream,
    device: &mut impl Device,
    stop: BorrowedFd<'_>,
    deadline: Duration,
) -> Result<Ended, Error> {
    let mut session = Session::new(socket, device, deadline);
    let ended = session.run(stop);
    session.release();
    ended
}
