//! Jobs: what is posted to `/v1/jobs`, and the one validator of it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::body::parse_object;
use crate::error::{ErrorBody, ErrorCode};
use crate::fields::{self, Violation};
use crate::form::{self, ResponseFormat};
use crate::ids::{HiveId, JobId, KeyId, WorkerId};
use crate::keep_alive::KeepAlive;
use crate::key::KeyCreate;
use crate::model::{DeviceSpec, ModelRef};
use crate::op::{OPERATIONS, Operation, Target};
use crate::worker::LoadOptions;

/// A job as it is posted: the operation's name and its fields, flat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub enum JobRequest {
    /// What the queen sees.
    Status {},
    /// Generates text.
    Infer(Box<Infer>),
    /// Lists active workers.
    ActiveWorkerList {},
    /// Shows one active worker.
    ActiveWorkerGet(OfWorker),
    /// Retires one active worker.
    ActiveWorkerRetire(OfWorker),
    /// Lists the hives.
    HiveList {},
    /// Shows one hive.
    HiveGet(OfHost),
    /// Whether a hive answers.
    HiveStatus(OfHost),
    /// Starts a hive.
    HiveStart(OfHost),
    /// Stops a hive.
    HiveStop(OfHost),
    /// Installs a hive.
    HiveInstall(OfHost),
    /// Removes a hive.
    HiveUninstall(OfHost),
    /// Makes a hive look for devices.
    HiveRefreshCapabilities(OfHost),
    /// Takes hosts from the ssh config.
    HiveImportSsh {
        /// The config file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ssh_config_path: Option<String>,
    },
    /// Tests the ssh connection.
    SshTest(OfHost),
    /// Makes sure a worker serves a model.
    WorkerSpawn(WorkerSpawn),
    /// Lists worker processes.
    WorkerProcessList(OnHive),
    /// Shows one worker process.
    WorkerProcessGet(OfProcess),
    /// Ends one worker process.
    WorkerProcessDelete(OfProcess),
    /// Lists worker binaries.
    WorkerBinaryList(OnHive),
    /// Shows one worker binary.
    WorkerBinaryGet(OfBinary),
    /// Removes a worker binary.
    WorkerBinaryDelete(OfBinary),
    /// Fetches a worker binary.
    WorkerDownload(OfBinary),
    /// Builds a worker binary.
    WorkerBuild(OfBinary),
    /// Fetches a model.
    ModelDownload(OfModel),
    /// Lists the store.
    ModelList(OnHive),
    /// Shows a model of the store.
    ModelGet(OfStored),
    /// Removes a model of the store.
    ModelDelete(OfStored),
    /// What a load would need, and what is there.
    ModelPlan(ModelPlan),
    /// Loads a model where it fits.
    ModelLoad(ModelLoad),
    /// Unloads a model.
    ModelUnload(ModelUnload),
    /// Takes files of this machine into the store.
    ModelImport(ModelImport),
    /// Makes a key.
    KeyCreate(KeyCreate),
    /// Lists the keys.
    KeyList {},
    /// Revokes a key.
    KeyRevoke(OfKey),
}

/// The hive an operation is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OnHive {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfWorker {
    /// The worker.
    pub worker_id: WorkerId,
}

/// One hive by its alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfHost {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub alias: HiveId,
}

/// One process of a hive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfProcess {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// A key into the hive's own table, never a process to signal by itself.
    pub pid: u32,
}

/// One worker binary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfBinary {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// `cpu`, `cuda`, `sim`.
    pub worker_type: String,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfModel {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// The model.
    pub model: ModelRef,
}

/// One model of the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfStored {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// Its id in the store.
    pub id: String,
}

/// One key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OfKey {
    /// The key.
    pub key_id: KeyId,
}

/// Makes sure a worker serves a model: an idempotent reservation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerSpawn {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// The model to load.
    pub model: ModelRef,
    /// Where.
    #[serde(default)]
    pub device: DeviceSpec,
    /// How many workers shall serve the model on this device in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// How it is loaded.
    #[serde(flatten)]
    pub load: LoadOptions,
    /// Whether the job ends when the worker is ready, which is the default, or when it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<bool>,
    /// How long it stays when nobody uses it; until it is retired unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
}

/// A model on a device, as it would be loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelPlan {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// The model.
    pub model: ModelRef,
    /// Where.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Fetch the model before, if it is not there.
    #[serde(default)]
    pub fetch: bool,
    /// How it would be loaded.
    #[serde(flatten)]
    pub load: LoadOptions,
}

