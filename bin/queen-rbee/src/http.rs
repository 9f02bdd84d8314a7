//! The queen's routes.

use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use rbee_scheduler::{Event as Heard, Want};
use rbee_service::{ApiError, Guard, JsonBytes, Shutdown, current_request_id, protect, random_hex, sse};
use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::job::{Infer, JobAccepted};
use rbee_wire::view::{DaemonReady, InfoReply, JobList, JobView, StatusView};
use rbee_wire::worker::{HeartbeatReply, WorkerHeartbeat};
use rbee_wire::{ErrorBody, ErrorCode, JobRequest, ModelRef, Operation, PROTOCOL, RequestId, routes};
use serde_json::{Value, json};

use crate::jobs::{Job, Trail};
use crate::ops::Operations;
use crate::{Reach, Stop};

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
        .route(routes::SHUTDOWN, post(shutdown))
        .route(routes::JOBS, post(post_job).get(list_jobs))
        .route(routes::JOB, get(get_job).delete(cancel_job))
        .route(routes::JOB_STREAM, get(stream_job))
        .route(routes::WORKER_HEARTBEAT, post(worker_heartbeat))
        .route(routes::HIVE_HEARTBEAT, post(hive_heartbeat))
        .route(routes::HEARTBEATS_STREAM, get(heartbeats))
        .with_state(api);
    protect(router, guard)
}

fn draining() -> ErrorBody {
    ErrorBody::new(ErrorCode::Draining, "this queen is about to stop and takes no new jobs")
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

async fn shutdown(State(api): State<Api>, JsonBytes(body): JsonBytes) -> Result<Json<Value>, ApiError> {
    #[derive(Default, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wanted {
        #[serde(default)]
        hives: bool,
    }
    let wanted: Wanted = match &body[..] {
        [] => Wanted::default(),
        bytes => serde_json::from_slice(bytes).map_err(|error| {
            ErrorBody::new(ErrorCode::InvalidRequest, format!("the body is not {{\"hives\"}}: {error}"))
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
    headers: HeaderMap,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    if api.shutdown.is_begun() {
        return Err(draining().into());
    }
    let mut request = JobRequest::parse(&body)?;
    if let JobRequest::Infer(infer) = &mut request {
        // Filled in here, so that a retry elsewhere draws the same.
        let seed = || u64::from_str_radix(&random_hex(8), 16).expect("16 hexadecimal digits are a u64");
        infer.generation.seed.get_or_insert_with(seed);
    }
    let key = match headers.get("idempotency-key") {
        None => None,
        Some(value) => Some(value.to_str().map_err(|_| {
            ErrorBody::new(ErrorCode::InvalidRequest, "an idempotency key has visible ASCII characters only")
        })?),
    };
    let request_id =
        current_request_id().unwrap_or_else(|| RequestId::new(random_hex(16)).expect("hexadecimal digits make an id"));
    let (job, new) = api.ops.jobs.create(request, request_id, key.map(|key| (key, &body[..])))?;
    let unclaimed = new.then(|| Unclaimed(Some((api.clone(), std::sync::Arc::clone(&job)))));
    if new && let Err(error) = begin(&api, &job).await {
        api.ops.jobs.withdraw(&job.id);
        if let Some(unclaimed) = unclaimed {
            unclaimed.claimed();
        }
        return Err(error.into());
    }
    if let Some(unclaimed) = unclaimed {
        unclaimed.claimed();
    }
    let streams = headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"text/event-stream"));
    if streams {
        let at_once = if new { Leaving::Cancels } else { Leaving::Grace };
        return Ok(listen(&api, &job, None, at_once));
    }
    cancel_if_alone(&api, &job);
    let sse_url = routes::JOB_STREAM.replace("{id}", job.id.as_str());
    Ok((StatusCode::ACCEPTED, Json(JobAccepted { job_id: job.id.clone(), sse_url })).into_response())
}

/// A new job whose poster has not been answered. A client that leaves before that ends this request's task at any await, and
/// with it the job: nobody will ever learn its id.
struct Unclaimed(Option<(Api, std::sync::Arc<Job>)>);

impl Unclaimed {
    fn claimed(mut self) {
        self.0 = None;
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some((api, job)) = self.0.take()
            && !job.detached
        {
            tokio::spawn(async move { cancel(&api, &job).await });
        }
    }
}

/// Sets a new job to work.
async fn begin(api: &Api, job: &std::sync::Arc<Job>) -> Result<(), ErrorBody> {
    let JobRequest::Infer(infer) = &job.request else {
        tokio::spawn(api.ops.clone().run(std::sync::Arc::clone(job)));
        return Ok(());
    };
    let now = api.ops.jobs.now();
    let model = match resolve(api, infer) {
        Ok(model) => model,
        Err(error) => {
            job.fail(now, error);
            return Ok(());
        }
    };
    job.decide(now, "accepted", model.as_ref().map_or("no model named".into(), |model| format!("for {model}")));
    let want = Want {
        model,
        device: infer.device,
        worker_id: infer.worker_id.clone(),
        hive_id: infer.hive_id.clone(),
        no_load: infer.no_load.unwrap_or(false),
        deadline: infer.deadline_ms.map(|ms| job.posted + Duration::from_millis(ms)),
    };
    api.ops.brain.submit(Heard::Submit { job: job.id.clone(), want }).await
}

fn resolve(api: &Api, infer: &Infer) -> Result<Option<ModelRef>, ErrorBody> {
    match &infer.model {
        Some(ModelRef::Alias(name)) => api.aliases.get(name).cloned().map(Some).ok_or_else(|| {
            let mut known: Vec<&str> = api.aliases.keys().map(String::as_str).collect();
            known.push("tinybee");
            let message = format!("`{name}` is neither a model nor an alias; there is {}", known.join(", "));
            ErrorBody::new(ErrorCode::ModelNotFound, message)
                .with_hint("`rbee status` lists what is loaded; a local folder is named by its path, such as ./folder")
        }),
        other => Ok(other.clone()),
    }
}

/// What happens to a job when this listener leaves it alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// It is cancelled at once.
    Cancels,
    /// It is cancelled when nobody comes within the grace.
    Grace,
}

