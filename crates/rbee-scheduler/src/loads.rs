//! Loads on demand, and what leaves for them: from the first job that finds no worker to the heartbeat of the one that was started.
//!
//! A load asks what its model needs and what the devices have ([`Effect::Plan`]), is placed ([`crate::place`]), waits until those
//! who must leave are gone, and is handed to a hive, which reserves the memory or refuses with newer numbers. Loads that need room
//! on the same device take turns in the order they came. A worker that others wait for takes no new jobs once it has been there for
//! the least residency, and leaves when it has finished those it has.

use std::time::Duration;

use rbee_wire::view::{PlanView, WouldFit};
use rbee_wire::worker::LoadProgress;
use rbee_wire::{DeviceId, ErrorBody, ErrorCode, HiveId, KeepAlive, ModelRef, WorkerId};
use serde_json::json;

use crate::line::{Class, Entry, Standing as Stands};
use crate::place::{Placement, Resident, Site, Standing, cost, place};
use crate::pump::tell;
use crate::registry::Worker;
use crate::scheduler::{Job, Scheduler, Told};
use crate::{Effect, LoadKey, Policy, Work};

/// A load that has ended well shows itself by a heartbeat within this time.
const SHOW: Duration = Duration::from_secs(10);
/// Time between two looks at the devices while a load waits for room.
const LOOK: Duration = Duration::from_secs(1);
/// Times that a load is placed again because memory was taken meanwhile.
const MAX_TRIES: u32 = 4;

/// A load that was asked for.
#[derive(Debug)]
pub(crate) struct Load {
    since: Duration,
    tries: u32,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// What it needs and what there is are being found out; the model's files are fetched, if need be.
    Planning,
    /// No device has room yet.
    Waiting {
        /// The devices as they were last looked at.
        sites: Vec<Site>,
        /// Whose room it waits for.
        target: Option<(HiveId, DeviceId)>,
        /// When they were looked at.
        looked: Duration,
        /// They are being looked at again.
        looking: bool,
    },
    /// These are on their way out.
    Evicting { out: Vec<WorkerId>, target: (HiveId, DeviceId) },
    /// A hive has it.
    Loading,
    /// It ended well; its worker must show itself soon.
    Loaded(Duration),
}

impl Load {
    pub(crate) fn new(now: Duration) -> Self {
        Self { since: now, tries: 0, phase: Phase::Planning }
    }

    /// The device whose room it waits for or makes.
    fn target(&self) -> Option<&(HiveId, DeviceId)> {
        match &self.phase {
            Phase::Waiting { target, .. } => target.as_ref(),
            Phase::Evicting { target, .. } => Some(target),
            _ => None,
        }
    }

    /// No hive has reserved memory for it yet, and nobody leaves for it.
    fn can_be_left(&self) -> bool {
        matches!(self.phase, Phase::Planning | Phase::Waiting { .. })
    }
}

/// Whether a worker is what a load was for.
fn suits(worker: &Worker, load: &LoadKey) -> bool {
    worker.serves(&load.model)
        && worker.is_on(load.device)
        && load.hive.as_ref().is_none_or(|hive| &worker.beat.hive_id == hive)
}

impl Scheduler {
    /// What a load needs, and what the devices have, is known.
    pub(crate) fn planned(
        &mut self,
        load: &LoadKey,
        result: Result<Vec<PlanView>, ErrorBody>,
        now: Duration,
        out: &mut Vec<Effect>,
    ) {
        if !self.loads.contains_key(load) {
            return;
        }
        match result {
            Ok(plans) => {
                let sites = self.sites(&plans, now);
                let reasons: Vec<String> = plans
                    .iter()
                    .flat_map(|plan| &plan.rooms)
                    .filter_map(|room| room.refused.as_ref().map(|why| format!("{}: {why}", room.device)))
                    .collect();
                if !sites.is_empty() && sites.iter().all(|site| site.needs.is_none()) {
                    let message = format!("{} cannot be loaded: {}", load.model, reasons.join("; "));
                    self.load_failed(&load.model, &ErrorBody::new(ErrorCode::ModelLoadFailed, message), out);
                    return;
                }
                self.settle(load, sites, now, out);
            }
            Err(error) => self.load_failed(&load.model, &self.with_inventory(error), out),
        }
    }

