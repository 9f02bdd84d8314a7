//! How a command ends: exit codes, and failures with what to do next.

use std::io;

use rbee_client::ClientError;
use rbee_config::ConfigError;
use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::{Value, json};

/// What the program exits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// The request failed.
    Failed,
    /// The command line or the settings are wrong.
    Usage,
    /// No worker or model serves it.
    NothingServes,
    /// The queen or a hive cannot be reached.
    Unreachable,
    /// A fault of rbee itself.
    Fault,
    /// Ctrl-C.
    Interrupted,
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NothingServes => 3,
            Self::Unreachable => 4,
            Self::Fault => 5,
            Self::Interrupted => 130,
        }
    }

    /// The code that JSON has for a failure of the command line itself.
    fn name(self) -> &'static str {
        match self {
            Self::Done => "DONE",
            Self::Failed => "FAILED",
            Self::Usage => "USAGE",
            Self::NothingServes => "NOTHING_SERVES",
            Self::Unreachable => "UNREACHABLE",
            Self::Fault => "INTERNAL",
            Self::Interrupted => "INTERRUPTED",
        }
    }

    fn of(code: ErrorCode) -> Self {
        match code.exit_code() {
            1 => Self::Failed,
            2 => Self::Usage,
            3 => Self::NothingServes,
            4 => Self::Unreachable,
            _ => Self::Fault,
        }
    }
}

/// A command that did not work: what was attempted, what happened, what to do next.
#[derive(Debug)]
pub struct Failure {
    /// What the program exits with.
    pub exit: Exit,
    /// What happened; empty when there is nothing to say.
    pub message: String,
    /// What to do next.
    pub hints: Vec<String>,
    /// The error as the other end put it.
    pub body: Option<Box<ErrorBody>>,
    /// Whether stdout shows the error already, as an event.
    pub on_stdout: bool,
    /// Whether the reader of stdout left, which is no failure.
    pub reader_left: bool,
}

impl Failure {
    /// A failure that ends with this exit code.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hints: Vec::new(), body: None, on_stdout: false, reader_left: false }
    }

    /// A wrong command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Ctrl-C.
    pub fn interrupted() -> Self {
        Self::new(Exit::Interrupted, "")
    }

    /// With what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The failure that another program reported.
    pub fn refused(body: ErrorBody) -> Self {
        let mut failure = Self::new(Exit::of(body.code), format!("{} ({})", body.message, body.code));
        failure.hints.extend(body.hint.clone());
        if let Some(wait) = body.retry_after_ms {
            failure.hints.push(format!("try again in {} s", wait.div_ceil(1000)));
        }
        failure.body = Some(Box::new(body));
        failure
    }

    /// The error as JSON has it: the other end's own, or one made of this failure in the same shape.
    pub fn json(&self) -> Value {
        let error = match &self.body {
            Some(body) => json!(body),
            None => json!({
                "code": self.exit.name(), "message": self.message, "hint": self.hints.first(), "retryable": false,
            }),
        };
        json!({ "error": error })
    }
}

/// An error and what caused it, in one line; what a cause repeats of its effect is said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// The deepest cause alone: what the system said, without the layers that passed it on.
pub fn root(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(body) => Self::refused(*body),
            ClientError::Unreachable { ref url, ref source } => {
                Self::new(Exit::Unreachable, format!("cannot reach {url}: {}", root(source)))
            }
            ClientError::Broken { .. } => {
                Self::new(Exit::Unreachable, format!("the queen went away: {}", chain(&error)))
                    .hint("run it again; `rbee queen logs` shows why it ended")
            }
            ClientError::Idle { .. } => Self::new(Exit::Unreachable, chain(&error))
                .hint("`rbee doctor` looks at the daemons; `rbee down` stops them"),
            ClientError::Protocol { .. } => {
                Self::new(Exit::Fault, chain(&error)).hint("bring both ends to the same release")
            }
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(chain(&error)).hint("`rbee config` shows the settings once they can be read")
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Exit::Fault, error.to_string())
    }
}

/// A failed write to stdout: a reader that left is no failure.
pub fn stdout_failure(error: io::Error) -> Failure {
    let reader_left = error.kind() == io::ErrorKind::BrokenPipe;
    let exit = if reader_left { Exit::Done } else { Exit::Fault };
    Failure { reader_left, ..Failure::new(exit, format!("cannot write to stdout: {error}")) }
}
