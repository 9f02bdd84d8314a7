//! A runner without weights, for tests and measurements of everything above the tensors.
//!
//! The next token is a hash of the seed and of all tokens before it, so a client that knows the seed
//! can check a stream for order, loss and exact continuation ([`SimModel::expected_tokens`]). The runner
//! keeps nothing about a sequence but what it wrote into KV blocks, and reads all of it back through the
//! block table at each step: a wrong table, position or chunk gives wrong tokens or an error.

use crate::request::{OutputText, Piece, Pushed};
use crate::runner::{
    BlockId, Chunk, Logits, ModelLimits, ModelRunner, Reading, RunnerError, StepBatch, StepCounter, TokenId, Wanted,
};

/// The end-of-sequence id.
pub const EOS: TokenId = 0;

/// Ids below are the bytes of UTF-8 text; those from here on are words, and only they are generated.
pub const FIRST_WORD: TokenId = 256;

/// What decides the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimModel {
    /// Another seed is another model.
    pub seed: u64,
    /// Length of a logits row, more than [`FIRST_WORD`].
    pub vocab: usize,
    /// One in so many tokens is [`EOS`]; `None` for never.
    pub eos_every: Option<u32>,
    /// How sure the model is of its next token.
    pub shape: Shape,
}

impl Default for SimModel {
    fn default() -> Self {
        Self { seed: 0, vocab: 1024, eos_every: None, shape: Shape::Peaked }
    }
}

/// The distribution of the next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All but certain: the expected token at any temperature, top-p or seed.
    Peaked,
    /// Spread over the words: what comes depends on the sampling, as with a real model.
    Spread,
}

/// What one step has to pay for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens of prompts: in chunks of more than one.
    pub prefill_tokens: usize,
    /// Chunks of one token, and tokens in chunks with guesses.
    pub decode_tokens: usize,
}

/// The steps of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
/// OOPSLA 2014), the sequence folded in.
fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl SimModel {
    /// The token that follows a sequence with this hash.
    fn next(&self, hash: u64) -> TokenId {
        if self.eos_every.is_some_and(|n| n > 0 && mix(hash, 1).is_multiple_of(u64::from(n))) {
            return EOS;
        }
        let words = (self.vocab as u64).saturating_sub(u64::from(FIRST_WORD)).max(1);
        FIRST_WORD + (hash % words) as TokenId
    }

    fn fold(&self, tokens: impl IntoIterator<Item = TokenId>) -> u64 {
        tokens.into_iter().fold(mix(self.seed, 0), |hash, id| mix(hash, u64::from(id)))
    }

    /// The first `n` tokens of the answer to `prompt` from a [`Shape::Peaked`] model; shorter if one is
    /// [`EOS`], which is then the last.
    pub fn expected_tokens(&self, prompt: &[TokenId], n: usize) -> Vec<TokenId> {
        let mut hash = self.fold(prompt.iter().copied());
        let mut tokens = Vec::new();
        while tokens.len() < n && tokens.last() != Some(&EOS) {
            let id = self.next(hash);
            tokens.push(id);
            hash = mix(hash, u64::from(id));
        }
        tokens
    }

    fn fill(&self, hash: u64, row: &mut [f32]) {
        match self.shape {
            Shape::Peaked => row.fill(0.0),
            Shape::Spread => {
                for (id, logit) in (0u64..).zip(&mut *row) {
                    *logit = (mix(hash, id + 2) >> 40) as f32 / (1u32 << 22) as f32;
                }
                row[..FIRST_WORD as usize].fill(-100.0);
            }
        }
        let peak = if self.shape == Shape::Peaked { 1000.0 } else { 4.0 };
        row[self.next(hash) as usize] = peak;
    }
}

/// [`SimModel::expected_tokens`] of the model with this seed and all else as by default.
pub fn expected_tokens(seed: u64, prompt: &[TokenId], n: usize) -> Vec<TokenId> {
    SimModel { seed, ..SimModel::default() }.expected_tokens(prompt, n)
}

/// Text as tokens: its bytes.
pub fn encode(text: &str) -> Vec<TokenId> {
    text.bytes().map(TokenId::from).collect()
}

/// The text of a word: a space and two or more syllables. A byte has no text of its own in the output.
pub fn word(id: TokenId) -> String {
    const CONSONANTS: &[u8; 16] = b"bdfghjklmnprstvz";
    const VOWELS: &[u8; 4] = b"aeio";
    let Some(mut rest) = id.checked_sub(FIRST_WORD) else { return String::new() };
    let mut text = String::from(" ");
    for syllable in 0.. {
        if syllable >= 2 && rest == 0 {
            break;
        }
        text.push(char::from(CONSONANTS[(rest % 16) as usize]));
        text.push(char::from(VOWELS[(rest / 16 % 4) as usize]));
        rest /= 64;
    }
    text
}

