//! What goes into the engine and what comes out.

use crate::error::EngineError;
use crate::runner::{ModelLimits, Reading, TokenId};
use crate::sampling::Sampling;

/// Most choices of one request.
pub const MAX_CHOICES: usize = 128;
/// Most alternatives reported beside a token.
pub const MAX_TOP_LOGPROBS: usize = 20;
/// Most end-of-sequence ids.
pub const MAX_EOS: usize = 64;

/// Names a request inside one engine; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

/// Turns the tokens of one choice into text, takes it apart and watches for stop strings.
pub trait OutputText: Send {
    /// The next token of the output. Text that may yet become part of a character, of a tag or of a stop string is
    /// held back; a stop string itself is never given out.
    fn push(&mut self, id: TokenId) -> Pushed;
    /// What is still held back, when the output ends without having stopped. Called at most once.
    fn finish(&mut self) -> Piece;
    /// Whether the output has a tool call.
    fn called(&self) -> bool {
        false
    }
}

/// Text that is final, by what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// For the reader.
    pub text: String,
    /// The model's reasoning.
    pub reasoning: String,
    /// Parts of tool calls.
    pub calls: Vec<CallPart>,
}

impl Piece {
    /// A piece of nothing but text.
    pub fn text(text: String) -> Self {
        Self { text, ..Self::default() }
    }

    /// Puts what came next behind it.
    pub(crate) fn append(&mut self, next: Self) {
        self.text.push_str(&next.text);
        self.reasoning.push_str(&next.reasoning);
        self.calls.extend(next.calls);
    }
}

/// A part of a tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallPart {
    /// The call's number in its choice, from 0.
    pub index: u32,
    /// The function's name, in the call's first part.
    pub name: Option<String>,
    /// More of its arguments.
    pub arguments: String,
}

/// The outcome of one pushed token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// What is final.
    pub piece: Piece,
    /// Whether the choice ends here: a stop string is complete, or a call after which nothing may come.
    pub stopped: bool,
}

/// What the tokens of one choice may be. Its answers are a function of the tokens it was told, in order.
pub trait Constraint: Send {
    /// The tokens that may come next: bit `id % 32` of word `id / 32`, and no token beyond the last word. `None` for any.
    /// End-of-sequence ids have their bits where the output may end.
    ///
    /// # Errors
    /// When it cannot tell; the request ends with it.
    fn mask(&mut self) -> Result<Option<&[u32]>, String>;

    /// The next token of the output, no end-of-sequence id. Whether the output is complete with it: then the choice ends.
    ///
    /// # Errors
    /// When this token may not come; the request ends with it.
    fn accept(&mut self, id: TokenId) -> Result<bool, String>;

    /// Told that a mask will be asked for when the next forward pass is over: time to begin with it elsewhere.
    fn prepare(&mut self) {}
}

/// One answer of a request; its number is its place in [`Request::choices`].
pub struct Choice {
    /// Its text, empty so far. A resumed choice is replayed through it first.
    pub text: Box<dyn OutputText>,
    /// What it may be, at its beginning; any where there is none. A resumed choice is replayed through it first.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Output tokens that exist already, from the first. They are counted and seen by penalties and text
    /// state as if made here, but not given out again.
    pub resume: Vec<TokenId>,
}

/// What a prompt is computed for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Goal {
    /// Tokens that go on from it.
    #[default]
    Answer,
    /// Its embedding: the mean of its tokens' hidden states, of length 1; of a model that reads texts whole, what that makes.
    Embedding,
}

/// A prompt and what to do with it.
pub struct Request {
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// What is wanted; for an embedding there is one choice, which gets no tokens.
    pub goal: Goal,
    /// Most output tokens per choice, resumed ones included; `None` is what the context leaves.
    pub max_tokens: Option<usize>,
    /// No end-of-sequence id is chosen before this many output tokens, unless a constraint leaves nothing else. Stop strings
    /// and constraints that are complete end a choice all the same.
    pub min_tokens: usize,
    /// Ids that end a choice.
    pub eos: Vec<TokenId>,
    /// Take an end-of-sequence id as a token like any other; not with a constraint, whose last token it may be.
    pub ignore_eos: bool,
    /// How tokens are chosen; choices differ by their number in the draw.
    pub sampling: Sampling,
    /// Log-probabilities: `None` for none, else the chosen token's and so many of the most likely (0 to 20).
    pub logprobs: Option<usize>,
    /// Whose request it is: prompts share KV blocks only within one tenant.
    pub tenant: [u8; 16],
    /// The answers wanted, at least one.
    pub choices: Vec<Choice>,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// An end-of-sequence id, a stop string or the end of what a constraint allows.
    Stop,
    /// As with `Stop`, and there is a tool call in the answer.
    Called,
    /// As many tokens as were asked for.
    Length,
    /// Cancelled.
    Cancelled,
}

/// Natural logarithms from the log-softmax of the model's own logits, before bias, penalties and
/// temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The most likely tokens, most likely first, ties by id.
    pub top: Vec<(TokenId, f32)>,
}

