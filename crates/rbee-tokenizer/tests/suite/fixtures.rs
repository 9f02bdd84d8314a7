//! Small tokenizers of each kind, written as the files would be.

use std::time::{Duration, Instant};

use rbee_tokenizer::{ChatTemplate, Tokenizer, TokenizerConfig};
use serde_json::{Value, json};

/// The tokenizer and configuration of the built-in model.
pub const TINYBEE: &[u8] = include_bytes!("../../../../tinybee/model/tokenizer.json");
pub const TINYBEE_CONFIG: &[u8] = include_bytes!("../../../../tinybee/model/tokenizer_config.json");

pub fn tinybee() -> Tokenizer {
    Tokenizer::from_json(TINYBEE).unwrap()
}

pub fn tinybee_template() -> ChatTemplate {
    let config = TokenizerConfig::from_json(TINYBEE_CONFIG).unwrap();
    ChatTemplate::load(&config, None).unwrap().unwrap()
}

/// A template on its own, with `<s>` and `</s>` as named tokens.
pub fn template(source: &str) -> ChatTemplate {
    let config = TokenizerConfig {
        special_texts: vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())],
        chat_templates: Vec::new(),
    };
    ChatTemplate::load(&config, Some(source.as_bytes())).unwrap().unwrap()
}

/// An entry of a file's list of added tokens.
pub fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

/// Byte-level BPE without merges: one token per byte, three control tokens and one added word.
pub fn byte_level_json() -> Value {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut letters: Vec<char> = (0..=255u8).filter(printable).map(char::from).collect();
    letters.extend((0..68).map(|n| char::from_u32(0x100 + n).unwrap()));
    let vocab: serde_json::Map<String, Value> =
        letters.iter().enumerate().map(|(id, letter)| (letter.to_string(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(256, "<|im_start|>", true), added(257, "<|im_end|>", true),
                         added(258, "<|endoftext|>", true), added(259, "<think>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

pub fn byte_level() -> Tokenizer {
    load(&byte_level_json())
}

/// A Llama-2-like BPE: a mark for spaces, byte fallback, BOS before a text.
pub fn sentencepiece_json() -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    tokens.push("▁".to_owned());
    tokens.extend(('a'..='z').chain(['<', '>', '/', '.', '[', ']', 'I', 'N', 'S', 'T']).map(String::from));
    tokens.extend(["he", "▁he", "ll", "▁hell", "▁hello"].map(str::to_owned));
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": ["h e", "▁ he", "l l", "▁he ll", "▁hell o"]}
    })
}

pub fn sentencepiece() -> Tokenizer {
    load(&sentencepiece_json())
}

/// A Unigram model, whose own vocabulary can produce the control token `</s>`.
pub fn unigram() -> Tokenizer {
    let mut vocab = vec![json!(["<unk>", 0.0]), json!(["</s>", 0.0]), json!(["▁", -2.0])];
    vocab.extend(('a'..='z').chain(['<', '>', '/', 's']).take(29).map(|c| json!([c.to_string(), -3.0])));
    load(&json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "</s>", true)],
        "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false}
    }))
}

pub fn load(file: &Value) -> Tokenizer {
    Tokenizer::from_json(&serde_json::to_vec(file).unwrap()).unwrap()
}

/// A result and how long it took.
#[expect(clippy::disallowed_methods, reason = "tests may measure; the crate may not")]
pub fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let result = run();
    (result, started.elapsed())
}
