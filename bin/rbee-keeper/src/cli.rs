//! The command line's shape: clap types and nothing else. What a flag means is decided where its verb is
//! carried out; start with [`Verb`].

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use rbee_wire::{DeviceSpec, HiveId, JobId, KeepAlive, KeyId, Scope, WorkerId};

/// Your own machines as one private LLM endpoint.
#[derive(Debug, Parser)]
#[command(name = "rbee", version, disable_help_subcommand = true, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 done, 1 the request failed, 2 usage, 3 nothing to serve it, 4 queen or hive \
unreachable, 5 internal fault, 130 interrupted.")]
pub struct Cli {
    /// Flags of every verb.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags of every verb.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The queen to talk to [env: RBEE_QUEEN_URL] [default: http://127.0.0.1:7833]
    #[arg(long, global = true, value_name = "URL")]
    pub queen: Option<String>,
    /// The key to show to the queen [env: RBEE_API_KEY]
    #[arg(long, global = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Start no daemon, also where nothing answers
    #[arg(long, global = true)]
    pub no_start: bool,
    /// Print one JSON document, or JSON lines where it streams
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress, hints or warnings on stderr
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More on stderr: addresses, decisions, details of errors
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Colour on stderr; NO_COLOR is honoured
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
}

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Generate text from a prompt
    Infer(InferArgs),
    /// Talk with a model in the terminal
    Chat(ChatArgs),
    /// Generate text with a model from a prompt or a pipe, or talk with it
    Run(RunArgs),
    /// What the queen sees: hives, workers, models, jobs
    #[command(visible_alias = "ps")]
    Status(StatusArgs),
    /// Start everything on this machine
    Up,
    /// Drain and stop everything on this machine
    Down,
    /// The queen: one per site
    #[command(subcommand)]
    Queen(QueenVerb),
    /// Hives: one per machine
    #[command(subcommand)]
    Hive(HiveVerb),
    /// Workers: one per loaded model
    #[command(subcommand)]
    Worker(WorkerVerb),
    /// Models in a hive's store
    #[command(subcommand)]
    Model(ModelVerb),
    /// Jobs that wait, run or ended lately
    #[command(subcommand)]
    Job(JobVerb),
    /// Keys: what people and programs show to the queen
    #[command(subcommand)]
    Key(KeyVerb),
    /// Why a job went the way it went
    Explain(JobArgs),
    /// What a model would need on each device, and what is free there
    Plan(PlanArgs),
    /// Same as `model download`
    Pull(ModelArgs),
    /// Same as `model list`
    Ls(OnHive),
    /// Same as `model get`
    Show(StoredArgs),
    /// Same as `model delete`
    Rm(RemoveArgs),
    /// Same as `model unload`
    Stop(UnloadArgs),
    /// The merged settings and where each came from
    Config,
    /// Check this machine: folders, ports, programs, limits, daemons
    Doctor,
    /// A completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// The release, build and protocol
    Version,
}

/// What answers are like and who may give them.
#[derive(Args, Clone, Debug, Default)]
pub struct AnswerArgs {
    /// The system message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Most tokens to generate; what the context leaves unless given
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u64>,
    /// 0 takes the likeliest token; the model's own unless given
    #[arg(long, value_name = "F", value_parser = finite, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the likeliest tokens that sum to this probability
    #[arg(long, value_name = "F", value_parser = finite, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Sample from this many of the likeliest tokens; 0 is all
    #[arg(long, value_name = "N")]
    pub top_k: Option<u64>,
    /// Drop tokens below this share of the likeliest one
    #[arg(long, value_name = "F", value_parser = finite, allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens seen before
    #[arg(long, value_name = "F", value_parser = finite, allow_negative_numbers = true)]
    pub repeat_penalty: Option<f32>,
    /// The draw's seed: the same seed gives the same text
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// A text that ends the output; may be given up to 16 times
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// The form of the answer: `json`, a JSON schema, or @FILE with one; also a whole `response_format` as the API has it
    #[arg(long, value_name = "FORM")]
    pub response_format: Option<String>,
    /// Only workers of this hive
    #[arg(short = 'a', long, visible_alias = "host", value_name = "ID")]
    pub hive: Option<HiveId>,
    /// Only this worker
    #[arg(long, value_name = "ID")]
    pub worker_id: Option<WorkerId>,
    /// Only workers on this device: cpu, cuda:N
    #[arg(long, value_name = "D")]
    pub device: Option<DeviceSpec>,
    /// Most milliseconds from the request to its end
    #[arg(long, value_name = "N")]
    pub deadline_ms: Option<u64>,
    /// Do not load the model when no worker serves it
    #[arg(long)]
    pub no_load: bool,
    /// How long the model stays loaded afterwards: 5m, seconds, 0, or -1 for ever
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    pub keep_alive: Option<KeepAlive>,
}

