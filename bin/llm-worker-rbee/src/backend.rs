//! A loaded model: an engine, and the text side of its tokens.

mod model;
mod sim;
mod vocabulary;

use rbee_engine::{
    Engine, EngineConfig, EngineHandle, Goal, ModelRunner, OutputText, Reading, Request, Sampling, Speculation,
    StepCounter, TokenId,
};
use rbee_tokenizer::{AnswerReader, Begins};
use rbee_wire::fields::Violation;
use rbee_wire::job::{Generation, invalid};
use rbee_wire::worker::{LoadProgress, WorkerCharge, WorkerMemory};
use rbee_wire::{ErrorBody, ErrorCode, ModelRef};

use crate::args::{Backend, Cli};
use crate::forms::AnswerIn;

pub use model::inspect;

/// Requests generated for at once, unless the charge says otherwise.
pub const DEFAULT_SLOTS: u32 = 8;

/// Sequences that may wait in the engine: the queen counts its own dispatches, so only a race of two callers or
/// a request of many choices ever waits here.
const ENGINE_QUEUE: usize = 64;

/// Tokens of one prompt in one step: small enough that others' tokens keep coming, large enough to use the cores.
const PREFILL_CHUNK: usize = 256;

/// The same on a GPU, which needs more of them to be busy.
#[cfg(feature = "cuda")]
const GPU_PREFILL_CHUNK: usize = 1024;

/// What the heartbeat says of a loaded model.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Bytes on the device; `total` is what this process has in memory, measured anew each time, where it is 0.
    pub memory: WorkerMemory,
    /// Two workers of the same numerics id give the same tokens.
    pub numerics_id: Option<String>,
    /// Digest of the weights.
    pub fingerprint: Option<String>,
    /// Whether a row's bits depend on that row alone.
    pub row_invariant: bool,
}

/// Sampling that the model's own files ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// Temperature, 1.0 unless given.
    pub temperature: Option<f32>,
    /// Top-p, 1.0 unless given.
    pub top_p: Option<f32>,
    /// Top-k, all unless given.
    pub top_k: Option<u32>,
    /// Repetition penalty, 1.0 unless given.
    pub repetition_penalty: Option<f32>,
}

/// A prompt as tokens, and what its sender should know.
pub struct Encoded {
    /// The tokens.
    pub prompt: Vec<TokenId>,
    /// A sentence for a `note` event.
    pub note: Option<String>,
    /// What the answer is.
    pub answer: Answer,
}

/// What an answer is.
pub enum Answer {
    /// More of the prompt's own text.
    GoesOn,
    /// A text of its own.
    Text,
    /// A text of its own in which there may be reasoning, in which it may begin, and tool calls.
    Parts(AnswerReader, Begins),
}

/// Tokens to text and back.
pub trait TextSide: Send + Sync {
    /// The prompt's tokens, with the chat template where one applies.
    fn encode(&self, generation: &Generation) -> Result<Encoded, ErrorBody>;
    /// The tokens of a text to be embedded, with what the model wants before a text.
    fn embedded(&self, text: &str) -> Result<Vec<TokenId>, ErrorBody>;
    /// The tokens of a text as it stands.
    fn tokenize(&self, text: &str) -> Result<Vec<TokenId>, ErrorBody>;
    /// A fresh output of such an answer with these stop texts.
    fn output(&self, stop: &[String], answer: &Answer) -> Result<Box<dyn OutputText>, ErrorBody>;
    /// The form that a request asks its answer to have. Blocks for as long as compiling it takes.
    fn form(&self, generation: &Generation, answer: &Answer) -> Result<Option<AnswerIn>, ErrorBody>;
    /// The text of one token alone.
    fn token_text(&self, id: TokenId) -> String;
    /// Tokens that end a text.
    fn eos(&self) -> &[TokenId];
    /// What the model's own files ask for.
    fn defaults(&self) -> &SamplingDefaults;
}

/// A model that serves.
pub struct Loaded {
    /// The engine.
    pub engine: EngineHandle,
    /// The text side.
    pub text: Box<dyn TextSide>,
    /// What the heartbeat says.
    pub facts: Facts,
}

/// What a backend makes of a charge.
struct Parts {
    runner: Box<dyn ModelRunner>,
    text: Box<dyn TextSide>,
    facts: Facts,
}

