//! Machines, and the worker processes on them, as numbers.

use std::collections::BTreeMap;
use std::time::Duration;

use rbee_scheduler::LoadKey;
use rbee_wire::hive::{HiveHeartbeat, ProcessState};
use rbee_wire::view::{Held, LoadNeeds, PlanView, Room};
use rbee_wire::worker::{UsedOf, WorkerHeartbeat, WorkerState};
use rbee_wire::{DeviceId, DeviceSpec, HiveId, JobId, KeepAlive, ModelRef, WorkerId};

use super::progress;
use super::traffic::Random;
use crate::beats;

/// Jobs that a worker computes at once.
const SLOTS: u64 = 4;
/// The bytes of the model that a machine's rates are of; one of more bytes is as much slower.
const RATED: f64 = (4u64 << 30) as f64;

/// A machine: a hive with one device.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its hive's name.
    pub name: String,
    /// Its device's.
    pub device: String,
    /// Bytes for models.
    pub memory: u64,
    /// Tokens a second that one sequence of a model of 4 GiB gets.
    pub decode: f64,
    /// Tokens a second of prefill.
    pub prefill: f64,
    /// Bytes a second of a load.
    pub disk: f64,
}

/// A model.
#[derive(Clone, Debug)]
pub struct Model {
    /// How jobs name it.
    pub model: ModelRef,
    /// Bytes that it needs.
    pub bytes: u64,
    /// How often it is asked for, against the others.
    pub weight: f64,
}

/// A job on a worker: what is left of it, in seconds of its own without others.
#[derive(Debug)]
struct Task {
    prefill: f64,
    decode: f64,
    /// Seconds of decode until the first token.
    first: f64,
    told: bool,
}

/// A worker.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) id: WorkerId,
    pub(super) machine: usize,
    pub(super) model: ModelRef,
    bytes: u64,
    beat: WorkerHeartbeat,
    ready: Option<Duration>,
    loaded: (Duration, f64),
    tasks: BTreeMap<JobId, Task>,
    advanced: Duration,
    changes: u64,
}

impl Process {
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    pub(super) fn ready_since(&self) -> Option<Duration> {
        self.ready
    }

    pub(super) fn jobs(&self) -> Vec<JobId> {
        self.tasks.keys().cloned().collect()
    }

    /// How fast each goes against one alone: half as fast when the worker is full.
    fn pace(&self) -> f64 {
        1.0 / (1.0 + (self.tasks.len() as f64 - 1.0).max(0.0) / (SLOTS - 1) as f64)
    }

    pub(super) fn begin(&mut self, id: &JobId, (prompt, answer): (u64, u64)) -> Result<(), String> {
        if self.ready.is_none() {
            return Err(format!("{id} is dispatched to {}, which does not serve", self.id));
        }
        if self.tasks.len() as u64 >= SLOTS {
            return Err(format!("{id} is dispatched to {}, which is full", self.id));
        }
        let task = Task {
            prefill: prompt as f64 / self.beat.prefill_rate,
            decode: answer as f64 / self.beat.decode_rate,
            first: (answer - 1) as f64 / self.beat.decode_rate,
            told: false,
        };
        self.tasks.insert(id.clone(), task);
        self.changes += 1;
        Ok(())
    }

    pub(super) fn stop(&mut self, id: &JobId) {
        self.tasks.remove(id);
        self.changes += 1;
    }

