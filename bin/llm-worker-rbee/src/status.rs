//! What the worker knows of itself: written by the load and the engine's owner, read by heartbeats, routes and
//! the control pipe.

use std::sync::{Arc, PoisonError, RwLock};

use rbee_engine::EngineHandle;
use rbee_wire::ModelRef;
use rbee_wire::worker::{LoadProgress, UsedOf, WorkerCharge, WorkerHeartbeat, WorkerMemory, WorkerState};
use tokio::sync::watch;

use crate::backend::{Facts, Loaded};
use crate::memory;

/// How far the worker's life is.
#[derive(Clone)]
pub enum Phase {
    /// The model is being loaded.
    Loading(LoadProgress),
    /// It serves.
    Serving(Arc<Loaded>),
    /// It finishes what it has.
    Draining(Option<Arc<Loaded>>),
    /// It is about to exit.
    Stopped,
}

/// Shared by everything in the worker; cheap to clone.
#[derive(Clone)]
pub struct Status(Arc<Inner>);

struct Inner {
    charge: WorkerCharge,
    url: String,
    build: String,
    phase: RwLock<Phase>,
    changed: watch::Sender<u64>,
}

/// What changes between two heartbeats.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Tokens a second in prefill.
    pub prefill: f64,
    /// Tokens a second in decode.
    pub decode: f64,
}

impl Status {
    /// The status of a worker that has just begun to load.
    pub fn new(charge: WorkerCharge, url: String, build: String) -> Self {
        let progress = LoadProgress { stage: "start".into(), done: 0, total: 0, unit: "steps".into() };
        let phase = RwLock::new(Phase::Loading(progress));
        Self(Arc::new(Inner { charge, url, build, phase, changed: watch::channel(0).0 }))
    }

    /// What the worker is to be.
    pub fn charge(&self) -> &WorkerCharge {
        &self.0.charge
    }

    /// Its executable's build.
    pub fn build(&self) -> &str {
        &self.0.build
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// Follows changes of the phase and of the slots.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// The slots have changed.
    pub fn touch(&self) {
        self.0.changed.send_modify(|count| *count += 1);
    }

    /// How far the worker's life is.
    pub fn phase(&self) -> Phase {
        self.0.phase.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Moves on; a worker that drains never serves again.
    pub fn set(&self, next: Phase) {
        let mut phase = self.0.phase.write().unwrap_or_else(PoisonError::into_inner);
        let backwards = matches!(
            (&*phase, &next),
            (Phase::Stopped, _)
                | (Phase::Draining(_), Phase::Loading(_) | Phase::Serving(_))
                | (Phase::Serving(_), Phase::Loading(_))
        );
        if !backwards {
            *phase = next;
        }
        drop(phase);
        self.touch();
    }

    /// Takes nothing new from here on.
    pub fn drain(&self) {
        let loaded = match self.phase() {
            Phase::Serving(loaded) => {
                loaded.engine.drain();
                Some(loaded)
            }
            _ => None,
        };
        self.set(Phase::Draining(loaded));
    }

    /// The state as the wire has it.
    pub fn state(&self) -> WorkerState {
        match self.phase() {
            Phase::Loading(_) => WorkerState::Starting,
            Phase::Serving(loaded) => {
                let slots = slots(&loaded.engine);
                if slots.used >= slots.total { WorkerState::Busy } else { WorkerState::Ready }
            }
            Phase::Draining(_) => WorkerState::Draining,
            Phase::Stopped => WorkerState::Stopped,
        }
    }

    /// The model, in canonical form.
    pub fn model(&self) -> &ModelRef {
        &self.0.charge.model
    }

    /// The engine, while there is one.
    pub fn loaded(&self) -> Option<Arc<Loaded>> {
        match self.phase() {
            Phase::Serving(loaded) | Phase::Draining(Some(loaded)) => Some(loaded),
            _ => None,
        }
    }

    /// Units of compute finished, and whether there is work.
    pub fn pulse(&self) -> (u64, bool) {
        self.loaded().map_or((0, false), |loaded| {
            let stats = loaded.engine.stats();
            (stats.steps, stats.working)
        })
    }

    /// The full state, as a heartbeat.
    pub fn heartbeat(&self, seq: u64, rates: Rates) -> WorkerHeartbeat {
        let charge = &self.0.charge;
        let loaded = self.loaded();
        let stats = loaded.as_ref().map(|loaded| loaded.engine.stats()).unwrap_or_default();
        let facts = loaded.as_ref().map(|loaded| loaded.facts.clone()).unwrap_or_default();
        let Facts { memory, numerics_id, fingerprint, row_invariant } = facts;
        let load = match self.phase() {
            Phase::Loading(progress) => Some(progress),
            _ => None,
        };
        WorkerHeartbeat {
            protocol: rbee_wire::PROTOCOL,
            worker_id: charge.worker_id.clone(),
            incarnation: charge.incarnation.clone(),
            seq,
            hive_id: charge.hive_id.clone(),
            url: self.0.url.clone(),
            bearer: charge.bearer.clone(),
            state: self.state(),
            load,
            model: charge.model.clone(),
            fingerprint,
            device: charge.device.clone(),
            memory: measured(memory),
            slots: loaded.as_ref().map(|loaded| slots(&loaded.engine)).unwrap_or_default(),
            queue: stats.waiting as u64,
            kv_blocks: UsedOf { total: stats.kv_blocks_total as u64, used: stats.kv_blocks_used as u64 },
            preemptions: stats.preemptions,
            steps: stats.steps,
            working: stats.working,
            numerics_id,
            row_invariant,
            prefill_rate: rates.prefill,
            decode_rate: rates.decode,
            context: loaded.as_ref().map_or(0, |loaded| loaded.engine.limits().context as u64),
            keep_alive: charge.keep_alive,
            capabilities: Vec::new(),
            version: env!("CARGO_PKG_VERSION").into(),
            build: self.0.build.clone(),
        }
    }
}

/// The bytes that a model has, with what the process has in memory where the device's own were not measured at load.
pub fn measured(memory: WorkerMemory) -> WorkerMemory {
    if memory.total > 0 { memory } else { WorkerMemory { total: memory::resident(), ..memory } }
}

/// Slots in all and taken; a request that waits has its claim on one.
fn slots(engine: &EngineHandle) -> UsedOf {
    let stats = engine.stats();
    let total = stats.slots_total as u64;
    UsedOf { total, used: ((stats.slots_used + stats.waiting) as u64).min(total) }
}
