//! The one table of operations.
//!
//! A row says who carries the operation out, which fields it takes and which verb of the command line it
//! is. Validation, the command line's help and the reference are made from it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Field, Kind, Need};
use crate::key::{Access, Scope};
use crate::model::MAX_MODEL_REF;

/// Who carries an operation out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The queen itself.
    Queen,
    /// A hive, reached through the queen by `hive_id` or directly.
    Hive,
}

/// Whether this build carries an operation out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Built {
    /// It does.
    Yes,
    /// It answers `NOT_IMPLEMENTED`.
    No,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct OperationRow {
    /// The operation.
    pub op: Operation,
    /// Its name on the wire.
    pub name: &'static str,
    /// Who carries it out.
    pub target: Target,
    /// Who may ask the queen for it.
    pub access: Access,
    /// Whether this build does.
    pub built: Built,
    /// The verb of the command line.
    pub verb: &'static str,
    /// What it does, in one sentence.
    pub about: &'static str,
    /// Its fields, without `operation`.
    pub fields: &'static [Field],
}

macro_rules! operations {
    ($($variant:ident $name:literal $target:ident $access:ident $built:ident $verb:literal $about:literal $fields:expr;)*) => {
        /// An operation of the job API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Operation { $(#[doc = $about] $variant,)* }

        /// All operations, in the order of the protocol.
        pub const OPERATIONS: &[OperationRow] = &[$(OperationRow {
            op: Operation::$variant, name: $name, target: Target::$target,
            access: Access::$access, built: Built::$built,
            verb: $verb, about: $about, fields: $fields,
        },)*];
    };
}

const fn required(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, need: Need::Required, about }
}

const fn optional(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, need: Need::Optional, about }
}

const NONE: &[Field] = &[];
const WORKER_ID: &[Field] = &[required("worker_id", Kind::Id, "the worker")];
const ALIAS: &[Field] = &[optional("alias", Kind::Id, "the hive; `localhost` unless given")];
const HIVE: Field = optional("hive_id", Kind::Id, "the hive; `localhost` unless given");
const ON_HIVE: &[Field] = &[HIVE];
const PID: &[Field] = &[HIVE, required("pid", Kind::Int(1, u32::MAX as u64), "a process of the hive's own")];
const WORKER_TYPE: &[Field] = &[HIVE, required("worker_type", Kind::Id, "the kind of worker: `cpu`, `cuda`, `sim`")];
const MODEL: &[Field] = &[HIVE, required("model", Kind::Model, "the model")];
const MODEL_ID: &[Field] = &[HIVE, required("id", Kind::Text(MAX_MODEL_REF), "the model in the store")];
const KEEP_ALIVE: Field =
    optional("keep_alive", Kind::KeepAlive, "how long it stays when nobody uses it: seconds, `5m`, 0, or -1 for ever");
const PLAN_FIELDS: &[Field] = &[
    HIVE,
    required("model", Kind::Model, "the model"),
    optional("device", Kind::Device, "the device; all unless given"),
    optional("fetch", Kind::Bool, "fetch the model before, if it is not there; false unless given"),
    CTX,
    SLOTS,
    KV_TYPE,
    QUANTIZE,
];
const LOAD_FIELDS: &[Field] = &[
    required("model", Kind::Model, "the model"),
    optional("device", Kind::Device, "the device; where it fits unless given"),
    optional("hive_id", Kind::Id, "the hive; any unless given"),
    KEEP_ALIVE,
];
const UNLOAD_FIELDS: &[Field] = &[required("model", Kind::Model, "the model")];
const IMPORT_FIELDS: &[Field] = &[
    HIVE,
    required("model", Kind::Model, "a folder or a `.gguf` file by its absolute path"),
    required("id", Kind::Text(MAX_MODEL_REF), "the name that it gets, `org/name`"),
];
const CTX: Field = optional("ctx", Kind::Int(16, 1 << 24), "context length in tokens; the model's own unless given");
const SLOTS: Field = optional("slots", Kind::Int(1, 1024), "requests that one worker generates for at once");
const KV_TYPE: Field = optional("kv_type", Kind::Id, "type of the KV cache: `f32`, `f16`, `bf16` or `q8_0`");
const QUANTIZE: Field = optional("quantize", Kind::Id, "keep the weights with fewer bits: `q8_0` or `q4_k`");
const IMPORT_SSH: &[Field] = &[optional("ssh_config_path", Kind::Text(4096), "the ssh client's config file")];
const SSH_TEST: &[Field] = &[required("alias", Kind::Id, "the host in the ssh client's config")];

const KEY_ID: &[Field] = &[required("key_id", Kind::Id, "the key")];
const KEY_FIELDS: &[Field] = &[
    required("name", Kind::Id, "what people call it"),
    required("digest", Kind::Hex(64), "SHA-256 of its secret"),
    optional("scopes", Kind::Words(Scope::NAMES), "what it may do; `inference` unless given, `admin` is everything"),
    optional("max_concurrent", Kind::Int(1, 1 << 20), "jobs it may have alive at once, those that wait included"),
    optional("rate", Kind::Int(1, 1 << 20), "jobs it may post in a minute"),
];