/// A model that is to be loaded where it fits, or unloaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelLoad {
    /// The model.
    pub model: ModelRef,
    /// Where; anywhere unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceSpec>,
    /// On which hive; any unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hive_id: Option<HiveId>,
    /// How long it stays when nobody uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
}

/// A model that is to be unloaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelUnload {
    /// The model.
    pub model: ModelRef,
}

/// Files of this machine that are to become a model of the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelImport {
    /// `localhost` unless given.
    #[serde(default = "HiveId::localhost")]
    pub hive_id: HiveId,
    /// A folder or a `.gguf` file by its absolute path.
    pub model: ModelRef,
    /// The name it gets, `org/name`.
    pub id: String,
}

/// One message of a chat.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text; markers of the model's template in it are text, never control.
    pub content: String,
    /// An assistant's reasoning; whether the model sees it again is its template's affair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// What an assistant called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The tool whose message it is, or who speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// A message of one role and text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }
}

/// A call of a function by the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ToolCall {
    /// Its name in the tool's answer.
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What was called.
    pub function: CalledFunction,
}

/// A function with its arguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CalledFunction {
    /// Its name.
    pub name: String,
    /// JSON, as a text.
    pub arguments: String,
}

/// A text for the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Input {
    /// As letters.
    Text(String),
    /// As ids of the model's own vocabulary, which are taken as they stand.
    Tokens(Vec<u32>),
}

impl From<String> for Input {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// What shapes the generated text; the same for every surface and for the worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generation {
    /// The text to go on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<Input>,
    /// The chat to answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// What to embed, instead of generating.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub embed: Vec<Input>,
    /// Most tokens to generate; what the context leaves unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// Tokens before an end-of-text token may come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<u64>,
    /// 0 takes the likeliest token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// 0 is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u64>,
    /// Drop tokens below this share of the likeliest one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides the logits of tokens seen before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Lowers a token by how often it was generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Lowers a token once it was generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Added to the logits of these token ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "bias_by_id")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Texts that end the output.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "one_or_many")]
    pub stop: Vec<String>,
    /// The draw's seed. The queen fills it in before the dispatch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Send log-probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<bool>,
    /// Send that many of the likeliest tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<u8>,
    /// How many answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// Go on after an end-of-text token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// The form the answer must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// Functions the model may call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
    /// Whether functions are called: `auto`, `none`, `required`, or the one that must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<Value>,
    /// Whether an answer may have several calls, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel_tool_calls: Option<bool>,
    /// Variables for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// No chat template; the default for `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<bool>,
}

impl Generation {
    /// The prompt, where it is given as letters.
    pub fn prompt_text(&self) -> Option<&str> {
        match &self.prompt {
            Some(Input::Text(text)) => Some(text),
            Some(Input::Tokens(_)) | None => None,
        }
    }
}

/// A job that generates text: what to generate, and who may do it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Infer {
    /// The model; the default one unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelRef>,
    /// What shapes the text.
    #[serde(flatten)]
    pub generation: Generation,
    /// Only workers on this device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceSpec>,
    /// Only this worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<WorkerId>,
    /// Only workers of this hive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hive_id: Option<HiveId>,
    /// How long the model stays loaded afterwards; as before unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
    /// Most milliseconds from the post to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Go on when nobody listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detach: Option<bool>,
    /// Do not load the model when no worker serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_load: Option<bool>,
    /// Changes nothing in a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
}

/// A flattened map's keys arrive as texts.
fn bias_by_id<'de, D: serde::Deserializer<'de>>(de: D) -> Result<BTreeMap<u32, f32>, D::Error> {
    let texts = Option::<BTreeMap<String, f32>>::deserialize(de)?.unwrap_or_default();
    let by_id = texts.into_iter().map(|(id, bias)| id.parse().map(|id| (id, bias)));
    by_id.collect::<Result<_, _>>().map_err(serde::de::Error::custom)
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(de: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stop {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Option::<Stop>::deserialize(de)? {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Many(texts)) => texts,
    })
}

/// The answer to a posted job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct JobAccepted {
    /// The job.
    pub job_id: JobId,
    /// Where its stream is, a path beginning with `/`.
    pub sse_url: String,
}

