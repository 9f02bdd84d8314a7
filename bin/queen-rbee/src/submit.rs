//! How a request becomes a job, whichever surface it came over, and what becomes of a job that nobody listens to.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rbee_scheduler::{Event as Heard, Purpose, Want, Work};
use rbee_service::{Caller, Listener, current_request_id, current_trace, random_hex};
use rbee_wire::job::{Infer, Input};
use rbee_wire::{ErrorBody, ErrorCode, JobRequest, KeepAlive, ModelRef, RequestId};

use crate::http::Api;
use crate::jobs::{Job, Origin};
use crate::keys::{Key, revoked};

/// Why a job is cancelled whose client went away.
const LEFT: &str = "nobody listens";

/// What happens to a job when this listener leaves it alone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// It is cancelled at once.
    Cancels,
    /// It is cancelled when nobody comes within the grace.
    Grace,
}

/// Makes a job of a request and sets it to work. It is the caller's to claim; without a claim it is one that the idempotency key
/// named and that there was already.
///
/// # Errors
/// The refusal: there is no job then.
pub async fn submit(
    api: &Api,
    caller: &Caller,
    mut request: JobRequest,
    key: Option<(&str, &[u8])>,
) -> Result<(Arc<Job>, Option<Unclaimed>), ErrorBody> {
    if api.shutdown.is_begun() {
        return Err(draining());
    }
    if let JobRequest::Infer(infer) = &mut request {
        // Filled in here, so that a retry elsewhere draws the same.
        let seed = || u64::from_str_radix(&random_hex(8), 16).expect("16 hexadecimal digits are a u64");
        infer.generation.seed.get_or_insert_with(seed);
    }
    // An unknown alias is refused by whoever carries the operation out.
    if let Some(model) = model_of(&mut request)
        && let Ok(resolved) = resolve(&api.aliases, model)
    {
        *model = resolved;
    }
    let request_id =
        current_request_id().unwrap_or_else(|| RequestId::new(random_hex(16)).expect("hexadecimal digits make an id"));
    let owner = api.ops.keys.of(caller)?;
    let (job, new) = api.ops.jobs.create(request, Origin { request_id, trace: current_trace() }, key, owner.clone())?;
    if !new {
        return Ok((job, None));
    }
    if let Some(trace) = &job.trace {
        tracing::info!(job = %job.id, request = %job.request_id, trace = trace.trace_id(), "a traced job begins");
    }
    let unclaimed = Unclaimed(Some((api.clone(), Arc::clone(&job))));
    if let Err(error) = begin(api, &job).await {
        api.ops.jobs.withdraw(&job.id);
        unclaimed.claimed();
        return Err(error);
    }
    // Whoever revoked the key meanwhile may have looked for its jobs before this was one, or cancelled it before the scheduler had it.
    if owner.is_some_and(|key| key.closed().is_cancelled()) {
        unclaimed.claimed();
        api.ops.cancel(&job, "its key was revoked").await;
        return Err(revoked());
    }
    Ok((job, Some(unclaimed)))
}

/// The refusal of a queen that is about to stop.
pub fn draining() -> ErrorBody {
    ErrorBody::new(ErrorCode::Draining, "this queen is about to stop and takes no new jobs")
}

/// A new job whose poster has not been answered. A client that leaves before that ends this request's task at any await, and
/// with it the job: nobody will ever learn its id.
pub struct Unclaimed(Option<(Api, Arc<Job>)>);

impl Unclaimed {
    /// Somebody answers for the job now.
    pub fn claimed(mut self) {
        self.0 = None;
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some((api, job)) = self.0.take()
            && !job.detached
        {
            tokio::spawn(async move { api.ops.cancel(&job, LEFT).await });
        }
    }
}

/// Sets a new job to work.
async fn begin(api: &Api, job: &Arc<Job>) -> Result<(), ErrorBody> {
    let owner = job.key.as_ref().map(|key| key.id().clone());
    let now = api.ops.jobs.now();
    let infer = match &job.request {
        JobRequest::Infer(infer) => infer,
        JobRequest::ModelLoad(load) => {
            job.decide(now, "accepted", format!("to load {}", load.model));
            let want = Want {
                owner,
                model: Some(load.model.clone()),
                device: load.device,
                hive_id: load.hive_id.clone(),
                purpose: Purpose::Load,
                keep_alive: load.keep_alive,
                ..Want::default()
            };
            return api.ops.brain.submit(Heard::Submit { job: job.id.clone(), want }).await;
        }
        _ => {
            tokio::spawn(api.ops.clone().run(Arc::clone(job)));
            return Ok(());
        }
    };
    if infer.keep_alive == Some(KeepAlive::Forever) && job.key.as_ref().is_some_and(|key| !key.is_admin()) {
        let message = "a model is kept for ever by an admin only";
        job.fail(
            now,
            ErrorBody::new(ErrorCode::Forbidden, message).with_hint("give `keep_alive` a time, such as `1h`"),
        );
        return Ok(());
    }
    let model = match infer.model.as_ref().map(|model| resolve(&api.aliases, model)).transpose() {
        Ok(model) => model,
        Err(error) => {
            job.fail(now, error);
            return Ok(());
        }
    };
    job.decide(now, "accepted", model.as_ref().map_or("no model named".into(), |model| format!("for {model}")));
    let want = Want {
        owner,
        model,
        device: infer.device,
        worker_id: infer.worker_id.clone(),
        hive_id: infer.hive_id.clone(),
        purpose: Purpose::Run,
        work: work(infer),
        keep_alive: infer.keep_alive,
        no_load: no_load(api, job.key.as_deref(), infer).await,
        deadline: infer.deadline_ms.map(|ms| job.posted + Duration::from_millis(ms)),
    };
    api.ops.brain.submit(Heard::Submit { job: job.id.clone(), want }).await
}

