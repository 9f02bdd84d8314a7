//! The scheduler: jobs from their submission to their end, over whoever beats.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use rbee_wire::view::{HiveView, WorkerView};
use rbee_wire::worker::{LoadProgress, WorkerState};
use rbee_wire::{ErrorBody, ErrorCode, Incarnation, JobId, ModelRef, WorkerId};

use crate::learned::Learned;
use crate::line::{Age, ClassId, Entry, Kind, Line, OwnerAt, Standing};
use crate::loads::Load;
use crate::pump::Place;
use crate::registry::{Back, Beat, DEAD, Gone, Registry, Worker};
use crate::{Config, Effect, Event, LoadKey, Want};

/// A tick that comes later than this after the last one shows that the queen itself stood still.
const LATE: Duration = Duration::from_millis(600);
/// Workers that may break under one request.
const MAX_BROKEN: usize = 2;
/// Beats that a worker which breaks has missed by then: it was frozen before.
const MISSED: Duration = Duration::from_millis(1100);
/// Ends of jobs that the service rate is measured over.
const ENDS: usize = 32;

/// A job that has not ended.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) want: Want,
    pub(crate) model: ModelRef,
    since: Duration,
    pub(crate) age: Age,
    pub(crate) owner: OwnerAt,
    /// Where it waits, or waited last.
    pub(crate) class: ClassId,
    pub(crate) running: Option<Running>,
    /// Lives of workers that broke under it.
    pub(crate) avoid: Vec<Incarnation>,
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

    fn kind(&self) -> Kind {
        let want = &self.want;
        Kind { load: self.load_key(), worker: want.worker_id.clone(), purpose: want.purpose, no_load: want.no_load }
    }
}

