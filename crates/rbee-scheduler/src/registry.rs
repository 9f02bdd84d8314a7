//! What heartbeats mean: who lives, since when, and with how many free slots.
//!
//! Later heartbeats win, silence expires. The queen counts its own dispatches at once, so that two jobs never share the
//! last slot while a heartbeat is on its way.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use rbee_wire::hive::{HiveHeartbeat, Process, ProcessState};
use rbee_wire::view::{HiveView, LoadedView, WorkerView};
use rbee_wire::worker::{UsedOf, WorkerHeartbeat, WorkerState};
use rbee_wire::{DeviceSpec, HiveId, Incarnation, KeepAlive, ModelRef, WorkerId};

use crate::workers::Workers;

/// No new dispatch after so much silence.
pub const FRESH: Duration = Duration::from_millis(1200);
/// Dead after so much silence.
pub const DEAD: Duration = Duration::from_millis(1600);
/// A step counter that stands still for so long with work running is a hung engine.
pub const STALLED: Duration = Duration::from_secs(4);
/// A hive's lease.
pub const LEASE: Duration = Duration::from_secs(5);
/// Hives that are known at most.
const MAX_HIVES: usize = 1024;
/// Ended lives that are remembered, to be refused.
const MAX_ENDED: usize = 4096;

/// A worker as the queen sees it.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Its last heartbeat.
    pub beat: WorkerHeartbeat,
    /// When that came.
    pub heard: Duration,
    /// Own dispatches that have not ended.
    pub dispatched: u64,
    /// It refused a dispatch, or could not be reached, since its last heartbeat.
    pub refused: bool,
    /// How long it stays when nobody uses it: as it was started, or as the last who used it said.
    pub keep: KeepAlive,
    /// Since when nobody uses it; `None` while somebody does, or it does not serve yet.
    pub idle_since: Option<Duration>,
    /// Since when it serves.
    pub ready_since: Option<Duration>,
    /// How long its load took, where that was seen.
    pub load_time: Option<Duration>,
    /// It was told to end.
    pub leaving: bool,
    /// It takes no new jobs, so that its memory comes free for a model that is waited for.
    pub closed: bool,
    began: Duration,
    steps_moved: Duration,
}

impl Worker {
    fn new(beat: WorkerHeartbeat, now: Duration) -> Self {
        let mut worker = Self {
            keep: beat.keep_alive,
            beat,
            heard: now,
            dispatched: 0,
            refused: false,
            idle_since: None,
            ready_since: None,
            load_time: None,
            leaving: false,
            closed: false,
            began: now,
            steps_moved: now,
        };
        worker.look(now);
        worker
    }

    /// Nobody could be heard for so long.
    pub(crate) fn extend(&mut self, by: Duration) {
        self.heard += by;
        self.steps_moved += by;
        self.idle_since = self.idle_since.map(|since| since + by);
    }

    /// Takes a newer heartbeat of the same life.
    fn hear(&mut self, beat: WorkerHeartbeat, now: Duration) {
        if beat.steps != self.beat.steps || !beat.working {
            self.steps_moved = now;
        }
        self.beat = beat;
        self.heard = now;
        self.refused = false;
        self.look(now);
    }

    /// Whether it serves, and whether anybody uses it, after a heartbeat, a dispatch or the end of one.
    pub(crate) fn look(&mut self, now: Duration) {
        let serves = self.is_up();
        if serves && self.ready_since.is_none() {
            self.ready_since = Some(now);
            // One that served when it was first heard of was loaded before.
            self.load_time = (now > self.began).then(|| now.saturating_sub(self.began));
        }
        let idle = serves && self.slots().used == 0 && self.beat.queue == 0;
        self.idle_since = if idle { self.idle_since.or(Some(now)) } else { None };
    }

    /// What it serves and where, as an answer.
    pub(crate) fn loaded(&self) -> LoadedView {
        LoadedView {
            worker_id: self.beat.worker_id.clone(),
            hive_id: self.beat.hive_id.clone(),
            model: self.beat.model.clone(),
            device: self.beat.device.clone(),
        }
    }

    /// Slots in all and taken: by its own count or by ours, whichever is more.
    pub fn slots(&self) -> UsedOf {
        UsedOf { total: self.beat.slots.total, used: self.beat.slots.used.max(self.dispatched) }
    }

    /// Whether its model is loaded and it takes jobs.
    pub fn is_up(&self) -> bool {
        matches!(self.beat.state, WorkerState::Ready | WorkerState::Busy)
    }

    /// Whether it serves, and every slot is taken.
    pub fn is_full(&self, now: Duration) -> bool {
        let slots = self.slots();
        self.is_up() && now.saturating_sub(self.heard) <= FRESH && slots.used >= slots.total
    }

    /// Whether a job can be sent to it now.
    pub fn able(&self, now: Duration) -> bool {
        let slots = self.slots();
        self.is_up()
            && now.saturating_sub(self.heard) <= FRESH
            && !self.refused
            && !self.leaving
            && slots.used < slots.total
    }

