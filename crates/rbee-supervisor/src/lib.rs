//! Processes: how daemons are started, how workers are started, watched and ended.
//!
//! [`state`] decides (pure), [`unix`] acts, [`control`] is the pipe between hive and worker, [`supervisor`] owns the
//! workers of a hive, [`daemon`] starts the queen and the hive.
//!
//! Invariants
//! - A process is ours by handle or by pid and start time together, never by name or by pid alone.
//! - A worker is the leader of its own process group; what it forked ends with it.
//! - A worker ends when the control pipe does, however the hive ended.

pub mod control;
pub mod daemon;
pub mod logs;
pub mod state;
pub mod supervisor;

mod unix;

pub use daemon::build_id;
pub use supervisor::{SpawnSpec, Supervisor, SupervisorError};
pub use unix::run_bounded;
