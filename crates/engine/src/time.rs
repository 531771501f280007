//! The engine's clock.

/// Time since the engine's start. The scheduler has no clock of its own: `now` is always an argument.
pub type Time = std::time::Duration;
