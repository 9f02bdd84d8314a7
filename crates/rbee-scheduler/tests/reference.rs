//! The scheduler against a naive one of the same rules, which at every event looks at every job and every worker anew.
//!
//! What the scheduler's indexes may hide is who is looked at: a worker left out, a class that is not woken, a turn that is not its
//! owner's. So the naive one has none. Silence, timeouts and room are left to the scenarios: here time hardly passes, and every
//! load is said to have ended.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proptest::prelude::*;
use rbee_scheduler::{Config, Effect, Event, LoadKey, Policy, Purpose, Scheduler, Want};
use rbee_wire::worker::{WorkerHeartbeat, WorkerState};
use rbee_wire::{DeviceSpec, ErrorBody, ErrorCode, HiveId, JobId, KeepAlive, KeyId, ModelRef, WorkerId};
use serde_json::json;

/// Jobs that may wait.
const LIMIT: usize = 13;

#[derive(Clone, Debug)]
struct Worker {
    beat: WorkerHeartbeat,
    dispatched: u64,
    refused: bool,
}

impl Worker {
    fn used(&self) -> u64 {
        self.beat.slots.used.max(self.dispatched)
    }

    fn up(&self) -> bool {
        matches!(self.beat.state, WorkerState::Ready | WorkerState::Busy)
    }

    fn suits(&self, load: &LoadKey) -> bool {
        self.beat.model == load.model
            && self.beat.state != WorkerState::Draining
            && (load.device == DeviceSpec::Auto || load.device.to_string() == self.beat.device.as_str())
            && load.hive.as_ref().is_none_or(|hive| *hive == self.beat.hive_id)
    }
}

#[derive(Clone, Debug)]
struct Job {
    id: JobId,
    want: Want,
    running: Option<(WorkerId, bool)>,
    avoid: Vec<(WorkerId, u64)>,
    broken: usize,
    loading: bool,
}

impl Job {
    fn load(&self) -> LoadKey {
        LoadKey {
            model: self.want.model.clone().unwrap(),
            device: self.want.device.unwrap_or_default(),
            hive: self.want.hive_id.clone(),
        }
    }

    fn class(&self) -> String {
        format!("{:?} {:?} {:?} {:?}", self.load(), self.want.worker_id, self.want.purpose, self.want.no_load)
    }
}

enum Place {
    Now(WorkerId),
    Queue,
    Await,
    Start,
    Loaded(WorkerId),
    Reject(ErrorCode),
}

/// What the two are compared by.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    /// In order.
    dispatches: Vec<String>,
    /// In any order.
    rest: Vec<String>,
}

struct Naive {
    policy: Policy,
    /// In order of registration.
    workers: Vec<Worker>,
    /// By age.
    jobs: Vec<Job>,
    /// Whether they have ended.
    loads: BTreeMap<LoadKey, bool>,
    ended: BTreeMap<WorkerId, u64>,
    said: Said,
}

impl Naive {
    fn say(&mut self, what: String) {
        self.said.rest.push(what);
    }

    fn worker(&mut self, id: &WorkerId) -> Option<&mut Worker> {
        self.workers.iter_mut().find(|worker| worker.beat.worker_id == *id)
    }

    fn waiting(&self) -> impl Iterator<Item = &Job> {
        self.jobs.iter().filter(|job| job.running.is_none())
    }