    /// The devices of some hives, with who has their memory and whether they may leave.
    fn sites(&self, plans: &[PlanView], now: Duration) -> Vec<Site> {
        let rooms = plans.iter().flat_map(|plan| plan.rooms.iter().map(|room| (&plan.hive_id, room)));
        rooms
            .map(|(hive, room)| Site {
                hive: hive.clone(),
                device: room.device.clone(),
                needs: room.needs.map(|needs| needs.least),
                free: room.free,
                would_fit: room.would_fit.clone(),
                residents: room
                    .held
                    .iter()
                    .map(|held| Resident {
                        worker: held.worker_id.clone(),
                        bytes: held.bytes,
                        standing: self.standing(&held.worker_id, now),
                        cost: self.cost_of(&held.worker_id, held.bytes, now),
                    })
                    .collect(),
            })
            .collect()
    }

    fn standing(&self, worker: &WorkerId, now: Duration) -> Standing {
        // One that is not heard of loads, or is about to be gone.
        let Some(worker) = self.registry.worker(worker) else { return Standing::Occupied };
        let resident = worker.ready_since.is_some_and(|since| now.saturating_sub(since) >= self.config.residency);
        match worker.keep {
            _ if worker.leaving => Standing::Occupied,
            KeepAlive::Forever => Standing::Pinned,
            KeepAlive::For(_) if resident && worker.idle_since.is_some() => Standing::Idle,
            KeepAlive::For(_) => Standing::Occupied,
        }
    }

    fn cost_of(&self, worker: &WorkerId, bytes: u64, now: Duration) -> f64 {
        // A disk that gives a gigabyte a second, where no load was seen.
        let guessed = Duration::from_millis(500 + bytes / 1_000_000);
        let known = self.registry.worker(worker);
        let idle = known.and_then(|worker| worker.idle_since).map_or(Duration::ZERO, |since| now.saturating_sub(since));
        cost(known.and_then(|worker| worker.load_time).unwrap_or(guessed), idle)
    }

    /// Decides what becomes of a load, now that the devices are known.
    fn settle(&mut self, key: &LoadKey, mut sites: Vec<Site>, now: Duration, out: &mut Vec<Effect>) {
        let Some(load) = self.loads.get(key) else { return };
        let fastest = self.config.policy == Policy::Fastest;
        let work = self.oldest(key).map_or(Work::default(), |job| job.want.work);
        if fastest {
            self.learned.order(&key.model, work, &mut sites);
        }
        let (since, first) = (load.since, !matches!(load.phase, Phase::Waiting { .. }));
        // Those who came before have their turn first.
        let claimed: Vec<(HiveId, DeviceId)> = self
            .loads
            .iter()
            .filter(|(other, load)| *other != key && load.since <= since)
            .filter_map(|(_, load)| load.target().cloned())
            .collect();
        let is_open = |site: &Site| !claimed.iter().any(|(hive, device)| *hive == site.hive && *device == site.device);
        let open: Vec<Site> =
            sites.iter().map(|site| Site { needs: site.needs.filter(|_| is_open(site)), ..site.clone() }).collect();
        let at = |index: usize| (sites[index].hive.clone(), sites[index].device.clone());
        let phase = match place(&open) {
            Placement::Fits(index) => {
                let (hive, device) = at(index);
                let keep_alive = self.keep_of(key);
                let (free, needs) = (sites[index].free >> 20, sites[index].needs.unwrap_or(0) >> 20);
                let known = self.learned.seconds(&key.model, &sites[index], work).filter(|_| fastest);
                let soon = known.map_or_else(String::new, |seconds| {
                    format!(", and it will have answered in about {seconds:.1} s, load and all")
                });
                let why = format!(
                    "{} goes to {device} of {hive}: it needs {needs} MiB and {free} MiB are free{soon}",
                    key.model
                );
                self.decided(key, "place", &why, out);
                out.push(Effect::Load { load: key.clone(), hive, device, keep_alive });
                Phase::Loading
            }
            Placement::Evict(index, workers) => {
                let (hive, device) = at(index);
                let why = format!("{} leaves {device} of {hive} for {}", self.names(&workers), key.model);
                self.decided(key, "evict", &why, out);
                for worker in &workers {
                    let why = format!("its memory on {device} is needed for {}", key.model);
                    self.send_away(worker, why, out);
                }
                Phase::Evicting { out: workers, target: (hive, device) }
            }
            Placement::Wait(index, workers) => {
                if first {
                    let (hive, device) = at(index);
                    let names = self.names(&workers);
                    let why = format!("{device} of {hive} has room for {} when {names} may leave", key.model);
                    self.decided(key, "wait", &why, out);
                }
                let residency = self.config.residency;
                let resident = |known: &&Worker| known.ready_since.is_some_and(|since| now >= since + residency);
                for worker in workers {
                    if self.registry.worker(&worker).filter(resident).is_some() {
                        self.registry.workers.close(&worker);
                    }
                }
                Phase::Waiting { target: Some(at(index)), sites, looked: now, looking: false }
            }
            Placement::Never if place(&sites) == Placement::Never => {
                let error = self.no_room(key, &sites);
                self.load_failed(&key.model, &error, out);
                return;
            }
            Placement::Never => Phase::Waiting { target: None, sites, looked: now, looking: false },
        };
        if let Some(load) = self.loads.get_mut(key) {
            load.phase = phase;
        }
    }

