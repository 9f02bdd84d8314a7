//! `chat`: a conversation in the terminal. Every turn is a job of its own that carries the whole conversation.
//!
//! Nothing that goes wrong with a turn ends the chat: the failure is shown, the question is taken back, and arrow
//! up brings it again. Start with [`Chat::turn`]; [`input`] says what a person can type, [`transcript`] what is
//! remembered.

mod editor;
mod files;
mod input;
mod parameters;
mod terminal;
mod transcript;

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use rbee_wire::event::{Done, Event, FinishReason};
use rbee_wire::job::Infer;
use rbee_wire::{ErrorCode, JobRequest, ModelRef};
use tokio::signal::unix::{SignalKind, signal};

use self::editor::{Editor, Read};
use self::input::{COMMANDS, Command, TYPING, Typed, parse};
use self::terminal::Terminal;
use self::transcript::{End, Transcript, Turn};
use super::infer::{Text, checked, model_ref, settings};
use crate::cli::ChatArgs;
use crate::connect::{self, Start};
use crate::exit::Failure;
use crate::follow::{self, Follower, cancelled};
use crate::printer::{Data, Outcome, Printer, Thoughts, Title};
use crate::render;
use crate::settings::{Context, CtrlC};

/// `rbee chat`.
pub(crate) async fn chat(context: &Context, mut args: ChatArgs) -> Result<Outcome, Failure> {
    if context.printer.data == Data::Json {
        return Err(Failure::usage("a chat is for people and has no JSON")
            .hint("`rbee infer --json` gives one answer as JSON lines"));
    }
    if !io::stdin().is_terminal() || !context.printer.stdout_terminal {
        return Err(Failure::usage("a chat needs a terminal to read from and to write to")
            .hint("`rbee infer` takes its prompt as an argument or through a pipe"));
    }
    let model = args.model.map(|model| model_ref(&model, context.user.as_deref())).transpose()?;
    let transcript = Transcript { system: args.answer.system.take(), turns: Vec::new() };
    let mut chat = Chat { context, settings: settings(model, args.answer)?, transcript };
    // What can be seen to be wrong is said before anything is started.
    chat.job("")?;
    connect::reach(context, Start::IfNeeded).await?;
    let terminal = Terminal::new()?;
    let (mut terminate, mut hangup) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    context.ctrl_c.set(CtrlC::Part);
    tokio::select! {
        outcome = chat.talk(&terminal) => outcome.map(|()| Outcome::Streamed),
        // Left in order: the terminal as it was, and nobody computes on.
        _ = terminate.recv() => Err(Failure::interrupted()),
        _ = hangup.recv() => Err(Failure::interrupted()),
    }
}

/// A conversation.
struct Chat<'a> {
    context: &'a Context,
    /// The request of every turn, but for its messages.
    settings: Infer,
    transcript: Transcript,
}

/// Whether the chat goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Line,
    Leave,
}