    fn handle(&mut self, event: &Event) -> Said {
        match event {
            Event::WorkerBeat(beat) => self.beat(beat),
            Event::Submit { job, want } => self.submit(job, want),
            Event::FirstToken { job, worker } => {
                if let Some(at) = self.on(job, worker) {
                    self.jobs[at].running = Some((worker.clone(), true));
                }
            }
            Event::Ended { job, worker } => {
                if let Some(at) = self.on(job, worker) {
                    self.jobs.remove(at);
                    self.release(worker);
                }
            }
            Event::Cancel { job } => {
                if let Some(at) = self.jobs.iter().position(|known| known.id == *job)
                    && let Some((worker, _)) = self.jobs.remove(at).running
                {
                    self.release(&worker);
                }
            }
            Event::DispatchFailed { job, worker, error, retry } => {
                if let Some(at) = self.on(job, worker) {
                    self.failed(at, worker, error.code, *retry);
                }
            }
            Event::LoadDone { load, result: Ok(()) } if self.loads.contains_key(load) => {
                if self.workers.iter().any(|worker| worker.up() && worker.suits(load)) {
                    self.loads.remove(load);
                } else {
                    self.loads.insert(load.clone(), true);
                }
            }
            Event::LoadDone { load, result: Err(error) } if self.loads.contains_key(load) => {
                self.loads.retain(|other, _| other.model != load.model);
                for job in std::mem::take(&mut self.jobs) {
                    if job.running.is_none() && job.loading && job.load().model == load.model {
                        self.say(format!("reject {} {}", job.id, error.code));
                    } else {
                        self.jobs.push(job);
                    }
                }
            }
            _ => {}
        }
        let wanted: HashSet<LoadKey> = self.waiting().map(Job::load).collect();
        for load in self.loads.keys().cloned().collect::<Vec<_>>() {
            if !self.loads[&load] && !wanted.contains(&load) {
                self.loads.remove(&load);
                self.say(format!("abandon {load:?}"));
            }
        }
        self.pump();
        self.said.rest.sort();
        std::mem::take(&mut self.said)
    }

    /// The job, if it runs there.
    fn on(&self, id: &JobId, worker: &WorkerId) -> Option<usize> {
        let runs = |job: &Job| job.running.as_ref().is_some_and(|(at, _)| at == worker);
        self.jobs.iter().position(|job| job.id == *id && runs(job))
    }

    fn release(&mut self, worker: &WorkerId) {
        if let Some(worker) = self.worker(worker) {
            worker.dispatched = worker.dispatched.saturating_sub(1);
            worker.beat.slots.used = worker.beat.slots.used.saturating_sub(1).max(worker.dispatched);
        }
    }

    fn beat(&mut self, beat: &WorkerHeartbeat) {
        let (id, life) = (&beat.worker_id, beat.incarnation.counter);
        let fresh = Worker { beat: beat.clone(), dispatched: 0, refused: false };
        if self.ended.get(id).is_some_and(|ended| life <= *ended) {
            self.say("refuse".into());
            return;
        }
        match self.worker(id) {
            None => self.workers.push(fresh),
            Some(known) if known.beat.incarnation.counter != life => {
                let before = known.beat.incarnation.counter;
                *known = fresh;
                self.ended.insert(id.clone(), before);
                self.orphan(id);
            }
            Some(_) if beat.state == WorkerState::Stopped => {
                self.workers.retain(|worker| worker.beat.worker_id != *id);
                self.ended.insert(id.clone(), life);
                self.say(format!("forget {id}"));
                self.orphan(id);
            }
            Some(known) => {
                known.beat = beat.clone();
                known.refused = false;
            }
        }
        let shown = self.workers.iter().find(|worker| worker.beat.worker_id == *id && worker.up()).cloned();
        if let Some(worker) = shown {
            self.loads.retain(|load, ended| !(*ended && worker.suits(load)));
        }
    }

    fn orphan(&mut self, worker: &WorkerId) {
        let on_it: Vec<JobId> = self.jobs.iter().map(|job| job.id.clone()).collect();
        for id in on_it {
            if let Some(at) = self.on(&id, worker) {
                let first = self.jobs[at].running.as_ref().unwrap().1;
                self.broke(at, ErrorCode::WorkerLost, !first);
            }
        }
    }

