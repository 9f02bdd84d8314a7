//! What can go wrong between a model's name and its files.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::json;

/// A failed operation of the store. Messages do not repeat their source's; [`Error::body`] has the whole chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing names the cache's folder.
    #[error("none of HF_HUB_CACHE, HF_HOME, RBEE_HOME, XDG_CACHE_HOME and HOME names an absolute folder")]
    NoHome,
    /// The hub's address is none.
    #[error("`{endpoint}` is no address of a hub: {problem}")]
    Endpoint {
        /// As it was given.
        endpoint: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A reference to something that no store has: the built-in model, an alias that nobody resolved.
    #[error("`{model}` is not a model of the store")]
    NotStored {
        /// The reference.
        model: String,
    },
    /// A name that could lead out of the repository's folder.
    #[error("`{name}` cannot be the name of a file, a repository or a revision")]
    BadName {
        /// The name, escaped.
        name: String,
    },
    /// A file that is no regular one, or a link that leads out of its repository.
    #[error("{} is refused: {problem}", path.display())]
    RefusedFile {
        /// Where it is.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
    /// A path that has no model.
    #[error("{} is no model: {problem}", path.display())]
    NoModelHere {
        /// Where.
        path: PathBuf,
        /// What is missing.
        problem: String,
    },
    /// Several files could be meant.
    #[error("`{model}` could be any of: {}", candidates.join(", "))]
    Ambiguous {
        /// The reference.
        model: String,
        /// Names that would be exact.
        candidates: Vec<String>,
    },
    /// The repository has no such file or quantization, or not one of the kind that rbee loads.
    #[error("`{model}` has no such files; there are: {}", if candidates.is_empty() { "none that rbee loads".to_owned() } else { candidates.join(", ") })]
    NoSuchFile {
        /// The reference.
        model: String,
        /// Names that would be there.
        candidates: Vec<String>,
    },
    /// A request would be needed, and none may be made.
    #[error("`{model}` is not in the store, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline {
        /// The reference.
        model: String,
    },
    /// The repository is there and its owner has terms that this account has not accepted.
    #[error("`{repo}` is gated")]
    Gated {
        /// `org/name`.
        repo: String,
        /// The page with the terms.
        page: String,
        /// Whether a token was shown.
        with_token: bool,
    },
    /// The repository does not exist, or not for this account.
    #[error("`{repo}` is not on {endpoint}, or is private")]
    NoRepository {
        /// `org/name`.
        repo: String,
        /// The hub's address.
        endpoint: String,
        /// Whether a token was shown.
        with_token: bool,
    },
    /// The hub does not take the token.
    #[error("{endpoint} does not take the token")]
    BadToken {
        /// The hub's address.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("`{repo}` has no revision `{revision}`")]
    NoRevision {
        /// `org/name`.
        repo: String,
        /// As it was asked for.
        revision: String,
    },
    /// The hub's answer is not one of its API, or larger than any honest one.
    #[error("{what} of {endpoint} is refused: {problem}")]
    BadAnswer {
        /// What was asked for.
        what: &'static str,
        /// The hub's address.
        endpoint: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A redirect, or an address that a name resolves to, that is not followed.
    #[error("`{url}` is not fetched: {problem}")]
    RefusedTarget {
        /// Its origin; the rest may hold a signature.
        url: String,
        /// Why.
        problem: String,
    },
    /// The hub was not reached at all.
    #[error("the hub at {endpoint} cannot be reached")]
    Unreachable {
        /// Its origin.
        endpoint: String,
        /// Why not.
        #[source]
        source: reqwest::Error,
    },
    /// No answer, or a broken one, as often as it is tried.
    #[error("cannot fetch {what} of {endpoint} ({tries} tries)")]
    Request {
        /// What was asked for.
        what: String,
        /// The origin that was asked.
        endpoint: String,
        /// How often.
        tries: u32,
        /// What happened last.
        #[source]
        source: reqwest::Error,
    },
    /// An answer that is an error, as often as it is tried.
    #[error("{endpoint} answers {what} with HTTP status {status} ({tries} tries)")]
    Status {
        /// What was asked for.
        what: String,
        /// The origin that was asked.
        endpoint: String,
        /// The answer.
        status: u16,
        /// How often.
        tries: u32,
    },
    /// Answers end early again and again.
    #[error("the answers for {file} end early ({tries} tries, {done} of {total} bytes)")]
    Short {
        /// The file.
        file: String,
        /// How often.
        tries: u32,
        /// Bytes that are there.
        done: u64,
        /// Bytes of the file.
        total: u64,
    },
    /// No bytes, or next to none.
    #[error("{what} stands still: less than 1 KiB/s for {} s ({done} of {total} bytes)", after.as_secs())]
    Stalled {
        /// What was being fetched.
        what: String,
        /// The time of silence.
        after: Duration,
        /// Bytes that are there.
        done: u64,
        /// Bytes of the file.
        total: u64,
    },
    /// The bytes are not those that the hub's listing promised, twice.
    #[error("{file} has the digest {got} where {wanted} was promised")]
    Checksum {
        /// The file.
        file: String,
        /// In hexadecimal.
        wanted: String,
        /// In hexadecimal.
        got: String,
    },
    /// The disk, or the store's budget, has no room.
    #[error("{needed} bytes are needed and {free} are free for {}", path.display())]
    DiskFull {
        /// Bytes that are missing of the model.
        needed: u64,
        /// Bytes that may be used.
        free: u64,
        /// Where.
        path: PathBuf,
    },
    /// A file or folder of the store could not be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// In the infinitive.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The TLS library has no certificates to trust.
    #[error("cannot set up TLS: {problem}")]
    Tls {
        /// Why.
        problem: String,
    },
    /// More models wait than may.
    #[error("{waiting} models wait to be fetched already")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// Whoever asked wants it no more.
    #[error("the transfer was cancelled")]
    Cancelled,
    /// The task that did the work is gone.
    #[error("the transfer ended without a result")]
    Lost,
}

impl Error {
    /// A failed file operation; a full disk is [`Error::DiskFull`].
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                let free = path.parent().and_then(|folder| crate::disk::free(folder).ok()).unwrap_or(0);
                Self::DiskFull { needed: 0, free, path }
            }
            _ => Self::File { action, path, source },
        }
    }

    /// The code it travels with.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotStored { .. }
            | Self::NoModelHere { .. }
            | Self::NoSuchFile { .. }
            | Self::Offline { .. }
            | Self::Unreachable { .. }
            | Self::Gated { .. }
            | Self::NoRepository { .. }
            | Self::BadToken { .. }
            | Self::NoRevision { .. } => ErrorCode::ModelNotFound,
            Self::BadName { .. } | Self::Ambiguous { .. } => ErrorCode::InvalidRequest,
            Self::RefusedFile { .. } => ErrorCode::ModelCorrupt,
            Self::BadAnswer { .. }
            | Self::RefusedTarget { .. }
            | Self::Request { .. }
            | Self::Status { .. }
            | Self::Short { .. } => ErrorCode::DownloadFailed,
            Self::Stalled { .. } => ErrorCode::DownloadStalled,
            Self::Checksum { .. } => ErrorCode::ChecksumMismatch,
            Self::DiskFull { .. } => ErrorCode::DiskFull,
            Self::Busy { .. } => ErrorCode::QueueFull,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::NoHome | Self::Endpoint { .. } | Self::File { .. } | Self::Tls { .. } | Self::Lost => {
                ErrorCode::Internal
            }
        }
    }

    /// What to do next, where it is more than the code's own hint.
    pub fn hint(&self) -> Option<String> {
        let token = "a private or gated model needs a token: set HF_TOKEN, or log in with `hf auth login`";
        Some(match self {
            Self::Gated { page, with_token: true, .. } => {
                format!("accept the terms at {page} with the account of this token, then try again")
            }
            Self::Gated { page, with_token: false, .. } => {
                format!("accept the terms at {page}, then set HF_TOKEN to a token of that account")
            }
            Self::NoRepository { with_token: false, .. } => format!("check the name; {token}"),
            Self::NoRepository { with_token: true, .. } => {
                "check the name, and that the token's account may read it".into()
            }
            Self::BadToken { .. } => "set HF_TOKEN to a valid token, or unset it".into(),
            Self::NoRevision { .. } => "leave out @REVISION for the newest".into(),
            Self::Ambiguous { candidates, .. } | Self::NoSuchFile { candidates, .. } if !candidates.is_empty() => {
                format!("name one of them, such as ORG/NAME:{}", candidates[0])
            }
            Self::NoSuchFile { .. } => "rbee loads safetensors with a config.json, and GGUF files".into(),
            Self::Offline { .. } => "unset HF_HUB_OFFLINE to fetch it, or copy it in with `rbee model import`".into(),
            Self::Unreachable { .. } => {
                "check the network and HF_ENDPOINT; what is in the store needs no hub: `rbee model list`".into()
            }
            Self::RefusedTarget { .. } => "a mirror in your own network has to be listed as a trusted origin".into(),
            Self::Request { .. } | Self::Status { .. } | Self::Short { .. } | Self::Stalled { .. } => {
                "run it again: what is there already is kept and not fetched twice".into()
            }
            Self::Checksum { .. } => {
                "something on the way to the hub damages bytes, or the file was replaced on the mirror".into()
            }
            Self::DiskFull { .. } => "free space with `rbee model delete`, or move the cache with HF_HUB_CACHE".into(),
            _ => return None,
        })
    }

    /// The error as it travels, with the causes in its message.
    pub fn body(&self) -> ErrorBody {
        let mut message = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        let mut body = ErrorBody::new(self.code(), message);
        if let Some(hint) = self.hint() {
            body = body.with_hint(hint);
        }
        match self {
            Self::DiskFull { needed, free, .. } => body.with_details(json!({"needed": needed, "free": free})),
            Self::Ambiguous { candidates, .. } | Self::NoSuchFile { candidates, .. } => {
                body.with_details(json!({"candidates": candidates}))
            }
            Self::Stalled { done, total, .. } | Self::Short { done, total, .. } => {
                body.with_details(json!({"done": done, "total": total}))
            }
            _ => body,
        }
    }
}

/// An error that several askers of one transfer get.
pub type SharedError = Arc<Error>;
