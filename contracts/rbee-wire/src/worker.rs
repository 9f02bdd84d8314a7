//! What a worker says and hears: its heartbeat, its control pipe, its inference request.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::body::parse_object;
use crate::error::{ErrorBody, ErrorCode};
use crate::fields;
use crate::ids::{DeviceId, HiveId, Incarnation, JobId, RequestId, TraceParent, WorkerId};
use crate::job::{Generation, check_infer, invalid};
use crate::keep_alive::KeepAlive;
use crate::key::Tenant;
use crate::model::ModelRef;
use crate::op::INFER_FIELDS;

/// A worker's life as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Its process is up, its model is not.
    Starting,
    /// A request sent now would be served.
    Ready,
    /// All slots are taken.
    Busy,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// It is gone; deregisters.
    Stopped,
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LoadProgress {
    /// `download`, `start`, `load`, `warm_up`.
    pub stage: String,
    /// How much is done.
    pub done: u64,
    /// Of how much; 0 when unknown.
    pub total: u64,
    /// Of what: `bytes`, `steps`.
    pub unit: String,
}

/// Bytes on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerMemory {
    /// Weights.
    pub weights: u64,
    /// KV cache.
    pub kv: u64,
    /// All of the process.
    pub total: u64,
}

/// Something of which some is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UsedOf {
    /// All of it.
    pub total: u64,
    /// The part in use.
    pub used: u64,
}

/// A worker's full state, sent to the queen every 500 ms and at once on a change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerHeartbeat {
    /// The protocol's version.
    pub protocol: u32,
    /// The worker.
    pub worker_id: WorkerId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Rises with each heartbeat of one life.
    pub seq: u64,
    /// Its hive.
    pub hive_id: HiveId,
    /// Where it serves.
    pub url: String,
    /// The bearer that its routes ask for.
    pub bearer: String,
    /// Its state.
    pub state: WorkerState,
    /// While it loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadProgress>,
    /// The model, in canonical form.
    pub model: ModelRef,
    /// Digest of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Its device.
    pub device: DeviceId,
    /// Bytes on the device.
    #[serde(default)]
    pub memory: WorkerMemory,
    /// Requests it generates for at once.
    #[serde(default)]
    pub slots: UsedOf,
    /// Requests that wait in it.
    #[serde(default)]
    pub queue: u64,
    /// KV blocks.
    #[serde(default)]
    pub kv_blocks: UsedOf,
    /// Sequences that had to give their KV up to others, since the start.
    #[serde(default)]
    pub preemptions: u64,
    /// Units of compute finished; advances per layer.
    #[serde(default)]
    pub steps: u64,
    /// Whether compute has work now.
    #[serde(default)]
    pub working: bool,
    /// Two workers of the same numerics id give the same tokens bit for bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics_id: Option<String>,
    /// Whether a row's bits depend on that row alone.
    #[serde(default)]
    pub row_invariant: bool,
    /// Tokens a second in prefill, as lately measured.
    #[serde(default)]
    pub prefill_rate: f64,
    /// Tokens a second in decode, as lately measured.
    #[serde(default)]
    pub decode_rate: f64,
    /// Most tokens of one sequence.
    #[serde(default)]
    pub context: u64,
    /// How long it stays when nobody uses it, as it was started.
    #[serde(default)]
    pub keep_alive: KeepAlive,
    /// What it can do beside text: none yet.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// Its release.
    pub version: String,
    /// Its build.
    pub build: String,
}

/// The queen's answer to a heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HeartbeatReply {
    /// Send the full state again at once.
    #[serde(default)]
    pub resync: bool,
}

/// What the queen sends to a worker's `/v1/inference`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InferenceRequest {
    /// The queen's job.
    pub job_id: JobId,
    /// The request's label in logs.
    pub request_id: RequestId,
    /// The trace it belongs to, if its caller has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<TraceParent>,
    /// What to generate. `seed` is set.
    pub generation: Generation,
    /// Go on exactly there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    /// Whose cached prompts it may find; those of requests without one unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub tenant: Option<Tenant>,
    /// Send the events over this channel, which is open already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<ChannelSeat>,
}

impl InferenceRequest {
    /// Reads a posted body and validates what to generate as the job was validated, so that no number which a queen would refuse
    /// reaches an engine. Fields that are not known here are a newer queen's.
    ///
    /// # Errors
    /// `INVALID_REQUEST`, with every violation of `generation`.
    pub fn parse(bytes: &[u8]) -> Result<Self, ErrorBody> {
        let wrong = |problem| {
            ErrorBody::new(ErrorCode::InvalidRequest, format!("the body is not an inference request: {problem}"))
        };
        let mut body = parse_object(bytes).map_err(wrong)?;
        // A list in place of an object would be taken for its fields in order.
        let Some(Value::Object(generation)) = body.get_mut("generation") else {
            return Err(wrong("`generation` must be an object".into()));
        };
        generation.retain(|name, _| INFER_FIELDS.iter().any(|field| field.name == name));
        let mut found = fields::check(generation, INFER_FIELDS);
        check_infer(generation, &mut found);
        if !found.is_empty() {
            return Err(invalid(found));
        }
        serde_json::from_value(Value::Object(body)).map_err(|error| wrong(error.to_string()))
    }
}

