//! The worker's routes. Every one but `/health` asks for the bearer of the charge.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use rbee_service::{ApiError, Clock, Exposition, Guard, JsonBytes, NoBody, protect, sse};
use rbee_wire::channel::CONTENT_TYPE;
use rbee_wire::job::JobAccepted;
use rbee_wire::view::InfoReply;
use rbee_wire::worker::{InferenceRequest, ReadyReply, WorkerState};
use rbee_wire::{ErrorBody, ErrorCode, JobId, routes};
use serde_json::{Value, json};

use crate::backend::Loaded;
use crate::channels::Channels;
use crate::inference::{self, Canceller, Framing, Inference};
use crate::status::{Phase, Rates, Status};

/// Inferences posted and not yet listened to, at most.
const MAX_PARKED: usize = 256;

/// How long a posted inference waits for its listener.
const PARKED: Duration = Duration::from_secs(10);

/// State of the routes.
#[derive(Clone)]
pub struct Api {
    status: Status,
    clock: Clock,
    live: Arc<Mutex<Live>>,
    channels: Channels,
}

#[derive(Default)]
struct Live {
    cancellers: HashMap<JobId, Canceller>,
    parked: HashMap<JobId, Inference>,
}

/// The routes of a worker.
pub fn router(status: Status, clock: Clock) -> Router {
    let guard = Guard::of(Some(&status.charge().bearer), routes::WORKER);
    let router = Router::new()
        .route(routes::HEALTH, get(|| async { Json(json!({ "ok": true })) }))
        .route(routes::WORKER_READY, get(ready))
        .route(routes::INFO, get(info))
        .route(routes::METRICS, get(metrics))
        .route(routes::INFERENCE, post(infer))
        .route(routes::INFERENCE_ONE, delete(cancel))
        .route(routes::INFERENCE_STREAM, get(listen))
        .route(routes::CHANNEL, get(channel))
        .route(routes::TOKENIZE, post(tokenize))
        .route(routes::DRAIN, post(drain))
        .with_state(Api { status, clock, live: Arc::default(), channels: Channels::default() });
    protect(router, guard)
}

async fn ready(State(api): State<Api>) -> Json<ReadyReply> {
    let state = api.status.state();
    let progress = match api.status.phase() {
        Phase::Loading(progress) => Some(progress),
        _ => None,
    };
    let ready = matches!(state, WorkerState::Ready | WorkerState::Busy);
    Json(ReadyReply { ready, state, model: api.status.model().clone(), progress })
}

async fn info(State(api): State<Api>) -> Json<InfoReply> {
    Json(InfoReply {
        program: "llm-worker-rbee".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        build: api.status.build().into(),
        protocol: rbee_wire::PROTOCOL,
        pid: std::process::id(),
        uptime_ms: u64::try_from(api.clock.now().as_millis()).unwrap_or(u64::MAX),
        incarnation: api.status.charge().incarnation.clone(),
        home_proof: None,
        features: vec!["cpu".into(), "sim".into()],
    })
}

/// What the engine counts. Requests, their tokens and times are the queen's to count: adding up what both say counts nothing twice.
async fn metrics(State(api): State<Api>) -> Exposition {
    let beat = api.status.heartbeat(0, Rates::default());
    let stats = api.status.loaded().map(|loaded| loaded.engine.stats()).unwrap_or_default();
    let mut out = Exposition::new(&[("model_name", &beat.model.to_string()), ("engine", beat.worker_id.as_str())]);
    out.gauge("rbee_engine_slots", "Sequences that can run at once", stats.slots_total as f64);
    out.gauge("rbee_engine_running", "Sequences that run", stats.slots_used as f64);
    out.gauge("rbee_engine_waiting", "Sequences that wait for a slot or for KV", stats.waiting as f64);
    out.gauge("rbee_engine_kv_blocks", "KV blocks in all", stats.kv_blocks_total as f64);
    out.gauge("rbee_engine_kv_blocks_used", "KV blocks that sequences have", stats.kv_blocks_used as f64);
    out.gauge(
        "rbee_engine_kv_blocks_cached",
        "KV blocks kept for prompts that begin alike",
        stats.kv_blocks_cached as f64,
    );
    out.counter("rbee_engine_prefix_queries", "Prompt tokens looked for in the prefix cache", stats.prefix_queries);
    out.counter("rbee_engine_prefix_hits", "Prompt tokens found there", stats.prefix_hits);
    out.counter("rbee_engine_preemptions", "Sequences that gave their KV up to others", stats.preemptions);
    out.counter("rbee_engine_prompt_tokens", "Prompt tokens computed", stats.prompt_tokens);
    out.counter("rbee_engine_generated_tokens", "Tokens generated", stats.generated_tokens);
    out.counter("rbee_engine_drafted_tokens", "Tokens guessed and computed", stats.drafted_tokens);
    out.counter("rbee_engine_accepted_tokens", "Those of them that were right", stats.accepted_tokens);
    out.counter("rbee_engine_steps", "Layers of steps computed", stats.steps);
    out.gauge("rbee_engine_memory_bytes", "Resident memory", beat.memory.total as f64);
    out
}

impl Api {
    /// The engine, if a request sent now would be served.
    fn serving(&self) -> Result<Arc<Loaded>, ErrorBody> {
        match self.status.phase() {
            Phase::Serving(loaded) => Ok(loaded),
            Phase::Loading(_) => Err(ErrorBody::new(ErrorCode::ModelLoading, "the model is still being loaded")
                .with_retry_after(Duration::from_secs(1))),
            Phase::Draining(_) | Phase::Stopped => {
                Err(ErrorBody::new(ErrorCode::Draining, "this worker finishes what it has and takes nothing new"))
            }
        }
    }

