//! How many rings a device of each type has (virtio 1.3, 5), and what of them the
//! back-end serves.

use super::{VhostUserConfig, VhostUserError};
use crate::transport::DeviceKind;

/// Rings that a device is given where its definition does not say and its back-end has
/// more.
const DEFAULT_LIMIT: u16 = 64;

/// A device's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueuePlan {
    /// Queues as the definition counts them: pairs, request queues.
    pub(super) counted: u16,
    /// Rings that the guest finds.
    pub(super) rings: u16,
    /// Rings that the back-end serves; the guest may enable more, which stay silent.
    pub(super) served: u16,
    /// Whether the last ring is a control queue of a network card.
    pub(super) has_control: bool,
}

/// Rings that there always are, and rings for each queue.
struct Shape {
    fixed: u16,
    per_queue: u16,
}

impl Shape {
    fn of(kind: DeviceKind) -> Self {
        let (fixed, per_queue) = match kind {
            DeviceKind::NET => (0, 2),
            DeviceKind::BLK => (0, 1),
            DeviceKind::SCSI => (2, 1),
            DeviceKind::FS | DeviceKind::CRYPTO => (1, 1),
            DeviceKind::RNG => (1, 0),
            DeviceKind::CONSOLE
            | DeviceKind::BALLOON
            | DeviceKind::INPUT
            | DeviceKind::GPU
            | DeviceKind::GPIO => (2, 0),
            DeviceKind::VSOCK => (3, 0),
            DeviceKind::SOUND => (4, 0),
            _ => (0, 1),
        };
        Self { fixed, per_queue }
    }
}

/// Decides on the rings. `reported` is what the back-end says that it serves, if it can
/// say; `control` whether it offers a network card's control queue.
pub(super) fn plan(
    config: &VhostUserConfig,
    reported: Option<u64>,
    control: bool,
) -> Result<QueuePlan, VhostUserError> {
    let shape = Shape::of(config.kind);
    let few = |wanted, offered| VhostUserError::TooFewQueues {
        device: config.id.clone(),
        wanted,
        offered,
    };
    if reported == Some(0) {
        return Err(few(shape.fixed + shape.per_queue, 0));
    }
    if shape.per_queue == 0 {
        return fixed(config, &shape, reported, few);
    }
    let queues = match (config.queues, reported) {
        (Some(queues), _) => queues,
        (None, None) => 1,
        (None, Some(reported)) => {
            let rings = u16::try_from(reported)
                .unwrap_or(u16::MAX)
                .min(DEFAULT_LIMIT);
            (rings.saturating_sub(shape.fixed) / shape.per_queue).max(1)
        }
    };
    let rings = shape.fixed + shape.per_queue * queues;
    // A back-end that cannot say has one queue (VU, «Multiple queue support»).
    let offered = reported.unwrap_or((shape.fixed + shape.per_queue).into());
    if u64::from(rings) > offered {
        return Err(few(rings, offered));
    }
    let has_control = config.kind == DeviceKind::NET && control && u64::from(rings) < offered;
    let rings = rings + u16::from(has_control);
    Ok(QueuePlan {
        counted: queues,
        rings,
        served: rings,
        has_control,
    })
}

/// Types whose number of rings follows from the type and its features.
fn fixed(
    config: &VhostUserConfig,
    shape: &Shape,
    reported: Option<u64>,
    few: impl Fn(u16, u64) -> VhostUserError,
) -> Result<QueuePlan, VhostUserError> {
    if let Some(queues) = config.queues
        && queues != 1
    {
        return Err(VhostUserError::Definition {
            device: config.id.clone(),
            what: "number of queues",
            value: queues.into(),
            possible: format!("a device of type {} has its own", config.kind),
        });
    }
    let (least, most) = match config.kind {
        // Statistics, free page hints and reporting come with features.
        DeviceKind::BALLOON => (2, 5),
        // Nothing is ever sent on the event queue unless the guest was moved.
        DeviceKind::VSOCK => (2, 3),
        _ => (shape.fixed, shape.fixed),
    };
    let offered = reported.map_or(shape.fixed, |r| u16::try_from(r).unwrap_or(u16::MAX));
    let served = offered.min(most);
    if served < least {
        return Err(few(least, served.into()));
    }
    let rings = if config.kind == DeviceKind::BALLOON {
        served
    } else {
        most
    };
    Ok(QueuePlan {
        counted: 1,
        rings,
        served,
        has_control: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rings(
        kind: DeviceKind,
        queues: Option<u16>,
        reported: Option<u64>,
        control: bool,
    ) -> Result<(u16, u16), String> {
        let mut config = VhostUserConfig::new(kind, "dev");
        config.queues = queues;
        plan(&config, reported, control)
            .map(|p| (p.rings, p.served))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn each_type_has_its_rings() {
        let cases = [
            (DeviceKind::NET, Some(16), Some(33), true, (33, 33)),
            (DeviceKind::NET, Some(16), Some(33), false, (32, 32)),
            (DeviceKind::NET, Some(1), Some(2), true, (2, 2)),
            (DeviceKind::NET, None, None, true, (2, 2)),
            (DeviceKind::NET, None, Some(5), true, (5, 5)),
            (DeviceKind::BLK, None, Some(4), false, (4, 4)),
            (DeviceKind::BLK, Some(2), Some(4), false, (2, 2)),
            (DeviceKind::BLK, None, Some(1024), false, (64, 64)),
            (DeviceKind::FS, Some(1), Some(2), false, (2, 2)),
            (DeviceKind::SCSI, None, None, false, (3, 3)),
            (DeviceKind::RNG, None, Some(1), false, (1, 1)),
            (DeviceKind::VSOCK, None, Some(2), false, (3, 2)),
            (DeviceKind::BALLOON, None, Some(64), false, (5, 5)),
        ];
        for (kind, queues, reported, control, expected) in cases {
            let found = rings(kind, queues, reported, control);
            assert_eq!(found, Ok(expected), "{kind} {queues:?} {reported:?}");
        }
        let other = DeviceKind::from_id(34).unwrap();
        assert_eq!(rings(other, None, None, false), Ok((1, 1)));
    }

    #[test]
    fn too_few_are_refused_with_both_numbers() {
        assert_eq!(
            rings(DeviceKind::BLK, Some(4), Some(2), false).unwrap_err(),
            "device dev: 4 queues wanted, the back-end serves 2"
        );
        assert!(rings(DeviceKind::NET, Some(2), None, false).is_err());
        assert!(rings(DeviceKind::VSOCK, None, Some(1), false).is_err());
        assert!(rings(DeviceKind::BLK, None, Some(0), false).is_err());
        assert_eq!(
            rings(DeviceKind::RNG, Some(2), Some(8), false).unwrap_err(),
            "device dev: number of queues 2 is not possible, a device of type rng has its own"
        );
    }
}
