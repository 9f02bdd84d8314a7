//! A channel: the events of many inferences, a batch at a time.

use std::ops::Range;

use rbee_wire::channel::Lines;
use reqwest::Response;

use crate::error::ClientError;
use crate::stream::{IDLE, MAX_EVENT};

/// The events of all inferences of a channel. Dropping it closes the connection, which cancels them.
#[derive(Debug)]
pub struct ChannelStream {
    response: Response,
    lines: Lines,
    url: String,
    batch: Batch,
}

/// Events that came together.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    events: Vec<(u64, Range<usize>)>,
}

impl Batch {
    /// Each event: its stream's number, and its JSON as it came.
    pub fn events(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.events.iter().map(|(stream, at)| (*stream, &self.bytes[at.clone()]))
    }
}

impl ChannelStream {
    pub(crate) fn new(response: Response, url: String) -> Self {
        Self { response, lines: Lines::new(MAX_EVENT), url, batch: Batch::default() }
    }

    /// The next events, perhaps none; `None` when the worker has closed the channel in order.
    ///
    /// # Errors
    /// When the connection breaks or falls silent, or what comes is not of this protocol. The channel is over then.
    pub async fn next(&mut self) -> Option<Result<&Batch, ClientError>> {
        let Batch { bytes, events } = &mut self.batch;
        bytes.clear();
        events.clear();
        let chunk = match tokio::time::timeout(IDLE, self.response.chunk()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => return None,
            Ok(Err(source)) => {
                return Some(Err(ClientError::Broken { url: self.url.clone(), source: Some(source) }));
            }
            Err(_) => return Some(Err(ClientError::Idle { url: self.url.clone(), limit: IDLE })),
        };
        let fed = self.lines.feed(&chunk, |stream, json| {
            let start = bytes.len();
            bytes.extend_from_slice(json);
            events.push((stream, start..bytes.len()));
        });
        match fed {
            Ok(()) => Some(Ok(&self.batch)),
            Err(error) => Some(Err(ClientError::Protocol { url: self.url.clone(), problem: error.to_string() })),
        }
    }
}
