//! One choice of one request on its way: its tokens, how many of them are in the KV, its blocks and its
//! text.
//!
//! There is no mode for prefill, decode or resume: a sequence has tokens that are not in the KV yet
//! (*pending*), and after the last of them is computed the next one is chosen. Decoding is the case of
//! one pending output token.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::error::EngineError;
use crate::kv::block_pool::{Before, BlockPool, Blocks, Root};
use crate::logits::{History, Masks};
use crate::lookup::{LONGEST, Lookup};
use crate::request::{Choice, Constraint, Finish, Goal, OutputText, Piece, Pushed, RequestId, Spec, TokenLogprobs};
use crate::runner::{BlockId, Reading, TokenId, Wanted};
use crate::sampling::{Draw, Sampler};

pub(crate) struct Sequence {
    pub(crate) request: RequestId,
    pub(crate) choice: u32,
    pub(crate) root: Root,
    spec: Arc<Spec>,
    /// Prompt and output.
    tokens: Vec<TokenId>,
    /// How many of them are in the KV.
    computed: usize,
    /// How many of them were given, not generated here: prompt and resumed output.
    given: usize,
    /// Whether its tokens were computed before and are to be again.
    pub(crate) recomputes: bool,
    /// While it runs; dropping them gives them back.
    blocks: Option<Blocks>,
    /// The serial number of the content of each full block.
    contents: Vec<u64>,
    /// The engine's step in which this sequence last ran.
    pub(crate) last_step: u64,
    history: History,
    text: Box<dyn OutputText>,
    constraint: Option<Box<dyn Constraint>>,
    lookup: Lookup,
    /// The sum of the hidden states so far, of a sequence that is to become an embedding. One row after the other is added, so that
    /// it does not depend on how the prompt was cut.
    pooled: Vec<f64>,
    finish: Option<Finish>,
}

/// A token that a sequence has just got.
pub(crate) struct Generated {
    pub(crate) id: TokenId,
    pub(crate) index: usize,
    pub(crate) piece: Piece,
    pub(crate) logprobs: Option<Box<TokenLogprobs>>,
}

impl Sequence {
    /// A sequence with its resumed output replayed; it may be finished already.
    pub(crate) fn new(
        request: RequestId,
        number: u32,
        root: Root,
        spec: &Arc<Spec>,
        prompt: &[TokenId],
        choice: Choice,
    ) -> Result<Self, EngineError> {
        let Choice { text, constraint, resume } = choice;
        let mut sequence = Self {
            request,
            choice: number,
            root,
            spec: Arc::clone(spec),
            tokens: prompt.to_vec(),
            computed: 0,
            given: prompt.len() + resume.len(),
            recomputes: false,
            blocks: None,
            contents: Vec::new(),
            last_step: 0,
            history: History::new(&spec.sampling, prompt),
            text,
            constraint,
            lookup: Lookup::default(),
            pooled: Vec::new(),
            finish: None,
        };
        for id in resume {
            if sequence.finish.is_some() {
                return Err(EngineError::invalid("resume", format!("choice {number} goes on after its end")));
            }
            sequence.push(id).map_err(|error| match error {
                EngineError::Constraint { .. } => EngineError::invalid("resume", error.to_string()),
                other => other,
            })?;
        }
        sequence.prepare()?;
        Ok(sequence)
    }

