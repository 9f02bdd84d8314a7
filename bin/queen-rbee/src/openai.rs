//! The OpenAI dialect: requests become jobs, the jobs' events become its answers. `rbee-openai` says how; here is what needs a
//! connection, a clock or the fleet.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use futures::Stream;
use rbee_openai::answer::{Chunks, Form, Head, Step, Whole, failure};
use rbee_openai::embeddings::Vectors;
use rbee_openai::error::{Reply, retry_is_vain};
use rbee_openai::fields::Endpoint;
use rbee_openai::models::{Model, ModelList};
use rbee_openai::request::{Streaming, Unknown, read};
use rbee_service::{ApiError, Caller, JsonBytes, Listener, sse};
use rbee_wire::event::Event;
use rbee_wire::job::Infer;
use rbee_wire::sse::Decoder;
use rbee_wire::{ErrorBody, ErrorCode, JobRequest, routes};

use crate::http::Api;
use crate::jobs::Job;
use crate::submit::{Leaving, listen, submit};

/// Longest time that a stream's headers wait for its first token: as long as an error can have a status of its own.
const HEADERS: Duration = Duration::from_secs(10);

/// A whole answer that would come later than this is refused with the time to come back: most clients' patience ends before.
const PATIENCE: Duration = Duration::from_secs(300);

/// Largest event of a job's log; they are the queen's own.
const MAX_EVENT: usize = 1 << 30;

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
const IGNORED: HeaderName = HeaderName::from_static("x-rbee-ignored");
const STRICT: HeaderName = HeaderName::from_static("x-rbee-strict");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The dialect's routes.
pub fn mount(router: Router<Api>) -> Router<Api> {
    router
        .route(
            routes::CHAT_COMPLETIONS,
            post(|api, caller, headers, body| answer(Endpoint::Chat, api, caller, headers, body)),
        )
        .route(
            routes::COMPLETIONS,
            post(|api, caller, headers, body| answer(Endpoint::Completions, api, caller, headers, body)),
        )
        .route(routes::EMBEDDINGS, post(embeddings))
        .route(routes::MODELS, get(models))
        .route(routes::MODEL, get(model))
}

/// Whether a path is the dialect's: its clients read errors in the dialect's form, whatever part of the queen refuses.
fn is_ours(path: &str) -> bool {
    ["/v1/chat/", "/v1/completions", "/v1/models", "/v1/embeddings"].iter().any(|start| path.starts_with(start))
}

