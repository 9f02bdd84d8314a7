//! The queen's routes.

use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use rbee_scheduler::Event as Heard;
use rbee_service::{ApiError, BrokeOff, Caller, Guard, JsonBytes, Shutdown, protect, sse};
use rbee_wire::body::parse_object;
use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::job::JobAccepted;
use rbee_wire::view::{DaemonReady, InfoReply, JobList, JobState, JobView, StatusView};
use rbee_wire::worker::{HeartbeatReply, WorkerHeartbeat};
use rbee_wire::{ErrorBody, ErrorCode, JobRequest, ModelRef, Operation, PROTOCOL, routes};
use serde_json::{Value, json};

use crate::jobs::Trail;
use crate::keys::Key;
use crate::metrics::Seen;
use crate::ops::Operations;
use crate::submit::{Leaving, cancel_if_alone, draining, listen, submit};
use crate::{Reach, Stop, openai};

/// State of the routes.
#[derive(Clone)]
pub struct Api {
    /// Operations, fleet and jobs.
    pub ops: Operations,
    /// The queen's end.
    pub shutdown: Shutdown,
    /// What the end takes along.
    pub stop: std::sync::Arc<Stop>,
    /// Names for models.
    pub aliases: std::sync::Arc<std::collections::BTreeMap<String, ModelRef>>,
    /// Folders from which a key without the scope `admin` may have models loaded.
    pub model_dirs: std::sync::Arc<[std::path::PathBuf]>,
    /// How long a job goes on without a listener.
    pub grace: Duration,
    /// From where workers may be.
    pub reach: Reach,
}

/// The routes of a queen.
pub fn router(api: Api, guard: Guard) -> Router {
    let health = || async { Json(json!({ "ok": true })) };
    let router = Router::new()
        .route(routes::HEALTH, get(health))
        .route(routes::LIVEZ, get(health))
        .route(routes::READY, get(ready))
        .route(routes::READYZ, get(ready))
        .route(routes::INFO, get(info))
        .route(routes::OPENAPI, get(openapi))
        .route(routes::METRICS, get(metrics))
        .route(routes::SHUTDOWN, post(shutdown))
        .route(routes::JOBS, post(post_job).get(list_jobs))
        .route(routes::JOB, get(get_job).delete(cancel_job))
        .route(routes::JOB_STREAM, get(stream_job))
        .route(routes::WORKER_HEARTBEAT, post(worker_heartbeat))
        .route(routes::HIVE_HEARTBEAT, post(hive_heartbeat))
        .route(routes::HEARTBEATS_STREAM, get(heartbeats));
    let router = openai::mount(router).with_state(api);
    // Outermost, so that what the guard refuses is said in the dialect too.
    protect(router, guard).layer(axum::middleware::from_fn(openai::in_dialect))
}

async fn ready(State(api): State<Api>) -> Result<Json<DaemonReady>, ApiError> {
    if api.shutdown.is_begun() {
        return Err(draining().into());
    }
    Ok(Json(DaemonReady { ready: true, reason: None }))
}

async fn info(State(api): State<Api>) -> Json<InfoReply> {
    Json(api.ops.info())
}

/// Made by `cargo xtask gen` from the tables that the routes, their requests and their answers come from.
async fn openapi() -> Response {
    let document = include_str!("../../../docs/reference/openapi.json");
    ([(header::CONTENT_TYPE, "application/json")], document).into_response()
}

async fn metrics(State(api): State<Api>) -> Response {
    let fleet = api.ops.brain.fleet().await;
    let (mut running, mut waiting) = (Vec::new(), Vec::new());
    for job in api.ops.jobs.open().iter().filter(|job| job.request.operation() == Operation::Infer) {
        let facts = job.facts();
        let place = if facts.state == JobState::Running { &mut running } else { &mut waiting };
        // A name that nothing has served yet is whatever somebody made up.
        let model = facts.model.clone();
        place.push(model.filter(|model| fleet.workers.iter().any(|worker| worker.model == *model)));
    }
    let hives = fleet.hives.iter().filter(|hive| hive.alive).count();
    let text = api.ops.jobs.metrics().text(&Seen { workers: fleet.workers, hives, running, waiting });
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
}

async fn shutdown(State(api): State<Api>, JsonBytes(body): JsonBytes) -> Result<Json<Value>, ApiError> {
    #[derive(Default, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wanted {
        #[serde(default)]
        hives: bool,
    }
    let wanted: Wanted = match &body[..] {
        [] => Wanted::default(),
        bytes => parse_object(bytes)
            .and_then(|map| serde_json::from_value(Value::Object(map)).map_err(|error| error.to_string()))
            .map_err(|problem| {
                ErrorBody::new(ErrorCode::InvalidRequest, format!("the body is not {{\"hives\"}}: {problem}"))
            })?,
    };
    if wanted.hives {
        api.stop.take_hives();
    }
    api.shutdown.begin();
    Ok(Json(json!({ "draining": true })))
}

