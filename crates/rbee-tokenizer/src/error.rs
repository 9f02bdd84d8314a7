//! What can go wrong between text and token ids.

/// An error of this crate. `Template` and `TemplateRefused` are `TEMPLATE_ERROR` on the wire; the
/// tokenizer variants mean a broken model folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is larger than any honest one.
    #[error("{what} has {size} bytes, more than the {limit} allowed")]
    TooLarge {
        /// Which file.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The cap in bytes.
        limit: usize,
    },
    /// A file does not parse or contradicts itself.
    #[error("{what} is corrupt: {reason}")]
    Corrupt {
        /// Which file.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is well formed but asks for something this crate does not do.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// Which file.
        what: &'static str,
        /// What it asks for.
        reason: String,
    },
    /// The chat template does not compile, fails, or exceeds its limits.
    #[error("chat template failed: {0}")]
    Template(String),
    /// The chat template called `raise_exception`: it does not take these messages.
    #[error("the chat template refused the messages: {0}")]
    TemplateRefused(String),
    /// A request that no template can honour.
    #[error("invalid chat request: {0}")]
    InvalidChat(String),
    /// The text could not be tokenized.
    #[error("cannot tokenize the text: {0}")]
    Encode(String),
    /// The text cannot fit into the context, however it is cut into tokens.
    #[error("a text of {bytes} bytes is longer than the context of {context} tokens can be")]
    TooLong {
        /// The text's size, template included.
        bytes: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    UnknownId {
        /// The id.
        id: u32,
        /// Number of ids the vocabulary spans.
        vocab: usize,
    },
    /// The stop strings break a limit.
    #[error("invalid stop strings: {0}")]
    InvalidStops(String),
    /// A form of answers that cannot be honoured, or an answer that does not fit its form.
    #[error("invalid grammar: {0}")]
    Grammar(String),
}