    /// Says to all who wait for a load why it goes as it goes.
    fn decided(&self, key: &LoadKey, what: &'static str, why: &str, out: &mut Vec<Effect>) {
        let told = self.line.of_load(key).flat_map(Class::lines).flatten();
        out.extend(told.map(|entry| Effect::Decided { job: entry.id.clone(), what, why: why.to_owned() }));
    }

    /// Workers by their models.
    fn names(&self, workers: &[WorkerId]) -> String {
        let name = |worker: &WorkerId| match self.registry.worker(worker) {
            Some(known) => format!("{} ({worker})", known.beat.model),
            None => worker.to_string(),
        };
        workers.iter().map(name).collect::<Vec<_>>().join(", ")
    }

    /// A worker takes no more jobs and is ended.
    fn send_away(&mut self, worker: &WorkerId, why: String, out: &mut Vec<Effect>) {
        let hive = self.registry.workers.change(worker, |known| {
            known.leaving = true;
            known.beat.hive_id.clone()
        });
        out.extend(hive.map(|hive| Effect::Unload { worker: worker.clone(), hive, why }));
    }

    /// Who waits longest for a load.
    fn oldest(&self, key: &LoadKey) -> Option<&Job> {
        let all = self.line.of_load(key).flat_map(Class::lines).flatten();
        self.jobs.get(&all.min_by_key(|entry| entry.age)?.id)
    }

    /// How long a model that is loaded on demand stays: as the first who waits for it said.
    fn keep_of(&self, key: &LoadKey) -> KeepAlive {
        let said = |entry: &Entry| Some((entry.age, self.jobs.get(&entry.id)?.want.keep_alive?));
        let all = self.line.of_load(key).flat_map(Class::lines).flatten().filter_map(said);
        all.min_by_key(|(age, _)| *age).map_or(self.config.keep_alive, |(_, keep)| keep)
    }