fn listen(api: &Api, job: &std::sync::Arc<Job>, after: Option<u64>, leaving: Leaving) -> Response {
    let (left_api, left_job, runtime) = (api.clone(), std::sync::Arc::clone(job), tokio::runtime::Handle::current());
    let left = move || {
        if left_job.detached || left_job.log.is_over() || left_job.log.listeners() > 0 {
            return;
        }
        match leaving {
            Leaving::Cancels => drop(runtime.spawn(async move { cancel(&left_api, &left_job).await })),
            Leaving::Grace => {
                let _inside = runtime.enter();
                cancel_if_alone(&left_api, &left_job);
            }
        }
    };
    sse::response(job.log.listen(after, left))
}

/// Cancels a job that nobody listens to after the grace.
fn cancel_if_alone(api: &Api, job: &std::sync::Arc<Job>) {
    if job.detached || job.log.is_over() {
        return;
    }
    let (api, job) = (api.clone(), std::sync::Arc::clone(job));
    tokio::spawn(async move {
        tokio::time::sleep(api.grace).await;
        if job.log.listeners() == 0 && !job.log.is_over() {
            tracing::info!(job = %job.id, "nobody listens; cancelled");
            cancel(&api, &job).await;
        }
    });
}

async fn cancel(api: &Api, job: &Job) {
    api.ops.brain.tell(Heard::Cancel { job: job.id.clone() }).await;
    job.decide(api.ops.jobs.now(), "cancel", "somebody cancelled it, or nobody listened");
    job.finish_cancelled(api.ops.jobs.now());
}

async fn list_jobs(State(api): State<Api>) -> Json<JobList> {
    Json(JobList { jobs: api.ops.jobs.list() })
}

async fn get_job(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<JobView>, ApiError> {
    Ok(Json(api.ops.jobs.find(&id)?.view(api.ops.jobs.now(), Trail::Shown)))
}

async fn cancel_job(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let job = api.ops.jobs.find(&id)?;
    if job.log.is_over() {
        return Err(ErrorBody::new(ErrorCode::JobOver, format!("job {} has ended already", job.id)).into());
    }
    if job.request.operation() != Operation::Infer {
        let message = format!("`{}` cannot be cancelled once it runs", job.request.operation().name());
        return Err(ErrorBody::new(ErrorCode::JobOver, message).into());
    }
    cancel(&api, &job).await;
    Ok(Json(json!({ "cancelled": true })))
}

#[derive(serde::Deserialize)]
struct After {
    after: Option<u64>,
}

async fn stream_job(
    State(api): State<Api>,
    Path(id): Path<String>,
    Query(query): Query<After>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let job = api.ops.jobs.find(&id)?;
    let after =
        match headers.get("last-event-id") {
            None => query.after,
            Some(value) => Some(value.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
                ErrorBody::new(ErrorCode::InvalidRequest, "Last-Event-ID must be the `id` of an event")
            })?),
        };
    Ok(listen(&api, &job, after, Leaving::Grace))
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
async fn heartbeats(State(api): State<Api>) -> Response {
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
    sse::infallible(views)
}
