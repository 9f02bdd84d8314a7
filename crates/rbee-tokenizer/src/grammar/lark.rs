//! What a user's grammar may not have, though llguidance would take it.

use llguidance::earley::lexerspec::LexerSpec;

use super::refused;
use crate::Error;

/// Most rules, terminals and groups: compiling goes down the stack along a chain of them.
const MAX_LEVELS: usize = 300;

/// Directives of llguidance's that change what the text means, or bring in what is checked elsewhere.
const DIRECTIVES: [(&str, &str); 6] = [
    ("%json", "the form of a JSON schema does that"),
    ("%lark", "grammars do not nest"),
    ("%regex", "a terminal in slashes does that"),
    ("%llguidance", "its options are not for requests"),
    ("%override", "it is not part of the dialect"),
    ("%declare", "it is not part of the dialect"),
];

/// Checks a grammar's text before anything is made of it.
pub(super) fn check(text: &str) -> Result<(), Error> {
    let outside = outside(text);
    for (directive, why) in DIRECTIVES {
        if outside.contains(directive) {
            return Err(refused(&format!("`{directive}` is not supported: {why}")));
        }
    }
    if outside.contains('<') {
        return Err(refused("control tokens (`<…>`) cannot be part of an answer"));
    }
    if outside.contains('~') {
        return Err(refused("`~` is not supported: what it leaves over may be no text"));
    }
    if outside.contains('@') {
        return Err(refused("`@` names another grammar, and there is none"));
    }
    if attributes(&outside).any(|name| name == "temperature") {
        return Err(refused("`temperature` is not supported in a grammar"));
    }
    let levels = outside.matches([':', '(', '[']).count();
    if levels > MAX_LEVELS {
        return Err(refused(&format!(
            "the grammar has {levels} rules, terminals and groups, more than the {MAX_LEVELS} allowed"
        )));
    }
    Ok(())
}

/// Names before equals signs.
fn attributes(outside: &str) -> impl Iterator<Item = &str> {
    let before = outside.split('=').map(str::trim_end);
    before.map(|text| text.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default())
}

/// The text without its comments, and with nothing in its quotes and slashes.
fn outside(text: &str) -> String {
    let mut out = String::new();
    let mut letters = text.chars().peekable();
    while let Some(c) = letters.next() {
        match c {
            '#' => skip_line(&mut letters),
            '/' if letters.peek() == Some(&'/') => skip_line(&mut letters),
            '"' | '/' => {
                while let Some(inner) = letters.next() {
                    match inner {
                        '\\' => {
                            letters.next();
                        }
                        inner if inner == c => break,
                        _ => {}
                    }
                }
            }
            c => out.push(c),
        }
    }
    out
}

fn skip_line(letters: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    while letters.peek().is_some_and(|&c| c != '\n') {
        letters.next();
    }
}

/// Checks what became of the grammar.
pub(super) fn check_lexer(lexer: &LexerSpec) -> Result<(), Error> {
    let problem = match lexer {
        LexerSpec { special_token_rx: Some(_), .. } => "control tokens cannot be part of an answer",
        LexerSpec { has_stop: true, .. } => "`stop` is not supported: what it hides would be in the answer",
        LexerSpec { has_max_tokens: true, .. } => "`max_tokens` is not supported in a grammar",
        LexerSpec { has_temperature: true, .. } => "`temperature` is not supported in a grammar",
        _ => return Ok(()),
    };
    Err(refused(problem))
}
