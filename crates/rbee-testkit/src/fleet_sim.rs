//! A fleet in virtual time over the real scheduler: machines, loads, workers and traffic from one seed, and no process at all.
//!
//! What a queen's loop would carry out is carried out here by numbers: a hive answers a plan with the rooms that it has, a load
//! takes its bytes over the disk's rate, a worker's rate is shared among the jobs that run on it. Beside the times it checks at every
//! step what must hold whatever comes: [`Broken`] says what did not. Start reading at [`run`].

mod machines;
pub mod traffic;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::time::Duration;

use rbee_scheduler::{Config, Effect, Event, LoadKey, Policy, Scheduler, Want};
use rbee_wire::worker::LoadProgress;
use rbee_wire::{ErrorBody, ErrorCode, JobId, KeepAlive, ModelRef, WorkerId};

use machines::{Fleet, Process};
pub use machines::{Machine, Model};
use traffic::{Arrival, Random};

/// Time between two heartbeats of a worker; a hive's come at every second one of these.
const BEAT: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(100);
/// What a call to a hive takes.
const CALL: Duration = Duration::from_millis(20);
/// What the end of a worker takes.
const EXIT: Duration = Duration::from_millis(200);
/// Longest that anything may still wait after the last job has come.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The machines, a hive with one device each.
    pub machines: Vec<Machine>,
    /// The models that there are.
    pub models: Vec<Model>,
    /// Workers that serve from the start and stay: model and machine.
    pub pinned: Vec<(usize, usize)>,
    /// The scheduler's own.
    pub config: Config,
    /// Faults.
    pub faults: Faults,
}

/// What goes wrong, from a seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Where chance begins.
    pub seed: u64,
    /// Workers that end in the middle of whatever they do, in a second.
    pub crashes: f64,
    /// The share of loads that fail.
    pub bad_loads: f64,
    /// The share of jobs that are cancelled within the first seconds.
    pub cancels: f64,
}

impl Setup {
    /// Four machines of different speeds whose memory does not hold all six models.
    pub fn mixed(policy: Policy) -> Self {
        let gib = |n: u64| n << 30;
        let machine = |name: &str, device: &str, memory, decode, prefill, disk| Machine {
            name: name.into(),
            device: device.into(),
            memory,
            decode,
            prefill,
            disk,
        };
        let model =
            |name: &str, bytes, weight| Model { model: ModelRef::Path(format!("/models/{name}")), bytes, weight };
        Self {
            machines: vec![
                machine("slow", "cpu", gib(24), 15.0, 150.0, 5e8),
                machine("old", "cuda:0", gib(12), 40.0, 1500.0, 1e9),
                machine("good", "cuda:0", gib(16), 80.0, 4000.0, 2e9),
                machine("best", "cuda:0", gib(24), 150.0, 9000.0, 2e9),
            ],
            models: vec![
                model("chat", gib(4), 10.0),
                model("code", gib(8), 4.0),
                model("long", gib(14), 2.0),
                model("big", gib(18), 1.0),
                model("tiny", gib(2), 3.0),
                model("rare", gib(9), 0.3),
            ],
            // The model most are after is everywhere, so that a policy has a choice.
            pinned: vec![(0, 0), (0, 1), (0, 2), (0, 3)],
            config: Config {
                queue_limit: 200,
                queue_timeout: Duration::from_secs(120),
                default_model: None,
                policy,
                keep_alive: KeepAlive::For(Duration::from_secs(300)),
                residency: Duration::from_secs(5),
            },
            faults: Faults::default(),
        }
    }
}

/// A short run with crashes, loads that fail and jobs that are cancelled, all from one seed: what must hold is checked, the times
/// say nothing.
///
/// # Errors
/// As [`run`].
pub fn trial(seed: u64) -> Result<Outcome, Broken> {
    let mut random = Random::new(seed);
    let policy = Policy::ALL[random.number() as usize % Policy::ALL.len()].1;
    let mut setup = Setup::mixed(policy);
    if random.chance(0.3) {
        setup.pinned.clear();
    }
    // From a fleet with some room to one that turns a model over all the time.
    setup.machines.truncate(2 + random.number() as usize % 3);
    setup.pinned.retain(|(_, machine)| *machine < setup.machines.len());
    setup.config.queue_limit = 10 + random.number() as usize % 100;
    setup.config.keep_alive = KeepAlive::For(Duration::from_secs(random.number() % 60));
    setup.faults = Faults { seed, crashes: random.unit() * 0.1, bad_loads: random.unit() * 0.2, cancels: 0.1 };
    let rate = 0.2 + random.unit() * 3.0;
    run(&setup, &traffic::poisson(seed, 150, rate, &setup.models))
}

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// When.
    pub at: Duration,
    /// What.
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {:.3} s: {}", self.at.as_secs_f64(), self.what)
    }
}

