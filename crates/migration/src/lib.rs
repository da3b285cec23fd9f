//! Lifecycle states, saved-state frames and wire messages of Godwit's migration.
//!
//! What processes of a machine must agree on, and no policy:
//! - [`schema`]: which bytes are the state of which unit, and the names of units.

pub mod schema;
