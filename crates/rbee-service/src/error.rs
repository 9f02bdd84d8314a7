//! How a handler refuses, and how it reads a body.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use rbee_wire::body::parse_object;
use rbee_wire::error::ErrorReply;
use rbee_wire::fields;
use rbee_wire::job::invalid;
use rbee_wire::{ErrorBody, ErrorCode, RequestId, TraceParent};
use serde_json::Map;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Largest body that is read, in bytes: the largest text a job may carry, escaped, and its fields.
pub const MAX_BODY: usize = 24 << 20;

/// Longest wait for the next piece of a body.
const BODY_IDLE: Duration = Duration::from_secs(30);

/// Bytes a second that a body must come at, its first [`BODY_IDLE`] aside: who sends a byte now and then would otherwise keep a
/// connection for ever.
const BODY_PACE: usize = 1024;

/// The part of each body that is read whatever else is being read.
const SMALL: usize = 64 << 10;

/// Bytes beyond [`SMALL`] of bodies that are being read now. Two of the largest: a crowd of them must not be the end of a daemon.
static READING: Semaphore = Semaphore::const_new(2 * MAX_BODY);

/// Longest time that a body waits for room to be read on, in all: it bounds how long bodies that are half read, and none of which can
/// go on, keep each other.
const BODY_ROOM: Duration = Duration::from_secs(2);

tokio::task_local! {
    pub(crate) static REQUEST_ID: RequestId;
    pub(crate) static TRACE: Option<TraceParent>;
}

/// The id of the request that this task answers.
pub fn current_request_id() -> Option<RequestId> {
    REQUEST_ID.try_with(RequestId::clone).ok()
}

/// The trace that the request of this task belongs to.
pub fn current_trace() -> Option<TraceParent> {
    TRACE.try_with(Clone::clone).ok().flatten()
}

/// A refusal: the error's own status, its JSON body, `Retry-After` where it has one.
#[derive(Debug)]
pub struct ApiError(pub ErrorBody);

impl From<ErrorBody> for ApiError {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self(mut error) = self;
        error.request_id = error.request_id.or_else(current_request_id);
        let status = StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = error.retry_after_ms.map(|ms| ms.div_ceil(1000));
        let mut response = (status, Json(ErrorReply { error: error.clone() })).into_response();
        // For a layer that says it in another form.
        response.extensions_mut().insert(error);
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// A whole body, bounded in size and in time between its pieces.
#[derive(Debug)]
pub struct JsonBytes(pub Bytes);

impl<S: Sync> FromRequest<S> for JsonBytes {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        read(request.into_body()).await.map(Self).map_err(|error| {
            let mut response = ApiError(error).into_response();
            // What is left of the body is not read, so the connection cannot go on.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            response
        })
    }
}

/// The body of a route that asks for nothing: none, or an empty object. Whoever says more wanted something else.
#[derive(Debug)]
pub struct NoBody;

impl<S: Sync> FromRequest<S> for NoBody {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let JsonBytes(bytes) = JsonBytes::from_request(request, state).await?;
        let fields = if bytes.is_empty() { Ok(Map::new()) } else { parse_object(&bytes) };
        let error = match fields {
            Ok(fields) if fields.is_empty() => return Ok(Self),
            Ok(fields) => invalid(fields::check(&fields, &[])),
            Err(problem) => ErrorBody::new(ErrorCode::InvalidRequest, problem),
        };
        Err(ApiError(error).into_response())
    }
}

async fn read(body: Body) -> Result<Bytes, ErrorBody> {
    read_within(body, &READING).await
}

