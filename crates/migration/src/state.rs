//! The life of a device: VFIO's eight states, and the one table of legal transitions.
//!
//! ```text
//! Running ⇄ RunningP2p ⇄ Stop ⇄ StopCopy
//! Running ⇄ PreCopy ⇄ PreCopyP2p → StopCopy     PreCopyP2p ⇄ RunningP2p
//! PreCopy → StopCopy (device without P2P)       Stop ⇄ Resuming
//! any → Error;  Error leaves only by reset
//! ```
//!
//! Every device has this life, whatever its protocol. A transition between states that no arc
//! joins goes by the shortest path of arcs whose inner states do not save; the one exception is
//! PreCopy → PreCopyP2p → StopCopy, which is how precopy ends. StopCopy never goes back to a
//! precopy state: what was streamed in PreCopy cannot be streamed again. States that a device does
//! not have are stepped over. These are the rules of Linux's `include/uapi/linux/vfio.h`.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// State of a device, numbered as in VFIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum DeviceState {
    /// It failed; only a reset leaves this state.
    Error = 0,
    /// It does nothing, and changes neither itself nor memory.
    Stop = 1,
    /// It runs.
    Running = 2,
    /// Stopped, and its state is read.
    StopCopy = 3,
    /// Stopped, and its state is written.
    Resuming = 4,
    /// It runs, but starts no new access to other devices.
    RunningP2p = 5,
    /// It runs, and its state is read ahead.
    PreCopy = 6,
    /// As `PreCopy`, but it starts no new access to other devices.
    PreCopyP2p = 7,
}

use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

impl DeviceState {
    /// All states, in the order of their numbers.
    pub const ALL: [DeviceState; 8] = [
        Error, Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p,
    ];

    /// Whether the device works for its guest.
    pub fn runs(self) -> bool {
        matches!(self, Running | RunningP2p | PreCopy | PreCopyP2p)
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Which of the optional states a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// It can run without starting access to other devices.
    pub p2p: bool,
    /// Its state can be read while it runs.
    pub precopy: bool,
}

impl Variant {
    /// Every state there is.
    pub const FULL: Variant = Variant {
        p2p: true,
        precopy: true,
    };

