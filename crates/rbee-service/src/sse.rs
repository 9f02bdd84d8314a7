//! Streams of server-sent events as a response.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::Stream;
use http_body::Frame;
use rbee_wire::sse::{CONTENT_TYPE, KEEP_ALIVE};
use tokio::time::{Instant, Sleep};

/// Silence after which a comment is sent.
pub const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);

/// A response whose body is this stream of encoded events, one write per item, with keep-alive comments while it
/// is silent. An `Err` item breaks the connection, so that no listener takes the end for a good one.
pub fn response<S, E>(events: S) -> Response
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Into<axum::BoxError> + 'static,
{
    let now = Instant::now();
    let body = SseBody { events: Box::pin(events), timer: Box::pin(tokio::time::sleep(KEEP_ALIVE_EVERY)), sent: now };
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// As [`response`], for streams that cannot fail.
pub fn infallible(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    use futures::StreamExt;
    response(events.map(Ok::<_, Infallible>))
}

struct SseBody<S> {
    events: Pin<Box<S>>,
    /// Moved on when it fires, not with every event: that would cost more than the event.
    timer: Pin<Box<Sleep>>,
    /// When something was sent last.
    sent: Instant,
}

impl<S, E> http_body::Body for SseBody<S>
where
    S: Stream<Item = Result<Bytes, E>>,
{
    type Data = Bytes;
    type Error = E;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, E>>> {
        if let Poll::Ready(item) = self.events.as_mut().poll_next(cx) {
            self.sent = Instant::now();
            return Poll::Ready(item.map(|item| item.map(Frame::data)));
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let due = self.sent + KEEP_ALIVE_EVERY;
            if now >= due {
                self.sent = now;
                self.timer.as_mut().reset(now + KEEP_ALIVE_EVERY);
                return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(KEEP_ALIVE)))));
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments_of_one_line() {
        let events = futures::stream::unfold(0, |i| async move {
            match i {
                0 => tokio::time::sleep(Duration::from_secs(25)).await,
                1 => {}
                _ => return None,
            }
            Some((Bytes::from_static(b"data: x\n\n"), i + 1))
        });
        let body = infallible(events).into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, ": keep-alive\n: keep-alive\ndata: x\n\ndata: x\n\n");
    }
}
