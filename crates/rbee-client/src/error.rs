//! What can go wrong between two programs.

use std::time::Duration;

use rbee_wire::{ErrorBody, ErrorCode};

/// A call or stream that failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing answers there.
    #[error("cannot reach {url}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The other end refused, in its own words.
    #[error("{0}")]
    Refused(Box<ErrorBody>),
    /// The connection ended before the answer did.
    #[error("the answer of {url} broke off")]
    Broken {
        /// Whose.
        url: String,
        /// Why, where the connection says.
        #[source]
        source: Option<reqwest::Error>,
    },
    /// Nothing came for too long.
    #[error("{url} has been silent for {} ms", limit.as_millis())]
    Idle {
        /// Who.
        url: String,
        /// For how long.
        limit: Duration,
    },
    /// The answer is not of this protocol.
    #[error("{url} answered something that is not rbee's protocol: {problem}")]
    Protocol {
        /// Whose.
        url: String,
        /// What it was.
        problem: String,
    },
}

impl ClientError {
    /// The error as it is passed on to whoever asked.
    pub fn to_body(&self, unreachable: ErrorCode) -> ErrorBody {
        match self {
            Self::Refused(body) => (**body).clone(),
            Self::Protocol { .. } => ErrorBody::new(ErrorCode::VersionMismatch, self.to_string()),
            _ => ErrorBody::new(unreachable, self.to_string()),
        }
    }

    /// The other end's own error, if it refused.
    pub fn refusal(&self) -> Option<&ErrorBody> {
        match self {
            Self::Refused(body) => Some(body),
            _ => None,
        }
    }
}
