//! What a hive says: its heartbeat, its devices, its processes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ErrorBody;
use crate::ids::{DeviceId, HiveId, Incarnation, WorkerId};
use crate::model::ModelRef;
use crate::worker::LoadProgress;

/// The kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The machine's processors and memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// A device of a hive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// `cpu`, `cuda:0`.
    pub id: DeviceId,
    /// As its maker calls it.
    pub name: String,
    /// Its kind.
    pub kind: DeviceKind,
    /// Bytes of memory in all.
    pub memory_total: u64,
    /// Bytes of memory free now.
    pub memory_free: u64,
    /// A GPU's own id, which does not hang on the order of the devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// As `9.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_capability: Option<String>,
    /// From 0 to 1, where it can be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utilisation: Option<f64>,
    /// Why no worker can use it, if none can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
}

/// A worker process as its hive sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// Started, not heard of yet.
    Spawning,
    /// Its server is up, its model is not.
    Loading,
    /// It serves.
    Ready,
    /// It finishes what it has.
    Draining,
    /// It waits to be started again.
    Backoff,
    /// It is gone.
    Exited,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProcessExit {
    /// Exit code, when it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// Signal, when one ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// `retired`, `failed`, `killed`, `stalled`, `load_timeout`, …
    pub reason: String,
    /// The error it ended with, if it said one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// The end of its stderr, at most 4 KiB, control characters escaped.
    #[serde(default)]
    pub stderr_tail: String,
}

/// One worker process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Process {
    /// Its process id; 0 while none runs.
    pub pid: u32,
    /// The worker it is.
    pub worker_id: WorkerId,
    /// Its life.
    pub incarnation: Incarnation,
    /// The model.
    pub model: ModelRef,
    /// The device.
    pub device: DeviceId,
    /// Its state.
    pub state: ProcessState,
    /// How far the load is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadProgress>,
    /// Milliseconds in this state.
    pub since_ms: u64,
    /// Times it was started again.
    pub restarts: u32,
    /// How the last one ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<ProcessExit>,
    /// Bytes reserved for it on the device.
    #[serde(default)]
    pub reserved: u64,
    /// Where it serves, once it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// A model that is being fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Download {
    /// The model.
    pub model: ModelRef,
    /// Bytes that are there.
    pub done: u64,
    /// Bytes in all; 0 until they are known.
    pub total: u64,
    /// Bytes that come in a second.
    pub bytes_per_s: u64,
}

/// A hive's full state, sent to the queen every second and at once when a process ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HiveHeartbeat {
    /// The protocol's version.
    pub protocol: u32,
    /// The hive.
    pub hive_id: HiveId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Rises with each heartbeat of one life.
    pub seq: u64,
    /// Where it serves.
    pub url: String,
    /// Its devices.
    pub devices: Vec<Device>,
    /// Models that it can load without a download.
    #[serde(default)]
    pub models: Vec<ModelRef>,
    /// Models that it fetches.
    #[serde(default)]
    pub downloads: Vec<Download>,
    /// Its worker processes, those that just ended included.
    #[serde(default)]
    pub processes: Vec<Process>,
    /// Its release.
    pub version: String,
    /// Its build.
    pub build: String,
}
