//! The line editor: rustyline with this chat's rules for texts of several lines. What was typed is kept in memory
//! and nowhere else.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustyline::completion::Completer;
use rustyline::config::BellStyle;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Behavior, ColorMode, CompletionType, Config, Helper};

use super::input::{COMMANDS, continues, is_open, joined};
use crate::exit::{Exit, Failure};

const PROMPT: &str = "> ";

/// Texts that arrow up brings back.
const KEPT: usize = 1000;

/// What came of editing a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// A text, of several lines perhaps.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D on an empty line, or the terminal is gone.
    End,
}

/// The line editor.
pub(super) struct Editor(Option<rustyline::Editor<Rules, MemHistory>>);

impl Editor {
    /// An editor on the terminal itself, so that stdout has answers alone.
    ///
    /// # Errors
    /// When the terminal cannot be used.
    pub(super) fn new() -> Result<Self, Failure> {
        let config = Config::builder()
            .behavior(Behavior::PreferTerm)
            .max_history_size(KEPT)
            .map_err(unusable)?
            .completion_type(CompletionType::List)
            .bell_style(BellStyle::None)
            .color_mode(ColorMode::Disabled)
            .build();
        let mut editor = rustyline::Editor::with_history(config, MemHistory::new()).map_err(unusable)?;
        editor.set_helper(Some(Rules::default()));
        Ok(Self(Some(editor)))
    }

    /// Lets a person type; away from this thread, whose connections live on meanwhile.
    ///
    /// # Errors
    /// When the terminal fails.
    pub(super) async fn read(&mut self) -> Result<Read, Failure> {
        let mut editor = self.0.take().ok_or_else(|| unusable("it is being read from"))?;
        let reading = tokio::task::spawn_blocking(move || {
            let read = editor.readline(PROMPT).and_then(|text| {
                let continued = editor.helper().map(|rules| std::mem::take(&mut *rules.continued()));
                let text = joined(text, &continued.unwrap_or_default());
                editor.add_history_entry(text.as_str())?;
                Ok(text)
            });
            (editor, read)
        });
        let (editor, read) = reading.await.map_err(io::Error::from)?;
        self.0 = Some(editor);
        match read {
            Ok(text) => Ok(Read::Text(text)),
            Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => Ok(Read::Interrupted),
            Err(ReadlineError::Eof) => Ok(Read::End),
            Err(error) => Err(unusable(error)),
        }
    }
}

fn unusable(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Fault, format!("cannot read from the terminal: {error}"))
}

/// When a text is whole, and which commands Tab completes.
#[derive(Default)]
struct Rules {
    /// What stood there each time that Enter was hit after a backslash.
    continued: Mutex<Vec<String>>,
}

impl Rules {
    fn continued(&self) -> MutexGuard<'_, Vec<String>> {
        self.continued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Helper for Rules {}

impl Highlighter for Rules {}

impl Hinter for Rules {
    type Hint = String;
}

impl Validator for Rules {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let text = context.input();
        if continues(text) {
            self.continued().push(text.to_owned());
        } else if !is_open(text) {
            return Ok(ValidationResult::Valid(None));
        }
        Ok(ValidationResult::Incomplete)
    }
}

impl Completer for Rules {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        at: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Self::Candidate>)> {
        let typed = &line[..at];
        let names = COMMANDS.iter().map(|row| row.0).filter(|name| !typed.is_empty() && name.starts_with(typed));
        Ok((0, names.map(str::to_owned).collect()))
    }
}