    fn live(&self) -> std::sync::MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The events of an inference; its canceller is known until they end.
    fn events(&self, inference: Inference, framing: Framing) -> impl Stream<Item = Bytes> + Send + use<> {
        let known = Known { api: self.clone(), job: inference.job_id.clone() };
        stream_with(inference.into_stream(framing), known)
    }

    fn stream(&self, inference: Inference) -> Response {
        sse::infallible(self.events(inference, Framing::Sse))
    }
}

/// Keeps `guard` for as long as the stream lives.
fn stream_with<S: Stream + Send>(stream: S, guard: impl Send) -> impl Stream<Item = S::Item> + Send {
    stream.map(move |item| {
        let _held = &guard;
        item
    })
}

/// Forgets an inference when its stream is gone.
struct Known {
    api: Api,
    job: JobId,
}

impl Drop for Known {
    fn drop(&mut self) {
        self.api.live().cancellers.remove(&self.job);
        self.api.status.touch();
    }
}

async fn infer(State(api): State<Api>, headers: HeaderMap, JsonBytes(body): JsonBytes) -> Result<Response, ApiError> {
    let request = InferenceRequest::parse(&body)?;
    let loaded = api.serving()?;
    let job_id = request.job_id.clone();
    let seat = request.channel.clone();
    if api.live().cancellers.contains_key(&job_id) {
        return Err(ErrorBody::new(ErrorCode::InvalidRequest, format!("job {job_id} runs here already")).into());
    }
    let status = api.status.clone();
    // Tokenizing a long prompt and compiling a form take milliseconds that other streams should not wait for; a short one is
    // quicker done here than handed over.
    let generation = &request.generation;
    let inference = if body.len() > 4096 || generation.response_format.is_some() || generation.must_call() {
        tokio::task::spawn_blocking(move || inference::begin(&status, loaded, request))
            .await
            .unwrap_or_else(|_| Err(ErrorBody::new(ErrorCode::Internal, "the request ended its own preparation")))?
    } else {
        inference::begin(&status, loaded, request)?
    };
    api.live().cancellers.insert(job_id.clone(), inference.canceller());
    let sse_url = routes::INFERENCE_STREAM.replace("{id}", job_id.as_str());
    if let Some(seat) = seat {
        api.channels.join(&seat.id, api.events(inference, Framing::Channel(seat.stream)).boxed())?;
        return Ok((StatusCode::ACCEPTED, Json(JobAccepted { job_id, sse_url })).into_response());
    }
    let streams = headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"text/event-stream"));
    if streams {
        return Ok(api.stream(inference));
    }
    {
        let mut live = api.live();
        if live.parked.len() >= MAX_PARKED {
            live.cancellers.remove(&job_id);
            return Err(ErrorBody::new(ErrorCode::Overloaded, "too many inferences wait for a listener").into());
        }
        live.parked.insert(job_id.clone(), inference);
    }
    let unclaimed = (api.clone(), job_id.clone());
    tokio::spawn(async move {
        tokio::time::sleep(PARKED).await;
        let (api, job_id) = unclaimed;
        let mut live = api.live();
        if live.parked.remove(&job_id).is_some() {
            live.cancellers.remove(&job_id);
        }
    });
    Ok((StatusCode::ACCEPTED, Json(JobAccepted { job_id, sse_url })).into_response())
}

fn unknown(id: &str) -> ErrorBody {
    let shown: String = id.chars().take(64).collect();
    ErrorBody::new(ErrorCode::JobNotFound, format!("no inference of job `{}` runs here", shown.escape_debug()))
}

async fn listen(State(api): State<Api>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let parked = JobId::new(&id).ok().and_then(|job| api.live().parked.remove(&job));
    Ok(api.stream(parked.ok_or_else(|| unknown(&id))?))
}

async fn channel(State(api): State<Api>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let status = api.status.clone();
    let ending = async move {
        let mut changes = status.changes();
        while !matches!(status.phase(), Phase::Draining(_) | Phase::Stopped) && changes.changed().await.is_ok() {}
    };
    let events = api.channels.open(&id, Box::pin(ending))?;
    let mut response = sse::infallible(events);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    Ok(response)
}

async fn cancel(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let canceller = JobId::new(&id).ok().and_then(|job| api.live().cancellers.get(&job).cloned());
    canceller.ok_or_else(|| unknown(&id))?.cancel();
    Ok(Json(json!({ "cancelled": true })))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokenize {
    text: String,
}

async fn tokenize(State(api): State<Api>, JsonBytes(body): JsonBytes) -> Result<Json<Value>, ApiError> {
    let request: Tokenize = serde_json::from_slice(&body)
        .map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, format!("the body is not {{\"text\"}}: {error}")))?;
    let loaded = api.serving()?;
    let tokens = tokio::task::spawn_blocking(move || loaded.text.tokenize(&request.text))
        .await
        .unwrap_or_else(|_| Err(ErrorBody::new(ErrorCode::Internal, "the text ended its own preparation")))?;
    Ok(Json(json!({ "tokens": tokens })))
}

async fn drain(State(api): State<Api>, _: NoBody) -> Json<Value> {
    api.status.drain();
    Json(json!({ "draining": true }))
}
