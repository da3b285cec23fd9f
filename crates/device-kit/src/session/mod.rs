//! One front-end, from its connection to its end.

mod config_change;

pub use self::config_change::ConfigChange;