async fn post_job(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let request = JobRequest::parse(&body)?;
    let row = request.operation().row();
    caller.may(row.access, &format!("`{}`", row.name))?;
    let key = match headers.get("idempotency-key") {
        None => None,
        Some(value) => Some(value.to_str().map_err(|_| {
            ErrorBody::new(ErrorCode::InvalidRequest, "an idempotency key has visible ASCII characters only")
        })?),
    };
    let (job, unclaimed) = submit(&api, &caller, request, key.map(|key| (key, &body[..]))).await?;
    let leaving = if unclaimed.is_some() { Leaving::Cancels } else { Leaving::Grace };
    if let Some(unclaimed) = unclaimed {
        unclaimed.claimed();
    }
    let streams = headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"text/event-stream"));
    if streams {
        return Ok(sse::response(listen(&api, &job, None, leaving)));
    }
    cancel_if_alone(&api, &job);
    let sse_url = routes::JOB_STREAM.replace("{id}", job.id.as_str());
    Ok((StatusCode::ACCEPTED, Json(JobAccepted { job_id: job.id.clone(), sse_url })).into_response())
}

async fn list_jobs(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Json<JobList> {
    Json(JobList { jobs: api.ops.jobs.list(&caller) })
}

async fn get_job(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<JobView>, ApiError> {
    Ok(Json(api.ops.jobs.find(&caller, &id)?.view(api.ops.jobs.now(), Trail::Shown)))
}

async fn cancel_job(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let job = api.ops.jobs.find(&caller, &id)?;
    if job.log.is_over() {
        return Err(ErrorBody::new(ErrorCode::JobOver, format!("job {} has ended already", job.id)).into());
    }
    if !job.request.operation().can_be_cancelled() {
        let message = format!("`{}` cannot be cancelled once it runs", job.request.operation().name());
        return Err(ErrorBody::new(ErrorCode::JobOver, message).into());
    }
    api.ops.cancel(&job, "somebody cancelled it").await;
    Ok(Json(json!({ "cancelled": true })))
}

#[derive(serde::Deserialize)]
struct After {
    after: Option<u64>,
}

async fn stream_job(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Query(query): Query<After>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let job = api.ops.jobs.find(&caller, &id)?;
    let after =
        match headers.get("last-event-id") {
            None => query.after,
            Some(value) => Some(value.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
                ErrorBody::new(ErrorCode::InvalidRequest, "Last-Event-ID must be the `id` of an event")
            })?),
        };
    let listener = listen(&api, &job, after, Leaving::Grace);
    Ok(match api.ops.keys.of(&caller)? {
        // Its own jobs end in order when a key is revoked.
        Some(key) if !job.is_of(&key) => sse::response(while_open(listener, &key)),
        _ => sse::response(listener),
    })
}

/// A stream that breaks off when the key which it was opened with is revoked.
fn while_open<S>(stream: S, key: &Key) -> impl Stream<Item = Result<Bytes, BrokeOff>> + use<S>
where
    S: Stream<Item = Result<Bytes, BrokeOff>>,
{
    let (closed, broken) = (key.closed().clone(), key.closed().clone());
    let end = futures::stream::once(async move { broken.is_cancelled() });
    let end = end.filter_map(|broken| std::future::ready(broken.then_some(Err(BrokeOff))));
    stream.take_until(closed.cancelled_owned()).chain(end)
}

fn check_version(protocol: u32) -> Result<(), ErrorBody> {
    if protocol == PROTOCOL {
        return Ok(());
    }
    Err(ErrorBody::new(ErrorCode::VersionMismatch, format!("protocol {protocol} is not spoken here, {PROTOCOL} is")))
}

fn unreadable(error: &serde_json::Error) -> ErrorBody {
    ErrorBody::new(ErrorCode::InvalidRequest, format!("the heartbeat is not of the protocol: {error}"))
}

async fn worker_heartbeat(
    State(api): State<Api>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<HeartbeatReply>, ApiError> {
    let beat: WorkerHeartbeat = serde_json::from_slice(&body).map_err(|error| unreadable(&error))?;
    check_version(beat.protocol)?;
    api.reach.check(&beat.url)?;
    if api.ops.brain.beat(Heard::WorkerBeat(Box::new(beat))).await {
        Ok(Json(HeartbeatReply::default()))
    } else {
        Err(ErrorBody::new(ErrorCode::InvalidRequest, "this life of the worker has ended").into())
    }
}

async fn hive_heartbeat(State(api): State<Api>, JsonBytes(body): JsonBytes) -> Result<Json<HeartbeatReply>, ApiError> {
    let beat: HiveHeartbeat = serde_json::from_slice(&body).map_err(|error| unreadable(&error))?;
    check_version(beat.protocol)?;
    api.reach.check(&beat.url)?;
    if api.ops.brain.beat(Heard::HiveBeat(Box::new(beat))).await {
        Ok(Json(HeartbeatReply::default()))
    } else {
        Err(ErrorBody::new(ErrorCode::InvalidRequest, "this life of the hive has ended").into())
    }
}

/// The fleet twice a second, as `data` events that hold a [`StatusView`].
async fn heartbeats(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    let key = api.ops.keys.of(&caller)?;
    let views = futures::stream::unfold((api, 0u64), |(api, id)| async move {
        if id > 0 {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
                () = api.shutdown.begun() => return None,
            }
        }
        let fleet = api.ops.brain.fleet().await;
        let view = StatusView {
            queen: api.ops.info(),
            hives: fleet.hives,
            workers: fleet.workers,
            queued: fleet.queued,
            running: fleet.running,
        };
        let json = serde_json::to_vec(&rbee_wire::Event::data(&view)).expect("wire types serialize to JSON");
        let mut frame = Vec::new();
        rbee_wire::sse::write_event(&mut frame, id, &json);
        Some((Bytes::from(frame), (api, id + 1)))
    });
    Ok(match key {
        Some(key) => sse::response(while_open(views.map(Ok), &key)),
        None => sse::infallible(views),
    })
}
