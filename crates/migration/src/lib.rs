//! Lifecycle states, saved-state frames and wire messages of Godwit's migration.
