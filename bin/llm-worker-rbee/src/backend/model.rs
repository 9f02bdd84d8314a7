//! The model itself, on the CPU or on a GPU.

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rbee_engine::{CallPart, ModelRunner, OutputText, Piece, Pushed, StepCounter, TokenId};
use rbee_models::{About, Error, Kind, ModelFiles, Needs, RunnerOptions};
use rbee_tokenizer::{
    AnswerForm, AnswerReader, Begins, Chat, ChatTemplate, Controls, Error as TextError, GenerationPrompt, Most,
    Specials, Start, StopMatcher, TextStream, Tokenizer, TokenizerConfig, message,
};
use rbee_wire::job::{Generation, Message};
use rbee_wire::view::LoadNeeds;
use rbee_wire::worker::{LoadOptions, LoadProgress, WorkerCharge, WorkerMemory};
use rbee_wire::{ErrorBody, ErrorCode, ModelRef};
use serde_json::{Value, json};

use crate::args::Backend;
use crate::cores::{Cores, Sharing};
use crate::forms::{AnswerIn, Forms, Opening};

use super::vocabulary::TextFiles;
use super::{Answer, DEFAULT_SLOTS, Encoded, Facts, Parts, SamplingDefaults, TextSide};

macro_rules! tinybee {
    ($($name:literal),*) => {
        &[$(($name, include_bytes!(concat!("../../../../tinybee/model/", $name)))),*]
    };
}

/// The model that ships inside the worker.
static TINYBEE: &[(&str, &[u8])] =
    tinybee!("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors");

/// The files of a model: where the hive says that they lie, else where its name says.
fn files(model: &ModelRef, path: Option<&str>) -> Result<ModelFiles, ErrorBody> {
    let path = match (model, path) {
        (ModelRef::Tinybee, _) => return Ok(ModelFiles::Builtin(TINYBEE)),
        (_, Some(path)) => path,
        (ModelRef::Path(path), None) => path,
        (ModelRef::Hub { .. } | ModelRef::Alias(_), None) => {
            let message = format!("{model} is not a folder on this machine");
            return Err(ErrorBody::new(ErrorCode::ModelNotFound, message));
        }
    };
    let path = Path::new(path);
    let files = if is_gguf(path) { ModelFiles::gguf(path) } else { ModelFiles::folder(path) };
    files.map_err(|error| files_error(model, &error))
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("gguf"))
}

/// The error of a model's files as the wire has it.
pub(super) fn files_error(model: &ModelRef, error: &Error) -> ErrorBody {
    let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    let message = format!("{model} cannot be loaded: {error}{source}");
    let corrupt = "export or fetch it again; a folder needs config.json, tokenizer.json and model.safetensors, a GGUF file nothing else";
    match error {
        Error::NotFound(_) => ErrorBody::new(ErrorCode::ModelNotFound, message),
        Error::Files(inner) => match inner {
            rbee_models::FileError::Unsupported { .. } => ErrorBody::new(ErrorCode::ModelLoadFailed, message)
                .with_hint("docs/models.md lists what runs: folders in f32, f16 or bf16 and GGUF files of twelve model families, and encoders for embeddings"),
            _ => ErrorBody::new(ErrorCode::ModelCorrupt, message).with_hint(corrupt),
        },
        Error::Refused { .. } => {
            ErrorBody::new(ErrorCode::ModelCorrupt, message).with_hint(corrupt)
        }
        Error::Read { .. } => {
            ErrorBody::new(ErrorCode::ModelLoadFailed, message).with_hint("check the folder's permissions")
        }
        Error::OutOfMemory { need, free } => ErrorBody::new(ErrorCode::InsufficientMemory, message)
            .with_hint("free GPU memory (`nvidia-smi` shows who has it), or ask for a shorter --ctx or fewer --slots")
            .with_details(json!({ "needed": need, "free": free })),
        Error::Device(_) => ErrorBody::new(ErrorCode::DeviceUnavailable, message)
            .with_hint("`nvidia-smi` shows the GPUs and their driver; --device cpu needs neither"),
        Error::Option(_) => ErrorBody::new(ErrorCode::InvalidRequest, message),
    }
}

