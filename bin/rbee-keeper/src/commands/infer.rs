//! `infer`, `run` and `job attach`: text to stdout as it comes, everything else to stderr.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use rbee_wire::event::{Event, Token};
use rbee_wire::fields::MAX_TEXT;
use rbee_wire::form::{NamedSchema, ResponseFormat};
use rbee_wire::job::{Generation, Infer, Message};
use rbee_wire::model::TINYBEE;
use rbee_wire::{ErrorBody, ErrorCode, JobRequest, ModelRef};
use serde_json::{Value, json};

use super::chat;
use crate::cli::{AnswerArgs, ChatArgs, GenerateArgs, InferArgs, RunArgs};
use crate::connect::{self, Start};
use crate::exit::{Exit, Failure, stdout_failure};
use crate::follow::{Follower, cancelled};
use crate::printer::{Data, Outcome, Shown, Thoughts};
use crate::render;
use crate::settings::Context;

/// `rbee infer`.
pub(crate) async fn infer(context: &Context, args: InferArgs) -> Result<Outcome, Failure> {
    let text = args.text.or(args.prompt);
    let no_prompt = "no prompt: give it as an argument, with --prompt, or through a pipe";
    let prompt = prompt(text, args.generate.raw, no_prompt).await?;
    generate(context, args.model.as_deref(), prompt, args.generate).await
}

/// `rbee run`.
pub(crate) async fn run(context: &Context, args: RunArgs) -> Result<Outcome, Failure> {
    let RunArgs { model, text, generate: args } = args;
    if text.is_some() || !io::stdin().is_terminal() {
        let prompt = prompt(text, args.raw, "no prompt: give it as an argument or through a pipe").await?;
        return generate(context, Some(&model), prompt, args).await;
    }
    let of_one_text =
        [("--raw", args.raw), ("--no-stream", args.no_stream), ("--detach", args.detach), ("--timings", args.timings)];
    if let Some((flag, _)) = of_one_text.into_iter().find(|(_, given)| *given) {
        return Err(Failure::usage(format!("without a prompt this is a chat, which has no {flag}"))
            .hint("give the prompt as an argument or through a pipe"));
    }
    chat::chat(context, ChatArgs { model: Some(model), answer: args.answer }).await
}

async fn generate(
    context: &Context,
    model: Option<&str>,
    prompt: String,
    args: GenerateArgs,
) -> Result<Outcome, Failure> {
    let print =
        Print { stream: if args.no_stream { Stream::AtTheEnd } else { Stream::AsItComes }, timings: args.timings };
    let detach = args.detach;
    let model = model.map(|model| model_ref(model, context.user.as_deref())).transpose()?;
    // What can be seen to be wrong is said before anything is started.
    let job = checked(&request(model, prompt, args)?)?;
    let queen = connect::queen(context, Start::IfNeeded).await?;
    if detach {
        let accepted = queen.post_job(&job, None).await?;
        let text = format!("{}\n", accepted.job_id);
        return Ok(Shown::new(json!(accepted), text).into());
    }
    let stream = queen.run_job(&job).await?;
    follow(context, Follower::new(context, queen, stream, "waiting for a worker"), print).await
}

fn request(model: Option<ModelRef>, prompt: String, args: GenerateArgs) -> Result<JobRequest, Failure> {
    let GenerateArgs { mut answer, raw, detach, .. } = args;
    let system = answer.system.take();
    let mut infer = settings(model, answer)?;
    if raw {
        infer.generation.prompt = Some(prompt.into());
        infer.generation.raw = Some(true);
    } else {
        let system = system.map(|text| Message::new("system", text));
        infer.generation.messages = Some(system.into_iter().chain([Message::new("user", prompt)]).collect());
    }
    infer.detach = detach.then_some(true);
    Ok(JobRequest::Infer(Box::new(infer)))
}

