//! The text of one answer: detokenizer and stop matcher in a row.

use crate::{Detokenizer, Scan, StopMatcher, TokenId};

/// What one token added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Text that is certain now; may be empty.
    pub text: String,
    /// A stop string was completed: the answer ends with `text`.
    pub stopped: bool,
}

/// Ids in, text out. Cloning it, or pushing the same ids again, rebuilds the same state.
#[derive(Clone)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Text between the two, kept for its allocation.
    buffer: String,
}

impl TextStream {
    /// Joins a detokenizer and the stop strings of a request.
    pub fn new(detokenizer: Detokenizer, stops: StopMatcher) -> TextStream {
        TextStream { detokenizer, stops, buffer: String::new() }
    }

    /// Takes one token and gives the text that it makes certain.
    pub fn push(&mut self, id: TokenId) -> Pushed {
        self.buffer.clear();
        self.detokenizer.push(id, &mut self.buffer);
        let mut text = String::new();
        let scan = self.stops.push(&self.buffer, &mut text);
        Pushed { text, stopped: scan == Scan::Stopped }
    }

    /// Ends the answer and gives the text that was held back.
    pub fn finish(&mut self) -> String {
        self.buffer.clear();
        self.detokenizer.finish(&mut self.buffer);
        let mut text = String::new();
        self.stops.push(&self.buffer, &mut text);
        self.stops.finish(&mut text);
        text
    }

    /// The index of the stop string that ended the answer.
    pub fn stop_index(&self) -> Option<usize> {
        self.stops.matched()
    }
}
