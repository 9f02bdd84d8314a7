//! The queen's brain: events in, effects out.
//!
//! Pure: time is an argument, and whatever is to be done is an [`Effect`] that the queen's one loop carries out. A test
//! is a script, a simulation the same code on another clock. Start reading at [`Scheduler::handle`]; [`registry`] has
//! what heartbeats mean, [`policy`] which worker gets a job, [`place`](place::place) where a load goes and who leaves for it. What an
//! event costs does not grow with the jobs that wait: `line.rs` has them in classes of equal wants, `pump.rs` looks at the heads of those
//! that the event may have helped.
//!
//! Invariants
//! - Every submitted job ends in exactly one of `Reject`, `Abort`, `Loaded`, `Ended` or `Cancel`.
//! - A worker never has more dispatches than slots.
//! - No more jobs wait than the limit says, and of one key no more than half of that, so that others find a place.
//! - While two owners' jobs wait for the same slots, the next goes to the one who has fewer running.
//! - After every event but for the passing of time, nothing is left that could be done: a look at everybody would find nothing.

pub mod place;
pub mod policy;
pub mod registry;

mod learned;
mod line;
mod loads;
mod pump;
mod scheduler;
mod workers;

use std::time::Duration;

use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::view::{LoadedView, PlanView};
use rbee_wire::worker::{LoadProgress, WorkerHeartbeat};
use rbee_wire::{DeviceId, DeviceSpec, ErrorBody, HiveId, JobId, KeepAlive, KeyId, ModelRef, WorkerId};

pub use policy::{Policy, Work};
pub use scheduler::Scheduler;

/// How the scheduler decides.
#[derive(Clone, Debug)]
pub struct Config {
    /// Jobs that may wait, for a worker or for a load; half as many, rounded up, of any one key.
    pub queue_limit: usize,
    /// Longest wait for a busy worker.
    pub queue_timeout: Duration,
    /// The model when none is named.
    pub default_model: Option<ModelRef>,
    /// Which worker gets a job.
    pub policy: Policy,
    /// How long a model that was loaded on demand stays when nobody uses it.
    pub keep_alive: KeepAlive,
    /// How long a model stays at least before it leaves for another.
    pub residency: Duration,
}

/// What a load is for: the model, and where it is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoadKey {
    /// The model.
    pub model: ModelRef,
    /// On which device; any with [`DeviceSpec::Auto`].
    pub device: DeviceSpec,
    /// On which hive; any unless given.
    pub hive: Option<HiveId>,
}

/// What a job is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// It runs on a worker.
    #[default]
    Run,
    /// It ends when a worker serves the model.
    Load,
}

