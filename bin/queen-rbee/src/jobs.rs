//! The queen's jobs: each with its log, its state and the decisions on its way; how long they are kept; who may find them.
//!
//! A job ends once: whoever pushes the end into its log first has ended it, and everybody else's end is dropped.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rbee_service::{Caller, Clock, JobLog, random_hex};
use rbee_wire::event::{ChoiceEnd, Done, Event, FinishReason, Timings, Usage};
use rbee_wire::view::{Decision, JobState, JobView};
use rbee_wire::{
    ErrorBody, ErrorCode, Incarnation, JobId, JobRequest, KeyId, ModelRef, Operation, RequestId, Scope, TraceParent,
    WorkerId,
};
use tokio_util::sync::CancellationToken;

use crate::eta::Pace;
use crate::keys::{Key, Permit};
use crate::metrics::{Ended, Metrics};

/// Decisions kept of one job.
const MAX_TRAIL: usize = 64;

/// Ids of forgotten jobs that are still told apart from unknown ones.
const MAX_EXPIRED: usize = 16_384;

/// Idempotency keys remembered; each is forgotten with its job.
const MAX_KEYS: usize = 8192;

/// Longest idempotency key, in bytes.
const MAX_KEY: usize = 256;

/// One job.
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// What it does.
    pub request: JobRequest,
    /// The request's label.
    pub request_id: RequestId,
    /// The trace it belongs to, if its caller has one.
    pub trace: Option<TraceParent>,
    /// Its events.
    pub log: Arc<JobLog>,
    /// The key it was posted with.
    pub key: Option<Arc<Key>>,
    /// When it was posted, on the queen's clock.
    pub posted: Duration,
    /// Goes on when nobody listens.
    pub detached: bool,
    /// Ends the relay that works for it now.
    pub stop: Mutex<CancellationToken>,
    /// Where its end is counted.
    pub metrics: Arc<Metrics>,
    facts: Mutex<Facts>,
    /// What its key has less of while it lives.
    permit: Mutex<Option<Permit>>,
}

/// What a request says of where it comes from: labels, which decide nothing.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The request's own.
    pub request_id: RequestId,
    /// Its trace.
    pub trace: Option<TraceParent>,
}

/// What changes in a job's life.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Where it is.
    pub state: JobState,
    /// Its model, once known.
    pub model: Option<ModelRef>,
    /// Its worker, once dispatched.
    pub worker: Option<WorkerId>,
    /// When it began to wait for a load.
    pub loading_since: Option<Duration>,
    /// How fast its model loads.
    pub load_pace: Pace,
    /// Time it waited for loads.
    pub load: Duration,
    /// When it was dispatched last.
    pub dispatched: Option<Duration>,
    /// When its first token came.
    pub first_token: Option<Duration>,
    /// When its last token came.
    pub last_token: Option<Duration>,
    /// Tokens so far.
    pub tokens: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Those whose KV was there.
    pub cached_tokens: u64,
    ended: Option<Duration>,
    usage: Option<Usage>,
    timings: Option<Timings>,
    error: Option<ErrorBody>,
    trail: Vec<Decision>,
}

impl Job {
    /// Reads or changes its facts; do not wait meanwhile.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was posted with this key.
    pub fn is_of(&self, key: &Key) -> bool {
        self.key.as_ref().is_some_and(|own| own.id() == key.id())
    }