/// A stream of a channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChannelSeat {
    /// The channel.
    pub id: String,
    /// The number that its lines begin with; never used twice.
    pub stream: u64,
}

/// Where an answer goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Resume {
    /// The tokens that were generated before.
    pub tokens: Vec<u32>,
    /// The numerics id they were generated under.
    pub numerics_id: String,
}

/// The answer of `/v1/ready`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ReadyReply {
    /// Whether a request sent now would be served.
    pub ready: bool,
    /// The worker's state.
    pub state: WorkerState,
    /// Its model.
    pub model: ModelRef,
    /// While it loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<LoadProgress>,
}

/// How a model is loaded; what is not given is the worker's choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LoadOptions {
    /// Context length in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctx: Option<u32>,
    /// Requests generated for at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
    /// Compute threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Type of the KV cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_type: Option<String>,
    /// Keep the weights with fewer bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
}

impl LoadOptions {
    /// Whether a load with `other` is what these ask for.
    pub fn met_by(&self, other: &Self) -> bool {
        fn met<T: PartialEq>(asked: &Option<T>, other: &Option<T>) -> bool {
            asked.is_none() || asked == other
        }
        met(&self.ctx, &other.ctx)
            && met(&self.slots, &other.slots)
            && met(&self.threads, &other.threads)
            && met(&self.kv_type, &other.kv_type)
            && met(&self.quantize, &other.quantize)
    }
}

/// First line down the control pipe: what the worker is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerCharge {
    /// Proves to the hive that the answer comes from this child.
    pub nonce: String,
    /// The worker.
    pub worker_id: WorkerId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Its hive.
    pub hive_id: HiveId,
    /// The bearer that its routes ask for.
    pub bearer: String,
    /// Where heartbeats go.
    pub queen_url: String,
    /// The bearer that the queen asks for, where it asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queen_token: Option<String>,
    /// The model, in canonical form.
    pub model: ModelRef,
    /// The device.
    pub device: DeviceId,
    /// A GPU's own id: where it is given, the device's number is not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_uuid: Option<String>,
    /// Where the model's files lie, when that is not what its name says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A folder by which workers of one machine share its cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<String>,
    /// How long it stays when nobody uses it; the queen sees to it.
    #[serde(default)]
    pub keep_alive: KeepAlive,
    /// How the model is loaded.
    #[serde(flatten)]
    pub load: LoadOptions,
    /// Bytes of KV that are reserved for it, where that is less than a whole context for each slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<u64>,
}

/// Lines down the control pipe after the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ControlDown {
    /// What the worker is to be; once, first.
    Charge(Box<WorkerCharge>),
    /// Finish what runs, take nothing new, then exit.
    Drain {
        /// Most milliseconds to take.
        grace_ms: u64,
    },
}

/// Lines up the control pipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ControlUp {
    /// The server is up; the model is not.
    Listening {
        /// The port the system gave.
        port: u16,
        /// The charge's nonce.
        nonce: String,
    },
    /// The load moves on.
    Loading {
        /// How far it is.
        progress: LoadProgress,
    },
    /// A warm-up step has run; requests are served.
    Ready {
        /// Bytes on the device.
        memory: WorkerMemory,
    },
    /// Every 500 ms.
    Beat {
        /// Units of compute finished.
        steps: u64,
        /// Whether compute has work now.
        working: bool,
    },
    /// The worker ends with this error.
    Failed {
        /// Why.
        error: ErrorBody,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_engine_sees_what_a_queen_would_refuse_and_what_a_newer_queen_adds_is_ignored() {
        let parse = |generation: &str| {
            let body = format!(r#"{{"job_id":"j","request_id":"r","newer":1,"generation":{generation}}}"#);
            InferenceRequest::parse(body.as_bytes())
        };
        let good = parse(r#"{"prompt":"a","n":2,"min_p":0.1,"stop":["x"],"newer":{"a":1}}"#).unwrap();
        assert_eq!((good.generation.n, good.generation.min_p), (Some(2), Some(0.1)));
        for (generation, field) in [
            (r#"{"prompt":"a","n":2147483648}"#, "n"),
            (r#"{"prompt":"a","n":18446744073709551616}"#, "n"),
            (r#"{"prompt":"a","min_tokens":5}"#, "min_tokens"),
            (r#"{"prompt":"a","logit_bias":{"1":101}}"#, "logit_bias"),
            (r#"{"n":1}"#, "prompt"),
        ] {
            let details = parse(generation).unwrap_err().details.unwrap();
            assert_eq!(details["violations"][0]["field"], field, "{generation}: {details}");
        }
        assert!(parse(r#"{"prompt":"a","prompt":"b"}"#).unwrap_err().message.contains("twice"));
        assert!(parse("[]").is_err());
    }
}