/// What a job wants.
#[derive(Clone, Debug, Default)]
pub struct Want {
    /// Whose it is: while jobs wait, everybody gets as many slots as everybody else. Jobs of nobody share one part.
    pub owner: Option<KeyId>,
    /// The model; the default one unless given.
    pub model: Option<ModelRef>,
    /// Only workers on this device.
    pub device: Option<DeviceSpec>,
    /// Only this worker.
    pub worker_id: Option<WorkerId>,
    /// Only workers of this hive.
    pub hive_id: Option<HiveId>,
    /// What it is for.
    pub purpose: Purpose,
    /// How much work it is.
    pub work: Work,
    /// How long its model stays afterwards; as before unless given.
    pub keep_alive: Option<KeepAlive>,
    /// Do not load the model: what to do instead.
    pub no_load: Option<&'static str>,
    /// When it must have ended, on the queen's clock.
    pub deadline: Option<Duration>,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker's heartbeat.
    WorkerBeat(Box<WorkerHeartbeat>),
    /// A hive's heartbeat.
    HiveBeat(Box<HiveHeartbeat>),
    /// Time has passed; every 100 ms.
    Tick,
    /// A new job.
    Submit {
        /// Its id.
        job: JobId,
        /// What it wants.
        want: Want,
    },
    /// The job's first token has come.
    FirstToken {
        /// The job.
        job: JobId,
        /// From where.
        worker: WorkerId,
    },
    /// The worker ended the job itself, well or with an error that is final.
    Ended {
        /// The job.
        job: JobId,
        /// Where it ran.
        worker: WorkerId,
    },
    /// The dispatch broke or was refused.
    DispatchFailed {
        /// The job.
        job: JobId,
        /// Where it was to run.
        worker: WorkerId,
        /// Why.
        error: ErrorBody,
        /// Whether nothing of the answer is out yet.
        retry: bool,
    },
    /// Somebody cancelled the job.
    Cancel {
        /// The job.
        job: JobId,
    },
    /// A load that was asked for moves on.
    LoadProgress {
        /// Of this model.
        model: ModelRef,
        /// How far.
        progress: LoadProgress,
    },
    /// What a load needs is known, and what the devices have; its model's files are there.
    Planned {
        /// The load.
        load: LoadKey,
        /// What the hives said.
        result: Result<Vec<PlanView>, ErrorBody>,
    },
    /// A load that was asked for has ended.
    LoadDone {
        /// The load.
        load: LoadKey,
        /// How.
        result: Result<(), ErrorBody>,
    },
    /// A worker that was to be ended is gone, or could not be ended.
    Unloaded {
        /// The worker.
        worker: WorkerId,
        /// How.
        result: Result<(), ErrorBody>,
    },
    /// Take no new jobs.
    Drain,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send the job to this worker.
    Dispatch {
        /// The job.
        job: JobId,
        /// The worker.
        worker: WorkerId,
        /// Its hive.
        hive: HiveId,
        /// Where it serves.
        url: String,
        /// What its routes ask for.
        bearer: String,
        /// The model it serves.
        model: ModelRef,
        /// A sentence for `rbee explain`.
        why: String,
    },
    /// Stop what runs for the job now; it will be dispatched again.
    Halt {
        /// The job.
        job: JobId,
    },
    /// The job waits for a busy worker.
    Queued {
        /// The job.
        job: JobId,
        /// Jobs before it that want the same.
        position: u64,
    },
    /// The job waits for its model to load.
    Loading {
        /// The job.
        job: JobId,
        /// The model.
        model: ModelRef,
    },
    /// The load that the job waits for moves on.
    Progress {
        /// The job.
        job: JobId,
        /// How far it is.
        progress: LoadProgress,
    },
    /// The end of a job that does not run.
    Reject {
        /// The job.
        job: JobId,
        /// Why.
        error: ErrorBody,
    },
    /// The end of a job that runs.
    Abort {
        /// The job.
        job: JobId,
        /// Why.
        error: ErrorBody,
    },
    /// Find out what a load needs and what the devices have; fetch its model's files before, if need be.
    Plan {
        /// The load.
        load: LoadKey,
    },
    /// Nobody waits for a load that is being planned any more: a download for it may stop.
    Abandon {
        /// The load.
        load: LoadKey,
    },
    /// Load a model here.
    Load {
        /// The load.
        load: LoadKey,
        /// On which hive.
        hive: HiveId,
        /// On which of its devices.
        device: DeviceId,
        /// How long it stays when nobody uses it.
        keep_alive: KeepAlive,
    },
    /// End a worker that nobody uses.
    Unload {
        /// The worker.
        worker: WorkerId,
        /// Its hive.
        hive: HiveId,
        /// A sentence for logs.
        why: String,
    },
    /// The end of a job that wanted a model loaded.
    Loaded {
        /// The job.
        job: JobId,
        /// The worker that serves it.
        worker: LoadedView,
    },
    /// The worker is gone.
    Forget {
        /// The worker.
        worker: WorkerId,
    },
    /// Why the load that a job waits for goes as it goes: a line of the job's trail.
    Decided {
        /// The job.
        job: JobId,
        /// `place`, `evict` or `wait`.
        what: &'static str,
        /// A sentence.
        why: String,
    },
    /// Something its owner should know.
    Note {
        /// The job.
        job: JobId,
        /// A sentence.
        text: String,
    },
    /// The heartbeat was of a life that has ended.
    RefuseBeat,
}