/// How one text is generated and shown.
#[derive(Args, Clone, Debug, Default)]
pub struct GenerateArgs {
    /// What it is like and who may give it.
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// Send the prompt as it is, without the model's chat template
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// Print the text when it is whole
    #[arg(long)]
    pub no_stream: bool,
    /// Print the job's id and leave; `rbee job attach ID` shows its text
    #[arg(long, conflicts_with_all = ["no_stream", "timings"])]
    pub detach: bool,
    /// Where the time went, on stderr
    #[arg(long)]
    pub timings: bool,
}

/// `rbee infer`.
#[derive(Args, Clone, Debug, Default)]
pub struct InferArgs {
    /// The prompt; `-` or a pipe reads stdin, without its last line end unless --raw
    #[arg(value_name = "PROMPT")]
    pub text: Option<String>,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "text")]
    pub prompt: Option<String>,
    /// The model: tinybee, org/name, a folder; the default one unless given
    #[arg(short, long, value_name = "REF")]
    pub model: Option<String>,
    /// How the text is generated and shown.
    #[command(flatten)]
    pub generate: GenerateArgs,
}

/// `rbee chat`.
#[derive(Args, Clone, Debug, Default)]
pub struct ChatArgs {
    /// The model: tinybee, org/name, a folder; the default one unless given
    #[arg(short, long, value_name = "REF")]
    pub model: Option<String>,
    /// What answers are like and who may give them.
    #[command(flatten)]
    pub answer: AnswerArgs,
}

/// `rbee run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// The model: tinybee, org/name, a folder
    pub model: String,
    /// The prompt; `-` or a pipe reads stdin, and none on a terminal is a chat
    #[arg(value_name = "PROMPT")]
    pub text: Option<String>,
    /// How the text is generated and shown.
    #[command(flatten)]
    pub generate: GenerateArgs,
}

/// `rbee status`.
#[derive(Args, Clone, Copy, Debug)]
pub struct StatusArgs {
    /// Again every second
    #[arg(short, long)]
    pub watch: bool,
}

/// Which hive a verb is for.
#[derive(Args, Clone, Debug)]
pub struct OnHive {
    /// The hive
    #[arg(short = 'a', long = "hive", visible_alias = "host", value_name = "ID", default_value = "localhost")]
    pub hive: HiveId,
}

/// What to show of a log.
#[derive(Args, Clone, Copy, Debug)]
pub struct LogArgs {
    /// How many of the last lines
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 100)]
    pub tail: usize,
}

/// Verbs of the queen.
#[derive(Debug, Subcommand)]
pub enum QueenVerb {
    /// Start the queen
    Start,
    /// Drain and stop the queen; hives and workers go on
    Stop,
    /// Whether the queen would take a job now
    Status,
    /// What the queen says of itself
    Info,
    /// The end of the queen's log
    Logs {
        /// What to show.
        #[command(flatten)]
        log: LogArgs,
        /// Go on as it grows
        #[arg(short, long)]
        follow: bool,
    },
}

/// Verbs of hives.
#[derive(Debug, Subcommand)]
pub enum HiveVerb {
    /// Start a hive
    Start(OnHive),
    /// Let a hive's workers finish, then stop it
    Stop(OnHive),
    /// Whether a hive answers, and since when
    Status(OnHive),
    /// The hives
    #[command(visible_alias = "ls")]
    List,
    /// One hive with its devices
    Get(OnHive),
    /// Install a hive on another machine
    Install(OnHive),
    /// Remove a hive from another machine
    Uninstall(OnHive),
    /// Make a hive look for its devices again
    RefreshCapabilities(OnHive),
    /// Test the ssh connection to a host
    SshTest(OnHive),
    /// Take hosts from the ssh client's config
    ImportSsh {
        /// The ssh client's config file
        #[arg(value_name = "FILE")]
        ssh_config_path: Option<String>,
    },
    /// The end of the log of this machine's hive
    Logs {
        /// Which hive.
        #[command(flatten)]
        on: OnHive,
        /// What to show.
        #[command(flatten)]
        log: LogArgs,
        /// Go on as it grows
        #[arg(short, long)]
        follow: bool,
    },
}

