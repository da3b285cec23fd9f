//! Lifecycle states, saved-state frames and wire messages of Godwit's migration.
//!
//! What processes of a machine must agree on, and no policy:
//! - [`state`]: the eight states of a device, and which transitions there are;
//! - [`schema`]: which bytes are the state of which unit, and the names of units;
//! - [`frame`]: how saved state travels and how it is known to be whole;
//! - [`channel`]: the pipe or socket that it travels on, with a deadline;
//! - [`link`]: messages between two cores; [`wire`]: what they say, and compare; [`ram`]: how memory travels;
//! - [`free_pages`]: which pages a balloon says need not travel;
//! - [`rings`]: what a core says to a device process to start and stop it at once;
//! - [`commit`]: who may run the machine, whatever happens;
//! - [`report`]: what a migration took; [`picture`]: drawn.

pub mod channel;
pub mod commit;
mod cpu_names;
mod fit;
pub mod frame;
pub mod free_pages;
pub mod link;
pub mod picture;
pub mod ram;
pub mod report;
pub mod rings;
mod round_trip;
pub mod schema;
pub mod state;
pub mod wire;
