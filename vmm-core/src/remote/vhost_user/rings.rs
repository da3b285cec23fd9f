//! Rings of a back-end: set up without waiting, stopped with all answers awaited at once.
//!
//! A back-end of ours ([`migration::rings`]) is told ahead where rings are, and then starts and
//! stops them by one message. Of any other, each ring is started and stopped by itself, and nothing
//! is told ahead: some read their place in a ring when they hear its address.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use migration::rings as ours;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vhost::{VhostBackend, VringConfigData};

use super::VhostUserError;
use super::connection::Connection;
use super::memory::translate;
use super::negotiation::{Negotiated, PROTOCOL_FEATURES};
use crate::costs;
use crate::memory::Region;
use crate::transport::{ActivatedQueue, QueueIndex, RingBase, StoppedQueue};

/// VRING_F_LOG: writes to the used ring are logged (VU, «Vring address description»).
const RING_LOG: u32 = 1;
/// Where a ring's parts are in this process, which is how back-ends know addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    index: u16,
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    /// Guest-physical address of the used ring, if writes to it are logged.
    log: Option<u64>,
}

impl Place {
    fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: if self.log.is_some() { RING_LOG } else { 0 },
            desc_table_addr: self.descriptors,
            avail_ring_addr: self.driver,
            used_ring_addr: self.device,
            log_addr: self.log,
        }
    }
}

/// Finds every ring in memory. A guest's mistake ends here, with nothing half done.
pub(super) fn locate(
    device: &str,
    regions: &[Region],
    queues: &[ActivatedQueue],
    log: bool,
) -> Result<Vec<Place>, VhostUserError> {
    let place = |queue: &ActivatedQueue| {
        let size = u64::from(queue.size);
        let find = |area, address, len| {
            translate(regions, address, len).ok_or_else(|| VhostUserError::RingOutside {
                device: device.into(),
                queue: queue.index.0,
                area,
                address,
            })
        };
        Ok(Place {
            index: queue.index.0,
            size: queue.size,
            descriptors: find("a descriptor table", queue.descriptors, 16 * size)?,
            driver: find("an available ring", queue.driver, 6 + 2 * size)?,
            device: find("a used ring", queue.device, 6 + 8 * size)?,
            log: log.then_some(queue.device),
        })
    };
    queues.iter().map(place).collect()
}

/// Sets a ring up; one that is wired ahead gets its base later. Nothing is awaited.
fn set_up(
    connection: &mut Connection,
    queue: &ActivatedQueue,
    place: &Place,
    base: Option<RingBase>,
) -> Result<(), VhostUserError> {
    let index = usize::from(place.index);
    let addresses = place.addresses();
    costs::RINGS.add();
    connection.call("SET_VRING_NUM", |f| f.set_vring_num(index, place.size))?;
    if let Some(RingBase(base)) = base {
        connection.call("SET_VRING_BASE", |f| f.set_vring_base(index, base))?;
    }
    connection.call("SET_VRING_ADDR", |f| f.set_vring_addr(index, &addresses))?;
    connection.call("SET_VRING_CALL", |f| f.set_vring_call(index, &queue.call))?;
    connection.call("SET_VRING_KICK", |f| f.set_vring_kick(index, &queue.kick))
}

/// Wires rings of a back-end of ours ahead. [`Connection::sync`] awaits it.
pub(super) fn wire(
    connection: &mut Connection,
    queues: &[ActivatedQueue],
    places: &[Place],
) -> Result<(), VhostUserError> {
    queues
        .iter()
        .zip(places)
        .try_for_each(|(queue, place)| set_up(connection, queue, place, None))
}

/// Lets wired rings run. [`started`] awaits it.
pub(super) fn order_start(
    connection: &mut Connection,
    queues: &[ActivatedQueue],
) -> Result<(), VhostUserError> {
    let bases = queues.iter().map(|queue| ours::RingBase {
        index: queue.index.0,
        base: queue.base.0,
    });
    let body = ours::encode(&bases.collect::<Vec<_>>());
    connection.order(ours::START, START, &body, None)
}

/// Waits until a back-end of ours has started its rings.
pub(super) fn started(
    connection: &mut Connection,
    deadline: Duration,
) -> Result<(), VhostUserError> {
    connection.hear(ours::START, START, deadline)
}

