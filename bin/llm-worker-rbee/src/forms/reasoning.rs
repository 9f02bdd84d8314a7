//! Where reasoning ends: the form of an answer holds for what comes behind it.
//!
//! A closing tag need not be a token of its own: it is found in the text, and tokens that would end the reasoning and already write
//! of the answer behind it are held back, as no form has had a say in that.

use std::sync::Arc;

use rbee_engine::TokenId;
use rbee_tokenizer::{Begins, Detokenizer, ReasoningTags, Tokenizer};

/// What the vocabulary has to do with a model's reasoning tags; made once per model.
pub(super) struct Marks {
    close: &'static str,
    /// The opening tag, where it is one token.
    open: Option<TokenId>,
    /// All tokens but those that end an answer.
    any: Vec<u32>,
    /// By how many letters of the closing tag are there already: the tokens that complete it and write more than white space.
    beyond: Vec<Vec<TokenId>>,
}

impl Marks {
    pub(super) fn new(tags: ReasoningTags, tokenizer: &Tokenizer, vocab: usize, eos: &[TokenId]) -> Self {
        let mut any = vec![u32::MAX; vocab.div_ceil(32)];
        for &id in eos.iter().filter(|&&id| (id as usize) < vocab) {
            any[id as usize / 32] &= !(1 << (id % 32));
        }
        let close = tags.close.as_bytes();
        let mut beyond = vec![Vec::new(); close.len()];
        for id in 0..TokenId::try_from(tokenizer.vocab_size()).unwrap_or(TokenId::MAX) {
            let bytes = tokenizer.token_bytes(id);
            let writes = |rest: &[u8]| !rest.is_ascii() || !rest.trim_ascii().is_empty();
            for (there, list) in beyond.iter_mut().enumerate() {
                let rest = match there {
                    0 => bytes.windows(close.len()).position(|part| part == close).map(|at| &bytes[at + close.len()..]),
                    _ => bytes.strip_prefix(&close[there..]),
                };
                if rest.is_some_and(writes) {
                    list.push(id);
                }
            }
        }
        Self { close: tags.close, open: tokenizer.token_to_id(tags.open), any, beyond }
    }
}

/// The reasoning before one answer.
pub(super) struct Reasoning {
    marks: Arc<Marks>,
    stage: Stage,
    detokenizer: Detokenizer,
    /// The end of its text.
    tail: String,
    mask: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing was written: it may begin, or the answer does.
    Before,
    Inside,
    Over,
}

/// Whose a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    Reasoning,
    Answer,
}

impl Reasoning {
    pub(super) fn new(marks: Arc<Marks>, begins: Begins, detokenizer: Detokenizer) -> Self {
        let stage = match begins {
            Begins::Reasoning => Stage::Inside,
            Begins::Fresh if marks.open.is_some() => Stage::Before,
            // What cannot be told from an answer by its first token is not begun.
            Begins::Fresh => Stage::Over,
        };
        Self { marks, stage, detokenizer, tail: String::new(), mask: Vec::new() }
    }

    /// Whether the answer is next, or may be.
    pub(super) fn wants_form(&self) -> bool {
        self.stage != Stage::Inside
    }

    /// The tokens that may come next, of which those of the answer's form are given where it is wanted.
    pub(super) fn mask<'m>(&'m mut self, form: Option<&'m [u32]>) -> &'m [u32] {
        match (self.stage, form) {
            (Stage::Over, Some(form)) => form,
            (Stage::Before, Some(form)) => {
                self.mask.clear();
                self.mask.extend_from_slice(form);
                if let Some(id) = self.marks.open
                    && let Some(word) = self.mask.get_mut(id as usize / 32)
                {
                    *word |= 1 << (id % 32);
                }
                &self.mask
            }
            _ => {
                self.mask.clear();
                self.mask.extend_from_slice(&self.marks.any);
                for (there, beyond) in self.marks.beyond.iter().enumerate() {
                    if self.tail.ends_with(&self.marks.close[..there]) {
                        for &id in beyond {
                            self.mask[id as usize / 32] &= !(1 << (id % 32));
                        }
                    }
                }
                &self.mask
            }
        }
    }

    /// Takes one more token and says whose it is.
    pub(super) fn take(&mut self, id: TokenId) -> Result<Whose, String> {
        match self.stage {
            Stage::Over => Ok(Whose::Answer),
            Stage::Before if self.marks.open == Some(id) => {
                self.stage = Stage::Inside;
                Ok(Whose::Reasoning)
            }
            Stage::Before => {
                self.stage = Stage::Over;
                Ok(Whose::Answer)
            }
            Stage::Inside => {
                self.detokenizer.push(id, &mut self.tail);
                let close = self.marks.close;
                if let Some(at) = self.tail.find(close) {
                    self.stage = Stage::Over;
                    if !self.tail[at + close.len()..].trim().is_empty() {
                        return Err("the token that ends the reasoning begins the answer".into());
                    }
                    self.tail.clear();
                } else {
                    let mut from = self.tail.len().saturating_sub(close.len());
                    while !self.tail.is_char_boundary(from) {
                        from += 1;
                    }
                    self.tail.drain(..from);
                }
                Ok(Whose::Reasoning)
            }
        }
    }
}