impl std::error::Error for Broken {}

/// How it went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Jobs that were answered.
    pub done: usize,
    /// Jobs that were refused or broken off, by why.
    pub refused: BTreeMap<String, usize>,
    /// Jobs that their owners cancelled.
    pub cancelled: usize,
    /// Seconds to the first token of each that was answered.
    pub first: Vec<f64>,
    /// Seconds to its last.
    pub total: Vec<f64>,
    /// Loads that hives began.
    pub loads: usize,
    /// Models that left for others.
    pub evictions: usize,
    /// Loads that a hive refused, as the memory was taken meanwhile.
    pub crowded: usize,
    /// When the last job ended.
    pub ended: Duration,
}

/// What is to happen.
#[derive(Clone, Debug)]
enum Next {
    Arrive(usize),
    Cancel(JobId),
    Tick,
    WorkerBeat(WorkerId),
    HiveBeat(usize),
    Planned(LoadKey),
    LoadEnded(LoadKey, WorkerId),
    /// Something of what runs here may be done, if nothing has changed since.
    Look(WorkerId, u64),
    Exited(WorkerId),
    Crash,
    Tell(Box<Event>),
}

/// A job that has come.
struct Job {
    arrival: usize,
    on: Option<WorkerId>,
    first: Option<Duration>,
}

struct Sim<'a> {
    setup: &'a Setup,
    arrivals: &'a [Arrival],
    scheduler: Scheduler,
    fleet: Fleet,
    random: Random,
    now: Duration,
    calendar: BinaryHeap<Reverse<(Duration, u64)>>,
    /// What happens, by its number in the calendar.
    happenings: BTreeMap<u64, Next>,
    number: u64,
    jobs: BTreeMap<JobId, Job>,
    /// Bytes free on each machine, when a load was planned last.
    planned: BTreeMap<LoadKey, Vec<(usize, u64)>>,
    /// Loads that hives were asked for and have not ended.
    asked: BTreeSet<LoadKey>,
    ended: usize,
    outcome: Outcome,
}

/// Runs all of the traffic to its end.
///
/// # Errors
/// An invariant that does not hold: the scheduler has a bug, or the simulation.
pub fn run(setup: &Setup, arrivals: &[Arrival]) -> Result<Outcome, Broken> {
    let mut sim = Sim {
        setup,
        arrivals,
        scheduler: Scheduler::new(setup.config.clone()),
        fleet: Fleet::new(&setup.machines),
        random: Random::new(setup.faults.seed),
        now: Duration::ZERO,
        calendar: BinaryHeap::new(),
        happenings: BTreeMap::new(),
        number: 0,
        jobs: BTreeMap::new(),
        planned: BTreeMap::new(),
        asked: BTreeSet::new(),
        ended: 0,
        outcome: Outcome::default(),
    };
    for &(model, machine) in &setup.pinned {
        let model = &setup.models[model];
        let id = sim.fleet.start(machine, model, KeepAlive::Forever, sim.now).map_err(|what| sim.broken(what))?;
        sim.fleet.ready(&id, sim.now);
        sim.beat(&id)?;
        sim.at(BEAT, Next::WorkerBeat(id));
    }
    for machine in 0..setup.machines.len() {
        sim.at(BEAT * 2, Next::HiveBeat(machine));
    }
    for (index, arrival) in arrivals.iter().enumerate() {
        sim.at(arrival.at, Next::Arrive(index));
    }
    sim.at(TICK, Next::Tick);
    sim.plan_crash();
    let last = arrivals.iter().map(|arrival| arrival.at).max().unwrap_or_default();
    while sim.ended < arrivals.len() {
        let Some(Reverse((at, number))) = sim.calendar.pop() else { return Err(sim.broken("nothing is to come")) };
        sim.now = at;
        if at > last + PATIENCE {
            let left: Vec<&JobId> = sim.jobs.keys().take(5).collect();
            return Err(sim.broken(format!("{} jobs wait for ever, among them {left:?}", sim.jobs.len())));
        }
        if let Some(next) = sim.happenings.remove(&number) {
            sim.happen(next)?;
        }
        if sim.scheduler.queued() + sim.scheduler.running() != sim.jobs.len() {
            return Err(sim.broken("the scheduler counts other jobs than there are"));
        }
    }
    sim.outcome.ended = sim.now;
    Ok(sim.outcome)
}

