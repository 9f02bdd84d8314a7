//! Typed results: what `data` events and the queen's own endpoints carry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ErrorBody;
use crate::event::{Timings, Usage};
use crate::hive::{Device, Process};
use crate::ids::{DeviceId, HiveId, Incarnation, JobId, KeyId, WorkerId};
use crate::model::ModelRef;
use crate::op::Operation;
use crate::worker::{LoadProgress, UsedOf, WorkerMemory, WorkerState};

/// One active worker as the queen sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerView {
    /// The worker.
    pub worker_id: WorkerId,
    /// Its hive.
    pub hive_id: HiveId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Its model.
    pub model: ModelRef,
    /// Its device.
    pub device: DeviceId,
    /// Its state.
    pub state: WorkerState,
    /// While it loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadProgress>,
    /// Slots, the queen's own dispatches counted.
    pub slots: UsedOf,
    /// Requests that wait in it.
    pub queue: u64,
    /// KV blocks.
    pub kv_blocks: UsedOf,
    /// Sequences that had to give their KV up to others, since its start.
    #[serde(default)]
    pub preemptions: u64,
    /// Bytes on the device.
    pub memory: WorkerMemory,
    /// Most tokens of one sequence.
    pub context: u64,
    /// Where it serves.
    pub url: String,
    /// Milliseconds since its last heartbeat.
    pub age_ms: u64,
    /// Same id, same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics_id: Option<String>,
    /// Tokens a second in prefill.
    pub prefill_rate: f64,
    /// Tokens a second in decode.
    pub decode_rate: f64,
    /// Its release.
    pub version: String,
}

/// One hive as the queen sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HiveView {
    /// The hive.
    pub hive_id: HiveId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Where it serves.
    pub url: String,
    /// Whether its lease holds.
    pub alive: bool,
    /// Milliseconds since its last heartbeat.
    pub age_ms: u64,
    /// Its devices.
    pub devices: Vec<Device>,
    /// Its worker processes.
    pub processes: Vec<Process>,
    /// Its release.
    pub version: String,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It waits for a worker.
    Queued,
    /// It waits for its model to load.
    Loading,
    /// It runs.
    Running,
    /// It ended well.
    Done,
    /// Somebody cancelled it.
    Cancelled,
    /// It ended with an error.
    Failed,
}

/// One step of a job's way, for `rbee explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Decision {
    /// Milliseconds after the post.
    pub at_ms: u64,
    /// What was decided: `accepted`, `queued`, `load`, `dispatch`, `retry`, `end`, …
    pub what: String,
    /// Why, in words that name workers and numbers.
    pub why: String,
}

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct JobView {
    /// The job.
    pub job_id: JobId,
    /// What it does.
    pub operation: Operation,
    /// The key it was posted with, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<KeyId>,
    /// Where it is.
    pub state: JobState,
    /// The model, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelRef>,
    /// The worker, once dispatched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<WorkerId>,
    /// Milliseconds since the post.
    pub age_ms: u64,
    /// Events in its log.
    pub events: u64,
    /// Tokens so far.
    pub tokens: u64,
    /// Listeners now.
    pub listeners: u64,
    /// Tokens in and out, at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Where the time went, at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// The decisions on its way; only where one job is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trail: Vec<Decision>,
}

/// A list of jobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct JobList {
    /// Newest first.
    pub jobs: Vec<JobView>,
}

/// The queen in a nutshell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatusView {
    /// The queen.
    pub queen: InfoReply,
    /// Its hives.
    pub hives: Vec<HiveView>,
    /// Active workers.
    pub workers: Vec<WorkerView>,
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that run.
    pub running: u64,
}

/// What `worker_spawn` did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SpawnView {
    /// Whether it was there.
    pub outcome: SpawnOutcome,
    /// The worker.
    pub worker_id: WorkerId,
    /// Its hive.
    pub hive_id: HiveId,
    /// Its model.
    pub model: ModelRef,
    /// Its device.
    pub device: DeviceId,
    /// Its process.
    pub pid: u32,
}

/// The embedding of one text: the mean of the model's hidden states over its tokens, of length 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Embedding {
    /// Its place in `embed`, from 0.
    pub index: u32,
    /// The values as little-endian f32, in base64.
    pub embedding: String,
}

/// Whether a worker was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpawnOutcome {
    /// It served already, or was on its way.
    Existing,
    /// It was started.
    Started,
}

/// One worker binary of a hive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BinaryView {
    /// `cpu`, `cuda`, `sim`.
    pub worker_type: String,
    /// Where it lies.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Its release and build, as it says itself.
    pub version: String,
    /// Kinds of device it computes on.
    pub devices: Vec<String>,
}

/// What a daemon says of itself at `/v1/info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InfoReply {
    /// `queen-rbee`, `rbee-hive`, `llm-worker-rbee`.
    pub program: String,
    /// Its release.
    pub version: String,
    /// Its build: differs between any two builds.
    pub build: String,
    /// The protocol's version.
    pub protocol: u32,
    /// Its process.
    pub pid: u32,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Its life.
    pub incarnation: Incarnation,
    /// SHA-256 in hexadecimal of the nonce in its home's `run/` folder: shows that it is this home's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home_proof: Option<String>,
    /// Optional parts of this build.
    #[serde(default)]
    pub features: Vec<String>,
}

/// The answer of `/ready`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DaemonReady {
    /// Whether a request sent now would be taken.
    pub ready: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