    /// Whether a device of this variant has the state.
    pub fn has(self, state: DeviceState) -> bool {
        match state {
            Error | Stop | Running | StopCopy | Resuming => true,
            RunningP2p => self.p2p,
            PreCopy => self.precopy,
            PreCopyP2p => self.p2p && self.precopy,
        }
    }
}

/// A transition that no device, or not this one, can make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a device cannot go from {from} to {to}")]
pub struct IllegalTransition {
    /// Where it is.
    pub from: DeviceState,
    /// Where it was to go.
    pub to: DeviceState,
}

/// First step from the row's state to the column's, for a device that has every state. `Error`
/// where there is no way.
#[rustfmt::skip]
const NEXT: [[DeviceState; 8]; 8] = [
    // to: Error, Stop,    Running,    StopCopy,   Resuming,   RunningP2p, PreCopy,    PreCopyP2p
    /* Error      */ [Error, Error,      Error,      Error,      Error,      Error,      Error,      Error],
    /* Stop       */ [Error, Stop,       RunningP2p, StopCopy,   Resuming,   RunningP2p, RunningP2p, RunningP2p],
    /* Running    */ [Error, RunningP2p, Running,    RunningP2p, RunningP2p, RunningP2p, PreCopy,    RunningP2p],
    /* StopCopy   */ [Error, Stop,       Stop,       StopCopy,   Stop,       Stop,       Error,      Error],
    /* Resuming   */ [Error, Stop,       Stop,       Stop,       Resuming,   Stop,       Stop,       Stop],
    /* RunningP2p */ [Error, Stop,       Running,    Stop,       Stop,       RunningP2p, Running,    PreCopyP2p],
    /* PreCopy    */ [Error, Running,    Running,    PreCopyP2p, Running,    Running,    PreCopy,    PreCopyP2p],
    /* PreCopyP2p */ [Error, RunningP2p, RunningP2p, StopCopy,   RunningP2p, RunningP2p, PreCopy,    PreCopyP2p],
];

/// The next state on the way from `from` to `to`; `to` itself when an arc joins them, and when the
/// device is there already.
///
/// # Errors
/// When there is no way, or the device does not have one of the two states. `Error` is not a state
/// that one goes to: a device falls into it.
pub fn next_state(
    from: DeviceState,
    to: DeviceState,
    variant: Variant,
) -> Result<DeviceState, IllegalTransition> {
    let illegal = IllegalTransition { from, to };
    if from == Error || to == Error || !variant.has(from) || !variant.has(to) {
        return Err(illegal);
    }
    let mut next = NEXT[from as usize][to as usize];
    while !variant.has(next) {
        next = NEXT[next as usize][to as usize];
    }
    if next == Error {
        Err(illegal)
    } else {
        Ok(next)
    }
}

/// Every state on the way from `from` to `to`, without the first and with the last.
///
/// # Errors
/// As [`next_state`].
pub fn path(
    from: DeviceState,
    to: DeviceState,
    variant: Variant,
) -> Result<Vec<DeviceState>, IllegalTransition> {
    let mut at = from;
    let mut steps = Vec::new();
    next_state(from, to, variant)?;
    while at != to {
        at = next_state(at, to, variant)?;
        steps.push(at);
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const VARIANTS: [Variant; 4] = [
        Variant::FULL,
        Variant {
            p2p: true,
            precopy: false,
        },
        Variant {
            p2p: false,
            precopy: true,
        },
        Variant {
            p2p: false,
            precopy: false,
        },
    ];

    /// The arcs of the diagram, from which the table must follow.
    fn arcs(variant: Variant) -> Vec<(DeviceState, DeviceState)> {
        let mut arcs = vec![
            (Resuming, Stop),
            (Stop, Resuming),
            (Stop, StopCopy),
            (StopCopy, Stop),
        ];
        if variant.p2p {
            arcs.extend([
                (Running, RunningP2p),
                (RunningP2p, Running),
                (RunningP2p, Stop),
                (Stop, RunningP2p),
            ]);
        } else {
            arcs.extend([(Running, Stop), (Stop, Running)]);
        }
        if variant.precopy {
            arcs.extend([(Running, PreCopy), (PreCopy, Running)]);
            if variant.p2p {
                arcs.extend([
                    (PreCopy, PreCopyP2p),
                    (PreCopyP2p, PreCopy),
                    (PreCopyP2p, RunningP2p),
                    (RunningP2p, PreCopyP2p),
                    (PreCopyP2p, StopCopy),
                ]);
            } else {
                arcs.push((PreCopy, StopCopy));
            }
        }
        arcs
    }

    fn saves(state: DeviceState) -> bool {
        matches!(state, StopCopy | PreCopy | PreCopyP2p)
    }

    /// The shortest path of arcs without a saving state inside, by search; `None` where none is
    /// allowed.
    fn searched(from: DeviceState, to: DeviceState, variant: Variant) -> Option<Vec<DeviceState>> {
        if from == Error || to == Error || !variant.has(from) || !variant.has(to) {
            return None;
        }
        if from == StopCopy && matches!(to, PreCopy | PreCopyP2p) {
            return None;
        }
        if (from, to) == (PreCopy, StopCopy) && variant.p2p {
            return Some(vec![PreCopyP2p, StopCopy]);
        }
        let mut waiting = VecDeque::from([vec![from]]);
        while let Some(walked) = waiting.pop_front() {
            let at = walked[walked.len() - 1];
            if at == to {
                return Some(walked[1..].to_vec());
            }
            if at != from && saves(at) {
                continue;
            }
            for (start, end) in arcs(variant) {
                if start == at && !walked.contains(&end) {
                    waiting.push_back([walked.as_slice(), &[end]].concat());
                }
            }
        }
        None
    }

    #[test]
    fn every_cell_is_the_shortest_path_of_arcs() {
        for variant in VARIANTS {
            for from in DeviceState::ALL {
                for to in DeviceState::ALL {
                    let expected = searched(from, to, variant);
                    let found = path(from, to, variant);
                    assert_eq!(found.clone().ok(), expected, "{from} -> {to}, {variant:?}");
                    if let Err(error) = found {
                        assert_eq!(error, IllegalTransition { from, to });
                    }
                }
            }
        }
    }

    #[test]
    fn the_specification_s_own_paths() {
        let paths: [(DeviceState, &[DeviceState]); 22] = [
            (PreCopy, &[PreCopyP2p, StopCopy]),
            (PreCopy, &[Running, RunningP2p]),
            (PreCopy, &[Running, RunningP2p, Stop]),
            (PreCopy, &[Running, RunningP2p, Stop, Resuming]),
            (PreCopyP2p, &[RunningP2p, Running]),
            (PreCopyP2p, &[RunningP2p, Stop]),
            (PreCopyP2p, &[RunningP2p, Stop, Resuming]),
            (Resuming, &[Stop, RunningP2p]),
            (Resuming, &[Stop, RunningP2p, PreCopyP2p]),
            (Resuming, &[Stop, RunningP2p, Running]),
            (Resuming, &[Stop, RunningP2p, Running, PreCopy]),
            (Resuming, &[Stop, StopCopy]),
            (Running, &[RunningP2p, PreCopyP2p]),
            (Running, &[RunningP2p, Stop]),
            (Running, &[RunningP2p, Stop, Resuming]),
            (Running, &[RunningP2p, Stop, StopCopy]),
            (RunningP2p, &[Running, PreCopy]),
            (RunningP2p, &[Stop, Resuming]),
            (RunningP2p, &[Stop, StopCopy]),
            (Stop, &[RunningP2p, PreCopyP2p]),
            (StopCopy, &[Stop, Resuming]),
            (StopCopy, &[Stop, RunningP2p, Running]),
        ];
        for (from, expected) in paths {
            let to = expected[expected.len() - 1];
            assert_eq!(
                path(from, to, Variant::FULL).unwrap(),
                expected,
                "{from} -> {to}"
            );
        }
    }

    #[test]
    fn without_p2p_precopy_ends_in_one_step() {
        let variant = Variant {
            p2p: false,
            precopy: true,
        };
        assert_eq!(path(PreCopy, StopCopy, variant).unwrap(), [StopCopy]);
        assert_eq!(path(PreCopy, Stop, variant).unwrap(), [Running, Stop]);
    }

    #[test]
    fn numbers_are_vfio_s() {
        for (number, state) in DeviceState::ALL.iter().enumerate() {
            assert_eq!(*state as usize, number);
        }
    }
}