/// The fields of `worker_spawn`.
pub const SPAWN_FIELDS: &[Field] = &[
    HIVE,
    required("model", Kind::Model, "the model to load"),
    optional("worker", Kind::Id, "the device's kind, `cpu` or `cuda`, with its index in `device`"),
    optional("device", Kind::Any, "`auto`, `cpu` or `cuda:N`; or an index beside `worker`"),
    optional("replicas", Kind::Int(1, 64), "how many workers shall serve the model on this device in all"),
    CTX,
    SLOTS,
    optional(
        "threads",
        Kind::Int(1, 1024),
        "compute threads; the physical cores unless given, fewer while other workers of the machine compute",
    ),
    KV_TYPE,
    QUANTIZE,
    KEEP_ALIVE,
    optional("wait", Kind::Bool, "whether the job ends when the worker is ready (true) or started"),
];

/// The fields of `infer`.
pub const INFER_FIELDS: &[Field] = &[
    optional("model", Kind::Model, "the model; the default one unless given"),
    optional(
        "prompt",
        Kind::Prompt,
        "the text to go on from, or its token ids, to which nothing is added; this or `messages`",
    ),
    optional("messages", Kind::Messages, "the chat to answer; this or `prompt`"),
    optional(
        "embed",
        Kind::Inputs,
        "texts, or lists of token ids, to embed instead of generating; a `data` event each",
    ),
    optional("max_tokens", Kind::Int(1, 1 << 24), "most tokens to generate; what the context leaves unless given"),
    optional("min_tokens", Kind::Int(0, 1 << 24), "tokens before an end-of-text token may come"),
    optional("temperature", Kind::Float(0.0, 2.0), "0 takes the likeliest token; the model's own unless given"),
    optional("top_p", Kind::Float(0.0, 1.0), "sample from the likeliest tokens that sum to this probability"),
    optional("top_k", Kind::Int(0, 1 << 24), "sample from this many of the likeliest tokens; 0 is all"),
    optional("min_p", Kind::Float(0.0, 1.0), "drop tokens below this share of the likeliest one"),
    optional("repetition_penalty", Kind::Float(0.01, 10.0), "divides the logits of tokens seen before"),
    optional("frequency_penalty", Kind::Float(-2.0, 2.0), "lowers a token by how often it was generated"),
    optional("presence_penalty", Kind::Float(-2.0, 2.0), "lowers a token once it was generated"),
    optional("logit_bias", Kind::Bias, "added to the logits of these token ids"),
    optional("stop", Kind::Texts(16), "texts that end the output, never sent themselves"),
    optional("seed", Kind::Int(0, u64::MAX), "the draw's seed; random and reported unless given"),
    optional("logprobs", Kind::Bool, "send the log-probability of each token"),
    optional("top_logprobs", Kind::Int(0, 20), "send that many of the likeliest tokens; needs `logprobs`"),
    optional("n", Kind::Int(1, 16), "how many answers"),
    optional("ignore_eos", Kind::Bool, "go on after an end-of-text token"),
    optional("response_format", Kind::ResponseFormat, "the form the answer must have, such as JSON"),
    optional("tools", Kind::Tools, "functions the model may call; needs `messages`"),
    optional(
        "tool_choice",
        Kind::ToolChoice,
        "whether functions are called: `auto`, the default, `none`, `required`, or the one that must be",
    ),
    optional("parallel_tool_calls", Kind::Bool, "whether an answer may have several calls; true unless given"),
    optional("chat_template_kwargs", Kind::Object, "variables for the chat template"),
    optional("raw", Kind::Bool, "no chat template; the default for `prompt`"),
    optional("device", Kind::Device, "only workers on this device"),
    optional("worker_id", Kind::Id, "only this worker"),
    optional("hive_id", Kind::Id, "only workers of this hive"),
    optional("keep_alive", Kind::KeepAlive, "how long the model stays loaded afterwards"),
    optional("deadline_ms", Kind::Int(1, 86_400_000), "most milliseconds from the post to the end"),
    optional("detach", Kind::Bool, "go on when nobody listens"),
    optional("no_load", Kind::Bool, "do not load the model when no worker serves it"),
    optional("stream", Kind::Bool, "changes nothing in a job"),
];

