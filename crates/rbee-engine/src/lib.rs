//! The LLM engine without tensors: it turns requests into batches for a [`ModelRunner`] and the
//! logits that come back into tokens and text.
//!
//! Pure but for [`handle`]: no IO, clock, environment or threads. It knows neither the wire nor a
//! tokenizer; text comes through [`OutputText`], which each request brings, and the form that an answer must have
//! through [`Constraint`].
//!
//! Invariants
//! - The tokens of a request are a function of the request and the model alone: not of what else is in
//!   the batch, how prompts are cut, which tokens were guessed, who was cancelled, or where the request was resumed.
//! - Every accepted request ends in exactly one [`Output::Done`] or [`Output::Failed`].
//! - KV blocks are reserved for the whole of a sequence before its first token is computed, and are free
//!   again within one step of its end, whatever ended it.
//! - Every queue has a bound and an answer when it is full.
//!
//! Start reading at [`engine::Engine::step`]; [`handle::EngineHandle`] is what a server holds.

pub mod engine;
pub mod error;
mod gate;
pub mod handle;
pub mod kv;
mod logits;
mod lookup;
pub mod pace;
mod random;
mod request;
pub mod runner;
pub mod sampling;
mod schedule;
mod sequence;
pub mod sim;
mod speculation;

pub use engine::{Engine, EngineConfig, EngineStats};
pub use error::{EngineError, Overloaded};
pub use handle::{Canceller, Ended, EngineHandle, TokenStream};
pub use request::{
    CallPart, Choice, Constraint, Finish, Goal, Output, OutputText, Piece, Pushed, Request, RequestId, TokenLogprobs,
};
pub use runner::{ModelLimits, ModelRunner, Reading, Regime, RunnerError, StepCounter, TokenId};
pub use sampling::Sampling;
pub use speculation::Speculation;