pub(super) fn text_error(model: &ModelRef, error: &TextError) -> ErrorBody {
    let code = match error {
        TextError::Unsupported { .. } => ErrorCode::ModelLoadFailed,
        _ => ErrorCode::ModelCorrupt,
    };
    ErrorBody::new(code, format!("{model} cannot be loaded: {error}"))
}

/// The options of a load, each checked.
fn options(load: &LoadOptions, kv_bytes: Option<u64>) -> Result<RunnerOptions, ErrorBody> {
    fn named<T: FromStr<Err = Error>>(text: Option<&str>) -> Result<Option<T>, ErrorBody> {
        let parsed = text.map(str::parse).transpose();
        parsed.map_err(|error: Error| ErrorBody::new(ErrorCode::InvalidRequest, error.to_string()))
    }
    Ok(RunnerOptions {
        threads: load.threads.map_or_else(physical_cores, |threads| threads as usize),
        slots: load.slots.unwrap_or(DEFAULT_SLOTS) as usize,
        context: load.ctx.map(|ctx| ctx as usize),
        kv_bytes,
        kv_type: named(load.kv_type.as_deref())?,
        quantize: named(load.quantize.as_deref())?,
        exact: std::env::var("RBEE_EXACT").is_ok_and(|exact| exact == "1"),
        isa: std::env::var("RBEE_ISA").ok(),
    })
}

/// Where a model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Computes {
    /// On the CPU.
    OnCpu,
    /// On an NVIDIA GPU.
    #[cfg(feature = "cuda")]
    OnGpu,
}

impl Computes {
    fn inspect(self, files: &ModelFiles, options: &RunnerOptions) -> Result<Needs, Error> {
        match self {
            Self::OnCpu => rbee_models::inspect(files, options),
            #[cfg(feature = "cuda")]
            Self::OnGpu if Kind::of(files)? == Kind::Encoder => Err(Error::Device(
                "it is an embedding model, which this build computes on the CPU only: use --device cpu".into(),
            )),
            #[cfg(feature = "cuda")]
            Self::OnGpu => rbee_models::inspect_cuda(files, options),
        }
    }

    /// Refuses a device that is not computed on, and options that mean nothing there.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "every option means something on the CPU"))]
    fn check(self, device: &str, load: &LoadOptions) -> Result<(), ErrorBody> {
        match self {
            Self::OnCpu if device == "cpu" => Ok(()),
            Self::OnCpu => Err(ErrorBody::new(ErrorCode::DeviceUnavailable, "this worker computes on the CPU only")
                .with_hint("a worker for NVIDIA GPUs is a program of its own, llm-worker-rbee-cuda; use --device cpu")),
            #[cfg(feature = "cuda")]
            Self::OnGpu if !device.starts_with("cuda:") => {
                Err(ErrorBody::new(ErrorCode::DeviceUnavailable, "this worker computes on NVIDIA GPUs only")
                    .with_hint("llm-worker-rbee computes on the CPU; use --device cuda:0"))
            }
            #[cfg(feature = "cuda")]
            Self::OnGpu if load.threads.is_some() => Err(ErrorBody::new(
                ErrorCode::InvalidRequest,
                "compute threads are for the CPU; a GPU has none to choose",
            )),
            #[cfg(feature = "cuda")]
            Self::OnGpu => Ok(()),
        }
    }
}

/// What a model needs in memory, without loading it.
///
/// # Errors
/// When its files cannot be used.
pub fn inspect(backend: Backend, model: &ModelRef, load: &LoadOptions) -> Result<LoadNeeds, ErrorBody> {
    let computes = match backend {
        #[cfg(feature = "cuda")]
        Backend::Cuda => Computes::OnGpu,
        Backend::Cpu | Backend::Sim => Computes::OnCpu,
    };
    let (files, options) = (files(model, None)?, options(load, None)?);
    let needs = crate::memory::bounded(parse_bound(model, &files)?, || computes.inspect(&files, &options))
        .map_err(|error| files_error(model, &error))?;
    let Needs { weights, kv_per_token, kv, scratch, total, least, context } = needs;
    Ok(LoadNeeds { weights, kv_per_token, kv, scratch, total, least, context })
}

