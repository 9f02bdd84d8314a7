//! The bytes of every token, as the tokenizer's decoder would write them.
//!
//! Decoding token by token is possible because every supported decoder is either a map on single
//! tokens or a step on the joined text that only touches its beginning.

use tokenizers::{Decoder, DecoderWrapper};

use crate::{Error, TokenId};

/// Bytes of every token id, and what the joined text loses at its beginning.
pub(crate) struct Pieces {
    /// All pieces, one after the other.
    bytes: Vec<u8>,
    /// End of each id's piece in `bytes`.
    ends: Vec<u32>,
    /// Spaces that the decoder takes from the beginning of a text.
    strip: usize,
}

impl Pieces {
    /// Decodes every token once. `tokens[id]` is the token's text, `None` for an unused id.
    pub(crate) fn new(
        tokens: impl Iterator<Item = Option<String>>,
        decoder: Option<&DecoderWrapper>,
    ) -> Result<Pieces, Error> {
        let plan = Plan::new(decoder)?;
        let mut pieces = Pieces { bytes: Vec::new(), ends: Vec::new(), strip: plan.strip };
        for token in tokens {
            if let Some(token) = token {
                plan.decode(token, &mut pieces.bytes)?;
            }
            let end =
                u32::try_from(pieces.bytes.len()).map_err(|_| unsupported("its vocabulary has over 4 GiB of text"))?;
            pieces.ends.push(end);
        }
        Ok(pieces)
    }

    /// The bytes of one token; empty for an id that has none.
    pub(crate) fn get(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = match id {
            0 => 0,
            _ => self.ends[id - 1],
        };
        &self.bytes[start as usize..end as usize]
    }

    /// Number of ids the table spans.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Spaces that a text loses at its beginning.
    pub(crate) fn strip(&self) -> usize {
        self.strip
    }
}

/// A decoder taken apart into what it does to one token and what it does to the joined text.
struct Plan<'d> {
    per_token: Vec<&'d DecoderWrapper>,
    /// A sentencepiece mark that stands for a space.
    metaspace: Option<char>,
    /// What a token begins with that goes on with the word before it; all others begin a word.
    continues: Option<&'d str>,
    /// `<0x0A>` is a byte.
    byte_fallback: bool,
    /// The token is written in the 256 letters of byte-level BPE.
    byte_level: bool,
    strip: usize,
}

impl<'d> Plan<'d> {
    fn new(decoder: Option<&'d DecoderWrapper>) -> Result<Plan<'d>, Error> {
        let mut steps = Vec::new();
        match decoder {
            Some(DecoderWrapper::Sequence(sequence)) => steps.extend(sequence.get_decoders()),
            Some(single) => steps.push(single),
            None => return Err(unsupported("it has no decoder")),
        }
        let mut plan = Plan {
            per_token: Vec::new(),
            metaspace: None,
            continues: None,
            byte_fallback: false,
            byte_level: false,
            strip: 0,
        };
        let mut joined = false;
        for step in steps {
            let bytes_already = plan.byte_fallback || plan.byte_level;
            match step {
                DecoderWrapper::Fuse(_) => joined = true,
                DecoderWrapper::Strip(strip) if joined && strip.content == ' ' && strip.stop == 0 => {
                    plan.strip = plan.strip.saturating_add(strip.start);
                }
                _ if joined || bytes_already => {
                    return Err(unsupported("its decoder works on the whole text"));
                }
                DecoderWrapper::Replace(_) => plan.per_token.push(step),
                DecoderWrapper::Strip(strip) if strip.stop == 0 => plan.per_token.push(step),
                DecoderWrapper::Metaspace(metaspace) => {
                    use tokenizers::decoders::metaspace::PrependScheme;
                    plan.metaspace = Some(metaspace.get_replacement());
                    plan.strip = match metaspace.get_prepend_scheme() {
                        PrependScheme::Never => 0,
                        PrependScheme::First | PrependScheme::Always => 1,
                    };
                }
                // The spaces that it would take from before punctuation stay: models with such tokens write no text.
                DecoderWrapper::WordPiece(words) => {
                    plan.continues = Some(&words.prefix);
                    plan.strip = 1;
                }
                DecoderWrapper::ByteFallback(_) => plan.byte_fallback = true,
                DecoderWrapper::ByteLevel(_) => {
                    plan.byte_level = true;
                    joined = true;
                }
                _ => return Err(unsupported("its decoder is of another kind")),
            }
        }
        Ok(plan)
    }

    /// Appends the bytes of one token.
    fn decode(&self, token: String, out: &mut Vec<u8>) -> Result<(), Error> {
        let mut text = token;
        for step in &self.per_token {
            text = step.decode_chain(vec![text]).map_err(|e| unsupported(&e.to_string()))?.concat();
        }
        if let Some(mark) = self.metaspace {
            text = text.replace(mark, " ");
        }
        if let Some(prefix) = self.continues {
            text = text.strip_prefix(prefix).map_or_else(|| format!(" {text}"), str::to_owned);
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(&text)
        {
            out.push(byte);
        } else if self.byte_level {
            // A token with a letter outside the 256 was added as it is.
            let start = out.len();
            for letter in text.chars() {
                match byte_of_letter(letter) {
                    Some(byte) => out.push(byte),
                    None => {
                        out.truncate(start);
                        out.extend_from_slice(text.as_bytes());
                        break;
                    }
                }
            }
        } else {
            out.extend_from_slice(text.as_bytes());
        }
        Ok(())
    }
}

/// `<0x0A>` is the byte 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    match hex.len() {
        2 => u8::from_str_radix(hex, 16).ok(),
        _ => None,
    }
}

/// GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 in
/// the order of the bytes.
fn byte_of_letter(letter: char) -> Option<u8> {
    let itself = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(letter) {
        code @ 0..=0xff => Some(code as u8).filter(|&b| itself(b)),
        code @ 0x100..0x144 => (0..=255u8).filter(|&b| !itself(b)).nth((code - 0x100) as usize),
        _ => None,
    }
}

fn unsupported(reason: &str) -> Error {
    Error::Unsupported { what: "tokenizer.json", reason: reason.to_owned() }
}
