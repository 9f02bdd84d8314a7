//! Tokenizers of encoders: words and sentence pieces, with what stands around a text.

use std::fs;
use std::path::Path;

use rbee_tokenizer::{Controls, Error, Specials, Tokenizer};
use serde_json::Value;

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/encoders").join(name)
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_json(&fs::read(folder(name).join("tokenizer.json")).unwrap()).unwrap()
}

/// The files ask for truncation to 8 tokens and padding to 16.
#[test]
fn texts_get_the_ids_of_the_reference_uncut_and_unpadded() {
    for name in ["bert", "xlm-roberta"] {
        let tokenizer = tokenizer(name);
        let golden: Value = serde_json::from_slice(&fs::read(folder(name).join("golden.json")).unwrap()).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let want: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode_whole(text).unwrap(), want, "{name}: {text:?}");
            // A prompt is to be gone on from: nothing stands behind it.
            assert_eq!(tokenizer.encode_prompt(text, Specials::AsText).unwrap(), want[..want.len() - 1]);
        }
    }
}

#[test]
fn special_tokens_in_a_text_are_letters() {
    for (name, written, inside) in [("bert", "a [SEP] b [CLS]", [2, 3]), ("xlm-roberta", "a </s> b <s>", [0, 2])] {
        let ids = tokenizer(name).encode_whole(written).unwrap();
        assert_eq!(ids.iter().filter(|id| inside.contains(id)).count(), 2, "{name}: {ids:?}");
    }
}

#[test]
fn pieces_of_words_are_joined() {
    let bert = tokenizer("bert");
    let ids = bert.encode("The queens rest in beehives", Specials::AsText).unwrap();
    assert!(ids.len() > 5, "words are in pieces: {ids:?}");
    assert_eq!(bert.decode(&ids, Controls::Show), "the queens rest in beehives");
}

/// A word that is not known is one token, however long, and spaces are none.
#[test]
fn a_text_is_not_too_long_for_its_bytes_where_words_have_no_bound() {
    let bert = tokenizer("bert").with_context(8);
    for text in ["x".repeat(5000), " ".repeat(60_000)] {
        assert!(bert.encode_whole(&text).unwrap().len() <= 3);
    }
    assert!(matches!(bert.encode_whole(&" ".repeat(70_000)), Err(Error::TooLong { context: 8, .. })));
}
