//! Server-sent events: the encoder of our streams and an incremental decoder that any split of the bytes
//! leaves unimpressed.

use std::io::Write;

/// The media type of a stream.
pub const CONTENT_TYPE: &str = "text/event-stream; charset=utf-8";

/// A comment with a single newline: SDKs stumble over a comment followed by a blank line.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n";

/// The payload that follows the last event.
pub const DONE: &str = "[DONE]";

/// Appends one event: its offset as `id`, its JSON as `data`. The JSON must have no newline, which
/// serde_json's compact form guarantees.
pub fn write_event(out: &mut Vec<u8>, id: u64, json: &[u8]) {
    debug_assert!(!json.contains(&b'\n'));
    let _ = write!(out, "id: {id}\ndata: ");
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

/// Appends the end mark.
pub fn write_done(out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: [DONE]\n\n");
}

/// One event as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The `id` field, when it was there and a number.
    pub id: Option<u64>,
    /// The `data` lines, joined by newlines.
    pub data: Vec<u8>,
}

/// Why a stream cannot be read on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is larger than {0} bytes")]
pub struct TooLarge(pub usize);

/// An incremental decoder; feed it bytes as they come.
#[derive(Debug)]
pub struct Decoder {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    id: Option<u64>,
    after_cr: bool,
    max: usize,
}

impl Decoder {
    /// A decoder that refuses events above `max` bytes.
    pub fn new(max: usize) -> Self {
        Self { line: Vec::new(), data: Vec::new(), has_data: false, id: None, after_cr: false, max }
    }

    /// Takes bytes and hands each finished event to `each`. Comments and unknown fields are passed over.
    ///
    /// # Errors
    /// [`TooLarge`] when an event or line outgrows the limit; the decoder must not be used further.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Frame)) -> Result<(), TooLarge> {
        while !bytes.is_empty() {
            if self.after_cr {
                self.after_cr = false;
                if bytes[0] == b'\n' {
                    bytes = &bytes[1..];
                    continue;
                }
            }
            match bytes.iter().position(|&b| b == b'\n' || b == b'\r') {
                None => {
                    self.line.extend_from_slice(bytes);
                    bytes = &[];
                    self.check()?;
                }
                Some(end) => {
                    self.after_cr = bytes[end] == b'\r';
                    self.line.extend_from_slice(&bytes[..end]);
                    bytes = &bytes[end + 1..];
                    self.check()?;
                    if let Some(frame) = self.end_of_line() {
                        each(frame);
                    }
                }
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TooLarge> {
        if self.line.len() + self.data.len() > self.max { Err(TooLarge(self.max)) } else { Ok(()) }
    }

    fn end_of_line(&mut self) -> Option<Frame> {
        let line = std::mem::take(&mut self.line);
        let frame = if line.is_empty() {
            let id = self.id.take();
            let data = std::mem::take(&mut self.data);
            std::mem::take(&mut self.has_data).then_some(Frame { id, data })
        } else {
            let (field, value) = match line.iter().position(|&b| b == b':') {
                Some(colon) => {
                    let value = &line[colon + 1..];
                    (&line[..colon], value.strip_prefix(b" ").unwrap_or(value))
                }
                None => (&line[..], &line[line.len()..]),
            };
            match field {
                b"data" => {
                    if self.has_data {
                        self.data.push(b'\n');
                    }
                    self.has_data = true;
                    self.data.extend_from_slice(value);
                }
                b"id" => self.id = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()),
                _ => {}
            }
            None
        };
        self.line = line;
        self.line.clear();
        frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8], cuts: &[usize]) -> Vec<Frame> {
        let mut decoder = Decoder::new(1 << 20);
        let mut frames = Vec::new();
        let mut at = 0;
        for &cut in cuts {
            let cut = cut.clamp(at, bytes.len());
            decoder.feed(&bytes[at..cut], |frame| frames.push(frame)).unwrap();
            at = cut;
        }
        decoder.feed(&bytes[at..], |frame| frames.push(frame)).unwrap();
        frames
    }

    proptest! {
        #[test]
        fn any_split_of_the_bytes_gives_the_same_events(
            texts in prop::collection::vec("\\PC{0,20}", 0..8),
            cuts in prop::collection::vec(0usize..400, 0..12),
        ) {
            let mut bytes = Vec::new();
            let mut want = Vec::new();
            for (id, text) in texts.iter().enumerate() {
                let json = serde_json::to_vec(text).unwrap();
                write_event(&mut bytes, id as u64, &json);
                bytes.extend_from_slice(KEEP_ALIVE);
                want.push(Frame { id: Some(id as u64), data: json });
            }
            write_done(&mut bytes);
            want.push(Frame { id: None, data: DONE.into() });
            let mut cuts = cuts;
            cuts.sort_unstable();
            prop_assert_eq!(decode(&bytes, &cuts), want);
        }
    }

    #[test]
    fn the_standards_corners_are_read() {
        let got = decode(
            b"data:a\r\ndata: b\r\rid: x\ndata\n\nevent: e\nretry: 5\n\n: only a comment\n\ndata: c",
            &[3, 7, 8],
        );
        assert_eq!(got, [Frame { id: None, data: b"a\nb".to_vec() }, Frame { id: None, data: b"".to_vec() }]);
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut decoder = Decoder::new(100);
        let error = (0..100).find_map(|_| decoder.feed(b"data: 0123456789\n", |_| ()).err());
        assert_eq!(error, Some(TooLarge(100)));
    }
}
