//! Finds a model in the store, or fetches it.
//!
//! The store is the cache of the Hugging Face hub, in the layout that Python's tools use, so that nothing is fetched twice
//! because another tool fetched it. A model is visible only when all its bytes are there and have the digests that the
//! hub's listing promised; what names it is written last.
//!
//! Start with [`Store`]. `local.rs` finds, `transfer.rs` fetches a model, `download.rs` one file, `part.rs` writes it,
//! `http.rs` and `guard.rs` decide what is asked of whom, `names.rs` what may become a path.

mod digest;
mod disk;
mod download;
mod error;
mod guard;
mod http;
mod hub;
mod import;
mod layout;
mod local;
mod lock;
mod manage;
mod names;
mod options;
mod part;
mod progress;
mod ranges;
mod select;
mod store;
mod transfer;

pub use error::{Error, SharedError};
pub use local::{Local, LocalFile};
pub use manage::{Stored, StoredCommit};
pub use names::Commit;
pub use options::{Offline, Options, Proxies, Token};
pub use progress::{Progress, Stage};
pub use reqwest::Url;
pub use store::{Fetch, Store};
pub use tokio_util::sync::CancellationToken;
