//! The crate as a worker uses it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail the test")]
#![expect(clippy::disallowed_methods, reason = "the crate does no IO; its tests read fixtures and a clock")]

mod chat;
mod encoders;
mod families;
mod fixtures;
mod gguf;
mod grammar;
mod hostile;
mod streams;
mod templates;
