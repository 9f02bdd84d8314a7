//! `tokenizer.json`: checks, text to ids, and the way to a detokenizer.
//!
//! The `tokenizers` crate does the work; this file bounds it. Truncation, padding and dropout that a
//! file may ask for are switched off: a prompt is never cut and the same text gives the same ids.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizer, Token,
};

use crate::guard::{Guard, Whole, pick_sentinel};
use crate::pieces::Pieces;
use crate::{Controls, Detokenizer, Error, Start, TokenId};

const FILE: &str = "tokenizer.json";
/// Cap of the file; the largest vocabularies in use have about 33 MiB.
pub const MAX_TOKENIZER_BYTES: usize = 48 << 20;
/// Cap of the JSON values in it: bounds the memory that parsing takes.
const MAX_VALUES: usize = 4 << 20;
/// Cap of ids: tables are made with one entry each.
const MAX_VOCABULARY: usize = 1 << 22;

/// What control tokens written in a text mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Nothing: they are letters. For everything that a user wrote.
    AsText,
    /// They are themselves. For text of the model's own making, or a prompt asked for as it is.
    AsControl,
}

/// The ids that steer a model: ends, roles, padding.
#[derive(Clone, Debug, Default)]
pub(crate) struct ControlSet(HashSet<TokenId>);

impl ControlSet {
    pub(crate) fn contains(&self, id: TokenId) -> bool {
        self.0.contains(&id)
    }
}

/// A checked tokenizer. Cheap to share behind an `Arc`; all calls take `&self`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Arc<Pieces>,
    control: Arc<ControlSet>,
    guard: Guard,
    /// The id that stands for unknown text; control by name, but harmless.
    unknown: Option<TokenId>,
    /// What the post-processor puts before a text, such as a BOS id, and behind it.
    around: (Vec<TokenId>, Vec<TokenId>),
    /// The context in tokens, and the most bytes that a text within it can have.
    bound: Option<(usize, usize)>,
}

/// How many times shorter a normalizer may make a text: a ligature of three bytes becomes a letter of one.
const SHRINKS: usize = 4;

/// Bytes of a text that is always looked at where any word that is not known becomes one token, and spaces none.
const WORDS: usize = 64 << 10;

/// The part of the file that is compared with what the parser made of it.
#[derive(Deserialize)]
struct Declared {
    #[serde(default)]
    added_tokens: Vec<DeclaredToken>,
}

#[derive(Deserialize)]
struct DeclaredToken {
    id: TokenId,
    content: String,
    special: bool,
}

