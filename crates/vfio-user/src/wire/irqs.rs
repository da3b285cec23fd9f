//! DEVICE_SET_IRQS (VFU, «VFIO_USER_DEVICE_SET_IRQS»).

use std::os::fd::OwnedFd;

use nix::errno::Errno;

use super::{Layout, layout};
use crate::description::{IrqAction, IrqData, IrqFlags, IrqInfo};

layout! {
    /// What the message begins with; booleans follow.
    SetIrqs { argsz: u32, flags: u32, index: u32, start: u32, count: u32 }
}

const DATA_NONE: u32 = 1 << 0;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

impl SetIrqs {
    /// What a client asks for: the message without descriptors, and booleans that follow it.
    pub(crate) fn new<F>(index: u32, start: u32, action: &IrqAction<F>) -> (Self, Vec<u8>) {
        let (action, data) = match action {
            IrqAction::Disable => (ACTION_TRIGGER, &IrqData::Count(0)),
            IrqAction::Trigger(data) => (ACTION_TRIGGER, data),
            IrqAction::Mask(data) => (ACTION_MASK, data),
            IrqAction::Unmask(data) => (ACTION_UNMASK, data),
        };
        let (kind, booleans) = match data {
            IrqData::Count(_) => (DATA_NONE, Vec::new()),
            IrqData::Chosen(chosen) => (DATA_BOOL, chosen.iter().map(|&it| it.into()).collect()),
            IrqData::Eventfds(_) => (DATA_EVENTFD, Vec::new()),
        };
        // Too many for a number are too many for a message.
        let length = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let set = Self {
            argsz: length(Self::SIZE + booleans.len()),
            flags: kind | action,
            index,
            start,
            count: length(data.count()),
        };
        (set, booleans)
    }

    /// What the server is asked for, if interrupts like these can do it.
    ///
    /// # Errors
    /// `EINVAL` if not.
    pub(crate) fn action(
        &self,
        booleans: &[u8],
        eventfds: Vec<OwnedFd>,
        irq: IrqInfo,
    ) -> Result<IrqAction<OwnedFd>, Errno> {
        let count = self.count as usize;
        let kind = self.flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD);
        let end = self.start.checked_add(self.count);
        let fits = end.is_some_and(|end| end <= irq.count)
            && booleans.len() == if kind == DATA_BOOL { count } else { 0 }
            && (eventfds.is_empty() || kind == DATA_EVENTFD && eventfds.len() == count);
        if !fits {
            return Err(Errno::EINVAL);
        }
        let data = match kind {
            DATA_NONE => IrqData::Count(self.count),
            DATA_BOOL => IrqData::Chosen(booleans.iter().map(|&it| it != 0).collect()),
            DATA_EVENTFD if !irq.flags.contains(IrqFlags::EVENTFD) => {
                return Err(Errno::EINVAL);
            }
            DATA_EVENTFD if eventfds.is_empty() => {
                IrqData::Eventfds((0..count).map(|_| None).collect())
            }
            DATA_EVENTFD => IrqData::Eventfds(eventfds.into_iter().map(Some).collect()),
            _ => return Err(Errno::EINVAL),
        };
        let maskable = irq.flags.contains(IrqFlags::MASKABLE);
        match self.flags ^ kind {
            ACTION_TRIGGER if kind == DATA_NONE && (self.start, count) == (0, 0) => {
                Ok(IrqAction::Disable)
            }
            _ if count == 0 => Err(Errno::EINVAL),
            ACTION_TRIGGER => Ok(IrqAction::Trigger(data)),
            ACTION_MASK if maskable => Ok(IrqAction::Mask(data)),
            ACTION_UNMASK if maskable => Ok(IrqAction::Unmask(data)),
            _ => Err(Errno::EINVAL),
        }
    }
}
