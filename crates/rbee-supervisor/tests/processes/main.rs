//! Real processes: what is left of them, how they end, what they may take and what they say.
//!
//! Workers, daemons and whole hives are this very program again, playing one of the [`roles`], or a few lines of shell.
//! What counts descriptors or lowers a limit does so in a process of its own. Nothing waits for time to pass: every wait
//! is for a condition and has a limit.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod daemons;
mod endings;
mod leftovers;
mod limits;
mod output;
mod rig;
mod roles;