/// A request as the flags say, but for what is to be answered.
///
/// # Errors
/// For a form that is none.
pub(super) fn settings(model: Option<ModelRef>, args: AnswerArgs) -> Result<Infer, Failure> {
    Ok(Infer {
        model,
        generation: Generation {
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            top_p: args.top_p,
            top_k: args.top_k,
            min_p: args.min_p,
            repetition_penalty: args.repeat_penalty,
            stop: args.stop,
            seed: args.seed,
            response_format: args.response_format.as_deref().map(form).transpose()?,
            ..Generation::default()
        },
        device: args.device,
        worker_id: args.worker_id,
        hive_id: args.hive,
        deadline_ms: args.deadline_ms,
        no_load: args.no_load.then_some(true),
        keep_alive: args.keep_alive,
        ..Infer::default()
    })
}

/// The form of the answer, as `--response-format` has it.
fn form(text: &str) -> Result<ResponseFormat, Failure> {
    let wrong = |problem: String| {
        Failure::usage(format!("--response-format {problem}"))
            .hint("give `json`, a JSON schema, or @FILE with one: --response-format '{\"type\":\"object\"}'")
    };
    if text == "json" {
        return Ok(ResponseFormat::JsonObject {});
    }
    let text = match text.strip_prefix('@') {
        None => text.to_owned(),
        Some(path) => fs::read_to_string(path)
            .map_err(|error| wrong(format!("names {}, which cannot be read: {error}", path.escape_debug())))?,
    };
    let value: Value = serde_json::from_str(&text).map_err(|error| wrong(format!("is no JSON: {error}")))?;
    let Value::Object(fields) = value else { return Err(wrong("is no JSON object".into())) };
    // No schema's type has one of these names.
    let whole = matches!(
        fields.get("type").and_then(Value::as_str),
        Some("text" | "json_object" | "json_schema" | "regex" | "grammar")
    );
    if !whole {
        let json_schema = NamedSchema { schema: fields, ..NamedSchema::default() };
        return Ok(ResponseFormat::JsonSchema { json_schema });
    }
    serde_json::from_value(Value::Object(fields)).map_err(|error| wrong(format!("is no response format: {error}")))
}

/// The job as the queen will read it.
///
/// # Errors
/// When the queen would refuse it.
pub(super) fn checked(job: &JobRequest) -> Result<JobRequest, Failure> {
    let bytes = serde_json::to_vec(job).map_err(io::Error::from)?;
    JobRequest::parse(&bytes).map_err(Failure::refused)
}

/// The prompt: as given, or read from stdin for `-` and where none is given and stdin is no terminal.
async fn prompt(text: Option<String>, raw: bool, no_prompt: &str) -> Result<String, Failure> {
    let explicit = match text {
        Some(text) if text == "-" => true,
        Some(text) => return Ok(text),
        None if io::stdin().is_terminal() => {
            return Err(Failure::usage(no_prompt).hint("rbee infer \"Once upon a time\""));
        }
        None => false,
    };
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        io::stdin().lock().take(MAX_TEXT as u64 + 2).read_to_end(&mut bytes).map(|_| bytes)
    });
    let bytes = read
        .await
        .map_err(io::Error::from)?
        .map_err(|error| Failure::usage(format!("cannot read the prompt from stdin: {error}")))?;
    if bytes.is_empty() && !explicit {
        return Err(Failure::usage(no_prompt));
    }
    if bytes.len() > MAX_TEXT + 1 {
        return Err(Failure::usage(format!("the prompt on stdin is larger than {MAX_TEXT} bytes")));
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|error| Failure::usage(format!("the prompt on stdin is not UTF-8: {error}")))?;
    if !raw && text.ends_with('\n') {
        text.truncate(text.len() - if text.ends_with("\r\n") { 2 } else { 1 });
    }
    Ok(text)
}

