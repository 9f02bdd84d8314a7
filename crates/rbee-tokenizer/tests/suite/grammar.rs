//! Forms of answers: whatever a model draws within the masks is of the form, ends, and is read back.

mod calls;
mod checker;
mod limits;
mod schemas;

use std::collections::VecDeque;

use rbee_tokenizer::{Controls, Form, Grammar, Grammars, Matcher, TokenId, Tokenizer};
use serde_json::{Value, json};

use crate::fixtures::*;

/// Most tokens of a drawn answer, and how many are drawn before it makes for its end.
const MOST: usize = 6000;
const FREE: usize = 40;

pub struct Drawer {
    pub tokenizer: Tokenizer,
    pub grammars: Grammars,
    pub eos: TokenId,
    /// What ends a text that no quote ends.
    pub closing: &'static str,
}

impl Drawer {
    pub fn new(tokenizer: Tokenizer, eos: &str) -> Drawer {
        let eos = tokenizer.token_to_id(eos).unwrap();
        let grammars = Grammars::new(&tokenizer, tokenizer.vocab_size() + 7, &[eos]).unwrap();
        Drawer { tokenizer, grammars, eos, closing: "" }
    }

    pub fn compile(&self, form: &Form) -> Grammar {
        self.grammars.compile(form).unwrap_or_else(|error| panic!("{form:?}: {error}"))
    }

    pub fn schema(&self, schema: &Value) -> Grammar {
        self.compile(&Form::JsonSchema(schema.clone()))
    }

    pub fn allowed(&self, matcher: &mut Matcher) -> Vec<TokenId> {
        let mut words = vec![u32::MAX; (self.tokenizer.vocab_size() + 7).div_ceil(32)];
        matcher.mask(&mut words).unwrap();
        let bits = 0..words.len() as u32 * 32;
        let ids: Vec<TokenId> = bits.filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        assert!(!ids.is_empty() && ids.iter().all(|&id| (id as usize) < self.tokenizer.vocab_size()));
        ids
    }

    /// The ids of an answer drawn evenly from what is allowed; after a while from what leads to its end.
    pub fn ids(&self, grammar: &Grammar, seed: u64) -> Vec<TokenId> {
        let mut matcher = grammar.start();
        let mut random = Random(seed);
        let mut ids = Vec::new();
        let mut closing = VecDeque::new();
        while ids.len() < MOST {
            let allowed = self.allowed(&mut matcher);
            let find =
                |text: &str| allowed.iter().copied().find(|&id| self.tokenizer.token_bytes(id) == text.as_bytes());
            // In a text all letters may come, and the quote ends it.
            let ends = if find("x").is_some() { ["\"", ">", "/", "<"] } else { ["}", "]", "\"", "n"] }.map(find);
            let end = allowed.contains(&self.eos).then_some(self.eos);
            let preferred = [end].into_iter().chain(ends).flatten().next();
            let closes = closing.pop_front().and_then(|byte: u8| find(&char::from(byte).to_string()));
            if closes.is_none() {
                closing.clear();
                if ids.len() > FREE && find("x").is_some() && find("\n").is_some() {
                    closing.extend(self.closing.bytes());
                }
            }
            let preferred = closes.or(preferred);
            let id = match preferred {
                Some(id) if closes.is_some() => id,
                Some(id) if ids.len() > FREE && random.below(8) > 0 => id,
                _ => allowed[random.below(allowed.len())],
            };
            let complete = matcher.accept(id).unwrap_or_else(|error| panic!("{:?}: {error}", self.text(&ids)));
            if id == self.eos {
                return ids;
            }
            ids.push(id);
            if complete {
                assert_eq!(self.allowed(&mut matcher), [self.eos], "behind {:?}", self.text(&ids));
                return ids;
            }
        }
        panic!("no end of {:?}", self.text(&ids));
    }

    pub fn text(&self, ids: &[TokenId]) -> String {
        self.tokenizer.decode(ids, Controls::Hide)
    }