    /// Computes until now.
    pub(super) fn advance(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.advanced).as_secs_f64() * self.pace();
        self.advanced = now;
        self.changes += 1;
        for task in self.tasks.values_mut() {
            let prefill = seconds.min(task.prefill);
            task.prefill -= prefill;
            task.decode -= seconds - prefill;
        }
    }

    /// Whose first token has come, and who is done, which is no longer there.
    pub(super) fn due(&mut self) -> (Vec<JobId>, Vec<JobId>) {
        /// Less is nothing: times are whole nanoseconds.
        const LEAST: f64 = 2e-9;
        let (mut first, mut done) = (Vec::new(), Vec::new());
        for (id, task) in &mut self.tasks {
            if task.prefill < LEAST && task.decode <= task.first + LEAST && !task.told {
                task.told = true;
                first.push(id.clone());
            }
            if task.prefill < LEAST && task.decode < LEAST {
                done.push(id.clone());
            }
        }
        self.tasks.retain(|id, _| !done.contains(id));
        (first, done)
    }

    /// Time until the next first token or end.
    pub(super) fn next(&self) -> Option<Duration> {
        let left = |task: &Task| task.prefill + if task.told { task.decode } else { task.decode - task.first };
        let least = self.tasks.values().map(left).min_by(f64::total_cmp)?;
        Some(Duration::from_secs_f64((least / self.pace()).max(0.0)) + Duration::from_nanos(1))
    }

    /// Its goodbye.
    pub(super) fn last_beat(&self) -> WorkerHeartbeat {
        WorkerHeartbeat { state: WorkerState::Stopped, seq: self.beat.seq + 1, ..self.beat.clone() }
    }
}

/// All machines and who runs on them.
pub(super) struct Fleet {
    machines: Vec<Machine>,
    processes: BTreeMap<WorkerId, Process>,
    /// Processes that have ended, as their hives report them.
    ended: Vec<(usize, WorkerHeartbeat)>,
    started: u64,
    beats: u64,
}

impl Fleet {
    pub(super) fn new(machines: &[Machine]) -> Self {
        Self { machines: machines.to_vec(), processes: BTreeMap::new(), ended: Vec::new(), started: 0, beats: 0 }
    }

    pub(super) fn process(&self, id: &WorkerId) -> Option<&Process> {
        self.processes.get(id)
    }

    pub(super) fn process_mut(&mut self, id: &WorkerId) -> Option<&mut Process> {
        self.processes.get_mut(id)
    }

    fn taken(&self, machine: usize) -> u64 {
        self.processes.values().filter(|process| process.machine == machine).map(|process| process.bytes).sum()
    }

    /// Bytes that nobody has.
    pub(super) fn free(&self, machine: usize) -> u64 {
        self.machines[machine].memory - self.taken(machine)
    }

    fn hive(&self, machine: usize) -> HiveId {
        HiveId::new(&self.machines[machine].name).unwrap_or_else(|_| HiveId::localhost())
    }

    /// Starts a worker, for which the memory is reserved.
    pub(super) fn start(
        &mut self,
        machine: usize,
        model: &Model,
        keep: KeepAlive,
        now: Duration,
    ) -> Result<WorkerId, String> {
        let of = &self.machines[machine];
        let taken = self.taken(machine);
        if taken + model.bytes > of.memory {
            return Err(format!(
                "{} has {taken} bytes taken of {}, {} more do not fit",
                of.name, of.memory, model.bytes
            ));
        }
        self.started += 1;
        let wrong = |error: rbee_wire::ids::IdError| error.to_string();
        let id = WorkerId::new(format!("{}.w{}", of.name, self.started)).map_err(wrong)?;
        let device = DeviceId::new(&of.device).map_err(wrong)?;
        let mut beat = beats::worker(&id, &self.hive(machine), &device, &model.model, SLOTS);
        let slower = model.bytes as f64 / RATED;
        beat.incarnation.counter = self.started;
        (beat.decode_rate, beat.prefill_rate) = (of.decode / slower, of.prefill / slower);
        (beat.state, beat.keep_alive, beat.seq) = (WorkerState::Starting, keep, 0);
        let process = Process {
            id: id.clone(),
            machine,
            model: model.model.clone(),
            bytes: model.bytes,
            beat,
            ready: None,
            loaded: (now, of.disk),
            tasks: BTreeMap::new(),
            advanced: now,
            changes: 0,
        };
        self.processes.insert(id.clone(), process);
        Ok(id)
    }