impl JobRequest {
    /// Reads and validates a posted body.
    ///
    /// # Errors
    /// `INVALID_REQUEST` with every violation in `details.violations`, or `UNKNOWN_OPERATION`.
    pub fn parse(bytes: &[u8]) -> Result<Self, ErrorBody> {
        Self::from_object(parse_object(bytes).map_err(|problem| ErrorBody::new(ErrorCode::InvalidRequest, problem))?)
    }

    /// Validates a body that is an object already.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn from_object(mut map: Map<String, Value>) -> Result<Self, ErrorBody> {
        let name = match map.get("operation") {
            Some(Value::String(name)) => name.clone(),
            _ => {
                return Err(invalid(vec![violation("operation", "must name an operation")]));
            }
        };
        let Some(row) = Operation::by_name(&name) else {
            let shown: String = name.chars().take(64).collect();
            return Err(ErrorBody::new(
                ErrorCode::UnknownOperation,
                format!("`{}` is not an operation", shown.escape_debug()),
            )
            .with_details(json!({ "operations": OPERATIONS.iter().map(|row| row.name).collect::<Vec<_>>() })));
        };
        map.remove("operation");
        let mut found = fields::check(&map, row.fields);
        match row.op {
            Operation::Infer => check_infer(&map, &mut found),
            Operation::WorkerSpawn => join_worker_and_device(&mut map, &mut found),
            _ => {}
        }
        if !found.is_empty() {
            return Err(invalid(found));
        }
        map.retain(|_, value| !value.is_null());
        map.insert("operation".into(), Value::String(name));
        serde_json::from_value(Value::Object(map))
            .map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, format!("the request is invalid: {error}")))
    }

    /// Which operation this is.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Status {} => Operation::Status,
            Self::Infer(_) => Operation::Infer,
            Self::ActiveWorkerList {} => Operation::ActiveWorkerList,
            Self::ActiveWorkerGet(_) => Operation::ActiveWorkerGet,
            Self::ActiveWorkerRetire(_) => Operation::ActiveWorkerRetire,
            Self::HiveList {} => Operation::HiveList,
            Self::HiveGet(_) => Operation::HiveGet,
            Self::HiveStatus(_) => Operation::HiveStatus,
            Self::HiveStart(_) => Operation::HiveStart,
            Self::HiveStop(_) => Operation::HiveStop,
            Self::HiveInstall(_) => Operation::HiveInstall,
            Self::HiveUninstall(_) => Operation::HiveUninstall,
            Self::HiveRefreshCapabilities(_) => Operation::HiveRefreshCapabilities,
            Self::HiveImportSsh { .. } => Operation::HiveImportSsh,
            Self::SshTest(_) => Operation::SshTest,
            Self::WorkerSpawn(_) => Operation::WorkerSpawn,
            Self::WorkerProcessList(_) => Operation::WorkerProcessList,
            Self::WorkerProcessGet(_) => Operation::WorkerProcessGet,
            Self::WorkerProcessDelete(_) => Operation::WorkerProcessDelete,
            Self::WorkerBinaryList(_) => Operation::WorkerBinaryList,
            Self::WorkerBinaryGet(_) => Operation::WorkerBinaryGet,
            Self::WorkerBinaryDelete(_) => Operation::WorkerBinaryDelete,
            Self::WorkerDownload(_) => Operation::WorkerDownload,
            Self::WorkerBuild(_) => Operation::WorkerBuild,
            Self::ModelDownload(_) => Operation::ModelDownload,
            Self::ModelList(_) => Operation::ModelList,
            Self::ModelGet(_) => Operation::ModelGet,
            Self::ModelDelete(_) => Operation::ModelDelete,
            Self::ModelPlan(_) => Operation::ModelPlan,
            Self::ModelLoad(_) => Operation::ModelLoad,
            Self::ModelUnload(_) => Operation::ModelUnload,
            Self::ModelImport(_) => Operation::ModelImport,
            Self::KeyCreate(_) => Operation::KeyCreate,
            Self::KeyList {} => Operation::KeyList,
            Self::KeyRevoke(_) => Operation::KeyRevoke,
        }
    }

    /// The hive a hive's operation is for; `None` for the queen's own.
    pub fn hive_id(&self) -> Option<&HiveId> {
        let hive_id = match self {
            Self::WorkerSpawn(x) => &x.hive_id,
            Self::WorkerProcessList(x) | Self::WorkerBinaryList(x) | Self::ModelList(x) => &x.hive_id,
            Self::WorkerProcessGet(x) | Self::WorkerProcessDelete(x) => &x.hive_id,
            Self::WorkerBinaryGet(x) | Self::WorkerBinaryDelete(x) | Self::WorkerDownload(x) | Self::WorkerBuild(x) => {
                &x.hive_id
            }
            Self::ModelDownload(x) => &x.hive_id,
            Self::ModelPlan(x) => &x.hive_id,
            Self::ModelImport(x) => &x.hive_id,
            Self::ModelGet(x) | Self::ModelDelete(x) => &x.hive_id,
            _ => return None,
        };
        debug_assert_eq!(self.operation().row().target, Target::Hive);
        Some(hive_id)
    }
}

