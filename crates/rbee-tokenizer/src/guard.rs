//! Keeps control tokens out of text that a user wrote.
//!
//! A control token written in a message must stay the letters it is made of, also after a chat template
//! trimmed, split or joined the message. So a *sentinel*, one character that occurs nowhere in the
//! request, is put inside every place where a control token could come to lie over the user's text, and
//! taken out again after the tokenizer has looked for control tokens and before it tokenizes the rest.
//! Text without such a place is not touched, and its ids are those of any other implementation.
//!
//! Matching ignores ASCII case, so a template that lowers a message cannot make a control token of it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};

use aho_corasick::AhoCorasick;

use crate::Error;

/// Rare printable letters without case or decomposition: cuneiform, hieroglyphs, rare ideographs.
const SENTINELS: [std::ops::RangeInclusive<char>; 3] =
    ['\u{12000}'..='\u{12399}', '\u{13000}'..='\u{1342e}', '\u{20000}'..='\u{2a6df}'];
/// Sentinels tried against the tokenizer's normalizer before giving up.
const MAX_TRIES: usize = 64;

/// Which texts are guarded where a control token would *surround* the whole of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    /// Message texts: a template might write `<|` and `|>` around them.
    Guard,
    /// Keys and settings, which templates compare with constants.
    Leave,
}

/// The texts of the control tokens, prepared for search. All are ASCII-lowercased.
pub(crate) struct Guard {
    texts: Vec<String>,
    search: Option<AhoCorasick>,
    /// Proper prefixes and suffixes of the texts.
    heads: HashSet<String>,
    tails: HashSet<String>,
    /// Bytes of the longest text.
    longest: usize,
}

impl Guard {
    /// Prepares the search for these control token texts.
    pub(crate) fn new(texts: impl IntoIterator<Item = String>) -> Result<Guard, Error> {
        let mut texts: Vec<String> =
            texts.into_iter().filter(|t| !t.is_empty()).map(|t| t.to_ascii_lowercase()).collect();
        texts.sort_unstable();
        texts.dedup();
        if let Some(text) = texts.iter().find(|t| t.chars().nth(1).is_none()) {
            return Err(Error::Unsupported {
                what: "tokenizer.json",
                reason: format!("the control token {text:?} is a single character"),
            });
        }
        let mut heads = HashSet::new();
        let mut tails = HashSet::new();
        for text in &texts {
            for (at, _) in text.char_indices().skip(1) {
                heads.insert(text[..at].to_owned());
                tails.insert(text[at..].to_owned());
            }
        }
        let search = match texts.is_empty() {
            true => None,
            false => Some(
                AhoCorasick::builder()
                    .ascii_case_insensitive(true)
                    .build(&texts)
                    .map_err(|e| Error::Unsupported { what: "tokenizer.json", reason: e.to_string() })?,
            ),
        };
        Ok(Guard { longest: texts.iter().map(String::len).max().unwrap_or(0), texts, search, heads, tails })
    }

    /// `text` with `sentinel` wherever a control token could come to lie over it.
    pub(crate) fn mark<'t>(&self, text: &'t str, sentinel: char, whole: Whole) -> Cow<'t, str> {
        let places = self.places(text, whole);
        if places.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut marked = String::with_capacity(text.len() + places.len() * sentinel.len_utf8());
        let mut from = 0;
        for place in places {
            marked.push_str(&text[from..place]);
            marked.push(sentinel);
            from = place;
        }
        marked.push_str(&text[from..]);
        Cow::Owned(marked)
    }

    /// Byte offsets at which a sentinel breaks every control token over `text`.
    fn places(&self, text: &str, whole: Whole) -> BTreeSet<usize> {
        let mut places = BTreeSet::new();
        let Some(search) = &self.search else {
            return places;
        };
        for found in search.find_overlapping_iter(text) {
            places.insert(found.start() + first_char(&text[found.start()..]));
        }
        // A template may trim the text before it joins it with others, or not.
        let left = text.len() - text.trim_start().len();
        let right = text.trim_end().len();
        for end in BTreeSet::from([right, text.len()]) {
            self.begun_at_the_end(&text[..end], &mut places);
        }
        for start in BTreeSet::from([left, 0]) {
            self.ended_at_the_start(text, start, &mut places);
        }
        if whole == Whole::Guard && left < right && right - left < self.longest {
            let inner = text[left..right].to_ascii_lowercase();
            if self.texts.iter().any(|t| t.contains(&inner)) {
                places.insert(left);
            }
        }
        places
    }

    /// Control tokens that begin at the end of `text` and would go on behind it.
    fn begun_at_the_end(&self, text: &str, places: &mut BTreeSet<usize>) {
        for length in 1..self.longest.min(text.len() + 1) {
            let start = text.len() - length;
            if text.is_char_boundary(start) && self.heads.contains(&text[start..].to_ascii_lowercase()) {
                places.insert(start + first_char(&text[start..]));
            }
        }
    }

    /// Control tokens that began before `text[start..]` and would end in it.
    fn ended_at_the_start(&self, text: &str, start: usize, places: &mut BTreeSet<usize>) {
        let text = &text[start..];
        for length in 1..self.longest.min(text.len() + 1) {
            if text.is_char_boundary(length) && self.tails.contains(&text[..length].to_ascii_lowercase()) {
                places.insert(match first_char(text) {
                    // Nothing fits inside a single character: the edge has to do.
                    first if first == length => start,
                    first => start + first,
                });
            }
        }
    }
}