async fn read_within(mut body: Body, room: &Semaphore) -> Result<Bytes, ErrorBody> {
    let too_large = || ErrorBody::new(ErrorCode::PayloadTooLarge, format!("the body is larger than {MAX_BODY} bytes"));
    if http_body::Body::size_hint(&body).lower() > MAX_BODY as u64 {
        return Err(too_large());
    }
    let began = Instant::now();
    let mut heard = began;
    let mut bytes = BytesMut::new();
    // Given back when the body is read, or is not going to be.
    let mut taken: Option<SemaphorePermit<'_>> = None;
    let mut patience = BODY_ROOM;
    loop {
        let idle = heard + BODY_IDLE;
        let due = began + BODY_IDLE + Duration::from_secs((bytes.len() / BODY_PACE) as u64);
        let frame = match tokio::time::timeout_at(idle.min(due), body.frame()).await {
            Err(_) => {
                let what = if idle <= due { "the body stopped coming" } else { "the body comes too slowly" };
                return Err(ErrorBody::new(ErrorCode::InvalidRequest, what));
            }
            Ok(None) => return Ok(bytes.freeze()),
            Ok(Some(Err(_))) => return Err(ErrorBody::new(ErrorCode::InvalidRequest, "the body broke off")),
            Ok(Some(Ok(frame))) => frame,
        };
        heard = Instant::now();
        if let Ok(data) = frame.into_data() {
            if bytes.len() + data.len() > MAX_BODY {
                return Err(too_large());
            }
            let large =
                u32::try_from(data.len().min((bytes.len() + data.len()).saturating_sub(SMALL))).unwrap_or(u32::MAX);
            if large > 0 {
                let asked = Instant::now();
                let more = match tokio::time::timeout(patience, room.acquire_many(large)).await {
                    Ok(Ok(more)) => more,
                    Ok(Err(_)) | Err(_) => {
                        let message = "too many large bodies are being read at once";
                        return Err(ErrorBody::new(ErrorCode::Overloaded, message).with_retry_after(BODY_ROOM));
                    }
                };
                patience = patience.saturating_sub(asked.elapsed());
                match &mut taken {
                    Some(taken) => taken.merge(more),
                    none => *none = Some(more),
                }
            }
            bytes.extend_from_slice(&data);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    /// A body of so many pieces of this size, one every so often.
    fn pieces(count: usize, size: usize, every: Duration) -> Body {
        let pieces = futures::stream::iter(0..count).then(move |_| async move {
            tokio::time::sleep(every).await;
            Ok::<_, std::io::Error>(vec![b' '; size])
        });
        Body::from_stream(pieces)
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_take_its_time_and_not_all_of_it() {
        let room = Semaphore::new(MAX_BODY);
        let read = |count, size, seconds| {
            let body = pieces(count, size, Duration::from_secs(seconds));
            let (room, began) = (&room, Instant::now());
            async move { (read_within(body, room).await.map(|bytes| bytes.len()), began.elapsed().as_secs()) }
        };
        assert_eq!(read(100, 30_000, 10).await, (Ok(3_000_000), 1000));
        let (slow, after) = read(1000, 10, 5).await;
        assert!(slow.unwrap_err().message.contains("slowly") && (30..=35).contains(&after), "{after}");
        let (stopped, after) = read(1, 10, 40).await;
        assert!(stopped.unwrap_err().message.contains("stopped") && after == 30, "{after}");
    }

    #[tokio::test(start_paused = true)]
    async fn large_bodies_share_their_room_and_small_ones_need_none() {
        let room = Semaphore::new(1 << 20);
        let second = Duration::from_secs(1);
        let half = || read_within(pieces(12, 64 << 10, second), &room);
        let (one, other) = tokio::join!(half(), half());
        let refused = [one, other].into_iter().find_map(Result::err).expect("there is no room for both");
        assert!(refused.code == ErrorCode::Overloaded && refused.retry_after_ms.is_some());
        assert_eq!(room.available_permits(), 1 << 20, "all is given back");
        assert_eq!(half().await.unwrap().len(), 12 * (64 << 10));
        let _none = room.acquire_many(1 << 20).await.unwrap();
        assert_eq!(read_within(pieces(1, SMALL, second), &room).await.unwrap().len(), SMALL);
    }
}