    pub(crate) fn finish(&self) -> Option<Finish> {
        self.finish
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

    /// Takes blocks for all its tokens and the next one, of which those that hold its beginning need not be computed.
    /// Gives how many tokens that are; `None`, and nothing taken, when there are too few blocks.
    pub(crate) fn admit(&mut self, pool: &BlockPool, size: usize) -> Option<usize> {
        if self.is_whole() {
            return Some(0);
        }
        // The last token is always computed: its logits are wanted. Of an embedding every token's state is.
        let most = if self.embeds() { 0 } else { (self.tokens.len() - 1) / size };
        let (mut blocks, contents) = pool.find(self.root, &self.tokens, size, most);
        if !blocks.grow((self.tokens.len() + 1).div_ceil(size)) {
            return None;
        }
        self.computed = contents.len() * size;
        self.contents = contents;
        self.blocks = Some(blocks);
        Some(self.computed)
    }

    /// Takes blocks for `count` more tokens; false, and nothing taken, when there are too few.
    pub(crate) fn grow(&mut self, count: usize, size: usize) -> bool {
        let end = self.computed + count;
        self.is_whole() || self.blocks.as_mut().is_some_and(|blocks| blocks.grow(end.div_ceil(size)))
    }

    /// Gives all blocks back, to be computed again.
    pub(crate) fn preempt(&mut self) {
        self.blocks = None;
        self.lookup.forget();
        self.contents.clear();
        self.pooled.clear();
        self.computed = 0;
        self.given = self.tokens.len();
        self.recomputes = true;
    }

    /// Whether it is still computing a prompt that `other`, another answer to it, begins with.
    pub(crate) fn shares_with(&self, other: &Self) -> bool {
        !self.recomputes && !other.recomputes && self.computed < self.spec.prompt_tokens
    }

    /// Its blocks for so many positions, while it runs.
    pub(crate) fn blocks(&self, positions: usize, size: usize) -> &[BlockId] {
        self.blocks.as_ref().map_or(&[], |blocks| &blocks.ids()[..positions.div_ceil(size)])
    }

    /// The next `count` tokens to compute and the position of the first; those beyond the pending ones are drafted.
    pub(crate) fn chunk(&self, count: usize) -> (&[TokenId], usize) {
        let tokens = self.tokens[self.computed..].get(..count).unwrap_or_else(|| self.lookup.ahead(count));
        (tokens, self.computed)
    }

    /// Looks for a draft, while it decodes: no longer than what may still come. How likely each of its tokens is.
    pub(crate) fn draft(&mut self) -> impl Iterator<Item = f32> + use<> {
        let end = self.spec.prompt_tokens + self.spec.max_tokens;
        // The last token of all is never computed.
        let most = (end - self.tokens.len() - 1).min(LONGEST);
        self.lookup.draft(&self.tokens, most, end);
        self.lookup.odds()
    }

    /// No draft any more.
    pub(crate) fn forget_draft(&mut self) {
        self.lookup.forget();
    }

    /// Whether the token just generated is token `i` of the draft, all before it having been.
    pub(crate) fn meets(&mut self, i: usize, id: TokenId) -> bool {
        self.lookup.meets(i, id)
    }

    /// `count` more tokens are in the KV; blocks that are full now can be found by others.
    pub(crate) fn advance(&mut self, count: usize, size: usize) {
        self.computed += count;
        let Some(blocks) = &self.blocks else { return };
        for i in self.contents.len()..self.computed / size {
            let before = self.contents.last().map_or(Before::Root(self.root), |serial| Before::Content(*serial));
            self.contents.push(blocks.publish(i, before, &self.tokens[i * size..(i + 1) * size]));
        }
    }

    /// Whether its hidden states are wanted, and no tokens.
    pub(crate) fn embeds(&self) -> bool {
        self.spec.goal == Goal::Embedding
    }

    /// Whether it is computed in one piece, without KV.
    pub(crate) fn is_whole(&self) -> bool {
        self.spec.reading == Reading::Whole
    }

    /// What is wanted of its next `count` tokens.
    pub(crate) fn wanted(&self, count: usize) -> Wanted {
        match (self.embeds(), self.spec.reading) {
            (true, Reading::Whole) => Wanted::Embedding,
            (true, Reading::Causal) => Wanted::Hidden,
            (false, _) if count == self.pending() => Wanted::Logits,
            (false, _) => Wanted::Nothing,
        }
    }

    /// Takes the hidden states of the tokens just computed; the embedding and its end, with those of the last.
    pub(crate) fn pool<'h>(&mut self, mut rows: impl Iterator<Item = &'h [f32]>) -> Option<Vec<f32>> {
        if self.is_whole() {
            let values = rows.next()?.to_vec();
            self.finish = Some(Finish::Stop);
            return Some(values);
        }
        for row in rows {
            self.pooled.resize(row.len(), 0.0);
            self.pooled.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        if self.pending() > 0 {
            return None;
        }
        self.finish = Some(Finish::Stop);
        // The mean has the direction of the sum.
        let length = self.pooled.iter().map(|value| value * value).sum::<f64>().sqrt();
        let scale = if length > 0.0 { length.recip() } else { 0.0 };
        Some(self.pooled.iter().map(|value| (value * scale) as f32).collect())
    }

    /// Chooses the next token from the logits of the last one.
    pub(crate) fn generate(&mut self, row: &[f32], sampler: &mut Sampler) -> Result<Generated, EngineError> {
        let spec = Arc::clone(&self.spec);
        let index = self.output_tokens();
        let choice = self.choice;
        let only = match &mut self.constraint {
            Some(constraint) => guarded("constraint", || constraint.mask())?
                .map_err(|problem| EngineError::Constraint { choice, index, problem })?,
            None => None,
        };
        let mut masks = Masks { without: if index < spec.min_tokens { &spec.eos } else { &[] }, only };
        if !masks.leave_any(row.len()) {
            masks.without = &[];
            if !masks.leave_any(row.len()) {
                let problem = "no token is left that may come next".into();
                return Err(EngineError::Constraint { choice, index, problem });
            }
        }
        let id = sampler
            .sample(row, &spec.sampling, &self.history, masks, Draw { choice, position: index })
            .map_err(|_| EngineError::BadLogits { choice, index })?;
        let logprobs = spec.logprobs.map(|top| Box::new(sampler.logprobs(row, id, top)));
        let piece = self.push(id)?;
        self.prepare()?;
        Ok(Generated { id, index, piece, logprobs })
    }

    /// Tells the constraint that its next mask is wanted.
    fn prepare(&mut self) -> Result<(), EngineError> {
        match &mut self.constraint {
            Some(constraint) if self.finish.is_none() => guarded("constraint", || constraint.prepare()),
            _ => Ok(()),
        }
    }

    /// Appends an output token, generated or replayed, and returns what became final.
    fn push(&mut self, id: TokenId) -> Result<Piece, EngineError> {
        self.tokens.push(id);
        self.history.record(id);
        let is_eos = self.spec.eos.contains(&id);
        let is_last = self.output_tokens() == self.spec.max_tokens;
        let (choice, index) = (self.choice, self.output_tokens() - 1);
        let is_complete = match &mut self.constraint {
            Some(constraint) if !is_eos => guarded("constraint", || constraint.accept(id))?
                .map_err(|problem| EngineError::Constraint { choice, index, problem })?,
            _ => false,
        };
        let text = &mut self.text;
        let (piece, finish) = guarded("output text", || {
            let stop = |text: &dyn OutputText| if text.called() { Finish::Called } else { Finish::Stop };
            if is_eos {
                let piece = text.finish();
                return (piece, Some(stop(text.as_ref())));
            }
            let Pushed { mut piece, stopped } = text.push(id);
            if stopped {
                return (piece, Some(stop(text.as_ref())));
            }
            if is_complete {
                piece.append(text.finish());
                return (piece, Some(stop(text.as_ref())));
            }
            if is_last {
                piece.append(text.finish());
                return (piece, Some(Finish::Length));
            }
            (piece, None)
        })?;
        self.finish = finish;
        Ok(piece)
    }
}

/// Runs code that came with a request: a fault in it must not take the others along.
fn guarded<T>(what: &str, code: impl FnOnce() -> T) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(code)).map_err(|_| EngineError::Internal(format!("{what} panicked")))
}
