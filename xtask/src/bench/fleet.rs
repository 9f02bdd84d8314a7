//! `bench fleet`: what an event costs the scheduler with a thousand workers and ten thousand jobs that wait.
//!
//! The real [`Scheduler`] alone, without network and queen. Every worker is full, so that each end of a job is the dispatch of the
//! next; what an event takes away is put back, unmeasured, before the next. Then what the heartbeats alone cost a real queen.

mod queen;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rbee_scheduler::{Config, Effect, Event, LoadKey, Policy, Scheduler, Want};
use rbee_testkit::beats;
use rbee_wire::worker::WorkerHeartbeat;
use rbee_wire::{DeviceId, DeviceSpec, HiveId, JobId, KeepAlive, KeyId, ModelRef, WorkerId};

use super::{USAGE, machine, quantile, sorted};

const SLOTS: usize = 8;
/// Longest that one kind of event is measured.
const PATIENCE: Duration = Duration::from_secs(10);

/// How large the fleet is.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    workers: usize,
    hives: usize,
    models: usize,
    owners: usize,
    jobs: usize,
    events: usize,
    policy: Policy,
}

impl Plan {
    pub(super) fn parse(args: &[String]) -> Result<Self> {
        let mut plan = Self {
            workers: 1000,
            hives: 10,
            models: 20,
            owners: 50,
            jobs: 10_000,
            events: 2000,
            policy: Policy::FirstAvailable,
        };
        for pair in args.chunks(2) {
            let [flag, text] = pair else { bail!(USAGE) };
            if flag == "--policy" {
                plan.policy = text.parse().ok().context(USAGE)?;
                continue;
            }
            let number: usize = text.parse().ok().filter(|number| *number > 0).context(USAGE)?;
            match flag.as_str() {
                "--workers" => plan.workers = number,
                "--hives" => plan.hives = number,
                "--models" => plan.models = number,
                "--owners" => plan.owners = number,
                "--jobs" => plan.jobs = number,
                "--events" => plan.events = number,
                _ => bail!(USAGE),
            }
        }
        Ok(plan)
    }
}

/// The scheduler with its fleet, and what it was told.
struct Fleet {
    plan: Plan,
    scheduler: Scheduler,
    now: Duration,
    jobs: usize,
    beats: Vec<WorkerHeartbeat>,
    running: VecDeque<(JobId, WorkerId)>,
    /// Effects that the last event had.
    effects: usize,
}

pub(super) fn run(plan: &Plan) -> Result<()> {
    let mut fleet = Fleet::new(plan)?;
    println!(
        "{}; {} workers of {SLOTS} slots, {} hives, {} models; {} jobs of {} owners wait; {}",
        machine::describe(),
        plan.workers,
        plan.hives,
        plan.models,
        fleet.scheduler.queued(),
        plan.owners,
        plan.policy
    );
    println!();
    println!("| event | median us | p99 us | worst us | effects | events |");
    println!("|---|---|---|---|---|---|");
    type Step = fn(&mut Fleet, usize) -> Result<Duration>;
    let kinds: [(&str, Step); 6] = [
        ("submit", |fleet, _| {
            let took = fleet.submit()?;
            fleet.unmeasured(Fleet::cancel_last)?;
            Ok(took)
        }),
        ("cancel of a job that waits", |fleet, _| {
            fleet.submit()?;
            fleet.cancel_last()
        }),
        ("end of a job, dispatch of the next", |fleet, _| {
            let took = fleet.end_one()?;
            fleet.unmeasured(Fleet::submit)?;
            Ok(took)
        }),
        ("worker's heartbeat", Fleet::worker_beat),
        ("hive's heartbeat", Fleet::hive_beat),
        ("tick", |fleet, _| Ok(fleet.handle(Event::Tick)?.0)),
    ];
    for (name, step) in kinds {
        let (mut times, mut effects) = (Vec::new(), 0);
        let began = Instant::now();
        for at in 0..plan.events {
            times.push(step(&mut fleet, at)?.as_secs_f64() * 1e6);
            effects += fleet.effects;
            if began.elapsed() > PATIENCE {
                break;
            }
        }
        let count = times.len();
        let times = sorted(times);
        println!(
            "| {name} | {:.1} | {:.1} | {:.1} | {:.1} | {count} |",
            quantile(&times, 0.5),
            quantile(&times, 0.99),
            quantile(&times, 1.0),
            effects as f64 / count as f64
        );
        ensure!(fleet.scheduler.queued() == plan.jobs, "{} jobs wait after {name}", fleet.scheduler.queued());
    }
    queen::run(&fleet.beats)
}

fn model(at: usize) -> ModelRef {
    ModelRef::Path(format!("/models/m{at}"))
}