/// A model as the command line names it: paths that depend on the working directory become absolute.
pub(crate) fn model_ref(text: &str, user: Option<&Path>) -> Result<ModelRef, Failure> {
    let wrong = |error: &dyn std::fmt::Display| {
        Failure::usage(format!("`{}` is not a model: {error}", text.escape_debug()))
            .hint("write tinybee, ORG/NAME, ORG/NAME:FILE.gguf, or the path of a folder or .gguf file")
    };
    let below_user = text.strip_prefix("~/").and_then(|rest| user.map(|user| user.join(rest)));
    let is_path =
        below_user.is_some() || text == "." || text == ".." || text.starts_with("./") || text.starts_with("../");
    let path = below_user.unwrap_or_else(|| PathBuf::from(text));
    let looks_like_one = text != TINYBEE && (text.contains('/') || text.ends_with(".gguf"));
    if !is_path && (path.is_absolute() || !looks_like_one || !path.exists()) {
        return text.parse().map_err(|error| wrong(&error));
    }
    if !path.exists() {
        let shown = path.display().to_string();
        let message = format!("there is no model at {}", shown.escape_debug());
        return Err(Failure::refused(
            ErrorBody::new(ErrorCode::ModelNotFound, message)
                .with_hint("name a folder with config.json and weights, or tinybee, which is built in"),
        ));
    }
    // `..` is followed as the system does, links included; without it the path stays as it was named.
    let dots = path.components().any(|part| part == std::path::Component::ParentDir);
    let absolute = if dots { path.canonicalize() } else { std::path::absolute(&path) };
    let absolute = absolute.map_err(|error| wrong(&error))?;
    let absolute = absolute.to_str().ok_or_else(|| wrong(&"its path is not UTF-8"))?;
    absolute.parse().map_err(|error| wrong(&error))
}

/// When text is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Token by token.
    AsItComes,
    /// Whole.
    AtTheEnd,
}

/// What of a job is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Print {
    /// When text is shown.
    pub(crate) stream: Stream,
    /// Whether stderr gets the table of timings.
    pub(crate) timings: bool,
}

/// Shows a job's stream to its end.
pub(crate) async fn follow(context: &Context, mut job: Follower<'_>, print: Print) -> Result<Outcome, Failure> {
    let printer = &context.printer;
    let mut out = Text::new(printer.stdout_terminal);
    let mut texts: Vec<String> = Vec::new();
    let mut thoughts = Thoughts::default();
    while let Some(event) = job.next().await? {
        if printer.data == Data::Json {
            let mut line = event.json.to_vec();
            line.push(b'\n');
            write(line).await?;
        }
        match event.event {
            Event::Token(token) if printer.data == Data::Text => {
                if token.choice == 0 {
                    thoughts.take(printer, &token);
                }
                // Several answers would be mixed up: the first is shown as it comes, the others after it.
                if print.stream == Stream::AsItComes && token.choice == 0 {
                    out.write(&token.t).await?;
                } else {
                    keep(&mut texts, token)?;
                }
            }
            Event::Data { value } if printer.data == Data::Text => {
                out.write(&render::any(&[value])).await?;
            }
            Event::Done(done) => {
                for text in &texts {
                    if out.last != '\n' {
                        out.write("\n").await?;
                    }
                    out.write(text).await?;
                }
                out.end().await?;
                if print.timings {
                    printer.asked(render::timings(done.usage.as_ref(), done.timings.as_ref()).trim_end());
                }
                if done.cancelled() {
                    return Err(Failure { on_stdout: true, ..cancelled() });
                }
            }
            Event::Error(body) => {
                out.end().await?;
                return Err(Failure { on_stdout: true, ..Failure::refused(body) });
            }
            _ => {}
        }
    }
    Ok(Outcome::Streamed)
}

/// Most answers of one job.
const MAX_CHOICES: usize = 16;

fn keep(texts: &mut Vec<String>, token: Token) -> Result<(), Failure> {
    let choice = token.choice as usize;
    if choice >= MAX_CHOICES {
        return Err(Failure::new(Exit::Fault, format!("the queen sent answer {choice} of at most {MAX_CHOICES}")));
    }
    if texts.len() <= choice {
        texts.resize(choice + 1, String::new());
    }
    texts[choice].push_str(&token.t);
    Ok(())
}

/// Generated text on stdout.
pub(super) struct Text {
    terminal: bool,
    last: char,
}

impl Text {
    pub(super) fn new(terminal: bool) -> Self {
        Self { terminal, last: '\n' }
    }

    /// Writes it as it may be shown.
    pub(super) async fn write(&mut self, text: &str) -> Result<(), Failure> {
        let Some(last) = text.chars().next_back() else { return Ok(()) };
        self.last = last;
        // A model's text must not move a person's cursor; a pipe gets the very bytes.
        let bytes = if self.terminal { crate::printer::printable(text).into_bytes() } else { text.into() };
        write(bytes).await
    }

