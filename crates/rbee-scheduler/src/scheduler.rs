//! The scheduler: jobs from their submission to their end, over whoever beats.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use rbee_wire::view::{HiveView, WorkerView};
use rbee_wire::worker::{LoadProgress, WorkerState};
use rbee_wire::{ErrorBody, ErrorCode, Incarnation, JobId, KeyId, ModelRef, WorkerId};
use serde_json::json;

use crate::loads::Load;
use crate::policy::Choice;
use crate::registry::{Back, Beat, DEAD, Gone, Registry, Worker};
use crate::{Config, Effect, Event, LoadKey, Purpose, Want};

/// A tick that comes later than this after the last one shows that the queen itself stood still.
const LATE: Duration = Duration::from_millis(600);
/// Workers that may break under one request.
const MAX_BROKEN: usize = 2;
/// Beats that a worker which breaks has missed by then: it was frozen before.
const MISSED: Duration = Duration::from_millis(1100);
/// Waiting jobs that are told when they move up.
const TOLD: u64 = 16;
/// Ends of jobs that the service rate is measured over.
const ENDS: usize = 32;

/// A job that has not ended.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) want: Want,
    pub(crate) model: ModelRef,
    since: Duration,
    running: Option<Running>,
    /// Lives of workers that broke under it.
    avoid: Vec<Incarnation>,
    broken: usize,
    pub(crate) told: Told,
}

impl Job {
    /// The load that it would wait for.
    pub(crate) fn load_key(&self) -> LoadKey {
        LoadKey {
            model: self.model.clone(),
            device: self.want.device.unwrap_or_default(),
            hive: self.want.hive_id.clone(),
        }
    }
}

#[derive(Debug)]
struct Running {
    worker: WorkerId,
    first_token: bool,
}

/// What a waiting job was told last.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Told {
    Nothing,
    Queued(u64),
    Loading(Option<LoadProgress>),
}

/// The scheduler; see the crate.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) registry: Registry,
    pub(crate) jobs: HashMap<JobId, Job>,
    pub(crate) waiting: VecDeque<JobId>,
    pub(crate) loads: HashMap<LoadKey, Load>,
    ends: VecDeque<Duration>,
    ticked: Option<Duration>,
    draining: bool,
}

/// What can be done for a waiting job.
enum Place {
    Dispatch { worker: WorkerId, why: String },
    Queue,
    AwaitLoad(Option<LoadProgress>),
    StartLoad,
    Loaded(WorkerId),
    Reject(ErrorBody),
}

fn lost(worker: &WorkerId, gone: Gone) -> ErrorBody {
    match gone {
        Gone::Lost => {
            ErrorBody::new(ErrorCode::WorkerLost, format!("worker {worker} ended in the middle of the answer"))
                .with_hint(format!("run it again; `rbee worker logs {worker}` shows why it ended"))
        }
        Gone::Stalled => ErrorBody::new(ErrorCode::WorkerStalled, format!("worker {worker} stopped making progress")),
    }
}

