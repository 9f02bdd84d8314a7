//! One loop owns the scheduler: events come in over a bounded channel, effects are carried out as they come.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rbee_client::WorkerClient;
use rbee_scheduler::{Effect, Event as Heard, LoadKey, Scheduler};
use rbee_service::JobLog;
use rbee_wire::event::{Done, Event, NoteLevel};
use rbee_wire::view::{HiveView, JobState, WorkerView};
use rbee_wire::{DeviceId, ErrorBody, ErrorCode, HiveId, JobId, KeepAlive, WorkerId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::channel::Channel;
use crate::hives::Hives;
use crate::jobs::Jobs;
use crate::relay::{Dispatch, relay};

/// Time between two looks at the leases.
const TICK: Duration = Duration::from_millis(100);

/// Events on their way to the loop. Who finds the channel full waits: heartbeats are late then, and the queen knows by its
/// own late tick that it is to blame.
const CHANNEL: usize = 4096;

/// What the loop is asked.
enum Asked {
    Tell(Box<Heard>),
    /// A new job: answers with the refusal that keeps it from being one.
    Submit(Box<Heard>, oneshot::Sender<Option<ErrorBody>>),
    /// A heartbeat: answers whether it was taken.
    Beat(Box<Heard>, oneshot::Sender<bool>),
    Fleet(oneshot::Sender<Fleet>),
    Bearer(WorkerId, oneshot::Sender<Option<String>>),
}

/// The fleet as the queen sees it.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// Active workers.
    pub workers: Vec<WorkerView>,
    /// Hives.
    pub hives: Vec<HiveView>,
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that run.
    pub running: u64,
}

/// Talks to the loop; cheap to clone.
#[derive(Clone)]
pub struct Brain(mpsc::Sender<Asked>);

fn stopping() -> ErrorBody {
    ErrorBody::new(ErrorCode::Draining, "this queen is about to stop")
}

impl Brain {
    /// The channel to a loop that is yet to run.
    pub fn channel() -> (Self, BrainLoop) {
        let (sender, asked) = mpsc::channel(CHANNEL);
        (Self(sender), BrainLoop(asked))
    }

    /// Tells it something.
    pub async fn tell(&self, heard: Heard) {
        let _ = self.0.send(Asked::Tell(Box::new(heard))).await;
    }

    /// Hands a job over.
    ///
    /// # Errors
    /// The refusal: the job is not to be.
    pub async fn submit(&self, heard: Heard) -> Result<(), ErrorBody> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Asked::Submit(Box::new(heard), answer)).await.map_err(|_| stopping())?;
        match answered.await {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(_) => Err(stopping()),
        }
    }

    /// Hands a heartbeat over; false when its sender's life has ended.
    pub async fn beat(&self, heard: Heard) -> bool {
        let (answer, answered) = oneshot::channel();
        if self.0.send(Asked::Beat(Box::new(heard), answer)).await.is_err() {
            return true;
        }
        answered.await.unwrap_or(true)
    }

    /// The bearer of a worker, while it is active.
    pub async fn bearer(&self, worker: &WorkerId) -> Option<String> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Asked::Bearer(worker.clone(), answer)).await.ok()?;
        answered.await.ok()?
    }

    /// The fleet now.
    pub async fn fleet(&self) -> Fleet {
        let none = Fleet { workers: Vec::new(), hives: Vec::new(), queued: 0, running: 0 };
        let (answer, answered) = oneshot::channel();
        if self.0.send(Asked::Fleet(answer)).await.is_err() {
            return none;
        }
        answered.await.unwrap_or(none)
    }
}

/// The loop's end of the channel.
pub struct BrainLoop(mpsc::Receiver<Asked>);

/// What the loop carries effects out with.
pub struct Hands {
    /// The jobs.
    pub jobs: Jobs,
    /// The hives.
    pub hives: Arc<Hives>,
    /// Its own channel, for the tasks it starts.
    pub brain: Brain,
}

/// What the loop has under way.
#[derive(Default)]
struct Going {
    /// The channel to each worker, by what tells one life of it from the next.
    workers: HashMap<WorkerId, (String, Arc<Channel>)>,
    /// Loads that are being planned.
    plans: HashMap<LoadKey, AbortHandle>,
}

