//! The text of one answer: detokenizer, stop matcher and the reader of its parts in a row.

use crate::{AnswerReader, Detokenizer, Piece, Scan, StopMatcher, TokenId};

/// What one token added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// What is certain now; may be empty.
    pub piece: Piece,
    /// The answer ends with this piece: a stop string was completed, or the one call that may be there is whole.
    pub stopped: bool,
}

/// Ids in, text out. Cloning it, or pushing the same ids again, rebuilds the same state.
#[derive(Clone)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    reader: Option<AnswerReader>,
    /// Text between the first two, kept for its allocation.
    buffer: String,
}

impl TextStream {
    /// Joins a detokenizer and the stop strings of a request.
    pub fn new(detokenizer: Detokenizer, stops: StopMatcher) -> TextStream {
        TextStream { detokenizer, stops, reader: None, buffer: String::new() }
    }

    /// Takes the text apart with `reader`; without one all of it is text.
    #[must_use]
    pub fn with_reader(self, reader: AnswerReader) -> TextStream {
        TextStream { reader: Some(reader), ..self }
    }

    /// Takes one token and gives the text that it makes certain.
    pub fn push(&mut self, id: TokenId) -> Pushed {
        self.buffer.clear();
        self.detokenizer.push(id, &mut self.buffer);
        let mut text = String::new();
        let mut stopped = self.stops.push(&self.buffer, &mut text) == Scan::Stopped;
        let piece = match &mut self.reader {
            None => Piece::text(text),
            Some(reader) => {
                let mut piece = reader.push(&text);
                if stopped {
                    piece.append(reader.finish());
                }
                stopped |= reader.over();
                piece
            }
        };
        Pushed { piece, stopped }
    }

    /// Ends the answer and gives what was held back.
    pub fn finish(&mut self) -> Piece {
        self.buffer.clear();
        self.detokenizer.finish(&mut self.buffer);
        let mut text = String::new();
        self.stops.push(&self.buffer, &mut text);
        self.stops.finish(&mut text);
        match &mut self.reader {
            None => Piece::text(text),
            Some(reader) => {
                let mut piece = reader.push(&text);
                piece.append(reader.finish());
                piece
            }
        }
    }

    /// Whether the answer has a tool call.
    pub fn called(&self) -> bool {
        self.reader.as_ref().is_some_and(AnswerReader::called)
    }

    /// The index of the stop string that ended the answer.
    pub fn stop_index(&self) -> Option<usize> {
        self.stops.matched()
    }
}
