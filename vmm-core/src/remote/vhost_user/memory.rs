//! Guest memory of a back-end: one update for each change of the layout.
//!
//! The first one is a table of everything, if it has room. Once the back-end has a table,
//! and can take single regions, only the difference is sent: what it has mapped and
//! prefaulted stays mapped under running rings.

use std::os::fd::AsRawFd;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::VhostUserError;
use super::connection::Connection;
use super::negotiation::{Negotiated, TABLE_REGIONS};
use crate::costs;
use crate::memory::Region;

/// Brings a back-end from the regions it has (none in a new session) to those there are.
pub(super) fn update(
    connection: &mut Connection,
    negotiated: &Negotiated,
    old: &[Region],
    new: &[Region],
) -> Result<(), VhostUserError> {
    costs::MEMORY_TABLES.add();
    let slots = negotiated.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let room = if slots {
        negotiated.memory_slots
    } else {
        TABLE_REGIONS
    };
    if new.len() > room {
        return Err(VhostUserError::TooManyRegions {
            device: connection.device().into(),
            regions: new.len(),
            slots: room,
        });
    }
    let table = new.len() <= TABLE_REGIONS && (old.is_empty() || !slots);
    if table && !new.is_empty() {
        let regions: Vec<_> = new.iter().map(info).collect();
        return connection
            .call_acked("SET_MEM_TABLE", |f| f.set_mem_table(&regions))
            .map(|_| ());
    }
    // An empty table cannot be sent: a back-end keeps its last one until the next.
    if slots {
        for region in old.iter().filter(|r| !new.contains(r)) {
            connection.call("REM_MEM_REG", |f| f.remove_mem_region(&info(region)))?;
        }
        for region in new.iter().filter(|r| !old.contains(r)) {
            connection.call("ADD_MEM_REG", |f| {
                f.add_mem_region(&info(region)).map(|_| ())
            })?;
        }
        connection.sync("ADD_MEM_REG")?;
    }
    Ok(())
}

fn info(region: &Region) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.gpa(),
        memory_size: region.size(),
        userspace_addr: region.host(),
        mmap_offset: region.offset(),
        mmap_handle: region.file().as_raw_fd(),
    }
}

/// Where `len` bytes at guest-physical `gpa` are in this process, if one region has them.
pub(super) fn translate(regions: &[Region], gpa: u64, len: u64) -> Option<u64> {
    let region = regions
        .iter()
        .find(|r| gpa >= r.gpa() && gpa - r.gpa() < r.size())?;
    let offset = gpa - region.gpa();
    (len <= region.size() - offset).then(|| region.host() + offset)
}