impl Fleet {
    /// Every slot taken, and the jobs beyond them in the line.
    fn new(plan: &Plan) -> Result<Self> {
        let all = plan.jobs + plan.workers * SLOTS;
        let config = Config {
            queue_limit: all + 1,
            queue_timeout: Duration::from_secs(3600),
            default_model: None,
            policy: plan.policy,
            keep_alive: KeepAlive::Forever,
            residency: Duration::from_secs(5),
        };
        let beat = |at: usize| {
            let hive = HiveId::new(format!("hive{}", at % plan.hives))?;
            let device = DeviceId::new(format!("cuda:{}", at / plan.hives % 8))?;
            let worker = WorkerId::new(format!("{hive}.worker{at}"))?;
            let mut beat = beats::worker(&worker, &hive, &device, &model(at % plan.models), SLOTS as u64);
            beat.decode_rate = 20.0 + (at % 7) as f64;
            beat.prefill_rate = 400.0 + (at % 7) as f64 * 20.0;
            Ok(beat)
        };
        let mut fleet = Self {
            scheduler: Scheduler::new(config),
            now: Duration::from_secs(1),
            jobs: 0,
            beats: (0..plan.workers).map(beat).collect::<Result<_>>()?,
            running: VecDeque::new(),
            effects: 0,
            plan: plan.clone(),
        };
        // The jobs first: with nobody to look at they are soon in.
        for _ in 0..all {
            fleet.submit()?;
        }
        for at in 0..plan.workers {
            fleet.worker_beat(at)?;
        }
        for at in 0..plan.models {
            let load = LoadKey { model: model(at), device: DeviceSpec::Auto, hive: None };
            fleet.handle(Event::LoadDone { load, result: Ok(()) })?;
        }
        let (waiting, running) = (fleet.scheduler.queued(), fleet.scheduler.running());
        ensure!((waiting, running) == (plan.jobs, plan.workers * SLOTS), "{waiting} jobs wait and {running} run");
        Ok(fleet)
    }

    /// One event, and what it took.
    fn handle(&mut self, event: Event) -> Result<(Duration, Vec<Effect>)> {
        self.now += Duration::from_micros(1);
        let began = Instant::now();
        let effects = self.scheduler.handle(self.now, event);
        let took = began.elapsed();
        self.effects = effects.len();
        for effect in &effects {
            match effect {
                Effect::Dispatch { job, worker, .. } => self.running.push_back((job.clone(), worker.clone())),
                Effect::Reject { job, error } | Effect::Abort { job, error } => bail!("{job} ended: {error}"),
                Effect::Forget { worker } => bail!("{worker} is gone"),
                _ => {}
            }
        }
        Ok((took, effects))
    }

    /// What puts things back as they were, whose effects do not count.
    fn unmeasured(&mut self, event: impl FnOnce(&mut Self) -> Result<Duration>) -> Result<()> {
        let effects = self.effects;
        event(self)?;
        self.effects = effects;
        Ok(())
    }

    fn submit(&mut self) -> Result<Duration> {
        let at = self.jobs;
        self.jobs += 1;
        let want = Want {
            owner: Some(KeyId::new(format!("key{}", at % self.plan.owners))?),
            // Another stride than the owners', so that every owner asks for every model.
            model: Some(model((at + at / self.plan.owners) % self.plan.models)),
            ..Want::default()
        };
        Ok(self.handle(Event::Submit { job: JobId::new(format!("job{at}"))?, want })?.0)
    }

    /// Cancels the job that came last; it waits, as every slot is taken.
    fn cancel_last(&mut self) -> Result<Duration> {
        let job = JobId::new(format!("job{}", self.jobs - 1))?;
        Ok(self.handle(Event::Cancel { job })?.0)
    }

    fn end_one(&mut self) -> Result<Duration> {
        let (job, worker) = self.running.pop_front().context("nothing runs")?;
        let (took, effects) = self.handle(Event::Ended { job, worker })?;
        ensure!(effects.iter().any(|effect| matches!(effect, Effect::Dispatch { .. })), "the slot stays empty");
        Ok(took)
    }

    fn worker_beat(&mut self, at: usize) -> Result<Duration> {
        let at = at % self.beats.len();
        self.beats[at].seq += 1;
        let beat = self.beats[at].clone();
        Ok(self.handle(Event::WorkerBeat(Box::new(beat)))?.0)
    }

    fn hive_beat(&mut self, at: usize) -> Result<Duration> {
        let of = at % self.plan.hives;
        let mine: Vec<WorkerHeartbeat> = self.beats.iter().skip(of).step_by(self.plan.hives).cloned().collect();
        let mut beat = beats::hive(&mine.first().context("an empty hive")?.hive_id.clone(), &mine);
        beat.seq = 2 + at as u64;
        Ok(self.handle(Event::HiveBeat(Box::new(beat)))?.0)
    }
}