/// Has a back-end of ours take what only one process may have, or give it up.
pub(super) fn hold(connection: &mut Connection, hold: bool) -> Result<(), VhostUserError> {
    let body = u32::from(hold).to_ne_bytes();
    connection.ask(ours::HOLD, "HOLD", &body, connection.deadline())
}

/// Has a back-end of ours map what guest memory holds, which may take a while.
pub(super) fn prefault(
    connection: &mut Connection,
    deadline: Duration,
) -> Result<(), VhostUserError> {
    connection.ask(ours::PREFAULT, "PREFAULT", &[], deadline)
}

/// Asks a back-end of ours what a switchover will take.
pub(super) fn forecast(connection: &mut Connection) -> Result<ours::Forecast, VhostUserError> {
    const NAME: &str = "FORECAST";
    let answers = connection.exchange(ours::FORECAST, NAME, &[Vec::new()])?;
    let forecast = answers.first().and_then(|a| ours::Forecast::decode(a));
    forecast.ok_or_else(|| connection.nonsense(NAME, "it has not 24 bytes"))
}

const START: &str = "START_RINGS";
const STOP: &str = "STOP_RINGS";

/// Has a back-end of ours stop all rings, drained; [`stopped`] awaits it. With a channel it then saves
/// its state there, and if it `goes` gives up what only one process may have; [`saved`] awaits that.
pub(super) fn order_stop(
    connection: &mut Connection,
    channel: Option<&OwnedFd>,
    goes: bool,
) -> Result<(), VhostUserError> {
    let channel = channel.map(|channel| channel.as_raw_fd());
    connection.order(ours::STOP, STOP, &u32::from(goes).to_ne_bytes(), channel)?;
    if channel.is_some() {
        connection.expect_another();
    }
    Ok(())
}

/// Waits until a back-end of ours has stopped `queues`.
pub(super) fn stopped(
    connection: &mut Connection,
    queues: &[ActivatedQueue],
    deadline: Duration,
) -> Result<Vec<StoppedQueue>, VhostUserError> {
    const NAME: &str = STOP;
    let answer = connection.answer(ours::STOP, NAME, deadline)?;
    let rings = ours::decode(&answer);
    let Some(rings) = rings else {
        return Err(connection.nonsense(NAME, "no list of rings"));
    };
    let stopped = rings.iter().map(|ring| StoppedQueue {
        index: QueueIndex(ring.index),
        base: RingBase(ring.base),
    });
    let stopped: Vec<_> = stopped.collect();
    match stopped
        .iter()
        .find(|s| queues.iter().all(|q| q.index != s.index))
    {
        Some(other) => {
            Err(connection.nonsense(NAME, format!("ring {}, which did not run", other.index)))
        }
        None => Ok(stopped),
    }
}

/// Waits until a back-end of ours that was stopped has left as it was told.
pub(super) fn saved(connection: &mut Connection, deadline: Duration) -> Result<(), VhostUserError> {
    connection.hear(ours::STOP, STOP, deadline)
}

/// Sets rings up and lets them run. Nothing is awaited; [`Connection::sync`] does.
pub(super) fn start(
    connection: &mut Connection,
    negotiated: &Negotiated,
    queues: &[ActivatedQueue],
    places: &[Place],
) -> Result<(), VhostUserError> {
    for (queue, place) in queues.iter().zip(places) {
        set_up(connection, queue, place, Some(queue.base))?;
    }
    if negotiated.features & PROTOCOL_FEATURES != 0 {
        for queue in queues {
            let index = usize::from(queue.index.0);
            connection.call("SET_VRING_ENABLE", |f| f.set_vring_enable(index, true))?;
        }
    }
    Ok(())
}

/// Tells running rings whether their used rings are logged.
pub(super) fn set_log(connection: &mut Connection, places: &[Place]) -> Result<(), VhostUserError> {
    for place in places {
        let (index, addresses) = (usize::from(place.index), place.addresses());
        connection.call("SET_VRING_ADDR", |f| f.set_vring_addr(index, &addresses))?;
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
    let answers = connection.exchange(FrontendReq::GET_VRING_BASE as u32, NAME, &requests)?;
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
