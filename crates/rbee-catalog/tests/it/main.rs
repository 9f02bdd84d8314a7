//! The store against a hub that is real but for what it holds: real sockets, real files, real processes.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod faults;
mod fetch;
mod hostile;
mod kit;
mod layout;
mod processes;
mod python;
