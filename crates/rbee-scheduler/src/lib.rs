//! The queen's brain: events in, effects out.
//!
//! Pure: time is an argument, and whatever is to be done is an [`Effect`] that the queen's one loop carries out. A test
//! is a script, a simulation the same code on another clock. Start reading at [`Scheduler::handle`]; [`registry`] has
//! what heartbeats mean, [`policy`] which worker gets a job.
//!
//! Invariants
//! - Every submitted job ends in exactly one of `Reject`, `Abort`, `Ended` or `Cancel`.
//! - A worker never has more dispatches than slots.
//! - No more jobs wait than the limit says.
//! - While two owners' jobs wait for the same slots, the next goes to the one who has fewer running.

pub mod policy;
pub mod registry;

mod scheduler;

use std::time::Duration;

use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::worker::{LoadProgress, WorkerHeartbeat};
use rbee_wire::{DeviceSpec, ErrorBody, HiveId, JobId, KeyId, ModelRef, WorkerId};

pub use policy::Policy;
pub use scheduler::Scheduler;

/// How the scheduler decides.
#[derive(Clone, Debug)]
pub struct Config {
    /// Jobs that may wait, for a worker or for a load.
    pub queue_limit: usize,
    /// Longest wait for a busy worker.
    pub queue_timeout: Duration,
    /// The model when none is named.
    pub default_model: Option<ModelRef>,
    /// Which worker gets a job.
    pub policy: Policy,
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
    /// A load that was asked for has ended.
    LoadDone {
        /// Of this model.
        model: ModelRef,
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
        /// Jobs before it.
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
    /// Load a model.
    Load {
        /// The model.
        model: ModelRef,
        /// Where.
        device: DeviceSpec,
        /// On which hive; any unless given.
        hive: Option<HiveId>,
    },
    /// The worker is gone.
    Forget {
        /// The worker.
        worker: WorkerId,
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