/// Verbs of workers.
#[derive(Debug, Subcommand)]
pub enum WorkerVerb {
    /// Make sure a worker serves a model, and print its id
    Spawn(SpawnArgs),
    /// The active workers of every hive
    #[command(visible_alias = "ls")]
    List,
    /// One active worker
    Get(WorkerArgs),
    /// Let a worker finish its jobs, then end it
    Retire(WorkerArgs),
    /// The end of a worker's captured output
    Logs {
        /// The worker.
        #[command(flatten)]
        worker: WorkerArgs,
        /// Its hive, when the queen no longer knows
        #[arg(short = 'a', long, visible_alias = "host", value_name = "ID")]
        hive: Option<HiveId>,
        /// What to show.
        #[command(flatten)]
        log: LogArgs,
    },
    /// A hive's worker programs
    #[command(subcommand)]
    Binary(BinaryVerb),
    /// A hive's worker processes
    #[command(subcommand)]
    Process(ProcessVerb),
}

/// `rbee worker spawn`.
#[derive(Args, Clone, Debug)]
pub struct SpawnArgs {
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
    /// The model: tinybee, org/name, a folder
    #[arg(short, long, value_name = "REF")]
    pub model: String,
    /// Where: cpu, cuda:N or auto
    #[arg(long, value_name = "D", default_value = "auto")]
    pub device: DeviceSpec,
    /// How many workers shall serve the model on this device in all
    #[arg(long, value_name = "N")]
    pub replicas: Option<u32>,
    /// Context length in tokens; the model's own unless given
    #[arg(long, value_name = "N")]
    pub ctx: Option<u32>,
    /// Requests that the worker generates for at once
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// Compute threads; the physical cores unless given, fewer while other workers of the machine compute
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Type of the KV cache: f32, f16, bf16, q8_0
    #[arg(long, value_name = "T")]
    pub kv_type: Option<String>,
    /// Keep the weights with fewer bits: q8_0, q4_k
    #[arg(long, value_name = "T")]
    pub quantize: Option<String>,
    /// How long it stays when nobody uses it: 5m, seconds, 0; until it is retired unless given
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    pub keep_alive: Option<KeepAlive>,
    /// Return when the worker is ready, which is the default
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,
    /// Return when the worker is started
    #[arg(long)]
    pub no_wait: bool,
}

/// One worker.
#[derive(Args, Clone, Debug)]
pub struct WorkerArgs {
    /// The worker, as `rbee worker list` shows it
    #[arg(value_name = "ID")]
    pub worker_id: WorkerId,
}

/// Verbs of worker programs.
#[derive(Debug, Subcommand)]
pub enum BinaryVerb {
    /// The worker programs
    #[command(visible_alias = "ls")]
    List(OnHive),
    /// One worker program
    Get(BinaryArgs),
    /// Remove a worker program
    Delete(BinaryArgs),
    /// Fetch a worker program
    Download(BinaryArgs),
    /// Build a worker program
    Build(BinaryArgs),
}

/// One worker program.
#[derive(Args, Clone, Debug)]
pub struct BinaryArgs {
    /// The kind of worker: cpu, cuda, sim
    #[arg(value_name = "TYPE")]
    pub worker_type: String,
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
}

/// Verbs of worker processes.
#[derive(Debug, Subcommand)]
pub enum ProcessVerb {
    /// The hive's worker processes
    #[command(visible_alias = "ls")]
    List(OnHive),
    /// One worker process
    Get(ProcessArgs),
    /// End one worker process of the hive's own
    Delete(ProcessArgs),
}

/// One worker process.
#[derive(Args, Clone, Debug)]
pub struct ProcessArgs {
    /// The process, as `rbee worker process list` shows it
    pub pid: u32,
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
}

/// Verbs of models.
#[derive(Debug, Subcommand)]
pub enum ModelVerb {
    /// Fetch a model into the store
    #[command(visible_alias = "pull")]
    Download(ModelArgs),
    /// The store's models
    #[command(visible_alias = "ls")]
    List(OnHive),
    /// One model of the store
    #[command(visible_alias = "show")]
    Get(StoredArgs),
    /// Remove a model from the store
    #[command(visible_alias = "rm")]
    Delete(RemoveArgs),
    /// Load a model where it fits, and return when it serves
    Load(LoadArgs),
    /// Let the workers of a model finish, then end them
    #[command(visible_alias = "stop")]
    Unload(UnloadArgs),
    /// Take a folder or .gguf file of this machine into the store
    Import(ImportArgs),
}