impl Tokenizer {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Corrupt`] when it does not parse or its ids contradict each other,
    /// [`Error::Unsupported`] for decoders that cannot stream. Never panics.
    pub fn from_json(bytes: &[u8]) -> Result<Tokenizer, Error> {
        if bytes.len() > MAX_TOKENIZER_BYTES {
            return Err(Error::TooLarge { what: FILE, size: bytes.len(), limit: MAX_TOKENIZER_BYTES });
        }
        crate::count::check_values(bytes, MAX_VALUES).map_err(|e| corrupt(&e))?;
        caught(|| Tokenizer::load(bytes)).unwrap_or_else(|| Err(corrupt("its parser panicked")))
    }

    fn load(bytes: &[u8]) -> Result<Tokenizer, Error> {
        let declared: Declared = serde_json::from_slice(bytes).map_err(|e| corrupt(&e.to_string()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| corrupt(&e.to_string()))?;
        inner.with_truncation(None).map_err(|e| corrupt(&e.to_string()))?;
        inner.with_padding(None);
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }

        let span = check_ids(&inner, &declared)?;
        let control: HashSet<TokenId> =
            declared.added_tokens.iter().filter(|token| token.special).map(|token| token.id).collect();
        let added = inner.get_added_vocabulary();
        let pieces = Pieces::new(
            (0..span as TokenId).map(|id| added.simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id))),
            inner.get_decoder(),
        )?;
        let around = around(&inner, span)?;
        let mut tokenizer = Tokenizer {
            unknown: unknown_id(inner.get_model()),
            inner,
            pieces: Arc::new(pieces),
            control: Arc::default(),
            guard: Guard::new([])?,
            around,
            bound: None,
        };
        tokenizer.set_control(control)?;
        Ok(tokenizer)
    }

    /// Makes more ids control tokens: the end ids of a `generation_config.json` need not be marked as
    /// special in the tokenizer's own file.
    ///
    /// # Errors
    /// [`Error::UnknownId`] for an id that the vocabulary does not have.
    pub fn with_control_ids(mut self, ids: &[TokenId]) -> Result<Tokenizer, Error> {
        let mut control = self.control.0.clone();
        for &id in ids {
            if self.id_to_token(id).is_none() {
                return Err(Error::UnknownId { id, vocab: self.vocab_size() });
            }
            control.insert(id);
        }
        self.set_control(control)?;
        Ok(self)
    }

    /// The tokenizer of a model with a context of so many tokens: it refuses a text that would be longer even as the longest
    /// tokens there are. Making ids takes over a hundred times a text's memory, so that this is found out before.
    #[must_use]
    pub fn with_context(mut self, context: usize) -> Tokenizer {
        let longest = (0..self.vocab_size() as TokenId).map(|id| self.token_bytes(id).len()).max().unwrap_or(0);
        let most = context.saturating_mul(longest).saturating_mul(SHRINKS);
        let least = if matches!(self.inner.get_model(), ModelWrapper::WordPiece(_)) { WORDS } else { 0 };
        self.bound = Some((context, most.max(least)));
        self
    }

    fn set_control(&mut self, control: HashSet<TokenId>) -> Result<(), Error> {
        let texts = control.iter().filter_map(|&id| self.id_to_token(id));
        self.guard = Guard::new(texts)?;
        self.control = Arc::new(ControlSet(control));
        Ok(())
    }

    /// Number of ids the vocabulary spans: the highest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Checks that every id has a row in a model with `rows` logits.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the model is too small for this tokenizer.
    pub fn check_fits(&self, rows: usize) -> Result<(), Error> {
        match self.vocab_size() <= rows {
            true => Ok(()),
            false => Err(corrupt(&format!("it has ids up to {}, the model only {rows} rows", self.vocab_size() - 1))),
        }
    }

    /// The id of a token, by its exact name.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// The name of a token.
    pub fn id_to_token(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether an id is a control token.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.control.contains(id)
    }

    /// The control token ids, ascending.
    pub fn control_ids(&self) -> Vec<TokenId> {
        let mut ids: Vec<TokenId> = self.control.0.iter().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// The bytes that a token writes; empty for an id without text.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.pieces.get(id)
    }

    /// The ids of a text, without what a model wants before or after it.
    ///
    /// # Errors
    /// [`Error::Encode`] when the tokenizer fails on the text.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<TokenId>, Error> {
        match specials {
            Specials::AsControl => self.encode_guarded(text, None),
            Specials::AsText => {
                let sentinel = self.sentinel([text])?;
                let marked = self.guard.mark(text, sentinel, Whole::Leave);
                self.encode_guarded(&marked, Some(sentinel))
            }
        }
    }

    /// The ids of a raw prompt: with the BOS id, if the tokenizer puts one before a text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str, specials: Specials) -> Result<Vec<TokenId>, Error> {
        let mut ids = self.around.0.clone();
        ids.extend(self.encode(text, specials)?);
        Ok(ids)
    }

    /// The ids of a text that is complete, written by a user: with all that the tokenizer puts around one, such as `[CLS]` and `[SEP]`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_whole(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        let mut ids = self.encode_prompt(text, Specials::AsText)?;
        ids.extend(&self.around.1);
        Ok(ids)
    }

    /// Spaces that a text loses at its beginning.
    pub(crate) fn strip(&self) -> usize {
        self.pieces.strip()
    }

    /// A detokenizer for one answer.
    pub fn detokenizer(&self, controls: Controls, start: Start) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.pieces), Arc::clone(&self.control), controls, start)
    }

    /// The text of these ids, decoded at once.
    pub fn decode(&self, ids: &[TokenId], controls: Controls) -> String {
        let mut detokenizer = self.detokenizer(controls, Start::Fresh);
        let mut text = String::new();
        for &id in ids {
            detokenizer.push(id, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// A character that none of the texts has and that this tokenizer's normalizer leaves alone.
    pub(crate) fn sentinel<'t>(&self, texts: impl IntoIterator<Item = &'t str>) -> Result<char, Error> {
        pick_sentinel(texts, |candidate| {
            let text = format!("a{candidate}b");
            let Some(normalizer) = self.inner.get_normalizer() else {
                return true;
            };
            let mut normalized = NormalizedString::from(text.as_str());
            caught(|| normalizer.normalize(&mut normalized).is_ok()).unwrap_or(false)
                && normalized.get().contains(&text)
        })
    }

    /// Tokenizes text in which control tokens are broken by `sentinel` wherever they are not meant.
    ///
    /// These are the steps of `tokenizers::Tokenizer::encode`, with the sentinel taken out between the
    /// search for added tokens and the model.
    pub(crate) fn encode_guarded(&self, text: &str, sentinel: Option<char>) -> Result<Vec<TokenId>, Error> {
        if let Some((context, most)) = self.bound
            && text.len() > most
        {
            return Err(Error::TooLong { bytes: text.len(), context });
        }
        let run = || -> tokenizers::Result<Vec<TokenId>> {
            let mut splits = self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(sentinel) = sentinel {
                splits.normalize(|split| {
                    if split.get().contains(sentinel) {
                        split.filter(|c| c != sentinel);
                    }
                    Ok(())
                })?;
            }
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut splits)?;
            }
            splits.tokenize(|split| self.tokenize_plain(split.get()))?;
            Ok(splits
                .get_splits(OffsetReferential::Normalized, OffsetType::None)
                .into_iter()
                .flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id))
                .collect())
        };
        caught(run).unwrap_or_else(|| Err("the tokenizer panicked".into())).map_err(|e| Error::Encode(e.to_string()))
    }

    /// The model's tokens of a text that has no control token.
    ///
    /// A model whose vocabulary holds control tokens may still find one: Unigram does. The text is then
    /// cut inside of it and its parts are tokenized.
    fn tokenize_plain(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let tokens = self.inner.get_model().tokenize(text)?;
        let cuts: Vec<usize> = tokens
            .iter()
            .filter(|token| self.control.contains(token.id) && Some(token.id) != self.unknown)
            .map(|token| {
                let (start, end) = token.offsets;
                let first = text.get(start..end).and_then(|t| t.chars().next()).map_or(0, char::len_utf8);
                match first > 0 && start + first < end {
                    true => Ok(start + first),
                    false => Err("a single character is a control token"),
                }
            })
            .collect::<Result<_, _>>()?;
        if cuts.is_empty() {
            return Ok(tokens);
        }
        let mut parts = Vec::new();
        let mut from = 0;
        for cut in cuts.into_iter().chain([text.len()]) {
            if from < cut {
                parts.extend(self.tokenize_plain(&text[from..cut])?);
            }
            from = cut;
        }
        Ok(parts)
    }
}

/// Checks that ids are unique, bounded and those that the file declares; returns how many they span.
fn check_ids(inner: &tokenizers::Tokenizer, declared: &Declared) -> Result<usize, Error> {
    let vocabulary: HashMap<String, TokenId> = inner.get_vocab(true);
    let Some(&last) = vocabulary.values().max() else {
        return Err(corrupt("it has no tokens"));
    };
    let span = last as usize + 1;
    if span > MAX_VOCABULARY {
        return Err(corrupt(&format!("it has an id of {last}")));
    }
    let mut seen = vec![false; span];
    for (token, &id) in &vocabulary {
        if std::mem::replace(&mut seen[id as usize], true) {
            return Err(corrupt(&format!("id {id} has a second token, {token:?}")));
        }
    }
    for token in &declared.added_tokens {
        if vocabulary.get(&token.content) != Some(&token.id) {
            return Err(corrupt(&format!(
                "the added token {:?} declares id {}, which is not its place in the vocabulary",
                token.content, token.id
            )));
        }
    }
    Ok(span)
}

/// The ids that the post-processor puts before and behind a text.
fn around(inner: &tokenizers::Tokenizer, span: usize) -> Result<(Vec<TokenId>, Vec<TokenId>), Error> {
    let encoding = inner.encode("a", true).map_err(|e| corrupt(&e.to_string()))?;
    let (ids, special) = (encoding.get_ids(), encoding.get_special_tokens_mask());
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= span) {
        return Err(Error::UnknownId { id, vocab: span });
    }
    let before = special.iter().take_while(|special| **special == 1).count();
    let behind = special[before..].iter().rev().take_while(|special| **special == 1).count();
    Ok((ids[..before].to_vec(), ids[ids.len() - behind..].to_vec()))
}

fn unknown_id(model: &ModelWrapper) -> Option<TokenId> {
    let named = |token: &str| model.token_to_id(token);
    match model {
        ModelWrapper::BPE(bpe) => bpe.unk_token.as_deref().and_then(named),
        ModelWrapper::WordPiece(wordpiece) => named(&wordpiece.unk_token),
        ModelWrapper::WordLevel(wordlevel) => named(&wordlevel.unk_token),
        ModelWrapper::Unigram(_) => named("<unk>"),
    }
}

/// Runs code of the parser that may panic on hostile input.
pub(crate) fn caught<T>(run: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(run)).ok()
}

fn corrupt(reason: &str) -> Error {
    Error::Corrupt { what: FILE, reason: reason.to_owned() }
}