impl Scheduler {
    /// A scheduler that knows nobody.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            registry: Registry::default(),
            jobs: HashMap::new(),
            waiting: VecDeque::new(),
            loads: HashMap::new(),
            ends: VecDeque::new(),
            ticked: None,
            draining: false,
        }
    }

    /// Takes an event and says what is to be done, in order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::WorkerBeat(beat) => self.worker_beat(*beat, now, &mut out),
            Event::HiveBeat(beat) => {
                let (verdict, gone) = self.registry.hive_beat(*beat, now);
                if verdict == Beat::Refused {
                    out.push(Effect::RefuseBeat);
                }
                for (worker, why) in gone {
                    self.worker_gone(&worker, why, Back::Never, &mut out);
                }
            }
            Event::Tick => self.tick(now, &mut out),
            Event::Submit { job, want } => self.submit(job, want, now, &mut out),
            Event::FirstToken { job, worker } => {
                if let Some(running) = self.running_on(&job, &worker) {
                    running.first_token = true;
                }
            }
            Event::Ended { job, worker } => {
                if self.running_on(&job, &worker).is_some() {
                    self.release(&worker, now);
                    self.jobs.remove(&job);
                    self.ends.push_back(now);
                    if self.ends.len() > ENDS {
                        self.ends.pop_front();
                    }
                }
            }
            Event::DispatchFailed { job, worker, error, retry } => {
                self.failed(job, &worker, error, retry, now, &mut out)
            }
            Event::Cancel { job } => {
                if let Some(job) = self.jobs.remove(&job)
                    && let Some(running) = job.running
                {
                    self.release(&running.worker, now);
                }
                self.waiting.retain(|waiting| waiting != &job);
            }
            Event::LoadProgress { model, progress } => self.load_moved(&model, &progress, &mut out),
            Event::Planned { load, result } => self.planned(&load, result, now, &mut out),
            Event::LoadDone { load, result } => self.load_done(&load, result, now, &mut out),
            Event::Unloaded { worker, result } => self.unloaded(&worker, result, &mut out),
            Event::Drain => self.draining = true,
        }
        self.pump_loads(now, &mut out);
        self.pump(now, &mut out);
        out
    }

    /// The workers as others see them.
    pub fn workers(&self, now: Duration) -> Vec<WorkerView> {
        self.registry.worker_views(now)
    }

    /// The hives as others see them.
    pub fn hives(&self, now: Duration) -> Vec<HiveView> {
        self.registry.hive_views(now)
    }

    /// What a worker's routes ask for.
    pub fn bearer(&self, worker: &WorkerId) -> Option<&str> {
        self.registry.worker(worker).map(|worker| worker.beat.bearer.as_str())
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        self.waiting.len()
    }

    /// Jobs that run.
    pub fn running(&self) -> usize {
        self.jobs.len() - self.waiting.len()
    }

    fn running_on(&mut self, job: &JobId, worker: &WorkerId) -> Option<&mut Running> {
        self.jobs.get_mut(job)?.running.as_mut().filter(|running| &running.worker == worker)
    }

    fn release(&mut self, worker: &WorkerId, now: Duration) {
        if let Some(worker) = self.registry.worker_mut(worker) {
            worker.dispatched = worker.dispatched.saturating_sub(1);
            // The heartbeat counted it too; the next one will say how many there really are.
            worker.beat.slots.used = worker.beat.slots.used.saturating_sub(1).max(worker.dispatched);
            worker.look(now);
        }
    }

    fn worker_beat(&mut self, beat: rbee_wire::worker::WorkerHeartbeat, now: Duration, out: &mut Vec<Effect>) {
        let id = beat.worker_id.clone();
        match self.registry.worker_beat(beat, now) {
            Beat::Taken | Beat::Old => {}
            Beat::Refused => out.push(Effect::RefuseBeat),
            Beat::NewLife => self.orphan(&id, Gone::Lost, out),
            Beat::Stopped => self.worker_gone(&id, Gone::Lost, Back::Never, out),
        }
        let Some(worker) = self.registry.worker(&id) else { return };
        let (model, state, load) = (worker.beat.model.clone(), worker.beat.state, worker.beat.load.clone());
        if worker.is_up() {
            let worker = worker.clone();
            self.shown(&worker);
        } else if let (WorkerState::Starting, Some(progress)) = (state, load) {
            self.load_moved(&model, &progress, out);
        }
    }

    fn worker_gone(&mut self, worker: &WorkerId, gone: Gone, back: Back, out: &mut Vec<Effect>) {
        if self.registry.worker(worker).is_none() {
            return;
        }
        self.registry.remove(worker, back);
        out.push(Effect::Forget { worker: worker.clone() });
        self.orphan(worker, gone, out);
    }

    /// The jobs of a worker that is gone: elsewhere if nothing of them is out, else over.
    fn orphan(&mut self, worker: &WorkerId, gone: Gone, out: &mut Vec<Effect>) {
        let on_it = |job: &Job| job.running.as_ref().is_some_and(|running| &running.worker == worker);
        let running = self.jobs.iter().filter(|(_, job)| on_it(job));
        let mut orphans: Vec<(Duration, JobId)> = running.map(|(id, job)| (job.since, id.clone())).collect();
        orphans.sort_unstable();
        // The oldest last: each goes to the head of the line.
        for (_, id) in orphans.into_iter().rev() {
            let out_already = self.jobs[&id].running.as_ref().is_some_and(|running| running.first_token);
            self.broke(id, lost(worker, gone), !out_already, out);
        }
    }

    fn failed(
        &mut self,
        job: JobId,
        worker: &WorkerId,
        error: ErrorBody,
        retry: bool,
        now: Duration,
        out: &mut Vec<Effect>,
    ) {
        if self.running_on(&job, worker).is_none() {
            return;
        }
        let refusal = matches!(error.code, ErrorCode::Overloaded | ErrorCode::ModelLoading | ErrorCode::Draining);
        let frozen = self.registry.worker(worker).is_some_and(|known| now.saturating_sub(known.heard) > MISSED);
        if let Some(known) = self.registry.worker_mut(worker) {
            known.refused = true;
        }
        if refusal && retry {
            self.release(worker, now);
            self.requeue(job);
            return;
        }
        let error = if error.code == ErrorCode::WorkerLost && frozen { lost(worker, Gone::Stalled) } else { error };
        let life = self.registry.worker(worker).map(|known| known.beat.incarnation.clone());
        if let (Some(job), Some(life)) = (self.jobs.get_mut(&job), life) {
            job.avoid.push(life);
        }
        self.release(worker, now);
        self.broke(job, error, retry, out);
    }

    /// A worker broke under a job.
    fn broke(&mut self, id: JobId, error: ErrorBody, retry: bool, out: &mut Vec<Effect>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.broken += 1;
        let pinned = job.want.worker_id.is_some();
        if retry && job.broken < MAX_BROKEN && !pinned {
            out.push(Effect::Halt { job: id.clone() });
            self.requeue(id);
            return;
        }
        let error = if retry && job.broken >= MAX_BROKEN {
            let message = format!("{} workers ended under this request; the last: {}", job.broken, error.message);
            ErrorBody::new(ErrorCode::RequestPoisoned, message)
        } else {
            error
        };
        self.jobs.remove(&id);
        out.push(Effect::Abort { job: id, error });
    }

    /// Back to the head of the line: it waited its turn already.
    fn requeue(&mut self, id: JobId) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.running = None;
            job.told = Told::Nothing;
            self.waiting.push_front(id);
        }
    }

    fn tick(&mut self, now: Duration, out: &mut Vec<Effect>) {
        if let Some(before) = self.ticked.replace(now)
            && now.saturating_sub(before) > LATE
        {
            self.registry.extend(now.saturating_sub(before));
        }
        for (worker, why) in self.registry.scan(now) {
            let silent = self.registry.worker(&worker).is_some_and(|known| now.saturating_sub(known.heard) > DEAD);
            self.worker_gone(&worker, why, if silent { Back::Perhaps } else { Back::Never }, out);
        }
        let mut over: Vec<JobId> = Vec::new();
        for (id, job) in &self.jobs {
            let late = job.want.deadline.is_some_and(|deadline| now >= deadline);
            let tired = matches!(job.told, Told::Queued(_))
                && job.running.is_none()
                && now >= job.since + self.config.queue_timeout;
            if late || tired {
                over.push(id.clone());
            }
        }
        over.sort_unstable();
        for id in over {
            let Some(job) = self.jobs.remove(&id) else { continue };
            self.waiting.retain(|waiting| waiting != &id);
            let waited = now.saturating_sub(job.since).as_millis();
            if job.want.deadline.is_some_and(|deadline| now >= deadline) {
                let error =
                    ErrorBody::new(ErrorCode::DeadlineExceeded, format!("the deadline passed after {waited} ms"));
                match job.running {
                    Some(running) => {
                        self.release(&running.worker, now);
                        out.push(Effect::Abort { job: id, error });
                    }
                    None => out.push(Effect::Reject { job: id, error }),
                }
            } else {
                let message = format!("no worker for {} had a free slot within {waited} ms", job.model);
                let error = ErrorBody::new(ErrorCode::QueueTimeout, message).with_retry_after(self.retry_after());
                out.push(Effect::Reject { job: id, error });
            }
        }
        self.expire_loads(now, out);
        self.expire_idle(now, out);
    }

    fn retry_after(&self) -> Duration {
        let each = match (self.ends.front(), self.ends.back()) {
            (Some(first), Some(last)) if self.ends.len() > 1 => {
                last.saturating_sub(*first) / (self.ends.len() as u32 - 1)
            }
            _ => Duration::from_secs(1),
        };
        (each * u32::try_from(self.waiting.len()).unwrap_or(u32::MAX).max(1))
            .clamp(Duration::from_secs(1), Duration::from_secs(60))
    }

    fn submit(&mut self, id: JobId, want: Want, now: Duration, out: &mut Vec<Effect>) {
        if self.draining {
            let error = ErrorBody::new(ErrorCode::Draining, "this queen is about to stop and takes no new jobs");
            out.push(Effect::Reject { job: id, error });
            return;
        }
        let (model, note) = self.model_of(&want);
        if let Some(text) = note {
            out.push(Effect::Note { job: id.clone(), text });
        }
        let job = Job { want, model, since: now, running: None, avoid: Vec::new(), broken: 0, told: Told::Nothing };
        // Only a job that cannot start at once needs a place in the line.
        let waits = !matches!(self.place(&job, now), Place::Dispatch { .. } | Place::Loaded(_) | Place::Reject(_));
        if waits && let Some(message) = self.line_is_full(&job.want) {
            let error = ErrorBody::new(ErrorCode::QueueFull, message).with_retry_after(self.retry_after());
            out.push(Effect::Reject { job: id, error });
            return;
        }
        self.jobs.insert(id.clone(), job);
        self.waiting.push_back(id);
    }

    /// Why one more may not wait, if so: the line is full, or a key has its share of it, which leaves room for others.
    fn line_is_full(&self, want: &Want) -> Option<String> {
        let (limit, waiting) = (self.config.queue_limit, self.waiting.len());
        if waiting >= limit {
            return Some(format!("{waiting} jobs wait already, and no more may"));
        }
        let share = limit.div_ceil(2);
        let own = |id: &&JobId| self.jobs.get(*id).is_some_and(|job| job.want.owner == want.owner);
        let full = want.owner.is_some() && self.waiting.iter().filter(own).count() >= share;
        full.then(|| format!("{share} jobs of this key wait already, which is one key's share of a line of {limit}"))
    }

    /// The model of a job, and what its owner should know of the choice.
    fn model_of(&self, want: &Want) -> (ModelRef, Option<String>) {
        if let Some(model) = &want.model {
            return (model.clone(), None);
        }
        if let Some(worker) = want.worker_id.as_ref().and_then(|id| self.registry.worker(id)) {
            return (worker.beat.model.clone(), None);
        }
        if let Some(model) = &self.config.default_model {
            return (model.clone(), None);
        }
        let mut models: Vec<&ModelRef> =
            self.registry.workers.iter().filter(|worker| worker.is_up()).map(|worker| &worker.beat.model).collect();
        models.sort_unstable();
        models.dedup();
        match models[..] {
            [only] => (only.clone(), None),
            _ => {
                let text = "no model named: tinybee, which is built in and very small, answers; name another with -m"
                    .to_owned();
                (ModelRef::Tinybee, Some(text))
            }
        }
    }

    /// The waiting jobs in the order of their turns. An owner's own stay in line; of two owners the one who has less running, and
    /// less of this line before, is next; of two who have the same, the one who has waited longer.
    fn turns(&mut self) -> VecDeque<JobId> {
        let waiting = std::mem::take(&mut self.waiting);
        let owner = |id: &JobId| self.jobs.get(id).map(|job| &job.want.owner);
        let first = waiting.front().and_then(owner);
        if waiting.iter().all(|id| owner(id) == first) {
            return waiting;
        }
        let mut has: HashMap<&Option<KeyId>, usize> = HashMap::new();
        for job in self.jobs.values().filter(|job| job.running.is_some()) {
            *has.entry(&job.want.owner).or_default() += 1;
        }
        let mut turns: Vec<(usize, Duration, JobId)> = Vec::with_capacity(waiting.len());
        for id in waiting {
            let Some(job) = self.jobs.get(&id) else { continue };
            let has = has.entry(&job.want.owner).or_default();
            turns.push((*has, job.since, id));
            *has += 1;
        }
        turns.sort_by_key(|&(turn, since, _)| (turn, since));
        turns.into_iter().map(|(_, _, id)| id).collect()
    }

    /// Places what can be placed, in turn, and tells the others how they stand.
    fn pump(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let mut position = 0;
        let mut waiting = self.turns();
        let mut left = VecDeque::with_capacity(waiting.len());
        while let Some(id) = waiting.pop_front() {
            let Some(job) = self.jobs.get(&id) else { continue };
            let told = match self.place(job, now) {
                Place::Dispatch { worker, why } => {
                    self.dispatch(id, &worker, why, now, out);
                    continue;
                }
                Place::Reject(error) => {
                    self.jobs.remove(&id);
                    out.push(Effect::Reject { job: id, error });
                    continue;
                }
                Place::Queue => {
                    position += 1;
                    Told::Queued(position - 1)
                }
                Place::AwaitLoad(progress) => Told::Loading(progress),
                Place::StartLoad => {
                    let load = job.load_key();
                    self.loads.insert(load.clone(), Load::new(now));
                    out.push(Effect::Plan { load });
                    Told::Loading(None)
                }
                Place::Loaded(worker) => {
                    let keep = job.want.keep_alive;
                    self.jobs.remove(&id);
                    if let Some(worker) = self.registry.worker_mut(&worker) {
                        worker.keep = keep.unwrap_or(worker.keep);
                        out.push(Effect::Loaded { job: id, worker: worker.loaded() });
                    }
                    continue;
                }
            };
            if let Some(job) = self.jobs.get_mut(&id) {
                tell(&id, job, told, out);
            }
            left.push_back(id);
        }
        self.waiting = left;
    }

    fn place(&self, job: &Job, now: Duration) -> Place {
        let want = &job.want;
        if let Some(id) = &want.worker_id {
            match self.registry.worker(id) {
                None => {
                    let message = format!("there is no active worker `{id}`; {}", self.inventory());
                    return Place::Reject(ErrorBody::new(ErrorCode::WorkerNotFound, message));
                }
                Some(worker) if worker.beat.model != job.model => {
                    let message = format!("worker {id} serves {}, not {}", worker.beat.model, job.model);
                    return Place::Reject(ErrorBody::new(ErrorCode::NoWorker, message));
                }
                Some(_) => {}
            }
        }
        // Who names a worker waits for it, also where others wait for it to go.
        let open = |worker: &Worker| !worker.closed || want.worker_id.is_some();
        let fits = |worker: &&Worker| {
            worker.serves(&job.model)
                && open(worker)
                && want.device.is_none_or(|device| worker.is_on(device))
                && want.worker_id.as_ref().is_none_or(|id| &worker.beat.worker_id == id)
                && want.hive_id.as_ref().is_none_or(|hive| &worker.beat.hive_id == hive)
        };
        let serving: Vec<&Worker> = self.registry.workers.iter().filter(fits).collect();
        if want.purpose == Purpose::Load {
            if let Some(worker) = serving.iter().find(|worker| worker.is_up()) {
                return Place::Loaded(worker.beat.worker_id.clone());
            }
        }
        let able: Vec<&Worker> = serving.iter().filter(|worker| worker.able(now)).copied().collect();
        let fresh = |worker: &&&Worker| !job.avoid.contains(&worker.beat.incarnation);
        let others: Vec<&Worker> = able.iter().filter(fresh).copied().collect();
        // One that broke under it before is better than none: how often is bounded.
        let able = if others.is_empty() { able } else { others };
        let busy: Vec<&Worker> = serving.iter().filter(|worker| worker.is_full(now)).copied().collect();
        match self.config.policy.choose(&able, &busy, want.work, now) {
            Some(Choice::Now(worker, why)) => {
                return Place::Dispatch { worker: worker.beat.worker_id.clone(), why };
            }
            Some(Choice::Wait) => return Place::Queue,
            None => {}
        }
        let starting = |worker: &&&Worker| worker.beat.state == WorkerState::Starting;
        if serving.iter().any(|worker| worker.beat.state != WorkerState::Starting) {
            return Place::Queue;
        }
        if let Some(worker) = serving.iter().find(starting) {
            return Place::AwaitLoad(worker.beat.load.clone());
        }
        if want.worker_id.is_some() {
            let message = format!("worker {} takes no more jobs", want.worker_id.as_ref().map_or("", |id| id.as_str()));
            return Place::Reject(ErrorBody::new(ErrorCode::NoWorker, message));
        }
        if self.loads.contains_key(&job.load_key()) {
            return Place::AwaitLoad(None);
        }
        if let Some(hint) = want.no_load {
            let message = format!("no worker serves {}; {}", job.model, self.inventory());
            return Place::Reject(
                ErrorBody::new(ErrorCode::NoWorker, message)
                    .with_hint(hint)
                    .with_details(json!({ "models": self.models() })),
            );
        }
        Place::StartLoad
    }

    fn models(&self) -> Vec<String> {
        let mut models: Vec<String> =
            self.registry.workers.iter().map(|worker| worker.beat.model.to_string()).collect();
        models.sort_unstable();
        models.dedup();
        models
    }

    /// What there is instead, as a sentence's end.
    pub(crate) fn inventory(&self) -> String {
        match &self.models()[..] {
            [] => "nothing is loaded".into(),
            models => format!("loaded: {}", models.join(", ")),
        }
    }

    fn dispatch(&mut self, id: JobId, worker: &WorkerId, why: String, now: Duration, out: &mut Vec<Effect>) {
        let keep = self.jobs.get(&id).and_then(|job| job.want.keep_alive);
        let Some(known) = self.registry.worker_mut(worker) else { return };
        known.dispatched += 1;
        known.keep = keep.unwrap_or(known.keep);
        known.look(now);
        out.push(Effect::Dispatch {
            job: id.clone(),
            worker: worker.clone(),
            hive: known.beat.hive_id.clone(),
            url: known.beat.url.clone(),
            bearer: known.beat.bearer.clone(),
            model: known.beat.model.clone(),
            why,
        });
        if let Some(job) = self.jobs.get_mut(&id) {
            job.running = Some(Running { worker: worker.clone(), first_token: false });
        }
    }
}

/// Tells a waiting job how it stands, if that has changed.
pub(crate) fn tell(id: &JobId, job: &mut Job, told: Told, out: &mut Vec<Effect>) {
    if job.told == told {
        return;
    }
    match &told {
        Told::Nothing => {}
        Told::Queued(position) => {
            let moved_up = matches!(job.told, Told::Queued(_)) && *position >= TOLD;
            if !moved_up {
                out.push(Effect::Queued { job: id.clone(), position: *position });
            }
        }
        Told::Loading(progress) => {
            if !matches!(job.told, Told::Loading(_)) {
                out.push(Effect::Loading { job: id.clone(), model: job.model.clone() });
            }
            match progress {
                Some(progress) if job.told != Told::Loading(Some(progress.clone())) => {
                    out.push(Effect::Progress { job: id.clone(), progress: progress.clone() });
                }
                // The worker that loads is not heard of yet: what was told last still holds.
                None if matches!(job.told, Told::Loading(Some(_))) => return,
                _ => {}
            }
        }
    }
    job.told = told;
}
