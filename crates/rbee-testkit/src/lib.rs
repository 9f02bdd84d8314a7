//! Test tools: whole clusters of real processes in private homes, a raw client, checkers.
//!
//! Start with [`Setup`], which makes a [`Cluster`]. [`sim`] knows every token that a simulated worker must send,
//! [`http`] shows bytes and broken connections as they are, [`wait_for`] is how a test waits.
//!
//! Everything here fails a test by panicking.

#![expect(clippy::panic, reason = "a test tool fails its test by panicking")]

pub mod beats;
pub mod bins;
pub mod canary;
pub mod cluster;
pub mod command;
pub mod fleet_sim;
pub mod gguf;
pub mod http;
pub mod hub;
pub mod port;
pub mod process;
pub mod scripted;
pub mod sim;
pub mod story;
pub mod tap;
pub mod terminal;
pub mod wait;

pub use canary::CANARY;
pub use cluster::{Cluster, Cmd, HandWorker, Setup};
pub use command::{Output, Running};
pub use process::Signal;
pub use tap::Tap;
pub use terminal::Terminal;
pub use wait::{patience, wait_for};
