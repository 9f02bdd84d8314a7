//! The daemon chassis: what queen, hive and worker have in common around their HTTP routes.
//!
//! [`serve()`] runs the connections, [`guard`] stands before every route, [`ApiError`] is how a handler refuses,
//! [`sse`] how it streams, [`Shutdown`] how it ends, [`logging`] where it writes.

pub mod guard;
pub mod logging;
pub mod sse;

mod clock;
mod error;
mod exposition;
mod joblog;
mod serve;
mod shutdown;
mod stall;

pub use clock::{Clock, random_hex};
pub use error::{ApiError, JsonBytes, MAX_BODY, NoBody, current_request_id, current_trace};
pub use exposition::Exposition;
pub use guard::{Caller, Guard, Keyring, protect};
pub use joblog::{BrokeOff, JobLog, Listener};
pub use serve::{ServeLimits, bind, port_holder, serve};
pub use shutdown::{Shutdown, Tasks};