/// Cores of this machine that compute well: without a second hardware thread of the same core.
fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut cores = std::collections::HashSet::new();
    let mut package = "";
    for line in text.lines() {
        if let Some((key, value)) = line.split_once(':') {
            match key.trim() {
                "physical id" => package = value.trim(),
                "core id" => drop(cores.insert((package, value.trim()))),
                _ => {}
            }
        }
    }
    if cores.is_empty() { logical } else { cores.len().min(logical) }
}

/// What the small files of a folder give.
struct Parsed {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

/// Address space that parsing may take beyond what the process has: this much, and so many times the files' own size.
const PARSE_ROOM: u64 = 512 << 20;
const PARSE_GROWTH: u64 = 16;

/// Address space for parsing a model's files.
fn parse_bound(model: &ModelRef, files: &ModelFiles) -> Result<u64, ErrorBody> {
    let (parsed, mapped) = files.sizes().map_err(|error| files_error(model, &error))?;
    Ok(PARSE_ROOM.saturating_add(PARSE_GROWTH.saturating_mul(parsed)).saturating_add(mapped))
}

/// Reads and checks everything but the weights' values.
fn parse(
    computes: Computes,
    model: &ModelRef,
    files: &ModelFiles,
    options: &RunnerOptions,
) -> Result<Parsed, ErrorBody> {
    let failed = |error: Error| files_error(model, &error);
    let text = |error: TextError| text_error(model, &error);
    let TextFiles { tokenizer, config, template } = TextFiles::of(model, files)?;
    computes.inspect(files, options).map_err(failed)?;
    let config = config.map(|bytes| TokenizerConfig::from_json(&bytes)).transpose().map_err(text)?.unwrap_or_default();
    let template = ChatTemplate::load(&config, template.as_deref()).map_err(text)?;
    let tokenizer = Tokenizer::from_json(&tokenizer).map_err(text)?;
    Ok(Parsed { tokenizer, template })
}

pub(super) fn load(
    computes: Computes,
    charge: &WorkerCharge,
    steps: &StepCounter,
    progress: &dyn Fn(LoadProgress),
) -> Result<Parts, ErrorBody> {
    computes.check(charge.device.as_str(), &charge.load)?;
    let model = &charge.model;
    let files = files(model, charge.path.as_deref())?;
    let options = options(&charge.load, charge.kv_bytes)?;
    let failed = |error: Error| files_error(model, &error);
    // All that is parsed comes first, within bounds: a folder that is not a model's is refused before gigabytes are read.
    let parsed = crate::memory::bounded(parse_bound(model, &files)?, || parse(computes, model, &files, &options))?;
    let each = |done, total| progress(LoadProgress { stage: "load".into(), done, total, unit: "bytes".into() });
    let kind = Kind::of(&files).map_err(failed)?;
    let (runner, about, taken): (Box<dyn ModelRunner>, About, u64) = match computes {
        Computes::OnCpu if kind == Kind::Encoder => {
            let runner = rbee_models::load_encoder(&files, &options, steps, &each).map_err(failed)?;
            let about = runner.about().clone();
            (Box::new(runner), about, 0)
        }
        Computes::OnCpu => {
            let runner = rbee_models::load(&files, &options, steps, &each).map_err(failed)?;
            let about = runner.about().clone();
            (Box::new(runner), about, 0)
        }
        #[cfg(feature = "cuda")]
        Computes::OnGpu => {
            let runner = rbee_models::load_cuda(&files, &gpu(charge), &options, steps, &each).map_err(failed)?;
            tracing::info!(device = %charge.device, name = runner.device(), bytes = runner.taken(), "on the GPU");
            let (about, taken) = (runner.about().clone(), runner.taken());
            (Box::new(runner), about, taken)
        }
    };
    let runner = match &charge.cores {
        Some(folder) => {
            let cores = Cores::new(Path::new(folder), physical_cores(), options.threads);
            Box::new(Sharing { runner, cores })
        }
        None => runner,
    };
    if !about.unknown_keys.is_empty() {
        let keys = about.unknown_keys.join(", ");
        tracing::warn!(%model, keys, "config.json has keys that this build does not know; they are left out");
    }
    let text = |error: TextError| text_error(model, &error);
    let Parsed { tokenizer, template } = parsed;
    let eos = about.eos;
    let tokenizer = tokenizer.with_control_ids(&eos).map_err(text)?;
    let limits = runner.limits();
    let vocab = limits.vocab;
    tokenizer.check_fits(vocab).map_err(text)?;
    let tokenizer = tokenizer.with_context(limits.context);
    let template = template.map(|template| (AnswerForm::of(&template, &tokenizer), template));
    let generation = about.generation;
    let defaults = SamplingDefaults {
        temperature: generation.temperature,
        top_p: generation.top_p,
        top_k: generation.top_k,
        repetition_penalty: generation.repetition_penalty,
    };
    let needs = about.needs;
    let facts = Facts {
        memory: WorkerMemory { weights: needs.weights, kv: needs.kv, total: taken },
        numerics_id: Some(about.numerics_id),
        fingerprint: Some(about.digest),
        row_invariant: true,
    };
    let forms = Forms::new(vocab, eos.clone());
    let side = ModelText { tokenizer, template, eos, defaults, forms };
    Ok(Parts { runner, text: Box::new(side), facts })
}

/// The GPU that a charge means.
#[cfg(feature = "cuda")]
fn gpu(charge: &WorkerCharge) -> rbee_models::Which {
    use rbee_models::Which;
    let number = || charge.device.as_str().strip_prefix("cuda:").and_then(|number| number.parse().ok()).unwrap_or(0);
    charge.device_uuid.clone().map_or_else(|| Which::Number(number()), Which::Uuid)
}

struct ModelText {
    tokenizer: Tokenizer,
    template: Option<(AnswerForm, ChatTemplate)>,
    eos: Vec<TokenId>,
    defaults: SamplingDefaults,
    forms: Forms,
}

fn refused(error: &TextError) -> ErrorBody {
    let code = match error {
        TextError::Template(_) | TextError::TemplateRefused(_) => ErrorCode::TemplateError,
        TextError::TooLong { .. } => ErrorCode::ContextLengthExceeded,
        _ => ErrorCode::InvalidRequest,
    };
    ErrorBody::new(code, error.to_string())
}

/// A message as templates have it.
fn for_template(said: &Message) -> Value {
    let mut value = message(&said.role, &said.content);
    if let Some(text) = &said.reasoning_content {
        value["reasoning_content"] = text.as_str().into();
    }
    if !said.tool_calls.is_empty() {
        value["tool_calls"] = json!(said.tool_calls);
    }
    for (name, text) in [("tool_call_id", &said.tool_call_id), ("name", &said.name)] {
        if let Some(text) = text {
            value[name] = text.as_str().into();
        }
    }
    value
}

impl ModelText {
    /// The prompt of a chat, and what takes the answer to it apart.
    fn chat(
        &self,
        (form, template): &(AnswerForm, ChatTemplate),
        messages: &[Value],
        generation: &Generation,
    ) -> Result<Encoded, ErrorBody> {
        let settings = generation.chat_template_kwargs.clone().unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let tools: Arc<[Value]> = match &generation.tools {
            Some(tools) if generation.may_call() => tools.as_slice().into(),
            _ => Arc::new([]),
        };
        if !tools.is_empty() && (!template.takes_tools() || !form.has_calls()) {
            return Err(super::no_tools());
        }
        let chat = Chat {
            messages,
            tools: &tools,
            settings: &settings,
            generation_prompt: GenerationPrompt::Add,
            now: i64::try_from(now).unwrap_or(0),
        };
        let prompt = self.tokenizer.encode_chat(template, &chat).map_err(|error| refused(&error))?;
        let most = if generation.parallel_tool_calls == Some(false) { Most::One } else { Most::Any };
        let answer = if tools.is_empty() && !form.has_reasoning() {
            Answer::Text
        } else {
            Answer::Parts(AnswerReader::new(form, prompt.begins, tools, most), prompt.begins)
        };
        Ok(Encoded { prompt: prompt.ids, note: None, answer })
    }
}

impl TextSide for ModelText {
    fn encode(&self, generation: &Generation) -> Result<Encoded, ErrorBody> {
        let refused = |error: TextError| refused(&error);
        let messages: Vec<Value> = match (&generation.messages, generation.prompt_text(), generation.raw) {
            (Some(messages), _, _) => messages.iter().map(for_template).collect(),
            (None, Some(prompt), Some(false)) => vec![message("user", prompt)],
            (None, prompt, _) => {
                // Who writes a raw prompt writes the template's own markers.
                let text = prompt.unwrap_or_default();
                let prompt = self.tokenizer.encode_prompt(text, Specials::AsControl).map_err(refused)?;
                return Ok(Encoded { prompt, note: None, answer: Answer::GoesOn });
            }
        };
        if let Some(template) = &self.template {
            return self.chat(template, &messages, generation);
        }
        if generation.may_call() {
            return Err(super::no_tools());
        }
        let texts: Vec<&str> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
        let prompt = self.tokenizer.encode_prompt(&texts.join("\n\n"), Specials::AsText).map_err(refused)?;
        let note = "the model has no chat template: the messages' text was sent as it stands".to_owned();
        Ok(Encoded { prompt, note: Some(note), answer: Answer::GoesOn })
    }

