//! Rings of a back-end: set up without waiting, stopped with all answers awaited at once.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vhost::{VhostBackend, VringConfigData};

use super::VhostUserError;
use super::connection::Connection;
use super::memory::translate;
use super::negotiation::{Negotiated, PROTOCOL_FEATURES};
use crate::memory::Region;
use crate::transport::{ActivatedQueue, RingBase, StoppedQueue};

/// VRING_F_LOG: writes to the used ring are logged (VU, «Vring address description»).
const RING_LOG: u32 = 1;

/// Where a ring's parts are in this process, which is how back-ends know addresses.
fn addresses(
    device: &str,
    regions: &[Region],
    queue: &ActivatedQueue,
    log: bool,
) -> Result<VringConfigData, VhostUserError> {
    let size = u64::from(queue.size);
    let find = |area, address, len| {
        translate(regions, address, len).ok_or_else(|| VhostUserError::RingOutside {
            device: device.into(),
            queue: queue.index.0,
            area,
            address,
        })
    };
    Ok(VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: if log { RING_LOG } else { 0 },
        desc_table_addr: find("a descriptor table", queue.descriptors, 16 * size)?,
        avail_ring_addr: find("an available ring", queue.driver, 6 + 2 * size)?,
        used_ring_addr: find("a used ring", queue.device, 6 + 8 * size)?,
        log_addr: log.then_some(queue.device),
    })
}

/// Rings with their addresses, found before the back-end is told of any.
pub(super) struct Located<'a>(Vec<(&'a ActivatedQueue, VringConfigData)>);

/// Finds every ring in memory. A guest's mistake ends here, with nothing half done.
pub(super) fn locate<'a>(
    device: &str,
    regions: &[Region],
    queues: &'a [ActivatedQueue],
    log: bool,
) -> Result<Located<'a>, VhostUserError> {
    queues
        .iter()
        .map(|queue| Ok((queue, addresses(device, regions, queue, log)?)))
        .collect::<Result<_, _>>()
        .map(Located)
}

/// Sets rings up and lets them run. Nothing is awaited; [`Connection::sync`] does.
pub(super) fn start(
    connection: &mut Connection,
    negotiated: &Negotiated,
    rings: &Located<'_>,
) -> Result<(), VhostUserError> {
    for (queue, addresses) in &rings.0 {
        let index = usize::from(queue.index.0);
        connection.call("SET_VRING_NUM", |f| f.set_vring_num(index, queue.size))?;
        connection.call("SET_VRING_BASE", |f| f.set_vring_base(index, queue.base.0))?;
        connection.call("SET_VRING_ADDR", |f| f.set_vring_addr(index, addresses))?;
        connection.call("SET_VRING_CALL", |f| f.set_vring_call(index, &queue.call))?;
        connection.call("SET_VRING_KICK", |f| f.set_vring_kick(index, &queue.kick))?;
    }
    if negotiated.features & PROTOCOL_FEATURES != 0 {
        for (queue, _) in &rings.0 {
            let index = usize::from(queue.index.0);
            connection.call("SET_VRING_ENABLE", |f| f.set_vring_enable(index, true))?;
        }
    }
    Ok(())
}

/// Tells running rings whether their used rings are logged.
pub(super) fn set_log(
    connection: &mut Connection,
    rings: &Located<'_>,
) -> Result<(), VhostUserError> {
    for (queue, addresses) in &rings.0 {
        let index = usize::from(queue.index.0);
        connection.call("SET_VRING_ADDR", |f| f.set_vring_addr(index, addresses))?;
    }
    Ok(())
}

/// GET_VRING_BASE of each ring: stops it, drained, and says where it goes on.
pub(super) fn stop(
    connection: &mut Connection,
    queues: &[ActivatedQueue],
) -> Result<Vec<StoppedQueue>, VhostUserError> {
    const NAME: &str = "GET_VRING_BASE";
    let requests: Vec<_> = queues
        .iter()
        .map(|queue| {
            let mut body = u32::from(queue.index.0).to_ne_bytes().to_vec();
            body.extend(0u32.to_ne_bytes());
            body
        })
        .collect();
    let answers = connection.exchange(FrontendReq::GET_VRING_BASE, NAME, &requests, None)?;
    let mut stopped = Vec::with_capacity(queues.len());
    for (queue, answer) in queues.iter().zip(answers) {
        let &[a, b, c, d, e, f, g, h] = answer.as_slice() else {
            return Err(connection.nonsense(NAME, format!("{} bytes", answer.len())));
        };
        let index = u32::from_ne_bytes([a, b, c, d]);
        let base = u32::from_ne_bytes([e, f, g, h]);
        if index != u32::from(queue.index.0) {
            let what = format!("ring {index} instead of {}", queue.index);
            return Err(connection.nonsense(NAME, what));
        }
        let Ok(base) = u16::try_from(base) else {
            return Err(connection.nonsense(NAME, format!("base {base} of a split ring")));
        };
        stopped.push(StoppedQueue {
            index: queue.index,
            base: RingBase(base),
        });
    }
    Ok(stopped)
}