    fn failed(&mut self, at: usize, worker: &WorkerId, code: ErrorCode, retry: bool) {
        let life = self.worker(worker).map(|known| {
            known.refused = true;
            known.beat.incarnation.counter
        });
        self.release(worker);
        let job = &mut self.jobs[at];
        if code == ErrorCode::Overloaded && retry {
            (job.running, job.loading) = (None, false);
            return;
        }
        job.avoid.extend(life.map(|life| (worker.clone(), life)));
        self.broke(at, code, retry);
    }

    fn broke(&mut self, at: usize, code: ErrorCode, retry: bool) {
        let job = &mut self.jobs[at];
        job.broken += 1;
        let id = job.id.clone();
        if retry && job.broken < 2 && job.want.worker_id.is_none() {
            (job.running, job.loading) = (None, false);
            self.say(format!("halt {id}"));
        } else {
            let code = if retry && job.broken >= 2 { ErrorCode::RequestPoisoned } else { code };
            self.jobs.remove(at);
            self.say(format!("abort {id} {code}"));
        }
    }

    fn submit(&mut self, id: &JobId, want: &Want) {
        let job =
            Job { id: id.clone(), want: want.clone(), running: None, avoid: Vec::new(), broken: 0, loading: false };
        let waits = matches!(self.place(&job), Place::Queue | Place::Await | Place::Start);
        let own = self.waiting().filter(|other| other.want.owner == want.owner).count();
        let full = self.waiting().count() >= LIMIT || want.owner.is_some() && own >= LIMIT.div_ceil(2);
        if waits && full {
            self.say(format!("reject {id} {}", ErrorCode::QueueFull));
        } else {
            self.jobs.push(job);
        }
    }

    fn pump(&mut self) {
        let mut done: HashSet<String> = HashSet::new();
        loop {
            let runs = |job: &Job| {
                let of = |other: &&Job| other.want.owner == job.want.owner && other.running.is_some();
                self.jobs.iter().filter(of).count()
            };
            let next = self.waiting().filter(|job| !done.contains(&job.class()));
            // The older of two that have the same: the first of the least.
            let Some(job) = next.min_by_key(|job| runs(job)).cloned() else { return };
            let class: Vec<JobId> =
                self.waiting().filter(|other| other.class() == job.class()).map(|other| other.id.clone()).collect();
            let mut loading = false;
            match self.place(&job) {
                Place::Now(worker) => {
                    let at = self.jobs.iter().position(|other| other.id == job.id).unwrap();
                    self.jobs[at].running = Some((worker.clone(), false));
                    self.worker(&worker).unwrap().dispatched += 1;
                    self.said.dispatches.push(format!("{} {worker}", job.id));
                    continue;
                }
                Place::Queue => {}
                Place::Await => loading = true,
                Place::Start => {
                    self.loads.insert(job.load(), false);
                    self.say(format!("plan {:?}", job.load()));
                    loading = true;
                }
                Place::Loaded(worker) => {
                    self.jobs.retain(|job| !class.contains(&job.id));
                    class.iter().for_each(|id| self.say(format!("loaded {id} {worker}")));
                }
                Place::Reject(code) => {
                    self.jobs.retain(|job| !class.contains(&job.id));
                    class.iter().for_each(|id| self.say(format!("reject {id} {code}")));
                }
            }
            self.jobs.iter_mut().filter(|job| class.contains(&job.id)).for_each(|job| job.loading = loading);
            done.insert(job.class());
        }
    }