    /// Takes the tokens of a text; the text up to the first that may not come.
    pub fn takes(&self, grammar: &Grammar, text: &str) -> Result<bool, String> {
        let mut matcher = grammar.start();
        let mut complete = false;
        let mut ids = Vec::new();
        for byte in text.bytes() {
            let id = (0..256).find(|&id| self.tokenizer.token_bytes(id) == [byte]).unwrap();
            ids.push(id);
            if complete || !self.allowed(&mut matcher).contains(&id) {
                return Err(self.text(&ids));
            }
            complete = matcher.accept(id).unwrap();
        }
        Ok(complete || self.allowed(&mut matcher).contains(&self.eos))
    }
}

/// xorshift*.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }
}

pub fn letters() -> Drawer {
    Drawer::new(byte_level(), "<|im_end|>")
}

/// Tokens of several letters over a small alphabet, besides the bytes.
fn syllables() -> Drawer {
    let mut file = byte_level_json();
    for (at, token) in ["ab", "bc", "abc", "aab", "cc", "ca", "bb"].into_iter().enumerate() {
        file["added_tokens"].as_array_mut().unwrap().push(added(260 + at as u32, token, false));
    }
    Drawer::new(load(&file), "<|im_end|>")
}

/// All texts over `abc` of up to `most` letters that the expression matches whole.
fn language(pattern: &str, most: usize) -> Vec<String> {
    let expression = regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
    let mut texts = vec![String::new()];
    let mut all = texts.clone();
    for _ in 0..most {
        texts = texts.iter().flat_map(|text| ["a", "b", "c"].map(|letter| format!("{text}{letter}"))).collect();
        all.extend(texts.iter().cloned());
    }
    all.retain(|text| expression.is_match(text));
    all
}

/// A token may come exactly when its bytes keep the text the beginning of one that matches.
#[test]
fn a_mask_has_the_tokens_that_keep_the_text_viable_and_no_others() {
    let drawer = syllables();
    for pattern in ["(ab|abc|b+c){1,3}", "a*b?c", "(a|b)*abb", "(?:aa|aab|c)+", "a{2,4}b{0,2}|c(ab)*c", "(a+)+b"] {
        let language = language(pattern, 9);
        let grammar = drawer.compile(&Form::Regex(pattern.to_owned()));
        for seed in 0..40 {
            let mut random = Random(seed);
            let mut matcher = grammar.start();
            let mut text = String::new();
            // Every viable text of these has a match within a few letters more.
            while text.len() <= 4 {
                let allowed = drawer.allowed(&mut matcher);
                for id in 0..drawer.tokenizer.vocab_size() as TokenId {
                    let token = std::str::from_utf8(drawer.tokenizer.token_bytes(id)).unwrap_or("?");
                    let expected = match id == drawer.eos {
                        true => language.contains(&text),
                        false => {
                            !drawer.tokenizer.is_control(id) && {
                                let longer = format!("{text}{token}");
                                language.iter().any(|one| one.starts_with(&longer))
                            }
                        }
                    };
                    assert_eq!(allowed.contains(&id), expected, "{token:?} behind {text:?} of {pattern}");
                }
                let id = allowed[random.below(allowed.len())];
                if id == drawer.eos {
                    break;
                }
                let complete = matcher.accept(id).unwrap();
                text.push_str(std::str::from_utf8(drawer.tokenizer.token_bytes(id)).unwrap());
                let longer = |one: &&String| one.len() > text.len() && one.starts_with(&text);
                assert_eq!(complete, !language.iter().any(|one| longer(&one)), "behind {text:?} of {pattern}");
                if complete {
                    break;
                }
            }
        }
    }
}

/// What may come next is what is taken, token by token.
#[test]
fn a_token_is_taken_exactly_when_the_mask_has_it() {
    let drawer = letters();
    let grammar = drawer.schema(
        &json!({"type": "object", "properties": {"a": {"type": ["integer", "null"]}, "b": {"enum": ["x", "é"]}}}),
    );
    for seed in 0..6 {
        let ids = drawer.ids(&grammar, seed);
        for at in 0..ids.len() {
            let replayed = || {
                let mut matcher = grammar.start();
                ids[..at].iter().for_each(|&id| assert!(!matcher.accept(id).unwrap()));
                matcher
            };
            let allowed = drawer.allowed(&mut replayed());
            for id in 0..drawer.tokenizer.vocab_size() as TokenId {
                let mut matcher = replayed();
                assert_eq!(
                    matcher.accept(id).is_ok(),
                    allowed.contains(&id),
                    "{id} behind {:?}",
                    drawer.text(&ids[..at])
                );
            }
        }
    }
}