    /// Whether it serves the model, or will.
    pub fn serves(&self, model: &ModelRef) -> bool {
        let ends = self.leaving || matches!(self.beat.state, WorkerState::Draining | WorkerState::Stopped);
        &self.beat.model == model && !ends
    }

    /// Whether it is on such a device.
    pub fn is_on(&self, device: DeviceSpec) -> bool {
        let id = self.beat.device.as_str();
        match device {
            DeviceSpec::Auto => true,
            DeviceSpec::Cpu => id == "cpu",
            DeviceSpec::Cuda(index) => id.strip_prefix("cuda:").and_then(|text| text.parse().ok()) == Some(index),
        }
    }
}

/// A hive as the queen sees it.
#[derive(Clone, Debug)]
pub struct Hive {
    /// Its last heartbeat.
    pub beat: HiveHeartbeat,
    /// When that came.
    pub heard: Duration,
}

/// Everybody that beats.
#[derive(Debug, Default)]
pub struct Registry {
    /// By id and by model.
    pub workers: Workers,
    /// By name.
    pub hives: BTreeMap<HiveId, Hive>,
    ended: HashMap<WorkerId, Incarnation>,
    /// When so many fell silent at once that the queen suspected itself.
    suspected: Option<Duration>,
}

/// What a heartbeat came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beat {
    /// It is the newest of its sender.
    Taken,
    /// It came late.
    Old,
    /// Its sender's life has ended.
    Refused,
    /// Its sender has begun a new life; the old one has ended.
    NewLife,
    /// Its sender says goodbye.
    Stopped,
}

/// Whether this life of a worker may beat again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// It was not heard, and may be again.
    Perhaps,
    /// It has ended.
    Never,
}

/// Why a worker is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// Its process ended, or it cannot be heard of.
    Lost,
    /// Its process is there and makes no progress.
    Stalled,
}

impl Registry {
    /// A worker by its id.
    pub fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    /// Forgets a worker, and refuses this life of it from here on unless it was merely not heard.
    pub(crate) fn remove(&mut self, id: &WorkerId, back: Back) {
        if let Some(worker) = self.workers.remove(id)
            && back == Back::Never
        {
            self.end(id.clone(), worker.beat.incarnation);
        }
    }

    fn end(&mut self, id: WorkerId, life: Incarnation) {
        if self.ended.len() >= MAX_ENDED {
            // The lowest are the oldest: counters rise over all workers of a hive.
            if let Some(oldest) = self.ended.iter().min_by_key(|(_, life)| life.counter).map(|(id, _)| id.clone()) {
                self.ended.remove(&oldest);
            }
        }
        let known = self.ended.entry(id).or_insert_with(|| life.clone());
        if known.counter < life.counter {
            *known = life;
        }
    }

    /// Takes a worker's heartbeat.
    pub fn worker_beat(&mut self, beat: WorkerHeartbeat, now: Duration) -> Beat {
        let id = beat.worker_id.clone();
        if self.ended.get(&id).is_some_and(|life| beat.incarnation.counter <= life.counter) {
            return Beat::Refused;
        }
        let stopped = beat.state == WorkerState::Stopped;
        let Some(known) = self.worker(&id) else {
            if stopped {
                self.end(id, beat.incarnation);
            } else {
                self.workers.put(Worker::new(beat, now));
            }
            return Beat::Taken;
        };
        if known.beat.incarnation != beat.incarnation {
            if beat.incarnation.counter < known.beat.incarnation.counter {
                return Beat::Refused;
            }
            if stopped {
                self.end(id, beat.incarnation);
                return Beat::Stopped;
            }
            let before = known.beat.incarnation.clone();
            self.workers.put(Worker::new(beat, now));
            self.end(id, before);
            return Beat::NewLife;
        }
        if beat.seq <= known.beat.seq {
            return Beat::Old;
        }
        if stopped {
            return Beat::Stopped;
        }
        if beat.model == known.beat.model {
            self.workers.change(&id, |known| known.hear(beat, now));
        } else {
            // No worker of ours does, but the index must not hang on that.
            let mut known = known.clone();
            known.hear(beat, now);
            self.workers.put(known);
        }
        Beat::Taken
    }

    /// Takes a hive's heartbeat and gives the workers that it reports as ended.
    pub fn hive_beat(&mut self, beat: HiveHeartbeat, now: Duration) -> (Beat, Vec<(WorkerId, Gone)>) {
        if let Some(known) = self.hives.get(&beat.hive_id) {
            let (old, new) = (&known.beat.incarnation, &beat.incarnation);
            if new.counter < old.counter {
                return (Beat::Refused, Vec::new());
            }
            if new == old && beat.seq <= known.beat.seq {
                return (Beat::Old, Vec::new());
            }
        }
        if self.hives.len() >= MAX_HIVES && !self.hives.contains_key(&beat.hive_id) {
            return (Beat::Refused, Vec::new());
        }
        let dead = |process: &&Process| matches!(process.state, ProcessState::Exited | ProcessState::Backoff);
        let ended = beat.processes.iter().filter(dead).filter_map(|process| {
            // A hive speaks for its own workers only.
            let worker = self.worker(&process.worker_id).filter(|worker| worker.beat.hive_id == beat.hive_id)?;
            // A process that was started again beats under a higher life than the one that ended.
            let this_life = worker.beat.incarnation.counter <= process.incarnation.counter;
            let stalled = process.last_exit.as_ref().is_some_and(|exit| exit.reason == "stalled");
            this_life.then(|| (process.worker_id.clone(), if stalled { Gone::Stalled } else { Gone::Lost }))
        });
        let ended = ended.collect();
        self.hives.insert(beat.hive_id.clone(), Hive { beat, heard: now });
        (Beat::Taken, ended)
    }