/// Words as text, without stop strings.
#[derive(Clone, Copy, Debug, Default)]
pub struct SimText;

impl OutputText for SimText {
    fn push(&mut self, id: TokenId) -> Pushed {
        Pushed { piece: Piece::text(word(id)), stopped: false }
    }

    fn finish(&mut self) -> Piece {
        Piece::default()
    }
}

/// The runner.
pub struct SimRunner {
    model: SimModel,
    limits: ModelLimits,
    /// The token at each position of each block, `None` where nothing was written.
    kv: Vec<Option<TokenId>>,
    pace: Box<dyn FnMut(Work) + Send>,
    steps: StepCounter,
}

impl SimRunner {
    /// A runner that calls `pace` once per step, where its owner may spend the time such a step takes (and
    /// advance the counter meanwhile, if that is long), and advances `steps` once per step.
    ///
    /// # Panics
    /// If the vocabulary has no words.
    pub fn new(
        model: SimModel,
        context: usize,
        block_size: usize,
        kv_blocks: usize,
        steps: StepCounter,
        pace: Box<dyn FnMut(Work) + Send>,
    ) -> Self {
        assert!(model.vocab > FIRST_WORD as usize, "a vocabulary without words");
        let limits = ModelLimits { vocab: model.vocab, context, block_size, kv_blocks, reading: Reading::Causal };
        Self { model, kv: vec![None; block_size * kv_blocks], limits, pace, steps }
    }

    fn place(&self, blocks: &[BlockId], position: usize) -> Result<usize, RunnerError> {
        let size = self.limits.block_size;
        blocks
            .get(position / size)
            .map(|block| block.0 as usize * size + position % size)
            .filter(|place| *place < self.kv.len())
            .ok_or_else(|| RunnerError::Forward(format!("no block for position {position}")))
    }
}

impl ModelRunner for SimRunner {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        let mut work = Work::default();
        for chunk in &batch.chunks {
            match (chunk.tokens.len(), chunk.wanted) {
                (n @ 1, _) | (n, Wanted::LogitsOfAll) => work.decode_tokens += n,
                (n, _) => work.prefill_tokens += n,
            }
        }
        (self.pace)(work);
        for chunk in &batch.chunks {
            for (position, id) in (chunk.start..).zip(chunk.tokens) {
                let place = self.place(chunk.blocks, position)?;
                self.kv[place] = Some(*id);
            }
        }
        let wanted = |chunk: &Chunk<'_>| chunk.wanted.rows(chunk.tokens.len());
        logits.resize(batch.chunks.iter().map(wanted).sum(), self.limits.vocab);
        let mut row = 0;
        for chunk in batch.chunks.iter().filter(|chunk| wanted(chunk) > 0) {
            let mut hash = self.model.fold([]);
            let end = chunk.start + chunk.tokens.len();
            for position in 0..end {
                let id = self.kv[self.place(chunk.blocks, position)?];
                let id = id.ok_or_else(|| RunnerError::Forward(format!("position {position} was never written")))?;
                hash = mix(hash, u64::from(id));
                if position + wanted(chunk) >= end {
                    self.model.fill(hash, logits.row_mut(row));
                    row += 1;
                }
            }
        }
        let embedded = batch.chunks.iter().filter(|chunk| chunk.wanted == Wanted::Hidden);
        let rows = embedded.clone().map(|chunk| chunk.tokens.len()).sum();
        let tokens = embedded.flat_map(|chunk| chunk.tokens);
        for (out, id) in logits.hidden_mut(rows, HIDDEN).chunks_exact_mut(HIDDEN).zip(tokens) {
            out.copy_from_slice(&hidden_state(*id));
        }
        self.steps.advance();
        Ok(())
    }
}

/// Values of a simulated hidden state.
const HIDDEN: usize = 8;

/// The hidden state of a token, wherever it stands: exact in f32, so that sums of them are exact.
pub fn hidden_state(id: TokenId) -> [f32; HIDDEN] {
    let hash = mix(0, u64::from(id)).to_le_bytes();
    hash.map(|byte| f32::from(byte) - 127.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_distinct_and_readable() {
        let words: std::collections::BTreeSet<_> = (FIRST_WORD..20_000).map(word).collect();
        assert_eq!(words.len(), 20_000 - FIRST_WORD as usize);
        assert!(words.iter().all(|w| w[1..].bytes().all(|b| b.is_ascii_lowercase()) && w.starts_with(' ')));
    }

    #[test]
    fn the_model_ends_about_as_often_as_it_is_told() {
        let model = SimModel { eos_every: Some(20), ..SimModel::default() };
        let total: usize = (0..200).map(|i| model.expected_tokens(&[i], 10_000).len()).sum();
        assert!((2_500..5_500).contains(&total), "{total}");
    }
}
