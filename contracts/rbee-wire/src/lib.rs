//! rbee's own protocol: the one definition that both ends of every call use.
//!
//! It holds no behaviour but codecs and validation. Start with [`op::OPERATIONS`], the one table of
//! operations, then [`event::Event`], what every job's stream is made of.

pub mod body;
pub mod channel;
pub mod error;
pub mod event;
pub mod fields;
pub mod form;
pub mod hive;
pub mod ids;
pub mod job;
pub mod keep_alive;
pub mod key;
pub mod model;
pub mod op;
pub mod routes;
pub mod schema;
pub mod sse;
pub mod view;
pub mod worker;

/// The protocol's version: the `x-rbee-protocol` header of every answer and `protocol` in heartbeats.
pub const PROTOCOL: u32 = 1;

pub use error::{ErrorBody, ErrorCode};
pub use event::Event;
pub use ids::{DeviceId, HiveId, Incarnation, JobId, KeyId, RequestId, TraceParent, WorkerId};
pub use job::JobRequest;
pub use keep_alive::KeepAlive;
pub use key::{Access, Scope};
pub use model::{DeviceSpec, ModelRef};
pub use op::Operation;