    pub(super) fn ready(&mut self, id: &WorkerId, now: Duration) {
        if let Some(process) = self.processes.get_mut(id) {
            process.ready = Some(now);
            process.beat.state = WorkerState::Ready;
        }
    }

    /// Takes a worker away; its hive says so from here on.
    pub(super) fn end(&mut self, id: &WorkerId) -> Option<Process> {
        let process = self.processes.remove(id)?;
        self.ended.push((process.machine, process.beat.clone()));
        Some(process)
    }

    /// One of those that did not stay from the start.
    pub(super) fn any(&self, random: &mut Random) -> Option<WorkerId> {
        let all: Vec<&WorkerId> = self.processes.keys().collect();
        let at = (random.unit() * all.len() as f64) as usize;
        all.get(at).map(|id| (*id).clone())
    }

    /// A worker's heartbeat now.
    pub(super) fn beat(&mut self, id: &WorkerId, now: Duration) -> Option<WorkerHeartbeat> {
        let process = self.processes.get_mut(id)?;
        let used = process.tasks.len() as u64;
        let (since, disk) = process.loaded;
        let done = (now.saturating_sub(since).as_secs_f64() * disk) as u64;
        let beat = &mut process.beat;
        beat.seq += 1;
        beat.slots.used = used;
        beat.working = used > 0;
        beat.steps += used;
        let mut beat = beat.clone();
        if process.ready.is_none() {
            beat.load = Some(progress(done.min(process.bytes), process.bytes));
            beat.slots = UsedOf::default();
        }
        Some(beat)
    }

    /// A hive's heartbeat now: whoever runs on it, and who has ended lately.
    pub(super) fn hive_beat(&mut self, machine: usize) -> HiveHeartbeat {
        let here: Vec<WorkerHeartbeat> =
            self.processes.values().filter(|process| process.machine == machine).map(|p| p.beat.clone()).collect();
        let ended: Vec<WorkerHeartbeat> =
            self.ended.iter().filter(|(at, _)| *at == machine).map(|(_, beat)| beat.clone()).collect();
        self.ended.retain(|(at, _)| *at != machine);
        let hive = self.hive(machine);
        let mut beat = beats::hive(&hive, &here);
        let mut gone = beats::hive(&hive, &ended).processes;
        gone.iter_mut().for_each(|process| process.state = ProcessState::Exited);
        beat.processes.append(&mut gone);
        self.beats += 1;
        beat.seq = self.beats;
        beat
    }

    /// What every hive that may have it says to a load of a model, the fastest machine first.
    pub(super) fn plans(&self, model: &Model, load: &LoadKey) -> Vec<PlanView> {
        let mut machines: Vec<usize> = (0..self.machines.len()).collect();
        machines.sort_by(|a, b| self.machines[*b].decode.total_cmp(&self.machines[*a].decode));
        let wanted = |at: &usize| {
            let device = load.device == DeviceSpec::Auto || load.device.to_string() == self.machines[*at].device;
            device && load.hive.as_ref().is_none_or(|hive| *hive == self.hive(*at))
        };
        let plan = |at: usize| {
            let of = &self.machines[at];
            let here = self.processes.values().filter(|process| process.machine == at);
            let held = here.map(|process| Held {
                worker_id: process.id.clone(),
                model: process.model.clone(),
                bytes: process.bytes,
            });
            let room = Room {
                device: DeviceId::new(&of.device).ok()?,
                total: of.memory,
                free: self.free(at),
                needs: Some(LoadNeeds { least: model.bytes, total: model.bytes, ..LoadNeeds::default() }),
                context_fits: None,
                would_fit: Vec::new(),
                refused: None,
                held: held.collect(),
            };
            Some(PlanView { model: model.model.clone(), hive_id: self.hive(at), rooms: vec![room] })
        };
        machines.into_iter().filter(wanted).filter_map(plan).collect()
    }
}
