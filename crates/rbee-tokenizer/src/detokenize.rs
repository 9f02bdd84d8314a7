//! Token ids to text, one at a time.
//!
//! A token may hold part of a character. What is not yet a whole character is held back; bytes that can
//! no longer become one are U+FFFD, one per maximal broken part, as in [`String::from_utf8_lossy`] of
//! all bytes together. Work per token is bounded by the token's own bytes.

use std::sync::Arc;

use crate::TokenId;
use crate::pieces::Pieces;
use crate::tokenizer::ControlSet;

/// Whether control tokens appear in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controls {
    /// They write nothing.
    Hide,
    /// They write their names, such as `<|im_end|>`.
    Show,
}

/// What stands before the first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing: an answer of its own. Tokenizers that put a space before a text lose it again here.
    Fresh,
    /// The text of a prompt: the first token's space belongs to the text.
    Continues,
}

/// Turns ids into text; see the module. Made by [`Tokenizer::detokenizer`](crate::Tokenizer::detokenizer).
#[derive(Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    control: Arc<ControlSet>,
    controls: Controls,
    /// Control tokens that appear though others are hidden.
    shown: Vec<TokenId>,
    /// Leading spaces still to be taken away.
    strip: usize,
    /// Bytes that may still become a character; at most three between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub(crate) fn new(pieces: Arc<Pieces>, control: Arc<ControlSet>, controls: Controls, start: Start) -> Detokenizer {
        let strip = match start {
            Start::Fresh => pieces.strip(),
            Start::Continues => 0,
        };
        Detokenizer { pieces, control, controls, shown: Vec::new(), strip, pending: Vec::new() }
    }

    /// Lets these control tokens appear, whatever becomes of the others.
    #[must_use]
    pub fn showing(self, ids: &[TokenId]) -> Detokenizer {
        Detokenizer { shown: ids.to_vec(), ..self }
    }

    /// Appends the text that one more token makes certain.
    pub fn push(&mut self, id: TokenId, out: &mut String) {
        if self.controls == Controls::Hide && self.control.contains(id) && !self.shown.contains(&id) {
            return;
        }
        let mut bytes = self.pieces.get(id);
        while self.strip > 0 && !bytes.is_empty() {
            match bytes {
                [b' ', rest @ ..] => {
                    bytes = rest;
                    self.strip -= 1;
                }
                _ => self.strip = 0,
            }
        }
        self.pending.extend_from_slice(bytes);
        self.drain(out);
    }

    /// Ends the text: what is held back can no longer become a character.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }

    fn drain(&mut self, out: &mut String) {
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(valid).expect("valid up to here"));
                    let Some(broken) = error.error_len() else {
                        rest = bad;
                        break;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &bad[broken..];
                }
            }
        }
        let consumed = self.pending.len() - rest.len();
        self.pending.drain(..consumed);
    }
}
