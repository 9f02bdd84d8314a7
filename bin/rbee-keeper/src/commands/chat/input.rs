//! What a person typed: a message, or a command, which begins with `/`.

use crate::exit::Failure;

/// Opens and closes a text of several lines that is taken as it is.
const QUOTES: &str = "\"\"\"";

/// What a person typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// Nothing to do.
    Nothing,
    /// To be answered by the model.
    Message(String),
    /// To be carried out here.
    Command(Command),
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Lists the commands.
    Help,
    /// Shows or sets the system message; an empty one takes it away.
    System(Option<String>),
    /// Shows or sets the model.
    Model(Option<String>),
    /// Writes the chat to a file.
    Save(String),
    /// Goes on with the chat in a file.
    Load(String),
    /// Forgets the messages.
    Clear,
    /// Shows the parameters, or one, or sets one.
    Set(Option<(String, Option<String>)>),
    /// Leaves.
    Bye,
}

/// Name, arguments and meaning of each command, in the order of the list.
pub(super) const COMMANDS: &[(&str, &str, &str)] = &[
    ("/help", "", "this list"),
    ("/system", "[TEXT]", "the system message; \"\" takes it away"),
    ("/model", "[REF]", "who answers from now on"),
    ("/save", "FILE", "write this chat to a file"),
    ("/load", "FILE", "go on with the chat in a file"),
    ("/clear", "", "forget the messages; model, system message and parameters stay"),
    ("/set", "[NAME [VALUE]]", "the parameters; `default` leaves one to the model again"),
    ("/bye", "", "leave, as Ctrl-D does"),
];

/// What else a person may want to know of typing.
pub(super) const TYPING: &[(&str, &str)] = &[
    ("\"\"\"", "begins a text of several lines, which ends with a line that ends in \"\"\""),
    ("\\", "at the end of a line goes on with the next"),
    ("//", "sends a text that begins with /"),
    ("Ctrl-C", "stops an answer or clears the line"),
];

/// Whether more lines must come before the text can be taken.
pub(super) fn is_open(text: &str) -> bool {
    argument(text).strip_prefix(QUOTES).is_some_and(|rest| !rest.trim_end().ends_with(QUOTES))
}

/// Whether the text's last line is to be followed by another: it ends in a backslash that is not quoted.
pub(super) fn continues(text: &str) -> bool {
    text.ends_with('\\') && !argument(text).starts_with(QUOTES)
}

/// The text without the backslashes before which Enter was hit: `continued` is what stood there each time. Pasted
/// text keeps its own.
pub(super) fn joined(mut text: String, continued: &[String]) -> String {
    // From the last, since each stands before those after it.
    for part in continued.iter().rev() {
        if text.strip_prefix(part.as_str()).is_some_and(|rest| rest.starts_with('\n')) {
            text.remove(part.len() - 1);
        }
    }
    text
}

/// The part that may be quoted: a message itself, or what follows a command's name.
fn argument(text: &str) -> &str {
    if text.starts_with('/') && !text.starts_with("//") {
        text.split_once(char::is_whitespace).map_or("", |(_, rest)| rest.trim_start())
    } else {
        text
    }
}

/// The text without its quotes and the line ends that only stand beside them.
fn unquoted(text: &str) -> &str {
    let inner = text.strip_prefix(QUOTES).and_then(|rest| rest.trim_end().strip_suffix(QUOTES));
    inner.map_or(text, |inner| {
        let inner = inner.strip_prefix('\n').unwrap_or(inner);
        inner.strip_suffix('\n').unwrap_or(inner)
    })
}

/// Reads what was typed.
///
/// # Errors
/// When a command does not exist or lacks its argument.
pub(super) fn parse(text: &str) -> Result<Typed, Failure> {
    let Some(command) = text.strip_prefix('/') else {
        let message = unquoted(text);
        return Ok(if message.trim().is_empty() { Typed::Nothing } else { Typed::Message(message.to_owned()) });
    };
    if command.starts_with('/') {
        return Ok(Typed::Message(command.to_owned()));
    }
    let name = command.split(char::is_whitespace).next().unwrap_or_default();
    let argument = argument(text).trim_end();
    let given = (!argument.is_empty()).then(|| unquoted(argument).to_owned());
    let needs = |what: &str| {
        given.clone().ok_or_else(|| Failure::usage(format!("/{name} needs {what}")).hint(format!("/{name} {what}")))
    };
    let none = |command: Command| match &given {
        None => Ok(command),
        Some(_) => Err(Failure::usage(format!("/{name} takes nothing")).hint(FOR_TEXT)),
    };
    Ok(Typed::Command(match name {
        "help" | "?" => none(Command::Help)?,
        "system" => Command::System(given.map(|text| if text == "\"\"" { String::new() } else { text })),
        "model" => Command::Model(given),
        "save" => Command::Save(needs("FILE")?),
        "load" => Command::Load(needs("FILE")?),
        "clear" => none(Command::Clear)?,
        "set" => Command::Set(given.map(|given| match given.split_once(char::is_whitespace) {
            Some((name, value)) => (name.to_owned(), Some(value.trim_start().to_owned())),
            None => (given, None),
        })),
        "bye" | "exit" | "quit" => none(Command::Bye)?,
        _ => return Err(unknown(name)),
    }))
}

const FOR_TEXT: &str = "a text that begins with / is typed with //";