/// Loads the model and runs a warm-up step, so that what follows is served at once. Blocks.
///
/// # Errors
/// The error that the worker ends with.
pub fn load(cli: &Cli, charge: &WorkerCharge, progress: &dyn Fn(LoadProgress)) -> Result<Loaded, ErrorBody> {
    let slots = charge.load.slots.unwrap_or(DEFAULT_SLOTS) as usize;
    let steps = StepCounter::default();
    progress(LoadProgress { stage: "load".into(), done: 0, total: 0, unit: "bytes".into() });
    let Parts { runner, text, facts } = match cli.backend {
        Backend::Cpu => model::load(model::Computes::OnCpu, charge, &steps, progress)?,
        #[cfg(feature = "cuda")]
        Backend::Cuda => model::load(model::Computes::OnGpu, charge, &steps, progress)?,
        Backend::Sim => sim::load(cli, charge, slots, &steps, progress)?,
    };
    let prefill_chunk = match cli.backend {
        #[cfg(feature = "cuda")]
        Backend::Cuda => GPU_PREFILL_CHUNK,
        Backend::Cpu | Backend::Sim => PREFILL_CHUNK,
    };
    let config = EngineConfig {
        slots,
        step_tokens: slots + prefill_chunk,
        prefill_chunk,
        queue: ENGINE_QUEUE.max(slots),
        speculation: speculation(std::env::var("RBEE_SPECULATION").ok().as_deref())?,
    };
    let failed = |error: &dyn std::fmt::Display| {
        ErrorBody::new(ErrorCode::ModelLoadFailed, format!("the model was read but its engine did not start: {error}"))
    };
    let mut engine = Engine::new(runner, config).map_err(|error| failed(&error))?;
    progress(LoadProgress { stage: "warm_up".into(), done: 0, total: 1, unit: "steps".into() });
    warm_up(&mut engine, text.as_ref())?;
    let engine = EngineHandle::start(engine, steps).map_err(|error| failed(&error))?;
    Ok(Loaded { engine, text, facts })
}

/// Whether tokens are guessed: as `RBEE_SPECULATION` says, else where it pays.
fn speculation(asked: Option<&str>) -> Result<Speculation, ErrorBody> {
    let parsed = asked.map_or(Ok(Speculation::default()), str::parse);
    parsed.map_err(|problem| ErrorBody::new(ErrorCode::InvalidRequest, format!("RBEE_SPECULATION {problem}")))
}

/// One token of a short prompt through the whole engine, or its embedding: touches every weight, and shows weights that are not
/// numbers before anybody relies on them.
fn warm_up(engine: &mut Engine, text: &dyn TextSide) -> Result<(), ErrorBody> {
    use rbee_engine::{Choice, Output};
    let limits = engine.limits();
    let (goal, max_tokens, most) = match limits.reading {
        Reading::Causal => (Goal::Answer, Some(2), 4),
        Reading::Whole => (Goal::Embedding, None, limits.context),
    };
    let request = Request {
        prompt: vec![0; most.min(4)],
        goal,
        max_tokens,
        min_tokens: 0,
        eos: Vec::new(),
        ignore_eos: true,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: None,
        tenant: [0; 16],
        choices: vec![Choice { text: text.output(&[], &Answer::Text)?, constraint: None, resume: Vec::new() }],
    };
    let corrupt = |why: &dyn std::fmt::Display| {
        ErrorBody::new(ErrorCode::ModelCorrupt, format!("the model cannot compute one token: {why}"))
    };
    engine.submit(request).map_err(|error| corrupt(&error))?;
    let mut outputs = Vec::new();
    while engine.has_work() {
        engine.step(&mut outputs);
    }
    match outputs.pop() {
        Some((_, Output::Done { .. })) => Ok(()),
        Some((_, Output::Failed(error))) => Err(corrupt(&error)),
        _ => Err(corrupt(&"the engine stopped without an answer")),
    }
}

/// The refusal of a request for an answer, by a model that only makes embeddings.
pub fn only_embeds(model: &ModelRef) -> ErrorBody {
    ErrorBody::new(
        ErrorCode::InvalidRequest,
        format!("{model} is an embedding model and writes no text; use /v1/embeddings"),
    )
    .with_hint("POST /v1/embeddings, or a job with `embed`, makes embeddings; name another model for an answer")
}

/// The refusal of a request with tools, by a model that cannot have any.
fn no_tools() -> ErrorBody {
    let problem = "is nothing that this model's chat template has a place for, or its calls are of a kind that this build cannot read";
    invalid(vec![Violation { field: "tools".into(), problem: problem.into() }])
        .with_hint("leave `tools` away, or ask a model that was made for them")
}