/// The refusal that lists what is wrong.
pub fn invalid(violations: Vec<Violation>) -> ErrorBody {
    let list: Vec<String> = violations.iter().map(|v| format!("`{}` {}", v.field, v.problem)).collect();
    ErrorBody::new(ErrorCode::InvalidRequest, format!("the request is invalid: {}", list.join("; ")))
        .with_details(json!({ "violations": violations }))
}

fn violation(field: &str, problem: impl Into<String>) -> Violation {
    Violation { field: field.into(), problem: problem.into() }
}

/// Rules that span several fields of `infer`.
pub fn check_infer(map: &Map<String, Value>, found: &mut Vec<Violation>) {
    let given = |name: &str| map.get(name).is_some_and(|value| !value.is_null());
    match (given("prompt"), given("messages")) {
        (true, true) => found.push(violation("messages", "cannot stand beside `prompt`")),
        (false, false) if !given("embed") => found.push(violation("prompt", "is required, or `messages`")),
        _ => {}
    }
    if given("embed") {
        let may = [
            "operation",
            "embed",
            "model",
            "device",
            "worker_id",
            "hive_id",
            "deadline_ms",
            "detach",
            "no_load",
            "keep_alive",
            "stream",
            "seed",
        ];
        for name in map.keys().filter(|name| given(name) && !may.contains(&name.as_str())) {
            found.push(violation(name, "cannot stand beside `embed`, which generates nothing"));
        }
    }
    if given("messages") && map.get("raw") == Some(&Value::Bool(true)) {
        found.push(violation("raw", "cannot be true with `messages`, which need the chat template"));
    }
    if map.get("prompt").is_some_and(Value::is_array) && map.get("raw") == Some(&Value::Bool(false)) {
        found.push(violation("raw", "cannot be false with token ids, which are taken as they stand"));
    }
    if given("top_logprobs") && map.get("logprobs") != Some(&Value::Bool(true)) {
        found.push(violation("top_logprobs", "needs `logprobs` to be true"));
    }
    if let Some(min) = map.get("min_tokens").and_then(Value::as_u64) {
        match map.get("max_tokens").and_then(Value::as_u64) {
            Some(max) if min > max => found.push(violation("min_tokens", "must not be above `max_tokens`")),
            None if min > 0 => found.push(violation("min_tokens", "needs `max_tokens`")),
            _ => {}
        }
    }
    // As the number that it is sent on as.
    if map.get("top_p").and_then(Value::as_f64).is_some_and(|p| p as f32 == 0.0) {
        found.push(violation("top_p", "must be above 0"));
    }
    if given("tools") && !given("messages") {
        found.push(violation("tools", "needs `messages`"));
    }
    form::check(map, found);
}

