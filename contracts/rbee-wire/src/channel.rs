//! The events of many inferences on one connection, a line each: `STREAM JSON`, where the stream is the number that the
//! inference's request chose. A line that begins with a colon is a comment.
//!
//! One connection per worker costs the queen one read for all tokens of a step.

use std::io::Write;

/// The media type of a channel.
pub const CONTENT_TYPE: &str = "application/x-rbee-channel";

/// Longest name of a channel.
pub const MAX_ID: usize = 64;

/// Appends one event of a stream. The JSON must have no newline, which serde_json's compact form guarantees.
pub fn write_line(out: &mut Vec<u8>, stream: u64, json: &[u8]) {
    debug_assert!(!json.contains(&b'\n'));
    let _ = write!(out, "{stream} ");
    out.extend_from_slice(json);
    out.push(b'\n');
}

/// Why a channel cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLine {
    /// A line that never ends.
    #[error("an event is larger than {0} bytes")]
    TooLarge(usize),
    /// A line without a stream's number.
    #[error("a line does not begin with the number of a stream")]
    NoStream,
}

/// An incremental decoder; feed it bytes as they come.
#[derive(Debug)]
pub struct Lines {
    /// The beginning of a line whose end is yet to come.
    rest: Vec<u8>,
    max: usize,
}

impl Lines {
    /// A decoder that refuses lines above `max` bytes.
    pub fn new(max: usize) -> Self {
        Self { rest: Vec::new(), max }
    }

    /// Takes bytes and hands each finished event to `each`.
    ///
    /// # Errors
    /// [`BadLine`]; the decoder must not be used further.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(u64, &[u8])) -> Result<(), BadLine> {
        let mut one = |line: &[u8]| -> Result<(), BadLine> {
            if !line.is_empty() && line[0] != b':' {
                let (stream, at) = number(line).ok_or(BadLine::NoStream)?;
                each(stream, &line[at..]);
            }
            Ok(())
        };
        while let Some(end) = bytes.iter().position(|&b| b == b'\n') {
            let line = &bytes[..end];
            bytes = &bytes[end + 1..];
            if self.rest.len() + line.len() > self.max {
                return Err(BadLine::TooLarge(self.max));
            }
            if self.rest.is_empty() {
                one(line)?;
            } else {
                self.rest.extend_from_slice(line);
                one(&self.rest)?;
                self.rest.clear();
            }
        }
        if self.rest.len() + bytes.len() > self.max {
            return Err(BadLine::TooLarge(self.max));
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }
}

/// The number at the beginning of a line, and where what follows its space begins.
fn number(line: &[u8]) -> Option<(u64, usize)> {
    let digits = line.iter().position(|&b| b == b' ').filter(|&digits| digits > 0)?;
    let value = line[..digits].iter().try_fold(0u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })?;
    Some((value, digits + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_split_of_the_bytes_gives_the_same_events(
            events in prop::collection::vec((any::<u64>(), "[^\n]{0,40}"), 0..20),
            cuts in prop::collection::vec(0usize..2000, 0..10),
        ) {
            let mut bytes = Vec::new();
            for (stream, json) in &events {
                bytes.extend_from_slice(crate::sse::KEEP_ALIVE);
                write_line(&mut bytes, *stream, json.as_bytes());
            }
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let (mut lines, mut got) = (Lines::new(1 << 10), Vec::new());
            for piece in cuts.windows(2) {
                let each = |stream, json: &[u8]| got.push((stream, String::from_utf8(json.to_vec()).unwrap()));
                lines.feed(&bytes[piece[0]..piece[1]], each).unwrap();
            }
            prop_assert_eq!(got, events);
        }
    }

    #[test]
    fn what_is_no_line_of_ours_is_refused() {
        let feed = |text: &'static str| Lines::new(20).feed(text.as_bytes(), |_, _| ());
        for text in ["x {}\n", " {}\n", "12\n", "-1 {}\n", "18446744073709551616 {}\n"] {
            assert!(feed(text).is_err(), "{text}");
        }
        assert_eq!(feed("18446744073709551615 \n"), Err(BadLine::TooLarge(20)));
        assert_eq!(feed("1 2345678901234567890"), Err(BadLine::TooLarge(20)));
        assert_eq!(feed("1 {}\n\n: x\n"), Ok(()));
    }
}