#[test]
fn a_replayed_answer_goes_on_as_one_that_was_masked_all_along() {
    let drawer = letters();
    for form in [Form::JsonObject, Form::Regex("([a-z]{2,5} ?)+\\.".to_owned())] {
        let grammar = drawer.compile(&form);
        for seed in 0..30 {
            let ids = drawer.ids(&grammar, seed);
            let mut masked = grammar.start();
            for at in 0..ids.len() {
                let allowed = drawer.allowed(&mut masked);
                if at % 7 == 3 {
                    let mut replayed = grammar.start();
                    ids[..at].iter().for_each(|&id| assert!(!replayed.accept(id).unwrap()));
                    assert_eq!(drawer.allowed(&mut replayed), allowed);
                }
                masked.accept(ids[at]).unwrap();
            }
        }
    }
}

#[test]
fn matchers_of_one_grammar_know_nothing_of_each_other() {
    let drawer = letters();
    let grammar = drawer.compile(&Form::JsonObject);
    let alone = drawer.ids(&grammar, 11);
    let mut others: Vec<Matcher> = (0..3).map(|_| grammar.start()).collect();
    let mut matcher = grammar.start();
    for &id in &alone {
        for other in &mut others {
            let allowed = drawer.allowed(other);
            let _ = other.accept(allowed[0]);
        }
        assert!(drawer.allowed(&mut matcher).contains(&id));
        matcher.accept(id).unwrap();
        others.iter_mut().for_each(|other| *other = grammar.start());
    }
}

/// Sentencepiece puts a space before a text and takes it away: the form is that of what is left.
#[test]
fn the_space_that_a_tokenizer_takes_away_is_no_part_of_the_form() {
    let drawer = Drawer::new(sentencepiece(), "</s>");
    let id = |token: &str| drawer.tokenizer.token_to_id(token).unwrap();
    let first = |pattern: &str| {
        let grammar = drawer.compile(&Form::Regex(pattern.to_owned()));
        drawer.allowed(&mut grammar.start())
    };
    let mut hello = vec![id("▁"), id("h"), id("he"), id("▁he"), id("▁hell"), id("▁hello"), id("<0x20>"), id("<0x68>")];
    hello.sort_unstable();
    assert_eq!(first("hello"), hello);
    // One space is taken away: the text's own is the second.
    let mut space = vec![id("▁"), id("<0x20>")];
    space.sort_unstable();
    assert_eq!(first(" hello"), space);
    for (pattern, seeds) in [("hello", 60), (" hello", 60), (" ?(he)+llo ", 100)] {
        let grammar = drawer.compile(&Form::Regex(pattern.to_owned()));
        for seed in 0..seeds {
            let text = drawer.text(&drawer.ids(&grammar, seed));
            assert!(regex::Regex::new(&format!("^(?:{pattern})$")).unwrap().is_match(&text), "{text:?} of {pattern}");
        }
    }
    let object = drawer.compile(&Form::JsonObject);
    for seed in 0..100 {
        let text = drawer.text(&drawer.ids(&object, seed));
        assert!(text.starts_with('{') && serde_json::from_str::<Value>(&text).is_ok(), "{text:?}");
    }
}

/// A user's form can name no control token, and text of a control token's letters is no control token.
#[test]
fn control_tokens_are_not_text() {
    let drawer = letters();
    let grammar = drawer.compile(&Form::Regex("<\\|im_start\\|>.*".to_owned()));
    let ids = drawer.ids(&grammar, 3);
    assert!(ids.iter().all(|&id| !drawer.tokenizer.is_control(id)));
    assert!(drawer.text(&ids).starts_with("<|im_start|>"));
    // An added token that is no control token is text.
    let think = drawer.tokenizer.token_to_id("<think>").unwrap();
    let grammar = drawer.compile(&Form::Regex("<think>a?".to_owned()));
    assert!(drawer.allowed(&mut grammar.start()).contains(&think));
}