    fn place(&self, job: &Job) -> Place {
        let load = job.load();
        if let Some(id) = &job.want.worker_id {
            match self.workers.iter().find(|worker| worker.beat.worker_id == *id) {
                None => return Place::Reject(ErrorCode::WorkerNotFound),
                Some(worker) if worker.beat.model != load.model => return Place::Reject(ErrorCode::NoWorker),
                Some(_) => {}
            }
        }
        let named = |worker: &&Worker| job.want.worker_id.as_ref().is_none_or(|id| *id == worker.beat.worker_id);
        let serving: Vec<&Worker> = self.workers.iter().filter(|worker| worker.suits(&load)).filter(named).collect();
        if job.want.purpose == Purpose::Load
            && let Some(worker) = serving.iter().find(|worker| worker.up())
        {
            return Place::Loaded(worker.beat.worker_id.clone());
        }
        let able = |worker: &&&Worker| worker.up() && !worker.refused && worker.used() < worker.beat.slots.total;
        let avoided =
            |worker: &Worker| job.avoid.contains(&(worker.beat.worker_id.clone(), worker.beat.incarnation.counter));
        let load_of = |worker: &Worker| match self.policy {
            Policy::LeastLoaded => (worker.used() + worker.beat.queue) as f64 / worker.beat.slots.total as f64,
            _ => 0.0,
        };
        let able: Vec<&&Worker> = serving.iter().filter(able).collect();
        let best = able.iter().min_by(|a, b| avoided(a).cmp(&avoided(b)).then(load_of(a).total_cmp(&load_of(b))));
        if let Some(worker) = best {
            return Place::Now(worker.beat.worker_id.clone());
        }
        if serving.iter().any(|worker| worker.beat.state != WorkerState::Starting) {
            Place::Queue
        } else if !serving.is_empty() {
            Place::Await
        } else if job.want.worker_id.is_some() {
            Place::Reject(ErrorCode::NoWorker)
        } else if self.loads.contains_key(&load) {
            Place::Await
        } else if job.want.no_load.is_some() {
            Place::Reject(ErrorCode::NoWorker)
        } else {
            Place::Start
        }
    }
}

fn said(effects: &[Effect]) -> Said {
    let mut said = Said::default();
    for effect in effects {
        said.rest.push(match effect {
            Effect::Dispatch { job, worker, .. } => {
                said.dispatches.push(format!("{job} {worker}"));
                continue;
            }
            Effect::Halt { job } => format!("halt {job}"),
            Effect::Reject { job, error } => format!("reject {job} {}", error.code),
            Effect::Abort { job, error } => format!("abort {job} {}", error.code),
            Effect::Plan { load } => format!("plan {load:?}"),
            Effect::Abandon { load } => format!("abandon {load:?}"),
            Effect::Loaded { job, worker } => format!("loaded {job} {}", worker.worker_id),
            Effect::Forget { worker } => format!("forget {worker}"),
            Effect::RefuseBeat => "refuse".into(),
            _ => continue,
        });
    }
    said.rest.sort();
    said
}

fn pick<T: Clone>(all: &[T], at: usize) -> T {
    all[at % all.len()].clone()
}

fn model(at: usize) -> ModelRef {
    ModelRef::Path(format!("/m{}", at % 3))
}

