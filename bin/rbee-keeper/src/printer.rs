//! Decides what stdout and stderr show. stdout is data; stderr is everything else, and `-q` leaves only errors.
//!
//! A progress line appears only when something takes long: on a terminal as one line that is overwritten,
//! elsewhere as a line now and then.

use std::cell::{Cell, RefCell};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use rbee_wire::event::Token;
use serde_json::Value;

use crate::cli::{Color, Global};
use crate::exit::{Exit, Failure, stdout_failure};

/// What stdout shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// Text and tables.
    Text,
    /// JSON documents or lines.
    Json,
}

/// What stderr shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Talk {
    /// Errors alone.
    Quiet,
    /// Progress, hints and warnings too.
    Normal,
    /// Details too.
    Verbose,
}

/// What a command returns: the same facts for programs and for people.
#[derive(Debug)]
pub struct Shown {
    /// For `--json`.
    pub json: Value,
    /// For people; ends with a newline unless empty.
    pub text: String,
    /// What the program exits with.
    pub exit: Exit,
}

impl Shown {
    /// A result of a command that worked.
    pub fn new(json: Value, text: impl Into<String>) -> Self {
        Self { json, text: text.into(), exit: Exit::Done }
    }
}

/// How a command ended that worked.
#[derive(Debug)]
pub enum Outcome {
    /// With this to show.
    Shown(Shown),
    /// It has shown everything as it went along.
    Streamed,
}

impl From<Shown> for Outcome {
    fn from(shown: Shown) -> Self {
        Self::Shown(shown)
    }
}

/// Time after which a terminal shows progress.
const SHOW_AFTER: Duration = Duration::from_millis(400);

/// Time after which a pipe or file is told of progress, and between two such lines.
const TELL_EVERY: Duration = Duration::from_secs(3);

/// Decides what stdout and stderr show.
#[derive(Debug)]
pub struct Printer {
    /// What stdout shows.
    pub data: Data,
    /// What stderr shows.
    pub talk: Talk,
    /// Whether stdout is a terminal.
    pub stdout_terminal: bool,
    stderr_terminal: bool,
    color: bool,
    titles: bool,
    line_shown: Cell<bool>,
    waiting: RefCell<Option<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    told: Option<Instant>,
}

impl Printer {
    /// As the flags, the environment and the terminals say.
    pub fn new(global: &Global, env: &dyn Fn(&str) -> Option<String>) -> Self {
        let stderr_terminal = io::stderr().is_terminal();
        let dumb = env("TERM").as_deref() == Some("dumb");
        let plain = env("NO_COLOR").is_some_and(|text| !text.is_empty()) || dumb;
        Self {
            data: if global.json { Data::Json } else { Data::Text },
            talk: match (global.quiet, global.verbose) {
                (true, _) => Talk::Quiet,
                (false, true) => Talk::Verbose,
                (false, false) => Talk::Normal,
            },
            stdout_terminal: io::stdout().is_terminal(),
            stderr_terminal,
            color: match global.color {
                Color::Auto => stderr_terminal && !plain,
                Color::Always => true,
                Color::Never => false,
            },
            titles: stderr_terminal && !dumb && !global.quiet,
            line_shown: Cell::new(false),
            waiting: RefCell::new(None),
        }
    }