/// An event of one request. Order: `Started`, then `Prefill` and `Token` in turn, then one `Done`; a
/// `Failed` may come at any point and is then the last.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// The first choice has its memory and is about to run.
    Started {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Those of them whose KV was there already.
        cached_tokens: usize,
    },
    /// Part of the prompts (one per choice, with resumed tokens) is in the KV.
    Prefill {
        /// Tokens computed.
        done: usize,
        /// Tokens to compute.
        total: usize,
    },
    /// One generated token; every generated token gives exactly one.
    Token {
        /// Which answer.
        choice: u32,
        /// Position in its output, contiguous, resumed tokens counted.
        index: usize,
        /// The token; for the last of a choice it may be an end-of-sequence id.
        id: TokenId,
        /// What became final with it; may be empty. The last token of a choice carries all that was
        /// held back. An end-of-sequence id has no text of its own.
        piece: Piece,
        /// Where asked for.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// The embedding that a request was for.
    Embedding {
        /// As many values as a hidden state has.
        values: Vec<f32>,
    },
    /// The end of a request that was answered or cancelled.
    Done {
        /// Per choice.
        finish: Vec<Finish>,
        /// Tokens of the prompt, counted once.
        prompt_tokens: usize,
        /// Output tokens of all choices: end-of-sequence ids and resumed tokens are counted.
        completion_tokens: usize,
        /// Prompt tokens whose KV was there already.
        cached_tokens: usize,
    },
    /// The end of a request that was not.
    Failed(EngineError),
}

impl Output {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed(_))
    }
}

/// Everything about a request that its choices share.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) prompt_tokens: usize,
    pub(crate) goal: Goal,
    pub(crate) reading: Reading,
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) eos: Vec<TokenId>,
    pub(crate) sampling: Sampling,
    pub(crate) logprobs: Option<usize>,
}

impl Request {
    /// Checks every field against the model and settles `max_tokens`.
    pub(crate) fn spec(&self, limits: &ModelLimits) -> Result<Spec, EngineError> {
        let context = limits.context;
        let prompt = self.prompt.len();
        let in_vocab = |field, ids: &[TokenId]| match ids.iter().find(|id| **id as usize >= limits.vocab) {
            Some(id) => Err(EngineError::invalid(field, format!("has token {id}, which is outside the vocabulary"))),
            None => Ok(()),
        };
        if prompt == 0 {
            return Err(EngineError::invalid("prompt", "is empty"));
        }
        let too_long = || EngineError::ContextLength { prompt, max_tokens: self.max_tokens, context };
        if limits.reading == Reading::Whole && self.goal == Goal::Answer {
            return Err(EngineError::invalid("prompt", "is for models that go on from it; this one only embeds texts"));
        }
        // What is read whole leaves no room for tokens of the model's own.
        let room = context + usize::from(limits.reading == Reading::Whole);
        let left = room.checked_sub(prompt).filter(|left| *left > 0).ok_or_else(too_long)?;
        let max_tokens = self.max_tokens.unwrap_or(left);
        if max_tokens > left {
            return Err(too_long());
        }
        if max_tokens == 0 {
            return Err(EngineError::invalid("max_tokens", "must be at least 1"));
        }
        if self.min_tokens > max_tokens {
            return Err(EngineError::invalid("min_tokens", format!("is more than max_tokens ({max_tokens})")));
        }
        if self.choices.is_empty() || self.choices.len() > MAX_CHOICES {
            return Err(EngineError::invalid("choices", format!("must be 1 to {MAX_CHOICES}")));
        }
        if self.goal == Goal::Embedding && (self.choices.len() > 1 || !self.choices[0].resume.is_empty()) {
            return Err(EngineError::invalid("choices", "an embedding is one choice without tokens"));
        }
        let constrained = self.choices.iter().any(|choice| choice.constraint.is_some());
        if constrained && self.goal == Goal::Embedding {
            return Err(EngineError::invalid("choices", "an embedding has no tokens to constrain"));
        }
        if constrained && self.ignore_eos {
            return Err(EngineError::invalid("ignore_eos", "cannot be true for an answer of a given form, which ends"));
        }
        if self.logprobs.is_some_and(|n| n > MAX_TOP_LOGPROBS) {
            return Err(EngineError::invalid("logprobs", format!("must be 0 to {MAX_TOP_LOGPROBS}")));
        }
        if self.eos.len() > MAX_EOS {
            return Err(EngineError::invalid("eos", format!("must be at most {MAX_EOS} ids")));
        }
        in_vocab("prompt", &self.prompt)?;
        in_vocab("eos", &self.eos)?;
        for choice in &self.choices {
            in_vocab("resume", &choice.resume)?;
        }
        self.sampling.validate(limits.vocab)?;
        Ok(Spec {
            prompt_tokens: prompt,
            goal: self.goal,
            reading: limits.reading,
            max_tokens,
            min_tokens: self.min_tokens,
            eos: if self.ignore_eos { Vec::new() } else { self.eos.clone() },
            sampling: self.sampling.clone(),
            logprobs: self.logprobs,
        })
    }
}