/// A heartbeat of one of six workers; some of them change their model with their life.
fn beat(who: usize, life: u64, seq: u64, state: &str, used: usize) -> WorkerHeartbeat {
    let serves = if who.is_multiple_of(3) { model(who + life as usize) } else { model(who) };
    serde_json::from_value(json!({
        "protocol": 1, "worker_id": format!("w{who}"), "incarnation": {"counter": life, "random": format!("w{who}")},
        "seq": seq, "hive_id": format!("h{}", who % 2), "url": "http://w", "bearer": "b", "state": state,
        "model": serves.to_string(), "device": pick(&["cpu", "cuda:0"], who / 2), "keep_alive": "-1",
        "slots": {"total": 1 + who % 3, "used": used % 3}, "version": "0", "build": "0"
    }))
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_event_has_the_effects_that_a_look_at_everything_has(
        policy in prop::sample::select(vec![Policy::FirstAvailable, Policy::LeastLoaded]),
        steps in prop::collection::vec((0usize..20, 0usize..60, 0usize..60, 0usize..60), 1..150),
    ) {
        let config = Config {
            queue_limit: LIMIT,
            queue_timeout: Duration::from_secs(60),
            default_model: None,
            policy,
            keep_alive: KeepAlive::Forever,
            residency: Duration::from_secs(5),
        };
        let mut scheduler = Scheduler::new(config);
        let mut naive = Naive {
            policy,
            workers: Vec::new(),
            jobs: Vec::new(),
            loads: BTreeMap::new(),
            ended: BTreeMap::new(),
            said: Said::default(),
        };
        let (mut lives, mut now) = ([1u64; 6], Duration::ZERO);
        for (seq, (what, a, b, c)) in steps.into_iter().enumerate() {
            now += Duration::from_millis(a as u64 % 4);
            let running: Vec<(JobId, WorkerId)> = naive
                .jobs
                .iter()
                .filter_map(|job| Some((job.id.clone(), job.running.as_ref()?.0.clone())))
                .collect();
            let (who, name) = (a % 6, JobId::new(format!("j{seq}")).unwrap());
            let event = match what {
                0..=2 => {
                    let state = pick(&["ready", "ready", "busy", "starting", "draining", "ready"], b);
                    Event::WorkerBeat(Box::new(beat(who, lives[who], seq as u64 + 1, state, c)))
                }
                3 if b % 3 == 0 => {
                    lives[who] += 1;
                    Event::WorkerBeat(Box::new(beat(who, lives[who], seq as u64 + 1, "ready", 0)))
                }
                3 if b % 3 == 1 && naive.workers.iter().any(|worker| worker.beat.worker_id.as_str() == format!("w{who}")) => {
                    let beat = beat(who, lives[who], seq as u64 + 1, "stopped", 0);
                    lives[who] += 1;
                    Event::WorkerBeat(Box::new(beat))
                }
                4..=10 => Event::Submit {
                    job: name,
                    want: Want {
                        owner: (b % 4 > 0).then(|| KeyId::new(format!("k{}", b % 4)).unwrap()),
                        model: Some(model(a)),
                        device: pick(&[None, None, None, Some(DeviceSpec::Auto), Some(DeviceSpec::Cpu), Some(DeviceSpec::Cuda(0))], c),
                        hive_id: (c % 7 == 0).then(|| HiveId::new(format!("h{}", b % 2)).unwrap()),
                        worker_id: (c % 11 == 0).then(|| WorkerId::new(format!("w{}", b % 6)).unwrap()),
                        purpose: if b % 13 == 0 { Purpose::Load } else { Purpose::Run },
                        no_load: (b % 17 == 0).then_some("load it"),
                        ..Want::default()
                    },
                },
                11..=14 if !running.is_empty() => {
                    let (job, worker) = pick(&running, b);
                    Event::Ended { job, worker }
                }
                15 if !running.is_empty() => {
                    let (job, worker) = pick(&running, b);
                    Event::FirstToken { job, worker }
                }
                16 if !naive.jobs.is_empty() => Event::Cancel { job: pick(&naive.jobs, b).id },
                17 if !running.is_empty() => {
                    let (job, worker) = pick(&running, b);
                    let code = pick(&[ErrorCode::WorkerLost, ErrorCode::Overloaded], c);
                    Event::DispatchFailed { job, worker, error: ErrorBody::new(code, "said so"), retry: a % 4 > 0 }
                }
                18 if !naive.loads.is_empty() => {
                    let load = pick(&naive.loads.keys().cloned().collect::<Vec<_>>(), b);
                    let failed = ErrorBody::new(ErrorCode::ModelCorrupt, "said so");
                    Event::LoadDone { load, result: if c % 2 == 0 { Ok(()) } else { Err(failed) } }
                }
                _ => Event::Tick,
            };
            let want = naive.handle(&event);
            let shown = format!("{event:?}");
            let got = said(&scheduler.handle(now, event));
            prop_assert_eq!(got, want, "at {}", shown);
            prop_assert_eq!(scheduler.queued(), naive.waiting().count());
            prop_assert_eq!(scheduler.running(), naive.jobs.len() - naive.waiting().count());
        }
    }
}
