//! Finds stop strings in text that comes in pieces.
//!
//! The first stop string to *end* in the text wins; of several that end at the same place the longest.
//! That is a property of the whole text, so the result is the same however the text was cut. A suffix
//! that may still become a stop string is held back, and the stop text itself is never sent.

use crate::Error;

/// Most stop strings of one request.
pub const MAX_STOPS: usize = 16;
/// Most bytes of one stop string: it is also the most text that can be held back.
const MAX_STOP_BYTES: usize = 1024;

/// What a piece of text did to the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// No stop string has ended yet.
    Running,
    /// A stop string ended here; nothing more is sent.
    Stopped,
}

/// A set of stop strings on their way through a text.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text that may still become a stop string.
    held: String,
    matched: Option<usize>,
}

/// One string with its Knuth-Morris-Pratt table: cost per byte is constant on average.
#[derive(Clone, Debug)]
struct Stop {
    text: Vec<u8>,
    /// `fallback[n]`: the longest proper prefix of `text` that is a suffix of `text[..n]`.
    fallback: Vec<usize>,
    /// Bytes of `text` that the stream ends with.
    have: usize,
}

impl Stop {
    fn new(text: &str) -> Stop {
        let text = text.as_bytes().to_vec();
        let mut fallback = vec![0; text.len() + 1];
        let mut have = 0;
        for at in 1..text.len() {
            while have > 0 && text[at] != text[have] {
                have = fallback[have];
            }
            if text[at] == text[have] {
                have += 1;
            }
            fallback[at + 1] = have;
        }
        Stop { text, fallback, have: 0 }
    }

    /// Takes one byte; says whether the string is complete.
    fn step(&mut self, byte: u8) -> bool {
        while self.have > 0 && self.text[self.have] != byte {
            self.have = self.fallback[self.have];
        }
        if self.text[self.have] == byte {
            self.have += 1;
        }
        self.have == self.text.len()
    }
}

impl StopMatcher {
    /// A matcher for these strings; none is fine.
    ///
    /// # Errors
    /// [`Error::InvalidStops`] for more than [`MAX_STOPS`], an empty one or one over 1,024 bytes.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopMatcher, Error> {
        if stops.len() > MAX_STOPS {
            return Err(Error::InvalidStops(format!("{} given, at most {MAX_STOPS} allowed", stops.len())));
        }
        let mut matcher = StopMatcher { stops: Vec::new(), held: String::new(), matched: None };
        for stop in stops {
            match stop.as_ref().len() {
                0 => return Err(Error::InvalidStops("one is empty".to_owned())),
                1..=MAX_STOP_BYTES => matcher.stops.push(Stop::new(stop.as_ref())),
                length => {
                    return Err(Error::InvalidStops(format!(
                        "one has {length} bytes, at most {MAX_STOP_BYTES} allowed"
                    )));
                }
            }
        }
        Ok(matcher)
    }

    /// Takes more text and appends to `out` what is certain to be before any stop string.
    pub fn push(&mut self, text: &str, out: &mut String) -> Scan {
        if self.matched.is_some() {
            return Scan::Stopped;
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut ended = None;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.step(byte) && ended.is_none_or(|length| stop.text.len() > length) {
                    self.matched = Some(index);
                    ended = Some(stop.text.len());
                }
            }
            if let Some(length) = ended {
                out.push_str(&self.held[..before + at + 1 - length]);
                self.held.clear();
                return Scan::Stopped;
            }
        }
        let live = self.stops.iter().map(|s| s.have).max().unwrap_or(0);
        let certain = self.held.len() - live;
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        Scan::Running
    }

    /// Ends the text: what was held back did not become a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        for stop in &mut self.stops {
            stop.have = 0;
        }
    }

    /// The index of the stop string that was found.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }
}
