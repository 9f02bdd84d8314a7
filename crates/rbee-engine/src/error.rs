//! What can end a request, or keep it from starting.

/// Why a request was not taken at all. Nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overloaded {
    /// Slots and queue are taken; try again later.
    #[error("the engine is full: {live} of {capacity} places taken")]
    Full {
        /// Choices running or waiting.
        live: usize,
        /// Slots and queue places together.
        capacity: usize,
    },
    /// The engine finishes what it has and takes no more.
    #[error("the engine is draining")]
    Draining,
    /// The engine has failed and will never run again.
    #[error("the engine has failed")]
    Dead,
}

/// Why a request ended without an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Prompt and answer do not fit the context; nothing is ever truncated.
    #[error("prompt of {prompt} tokens{} exceeds the context of {context}", answer(.max_tokens))]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for, `None` where the request left it open.
        max_tokens: Option<usize>,
        /// Most tokens of prompt and answer together.
        context: usize,
    },
    /// A parameter is outside its range.
    #[error("invalid {field}: {problem}")]
    Invalid {
        /// The field of the request or configuration.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// No place for it.
    #[error(transparent)]
    Overloaded(#[from] Overloaded),
    /// The model gave logits that are not numbers, or none was left to choose from.
    #[error("logits of choice {choice} at output position {index} are unusable")]
    BadLogits {
        /// The choice whose row it was.
        choice: u32,
        /// Position in the output.
        index: usize,
    },
    /// The constraint that the request brought failed, or allows no token at all.
    #[error("choice {choice} cannot go on in its form at output position {index}: {problem}")]
    Constraint {
        /// The choice.
        choice: u32,
        /// Position in the output.
        index: usize,
        /// What is wrong.
        problem: String,
    },
    /// The device has no memory for even one token of this request.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The forward pass failed; the engine takes no more work.
    #[error("forward pass failed: {0}")]
    Forward(String),
    /// The consumer left its stream full; tokens would have been lost.
    #[error("consumer too slow: {capacity} outputs unread")]
    SlowConsumer {
        /// Outputs a stream holds.
        capacity: usize,
    },
    /// The engine was told to stop at once.
    #[error("the engine was shut down")]
    ShutDown,
    /// A fault of the engine or of code given to it.
    #[error("internal fault: {0}")]
    Internal(String),
}

fn answer(max_tokens: &Option<usize>) -> String {
    max_tokens.map_or_else(String::new, |n| format!(" and answer of {n}"))
}

impl EngineError {
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }
}
