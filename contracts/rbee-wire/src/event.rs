//! What a job's stream is made of: one JSON object per event, tagged by `type`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ErrorBody;
use crate::ids::{JobId, WorkerId};
use crate::model::ModelRef;

/// One event of a job. Exactly one `done` or `error` ends every job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// The job waits for a worker.
    Queued {
        /// How many jobs are before it.
        position: u64,
        /// When it may start, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        eta_ms: Option<u64>,
    },
    /// A long step moves on.
    Progress {
        /// `download`, `start`, `load`, `warm_up`, `prefill`, `drain`, …
        stage: String,
        /// How much is done.
        done: u64,
        /// Of how much; 0 when unknown.
        total: u64,
        /// Of what: `bytes`, `tokens`, `steps`.
        unit: String,
        /// When it may be done, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        eta_ms: Option<u64>,
        /// What a person may want to know.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// The job runs on a worker.
    Started(Started),
    /// One generated token.
    Token(Token),
    /// What a person may want to know.
    Note {
        /// How serious it is.
        level: NoteLevel,
        /// A sentence.
        text: String,
        /// Facts for programs.
        #[serde(default, skip_serializing_if = "Map::is_empty")]
        fields: Map<String, Value>,
    },
    /// The typed result of an operation other than `infer`.
    Data {
        /// One of the types in [`crate::view`].
        value: Value,
    },
    /// The job moved to another worker, and its text goes on.
    Resumed {
        /// Where it ran.
        from_worker: WorkerId,
        /// Where it runs now.
        to_worker: WorkerId,
        /// Tokens that were out by then.
        at: u64,
        /// Whether the tokens are the very ones the first worker would have given.
        exact: bool,
    },
    /// The end of a job that worked or was cancelled.
    Done(Done),
    /// The end of a job that failed.
    Error(ErrorBody),
}

/// How serious a note is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoteLevel {
    /// Good to know.
    Info,
    /// Likely not what was wanted.
    Warn,
}

/// The job runs on a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Started {
    /// The job.
    pub job_id: JobId,
    /// The worker.
    pub worker_id: WorkerId,
    /// The model it serves.
    pub model: ModelRef,
    /// Tokens of the prompt, template included.
    pub prompt_tokens: u64,
    /// Of those, tokens whose KV was there already.
    pub cached_tokens: u64,
    /// The seed of the draw.
    pub seed: u64,
    /// Why this worker.
    pub why: String,
    /// Digest of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Two workers of the same numerics id give the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics_id: Option<String>,
}

/// One generated token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Token {
    /// Position in this choice's output, from 0.
    pub i: u64,
    /// Which answer, from 0.
    #[serde(default)]
    pub choice: u32,
    /// The text it made certain; may be empty.
    pub t: String,
    /// The vocabulary entry.
    pub id: u32,
    /// The model's reasoning that it made certain, where the model's family has it apart from the text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// Parts of tool calls that it made certain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallPart>,
    /// Its log-probability and the likeliest others, when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<TokenLogprobs>,
}

/// A part of a tool call; the parts of one index make the call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ToolCallPart {
    /// The call's number in its answer, from 0.
    pub index: u32,
    /// Names the call in the tool's answer; in its first part, and only there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The function; in the first part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More of the arguments, which together are JSON if the model wrote it well.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub arguments: String,
}

/// Natural logarithms of probabilities, of the model's own distribution before penalties and temperature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenLogprobs {
    /// The token's text alone, which `t` of the token itself may hold back.
    #[serde(default)]
    pub t: String,
    /// Of the token itself.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TopLogprob>,
}

/// One of the likeliest tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TopLogprob {
    /// The vocabulary entry.
    pub id: u32,
    /// Its text alone.
    pub t: String,
    /// Its log-probability.
    pub logprob: f32,
}

/// The end of a job that worked or was cancelled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Done {
    /// One per answer; empty for operations other than `infer`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ChoiceEnd>,
    /// Tokens in and out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Where the time went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

impl Done {
    /// Whether somebody cancelled the job.
    pub fn cancelled(&self) -> bool {
        self.choices.iter().any(|choice| choice.finish_reason == FinishReason::Cancelled)
    }

    /// The end of a job that was cancelled before it ran.
    pub fn cancelled_before_start() -> Self {
        Self { choices: vec![ChoiceEnd { finish_reason: FinishReason::Cancelled }], ..Self::default() }
    }
}

/// How one answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChoiceEnd {
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token or a stop text.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// Somebody cancelled the job.
    Cancelled,
    /// The model called a function.
    ToolCalls,
}

/// Tokens in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Tokens of the prompt, template included.
    pub prompt_tokens: u64,
    /// Tokens generated, of all answers, the ending one included.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// Prompt tokens whose KV was there already.
    pub cached_tokens: u64,
}

/// Where the time went, in milliseconds of the queen's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// From the post to the dispatch, loading not counted.
    pub queue_ms: f64,
    /// Waiting for the model to load.
    pub load_ms: f64,
    /// From the dispatch to the first token.
    pub prefill_ms: f64,
    /// The part of that which was spent on the way between the queen and the worker; 0 where the worker does not say.
    #[serde(default)]
    pub network_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
    /// From the post to the end.
    pub total_ms: f64,
    /// Tokens a second after the first one.
    pub tokens_per_s: f64,
}

impl Timings {
    /// As the HTTP header `Server-Timing` has it: milliseconds, each part under its name.
    pub fn server_timing(&self) -> String {
        let parts = [
            ("queue", self.queue_ms),
            ("load", self.load_ms),
            ("prefill", self.prefill_ms),
            ("network", self.network_ms),
            ("decode", self.decode_ms),
            ("total", self.total_ms),
        ];
        parts.map(|(name, ms)| format!("{name};dur={ms:.3}")).join(", ")
    }
}

impl Event {
    /// Whether the job is over with this event.
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Done(_) | Self::Error(_))
    }

    /// A note of that level.
    pub fn note(level: NoteLevel, text: impl Into<String>) -> Self {
        Self::Note { level, text: text.into(), fields: Map::new() }
    }

    /// Data from a typed value.
    pub fn data(value: &impl Serialize) -> Self {
        Self::Data { value: serde_json::to_value(value).expect("wire types serialize to JSON") }
    }
}
