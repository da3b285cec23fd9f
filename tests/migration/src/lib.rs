//! Helpers for tests of machines that move: a machine on one side, the connections between two,
//! and what passes on them made to fail.

mod devices;
mod guest;
mod machines;
mod side;
mod wires;

pub use devices::{Counter, Foreign};
pub use guest::{Done, answers, beat_on, finish, warm_up};
pub use machines::{at_work, busy};
pub use side::{Moved, Outcome, Side, Spec};
pub use wires::{Fault, Gate, Kind, Wires};
