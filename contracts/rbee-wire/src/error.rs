//! The one table of errors: stable codes with their HTTP status, whether a retry can help, the CLI's exit
//! code and what to do next.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::RequestId;

macro_rules! error_codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $status:literal, $retry:ident, exit $exit:literal, $hint:literal;)*) => {
        /// A stable error code. New ones may come; old ones keep their meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
            /// A code this build does not know, from a newer peer.
            #[serde(other, rename = "UNKNOWN")]
            Unknown,
        }

        impl ErrorCode {
            /// Every code of this build.
            pub const ALL: &[ErrorCode] = &[$(ErrorCode::$variant,)*];

            /// The code as it stands on the wire.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* Self::Unknown => "UNKNOWN" }
            }

            /// The HTTP status it is answered with.
            pub fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* Self::Unknown => 500 }
            }

            /// Whether the same request may work later or elsewhere.
            pub fn retryable(self) -> bool {
                match self { $(Self::$variant => error_codes!(@retry $retry),)* Self::Unknown => false }
            }

            /// What the CLI exits with.
            pub fn exit_code(self) -> u8 {
                match self { $(Self::$variant => $exit,)* Self::Unknown => 5 }
            }

            /// What to do next, where nothing more exact is known.
            pub fn hint(self) -> Option<&'static str> {
                let hint = match self { $(Self::$variant => $hint,)* Self::Unknown => "" };
                (!hint.is_empty()).then_some(hint)
            }
        }
    };
    (@retry retry) => { true };
    (@retry final) => { false };
}

