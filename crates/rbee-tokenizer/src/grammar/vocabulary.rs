//! The vocabulary as grammars see it: a trie of the bytes that each token adds to the text a user sees.

use std::sync::Arc;

use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

use crate::tokenizer::caught;
use crate::{Error, TokenId, Tokenizer};

/// Longest token that a grammar can use; the trie's own limit is 1,024 bytes.
const MAX_TOKEN_BYTES: usize = 1000;
/// Most bytes of all tokens: the trie has fewer nodes than this and can address four million.
const MAX_BYTES: usize = 4_000_000;

/// Tokens as tries. Control tokens, end ids and ids without text are in none of them: a grammar reaches them by their id alone.
#[derive(Clone)]
pub(super) struct Vocabulary {
    /// Tokens behind the first.
    pub(super) env: TokEnv,
    pub(super) slices: Arc<SlicedBiasComputer>,
    /// Tokens as the first of an answer, where that makes a difference.
    pub(super) first: Option<First>,
}

/// The first token, for tokenizers that put a space before a text and take it away again when they decode.
#[derive(Clone)]
pub(super) struct First {
    pub(super) env: TokEnv,
    pub(super) slices: Arc<SlicedBiasComputer>,
    /// Tokens that are nothing but this space.
    pub(super) blank: Arc<[TokenId]>,
}

/// Texts in which most tokens of a vocabulary match at once: a mask takes such a set whole in place of a walk over its tokens.
fn slices() -> Vec<String> {
    SlicedBiasComputer::json_slices()
}

impl Vocabulary {
    pub(super) fn new(tokenizer: &Tokenizer, eos: &[TokenId]) -> Result<Vocabulary, Error> {
        let ids = 0..tokenizer.vocab_size() as TokenId;
        let words: Vec<Vec<u8>> = ids.map(|id| word(tokenizer, eos, id)).collect();
        if words.iter().map(Vec::len).sum::<usize>() > MAX_BYTES {
            return Err(unsupported("its tokens are too long for grammars"));
        }
        let (env, computer) = trie(&words, eos, &slices())?;
        let first = match tokenizer.strip() {
            0 => None,
            1 => Some(First::new(words, eos)?),
            _ => {
                return Err(unsupported(
                    "its decoder takes several spaces from the beginning, which grammars cannot follow",
                ));
            }
        };
        Ok(Vocabulary { env, slices: computer, first })
    }

    /// What every grammar of this vocabulary holds besides its own.
    pub(super) fn extra_lexemes(&self) -> Vec<String> {
        slices()
    }
}

impl First {
    fn new(mut words: Vec<Vec<u8>>, eos: &[TokenId]) -> Result<First, Error> {
        let mut blank = Vec::new();
        for (id, word) in words.iter_mut().enumerate() {
            if word.first() == Some(&b' ') {
                word.remove(0);
                if word.is_empty() {
                    blank.push(id as TokenId);
                }
            }
        }
        let (env, slices) = trie(&words, eos, &[])?;
        Ok(First { env, slices, blank: blank.into() })
    }
}

/// The bytes of a token that may be text.
fn word(tokenizer: &Tokenizer, eos: &[TokenId], id: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    // 0xff is in no text, and is how the trie marks what is none.
    let none = tokenizer.is_control(id)
        || eos.contains(&id)
        || bytes.len() > MAX_TOKEN_BYTES
        || bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER);
    if none { Vec::new() } else { bytes.to_vec() }
}

fn trie(words: &[Vec<u8>], eos: &[TokenId], slices: &[String]) -> Result<(TokEnv, Arc<SlicedBiasComputer>), Error> {
    let end = eos.first().copied().unwrap_or(INVALID_TOKEN);
    let info = TokRxInfo::new(words.len() as u32, end);
    let built = caught(|| {
        let mut trie = TokTrie::from(&info, words);
        if !eos.is_empty() {
            trie = trie.with_eos_tokens(eos);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let computer = SlicedBiasComputer::new(&env, slices).map_err(|error| error.to_string())?;
        Ok((env, Arc::new(computer)))
    });
    let built = built.unwrap_or_else(|| Err("making its trie panicked".to_owned()));
    built.map_err(|problem| unsupported(&problem))
}

fn unsupported(reason: &str) -> Error {
    Error::Unsupported { what: "tokenizer.json", reason: reason.to_owned() }
}