    fn embedded(&self, text: &str) -> Result<Vec<TokenId>, ErrorBody> {
        self.tokenizer.encode_whole(text).map_err(|error| refused(&error))
    }

    fn tokenize(&self, text: &str) -> Result<Vec<TokenId>, ErrorBody> {
        self.tokenizer.encode(text, Specials::AsText).map_err(|error| refused(&error))
    }

    fn output(&self, stop: &[String], answer: &Answer) -> Result<Box<dyn OutputText>, ErrorBody> {
        let stops = StopMatcher::new(stop).map_err(|error| refused(&error))?;
        let start = if matches!(answer, Answer::GoesOn) { Start::Continues } else { Start::Fresh };
        let detokenizer = self.tokenizer.detokenizer(Controls::Hide, start);
        let stream = match (answer, &self.template) {
            (Answer::Parts(reader, _), Some((form, _))) => {
                TextStream::new(detokenizer.showing(form.shown()), stops).with_reader(reader.clone())
            }
            _ => TextStream::new(detokenizer, stops),
        };
        Ok(Box::new(ModelOutput(stream)))
    }

    fn form(&self, generation: &Generation, answer: &Answer) -> Result<Option<AnswerIn>, ErrorBody> {
        let opening = match answer {
            Answer::GoesOn => Opening::Continues,
            Answer::Text => Opening::Fresh(Begins::Fresh),
            Answer::Parts(_, begins) => Opening::Fresh(*begins),
        };
        let plain = AnswerForm::default();
        let written = self.template.as_ref().map_or(&plain, |(form, _)| form);
        self.forms.of(generation, &self.tokenizer, written, opening)
    }

    fn token_text(&self, id: TokenId) -> String {
        self.tokenizer.decode(&[id], Controls::Show)
    }

    fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    fn defaults(&self) -> &SamplingDefaults {
        &self.defaults
    }
}

struct ModelOutput(TextStream);

impl OutputText for ModelOutput {
    fn push(&mut self, id: TokenId) -> Pushed {
        let rbee_tokenizer::Pushed { piece, stopped } = self.0.push(id);
        Pushed { piece: in_engine(piece), stopped }
    }

    fn finish(&mut self) -> Piece {
        in_engine(self.0.finish())
    }

    fn called(&self) -> bool {
        self.0.called()
    }
}

fn in_engine(piece: rbee_tokenizer::Piece) -> Piece {
    let rbee_tokenizer::Piece { text, reasoning, calls } = piece;
    let call = |rbee_tokenizer::CallPart { index, name, arguments }| CallPart { index, name, arguments };
    Piece { text, reasoning, calls: calls.into_iter().map(call).collect() }
}
