//! What every Godwit device process stands on.
