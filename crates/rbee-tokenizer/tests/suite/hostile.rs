//! Broken and hostile `tokenizer.json` files end as errors.

use rbee_tokenizer::{Error, Specials, Tokenizer};
use serde_json::{Value, json};

use crate::fixtures::*;

fn error(file: &[u8]) -> Error {
    match Tokenizer::from_json(file) {
        Err(error) => error,
        Ok(_) => panic!("accepted: {}", String::from_utf8_lossy(&file[..file.len().min(200)])),
    }
}

#[test]
fn every_truncation_is_refused() {
    for length in (0..TINYBEE.len()).step_by(4001).chain([1, TINYBEE.len() - 2]) {
        assert!(matches!(error(&TINYBEE[..length]), Error::Corrupt { .. }));
    }
}

#[test]
fn contradicting_files_are_refused() {
    type Edit = (&'static str, fn(&mut Value));
    let edits: [Edit; 13] = [
        ("added id elsewhere", |f| f["added_tokens"][0]["id"] = json!(7)),
        ("added id beyond", |f| f["added_tokens"][3]["id"] = json!(4_000_000_000u32)),
        ("added twice", |f| f["added_tokens"][1]["content"] = json!("<|im_start|>")),
        ("huge id", |f| f["model"]["vocab"]["a"] = json!(u32::MAX)),
        ("negative id", |f| f["model"]["vocab"]["a"] = json!(-1)),
        ("two tokens of one id", |f| f["model"]["vocab"]["a"] = json!(0)),
        ("merge of unknown tokens", |f| f["model"]["merges"] = json!(["xx yy"])),
        ("merge without a pair", |f| f["model"]["merges"] = json!(["x"])),
        ("unknown model", |f| f["model"]["type"] = json!("Other")),
        ("no model", |f| f["model"] = json!(null)),
        ("no decoder", |f| f["decoder"] = json!(null)),
        ("decoder over the whole text", |f| {
            f["decoder"] = json!({"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": true});
        }),
        ("single-character control token", |f| {
            f["added_tokens"][0]["content"] = json!("é");
            f["model"]["vocab"]["é"] = json!(256);
        }),
    ];
    for (name, edit) in edits {
        let mut file = byte_level_json();
        edit(&mut file);
        let error = error(&serde_json::to_vec(&file).unwrap());
        assert!(matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. }), "{name}: {error}");
    }
}

/// Ids that only the post-processor names must be in the vocabulary too.
#[test]
fn a_prompt_prefix_outside_the_vocabulary_is_refused() {
    let mut file = sentencepiece_json();
    file["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([99_999]);
    assert!(matches!(error(&serde_json::to_vec(&file).unwrap()), Error::UnknownId { id: 99_999, .. }));
}

#[test]
fn bombs_are_refused_before_they_are_parsed() {
    let many = format!("[{}1]", "1,".repeat(5_000_000));
    let deep = "[".repeat(2_000_000);
    let large = vec![b' '; 49 << 20];
    for bomb in [many.as_bytes(), deep.as_bytes(), b"", b"{}", b"null", b"\xff\xfe"] {
        let (error, took) = timed(|| error(bomb));
        assert!(matches!(error, Error::Corrupt { .. }));
        assert!(took.as_millis() < 1000, "{took:?}");
    }
    assert!(matches!(error(&large), Error::TooLarge { .. }));
}

/// The parser reserves what a map of characters announces, before it sees that there is less.
#[test]
fn a_map_of_characters_that_announces_more_than_it_has_is_refused() {
    // A length of 0x4dd2_fc00 bytes, and a trie of 12.
    let map = "APzSTQAAAAAAAAAAAAAAAA==";
    let normalizers = [
        json!({"type": "Precompiled", "precompiled_charsmap": map}),
        json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Precompiled", "precompiled_charsmap": map}]}),
    ];
    for normalizer in normalizers {
        let mut file = sentencepiece_json();
        file["normalizer"] = normalizer;
        let error = error(&serde_json::to_vec(&file).unwrap()).to_string();
        assert!(error.contains("longer than it is"), "{error}");
    }
}

/// A parser that panics on a file is an error like any other: no input ends the process.
#[test]
fn mutated_files_never_panic() {
    let file = serde_json::to_vec(&sentencepiece_json()).unwrap();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    let mut loaded = 0;
    for _ in 0..2000 {
        let mut mutant = file.clone();
        for _ in 0..=random(3) {
            let at = random(mutant.len());
            mutant[at] = b"0123456789\"\\{}[]:,-e \xe2"[random(22)];
        }
        if let Ok(tokenizer) = Tokenizer::from_json(&mutant) {
            loaded += 1;
            let _ = tokenizer.encode("hello </s> 👋", Specials::AsText);
        }
    }
    assert!(loaded > 0, "no mutant was close enough to a tokenizer");
}

/// Cutting, padding and random merges that a file asks for would change a prompt in silence.
#[test]
fn truncation_padding_and_dropout_are_switched_off() {
    let mut file = sentencepiece_json();
    file["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    file["model"]["dropout"] = json!(0.9);
    let tokenizer = load(&file);
    let expected = sentencepiece().encode("hello hello hello", Specials::AsText).unwrap();
    for _ in 0..20 {
        let ids = tokenizer.encode("hello hello hello", Specials::AsText).unwrap();
        assert_eq!(ids, expected);
    }
}

#[test]
fn a_tokenizer_larger_than_its_model_does_not_fit() {
    let tokenizer = tinybee();
    assert_eq!(tokenizer.vocab_size(), 2048);
    assert!(tokenizer.check_fits(2048).is_ok());
    assert!(matches!(tokenizer.check_fits(2047), Err(Error::Corrupt { .. })));
}

/// Megabytes of one character end in reasonable time and lose nothing.
#[test]
fn long_monotonous_texts_are_encoded() {
    let tokenizer = tinybee();
    for unit in [" ", "a", "<", "<|im_end|>", "\n", "é"] {
        let text = unit.repeat((300 << 10) / unit.len());
        let (ids, took) = timed(|| tokenizer.encode(&text, Specials::AsText).unwrap());
        assert!(took.as_secs() < 5, "{unit:?}: {:?}", took);
        assert_eq!(tokenizer.decode(&ids, rbee_tokenizer::Controls::Hide), text);
    }
}

/// Ids take over a hundred times a text's memory: what cannot fit is refused before they are made.
#[test]
fn a_text_that_no_context_holds_is_refused_before_it_is_encoded() {
    let tokenizer = tinybee();
    let longest = (0..2048).map(|id| tokenizer.token_bytes(id).len()).max().unwrap();
    let fits = "bee ".repeat(100);
    let tokenizer = tokenizer.with_context(128);
    assert!(tokenizer.encode(&fits, Specials::AsText).is_ok());
    let long = "a".repeat(128 * longest * 4 + 1);
    for encoded in [tokenizer.encode(&long, Specials::AsText), tokenizer.encode_prompt(&long, Specials::AsControl)] {
        assert!(matches!(encoded, Err(Error::TooLong { context: 128, .. })));
    }
    let messages = [rbee_tokenizer::message("user", &long)];
    let chat = rbee_tokenizer::Chat {
        messages: &messages,
        tools: &[],
        settings: &serde_json::Map::new(),
        generation_prompt: rbee_tokenizer::GenerationPrompt::Add,
        now: 0,
    };
    assert!(matches!(tokenizer.encode_chat(&tinybee_template(), &chat), Err(Error::TooLong { .. })));
}
