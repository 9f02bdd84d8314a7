//! How a handler refuses, and how it reads a body.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use rbee_wire::error::ErrorReply;
use rbee_wire::{ErrorBody, ErrorCode, RequestId, TraceParent};

/// Largest body that is read, in bytes: the largest text a job may carry, escaped, and its fields.
pub const MAX_BODY: usize = 24 << 20;

/// Longest wait for the next piece of a body.
const BODY_IDLE: Duration = Duration::from_secs(30);

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

async fn read(mut body: Body) -> Result<Bytes, ErrorBody> {
    let too_large = || ErrorBody::new(ErrorCode::PayloadTooLarge, format!("the body is larger than {MAX_BODY} bytes"));
    if http_body::Body::size_hint(&body).lower() > MAX_BODY as u64 {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    loop {
        let frame = match tokio::time::timeout(BODY_IDLE, body.frame()).await {
            Err(_) => return Err(ErrorBody::new(ErrorCode::InvalidRequest, "the body stopped coming")),
            Ok(None) => return Ok(bytes.freeze()),
            Ok(Some(Err(_))) => return Err(ErrorBody::new(ErrorCode::InvalidRequest, "the body broke off")),
            Ok(Some(Ok(frame))) => frame,
        };
        if let Ok(data) = frame.into_data() {
            if bytes.len() + data.len() > MAX_BODY {
                return Err(too_large());
            }
            bytes.extend_from_slice(&data);
        }
    }
}
