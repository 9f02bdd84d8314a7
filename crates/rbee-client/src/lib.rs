//! Typed clients for queen, hive and worker.
//!
//! A call either gives its value, a refusal with the other end's own [`ErrorBody`], or a fault of the way
//! there. A stream ends well only with the end mark: a connection that just closes is an error.

mod channel;
mod clients;
mod error;
mod http;
mod stream;

pub use channel::{Batch, ChannelStream};
pub use clients::{HiveClient, Hives, QueenClient, WorkerClient};
pub use error::ClientError;
pub use rbee_wire::ErrorBody;
pub use stream::{EventStream, StreamEvent};