impl BrainLoop {
    /// Runs until every [`Brain`] is gone, which is never while the queen lives.
    pub async fn run(mut self, mut scheduler: Scheduler, hands: Hands) {
        let mut going = Going::default();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                asked = self.0.recv() => match asked {
                    Some(asked) => asked,
                    None => return,
                },
                _ = tick.tick() => Asked::Tell(Box::new(Heard::Tick)),
            };
            let now = hands.jobs.now();
            match asked {
                Asked::Tell(heard) => {
                    for effect in scheduler.handle(now, *heard) {
                        hands.carry_out(effect, &mut going, now);
                    }
                }
                Asked::Submit(heard, answer) => {
                    let mut refusal = None;
                    for effect in scheduler.handle(now, *heard) {
                        match effect {
                            // Nothing exists of a job that finds the line full.
                            Effect::Reject { error, .. }
                                if matches!(error.code, ErrorCode::QueueFull | ErrorCode::Draining) =>
                            {
                                refusal = Some(error);
                            }
                            effect => hands.carry_out(effect, &mut going, now),
                        }
                    }
                    let _ = answer.send(refusal);
                }
                Asked::Beat(heard, answer) => {
                    let mut taken = true;
                    for effect in scheduler.handle(now, *heard) {
                        match effect {
                            Effect::RefuseBeat => taken = false,
                            effect => hands.carry_out(effect, &mut going, now),
                        }
                    }
                    let _ = answer.send(taken);
                }
                Asked::Bearer(worker, answer) => {
                    let _ = answer.send(scheduler.bearer(&worker).map(str::to_owned));
                }
                Asked::Fleet(answer) => {
                    let _ = answer.send(Fleet {
                        workers: scheduler.workers(now),
                        hives: scheduler.hives(now),
                        queued: scheduler.queued() as u64,
                        running: scheduler.running() as u64,
                    });
                }
            }
        }
    }
}

impl Hands {
    fn carry_out(&self, effect: Effect, going: &mut Going, now: Duration) {
        let Going { workers, plans } = going;
        match effect {
            Effect::Dispatch { job, worker, url, bearer, model, why, .. } => {
                let Some(job) = self.jobs.get(&job) else { return };
                job.decide(now, "dispatch", &why);
                {
                    let mut facts = job.facts();
                    if let Some(since) = facts.loading_since.take() {
                        facts.load += now.saturating_sub(since);
                    }
                    facts.state = JobState::Running;
                    facts.model = Some(model.clone());
                    facts.worker = Some(worker.clone());
                    facts.dispatched = Some(now);
                }
                // One channel per worker's life.
                let life = format!("{url} {bearer}");
                let channel = match workers.get(&worker) {
                    Some((known, channel)) if *known == life => Arc::clone(channel),
                    _ => {
                        let channel = Arc::new(Channel::new(WorkerClient::new(&url, bearer)));
                        workers.insert(worker.clone(), (life, Arc::clone(&channel)));
                        channel
                    }
                };
                let dispatch = Dispatch { job, worker, model, why, channel };
                tokio::spawn(relay(dispatch, self.jobs.clone(), self.brain.clone()));
            }
            Effect::Halt { job } => {
                if let Some(job) = self.jobs.get(&job) {
                    job.decide(now, "retry", "its worker went away before the first token");
                    job.halt();
                }
            }
            Effect::Queued { job, position } => {
                if let Some(job) = self.jobs.get(&job) {
                    job.facts().state = JobState::Queued;
                    if position == 0 || job.log.events() == 0 {
                        job.decide(
                            now,
                            "queued",
                            format!("all workers that could serve it are busy; {position} before it"),
                        );
                    }
                    job.log.push(&Event::Queued { position, eta_ms: None });
                }
            }
            Effect::Loading { job, model } => {
                if let Some(job) = self.jobs.get(&job) {
                    job.decide(now, "load", format!("no worker serves {model} yet; it is being loaded"));
                    let mut facts = job.facts();
                    facts.state = JobState::Loading;
                    facts.model = Some(model);
                    facts.loading_since.get_or_insert(now);
                }
            }
            Effect::Progress { job, progress } => {
                if let Some(job) = self.jobs.get(&job) {
                    let eta = job.facts().load_pace.eta(now, &progress);
                    job.log.push(&Event::Progress {
                        stage: progress.stage,
                        done: progress.done,
                        total: progress.total,
                        unit: progress.unit,
                        eta_ms: eta.map(|eta| u64::try_from(eta.as_millis()).unwrap_or(u64::MAX)),
                        detail: None,
                    });
                }
            }
            Effect::Reject { job, error } | Effect::Abort { job, error } => self.fail(&job, error, now),
            Effect::Plan { load } => {
                let task = self.plan(load.clone());
                plans.retain(|_, task| !task.is_finished());
                plans.insert(load, task);
            }
            Effect::Abandon { load } => {
                if let Some(task) = plans.remove(&load) {
                    tracing::info!(model = %load.model, "nobody waits for the load any more");
                    task.abort();
                }
            }
            Effect::Load { load, hive, device, keep_alive } => self.load(load, hive, &device, keep_alive),
            Effect::Unload { worker, hive, why } => self.unload(worker, hive, why),
            Effect::Loaded { job, worker } => {
                if let Some(job) = self.jobs.get(&job) {
                    job.decide(now, "loaded", format!("{} on {} serves it", worker.worker_id, worker.device));
                    job.facts().worker = Some(worker.worker_id.clone());
                    job.log.push(&Event::data(&worker));
                    job.finish(now, Done::default());
                }
            }
            Effect::Forget { worker } => drop(workers.remove(&worker)),
            Effect::Decided { job, what, why } => {
                if let Some(job) = self.jobs.get(&job) {
                    job.decide(now, what, why);
                }
            }
            Effect::Note { job, text } => {
                if let Some(job) = self.jobs.get(&job) {
                    job.decide(now, "note", &text);
                    job.log.push(&Event::note(NoteLevel::Info, text));
                }
            }
            Effect::RefuseBeat => {}
        }
    }