fn unknown(name: &str) -> Failure {
    let name = format!("/{name}");
    let failure = Failure::usage(format!("there is no command {}", name.escape_debug()));
    let near = nearest(&name, COMMANDS.iter().map(|row| row.0));
    failure.hint(near.map_or("/help lists the commands".into(), |near| format!("did you mean {near}?"))).hint(FOR_TEXT)
}

/// The name that a word was most likely meant to be, if one is near: it begins like it, or two slips away.
pub(super) fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let far = |name: &str| if word.len() > 1 && name.starts_with(word) { 0 } else { distance(word, name) };
    names.map(|name| (far(name), name)).min_by_key(|(far, _)| *far).filter(|(far, _)| *far <= 2).map(|(_, name)| name)
}

/// Letters to insert, leave out or replace to make one word of the other (Wagner, Fischer: "The String-to-String
/// Correction Problem", J. ACM 21, 1974), row by row.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    // No name is longer than this; what a person pastes may be.
    for (i, letter) in from.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, other) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> Result<Typed, String> {
        Ok(Typed::Message(text.into()))
    }

    fn command(command: Command) -> Result<Typed, String> {
        Ok(Typed::Command(command))
    }

    #[test]
    fn what_is_typed_is_a_message_unless_it_begins_with_a_slash() {
        for (typed, want) in [
            ("hello", message("hello")),
            (" /help me ", message(" /help me ")),
            ("//help", message("/help")),
            ("///", message("//")),
            ("a\nb", message("a\nb")),
            ("\"\"\"\na\n\n \\\n\"\"\"", message("a\n\n \\")),
            ("\"\"\"a\"\"\"", message("a")),
            ("\"\"\"a\nb\"\"\"  ", message("a\nb")),
            ("say \"\"\"", message("say \"\"\"")),
            ("\"\"\"/help\"\"\"", message("/help")),
            ("", Ok(Typed::Nothing)),
            (" \t\n", Ok(Typed::Nothing)),
            ("\"\"\"\"\"\"", Ok(Typed::Nothing)),
            ("/help", command(Command::Help)),
            ("/help  ", command(Command::Help)),
            ("/system", command(Command::System(None))),
            ("/system  be  brief ", command(Command::System(Some("be  brief".into())))),
            ("/system \"\"\"a\nb\"\"\"", command(Command::System(Some("a\nb".into())))),
            ("/system \"\"", command(Command::System(Some(String::new())))),
            ("/model", command(Command::Model(None))),
            ("/model org/name", command(Command::Model(Some("org/name".into())))),
            ("/save a file", command(Command::Save("a file".into()))),
            ("/load f", command(Command::Load("f".into()))),
            ("/clear", command(Command::Clear)),
            ("/set", command(Command::Set(None))),
            ("/set seed", command(Command::Set(Some(("seed".into(), None))))),
            ("/set stop  a b", command(Command::Set(Some(("stop".into(), Some("a b".into())))))),
            ("/bye", command(Command::Bye)),
            ("/exit", command(Command::Bye)),
            ("/clear all", Err("/clear takes nothing".into())),
            ("/save", Err("/save needs FILE".into())),
            ("/load ", Err("/load needs FILE".into())),
        ] {
            assert_eq!(parse(typed).map_err(|failure| failure.message), want, "{typed:?}");
        }
    }

    #[test]
    fn an_unknown_command_is_said_with_the_nearest() {
        for (typed, hint) in [
            ("/hepl", "did you mean /help?"),
            ("/sy", "did you mean /system?"),
            ("/By", "did you mean /bye?"),
            ("/sav", "did you mean /save?"),
            ("/home/user is what?", "/help lists the commands"),
            ("/", "/help lists the commands"),
        ] {
            let failure = parse(typed).unwrap_err();
            assert_eq!(failure.hints[0], hint, "{typed}");
            assert!(failure.hints[1].contains("//"), "{typed}");
        }
    }

    #[test]
    fn a_backslash_before_enter_is_not_part_of_the_text() {
        let join = |text: &str, continued: &[&str]| {
            joined(text.into(), &continued.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(join("a\\\nb\\\nc", &["a\\", "a\\\nb\\"]), "a\nb\nc");
        assert_eq!(join("a\\\nb\\\nc", &["a\\\nb\\"]), "a\\\nb\nc", "the first was pasted");
        assert_eq!(join("a\\ b", &["a\\"]), "a\\ b", "the line's end was taken back");
        assert_eq!(join("x", &["a\\"]), "x");
    }

    #[test]
    fn a_text_is_open_until_its_quotes_close() {
        for (text, open) in [
            ("\"\"\"", true),
            ("\"\"\"a", true),
            ("\"\"\"a\n\"\"", true),
            ("\"\"\"\"", true),
            ("\"\"\"a\"\"\" b", true),
            ("\"\"\"a\n\"\"\" ", false),
            ("\"\"\"\"\"\"", false),
            ("a \"\"\"", false),
            ("/system \"\"\"", true),
            ("/system \"\"\"a\nb\"\"\"", false),
            ("//system \"\"\"", false),
            ("a\\", false),
        ] {
            assert_eq!(is_open(text), open, "{text:?}");
        }
        assert!(continues("a\\") && continues("/system a\\"));
        assert!(!continues("a") && !continues("\"\"\"\na\\"), "quoted text is taken as it is");
    }
}