impl Chat<'_> {
    /// Reads, answers, and does what it is told until it is to leave.
    async fn talk(&mut self, terminal: &Terminal) -> Result<(), Failure> {
        let printer = &self.context.printer;
        printer.note("/help lists the commands, Ctrl-D leaves");
        let mut editor = Editor::new()?;
        let mut interrupted = false;
        loop {
            let text = match editor.read().await? {
                Read::Text(text) => text,
                Read::Interrupted => {
                    if interrupted {
                        printer.note("/bye or Ctrl-D leaves");
                    }
                    interrupted = true;
                    continue;
                }
                Read::End => return Ok(()),
            };
            interrupted = false;
            let next = match parse(&text) {
                Ok(Typed::Nothing) => Ok(Next::Line),
                Ok(Typed::Message(question)) => self.turn(question, terminal).await,
                Ok(Typed::Command(command)) => self.command(command),
                Err(failure) => Err(failure),
            };
            match next {
                Ok(Next::Line) => {}
                Ok(Next::Leave) => return Ok(()),
                Err(failure) if failure.reader_left => return Err(failure),
                Err(failure) => printer.failure(&failure),
            }
        }
    }

    /// The next turn's job, as the queen will read it.
    fn job(&self, question: &str) -> Result<JobRequest, Failure> {
        let mut infer = self.settings.clone();
        infer.generation.messages = Some(self.transcript.messages(question));
        checked(&JobRequest::Infer(Box::new(infer)))
    }

    /// Has a question answered. Ctrl-C stops the answer.
    async fn turn(&mut self, question: String, terminal: &Terminal) -> Result<Next, Failure> {
        let context = self.context;
        let printer = &context.printer;
        let job = self.job(&question)?;
        // Of this turn alone: one that came too late for the last answer is not for this one.
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut answer = Answer::new(printer);
        let hushed = terminal.hush();
        let outcome = tokio::select! {
            outcome = self.ask(&job, &mut answer) => Some(outcome),
            _ = interrupts.recv() => None,
        };
        if outcome.is_none() {
            hushed.forget_typing();
            follow::cancel_current(context, &mut interrupts).await;
        }
        context.current.replace(None);
        let Answer { mut out, text, pace, .. } = answer;
        printer.progress_over();
        out.end().await?;
        drop(hushed);
        let end = match outcome {
            Some(Ok(done)) => {
                let (end, told) = ended(&done, &pace);
                printer.note(&told);
                end
            }
            None if text.is_empty() => {
                printer.note(&format!("stopped before the answer began; {TAKEN_BACK}"));
                return Ok(Next::Line);
            }
            None => {
                let told = pace.told(pace.tokens, pace.rate());
                printer.note(&format!("stopped; {told}; what came of the answer stays in the conversation"));
                End::Stopped
            }
            Some(Err(failure)) if failure.reader_left => return Err(failure),
            Some(Err(failure)) => {
                let full = failure.body.as_ref().is_some_and(|body| body.code == ErrorCode::ContextLengthExceeded);
                printer.failure(&failure);
                printer.note(TAKEN_BACK);
                if full {
                    printer.note("/clear begins a new conversation, /save FILE keeps this one");
                }
                return Ok(Next::Line);
            }
        };
        self.transcript.turns.push(Turn { question, answer: text, end });
        Ok(Next::Line)
    }

    /// Posts the job and shows its text as it comes.
    async fn ask(&mut self, job: &JobRequest, answer: &mut Answer) -> Result<Done, Failure> {
        let context = self.context;
        let reached = connect::reach(context, Start::IfNeeded).await?;
        if reached.started {
            context.printer.note("the queen was gone and has been started again");
        }
        let stream = reached.client.run_job(job).await?;
        let mut follower = Follower::new(context, reached.client, stream, "waiting for a worker");
        while let Some(event) = follower.next().await? {
            match event.event {
                // Who answered first goes on answering.
                Event::Started(started) => self.settings.model = Some(started.model),
                Event::Token(token) => {
                    answer.thoughts.take(&context.printer, &token);
                    answer.token(&token.t).await?;
                }
                Event::Done(done) if done.cancelled() => return Err(cancelled()),
                Event::Done(done) => return Ok(done),
                Event::Error(body) => return Err(Failure::refused(body)),
                _ => {}
            }
        }
        Ok(Done::default())
    }

    fn command(&mut self, command: Command) -> Result<Next, Failure> {
        let printer = &self.context.printer;
        match command {
            Command::Help => printer.asked(help().trim_end()),
            Command::System(None) => {
                printer.asked(self.transcript.system.as_deref().unwrap_or("there is no system message"));
            }
            Command::System(Some(text)) if text.is_empty() => {
                self.transcript.system = None;
                printer.note("there is no system message from now on");
            }
            Command::System(Some(text)) => {
                self.transcript.system = Some(text);
                printer.note("the system message holds from the next answer on");
            }
            Command::Model(None) => printer.asked(&name(self.settings.model.as_ref())),
            Command::Model(Some(text)) => {
                self.settings.model = Some(model_ref(&text, self.context.user.as_deref())?);
                printer.note(&format!("{} gives the next answer", name(self.settings.model.as_ref())));
            }
            Command::Save(file) => {
                let path = files::path(&file, self.context.user.as_deref());
                files::write(&path, &self.transcript.to_file(self.settings.model.as_ref()))
                    .map_err(|failure| about("save to", &file, failure))?;
                printer.note(&format!("{} saved to {file}", self.size()));
            }
            Command::Load(file) => {
                let path = files::path(&file, self.context.user.as_deref());
                let (transcript, model) = files::read(&path)
                    .and_then(|bytes| Transcript::from_file(&bytes))
                    .map_err(|failure| about("load", &file, failure))?;
                self.transcript = transcript;
                if model.is_some() {
                    self.settings.model = model;
                }
                printer.note(&format!("{} loaded, for {}", self.size(), name(self.settings.model.as_ref())));
            }
            Command::Clear => {
                self.transcript.turns.clear();
                printer.note("the conversation begins anew");
            }
            Command::Set(None) => printer.asked(parameters::show(&self.settings, None)?.trim_end()),
            Command::Set(Some((name, None))) => {
                printer.asked(parameters::show(&self.settings, Some(&name))?.trim_end());
            }
            Command::Set(Some((name, Some(value)))) => {
                self.settings = parameters::set(&self.settings, &name, &value)?;
                printer.note(parameters::show(&self.settings, Some(&name))?.lines().last().unwrap_or_default());
            }
            Command::Bye => return Ok(Next::Leave),
        }
        Ok(Next::Line)
    }

    fn size(&self) -> String {
        match self.transcript.turns.len() {
            1 => "1 question with its answer".into(),
            n => format!("{n} questions with their answers"),
        }
    }
}