    /// Lets another job of its key in: this one is over, or was never to be. Before anybody can hear of its end, so that whoever
    /// does finds the place free.
    fn give_back(&self) {
        drop(self.permit.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Writes a decision into its trail.
    pub fn decide(&self, now: Duration, what: &str, why: impl Into<String>) {
        let mut facts = self.facts();
        if facts.trail.len() < MAX_TRAIL {
            let at_ms = millis(now.saturating_sub(self.posted));
            facts.trail.push(Decision { at_ms, what: what.into(), why: why.into() });
        }
    }

    /// Where the time went until now. `worker` is what the worker itself took to the first token, and from there to the last, as its
    /// engine computed them: events that come here together were not made together.
    fn timings(&self, facts: &Facts, now: Duration, worker: Option<Timings>) -> Timings {
        let ms = |span: Duration| span.as_secs_f64() * 1e3;
        let before = facts.dispatched.unwrap_or(now).saturating_sub(self.posted);
        let last = facts.last_token.unwrap_or(now);
        let worked = facts.dispatched.map_or(0.0, |from| ms(last.saturating_sub(from)));
        let heard = ms(last.saturating_sub(facts.first_token.unwrap_or(now)));
        let worker = worker.unwrap_or_default();
        let decode_ms = Some(worker.decode_ms).filter(|ms| *ms > 0.0 && *ms <= worked).unwrap_or(heard);
        let prefill_ms = if facts.first_token.is_some() { worked - decode_ms } else { 0.0 };
        let away = (0.0..=prefill_ms).contains(&worker.prefill_ms) && worker.prefill_ms > 0.0;
        let after_first = facts.tokens.saturating_sub(1) as f64;
        Timings {
            queue_ms: ms(before.saturating_sub(facts.load)),
            load_ms: ms(facts.load),
            prefill_ms,
            network_ms: if away { prefill_ms - worker.prefill_ms } else { 0.0 },
            decode_ms,
            total_ms: ms(now.saturating_sub(self.posted)),
            tokens_per_s: if decode_ms > 0.0 { after_first * 1e3 / decode_ms } else { 0.0 },
        }
    }

    /// Where the time went until now, or until its end.
    pub fn budget(&self, now: Duration) -> Timings {
        let facts = self.facts();
        facts.timings.unwrap_or_else(|| self.timings(&facts, now, None))
    }

    /// What is counted of its end.
    fn ended<'a>(&self, facts: &'a Facts, timings: &'a Timings) -> Ended<'a> {
        Ended {
            model: facts.model.as_ref().filter(|_| facts.worker.is_some()),
            timings,
            first_token: facts.first_token.map(|at| at.saturating_sub(self.posted)),
        }
    }

    /// Ends it well. `done` is the worker's, for an `infer` job.
    pub fn finish(&self, now: Duration, mut done: Done) {
        let mut facts = self.facts();
        let generated = self.request.operation() == Operation::Infer;
        if generated {
            done.timings = Some(self.timings(&facts, now, done.timings));
        }
        let cancelled = done.cancelled();
        let (usage, timings) = (done.usage, done.timings);
        let reasons: Vec<FinishReason> = done.choices.iter().map(|choice| choice.finish_reason).collect();
        self.give_back();
        if self.log.push(&Event::Done(done)).is_some() {
            facts.state = if cancelled { JobState::Cancelled } else { JobState::Done };
            (facts.usage, facts.timings, facts.ended) = (usage, timings, Some(now));
            if let (Some(timings), true) = (&timings, generated) {
                let usage = usage.unwrap_or_default();
                self.metrics.finished(self.ended(&facts, timings), &usage, reasons.into_iter());
            }
        }
    }

    /// Ends it as cancelled, with what it has.
    pub fn finish_cancelled(&self, now: Duration) {
        let choices = match &self.request {
            JobRequest::Infer(infer) => infer.generation.n.unwrap_or(1),
            _ => 1,
        };
        let usage = {
            let facts = self.facts();
            Usage {
                prompt_tokens: facts.prompt_tokens,
                completion_tokens: facts.tokens,
                total_tokens: facts.prompt_tokens + facts.tokens,
                cached_tokens: facts.cached_tokens,
            }
        };
        let end = ChoiceEnd { finish_reason: FinishReason::Cancelled };
        self.finish(now, Done { choices: vec![end; choices as usize], usage: Some(usage), timings: None });
        self.halt();
    }

    /// Ends it with an error.
    pub fn fail(&self, now: Duration, mut error: ErrorBody) {
        error.request_id = Some(self.request_id.clone());
        let mut facts = self.facts();
        self.give_back();
        if self.log.push(&Event::Error(error.clone())).is_some() {
            facts.state = JobState::Failed;
            let timings = self.timings(&facts, now, None);
            facts.timings = Some(timings);
            if self.request.operation() == Operation::Infer {
                self.metrics.failed(self.ended(&facts, &timings), error.code);
            }
            facts.error = Some(error);
            facts.ended = Some(now);
        }
        drop(facts);
        self.halt();
    }

    /// Ends the relay that works for it, if one does.
    pub fn halt(&self) {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    }

    /// A token that ends the next relay, and only that one.
    pub fn next_stop(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
        token
    }

    /// The job as others see it.
    pub fn view(&self, now: Duration, trail: Trail) -> JobView {
        let facts = self.facts();
        JobView {
            job_id: self.id.clone(),
            operation: self.request.operation(),
            key_id: self.key.as_ref().map(|key| key.id().clone()),
            state: facts.state,
            model: facts.model.clone(),
            worker_id: facts.worker.clone(),
            age_ms: millis(now.saturating_sub(self.posted)),
            events: self.log.events(),
            tokens: facts.tokens,
            listeners: self.log.listeners(),
            usage: facts.usage,
            timings: facts.timings,
            error: facts.error.clone(),
            trail: if trail == Trail::Shown { facts.trail.clone() } else { Vec::new() },
        }
    }
}

/// Whether a caller may know of a job posted with this key.
fn is_seen(caller: &Caller, key: Option<&KeyId>) -> bool {
    match caller {
        Caller::Key { id, scopes } if !scopes.contains(&Scope::Admin) => key == Some(id),
        Caller::Owner | Caller::Key { .. } => true,
    }
}

/// Whether a view shows the decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trail {
    /// It does.
    Shown,
    /// It does not.
    Left,
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// How long jobs are kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// After their end.
    pub after_end: Duration,
    /// Bytes of logs in all.
    pub bytes: usize,
}

/// All jobs; cheap to clone.
#[derive(Clone)]
pub struct Jobs(Arc<Shared>);

struct Shared {
    incarnation: Incarnation,
    metrics: Arc<Metrics>,
    clock: Clock,
    keep: Keep,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    jobs: HashMap<JobId, Arc<Job>>,
    order: VecDeque<JobId>,
    /// With the key that each was posted with.
    expired: HashMap<JobId, Option<KeyId>>,
    expired_order: VecDeque<JobId>,
    /// Everybody has idempotency keys of their own.
    keys: HashMap<(Option<KeyId>, String), (Vec<u8>, JobId)>,
}

impl Jobs {
    /// No jobs yet.
    pub fn new(incarnation: Incarnation, clock: Clock, keep: Keep) -> Self {
        Self(Arc::new(Shared { incarnation, metrics: Arc::default(), clock, keep, kept: Mutex::default() }))
    }