#[test]
fn an_answer_ends_where_its_form_does_and_takes_nothing_behind() {
    let drawer = letters();
    let grammar = drawer.compile(&Form::Regex("ab*".to_owned()));
    let [a, b] = ["a", "b"].map(|token| drawer.tokenizer.token_to_id(token).unwrap());
    let mut matcher = grammar.start();
    assert_eq!(drawer.allowed(&mut matcher), [a]);
    assert!(!matcher.accept(a).unwrap());
    assert_eq!(drawer.allowed(&mut matcher), [b, drawer.eos]);
    assert!(matcher.accept(drawer.eos).unwrap());
    assert!(matcher.accept(b).is_err() && matcher.mask(&mut [0; 9]).is_err());
    // What did not fit ends it too, with the same problem each time.
    let mut matcher = grammar.start();
    let problem = matcher.accept(b).unwrap_err().to_string();
    assert_eq!(matcher.accept(a).unwrap_err().to_string(), problem);
    assert_eq!(matcher.mask(&mut [0; 9]).unwrap_err().to_string(), problem);
    assert!(grammar.start().accept(drawer.eos).is_err());
    // An empty answer.
    let empty = drawer.compile(&Form::Regex(String::new()));
    assert_eq!(drawer.allowed(&mut empty.start()), [drawer.eos]);
}

#[test]
fn all_end_ids_end_an_answer() {
    let tokenizer = byte_level();
    let grammars = Grammars::new(&tokenizer, 320, &[257, 258]).unwrap();
    let grammar = grammars.compile(&Form::Regex("a?".to_owned())).unwrap();
    let mut words = [0; 10];
    grammar.start().mask(&mut words).unwrap();
    assert_eq!(words[8], 0b110);
    assert!(grammar.start().accept(258).unwrap());
    assert!(Grammars::new(&tokenizer, 320, &[9999]).is_err());
    assert!(Grammars::new(&tokenizer, 100, &[257]).is_err());
}

#[test]
fn grammars_are_written_in_lark() {
    let drawer = letters();
    let text = r#"
        start: sum
        sum: product ("+" product)*   // left to right
        product: atom ("*" atom)*
        atom: NUMBER | "(" sum ")"
        NUMBER: /[1-9][0-9]{0,3}/
    "#;
    let grammar = drawer.compile(&Form::Lark(text.to_owned()));
    for (sum, whole) in [("1+2*(3+44)", true), ("(1", false), ("12+", false)] {
        assert_eq!(drawer.takes(&grammar, sum), Ok(whole));
    }
    assert_eq!(drawer.takes(&grammar, "1+)"), Err("1+)".to_owned()));
    assert_eq!(drawer.takes(&grammar, "12345"), Err("12345".to_owned()));
    for (refused, why) in [
        ("start: <|im_start|> \"a\"", "control tokens"),
        ("start: <[257]>", "control tokens"),
        ("start: <[^1]>", "control tokens"),
        ("start: %json {\"type\": \"object\"}", "`%json`"),
        ("%llguidance {\"allow_invalid_utf8\": true}\nstart: /[\\xff]/", "`%llguidance`"),
        ("start: @other", "names another grammar"),
        ("start: a\na[stop=\"x\"]: /.*/", "`stop`"),
        ("start: a\na[max_tokens=3]: /.*/", "`max_tokens`"),
        ("start: a\na[temperature=0.5]: /x+/", "temperature"),
        ("start: A\nA: ~/x/", "`~`"),
        ("begin: \"a\"", "no start rule"),
        ("start: (", ""),
        ("", "no start rule"),
    ] {
        let error = drawer.grammars.compile(&Form::Lark(refused.to_owned())).err();
        let error = error.unwrap_or_else(|| panic!("{refused:?} was taken")).to_string();
        assert!(error.contains(why) && !error.contains('\n'), "{refused:?}: {error}");
    }
    // Directives in quotes, slashes and comments are none.
    drawer.compile(&Form::Lark("start: \"%json @a\" /%lark\\/@/ // %regex @b\n".to_owned()));
}