    fn no_room(&self, key: &LoadKey, sites: &[Site]) -> ErrorBody {
        let mib = |bytes: u64| bytes >> 20;
        let lines: Vec<String> = sites
            .iter()
            .filter_map(|site| {
                let needs = site.needs?;
                let pinned: Vec<String> = site
                    .residents
                    .iter()
                    .filter(|resident| resident.standing == Standing::Pinned)
                    .filter_map(|resident| {
                        let model = &self.registry.worker(&resident.worker)?.beat.model;
                        Some(format!("{model} has {} MiB and stays", mib(resident.bytes)))
                    })
                    .collect();
                let held = if pinned.is_empty() { String::new() } else { format!("; {}", pinned.join(", ")) };
                Some(format!(
                    "{} on {} has {} MiB free and the load needs at least {} MiB{held}",
                    site.device,
                    site.hive,
                    mib(site.free),
                    needs.div_ceil(1 << 20)
                ))
            })
            .collect();
        let least = sites.iter().filter_map(|site| site.needs).min().unwrap_or(0);
        let free = sites.iter().map(|site| site.free).max().unwrap_or(0);
        let on: Vec<_> = sites
            .iter()
            .map(|site| json!({ "hive_id": site.hive, "device": site.device, "free": site.free, "needed": site.needs }))
            .collect();
        let pinned = sites.iter().flat_map(|site| &site.residents).any(|r| r.standing == Standing::Pinned);
        let fitting: Vec<&WouldFit> = sites.iter().flat_map(|site| &site.would_fit).collect();
        let hint = match fitting.first() {
            Some(way) => format!(
                "`rbee worker spawn --model {} {}` needs {} MiB, which fits",
                key.model,
                way.flags,
                way.needed.div_ceil(1 << 20)
            ),
            None if pinned => "unload one that stays with `rbee model unload REF`, or take a smaller model".into(),
            None => "take a smaller model; with fewer bits and a short context it does not fit either".into(),
        };
        ErrorBody::new(ErrorCode::InsufficientMemory, format!("{} fits nowhere: {}", key.model, lines.join("; ")))
            .with_hint(hint)
            .with_details(json!({ "needed": least, "free": free, "would_fit": fitting, "devices": on }))
    }

    /// Moves the loads that wait for room, and drops those that nobody waits for any more.
    pub(crate) fn pump_loads(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let left: Vec<LoadKey> =
            self.loads.iter().filter(|(_, load)| load.can_be_left()).map(|(key, _)| key.clone()).collect();
        for key in left {
            let wanted = self.line.of_load(&key).next().is_some();
            if !wanted
                && let Some(load) = self.loads.remove(&key)
                && matches!(load.phase, Phase::Planning)
            {
                out.push(Effect::Abandon { load: key });
            }
        }
        let mut waiting: Vec<(Duration, LoadKey)> = self
            .loads
            .iter()
            .filter(|(_, load)| matches!(load.phase, Phase::Waiting { .. }))
            .map(|(key, load)| (load.since, key.clone()))
            .collect();
        waiting.sort_by(|a, b| (a.0, &a.1.model).cmp(&(b.0, &b.1.model)));
        for (_, key) in waiting {
            let Some(Load { phase: Phase::Waiting { sites, looked, looking, .. }, .. }) = self.loads.get(&key) else {
                continue;
            };
            let (mut sites, looked, looking) = (sites.clone(), *looked, *looking);
            for resident in sites.iter_mut().flat_map(|site| &mut site.residents) {
                resident.standing = self.standing(&resident.worker, now);
            }
            if matches!(place(&sites), Placement::Evict(..)) {
                self.settle(&key, sites, now, out);
            } else if now.saturating_sub(looked) >= LOOK && !looking {
                if let Some(Load { phase: Phase::Waiting { looking, .. }, .. }) = self.loads.get_mut(&key) {
                    *looking = true;
                }
                out.push(Effect::Plan { load: key });
            }
        }
        self.reopen();
    }

    /// A worker that nobody waits for any more takes jobs again.
    fn reopen(&mut self) {
        let wanted: Vec<(HiveId, DeviceId)> = self.loads.values().filter_map(|load| load.target().cloned()).collect();
        self.registry.workers.reopen(|worker| {
            wanted.iter().any(|(hive, device)| *hive == worker.beat.hive_id && *device == worker.beat.device)
        });
    }

    /// Lets those go that nobody has used for as long as they stay.
    pub(crate) fn expire_idle(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let idle: Vec<(WorkerId, Duration)> = self
            .registry
            .workers
            .iter()
            .filter_map(|worker| {
                let keep = worker.keep.duration()?;
                let since = worker.idle_since.filter(|since| now.saturating_sub(*since) >= keep)?;
                (!worker.leaving).then(|| (worker.beat.worker_id.clone(), now.saturating_sub(since)))
            })
            .collect();
        for (worker, idle) in idle {
            self.send_away(&worker, format!("nobody used it for {} s", idle.as_secs()), out);
        }
    }