    /// What is counted of them.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queen's clock.
    pub fn now(&self) -> Duration {
        self.0.clock.now()
    }

    /// Makes a job, or finds the one of the same idempotency key; the flag says whether it is new.
    ///
    /// # Errors
    /// `IDEMPOTENCY_CONFLICT` when the idempotency key was used with another body; what the poster's own key is refused for.
    pub fn create(
        &self,
        request: JobRequest,
        origin: Origin,
        key: Option<(&str, &[u8])>,
        poster: Option<Arc<Key>>,
    ) -> Result<(Arc<Job>, bool), ErrorBody> {
        let mut kept = self.kept();
        let key = key.map(|(key, body)| ((poster.as_ref().map(|key| key.id().clone()), key.to_owned()), body));
        if let Some((key, body)) = &key {
            if key.1.is_empty() || key.1.len() > MAX_KEY {
                let message = format!("an idempotency key has 1 to {MAX_KEY} bytes");
                return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
            }
            if let Some((before, id)) = kept.keys.get(key)
                && let Some(job) = kept.jobs.get(id)
            {
                if before != body {
                    let message = "this idempotency key was used with another body";
                    return Err(ErrorBody::new(ErrorCode::IdempotencyConflict, message));
                }
                return Ok((Arc::clone(job), false));
            }
            if kept.keys.len() >= MAX_KEYS {
                return Err(ErrorBody::new(ErrorCode::Overloaded, "too many idempotency keys are remembered")
                    .with_retry_after(Duration::from_secs(60)));
            }
        }
        let now = self.now();
        let permit = poster.as_ref().map(|poster| poster.admit(now)).transpose()?;
        let id = JobId::of(&self.0.incarnation, &random_hex(16));
        let detached = match &request {
            JobRequest::Infer(infer) => infer.detach.unwrap_or(false),
            _ => true,
        };
        let model = match &request {
            JobRequest::Infer(infer) => infer.model.clone(),
            _ => None,
        };
        let facts = Facts {
            state: if matches!(request, JobRequest::Infer(_)) { JobState::Queued } else { JobState::Running },
            model,
            worker: None,
            loading_since: None,
            load_pace: Pace::default(),
            load: Duration::ZERO,
            dispatched: None,
            first_token: None,
            last_token: None,
            tokens: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            ended: None,
            usage: None,
            timings: None,
            error: None,
            trail: Vec::new(),
        };
        let job = Arc::new(Job {
            id: id.clone(),
            request,
            request_id: origin.request_id,
            trace: origin.trace,
            log: Arc::default(),
            key: poster,
            posted: now,
            detached,
            stop: Mutex::default(),
            metrics: Arc::clone(&self.0.metrics),
            facts: Mutex::new(facts),
            permit: Mutex::new(permit),
        });
        kept.jobs.insert(id.clone(), Arc::clone(&job));
        kept.order.push_back(id.clone());
        if let Some((key, body)) = key {
            kept.keys.insert(key, (body.to_owned(), id));
        }
        Ok((job, true))
    }

