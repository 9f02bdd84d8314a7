//! Placing those who wait, in turn, and telling the others how they stand.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rbee_wire::worker::{LoadProgress, WorkerState};
use rbee_wire::{ErrorBody, ErrorCode, JobId, WorkerId};
use serde_json::json;

use crate::line::{ClassId, Standing};
use crate::loads::Load;
use crate::policy::Choice;
use crate::registry::Worker;
use crate::scheduler::{Job, Running, Scheduler, Told};
use crate::{Effect, Purpose};

/// Waiting jobs of a class that are told when they move up.
const TOLD: u64 = 16;
/// Jobs of a class that are looked at for a worker which those before them leave free, as they wait for a faster one.
const LOOKED: usize = 16;

/// What can be done for a waiting job. All but a dispatch holds for every job of its class.
pub(crate) enum Place {
    Dispatch {
        worker: WorkerId,
        why: String,
    },
    /// One is free, and a job of as much work does better to wait for another.
    Wait,
    Queue,
    AwaitLoad(Option<LoadProgress>),
    StartLoad,
    Loaded(WorkerId),
    Reject(ErrorBody),
}

impl Scheduler {
    /// Places what can be placed of the classes for which something has changed, in turn, and tells the others how they stand.
    pub(crate) fn pump(&mut self, now: Duration, out: &mut Vec<Effect>) {
        for model in self.registry.workers.touched() {
            self.line.wake(&model);
        }
        let mut turns: BinaryHeap<Reverse<(usize, u64, ClassId)>> = BinaryHeap::new();
        for class in self.line.woken() {
            turns.extend(self.line.head(class).map(|(running, age, _)| Reverse((running, age, class))));
        }
        let mut stay: Vec<(ClassId, Standing)> = Vec::new();
        while let Some(Reverse((running, age, class))) = turns.pop() {
            let Some((runs, oldest, id)) = self.line.head(class) else { continue };
            // A dispatch meanwhile has made its turn a later one; never a sooner one.
            if (runs, oldest) != (running, age) {
                turns.push(Reverse((runs, oldest, class)));
                continue;
            }
            let Some(job) = self.jobs.get(id) else { continue };
            let (id, worker, why) = match self.place(job, now) {
                Place::Dispatch { worker, why } => (id.clone(), worker, why),
                Place::Wait if let Some(placed) = self.behind(class, now) => placed,
                // It leaves a free worker alone because one that is full will be faster; a dispatch does not change that.
                Place::Wait | Place::Queue => {
                    stay.push((class, Standing::Queued));
                    continue;
                }
                Place::AwaitLoad(progress) => {
                    stay.push((class, Standing::Loading(progress)));
                    continue;
                }
                Place::StartLoad => {
                    let load = job.load_key();
                    self.loads.insert(load.clone(), Load::new(now));
                    out.push(Effect::Plan { load });
                    stay.push((class, Standing::Loading(None)));
                    continue;
                }
                Place::Loaded(worker) => {
                    self.all_loaded(class, &worker, out);
                    continue;
                }
                Place::Reject(error) => {
                    for job in self.turns_of(class) {
                        self.forget(&job);
                        out.push(Effect::Reject { job, error: error.clone() });
                    }
                    continue;
                }
            };
            self.dispatch(id, &worker, why, now, out);
            turns.extend(self.line.head(class).map(|(running, age, _)| Reverse((running, age, class))));
        }
        for (class, standing) in stay {
            self.tell_class(class, standing, out);
        }
        // Who left was looked at already, and who got a job can only do less.
        self.line.woken();
        self.registry.workers.touched();
    }

    /// One of those behind a head that waits for a faster worker, for whom the free one is good enough.
    fn behind(&self, class: ClassId, now: Duration) -> Option<(JobId, WorkerId, String)> {
        let turns = self.line.class(class)?.turns(&self.line.owners, LOOKED);
        turns.into_iter().skip(1).find_map(|id| match self.place(self.jobs.get(&id)?, now) {
            Place::Dispatch { worker, why } => Some((id, worker, why)),
            _ => None,
        })
    }

    /// All of a class in the order of their turns.
    pub(crate) fn turns_of(&self, class: ClassId) -> Vec<JobId> {
        self.line.class(class).map(|class| class.turns(&self.line.owners, usize::MAX)).unwrap_or_default()
    }

    /// Ends the jobs that wanted a model loaded.
    fn all_loaded(&mut self, class: ClassId, worker: &WorkerId, out: &mut Vec<Effect>) {
        for id in self.turns_of(class) {
            let keep = self.forget(&id).and_then(|job| job.want.keep_alive);
            let loaded = self.registry.workers.change(worker, |worker| {
                worker.keep = keep.unwrap_or(worker.keep);
                worker.loaded()
            });
            out.extend(loaded.map(|worker| Effect::Loaded { job: id, worker }));
        }
    }

