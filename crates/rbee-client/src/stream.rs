//! Event streams: frames as they come, checked for a proper end.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use rbee_wire::Event;
use rbee_wire::sse::{DONE, Decoder, Frame};
use reqwest::Response;

use crate::error::ClientError;

/// Largest event, in bytes: a prompt's worth of text is the largest thing an event can carry.
pub(crate) const MAX_EVENT: usize = 4 << 20;

/// Silence after which a stream counts as broken: two keep-alives missed.
pub(crate) const IDLE: Duration = Duration::from_secs(30);

/// One event of a stream.
#[derive(Clone, Debug)]
pub struct StreamEvent {
    /// Its offset in the job's log.
    pub id: Option<u64>,
    /// The JSON as it came.
    pub json: Bytes,
    /// The JSON as it was understood.
    pub event: Event,
}

/// A job's events as they come. Dropping it closes the connection.
#[derive(Debug)]
pub struct EventStream {
    response: Response,
    decoder: Decoder,
    ready: VecDeque<Frame>,
    url: String,
    idle: Duration,
    over: bool,
}

impl EventStream {
    pub(crate) fn new(response: Response, url: String) -> Self {
        Self { response, decoder: Decoder::new(MAX_EVENT), ready: VecDeque::new(), url, idle: IDLE, over: false }
    }

    /// With another limit on silence; keep-alive comments count as sound.
    #[must_use]
    pub fn with_idle_limit(mut self, limit: Duration) -> Self {
        self.idle = limit;
        self
    }

    /// The next frame, unparsed; `None` after the end mark.
    ///
    /// # Errors
    /// When the connection ends, breaks or falls silent before the end mark, or an event is too large.
    pub async fn next_frame(&mut self) -> Option<Result<Frame, ClientError>> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                if frame.data == DONE.as_bytes() {
                    self.over = true;
                    return None;
                }
                return Some(Ok(frame));
            }
            if self.over {
                return None;
            }
            let chunk = match tokio::time::timeout(self.idle, self.response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => {
                    return Some(Err(self.end(ClientError::Broken { url: self.url.clone(), source: None })));
                }
                Ok(Err(source)) => {
                    return Some(Err(self.end(ClientError::Broken { url: self.url.clone(), source: Some(source) })));
                }
                Err(_) => {
                    return Some(Err(self.end(ClientError::Idle { url: self.url.clone(), limit: self.idle })));
                }
            };
            let ready = &mut self.ready;
            if let Err(error) = self.decoder.feed(&chunk, |frame| ready.push_back(frame)) {
                let problem = error.to_string();
                return Some(Err(self.end(ClientError::Protocol { url: self.url.clone(), problem })));
            }
        }
    }

    /// The next event; `None` after the end mark.
    ///
    /// # Errors
    /// As [`EventStream::next_frame`], and when an event is not of this protocol.
    pub async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        let frame = match self.next_frame().await? {
            Ok(frame) => frame,
            Err(error) => return Some(Err(error)),
        };
        Some(match serde_json::from_slice(&frame.data) {
            Ok(event) => Ok(StreamEvent { id: frame.id, json: frame.data.into(), event }),
            Err(error) => {
                Err(self.end(ClientError::Protocol { url: self.url.clone(), problem: format!("an event: {error}") }))
            }
        })
    }

    fn end(&mut self, error: ClientError) -> ClientError {
        self.over = true;
        self.ready.clear();
        error
    }
}
