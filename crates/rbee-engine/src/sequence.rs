//! One choice of one request on its way: its tokens, how many of them are in the KV, its blocks and its
//! text.
//!
//! There is no mode for prefill, decode or resume: a sequence has tokens that are not in the KV yet
//! (*pending*), and after the last of them is computed the next one is chosen. Decoding is the case of
//! one pending output token.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::error::EngineError;
use crate::kv::block_pool::Blocks;
use crate::logits::History;
use crate::request::{Finish, OutputText, RequestId, Spec, TokenLogprobs};
use crate::runner::TokenId;
use crate::sampling::{Draw, Sampler};

pub(crate) struct Sequence {
    pub(crate) request: RequestId,
    pub(crate) choice: u32,
    spec: Arc<Spec>,
    /// Prompt and output.
    tokens: Vec<TokenId>,
    /// How many of them are in the KV.
    computed: usize,
    /// How many of them were given, not generated here: prompt and resumed output.
    given: usize,
    /// Set on admission; dropping them frees them.
    blocks: Option<Blocks>,
    /// The engine's step in which this sequence last ran.
    pub(crate) last_step: u64,
    history: History,
    text: Box<dyn OutputText>,
    finish: Option<Finish>,
}

/// A token that a sequence has just got.
pub(crate) struct Generated {
    pub(crate) id: TokenId,
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<Box<TokenLogprobs>>,
}

impl Sequence {
    /// A sequence with its resumed output replayed; it may be finished already.
    pub(crate) fn new(
        request: RequestId,
        choice: u32,
        spec: &Arc<Spec>,
        prompt: &[TokenId],
        resume: &[TokenId],
        text: Box<dyn OutputText>,
    ) -> Result<Self, EngineError> {
        let mut sequence = Self {
            request,
            choice,
            spec: Arc::clone(spec),
            tokens: prompt.to_vec(),
            computed: 0,
            given: prompt.len() + resume.len(),
            blocks: None,
            last_step: 0,
            history: History::new(&spec.sampling, prompt),
            text,
            finish: None,
        };
        for id in resume {
            if sequence.finish.is_some() {
                return Err(EngineError::invalid("resume", format!("choice {choice} goes on after its end")));
            }
            sequence.push(*id)?;
        }
        Ok(sequence)
    }

    pub(crate) fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Positions it can ever need.
    pub(crate) fn positions(&self) -> usize {
        self.spec.prompt_tokens + self.spec.max_tokens
    }

    /// Output tokens so far.
    pub(crate) fn output_tokens(&self) -> usize {
        self.tokens.len() - self.spec.prompt_tokens
    }

    /// Tokens to compute before the first is generated.
    pub(crate) fn given_tokens(&self) -> usize {
        self.given
    }

    /// Tokens not in the KV; never 0 in an unfinished sequence.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether the pending token is one generated here.
    pub(crate) fn is_decoding(&self) -> bool {
        self.computed >= self.given
    }

    pub(crate) fn admit(&mut self, blocks: Blocks) {
        self.blocks = Some(blocks);
    }

    pub(crate) fn blocks(&self) -> Option<&Blocks> {
        self.blocks.as_ref()
    }

    /// The next `count` tokens to compute and the position of the first.
    pub(crate) fn chunk(&self, count: usize) -> (&[TokenId], usize) {
        (&self.tokens[self.computed..self.computed + count], self.computed)
    }

    /// `count` more tokens are in the KV.
    pub(crate) fn advance(&mut self, count: usize) {
        self.computed += count;
    }

    /// Chooses the next token from the logits of the last one.
    pub(crate) fn generate(&mut self, row: &[f32], sampler: &mut Sampler) -> Result<Generated, EngineError> {
        let spec = Arc::clone(&self.spec);
        let index = self.output_tokens();
        let masked = if index < spec.min_tokens { spec.eos.as_slice() } else { &[] };
        let draw = Draw { choice: self.choice, position: index };
        let id = sampler
            .sample(row, &spec.sampling, &self.history, masked, draw)
            .map_err(|_| EngineError::BadLogits { choice: self.choice, index })?;
        let logprobs = spec.logprobs.map(|top| Box::new(sampler.logprobs(row, id, top)));
        let text = self.push(id)?;
        Ok(Generated { id, index, text, logprobs })
    }

    /// Appends an output token, generated or replayed, and returns the text that became final.
    fn push(&mut self, id: TokenId) -> Result<String, EngineError> {
        self.tokens.push(id);
        self.history.record(id);
        let is_eos = self.spec.eos.contains(&id);
        let is_last = self.output_tokens() == self.spec.max_tokens;
        let text = &mut self.text;
        // The text comes from the request; a fault in it must not take the others along.
        let pushed = catch_unwind(AssertUnwindSafe(|| {
            if is_eos {
                return (text.finish(), Some(Finish::Stop));
            }
            let mut pushed = text.push(id);
            if pushed.stopped {
                return (pushed.text, Some(Finish::Stop));
            }
            if is_last {
                pushed.text.push_str(&text.finish());
                return (pushed.text, Some(Finish::Length));
            }
            (pushed.text, None)
        }));
        let (text, finish) = pushed.map_err(|_| EngineError::Internal("output text panicked".into()))?;
        self.finish = finish;
        Ok(text)
    }
}