const TAKEN_BACK: &str = "the question is not in the conversation: arrow up brings it again";

fn name(model: Option<&ModelRef>) -> String {
    model.map_or_else(|| "the default model".into(), ToString::to_string)
}

fn about(attempt: &str, file: &str, failure: Failure) -> Failure {
    Failure { message: format!("cannot {attempt} {}: {}", file.escape_debug(), failure.message), ..failure }
}

fn help() -> String {
    let commands = COMMANDS.iter().map(|(name, takes, about)| (format!("{name} {takes}"), (*about).to_owned()));
    let typing = TYPING.iter().map(|(keys, about)| ((*keys).to_owned(), (*about).to_owned()));
    let rows: Vec<(String, String)> = commands.chain(typing).collect();
    render::fields(&rows.iter().map(|(name, about)| (name.trim_end(), about.clone())).collect::<Vec<_>>())
}

/// How an answer ended, and what a person is told of it.
fn ended(done: &Done, pace: &Pace) -> (End, String) {
    let tokens = done.usage.map_or(pace.tokens, |usage| usage.completion_tokens);
    let rate = done.timings.map(|timings| timings.tokens_per_s).filter(|rate| *rate > 0.0).or_else(|| pace.rate());
    let told = pace.told(tokens, rate);
    match done.choices.first().map(|choice| choice.finish_reason) {
        Some(FinishReason::Length) => (End::Length, format!("{told}; cut off by max_tokens or the context's end")),
        _ => (End::Whole, told),
    }
}

/// An answer as it comes.
struct Answer {
    thoughts: Thoughts,
    out: Text,
    text: String,
    pace: Pace,
    title: Title,
    titled: Instant,
}

/// How often the title says the pace.
const TITLE_EVERY: Duration = Duration::from_millis(500);

impl Answer {
    fn new(printer: &Printer) -> Self {
        let now = Instant::now();
        let pace = Pace { asked: now, first: None, last: now, tokens: 0 };
        Self {
            thoughts: Thoughts::default(),
            out: Text::new(printer.stdout_terminal),
            text: String::new(),
            pace,
            title: printer.title(),
            titled: now,
        }
    }

    async fn token(&mut self, text: &str) -> Result<(), Failure> {
        let now = Instant::now();
        self.pace.token(now);
        self.text.push_str(text);
        self.out.write(text).await?;
        if let Some(rate) = self.pace.rate()
            && now.duration_since(self.titled) >= TITLE_EVERY
        {
            self.title.set(&format!("rbee: {rate:.1} tokens/s"));
            self.titled = now;
        }
        Ok(())
    }
}

/// How fast an answer comes, as the person who asked sees it.
#[derive(Clone, Copy, Debug)]
struct Pace {
    asked: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u64,
}

impl Pace {
    fn token(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        self.last = now;
        self.tokens += 1;
    }

    /// Tokens a second after the first one.
    fn rate(&self) -> Option<f64> {
        let seconds = self.last.duration_since(self.first?).as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }

    fn told(&self, tokens: u64, rate: Option<f64>) -> String {
        let mut told = if tokens == 1 { "1 token".to_owned() } else { format!("{tokens} tokens") };
        if let Some(rate) = rate {
            told.push_str(&format!(", {rate:.1} tokens/s"));
        }
        if let Some(first) = self.first {
            let wait = first.duration_since(self.asked).as_secs_f64();
            told.push_str(&format!(", the first after {wait:.2} s"));
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_told_in_a_line() {
        let start = Instant::now();
        let mut pace = Pace { asked: start, first: None, last: start, tokens: 0 };
        assert_eq!(pace.told(0, pace.rate()), "0 tokens");
        pace.token(start + Duration::from_millis(250));
        assert_eq!(pace.told(1, pace.rate()), "1 token, the first after 0.25 s");
        pace.token(start + Duration::from_millis(350));
        pace.token(start + Duration::from_millis(450));
        assert_eq!(pace.told(3, pace.rate()), "3 tokens, 10.0 tokens/s, the first after 0.25 s");
        let (end, told) = ended(&Done::default(), &pace);
        assert_eq!((end, told.as_str()), (End::Whole, "3 tokens, 10.0 tokens/s, the first after 0.25 s"));
    }
}
