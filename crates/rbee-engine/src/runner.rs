//! The seam between the engine and the tensors: one [`ModelRunner::step`] is one forward pass over a
//! ragged batch of prefill chunks and decode tokens.
//!
//! A runner owns the weights and the KV storage; the engine owns which block belongs to whom. A row's
//! logits depend on that row's tokens and on build constants only, never on what else is in the batch,
//! on how a prompt was cut into chunks, or on the number of threads.

use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A vocabulary entry.
pub type TokenId = u32;

/// Index of one KV block in the runner's storage, `0..ModelLimits::kv_blocks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// How a model reads a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reading {
    /// Each token sees those before it: a text comes in chunks, over KV, and goes on with tokens of the model's own.
    #[default]
    Causal,
    /// Each token sees all others: a text comes in one chunk, without KV, and becomes an embedding.
    Whole,
}

/// What a loaded model can take. Fixed for the runner's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLimits {
    /// Length of a logits row.
    pub vocab: usize,
    /// Most positions of one sequence, prompt and output together.
    pub context: usize,
    /// Positions per KV block.
    pub block_size: usize,
    /// KV blocks in the runner's storage; none of a model that reads texts whole.
    pub kv_blocks: usize,
    /// How texts are read.
    pub reading: Reading,
}

/// Consecutive positions of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The tokens at positions `start..start + tokens.len()`; never empty.
    pub tokens: &'a [TokenId],
    /// Position of the first token; everything before it is in the KV blocks already.
    pub start: usize,
    /// The sequence's blocks in order, covering at least `start + tokens.len()` positions; none where texts are read whole.
    pub blocks: &'a [BlockId],
    /// The sequence's regime; the same in all its chunks.
    pub regime: Regime,
    /// What is wanted of it besides its KV.
    pub wanted: Wanted,
}

/// What a model computes differently for long texts. It is fixed from the prompt when a request comes, so that a text does not
/// depend on when it was computed; KV of one regime means nothing in the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Regime {
    /// As most models always are.
    #[default]
    Usual,
    /// The prompt is beyond the length that the model was first made for.
    Long,
}

/// What is wanted of a chunk besides its KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: more of its prompt is to come.
    Nothing,
    /// The logits of the last token.
    Logits,
    /// The logits of every token: all but the first are guesses, and those before each say whether it was right.
    LogitsOfAll,
    /// The hidden state of every token, after the last norm.
    Hidden,
    /// The embedding of the chunk, which is a whole text, as the model makes one: in the place of a single hidden state.
    Embedding,
}

impl Wanted {
    /// Rows of logits that come of a chunk of so many tokens.
    pub fn rows(self, tokens: usize) -> usize {
        match self {
            Self::Logits => 1,
            Self::LogitsOfAll => tokens,
            Self::Nothing | Self::Hidden | Self::Embedding => 0,
        }
    }
}

/// The input of one step. No sequence appears twice.
#[derive(Clone, Debug, Default)]
pub struct StepBatch<'a> {
    /// At least one chunk.
    pub chunks: Vec<Chunk<'a>>,
}

/// Memory that a runner has a better use of than any other: that its device writes to by itself.
pub trait Storage: DerefMut<Target = [f32]> + Send {}

impl<T: DerefMut<Target = [f32]> + Send> Storage for T {}

/// The output of one step: one row of `vocab` f32 per chunk that wanted logits, or per token of it, in order, and the hidden
/// states of the chunks that wanted those. The buffers are kept between steps.
pub struct Logits {
    vocab: usize,
    rows: usize,
    data: Box<dyn Storage>,
    width: usize,
    hidden: Vec<f32>,
}

impl Default for Logits {
    fn default() -> Self {
        Self::on(Box::new(Vec::new()))
    }
}

impl Logits {
    /// Rows that stand in this memory, as long as there is room for them.
    pub fn on(data: Box<dyn Storage>) -> Self {
        Self { vocab: 0, rows: 0, data, width: 0, hidden: Vec::new() }
    }

    /// Makes room for `rows` rows of `vocab` values; their content is unspecified.
    pub fn resize(&mut self, rows: usize, vocab: usize) {
        (self.rows, self.vocab) = (rows, vocab);
        if self.data.len() < rows * vocab {
            self.data = Box::new(vec![0.0; rows * vocab]);
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `i`, of `vocab` values.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.vocab..(i + 1) * self.vocab]
    }

    /// Row `i` for writing.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.vocab..(i + 1) * self.vocab]
    }

    /// Makes room for `rows` hidden states of `width` values and gives them, row-major; their content is unspecified.
    pub fn hidden_mut(&mut self, rows: usize, width: usize) -> &mut [f32] {
        self.width = width;
        self.hidden.resize(rows * width, 0.0);
        &mut self.hidden
    }

    /// The hidden states, one for each token of the chunks that wanted them.
    pub fn hidden(&self) -> std::slice::ChunksExact<'_, f32> {
        self.hidden.chunks_exact(self.width.max(1))
    }

    /// All rows, row-major.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.vocab]
    }
}

/// A step that failed. The KV of the sequences in the batch is then undefined from their chunk's start on.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The device has no memory left for this step.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The forward pass itself failed; the worker cannot be trusted further.
    #[error("forward pass failed: {0}")]
    Forward(String),
}

/// Tensors behind the engine.
pub trait ModelRunner: Send {
    /// What this model can take.
    fn limits(&self) -> &ModelLimits;

    /// What its steps are best given to leave their output in; once.
    fn logits(&mut self) -> Logits {
        Logits::default()
    }

    /// The regime of a text whose prompt has so many tokens.
    fn regime(&self, prompt: usize) -> Regime {
        let _ = prompt;
        Regime::Usual
    }

    /// Runs one forward pass: writes the K and V of every token of every chunk into its block, then
    /// leaves the logits rows and the hidden states that are wanted in `logits` (which it resizes). Positions after a
    /// guess that was wrong are written again before anything that came after them is read.
    ///
    /// # Errors
    /// [`RunnerError::OutOfMemory`] where the same batch in smaller pieces may work,
    /// [`RunnerError::Forward`] otherwise.
    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError>;

    /// Computes with so many threads from the next step on, where it has threads to choose.
    fn set_threads(&mut self, threads: usize) {
        let _ = threads;
    }

    /// There is nothing to compute until more is asked for.
    fn rest(&mut self) {}
}

/// Counts units of work that the compute thread has finished (a layer of a step). It moves whenever
/// work is done, so one that stands still while work is running means a hung engine.
#[derive(Clone, Debug, Default)]
pub struct StepCounter(Arc<AtomicU64>);

impl StepCounter {
    /// One more unit of work is done.
    pub fn advance(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Units of work done so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