    /// Forgets a job that was refused at its post: it never was.
    pub fn withdraw(&self, id: &JobId) {
        let mut kept = self.kept();
        if let Some(job) = kept.jobs.remove(id) {
            job.give_back();
        }
        kept.order.retain(|other| other != id);
        kept.keys.retain(|_, (_, job)| job != id);
    }

    /// A job by its id. One that the caller may not see is not there.
    ///
    /// # Errors
    /// `QUEEN_RESTARTED`, `JOB_EXPIRED` or `JOB_NOT_FOUND`.
    pub fn find(&self, caller: &Caller, text: &str) -> Result<Arc<Job>, ErrorBody> {
        let shown: String = text.chars().take(80).collect();
        let unknown = || ErrorBody::new(ErrorCode::JobNotFound, format!("there is no job `{}`", shown.escape_debug()));
        let id = JobId::new(text).map_err(|_| unknown())?;
        let kept = self.kept();
        let seen = |key: Option<&KeyId>| is_seen(caller, key);
        if let Some(job) = kept.jobs.get(&id) {
            return if seen(job.key.as_ref().map(|key| key.id())) { Ok(Arc::clone(job)) } else { Err(unknown()) };
        }
        if kept.expired.get(&id).is_some_and(|key| seen(key.as_ref())) {
            return Err(ErrorBody::new(ErrorCode::JobExpired, format!("job {id} ended and is not kept any more")));
        }
        match id.is_of(&self.0.incarnation) {
            Some(false) => {
                Err(ErrorBody::new(ErrorCode::QueenRestarted, format!("job {id} was of a queen that is gone")))
            }
            _ => Err(unknown()),
        }
    }

    /// A job that is sure to be one of ours.
    pub fn get(&self, id: &JobId) -> Option<Arc<Job>> {
        self.kept().jobs.get(id).cloned()
    }

    /// The jobs that are kept and that the caller may see, newest first.
    pub fn list(&self, caller: &Caller) -> Vec<JobView> {
        let now = self.now();
        let kept = self.kept();
        let jobs = kept.order.iter().rev().filter_map(|id| kept.jobs.get(id));
        let seen = jobs.filter(|job| is_seen(caller, job.key.as_ref().map(|key| key.id())));
        seen.map(|job| job.view(now, Trail::Left)).collect()
    }

    /// Jobs that have not ended.
    pub fn open(&self) -> Vec<Arc<Job>> {
        self.kept().jobs.values().filter(|job| !job.log.is_over()).cloned().collect()
    }