#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) worker: WorkerId,
    pub(crate) first_token: bool,
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
    pub(crate) line: Line,
    /// Who runs where, by age.
    pub(crate) seated: HashMap<WorkerId, BTreeMap<Age, JobId>>,
    /// The jobs that have a deadline, by when.
    deadlines: BTreeSet<(Duration, Age, JobId)>,
    pub(crate) loads: BTreeMap<LoadKey, Load>,
    pub(crate) learned: Learned,
    came: Age,
    ends: VecDeque<Duration>,
    ticked: Option<Duration>,
    draining: bool,
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
            line: Line::default(),
            seated: HashMap::new(),
            deadlines: BTreeSet::new(),
            loads: BTreeMap::new(),
            learned: Learned::default(),
            came: 0,
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
                    self.forget(&job);
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
                if let Some(running) = self.forget(&job).and_then(|job| job.running) {
                    self.release(&running.worker, now);
                }
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
        self.line.len()
    }

    /// Jobs that run.
    pub fn running(&self) -> usize {
        self.jobs.len() - self.line.len()
    }

    fn running_on(&mut self, job: &JobId, worker: &WorkerId) -> Option<&mut Running> {
        self.jobs.get_mut(job)?.running.as_mut().filter(|running| &running.worker == worker)
    }

    fn release(&mut self, worker: &WorkerId, now: Duration) {
        self.registry.workers.change(worker, |worker| {
            worker.dispatched = worker.dispatched.saturating_sub(1);
            // The heartbeat counted it too; the next one will say how many there really are.
            worker.beat.slots.used = worker.beat.slots.used.saturating_sub(1).max(worker.dispatched);
            worker.look(now);
        });
    }

    /// Takes a job out of every index, whether it waits or runs: it has ended.
    pub(crate) fn forget(&mut self, id: &JobId) -> Option<Job> {
        let job = self.jobs.remove(id)?;
        match &job.running {
            Some(running) => self.stand_up(&running.worker, job.owner, job.age),
            None => self.line.leave(job.class, job.owner, job.age),
        }
        self.line.owners.leave(job.owner);
        if let Some(deadline) = job.want.deadline {
            self.deadlines.remove(&(deadline, job.age, id.clone()));
        }
        Some(job)
    }

    /// A job runs no longer.
    fn stand_up(&mut self, worker: &WorkerId, owner: OwnerAt, age: Age) {
        self.line.owners.stop(owner);
        if let Some(seated) = self.seated.get_mut(worker) {
            seated.remove(&age);
            if seated.is_empty() {
                self.seated.remove(worker);
            }
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
        if worker.is_up() {
            self.shown(&id);
        } else if let (WorkerState::Starting, Some(progress)) = (worker.beat.state, worker.beat.load.clone()) {
            let model = worker.beat.model.clone();
            self.load_moved(&model, &progress, out);
        }
    }

    fn worker_gone(&mut self, worker: &WorkerId, gone: Gone, back: Back, out: &mut Vec<Effect>) {
        let Some(known) = self.registry.worker(worker) else { return };
        self.learned.note(known);
        self.registry.remove(worker, back);
        out.push(Effect::Forget { worker: worker.clone() });
        self.orphan(worker, gone, out);
    }

    /// The jobs of a worker that is gone: elsewhere if nothing of them is out, else over.
    fn orphan(&mut self, worker: &WorkerId, gone: Gone, out: &mut Vec<Effect>) {
        let orphans: Vec<JobId> = self.seated.get(worker).into_iter().flat_map(|jobs| jobs.values().cloned()).collect();
        for id in orphans {
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
        self.registry.workers.change(worker, |known| known.refused = true);
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
        self.forget(&id);
        out.push(Effect::Abort { job: id, error });
    }

    /// Back into the line, before all of its owner that came later: it waited its turn already.
    fn requeue(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(running) = job.running.take() else { return };
        job.told = Told::Nothing;
        job.class = self.line.enter(job.kind(), job.owner, Entry { age: job.age, since: job.since, id });
        let (owner, age) = (job.owner, job.age);
        self.stand_up(&running.worker, owner, age);
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
        for id in self.overdue(now) {
            let Some(job) = self.forget(&id) else { continue };
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
        self.line.wake_all();
    }

    /// Whose deadline has passed, and who has waited too long for a busy worker; the oldest first.
    fn overdue(&self, now: Duration) -> Vec<JobId> {
        let late = self.deadlines.iter().take_while(|(deadline, ..)| now >= *deadline);
        let mut over: BTreeMap<Age, JobId> = late.map(|(_, age, id)| (*age, id.clone())).collect();
        let tired = |entry: &&Entry| now >= entry.since + self.config.queue_timeout;
        for (_, class) in self.line.classes().filter(|(_, class)| class.standing == Standing::Queued) {
            for line in class.lines() {
                // Not those who came back to the line a moment ago.
                let waited = |entry: &&Entry| self.jobs.get(&entry.id).is_some_and(|job| job.told != Told::Nothing);
                let tired = line.iter().take_while(tired).filter(waited);
                over.extend(tired.map(|entry| (entry.age, entry.id.clone())));
            }
        }
        over.into_values().collect()
    }

    fn retry_after(&self) -> Duration {
        let each = match (self.ends.front(), self.ends.back()) {
            (Some(first), Some(last)) if self.ends.len() > 1 => {
                last.saturating_sub(*first) / (self.ends.len() as u32 - 1)
            }
            _ => Duration::from_secs(1),
        };
        (each * u32::try_from(self.line.len()).unwrap_or(u32::MAX).max(1))
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
        let full = self.line_is_full(&want);
        self.came += 1;
        let owner = self.line.owners.enter(&want.owner);
        let job = Job {
            want,
            model,
            since: now,
            age: self.came,
            owner,
            class: 0,
            running: None,
            avoid: Vec::new(),
            broken: 0,
            told: Told::Nothing,
        };
        // Only a job that cannot start at once needs a place in the line.
        if let Some(message) = full
            && !matches!(self.place(&job, now), Place::Dispatch { .. } | Place::Loaded(_) | Place::Reject(_))
        {
            let error = ErrorBody::new(ErrorCode::QueueFull, message).with_retry_after(self.retry_after());
            self.line.owners.leave(owner);
            out.push(Effect::Reject { job: id, error });
            return;
        }
        let entry = Entry { age: job.age, since: now, id: id.clone() };
        let class = self.line.enter(job.kind(), owner, entry);
        self.deadlines.extend(job.want.deadline.map(|deadline| (deadline, job.age, id.clone())));
        self.jobs.insert(id, Job { class, ..job });
    }

    /// Why one more may not wait, if so: the line is full, or a key has its share of it, which leaves room for others.
    fn line_is_full(&self, want: &Want) -> Option<String> {
        let (limit, waiting) = (self.config.queue_limit, self.line.len());
        if waiting >= limit {
            return Some(format!("{waiting} jobs wait already, and no more may"));
        }
        let share = limit.div_ceil(2);
        let full = want.owner.is_some() && self.line.owners.waiting(&want.owner) >= share;
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
        let workers = &self.registry.workers;
        let up = |model: &&ModelRef| workers.of_model(model).any(Worker::is_up);
        let models: Vec<&ModelRef> = workers.models().filter(up).take(2).collect();
        match models[..] {
            [only] => (only.clone(), None),
            _ => {
                let text = "no model named: tinybee, which is built in and very small, answers; name another with -m"
                    .to_owned();
                (ModelRef::Tinybee, Some(text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_of_a_job_that_has_ended() {
        let mut scheduler = Scheduler::new(Config {
            queue_limit: 10,
            queue_timeout: Duration::from_secs(60),
            default_model: None,
            policy: crate::Policy::FirstAvailable,
            keep_alive: rbee_wire::KeepAlive::Forever,
            residency: Duration::ZERO,
        });
        let job = JobId::new("a").unwrap();
        let deadline = Some(Duration::from_secs(9));
        let want = Want { model: Some(ModelRef::Tinybee), deadline, ..Want::default() };
        scheduler.handle(Duration::ZERO, Event::Submit { job: job.clone(), want });
        assert_eq!((scheduler.queued(), scheduler.deadlines.len(), scheduler.loads.len()), (1, 1, 1));
        scheduler.handle(Duration::ZERO, Event::Cancel { job });
        assert_eq!((scheduler.queued(), scheduler.deadlines.len(), scheduler.loads.len()), (0, 0, 0));
        assert!(scheduler.jobs.is_empty() && scheduler.seated.is_empty());
    }
}