fn first_char(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

/// Picks a sentinel that occurs in none of `texts` and that `survives` the tokenizer's normalizer.
pub(crate) fn pick_sentinel<'t>(
    texts: impl IntoIterator<Item = &'t str>,
    survives: impl Fn(char) -> bool,
) -> Result<char, Error> {
    let mut used = HashSet::new();
    for text in texts {
        used.extend(text.chars().filter(|&c| c >= *SENTINELS[0].start()));
    }
    let free = SENTINELS.iter().cloned().flatten().filter(|c| !used.contains(c));
    let mut tried = 0;
    for candidate in free.take(MAX_TRIES) {
        if survives(candidate) {
            return Ok(candidate);
        }
        tried += 1;
    }
    match tried {
        0 => Err(Error::InvalidChat("the messages use every character that could guard them".to_owned())),
        _ => Err(Error::Unsupported {
            what: "tokenizer.json",
            reason: "its normalizer changes every character that could guard user text".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard::new(["<|im_end|>", "<|user|>", "[/INST]"].map(str::to_owned)).unwrap()
    }

    /// Every way in which neighbours and the text could form a control token again.
    #[test]
    fn no_neighbour_can_complete_a_control_token() {
        let texts = [
            "<|im_end|>",
            "a <|IM_end|> b",
            "<|im_",
            "end|> x",
            "user",
            " user ",
            "<",
            ">",
            "x [/INS",
            "T]",
            "|",
            "<|im_end|",
            "|im_end|>",
            "  <|  ",
            "<|<|im_end|>user|>",
        ];
        let pieces = ["", "<", "<|", "|>", ">", "<|im_", "T]", "[/INS", "|im_end|>", "<|im_end|"];
        let guard = guard();
        for text in texts {
            let marked = guard.mark(text, '\u{12000}', Whole::Guard);
            for version in [marked.as_ref(), marked.trim(), &marked.to_lowercase()] {
                for before in pieces {
                    for after in pieces {
                        let joined = format!("{before}{version}{after}");
                        for control in ["<|im_end|>", "<|user|>", "[/INST]"] {
                            let outside = before.matches(control).count() + after.matches(control).count();
                            assert_eq!(joined.matches(control).count(), outside, "{joined:?}");
                        }
                    }
                }
            }
            assert_eq!(marked.replace('\u{12000}', ""), text);
        }
    }

    #[test]
    fn harmless_text_is_not_touched() {
        for text in ["Hello, world!", "a < b", "1 + 1", "", "  ", "the end."] {
            assert!(matches!(guard().mark(text, '\u{12000}', Whole::Guard), Cow::Borrowed(_)));
        }
    }

    #[test]
    fn a_sentinel_never_occurs_in_the_texts() {
        let texts = ["a\u{12000}", "\u{12001}b"];
        assert_eq!(pick_sentinel(texts, |_| true).unwrap(), '\u{12002}');
        assert!(pick_sentinel(texts, |_| false).is_err());
    }
}
