//! Tokenizer, chat template, incremental detokenizer and stop matcher.
//!
//! Everything between text and token ids, without files, clock or threads: the caller hands over the
//! bytes of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.
//!
//! Invariants:
//! - Text of a user never becomes a control token: [`Tokenizer::encode`] with [`Specials::AsText`] and
//!   [`Tokenizer::encode_chat`] keep `<|im_end|>` in a message as the letters it is made of.
//! - Files are hostile until checked: sizes, ids and template work are bounded, and a panic in a parser
//!   becomes an [`Error`].
//! - Output text does not depend on how the ids were grouped: [`TextStream`] gives the same text for
//!   any split, and holds back only what may still change.
//!
//! Start with [`Tokenizer`] (text to ids), [`ChatTemplate`] (messages to text), [`TextStream`]
//! (ids to text) and [`AnswerReader`] (text to reasoning, answer and tool calls).

mod answer;
mod chat;
mod config;
mod count;
mod detokenize;
mod error;
pub mod gguf;
mod grammar;
mod guard;
mod pieces;
mod stop;
mod stream;
mod template;
mod tokenizer;

pub use answer::{AnswerForm, AnswerReader, Begins, CallPart, Most, Piece, ReasoningTags};
pub use chat::{Chat, ChatPrompt, message};
pub use config::TokenizerConfig;
pub use detokenize::{Controls, Detokenizer, Start};
pub use error::Error;
pub use grammar::{Form, Grammar, Grammars, Matcher};
pub use stop::{MAX_STOPS, Scan, StopMatcher};
pub use stream::{Pushed, TextStream};
pub use template::{ChatTemplate, GenerationPrompt, MAX_TEMPLATE_BYTES, Render};
pub use tokenizer::{MAX_TOKENIZER_BYTES, Specials, Tokenizer};

/// A vocabulary entry.
pub type TokenId = u32;
