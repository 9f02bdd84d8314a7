//! The hive's routes.

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use rbee_service::{ApiError, Clock, Exposition, Guard, JsonBytes, NoBody, protect, sse};
use rbee_wire::hive::{Process, ProcessState};
use rbee_wire::job::JobAccepted;
use rbee_wire::view::{DaemonReady, InfoReply};
use rbee_wire::{ErrorBody, ErrorCode, JobRequest, WorkerId, routes};
use serde_json::{Value, json};

use crate::jobs::{Jobs, Posted};

/// State of the routes.
#[derive(Clone)]
pub struct Api {
    /// The hive's jobs.
    pub jobs: Jobs,
    /// Since the start.
    pub clock: Clock,
    /// Shows whose hive this is.
    pub home_proof: String,
    /// This executable's build.
    pub build: String,
}

/// The routes of a hive.
pub fn router(api: Api, guard: Guard) -> Router {
    let health = || async { Json(json!({ "ok": true })) };
    let router = Router::new()
        .route(routes::HEALTH, get(health))
        .route(routes::LIVEZ, get(health))
        .route(routes::READY, get(ready))
        .route(routes::READYZ, get(ready))
        .route(routes::INFO, get(info))
        .route(routes::METRICS, get(metrics))
        .route(routes::SHUTDOWN, post(shutdown))
        .route(routes::JOBS, post(job))
        .route(routes::JOB, get(one_job))
        .route(routes::JOB_STREAM, get(stream))
        .route(routes::WORKER_LOGS, get(worker_logs))
        .with_state(api);
    protect(router, guard)
}

async fn ready(State(api): State<Api>) -> Response {
    if api.jobs.shutdown.is_begun() {
        return ApiError(ErrorBody::new(ErrorCode::Draining, "this hive is about to stop")).into_response();
    }
    Json(DaemonReady { ready: true, reason: None }).into_response()
}

async fn info(State(api): State<Api>) -> Json<InfoReply> {
    Json(InfoReply {
        program: "rbee-hive".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        build: api.build.clone(),
        protocol: rbee_wire::PROTOCOL,
        pid: std::process::id(),
        uptime_ms: u64::try_from(api.clock.now().as_millis()).unwrap_or(u64::MAX),
        incarnation: api.jobs.incarnation.clone(),
        home_proof: Some(api.home_proof.clone()),
        features: vec!["cpu".into()],
    })
}

async fn metrics(State(api): State<Api>) -> Exposition {
    let processes = api.jobs.spawner.supervisor.list();
    let mut out = Exposition::new(&[]);
    let states = [
        ("spawning", ProcessState::Spawning),
        ("loading", ProcessState::Loading),
        ("ready", ProcessState::Ready),
        ("draining", ProcessState::Draining),
        ("backoff", ProcessState::Backoff),
        ("exited", ProcessState::Exited),
    ]
    .map(|(name, state)| {
        let count = processes.iter().filter(|process| process.state == state).count();
        (name.to_owned(), count as f64)
    });
    out.gauges("rbee_hive_workers", "Worker processes by state", "state", states);
    let of = |number: fn(&Process) -> f64| {
        processes.iter().map(|process| (process.worker_id.to_string(), number(process))).collect::<Vec<_>>()
    };
    out.gauges(
        "rbee_hive_worker_restarts",
        "Times a worker was started again",
        "worker",
        of(|process| f64::from(process.restarts)),
    );
    out.gauges(
        "rbee_hive_reserved_bytes",
        "Memory reserved for a worker",
        "worker",
        of(|process| process.reserved as f64),
    );
    out
}

async fn shutdown(State(api): State<Api>, _: NoBody) -> Json<Value> {
    api.jobs.shutdown.begin();
    Json(json!({ "draining": true }))
}

async fn job(State(api): State<Api>, headers: HeaderMap, JsonBytes(body): JsonBytes) -> Result<Response, ApiError> {
    let Posted { id: job_id, log, stop } = api.jobs.post(JobRequest::parse(&body)?)?;
    let streams = headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"text/event-stream"));
    if streams {
        // Who asked for a download in one call gives it up by leaving.
        return Ok(sse::response(log.listen(None, move || stop.cancel())));
    }
    let sse_url = routes::JOB_STREAM.replace("{id}", job_id.as_str());
    Ok((StatusCode::ACCEPTED, Json(JobAccepted { job_id, sse_url })).into_response())
}

async fn one_job(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let log = api.jobs.log(&id)?;
    Ok(Json(json!({ "job_id": id, "over": log.is_over(), "events": log.events() })))
}

async fn stream(State(api): State<Api>, Path(id): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let log = api.jobs.log(&id)?;
    let after = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    Ok(sse::response(log.listen(after, || ())))
}

#[derive(serde::Deserialize)]
struct Tail {
    tail: Option<u64>,
}

async fn worker_logs(
    State(api): State<Api>,
    Path(id): Path<String>,
    Query(query): Query<Tail>,
) -> Result<String, ApiError> {
    let unknown = || {
        let shown: String = id.chars().take(64).collect();
        ErrorBody::new(ErrorCode::WorkerNotFound, format!("this hive never had a worker `{}`", shown.escape_debug()))
    };
    let worker = WorkerId::new(&id).map_err(|_| unknown())?;
    let max = query.tail.unwrap_or(64 << 10).min(4 << 20);
    let tail = api.jobs.spawner.supervisor.log_tail(&worker, max).map_err(|error| {
        ErrorBody::new(ErrorCode::Internal, format!("the log of worker {worker} cannot be read: {error}"))
    })?;
    Ok(tail.ok_or_else(unknown)?)
}
