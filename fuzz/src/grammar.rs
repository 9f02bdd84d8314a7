//! What an answer must be, as a user wrote it.

use std::sync::OnceLock;

use rbee_tokenizer::{Controls, Form, Grammars, Tokenizer};

use crate::text::letters;

/// Most tokens that are drawn.
const MOST: usize = 48;

/// The bytes are a schema in JSON; or, behind an `r`, a regular expression; or, behind an `l`, a grammar in Lark.
pub(crate) fn schema(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (form, json) = match bytes.first() {
        Some(b'r') => (Form::Regex(text[1..].to_owned()), false),
        Some(b'l') => (Form::Lark(text[1..].to_owned()), false),
        _ => match serde_json::from_str(text) {
            Ok(schema) => (Form::JsonSchema(schema), true),
            Err(_) => return,
        },
    };
    let (tokenizer, grammars) = grammars();
    let Ok(grammar) = grammars.compile(&form) else { return };
    let mut matcher = grammar.start();
    let mut words = [0u32; 9];
    let mut ids = Vec::new();
    for step in 0..MOST {
        // What no token can go on with is an error, and the end of it.
        if matcher.mask(&mut words).is_err() {
            return;
        }
        let allowed: Vec<u32> = (0..9 * 32).filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        assert!(allowed.iter().all(|&id| id <= 256), "an id that is no text");
        let pick = usize::from(bytes[step % bytes.len()]).wrapping_mul(31).wrapping_add(step * step);
        let id = allowed[pick % allowed.len()];
        let complete = matcher.accept(id).expect("the mask has it");
        if id < 256 {
            ids.push(id);
        }
        if complete {
            let answer = tokenizer.decode(&ids, Controls::Hide);
            let value = serde_json::from_str::<serde_json::Value>(&answer);
            assert!(!json || value.is_ok() || answer.contains(['e', 'E']), "no JSON: {answer:?}");
            return;
        }
    }
}

fn grammars() -> &'static (&'static Tokenizer, Grammars) {
    static GRAMMARS: OnceLock<(&'static Tokenizer, Grammars)> = OnceLock::new();
    GRAMMARS.get_or_init(|| {
        let tokenizer = letters();
        let grammars = Grammars::new(tokenizer, tokenizer.vocab_size(), &[256]);
        (tokenizer, grammars.expect("its vocabulary is sound"))
    })
}