    /// Nobody could be heard for so long, because the queen itself stood still.
    pub fn extend(&mut self, by: Duration) {
        self.workers.extend(by);
        for hive in self.hives.values_mut() {
            hive.heard += by;
        }
    }

    /// Workers that are gone by now: silent, or beating over an engine that hangs.
    pub fn scan(&mut self, now: Duration) -> Vec<(WorkerId, Gone)> {
        let silent = |worker: &&Worker| now.saturating_sub(worker.heard) > DEAD;
        let dead: Vec<&Worker> = self.workers.iter().filter(silent).collect();
        let mut hives: Vec<&HiveId> = dead.iter().map(|worker| &worker.beat.hive_id).collect();
        hives.sort_unstable();
        hives.dedup();
        let suspicious = dead.len() >= 3 && hives.len() >= 2 && dead.len() * 2 > self.workers.len();
        // Once: until a while after the extra period it is not excused again.
        self.suspected = self.suspected.filter(|at| now.saturating_sub(*at) < DEAD * 4 || !dead.is_empty());
        if suspicious && self.suspected.is_none() {
            // So many at once: it is likelier that we do not hear than that they do not speak.
            self.suspected = Some(now);
            self.workers.hear_all(now);
            return Vec::new();
        }
        let mut gone: Vec<(WorkerId, Gone)> =
            dead.into_iter().map(|worker| (worker.beat.worker_id.clone(), self.silence(worker, now))).collect();
        for worker in self.workers.iter() {
            if worker.beat.working
                && worker.heard.saturating_sub(worker.steps_moved) >= STALLED
                && !gone.iter().any(|(id, _)| id == &worker.beat.worker_id)
            {
                gone.push((worker.beat.worker_id.clone(), Gone::Stalled));
            }
        }
        gone
    }

    /// What a silent worker suffers from: frozen, if its hive still sees its process.
    fn silence(&self, worker: &Worker, now: Duration) -> Gone {
        let hive = self.hives.get(&worker.beat.hive_id).filter(|hive| now.saturating_sub(hive.heard) <= LEASE);
        let seen = hive.is_some_and(|hive| {
            hive.beat.processes.iter().any(|process| {
                process.worker_id == worker.beat.worker_id
                    && process.incarnation == worker.beat.incarnation
                    && matches!(process.state, ProcessState::Ready | ProcessState::Loading)
            })
        });
        if seen { Gone::Stalled } else { Gone::Lost }
    }

    /// The workers as others see them.
    pub fn worker_views(&self, now: Duration) -> Vec<WorkerView> {
        self.workers.iter().map(|worker| view(worker, now)).collect()
    }

    /// The hives as others see them.
    pub fn hive_views(&self, now: Duration) -> Vec<HiveView> {
        let hives = self.hives.values().map(|hive| HiveView {
            hive_id: hive.beat.hive_id.clone(),
            incarnation: hive.beat.incarnation.clone(),
            url: hive.beat.url.clone(),
            alive: now.saturating_sub(hive.heard) <= LEASE,
            age_ms: millis(now.saturating_sub(hive.heard)),
            devices: hive.beat.devices.clone(),
            models: hive.beat.models.clone(),
            downloads: hive.beat.downloads.clone(),
            processes: hive.beat.processes.clone(),
            version: hive.beat.version.clone(),
        });
        hives.collect()
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

fn view(worker: &Worker, now: Duration) -> WorkerView {
    let beat = &worker.beat;
    let slots = worker.slots();
    let full = slots.total > 0 && slots.used >= slots.total;
    WorkerView {
        worker_id: beat.worker_id.clone(),
        hive_id: beat.hive_id.clone(),
        incarnation: beat.incarnation.clone(),
        model: beat.model.clone(),
        device: beat.device.clone(),
        state: if full && beat.state == WorkerState::Ready { WorkerState::Busy } else { beat.state },
        load: beat.load.clone(),
        slots,
        queue: beat.queue,
        kv_blocks: beat.kv_blocks,
        preemptions: beat.preemptions,
        memory: beat.memory,
        context: beat.context,
        url: beat.url.clone(),
        age_ms: millis(now.saturating_sub(worker.heard)),
        numerics_id: beat.numerics_id.clone(),
        prefill_rate: beat.prefill_rate,
        decode_rate: beat.decode_rate,
        unload_ms: worker
            .keep
            .duration()
            .zip(worker.idle_since)
            .map(|(keep, since)| millis((since + keep).saturating_sub(now))),
        keep_alive: worker.keep,
        version: beat.version.clone(),
    }
}