operations! {
    Status "status" Queen Admin Yes "rbee status" "What the queen sees: hives, workers, jobs." NONE;
    Infer "infer" Queen Inference Yes "rbee infer" "Generates text." INFER_FIELDS;
    ActiveWorkerList "active_worker_list" Queen Admin Yes "rbee worker list" "Lists the active workers of every hive." NONE;
    ActiveWorkerGet "active_worker_get" Queen Admin Yes "rbee worker get" "Shows one active worker." WORKER_ID;
    ActiveWorkerRetire "active_worker_retire" Queen Admin Yes "rbee worker retire" "Lets a worker finish its jobs, then ends it." WORKER_ID;
    HiveList "hive_list" Queen Admin Yes "rbee hive list" "Lists the hives." NONE;
    HiveGet "hive_get" Queen Admin Yes "rbee hive get" "Shows one hive with its devices." ALIAS;
    HiveStatus "hive_status" Queen Admin Yes "rbee hive status" "Whether a hive answers, and since when." ALIAS;
    HiveStart "hive_start" Queen Admin Yes "rbee hive start" "Starts a hive." ALIAS;
    HiveStop "hive_stop" Queen Admin Yes "rbee hive stop" "Lets a hive's workers finish, then stops it." ALIAS;
    HiveInstall "hive_install" Queen Admin No "rbee hive install" "Installs a hive on another machine." ALIAS;
    HiveUninstall "hive_uninstall" Queen Admin No "rbee hive uninstall" "Removes a hive from another machine." ALIAS;
    HiveRefreshCapabilities "hive_refresh_capabilities" Queen Admin Yes "rbee hive refresh-capabilities" "Makes a hive look for its devices again." ALIAS;
    HiveImportSsh "hive_import_ssh" Queen Admin No "rbee hive import-ssh" "Takes hosts from the ssh client's config." IMPORT_SSH;
    SshTest "ssh_test" Queen Admin No "rbee hive ssh-test" "Tests the ssh connection to a host." SSH_TEST;
    WorkerSpawn "worker_spawn" Hive Admin Yes "rbee worker spawn" "Makes sure a worker serves a model on a device." SPAWN_FIELDS;
    WorkerProcessList "worker_process_list" Hive Admin Yes "rbee worker process list" "Lists the hive's worker processes." ON_HIVE;
    WorkerProcessGet "worker_process_get" Hive Admin Yes "rbee worker process get" "Shows one worker process." PID;
    WorkerProcessDelete "worker_process_delete" Hive Admin Yes "rbee worker process delete" "Ends one worker process of the hive's own." PID;
    WorkerBinaryList "worker_binary_list" Hive Admin Yes "rbee worker binary list" "Lists the worker binaries." ON_HIVE;
    WorkerBinaryGet "worker_binary_get" Hive Admin Yes "rbee worker binary get" "Shows one worker binary." WORKER_TYPE;
    WorkerBinaryDelete "worker_binary_delete" Hive Admin No "rbee worker binary delete" "Removes a worker binary." WORKER_TYPE;
    WorkerDownload "worker_download" Hive Admin No "rbee worker binary download" "Fetches a worker binary." WORKER_TYPE;
    WorkerBuild "worker_build" Hive Admin No "rbee worker binary build" "Builds a worker binary." WORKER_TYPE;
    ModelDownload "model_download" Hive Admin Yes "rbee model download" "Fetches a model into the store." MODEL;
    ModelList "model_list" Hive Admin Yes "rbee model list" "Lists the store's models." ON_HIVE;
    ModelGet "model_get" Hive Admin Yes "rbee model get" "Shows one model of the store." MODEL_ID;
    ModelDelete "model_delete" Hive Admin Yes "rbee model delete" "Removes a model from the store." MODEL_ID;
    ModelPlan "model_plan" Hive Admin Yes "rbee plan" "What a model would need on each device, and what is free there." PLAN_FIELDS;
    ModelLoad "model_load" Queen Admin Yes "rbee model load" "Loads a model where it fits, and ends when it serves." LOAD_FIELDS;
    ModelUnload "model_unload" Queen Admin Yes "rbee model unload" "Lets the workers of a model finish, then ends them." UNLOAD_FIELDS;
    ModelImport "model_import" Hive Admin Yes "rbee model import" "Takes files of this machine into the store." IMPORT_FIELDS;
    KeyCreate "key_create" Queen Admin Yes "rbee key create" "Makes a key, whose secret only its owner has." KEY_FIELDS;
    KeyList "key_list" Queen Admin Yes "rbee key list" "Lists the keys." NONE;
    KeyRevoke "key_revoke" Queen Admin Yes "rbee key revoke" "Closes a key at once, and cancels the answers it has under way." KEY_ID;
}

impl Operation {
    /// The operation of this name.
    pub fn by_name(name: &str) -> Option<&'static OperationRow> {
        OPERATIONS.iter().find(|row| row.name == name)
    }

    /// Its row of the table.
    pub fn row(self) -> &'static OperationRow {
        OPERATIONS.iter().find(|row| row.op == self).expect("the macro makes a row for every variant")
    }

    /// Whether it can be cancelled once it runs. Of the others no half is of any use.
    pub fn can_be_cancelled(self) -> bool {
        matches!(self, Self::Infer | Self::ModelLoad | Self::ModelDownload)
    }

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        self.row().name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_operations_of_the_protocol_of_models_and_of_keys_under_their_own_names() {
        assert_eq!(OPERATIONS.len(), 28 + 4 + 3);
        for row in OPERATIONS {
            assert_eq!(serde_json::to_value(row.op).unwrap(), row.name);
            let mut names: Vec<_> = row.fields.iter().map(|field| field.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), row.fields.len(), "{}: a field stands twice", row.name);
        }
    }
}