    /// Forgets what has been kept long enough, or is too much.
    pub fn sweep(&self) {
        let now = self.now();
        let mut kept = self.kept();
        let mut bytes = 0;
        let mut ended: Vec<(Duration, JobId, usize)> = Vec::new();
        for job in kept.jobs.values() {
            let size = job.log.bytes();
            bytes += size;
            if let Some(at) = job.facts().ended {
                ended.push((at, job.id.clone(), size));
            }
        }
        ended.sort_unstable();
        let mut gone = HashSet::new();
        for (at, id, size) in ended {
            if now.saturating_sub(at) < self.0.keep.after_end && bytes <= self.0.keep.bytes {
                break;
            }
            bytes -= size;
            gone.insert(id);
        }
        if gone.is_empty() {
            return;
        }
        let Kept { jobs, order, expired, expired_order, keys } = &mut *kept;
        let of = |id: &JobId| jobs.get(id)?.key.as_ref().map(|key| key.id().clone());
        let gone: HashMap<JobId, Option<KeyId>> = gone.into_iter().map(|id| (id.clone(), of(&id))).collect();
        jobs.retain(|id, _| !gone.contains_key(id));
        order.retain(|id| !gone.contains_key(id));
        keys.retain(|_, (_, id)| !gone.contains_key(id));
        for (id, key) in gone {
            expired_order.push_back(id.clone());
            expired.insert(id, key);
            if expired_order.len() > MAX_EXPIRED
                && let Some(oldest) = expired_order.pop_front()
            {
                expired.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(keep: Keep) -> Jobs {
        Jobs::new(Incarnation { counter: 1, random: "0123456789abcdef".repeat(2) }, Clock::default(), keep)
    }

    fn post(jobs: &Jobs, key: Option<(&str, &[u8])>) -> Result<(Arc<Job>, bool), ErrorBody> {
        jobs.create(JobRequest::Status {}, Origin { request_id: RequestId::new("r").unwrap(), trace: None }, key, None)
    }

    #[test]
    fn one_key_is_one_job_and_another_body_is_refused() {
        let jobs = jobs(Keep { after_end: Duration::from_secs(1), bytes: 1 << 20 });
        let (first, new) = post(&jobs, Some(("k", b"a"))).unwrap();
        let (second, again) = post(&jobs, Some(("k", b"a"))).unwrap();
        assert!(new && !again && first.id == second.id);
        assert_eq!(post(&jobs, Some(("k", b"b"))).err().unwrap().code, ErrorCode::IdempotencyConflict);
    }

    #[test]
    fn ended_jobs_go_when_their_time_or_the_space_is_over_oldest_first() {
        let keep = Keep { after_end: Duration::from_secs(100), bytes: 100 };
        let jobs = jobs(keep);
        let made: Vec<Arc<Job>> = (0..4).map(|_| post(&jobs, None).unwrap().0).collect();
        for (i, job) in made.iter().enumerate().take(3) {
            job.finish(Duration::from_secs(i as u64), Done::default());
        }
        jobs.sweep();
        assert_eq!(jobs.find(&Caller::Owner, made[0].id.as_str()).err().unwrap().code, ErrorCode::JobExpired);
        assert!(jobs.find(&Caller::Owner, made[3].id.as_str()).is_ok(), "what runs is never forgotten");
        let of_another = format!("job-ffffffff-{}", "a".repeat(32));
        assert_eq!(jobs.find(&Caller::Owner, &of_another).err().unwrap().code, ErrorCode::QueenRestarted);
        assert_eq!(jobs.find(&Caller::Owner, "job-01234567-x").err().unwrap().code, ErrorCode::JobNotFound);
    }

    #[test]
    fn a_job_ends_once() {
        let jobs = jobs(Keep { after_end: Duration::from_secs(1), bytes: 1 << 20 });
        let (job, _) = post(&jobs, None).unwrap();
        job.fail(Duration::ZERO, ErrorBody::new(ErrorCode::Internal, "first"));
        job.finish(Duration::ZERO, Done::default());
        job.finish_cancelled(Duration::ZERO);
        assert_eq!(job.log.events(), 1);
        assert_eq!(job.facts().state, JobState::Failed);
    }
}