/// Puts refusals into the dialect's form.
pub async fn in_dialect(request: Request, next: Next) -> Response {
    let ours = is_ours(request.uri().path());
    let mut response = next.run(request).await;
    if ours && let Some(error) = response.extensions_mut().remove::<ErrorBody>() {
        let (mut parts, _) = response.into_parts();
        // Those of the body that is replaced.
        parts.headers.remove(axum::http::header::CONTENT_LENGTH);
        parts.headers.remove(axum::http::header::CONTENT_TYPE);
        if retry_is_vain(&error) {
            parts.headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        let mut said = Json(Reply::from(&error)).into_response();
        *said.status_mut() = parts.status;
        said.headers_mut().extend(parts.headers);
        return said;
    }
    response
}

async fn embeddings(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let asked = read(Endpoint::Embeddings, &body, unknown(&headers))?;
    drop(body);
    let model = asked.jobs.first().and_then(|job| job.model.as_ref()).map(ToString::to_string);
    let (first, mut parts) = begin(&api, &caller, asked.jobs).await?;
    let mut vectors = Vectors::new(asked.encoding, model);
    loop {
        let (_, event) = poll_fn(|cx| parts.poll(cx)).await;
        not_too_late(&event)?;
        match vectors.take(&event) {
            Step::Waiting | Step::Moving => {}
            Step::Over => {
                return Ok(told(&api, &first, Json(vectors.into_json()).into_response(), &asked.ignored));
            }
            Step::Failed(error) => return Err((*error).into()),
        }
    }
}

async fn answer(
    endpoint: Endpoint,
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let asked = read(endpoint, &body, unknown(&headers))?;
    drop(body);
    let (form, kind) = match endpoint {
        Endpoint::Chat => (Form::Chat, "chatcmpl"),
        _ => (Form::Text, "cmpl"),
    };
    let mut head = Head {
        form,
        id: String::new(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: asked.jobs.first().and_then(|job| job.model.as_ref()).map(ToString::to_string),
        build: format!("rbee-{}-{}", env!("CARGO_PKG_VERSION"), api.ops.info().build.get(..8).unwrap_or_default()),
        choices: asked.jobs.iter().map(|job| job.generation.n.unwrap_or(1) as usize).collect(),
    };
    let (first, parts) = begin(&api, &caller, asked.jobs).await?;
    head.id = format!("{kind}-{}", first.id);
    let response = match asked.streaming {
        Streaming::Yes { usage } => stream(parts, Chunks::new(head, usage)).await?,
        Streaming::No => whole(parts, Whole::new(head)).await?,
    };
    Ok(told(&api, &first, response, &asked.ignored))
}

/// Refuses to go on where a whole answer is too far away.
fn not_too_late(event: &Event) -> Result<(), ErrorBody> {
    let (Event::Queued { eta_ms: Some(eta), .. } | Event::Progress { eta_ms: Some(eta), .. }) = event else {
        return Ok(());
    };
    let eta = Duration::from_millis(*eta);
    if eta <= PATIENCE {
        return Ok(());
    }
    let message = format!("the model is still being loaded, for about {} s more", eta.as_secs());
    Err(ErrorBody::new(ErrorCode::ModelLoading, message)
        .with_retry_after(eta)
        .with_hint("ask again then, or ask for a stream, which waits"))
}

/// What the headers ask for where a field changes nothing.
fn unknown(headers: &HeaderMap) -> Unknown {
    let strict = headers.get(STRICT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
    if strict { Unknown::Refused } else { Unknown::Reported }
}

/// Sets the jobs of a request to work; the first of them, and what all say.
async fn begin(api: &Api, caller: &Caller, jobs: Vec<Infer>) -> Result<(Arc<Job>, Parts), ErrorBody> {
    let mut first = None;
    let mut parts = Vec::new();
    for job in jobs {
        let (job, unclaimed) = submit(api, caller, JobRequest::Infer(Box::new(job)), None).await?;
        parts.push(Some(Events::of(listen(api, &job, None, Leaving::Cancels))));
        // From here on its listener answers for it.
        if let Some(unclaimed) = unclaimed {
            unclaimed.claimed();
        }
        first.get_or_insert(job);
    }
    let first = first.ok_or_else(|| ErrorBody::new(ErrorCode::Internal, "a request became no job"))?;
    Ok((first, Parts(parts)))
}

/// A response that says where the time went until its headers, and names the fields which changed nothing.
fn told(api: &Api, job: &Job, mut response: Response, ignored: &[String]) -> Response {
    if let Ok(timings) = HeaderValue::from_str(&job.budget(api.ops.jobs.now()).server_timing()) {
        response.headers_mut().insert(SERVER_TIMING, timings);
    }
    if !ignored.is_empty()
        && let Ok(names) = HeaderValue::from_str(&ignored.join(", "))
    {
        response.headers_mut().insert(IGNORED, names);
    }
    response
}

async fn whole(mut parts: Parts, mut answer: Whole) -> Result<Response, ApiError> {
    loop {
        let (part, event) = poll_fn(|cx| parts.poll(cx)).await;
        not_too_late(&event)?;
        match answer.take(part, &event) {
            Step::Waiting | Step::Moving => {}
            Step::Over => return Ok(Json(answer.into_json()).into_response()),
            Step::Failed(error) => return Err((*error).into()),
        }
    }
}

async fn stream(mut parts: Parts, mut chunks: Chunks) -> Result<Response, ApiError> {
    let mut first = Vec::new();
    let begins = async {
        loop {
            let (part, event) = poll_fn(|cx| parts.poll(cx)).await;
            match chunks.take(part, &event, &mut first) {
                Step::Waiting => {}
                Step::Moving => return Ok(false),
                Step::Over => return Ok(true),
                Step::Failed(error) => return Err(*error),
            }
        }
    };
    let over = match tokio::time::timeout(HEADERS, begins).await {
        Ok(begun) => begun?,
        Err(_) => false,
    };
    Ok(sse::infallible(Body { parts, chunks, first, over }))
}

/// The events of the jobs that make an answer.
struct Parts(Vec<Option<Events>>);

impl Parts {
    /// The next event of any. A part whose end was given is not asked again.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(usize, Event)> {
        for (part, place) in self.0.iter_mut().enumerate() {
            let Some(events) = place else { continue };
            if let Poll::Ready(event) = events.poll(cx) {
                if event.is_end() {
                    *place = None;
                }
                return Poll::Ready((part, event));
            }
        }
        Poll::Pending
    }
}

/// A job's events as they were before they went into its log.
struct Events {
    listener: Listener,
    decoder: Decoder,
    ready: VecDeque<Event>,
}

impl Events {
    fn of(listener: Listener) -> Self {
        Self { listener, decoder: Decoder::new(MAX_EVENT), ready: VecDeque::new() }
    }

    /// The next event. A log that breaks off ends in an error, as every job ends.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(event);
            }
            let broken = |what: &str| Poll::Ready(Event::Error(ErrorBody::new(ErrorCode::Internal, what)));
            match std::task::ready!(Pin::new(&mut self.listener).poll_next(cx)) {
                Some(Ok(piece)) => {
                    let ready = &mut self.ready;
                    let fed = self.decoder.feed(&piece, |frame| {
                        // The end mark is no event; what an older log has more is none of the dialect's.
                        ready.extend(serde_json::from_slice::<Event>(&frame.data));
                    });
                    if fed.is_err() {
                        return broken("an event of the job is too large");
                    }
                }
                Some(Err(_)) | None => return broken("the job's log broke off before its end"),
            }
        }
    }
}