/// How much work an answer may be: four bytes are a token, more or less.
fn work(infer: &Infer) -> Work {
    let generation = &infer.generation;
    let of_messages: usize = generation.messages.iter().flatten().map(|message| message.content.len() / 4).sum();
    let of_prompt = match &generation.prompt {
        Some(Input::Text(text)) => text.len() / 4,
        Some(Input::Tokens(ids)) => ids.len(),
        None => 0,
    };
    let usual = Work::default();
    let prompt = (of_messages + of_prompt).max(1) as u64;
    Work { prompt, answer: generation.max_tokens.unwrap_or(usual.answer) }
}

/// What to do where the model is not to be loaded: the poster said so, or may not have it loaded. A path that a key without the
/// scope `admin` names may be any file of the machine, a repository any size: what serves already may answer, and what lies in the
/// operator's folders or in a hive's store.
async fn no_load(api: &Api, key: Option<&Key>, infer: &Infer) -> Option<&'static str> {
    if infer.no_load == Some(true) {
        return ErrorCode::NoWorker.hint();
    }
    match (key, &infer.model) {
        (Some(key), Some(ModelRef::Path(path))) if !key.is_admin() => {
            let inside = api.model_dirs.iter().any(|folder| Path::new(path).starts_with(folder));
            (!inside).then_some(
                "with this key a path loads nothing outside of `model_dirs`: an admin loads it with `rbee worker spawn --model PATH`",
            )
        }
        (Some(key), Some(model @ ModelRef::Hub { .. })) if !key.is_admin() => {
            let hives = api.ops.brain.fleet().await.hives;
            let stored = hives.iter().any(|hive| hive.models.contains(model));
            (!stored)
                .then_some("with this key nothing is downloaded: an admin fetches it with `rbee model download REF`")
        }
        _ => None,
    }
}

/// A model by its own name rather than by an alias.
fn resolve(aliases: &BTreeMap<String, ModelRef>, model: &ModelRef) -> Result<ModelRef, ErrorBody> {
    let ModelRef::Alias(name) = model else { return Ok(model.clone()) };
    aliases.get(name).cloned().ok_or_else(|| {
        let mut known: Vec<&str> = aliases.keys().map(String::as_str).collect();
        known.push("tinybee");
        let message = format!("`{name}` is neither a model nor an alias; there is {}", known.join(", "));
        ErrorBody::new(ErrorCode::ModelNotFound, message)
            .with_hint("`rbee status` lists what is loaded; a local folder is named by its path, such as ./folder")
    })
}

/// The model that an operation other than `infer` names.
fn model_of(request: &mut JobRequest) -> Option<&mut ModelRef> {
    match request {
        JobRequest::WorkerSpawn(x) => Some(&mut x.model),
        JobRequest::ModelDownload(x) => Some(&mut x.model),
        JobRequest::ModelPlan(x) => Some(&mut x.model),
        JobRequest::ModelLoad(x) => Some(&mut x.model),
        JobRequest::ModelUnload(x) => Some(&mut x.model),
        _ => None,
    }
}

/// A cursor into a job's log, from its beginning or from the event after an offset.
pub fn listen(api: &Api, job: &Arc<Job>, after: Option<u64>, leaving: Leaving) -> Listener {
    let (left_api, left_job, runtime) = (api.clone(), Arc::clone(job), tokio::runtime::Handle::current());
    let left = move || {
        if left_job.detached || left_job.log.is_over() || left_job.log.listeners() > 0 {
            return;
        }
        match leaving {
            Leaving::Cancels => drop(runtime.spawn(async move { left_api.ops.cancel(&left_job, LEFT).await })),
            Leaving::Grace => {
                let _inside = runtime.enter();
                cancel_if_alone(&left_api, &left_job);
            }
        }
    };
    job.log.listen(after, left)
}

/// Cancels a job that nobody listens to after the grace.
pub fn cancel_if_alone(api: &Api, job: &Arc<Job>) {
    if job.detached || job.log.is_over() {
        return;
    }
    let (api, job) = (api.clone(), Arc::clone(job));
    tokio::spawn(async move {
        tokio::time::sleep(api.grace).await;
        if job.log.listeners() == 0 && !job.log.is_over() {
            tracing::info!(job = %job.id, "nobody listens; cancelled");
            api.ops.cancel(&job, LEFT).await;
        }
    });
}