/// `worker: "cuda", device: 0` and `device: "cuda:0"` are the same.
fn join_worker_and_device(map: &mut Map<String, Value>, found: &mut Vec<Violation>) {
    let index = match map.get("device") {
        None | Some(Value::Null) => None,
        Some(Value::Number(number)) => Some(number.to_string()),
        Some(Value::String(text)) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => Some(text.clone()),
        Some(Value::String(text)) => {
            if text.parse::<DeviceSpec>().is_err() {
                found.push(violation("device", "must be `auto`, `cpu` or `cuda:N`"));
            }
            if map.get("worker").is_some_and(|worker| !worker.is_null()) {
                found.push(violation("worker", "cannot stand beside a `device` that names its kind"));
            }
            return;
        }
        Some(_) => {
            found.push(violation("device", "must be `auto`, `cpu`, `cuda:N` or an index"));
            return;
        }
    };
    let kind = map.remove("worker").and_then(|worker| worker.as_str().map(str::to_owned));
    let text = match (kind, index) {
        (Some(kind), Some(index)) => format!("{kind}:{index}"),
        (Some(kind), None) => kind,
        (None, Some(_)) => {
            found.push(violation("device", "is an index and needs `worker`"));
            return;
        }
        (None, None) => return,
    };
    match text.parse::<DeviceSpec>() {
        Ok(device) => drop(map.insert("device".into(), Value::String(device.to_string()))),
        Err(error) => found.push(violation("worker", error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields_refused(body: &str) -> Vec<String> {
        let error = JobRequest::parse(body.as_bytes()).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        let violations: Vec<Violation> = serde_json::from_value(error.details.unwrap()["violations"].clone()).unwrap();
        violations.into_iter().map(|v| v.field).collect()
    }

    #[test]
    fn all_violations_are_listed_at_once() {
        assert_eq!(
            fields_refused(
                r#"{"operation":"infer","temperature":-1,"zzz":1,"max_tokens":0,"stop":[""],"n":2147483648}"#
            ),
            ["zzz", "max_tokens", "temperature", "stop", "n", "prompt"]
        );
    }

    #[test]
    fn every_field_of_every_operation_is_refused_when_wrong() {
        use crate::fields::Kind;
        for row in OPERATIONS {
            for field in row.fields {
                let wrong: &[&str] = match field.kind {
                    Kind::Bool => &["1", "\"true\"", "[]"],
                    Kind::Int(..) => &["-1", "1.5", "9223372036854775808000", "\"1\"", "{}"],
                    Kind::Float(..) => &["-3", "11", "\"1\"", "1e300"],
                    Kind::Id => &["1", "\"\"", "\"a\\nb\""],
                    Kind::Text(_) | Kind::Model | Kind::Device => &["1", "[\"a\"]", "{}"],
                    Kind::Texts(_) => &["1", "[1]", "[\"\"]"],
                    Kind::Bias => &["[]", "{\"x\":1}", "{\"1\":101}", "{\"4294967296\":1}", "{\"-1\":1}"],
                    Kind::Messages => &[
                        "[]",
                        "\"hi\"",
                        "[{\"role\":\"king\",\"content\":\"\"}]",
                        "[{\"role\":\"user\"}]",
                        "[{\"role\":\"user\",\"content\":\"\",\"x\":1}]",
                        "[{\"role\":\"user\",\"content\":\"\",\"name\":1}]",
                        "[{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":[{}]}]",
                        "[{\"role\":\"user\",\"content\":\"\",\"tool_calls\":[{\"id\":\"a\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"\"}}]}]",
                        "[{\"role\":\"user\",\"content\":\"\",\"tool_call_id\":\"a\"}]",
                    ],
                    Kind::Hex(_) => &["1", "\"ab\"", "\"zz\""],
                    Kind::Words(_) => &["[]", "\"admin\"", "[\"king\"]"],
                    Kind::Tokens => &["[-1]", "1"],
                    Kind::Prompt => &["1", "[]", "[\"a\"]", "[-1]", "[1.5]", "[4294967296]", "[[1]]", "{}"],
                    Kind::Inputs => &["[]", "\"a\"", "[1]", "[\"\"]", "[[]]", "[[-1]]", "[\"a\",1]"],
                    Kind::Object => &["1", "[]"],
                    Kind::Tools => &[
                        "1",
                        "[1]",
                        "[{}]",
                        "[{\"type\":\"retrieval\",\"function\":{\"name\":\"a\"}}]",
                        "[{\"type\":\"function\",\"function\":{\"name\":\"a b\"}}]",
                        "[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"parameters\":1}}]",
                        "[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"x\":1}}]",
                        "[{\"type\":\"function\",\"function\":{\"name\":\"a\"}},{\"type\":\"function\",\"function\":{\"name\":\"a\"}}]",
                    ],
                    Kind::ToolChoice => {
                        &["1", "\"any\"", "\"required\"", "{\"type\":\"function\",\"function\":{\"name\":\"a\"}}"]
                    }
                    Kind::ResponseFormat => &["1", "[]", "{}", "\"json\"", "{\"type\":\"json_schema\"}"],
                    Kind::KeepAlive => &["\"5x\"", "\"\"", "[]"],
                    Kind::Any => &["[]"],
                };
                for value in wrong {
                    let body = format!(r#"{{"operation":"{}","{}":{value}}}"#, row.name, field.name);
                    let refused = fields_refused(&body);
                    assert!(refused.iter().any(|name| name == field.name), "{body}: {refused:?}");
                }
            }
        }
    }

    #[test]
    fn a_job_survives_its_own_encoding() {
        for body in [
            r#"{"operation":"status"}"#,
            r#"{"operation":"infer","model":"org/name","prompt":"x","stop":"a","logit_bias":{"5":-1.5},"max_tokens":20,"seed":18446744073709551615}"#,
            r#"{"operation":"infer","messages":[{"role":"user","content":"hi"}],"temperature":null}"#,
            r#"{"operation":"infer","prompt":[1,4294967295],"raw":true}"#,
            r#"{"operation":"infer","embed":["a",[1,2]],"model":"org/name"}"#,
            r#"{"operation":"infer","messages":[{"role":"assistant","content":"","reasoning_content":"r","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":"1","tool_call_id":"a","name":"f"}],"tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object"}}}],"tool_choice":"auto","parallel_tool_calls":false}"#,
            r#"{"operation":"worker_spawn","model":"tinybee","worker":"cuda","device":0}"#,
            r#"{"operation":"worker_process_delete","pid":7,"hive_id":"h"}"#,
            &format!(r#"{{"operation":"key_create","name":"n","digest":"{}","rate":5}}"#, "0f".repeat(32)),
            &format!(r#"{{"operation":"key_create","name":"n","digest":"{}","scopes":["admin"]}}"#, "0f".repeat(32)),
        ] {
            let job = JobRequest::parse(body.as_bytes()).unwrap();
            let text = serde_json::to_string(&job).unwrap();
            assert_eq!(JobRequest::parse(text.as_bytes()).unwrap(), job, "{text}");
        }
    }

    #[test]
    fn token_ids_have_no_chat_template() {
        assert_eq!(fields_refused(r#"{"operation":"infer","prompt":[1],"raw":false}"#), ["raw"]);
        assert!(JobRequest::parse(br#"{"operation":"infer","prompt":"a","raw":false}"#).is_ok());
    }

    #[test]
    fn worker_and_device_may_come_apart() {
        let device = |rest: &str| match JobRequest::parse(
            format!(r#"{{"operation":"worker_spawn","model":"tinybee"{rest}}}"#).as_bytes(),
        ) {
            Ok(JobRequest::WorkerSpawn(spawn)) => Ok(spawn.device),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.message),
        };
        assert_eq!(device(""), Ok(DeviceSpec::Auto));
        assert_eq!(device(r#","device":"cuda:1""#), Ok(DeviceSpec::Cuda(1)));
        assert_eq!(device(r#","worker":"cuda","device":1"#), Ok(DeviceSpec::Cuda(1)));
        assert_eq!(device(r#","worker":"cuda","device":"1""#), Ok(DeviceSpec::Cuda(1)));
        assert_eq!(device(r#","worker":"cpu""#), Ok(DeviceSpec::Cpu));
        assert!(device(r#","device":1"#).is_err());
        assert!(device(r#","worker":"tpu","device":1"#).is_err());
        assert!(device(r#","worker":"cuda","device":"cuda:1""#).is_err());
    }

    #[test]
    fn unknown_operations_are_named() {
        let error = JobRequest::parse(br#"{"operation":"fly"}"#).unwrap_err();
        assert_eq!(error.code, ErrorCode::UnknownOperation);
        assert!(error.message.contains("`fly`"));
    }

    #[test]
    fn every_operation_of_the_table_has_a_typed_request() {
        for row in OPERATIONS {
            let mut map = Map::new();
            map.insert("operation".into(), row.name.into());
            for field in row.fields {
                if field.need == fields::Need::Required || field.name == "prompt" {
                    let value = match field.kind {
                        fields::Kind::Int(..) => json!(1),
                        fields::Kind::Model => json!("tinybee"),
                        fields::Kind::Hex(digits) => json!("a".repeat(digits)),
                        _ => json!("x"),
                    };
                    map.insert(field.name.into(), value);
                }
            }
            let job = JobRequest::parse(&serde_json::to_vec(&map).unwrap()).unwrap();
            assert_eq!(job.operation(), row.op);
            assert_eq!(job.hive_id().is_some(), row.target == Target::Hive, "{}", row.name);
        }
    }
}