    /// Shows a command's result.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn show(&self, shown: &Shown) -> Result<(), Failure> {
        self.clear_line();
        let mut out = io::stdout().lock();
        let written = match self.data {
            Data::Text => out.write_all(shown.text.as_bytes()),
            Data::Json => serde_json::to_writer(&mut out, &shown.json)
                .map_err(io::Error::from)
                .and_then(|()| out.write_all(b"\n")),
        };
        written.and_then(|()| out.flush()).map_err(stdout_failure)
    }

    /// What a person may want to know.
    pub fn note(&self, text: &str) {
        self.say(Talk::Normal, "2", "", text);
    }

    /// Likely not what was wanted.
    pub fn warn(&self, text: &str) {
        self.say(Talk::Normal, "1;33", "warning: ", text);
    }

    /// A piece of a model's reasoning.
    fn thought(&self, text: &str) {
        if self.talk < Talk::Normal || text.is_empty() {
            return;
        }
        self.clear_line();
        let text = printable(text);
        let _ = if self.color { write!(io::stderr(), "\x1b[2m{text}\x1b[0m") } else { write!(io::stderr(), "{text}") };
    }

    /// Asked for by itself: shown also under `-q`.
    pub fn asked(&self, text: &str) {
        self.say(Talk::Quiet, "", "", text);
    }

    /// What only `-v` shows.
    pub fn detail(&self, text: &str) {
        self.say(Talk::Verbose, "2", "", text);
    }

    /// An error and what to do next.
    pub fn failure(&self, failure: &Failure) {
        self.clear_line();
        if self.data == Data::Json && !failure.on_stdout && !failure.message.is_empty() {
            let mut out = io::stdout().lock();
            let _ = serde_json::to_writer(&mut out, &failure.json()).map_err(io::Error::from);
            let _ = out.write_all(b"\n").and_then(|()| out.flush());
        }
        if failure.message.is_empty() {
            return;
        }
        self.say(Talk::Quiet, "1;31", "error: ", &failure.message);
        for hint in &failure.hints {
            self.say(Talk::Normal, "36", "hint: ", hint);
        }
        if let Some(body) = &failure.body {
            if let Some(details) = &body.details {
                self.detail(&format!("details: {details}"));
            }
            if let Some(request) = &body.request_id {
                self.detail(&format!("request: {request}"));
            }
        }
    }

    /// Something is under way; shown once it takes long. Called again and again.
    pub fn progress(&self, text: &str) {
        if self.talk < Talk::Normal {
            return;
        }
        let now = Instant::now();
        let mut waiting = self.waiting.borrow_mut();
        let waiting = waiting.get_or_insert(Waiting { since: now, told: None });
        if self.stderr_terminal {
            if now.duration_since(waiting.since) >= SHOW_AFTER {
                // A line that wrapped could not be overwritten.
                let shown: String = printable(text).chars().take(columns().min(100)).collect();
                let _ = write!(io::stderr(), "\r\x1b[K{shown}");
                self.line_shown.set(true);
            }
        } else if now.duration_since(waiting.told.unwrap_or(waiting.since)) >= TELL_EVERY {
            waiting.told = Some(now);
            let _ = writeln!(io::stderr(), "{}", printable(text));
        }
    }

    /// What was under way is over: the line goes, and the next thing starts its own time.
    pub fn progress_over(&self) {
        self.clear_line();
        *self.waiting.borrow_mut() = None;
    }

    /// The terminal's title, to be taken over while something is under way.
    pub fn title(&self) -> Title {
        Title { seen: self.titles, taken: false }
    }

    fn clear_line(&self) {
        if self.line_shown.replace(false) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }

    fn say(&self, from: Talk, style: &str, label: &str, text: &str) {
        if self.talk < from {
            return;
        }
        self.clear_line();
        let text = printable(text);
        // A closed stderr is no reason to stop.
        let _ = if self.color && !style.is_empty() {
            match label {
                "" => writeln!(io::stderr(), "\x1b[{style}m{text}\x1b[0m"),
                _ => writeln!(io::stderr(), "\x1b[{style}m{label}\x1b[0m{text}"),
            }
        } else {
            writeln!(io::stderr(), "{label}{text}")
        };
    }
}

/// The terminal's title while something is under way: read without a sign among the text. The terminal keeps the
/// one it had and gets it back.
#[derive(Debug)]
pub struct Title {
    seen: bool,
    taken: bool,
}

impl Title {
    /// Says this.
    pub fn set(&mut self, text: &str) {
        if self.seen {
            let keep = if self.taken { "" } else { "\x1b[22;2t" };
            self.taken = true;
            let _ = write!(io::stderr(), "{keep}\x1b]2;{}\x07", printable(text).replace('\n', " "));
        }
    }
}

impl Drop for Title {
    fn drop(&mut self) {
        if self.taken {
            // A terminal that keeps no titles is left with one that is not wrong.
            self.set("rbee");
            let _ = write!(io::stderr(), "\x1b[23;2t");
        }
    }
}

/// What fits on a line of the terminal on stderr.
fn columns() -> usize {
    match rustix::termios::tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 1 => usize::from(size.ws_col) - 1,
        _ => 79,
    }
}

/// A model's reasoning on its way to stderr: the answer is data, and this is not.
#[derive(Debug, Default)]
pub struct Thoughts {
    open: bool,
}

impl Thoughts {
    /// Shows what a token brought, before its text is shown: the answer begins on a line of its own.
    pub fn take(&mut self, printer: &Printer, token: &Token) {
        printer.thought(&token.reasoning);
        self.open |= !token.reasoning.is_empty();
        if self.open && !token.t.is_empty() {
            printer.thought("\n\n");
            self.open = false;
        }
    }
}

/// Text of other programs without control characters, which could move a terminal's cursor.
pub fn printable(text: &str) -> String {
    let fine = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(fine) {
        return text.to_owned();
    }
    text.chars().flat_map(|c| if fine(c) { vec![c] } else { c.escape_default().collect() }).collect()
}