    /// What comes next on a terminal begins a line.
    pub(super) async fn end(&mut self) -> Result<(), Failure> {
        if self.terminal && self.last != '\n' { self.write("\n").await } else { Ok(()) }
    }
}

/// Writes and flushes away from this thread, so that a reader who stands still does not keep Ctrl-C out.
async fn write(bytes: Vec<u8>) -> Result<(), Failure> {
    let written = tokio::task::spawn_blocking(move || {
        let mut out = io::stdout().lock();
        out.write_all(&bytes)?;
        out.flush()
    });
    written.await.map_err(io::Error::from)?.map_err(stdout_failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chat_message_is_sent_unless_raw() {
        let json = |args: GenerateArgs| serde_json::to_value(request(None, "hi".into(), args).unwrap()).unwrap();
        assert_eq!(
            json(GenerateArgs {
                answer: AnswerArgs { system: Some("be".into()), temperature: Some(0.5), ..Default::default() },
                ..Default::default()
            }),
            json!({"operation": "infer", "temperature": 0.5, "messages": [
                {"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]})
        );
        assert_eq!(
            json(GenerateArgs {
                answer: AnswerArgs { stop: vec!["x".into()], ..Default::default() },
                raw: true,
                ..Default::default()
            }),
            json!({"operation": "infer", "prompt": "hi", "raw": true, "stop": ["x"]})
        );
    }

    #[test]
    fn a_form_is_a_word_a_schema_or_the_apis_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("schema.json");
        fs::write(&file, r#"{"type":"array"}"#).unwrap();
        let get = |text: &str| match form(text) {
            Ok(form) => serde_json::to_string(&form).unwrap(),
            Err(failure) => format!("{}: {}", failure.exit.code(), failure.message),
        };
        let schema = |text: &str| format!(r#"{{"type":"json_schema","json_schema":{{"schema":{text}}}}}"#);
        assert_eq!(get("json"), r#"{"type":"json_object"}"#);
        let object = r#"{"type":"object","properties":{"b":{},"a":{}}}"#;
        assert_eq!(get(object), schema(object));
        assert_eq!(get("{}"), schema("{}"));
        assert_eq!(get(&format!("@{}", file.display())), schema(r#"{"type":"array"}"#));
        assert_eq!(get(r#"{"type":"regex","regex":"a+"}"#), r#"{"type":"regex","regex":"a+"}"#);
        for (wrong, why) in [
            ("xml", "is no JSON"),
            ("[1]", "is no JSON object"),
            ("@/none/of/this", "cannot be read"),
            (r#"{"type":"regex"}"#, "is no response format"),
        ] {
            let told = get(wrong);
            assert!(told.starts_with("2: --response-format") && told.contains(why), "{told}");
        }
    }

    #[test]
    fn a_models_path_becomes_absolute_and_names_stay_names() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir(root.join("m")).unwrap();
        let get = |text: &str| {
            let model = model_ref(text, Some(&root)).map_err(|failure| failure.exit.code())?;
            Ok(model.to_string())
        };
        let path = |name: &str| Ok::<_, u8>(root.join(name).to_str().unwrap().to_owned());
        assert_eq!(get("~/m"), path("m"));
        assert_eq!(get("~/m/../m"), path("m"));
        assert_eq!(get("~/none"), Err(3));
        assert_eq!(get("./none-of-this-name"), Err(3));
        assert_eq!(get("tinybee"), Ok("tinybee".into()));
        assert_eq!(get("org/name:Q4_K_M"), Ok("org/name:Q4_K_M".into()));
        assert_eq!(get("/not/here"), Ok("/not/here".into()));
        assert_eq!(get("a b"), Err(2));
        // Tests run in the package's folder, which has these.
        let here = std::env::current_dir().unwrap();
        let src = here.join("src").to_str().unwrap().to_owned();
        assert_eq!(get("./src"), Ok(src));
        assert_eq!(get("src/commands"), Ok(here.join("src/commands").to_str().unwrap().to_owned()));
        assert_eq!(get("src"), Ok("src".into()), "a bare word is an alias, whatever lies here");
    }
}