    /// Tells the jobs of a class how they stand: all of them where that has changed, else those who have come and those in front.
    fn tell_class(&mut self, at: ClassId, standing: Standing, out: &mut Vec<Effect>) {
        let Some((class, owners)) = self.line.class_mut(at) else { return };
        let changed = match (&class.standing, &standing) {
            // The worker that loads is not heard of yet: what was told last still holds.
            (Standing::Loading(Some(_)), Standing::Loading(None)) => false,
            (Standing::Queued, Standing::Queued) => false,
            (before, now) => before != now,
        };
        let fresh = class.fresh(owners);
        let queued = standing == Standing::Queued;
        let front = if changed { usize::MAX } else { TOLD as usize };
        let front = if changed || queued { class.turns(owners, front) } else { Vec::new() };
        if changed {
            class.standing = standing.clone();
        }
        let told = |position: usize| match &standing {
            Standing::Loading(progress) => Told::Loading(progress.clone()),
            _ => Told::Queued(position as u64),
        };
        let behind = fresh.into_iter().filter(|(position, _)| *position >= front.len()).collect::<Vec<_>>();
        for (position, id) in front.into_iter().enumerate().chain(behind) {
            if let Some(job) = self.jobs.get_mut(&id) {
                tell(&id, job, told(position), out);
            }
        }
    }

    pub(crate) fn place(&self, job: &Job, now: Duration) -> Place {
        let want = &job.want;
        let workers = &self.registry.workers;
        let named = match &want.worker_id {
            None => None,
            Some(id) => match workers.get(id) {
                None => {
                    let message = format!("there is no active worker `{id}`; {}", self.inventory());
                    return Place::Reject(ErrorBody::new(ErrorCode::WorkerNotFound, message));
                }
                Some(worker) if worker.beat.model != job.model => {
                    let message = format!("worker {id} serves {}, not {}", worker.beat.model, job.model);
                    return Place::Reject(ErrorBody::new(ErrorCode::NoWorker, message));
                }
                named => named,
            },
        };
        // Who names a worker waits for it, also where others wait for it to go.
        let fits = |worker: &&Worker| {
            worker.serves(&job.model)
                && (!worker.closed || named.is_some())
                && want.device.is_none_or(|device| worker.is_on(device))
                && want.hive_id.as_ref().is_none_or(|hive| &worker.beat.hive_id == hive)
        };
        let others = workers.of_model(&job.model).filter(|_| named.is_none());
        let (mut able, mut busy): (Vec<&Worker>, Vec<&Worker>) = (Vec::new(), Vec::new());
        let (mut up, mut starting, mut rest) = (None, None, false);
        for worker in named.into_iter().chain(others).filter(fits) {
            match worker.beat.state {
                WorkerState::Ready | WorkerState::Busy => up = up.or(Some(worker)),
                WorkerState::Starting => starting = starting.or(Some(worker)),
                _ => {}
            }
            rest |= worker.beat.state != WorkerState::Starting;
            if worker.able(now) {
                able.push(worker);
            } else if worker.is_full(now) {
                busy.push(worker);
            }
        }
        if want.purpose == Purpose::Load
            && let Some(worker) = up
        {
            return Place::Loaded(worker.beat.worker_id.clone());
        }
        if !job.avoid.is_empty() {
            let fresh = |worker: &&Worker| !job.avoid.contains(&worker.beat.incarnation);
            let others: Vec<&Worker> = able.iter().copied().filter(fresh).collect();
            // One that broke under it before is better than none: how often is bounded.
            able = if others.is_empty() { able } else { others };
        }
        match self.config.policy.choose(&able, &busy, want.work, now) {
            Some(Choice::Now(worker, why)) => {
                return Place::Dispatch { worker: worker.beat.worker_id.clone(), why };
            }
            Some(Choice::Wait) => return Place::Wait,
            None => {}
        }
        if rest {
            return Place::Queue;
        }
        if let Some(worker) = starting {
            return Place::AwaitLoad(worker.beat.load.clone());
        }
        if let Some(id) = &want.worker_id {
            let message = format!("worker {id} takes no more jobs");
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
        let mut models: Vec<String> = self.registry.workers.models().map(ToString::to_string).collect();
        models.sort_unstable();
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
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let keep = job.want.keep_alive;
        let sent = self.registry.workers.change(worker, |known| {
            known.dispatched += 1;
            known.keep = keep.unwrap_or(known.keep);
            known.look(now);
            Effect::Dispatch {
                job: id.clone(),
                worker: worker.clone(),
                hive: known.beat.hive_id.clone(),
                url: known.beat.url.clone(),
                bearer: known.beat.bearer.clone(),
                model: known.beat.model.clone(),
                why,
            }
        });
        out.extend(sent);
        job.running = Some(Running { worker: worker.clone(), first_token: false });
        self.line.leave(job.class, job.owner, job.age);
        self.line.owners.start(job.owner);
        self.seated.entry(worker.clone()).or_default().insert(job.age, id);
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