/// The body of a stream: what there was before its headers, then each event as it comes.
struct Body {
    parts: Parts,
    chunks: Chunks,
    first: Vec<u8>,
    over: bool,
}

impl Stream for Body {
    type Item = Bytes;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Self { parts, chunks, first, over } = &mut *self;
        let mut out = std::mem::take(first);
        while !*over && let Poll::Ready((part, event)) = parts.poll(cx) {
            match chunks.take(part, &event, &mut out) {
                Step::Waiting | Step::Moving => {}
                Step::Over => *over = true,
                Step::Failed(error) => {
                    out.extend(failure(&error));
                    // What else belongs to the answer is cancelled with its listener.
                    parts.0.clear();
                    *over = true;
                }
            }
        }
        match (out.is_empty(), *over) {
            (false, _) => Poll::Ready(Some(out.into())),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }
}

/// Names that a request may have in `model`: what serves, what lies in the stores, the aliases, and the built-in model.
async fn known(api: &Api) -> Vec<Model> {
    let fleet = api.ops.brain.fleet().await;
    let mut names: Vec<String> = fleet.workers.iter().map(|worker| worker.model.to_string()).collect();
    let stored = fleet.hives.iter().filter(|hive| hive.alive).flat_map(|hive| &hive.models);
    names.extend(stored.map(ToString::to_string));
    names.extend(api.aliases.keys().cloned());
    names.push(rbee_wire::model::TINYBEE.to_owned());
    names.sort();
    names.dedup();
    let created = api.ops.info().incarnation.counter;
    names.iter().map(|name| Model::named(name, created)).collect()
}

async fn models(State(api): State<Api>) -> Json<ModelList> {
    Json(ModelList::of(known(&api).await))
}

async fn model(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Model>, ApiError> {
    let known = known(&api).await;
    // A path begins with the slash that the route's own ends with.
    let found = known.iter().find(|model| model.id == id || model.id.strip_prefix('/') == Some(&id));
    found.cloned().map(Json).ok_or_else(|| {
        let shown: String = id.chars().take(80).collect();
        let names: Vec<&str> = known.iter().map(|model| model.id.as_str()).collect();
        let message = format!("there is no model `{}`; there is {}", shown.escape_debug(), names.join(", "));
        ErrorBody::new(ErrorCode::ModelNotFound, message).into()
    })
}