impl Sim<'_> {
    fn broken(&self, what: impl Into<String>) -> Broken {
        Broken { at: self.now, what: what.into() }
    }

    fn at(&mut self, when: Duration, next: Next) {
        self.number += 1;
        self.happenings.insert(self.number, next);
        self.calendar.push(Reverse((when, self.number)));
    }

    fn after(&mut self, span: Duration, next: Next) {
        self.at(self.now + span, next);
    }

    fn plan_crash(&mut self) {
        if self.setup.faults.crashes > 0.0 {
            let span = self.random.wait(self.setup.faults.crashes);
            self.after(span, Next::Crash);
        }
    }

    fn happen(&mut self, next: Next) -> Result<(), Broken> {
        match next {
            Next::Arrive(index) => self.arrive(index),
            Next::Cancel(id) => {
                let Some(job) = self.jobs.remove(&id) else { return Ok(()) };
                self.ended += 1;
                self.outcome.cancelled += 1;
                if let Some(worker) = &job.on {
                    self.stop(worker, &id);
                }
                self.tell(Event::Cancel { job: id })
            }
            Next::Tick => {
                self.after(TICK, Next::Tick);
                self.tell(Event::Tick)
            }
            Next::WorkerBeat(id) => {
                if self.fleet.process(&id).is_some() {
                    self.after(BEAT, Next::WorkerBeat(id.clone()));
                    self.beat(&id)?;
                }
                Ok(())
            }
            Next::HiveBeat(machine) => {
                self.after(BEAT * 2, Next::HiveBeat(machine));
                let beat = self.fleet.hive_beat(machine);
                self.tell(Event::HiveBeat(Box::new(beat)))
            }
            Next::Planned(load) => {
                let free = (0..self.setup.machines.len()).map(|machine| (machine, self.fleet.free(machine)));
                self.planned.insert(load.clone(), free.collect());
                let result = match self.setup.models.iter().find(|model| model.model == load.model) {
                    Some(model) => Ok(self.fleet.plans(model, &load)),
                    None => Err(ErrorBody::new(ErrorCode::ModelNotFound, format!("there is no {}", load.model))),
                };
                self.tell(Event::Planned { load, result })
            }
            Next::LoadEnded(load, id) => self.load_ended(load, &id),
            Next::Look(id, change) => self.look(&id, change),
            Next::Exited(id) => {
                if let Some(process) = self.fleet.end(&id) {
                    let beat = process.last_beat();
                    self.tell(Event::WorkerBeat(Box::new(beat)))?;
                }
                self.unloaded(id)
            }
            Next::Crash => {
                self.plan_crash();
                self.crash()
            }
            Next::Tell(event) => {
                if let Event::LoadDone { load, .. } = &*event {
                    self.asked.remove(load);
                }
                self.tell(*event)
            }
        }
    }

    fn unloaded(&mut self, worker: WorkerId) -> Result<(), Broken> {
        self.tell(Event::Unloaded { worker, result: Ok(()) })
    }

    fn arrive(&mut self, index: usize) -> Result<(), Broken> {
        let arrival = &self.arrivals[index];
        let id = JobId::new(format!("job{index}")).map_err(|error| self.broken(error.to_string()))?;
        self.jobs.insert(id.clone(), Job { arrival: index, on: None, first: None });
        let want = Want {
            owner: arrival.owner.clone(),
            model: Some(arrival.model.clone()),
            work: rbee_scheduler::Work { prompt: arrival.prompt, answer: arrival.answer },
            ..Want::default()
        };
        if self.random.chance(self.setup.faults.cancels) {
            let span = self.random.wait(0.3);
            self.after(span, Next::Cancel(id.clone()));
        }
        self.tell(Event::Submit { job: id, want })
    }

    fn beat(&mut self, id: &WorkerId) -> Result<(), Broken> {
        match self.fleet.beat(id, self.now) {
            Some(beat) => self.tell(Event::WorkerBeat(Box::new(beat))),
            None => Ok(()),
        }
    }

    fn load_ended(&mut self, load: LoadKey, id: &WorkerId) -> Result<(), Broken> {
        self.asked.remove(&load);
        let gone =
            |id: &WorkerId| Err(ErrorBody::new(ErrorCode::ModelLoadFailed, format!("{id} ended while it loaded")));
        if self.fleet.process(id).is_none() {
            return self.tell(Event::LoadDone { load, result: gone(id) });
        }
        if self.random.chance(self.setup.faults.bad_loads) {
            self.fleet.end(id);
            return self.tell(Event::LoadDone { load, result: gone(id) });
        }
        self.fleet.ready(id, self.now);
        // Either may come first.
        if self.random.chance(0.5) {
            self.beat(id)?;
            self.tell(Event::LoadDone { load, result: Ok(()) })
        } else {
            self.tell(Event::LoadDone { load, result: Ok(()) })?;
            self.beat(id)
        }
    }

    /// One of those that are there ends.
    fn crash(&mut self) -> Result<(), Broken> {
        let Some(id) = self.fleet.any(&mut self.random) else { return Ok(()) };
        let Some(process) = self.fleet.end(&id) else { return Ok(()) };
        let machine = process.machine;
        self.lose(process)?;
        // The hive says so at once, after the relay has seen its connections break.
        let beat = self.fleet.hive_beat(machine);
        self.tell(Event::HiveBeat(Box::new(beat)))
    }

    /// The jobs of a worker that has ended: their relays see it.
    fn lose(&mut self, process: Process) -> Result<(), Broken> {
        for id in process.jobs() {
            let Some(job) = self.jobs.get(&id).filter(|job| job.on.as_ref() == Some(&process.id)) else { continue };
            let retry = job.first.is_none();
            let error = ErrorBody::new(ErrorCode::WorkerLost, "the connection broke");
            let (job, worker) = (id, process.id.clone());
            self.tell(Event::DispatchFailed { job, worker, error, retry })?;
        }
        Ok(())
    }

    /// What runs on a worker may have come to its first token or its end.
    fn look(&mut self, id: &WorkerId, change: u64) -> Result<(), Broken> {
        let now = self.now;
        let Some(process) = self.fleet.process_mut(id).filter(|process| process.changes() == change) else {
            return Ok(());
        };
        process.advance(now);
        let (first, done) = process.due();
        self.look_again(id);
        for job in first {
            if let Some(known) = self.jobs.get_mut(&job) {
                known.first = known.first.or(Some(now));
                self.tell(Event::FirstToken { job, worker: id.clone() })?;
            }
        }
        for job in done {
            let Some(known) = self.jobs.remove(&job) else { continue };
            self.ended += 1;
            self.outcome.done += 1;
            let came = self.arrivals[known.arrival].at;
            let first = known.first.unwrap_or(now);
            self.outcome.first.push(first.saturating_sub(came).as_secs_f64());
            self.outcome.total.push(now.saturating_sub(came).as_secs_f64());
            self.tell(Event::Ended { job, worker: id.clone() })?;
        }
        Ok(())
    }

    /// Puts the next thing that comes of itself on a worker into the calendar.
    fn look_again(&mut self, id: &WorkerId) {
        if let Some(process) = self.fleet.process(id)
            && let Some(span) = process.next()
        {
            let change = process.changes();
            self.after(span, Next::Look(id.clone(), change));
        }
    }

    fn stop(&mut self, worker: &WorkerId, job: &JobId) {
        let now = self.now;
        if let Some(process) = self.fleet.process_mut(worker) {
            process.advance(now);
            process.stop(job);
            self.look_again(worker);
        }
    }

    /// Tells the scheduler, and does what it says.
    fn tell(&mut self, event: Event) -> Result<(), Broken> {
        for effect in self.scheduler.handle(self.now, event) {
            self.carry_out(effect)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) -> Result<(), Broken> {
        match effect {
            Effect::Dispatch { job, worker, .. } => self.dispatch(job, worker),
            Effect::Halt { job } => {
                let on = self.jobs.get_mut(&job).and_then(|job| job.on.take());
                if let Some(worker) = on {
                    self.stop(&worker, &job);
                }
                Ok(())
            }
            Effect::Reject { job, error } | Effect::Abort { job, error } => {
                let Some(known) = self.jobs.remove(&job) else {
                    return Err(self.broken(format!("{job} ends twice, with {error}")));
                };
                if let Some(worker) = known.on {
                    self.stop(&worker, &job);
                }
                self.ended += 1;
                *self.outcome.refused.entry(error.code.to_string()).or_default() += 1;
                Ok(())
            }
            Effect::Plan { load } => {
                self.after(CALL, Next::Planned(load));
                Ok(())
            }
            Effect::Load { load, hive, keep_alive, .. } => {
                let model = self.setup.models.iter().find(|model| model.model == load.model);
                let machine = self.setup.machines.iter().position(|machine| machine.name == hive.as_str());
                let Some((model, machine)) = model.zip(machine) else { return Err(self.broken("a load of nothing")) };
                let planned = self.planned.get(&load).and_then(|rooms| rooms.iter().find(|(at, _)| *at == machine));
                if planned.is_none_or(|(_, free)| *free < model.bytes) {
                    return Err(self.broken(format!("{} is loaded where it did not fit: {planned:?}", load.model)));
                }
                if !self.asked.insert(load.clone()) {
                    return Err(self.broken(format!("{} is loaded twice at once", load.model)));
                }
                match self.fleet.start(machine, model, keep_alive, self.now) {
                    Ok(id) => {
                        self.outcome.loads += 1;
                        let span = Duration::from_secs_f64(model.bytes as f64 / self.setup.machines[machine].disk);
                        self.after(CALL, Next::WorkerBeat(id.clone()));
                        self.after(span, Next::LoadEnded(load, id));
                    }
                    Err(_) => {
                        self.outcome.crowded += 1;
                        let error = ErrorBody::new(ErrorCode::InsufficientMemory, "the memory was taken meanwhile");
                        self.after(CALL, Next::Tell(Box::new(Event::LoadDone { load, result: Err(error) })));
                    }
                }
                Ok(())
            }
            Effect::Unload { worker, why, .. } => {
                let evicted = why.contains("memory");
                self.outcome.evictions += usize::from(evicted);
                let since = self.fleet.process(&worker).and_then(Process::ready_since);
                let stayed = since.map(|since| self.now.saturating_sub(since));
                if evicted && stayed.is_some_and(|stayed| stayed < self.setup.config.residency) {
                    return Err(self.broken(format!("{worker} leaves after {stayed:?} for another")));
                }
                let jobs = self.fleet.process(&worker).map(Process::jobs).unwrap_or_default();
                if let Some(job) = jobs.first() {
                    return Err(self.broken(format!("{worker} is sent away while {job} runs on it")));
                }
                self.after(EXIT, Next::Exited(worker));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn dispatch(&mut self, id: JobId, worker: WorkerId) -> Result<(), Broken> {
        let Some(job) = self.jobs.get_mut(&id) else { return Err(self.broken(format!("{id} is over and dispatched"))) };
        if let Some(before) = &job.on {
            let what = format!("{id} is dispatched to {worker} and runs on {before}");
            return Err(self.broken(what));
        }
        job.on = Some(worker.clone());
        let arrival = &self.arrivals[job.arrival];
        let (now, work) = (self.now, (arrival.prompt, arrival.answer));
        let wants = &arrival.model;
        let Some(process) = self.fleet.process_mut(&worker) else {
            // It ended a moment ago, which the scheduler cannot know yet.
            let error = ErrorBody::new(ErrorCode::WorkerLost, "nobody listens there");
            job.on = None;
            let event = Event::DispatchFailed { job: id, worker, error, retry: true };
            self.after(CALL, Next::Tell(Box::new(event)));
            return Ok(());
        };
        if process.model != *wants {
            let what = format!("{id} wants {wants} and is dispatched to {}", process.model);
            return Err(self.broken(what));
        }
        process.advance(now);
        process.begin(&id, work).map_err(|what| Broken { at: now, what })?;
        self.look_again(&worker);
        Ok(())
    }
}

/// How far a load is.
fn progress(done: u64, total: u64) -> LoadProgress {
    LoadProgress { stage: "load".into(), done, total, unit: "bytes".into() }
}
