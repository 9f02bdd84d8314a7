//! Typed results: what `data` events and the queen's own endpoints carry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ErrorBody;
use crate::event::{Timings, Usage};
use crate::hive::{Device, Download, Process};
use crate::ids::{DeviceId, HiveId, Incarnation, JobId, KeyId, WorkerId};
use crate::keep_alive::KeepAlive;
use crate::model::ModelRef;
use crate::op::Operation;
use crate::worker::{LoadOptions, LoadProgress, UsedOf, WorkerMemory, WorkerState};

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
    /// Milliseconds until it is unloaded if nobody uses it; absent while it is in use or stays for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unload_ms: Option<u64>,
    /// How long it stays when nobody uses it.
    #[serde(default)]
    pub keep_alive: KeepAlive,
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
    /// Models that it can load without a download.
    #[serde(default)]
    pub models: Vec<ModelRef>,
    /// Models that it fetches.
    #[serde(default)]
    pub downloads: Vec<Download>,
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

/// What a load needs on a device, in bytes, from the model's own headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LoadNeeds {
    /// Weights.
    pub weights: u64,
    /// KV of one token.
    pub kv_per_token: u64,
    /// KV in all: a whole context for each slot.
    pub kv: u64,
    /// Working memory of a step, and the process itself.
    pub scratch: u64,
    /// All of it.
    pub total: u64,
    /// All of it with KV for one sequence of the whole context: with less the model cannot be used as asked.
    pub least: u64,
    /// Most tokens of one sequence.
    pub context: u64,
}

/// Memory that a worker has on a device, or is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Held {
    /// The worker.
    pub worker_id: WorkerId,
    /// Its model.
    pub model: ModelRef,
    /// Bytes that are free when it is gone.
    pub bytes: u64,
}

/// A way to load a model that fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WouldFit {
    /// How it is loaded.
    pub load: LoadOptions,
    /// Bytes that it needs then.
    pub needed: u64,
    /// The flags that ask for it.
    pub flags: String,
}

/// A device as a load finds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Room {
    /// The device.
    pub device: DeviceId,
    /// Bytes of memory in all.
    pub total: u64,
    /// Bytes that a load may take: free as measured, less what is reserved and not yet in use.
    pub free: u64,
    /// What the load needs there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs: Option<LoadNeeds>,
    /// Most tokens of one sequence that fit into what is free, if any do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_fits: Option<u64>,
    /// Why the model cannot be loaded there, whatever is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Where it does not fit: other ways to load it that do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub would_fit: Vec<WouldFit>,
    /// What workers have there.
    #[serde(default)]
    pub held: Vec<Held>,
}

impl Room {
    /// Whether the load fits into what is free.
    pub fn fits(&self) -> bool {
        self.needs.is_some_and(|needs| needs.least <= self.free)
    }
}

/// What a load of a model would need, and what is there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlanView {
    /// The model.
    pub model: ModelRef,
    /// The hive.
    pub hive_id: HiveId,
    /// Its devices that may be used for it, the best first.
    pub rooms: Vec<Room>,
}

/// A file of a model in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StoredFile {
    /// Its path in the repository.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// A model of a hive's store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StoredView {
    /// The name that loads it.
    pub id: String,
    /// The hive.
    pub hive_id: HiveId,
    /// The commit that the files are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Bytes that it has for itself on the disk.
    pub bytes: u64,
    /// Whether every file that a load needs is there.
    pub complete: bool,
    /// Milliseconds since it was last used, where the file system says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_ms: Option<u64>,
    /// Where it lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its files; only where one model is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<StoredFile>,
    /// The workers of this hive that have it loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkerId>,
}

/// What `model_load` and `model_unload` did to a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LoadedView {
    /// The worker.
    pub worker_id: WorkerId,
    /// Its hive.
    pub hive_id: HiveId,
    /// Its model.
    pub model: ModelRef,
    /// Its device.
    pub device: DeviceId,
}

/// The embedding of one text. An embedding model pools as its folder declares; of all others it is the mean of the hidden states over the
/// text's tokens, of length 1.
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