error_codes! {
    /// The request is malformed or out of range; all violations are listed.
    InvalidRequest = "INVALID_REQUEST", 400, final, exit 1, "";
    /// No operation has this name.
    UnknownOperation = "UNKNOWN_OPERATION", 400, final, exit 1, "the operations are listed in docs/reference/http.md";
    /// A token is needed, and none or a wrong one came.
    Unauthorized = "UNAUTHORIZED", 401, final, exit 1, "pass the key with --api-key or RBEE_API_KEY";
    /// The key's scopes do not open this.
    Forbidden = "FORBIDDEN", 403, final, exit 1, "an admin makes keys that may: `rbee key create --scope admin`";
    /// The key has as many jobs, or has posted as many in the last minute, as it may.
    RateLimitExceeded = "RATE_LIMIT_EXCEEDED", 429, retry, exit 1, "";
    /// No key has this id.
    KeyNotFound = "KEY_NOT_FOUND", 404, final, exit 3, "`rbee key list` shows the keys";
    /// A page of another site, a foreign host name or a proxy asked.
    ForbiddenOrigin = "FORBIDDEN_ORIGIN", 403, final, exit 1, "call it by its loopback address, not from another site's page or through a proxy";
    /// No such path.
    NotFound = "NOT_FOUND", 404, final, exit 1, "";
    /// The path exists, the method does not.
    MethodNotAllowed = "METHOD_NOT_ALLOWED", 405, final, exit 1, "";
    /// The body is larger than this endpoint takes.
    PayloadTooLarge = "PAYLOAD_TOO_LARGE", 413, final, exit 1, "";
    /// The model is not in the store, not on the hub, or not reachable there.
    ModelNotFound = "MODEL_NOT_FOUND", 404, final, exit 3, "`rbee status` lists what is loaded; a local folder is named by its path";
    /// The model cannot be removed while workers have it loaded.
    ModelInUse = "MODEL_IN_USE", 409, final, exit 1, "unload it first with `rbee model unload REF`";
    /// The worker is still loading its model.
    ModelLoading = "MODEL_LOADING", 503, retry, exit 1, "wait for the load to end, or follow it with `rbee status --watch`";
    /// The model could not be loaded.
    ModelLoadFailed = "MODEL_LOAD_FAILED", 503, final, exit 1, "`rbee worker process list` shows how the worker ended";
    /// The model's files are damaged or contradict each other.
    ModelCorrupt = "MODEL_CORRUPT", 422, final, exit 1, "fetch or export the model again";
    /// No worker serves what was asked for, and none may be started.
    NoWorker = "NO_WORKER", 503, final, exit 3, "start one with `rbee worker spawn --model REF`, or leave out --no-load";
    /// Every worker that could serve it is busy, and waiting was not wanted.
    AllBusy = "ALL_BUSY", 503, retry, exit 1, "";
    /// The waiting line is full.
    QueueFull = "QUEUE_FULL", 429, retry, exit 1, "try again later, or add a worker";
    /// The job waited as long as a job may wait.
    QueueTimeout = "QUEUE_TIMEOUT", 503, retry, exit 1, "try again later, or add a worker";
    /// The model does not fit the device's free memory.
    InsufficientMemory = "INSUFFICIENT_MEMORY", 503, final, exit 1, "free memory with `rbee worker retire ID`, or ask for less with --ctx or --slots";
    /// Prompt and wanted output are longer than the context.
    ContextLengthExceeded = "CONTEXT_LENGTH_EXCEEDED", 400, final, exit 1, "shorten the prompt or lower --max-tokens";
    /// The worker ended in the middle of the answer.
    WorkerLost = "WORKER_LOST", 502, retry, exit 1, "run it again; `rbee worker logs ID` shows why it ended";
    /// The worker's engine made no progress.
    WorkerStalled = "WORKER_STALLED", 504, retry, exit 1, "run it again; the worker is being replaced";
    /// The worker sent something it must not send.
    WorkerProtocolError = "WORKER_PROTOCOL_ERROR", 502, retry, exit 5, "the worker is of another build or damaged: `rbee down`, then start again";
    /// This request ended more than one worker.
    RequestPoisoned = "REQUEST_POISONED", 422, final, exit 1, "report it together with the worker's log";
    /// The worker ended again and again.
    CrashLoop = "CRASH_LOOP", 503, final, exit 1, "`rbee worker process list` shows the last exits";
    /// The daemon is about to stop.
    Draining = "DRAINING", 503, retry, exit 4, "";
    /// The listener read too slowly.
    SlowConsumer = "SLOW_CONSUMER", 408, final, exit 1, "";
    /// The job belongs to a queen that is gone.
    QueenRestarted = "QUEEN_RESTARTED", 410, retry, exit 4, "the queen was restarted; post the job again";
    /// The idempotency key was used with another body.
    IdempotencyConflict = "IDEMPOTENCY_CONFLICT", 409, final, exit 1, "use a new key for a new request";
    /// The job has ended already.
    JobOver = "JOB_OVER", 409, final, exit 1, "";
    /// Somebody cancelled the job; its own stream ends in `done`, answers of the OpenAI dialect end in this.
    Cancelled = "CANCELLED", 409, final, exit 1, "";
    /// The hive does not answer.
    HiveUnreachable = "HIVE_UNREACHABLE", 503, retry, exit 4, "start it with `rbee hive start`";
    /// No hive has this name.
    HiveUnknown = "HIVE_UNKNOWN", 404, final, exit 3, "`rbee hive list` shows the hives";
    /// The hive has no file handles, processes or memory left.
    HiveExhausted = "HIVE_EXHAUSTED", 503, retry, exit 1, "raise the limits of the hive's session (ulimit -n, -u)";
    /// No worker has this id.
    WorkerNotFound = "WORKER_NOT_FOUND", 404, final, exit 3, "`rbee worker list` shows the workers";
    /// No child process of the hive has this pid.
    ProcessNotFound = "PROCESS_NOT_FOUND", 404, final, exit 3, "`rbee worker process list` shows the hive's own processes";
    /// The device is not there or cannot be used.
    DeviceUnavailable = "DEVICE_UNAVAILABLE", 503, final, exit 3, "`rbee hive get` lists the devices";
    /// The device ran out of memory.
    Oom = "OOM", 503, retry, exit 1, "ask for a smaller context (--ctx) or fewer slots (--slots)";
    /// The load made no progress.
    LoadTimeout = "LOAD_TIMEOUT", 504, final, exit 1, "`rbee worker logs ID` shows where it stopped";
    /// The worker takes no more requests now.
    Overloaded = "OVERLOADED", 503, retry, exit 1, "";
    /// The chat template failed.
    TemplateError = "TEMPLATE_ERROR", 400, final, exit 1, "use --raw to send the prompt without the model's chat template";
    /// The download failed.
    DownloadFailed = "DOWNLOAD_FAILED", 502, retry, exit 1, "";
    /// The download stood still.
    DownloadStalled = "DOWNLOAD_STALLED", 504, retry, exit 1, "";
    /// The bytes are not those that were promised.
    ChecksumMismatch = "CHECKSUM_MISMATCH", 502, final, exit 1, "";
    /// The disk is full.
    DiskFull = "DISK_FULL", 507, final, exit 1, "";
    /// The request's own deadline passed.
    DeadlineExceeded = "DEADLINE_EXCEEDED", 504, final, exit 1, "allow more time with deadline_ms";
    /// No job has this id.
    JobNotFound = "JOB_NOT_FOUND", 404, final, exit 3, "`rbee job list` shows the jobs that are kept";
    /// The job's log was kept its time and is gone.
    JobExpired = "JOB_EXPIRED", 410, final, exit 3, "";
    /// The other end speaks another protocol version.
    VersionMismatch = "VERSION_MISMATCH", 426, final, exit 5, "bring both ends to the same release";
    /// The operation exists and is not built yet.
    NotImplemented = "NOT_IMPLEMENTED", 501, final, exit 1, "";
    /// A fault of rbee itself.
    Internal = "INTERNAL", 500, final, exit 5, "`rbee queen logs` and `rbee worker logs ID` have the details";
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// An error as it travels: in `{"error": …}` bodies and in `error` events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// The stable code.
    pub code: ErrorCode,
    /// What was attempted and what happened.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Facts for programs: the violations, the bytes needed and free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
    /// Whether the same request may work later or elsewhere.
    pub retryable: bool,
    /// How long to wait before the next try, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The request this answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
}

impl ErrorBody {
    /// An error with the code's own hint and retryability.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: code.hint().map(str::to_owned),
            details: None,
            retryable: code.retryable(),
            retry_after_ms: None,
            request_id: None,
        }
    }

    /// With a more exact hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With facts for programs.
    #[must_use]
    pub fn with_details(mut self, details: Value) -> Self {
        self.details = Some(details);
        self
    }

    /// With a time to wait before the next try.
    #[must_use]
    pub fn with_retry_after(mut self, wait: std::time::Duration) -> Self {
        self.retry_after_ms = Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        self
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for ErrorBody {}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorReply {
    /// What went wrong.
    pub error: ErrorBody,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_of_a_newer_peer_still_parses() {
        let body: ErrorBody =
            serde_json::from_str(r#"{"code":"FROM_TOMORROW","message":"m","retryable":true,"new":1}"#).unwrap();
        assert_eq!((body.code, body.retryable), (ErrorCode::Unknown, true));
    }

    #[test]
    fn names_are_unique_and_survive_the_wire() {
        let mut seen = std::collections::HashSet::new();
        for &code in ErrorCode::ALL {
            assert!(seen.insert(code.name()));
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
            assert!((400..=599).contains(&code.status()));
            assert!((1..=5).contains(&code.exit_code()));
        }
    }
}
