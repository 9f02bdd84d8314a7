//! Reads what the built-in model writes, as a strict but not clever teacher would: known words, whole
//! sentences, no loops. It does not judge sense.

use std::collections::{HashMap, HashSet};

/// Words of a loop that is looked for.
const LOOP_WORDS: usize = 4;
/// Times that the same words may follow each other in one text: a story tells a thing twice at most.
const MAX_REPEATS: usize = 3;

/// A fault in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// There is no text.
    Empty,
    /// The text does not end with a sentence.
    Unfinished {
        /// Its last words.
        tail: String,
    },
    /// A paragraph does not begin or end as one does.
    OddParagraph {
        /// The paragraph's first words.
        head: String,
    },
    /// The same four words come too often, or twice in a row.
    Loop {
        /// The words.
        words: String,
        /// How often they occur.
        times: usize,
    },
    /// A word that the corpus does not have.
    UnknownWord {
        /// The word in lower case.
        word: String,
    },
    /// Quotation marks do not pair up in a paragraph.
    OpenQuote {
        /// The paragraph's first words.
        head: String,
    },
    /// A character that no story has, such as U+FFFD.
    OddCharacter {
        /// The character.
        character: char,
    },
}

/// Checks a text that the model wrote and ended by itself (whether it did is the caller's to know).
///
/// `known_words` are in lower case. Numbers are known.
///
/// # Errors
/// Every [`Problem`] found, in the order of the variants.
pub fn check_story(text: &str, known_words: &HashSet<&str>) -> Result<(), Vec<Problem>> {
    let text = text.trim();
    if text.is_empty() {
        return Err(vec![Problem::Empty]);
    }
    let mut problems = Vec::new();
    if !ends_a_sentence(text) {
        let last: Vec<&str> = text.split_whitespace().rev().take(5).collect();
        let tail = last.into_iter().rev().collect::<Vec<_>>().join(" ");
        problems.push(Problem::Unfinished { tail });
    }
    let paragraphs = || text.split("\n\n").map(str::trim).filter(|p| !p.is_empty());
    for paragraph in paragraphs() {
        let begins = paragraph.starts_with(|c: char| c.is_uppercase() || c.is_ascii_digit() || c == '"');
        if !begins || !ends_a_sentence(paragraph) {
            problems.push(Problem::OddParagraph { head: head(paragraph) });
        }
    }
    problems.extend(loops(text));
    let mut unknown = HashSet::new();
    for word in words(text) {
        let number = word.bytes().all(|b| b.is_ascii_digit());
        if !number && !known_words.contains(word.as_str()) && unknown.insert(word.clone()) {
            problems.push(Problem::UnknownWord { word });
        }
    }
    for paragraph in paragraphs() {
        if paragraph.matches('"').count() % 2 == 1 {
            problems.push(Problem::OpenQuote { head: head(paragraph) });
        }
    }
    let odd = |c: char| !(c.is_ascii_alphanumeric() || " \n.,;:!?'\"-+=".contains(c));
    let mut seen = HashSet::new();
    for character in text.chars().filter(|&c| odd(c)) {
        if seen.insert(character) {
            problems.push(Problem::OddCharacter { character });
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(problems),
    }
}

/// A full stop, question or exclamation mark, perhaps inside a closing quotation mark.
fn ends_a_sentence(text: &str) -> bool {
    text.strip_suffix('"').unwrap_or(text).ends_with(['.', '!', '?'])
}

/// The words in lower case; an apostrophe between letters belongs to its word.
fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '\''))
        .map(|word| word.trim_matches('\'').to_lowercase())
        .filter(|word| !word.is_empty())
        .collect()
}

/// Four words in a row that come more than [`MAX_REPEATS`] times, or again at once.
fn loops(text: &str) -> Vec<Problem> {
    let words = words(text);
    let mut times: HashMap<&[String], usize> = HashMap::new();
    let mut at_once: HashSet<&[String]> = HashSet::new();
    for (at, gram) in words.windows(LOOP_WORDS).enumerate() {
        *times.entry(gram).or_default() += 1;
        if words.get(at + LOOP_WORDS..at + 2 * LOOP_WORDS) == Some(gram) {
            at_once.insert(gram);
        }
    }
    let mut found: Vec<Problem> = times
        .into_iter()
        .filter(|(gram, times)| *times > MAX_REPEATS || at_once.contains(gram))
        .map(|(gram, times)| Problem::Loop { words: gram.join(" "), times })
        .collect();
    found.sort_by_key(|problem| format!("{problem:?}"));
    found
}

fn head(text: &str) -> String {
    text.split_whitespace().take(5).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "once upon a time there was fox named barney he lived in den i am so hungry said bella \
                         may have little it tasted better than ever before the end don't 3 and but";

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        let known: HashSet<&str> = WORDS.split_whitespace().collect();
        let problems = check_story(text, &known).err().unwrap_or_default();
        let names: Vec<String> = problems.iter().map(|p| format!("{p:?}")).collect();
        assert_eq!(names.len(), expected.len(), "{names:?}");
        for (name, start) in names.iter().zip(expected) {
            assert!(name.starts_with(start), "{name} is not {start}");
        }
    }

    #[test]
    fn a_good_story_has_no_problems() {
        check(
            "Once upon a time, there was a fox named Barney. \"I am so hungry,\" said Bella. \"May I have a little?\"\n\nThe end.",
            &[],
        );
    }

    #[test]
    fn each_fault_is_found() {
        check(" \n", &["Empty"]);
        check("There was a fox and", &["Unfinished", "OddParagraph"]);
        check("Barney lived in a den.\n\nhe was hungry.", &["OddParagraph"]);
        check("There was a tiger. There was a tiger.", &["Loop", "UnknownWord { word: \"tiger\""]);
        check("\"I am so hungry, said Bella.", &["OpenQuote"]);
        check("There was a fox\u{fffd}.", &["OddCharacter"]);
    }

    #[test]
    fn four_words_may_come_three_times_apart_but_not_four() {
        let sentence = |before: &str| format!("{before} there was a fox. ");
        let apart = ["Once", "Before", "But"].map(sentence).concat();
        check(&apart, &[]);
        let often = ["Once", "Before", "But", "And"].map(sentence).concat();
        check(&often, &["Loop { words: \"there was a fox\", times: 4"]);
    }

    #[test]
    fn words_at_once_are_a_loop() {
        check("He was so hungry he was so hungry.", &["Loop { words: \"he was so hungry\", times: 2"]);
    }
}