/// `rbee plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// The model: tinybee, org/name, a folder
    #[arg(value_name = "REF")]
    pub model: String,
    /// Only this device: cpu, cuda:N
    #[arg(long, value_name = "D", default_value = "auto")]
    pub device: DeviceSpec,
    /// Context length in tokens; the model's own unless given
    #[arg(long, value_name = "N")]
    pub ctx: Option<u32>,
    /// Requests that the worker generates for at once
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// Type of the KV cache: f32, f16, bf16, q8_0
    #[arg(long, value_name = "T")]
    pub kv_type: Option<String>,
    /// Keep the weights with fewer bits: q8_0, q4_k
    #[arg(long, value_name = "T")]
    pub quantize: Option<String>,
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
}

/// `rbee model load`.
#[derive(Args, Clone, Debug)]
pub struct LoadArgs {
    /// The model: tinybee, org/name, a folder
    #[arg(value_name = "REF")]
    pub model: String,
    /// Only on this device: cpu, cuda:N
    #[arg(long, value_name = "D")]
    pub device: Option<DeviceSpec>,
    /// Only on this hive
    #[arg(short = 'a', long, visible_alias = "host", value_name = "ID")]
    pub hive: Option<HiveId>,
    /// How long it stays when nobody uses it: 5m, seconds, or -1 for ever
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    pub keep_alive: Option<KeepAlive>,
}

/// A model to unload.
#[derive(Args, Clone, Debug)]
pub struct UnloadArgs {
    /// The model, as `rbee status` shows it
    #[arg(value_name = "REF")]
    pub model: String,
}

/// `rbee model import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// A folder of model files, or a .gguf file
    #[arg(value_name = "PATH")]
    pub path: String,
    /// The name it gets, org/name; local/ and the path's last part unless given
    #[arg(long = "as", value_name = "ORG/NAME")]
    pub name: Option<String>,
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
}

/// A model to remove from the store.
#[derive(Args, Clone, Debug)]
pub struct RemoveArgs {
    /// Which model.
    #[command(flatten)]
    pub of: StoredArgs,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// One model.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// The model
    #[arg(value_name = "REF")]
    pub model: String,
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
}

/// One model of the store.
#[derive(Args, Clone, Debug)]
pub struct StoredArgs {
    /// The model, as `rbee model list` shows it
    #[arg(value_name = "REF")]
    pub id: String,
    /// Which hive.
    #[command(flatten)]
    pub on: OnHive,
}

/// Verbs of jobs.
#[derive(Debug, Subcommand)]
pub enum JobVerb {
    /// The jobs that wait, run or ended lately
    #[command(visible_alias = "ls")]
    List,
    /// One job
    Get(JobArgs),
    /// Cancel a job
    Cancel(JobArgs),
    /// A job's output, from its beginning to its end
    Attach(JobArgs),
}

/// One job.
#[derive(Args, Clone, Debug)]
pub struct JobArgs {
    /// The job, as `rbee job list` shows it
    #[arg(value_name = "ID")]
    pub job: JobId,
}

/// Verbs of keys.
#[derive(Debug, Subcommand)]
pub enum KeyVerb {
    /// Make a key and print its secret, once
    Create(KeyArgs),
    /// The keys
    #[command(visible_alias = "ls")]
    List,
    /// Close a key at once, and cancel the answers it has under way
    Revoke {
        /// The key, as `rbee key list` shows it
        #[arg(value_name = "ID")]
        key: KeyId,
    },
}

/// `rbee key create`.
#[derive(Args, Clone, Debug)]
pub struct KeyArgs {
    /// What people call it
    #[arg(long)]
    pub name: String,
    /// What it may do: generate text, or everything; `inference` unless given
    #[arg(long, value_name = "SCOPE", value_parser = scope)]
    pub scope: Vec<Scope>,
    /// Jobs it may have at once, those that wait included
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub max_concurrent: Option<u32>,
    /// Jobs it may post in a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub rate: Option<u32>,
}

fn scope(text: &str) -> Result<Scope, String> {
    match text {
        "inference" => Ok(Scope::Inference),
        "admin" => Ok(Scope::Admin),
        _ => Err(format!("must be {}", Scope::NAMES.join(" or "))),
    }
}

/// A number that JSON can carry; whether it is in range is the request's own check.
fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err("must be a number".into()),
    }
}