    /// A worker that was sent away is gone, or could not be ended.
    pub(crate) fn unloaded(&mut self, worker: &WorkerId, result: Result<(), ErrorBody>, out: &mut Vec<Effect>) {
        if result.is_err() {
            self.registry.workers.change(worker, |known| known.leaving = false);
        }
        for (key, load) in &mut self.loads {
            if let Phase::Evicting { out: leaving, .. } = &mut load.phase {
                leaving.retain(|other| other != worker);
                if leaving.is_empty() {
                    load.phase = Phase::Planning;
                    out.push(Effect::Plan { load: key.clone() });
                }
            }
        }
    }

    /// The heartbeat of a worker that serves may be what a load was for.
    pub(crate) fn shown(&mut self, worker: &WorkerId) {
        if let Some(worker) = self.registry.worker(worker) {
            self.loads.retain(|key, load| !(matches!(load.phase, Phase::Loaded(_)) && suits(worker, key)));
        }
    }

    pub(crate) fn load_moved(&mut self, model: &ModelRef, progress: &LoadProgress, out: &mut Vec<Effect>) {
        let loading = |class: &Class| matches!(class.standing, Stands::Loading(_));
        let classes = self.line.of_model(model).filter(|(_, class)| loading(class));
        for at in classes.map(|(at, _)| at).collect::<Vec<_>>() {
            for id in self.turns_of(at) {
                if let Some(job) = self.jobs.get_mut(&id).filter(|job| matches!(job.told, Told::Loading(_))) {
                    tell(&id, job, Told::Loading(Some(progress.clone())), out);
                }
            }
            if let Some((class, _)) = self.line.class_mut(at) {
                class.standing = Stands::Loading(Some(progress.clone()));
            }
        }
    }

    pub(crate) fn load_done(
        &mut self,
        key: &LoadKey,
        result: Result<(), ErrorBody>,
        now: Duration,
        out: &mut Vec<Effect>,
    ) {
        let Some(load) = self.loads.get_mut(key) else { return };
        match result {
            Ok(()) => {
                // A load is over when a worker that it was for beats, not before: else it would be asked for again.
                let mut known = self.registry.workers.of_model(&key.model);
                if known.any(|worker| worker.is_up() && suits(worker, key)) {
                    self.loads.remove(key);
                } else {
                    load.phase = Phase::Loaded(now);
                }
            }
            // Somebody took the memory meanwhile: the hive's numbers are newer than ours.
            Err(error) if error.code == ErrorCode::InsufficientMemory && load.tries < MAX_TRIES => {
                load.tries += 1;
                load.phase = Phase::Planning;
                out.push(Effect::Plan { load: key.clone() });
            }
            Err(error) => {
                let error = self.with_inventory(error);
                self.load_failed(&key.model, &error, out);
            }
        }
    }

    fn with_inventory(&self, mut error: ErrorBody) -> ErrorBody {
        if error.code == ErrorCode::ModelNotFound {
            error.message = format!("{}; {}", error.message, self.inventory());
        }
        error
    }

    /// Loads that ended well and never showed themselves.
    pub(crate) fn expire_loads(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let late = |load: &Load| matches!(load.phase, Phase::Loaded(done) if now > done + SHOW);
        let unseen: Vec<ModelRef> =
            self.loads.iter().filter(|(_, load)| late(load)).map(|(key, _)| key.model.clone()).collect();
        for model in unseen {
            let message = format!("{model} was loaded, but its worker's heartbeat does not come");
            self.load_failed(&model, &ErrorBody::new(ErrorCode::ModelLoadFailed, message), out);
        }
    }

    /// Ends the jobs that wait for a load which failed. Others of the model, queued at a worker, go on waiting.
    fn load_failed(&mut self, model: &ModelRef, error: &ErrorBody, out: &mut Vec<Effect>) {
        self.loads.retain(|key, _| &key.model != model);
        self.line.wake(model);
        let all: Vec<_> = self.line.of_model(model).map(|(at, _)| at).collect();
        for id in all.into_iter().flat_map(|at| self.turns_of(at)).collect::<Vec<_>>() {
            if self.jobs.get(&id).is_some_and(|job| matches!(job.told, Told::Loading(_))) {
                self.forget(&id);
                out.push(Effect::Reject { job: id, error: error.clone() });
            }
        }
    }
}