    fn fail(&self, job: &JobId, error: ErrorBody, now: Duration) {
        if let Some(job) = self.jobs.get(job) {
            job.decide(now, "end", error.to_string());
            job.fail(now, error);
        }
    }

    /// Asks a hive what a load needs, and what its devices have.
    fn plan(&self, load: LoadKey) -> AbortHandle {
        let (hives, brain) = (Arc::clone(&self.hives), self.brain.clone());
        tokio::spawn(async move {
            let result = hives.plan(&brain, &load).await.map(|plan| vec![plan]);
            if let Err(error) = &result {
                tracing::warn!(model = %load.model, code = %error.code, error = error.message, "the load cannot be planned");
            }
            brain.tell(Heard::Planned { load, result }).await;
        })
        .abort_handle()
    }

    /// Asks a hive to load a model, and tells the loop how that goes.
    fn load(&self, load: LoadKey, hive: HiveId, device: &DeviceId, keep_alive: KeepAlive) {
        let (hives, brain) = (Arc::clone(&self.hives), self.brain.clone());
        // A hive names devices as people do.
        let device = device.as_str().parse().unwrap_or(load.device);
        tokio::spawn(async move {
            tracing::info!(model = %load.model, %hive, %device, "loading on demand");
            let result = hives.load(&brain, &hive, load.model.clone(), device, keep_alive).await;
            if let Err(error) = &result {
                tracing::warn!(model = %load.model, code = %error.code, error = error.message, "the load failed");
            }
            brain.tell(Heard::LoadDone { load, result }).await;
        });
    }

    /// Ends a worker that nobody uses, and tells the loop when it is gone.
    fn unload(&self, worker: WorkerId, hive: HiveId, why: String) {
        let (hives, brain) = (Arc::clone(&self.hives), self.brain.clone());
        tokio::spawn(async move {
            tracing::info!(%worker, %hive, why, "unloading");
            let result = hives.retire(&brain, &worker, &JobLog::default()).await;
            if let Err(error) = &result {
                tracing::warn!(%worker, code = %error.code, error = error.message, "the worker could not be ended");
            }
            brain.tell(Heard::Unloaded { worker, result }).await;
        });
    }
}
