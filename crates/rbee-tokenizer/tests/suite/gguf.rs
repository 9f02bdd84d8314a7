//! Tokenizers from GGUF metadata give the ids of llama.cpp and of the `tokenizer.json` the metadata came from.

use std::collections::HashMap;
use std::path::Path;

use rbee_tokenizer::gguf::{Vocabulary, tokenizer_json};
use rbee_tokenizer::{Controls, Error, Specials, Tokenizer};
use serde::Deserialize;
use serde_json::Value;

use crate::fixtures::*;

/// Metadata with texts of its own.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Metadata {
    model: String,
    pre: Option<String>,
    tokens: Vec<String>,
    scores: Option<Vec<f32>>,
    kinds: Option<Vec<i32>>,
    merges: Option<Vec<String>>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    add_space_prefix: Option<bool>,
}

impl Metadata {
    fn vocabulary(&self) -> Vocabulary<'_> {
        Vocabulary {
            model: &self.model,
            pre: self.pre.as_deref(),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            scores: self.scores.clone(),
            kinds: self.kinds.clone(),
            merges: self.merges.as_ref().map(|merges| merges.iter().map(String::as_str).collect()),
            bos: self.bos,
            eos: self.eos,
            unknown: self.unknown,
            add_bos: self.add_bos,
            add_eos: self.add_eos,
            add_space_prefix: self.add_space_prefix,
        }
    }

    fn load(&self) -> Result<Tokenizer, Error> {
        Tokenizer::from_json(&tokenizer_json(&self.vocabulary())?)
    }

    fn tokenizer(&self) -> Tokenizer {
        self.load().unwrap()
    }
}

#[derive(Deserialize)]
struct Golden {
    vocabularies: HashMap<String, Metadata>,
    texts: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    vocabulary: String,
    pre: Option<String>,
    /// Of every text, control tokens taken as letters.
    ids: Vec<Vec<u32>>,
}

/// What llama.cpp makes of the texts (`tests/fixtures/gguf_tokenizers.py`).
fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf_tokenizers.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Golden {
    fn metadata(&self, case: &Case) -> Metadata {
        Metadata { pre: case.pre.clone(), ..self.vocabularies[&case.vocabulary].clone() }
    }
}

/// The metadata that a converter makes of a `tokenizer.json`: scores in the order of the merges.
fn converted(file: &Value, model: &str, pre: Option<&str>) -> Metadata {
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let added = file["added_tokens"].as_array().unwrap();
    let mut tokens = vec![String::new(); vocab.len().max(1 + added.last().unwrap()["id"].as_u64().unwrap() as usize)];
    for (text, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    let mut kinds: Vec<i32> = tokens.iter().map(|t| if t.starts_with("<0x") && t.len() == 6 { 6 } else { 1 }).collect();
    for token in added {
        let id = token["id"].as_u64().unwrap() as usize;
        tokens[id] = token["content"].as_str().unwrap().to_owned();
        kinds[id] = match (token["special"].as_bool().unwrap(), tokens[id].as_str()) {
            (_, "<unk>") => 2,
            (true, _) => 3,
            (false, _) => 4,
        };
    }
    let merges: Vec<String> = file["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|merge| match merge.as_array() {
            Some(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
            None => merge.as_str().unwrap().to_owned(),
        })
        .collect();
    let metadata = Metadata { model: model.to_owned(), pre: pre.map(str::to_owned), tokens, ..Metadata::default() };
    if model == "gpt2" {
        return Metadata { kinds: Some(kinds), merges: Some(merges), ..metadata };
    }
    let rank = |text: &String| merges.iter().position(|merge| &merge.replace(' ', "") == text);
    let scores = metadata.tokens.iter().map(|text| rank(text).map_or(-1e6, |rank| -(rank as f32))).collect();
    Metadata { kinds: Some(kinds), scores: Some(scores), ..metadata }
}

#[test]
fn metadata_made_from_a_file_gives_the_ids_of_the_file() {
    let tinybee: Value = serde_json::from_slice(TINYBEE).unwrap();
    let cases = [
        (tinybee, "gpt2", Some("gpt-2")),
        (byte_level_json(), "gpt2", Some("gpt-2")),
        (sentencepiece_json(), "llama", None),
    ];
    for (file, model, pre) in cases {
        let original = load(&file);
        let made = converted(&file, model, pre).tokenizer();
        assert_eq!(made.vocab_size(), original.vocab_size());
        assert_eq!(made.control_ids(), original.control_ids());
        for id in 0..original.vocab_size() as u32 {
            assert_eq!(made.id_to_token(id), original.id_to_token(id));
            assert_eq!(made.token_bytes(id), original.token_bytes(id), "{id}");
        }
        for text in golden().texts {
            for specials in [Specials::AsText, Specials::AsControl] {
                let ids = original.encode_prompt(&text, specials).unwrap();
                assert_eq!(made.encode_prompt(&text, specials).unwrap(), ids, "{text:?}");
                assert_eq!(made.decode(&ids, Controls::Show), original.decode(&ids, Controls::Show), "{text:?}");
            }
        }
    }
}

/// llama.cpp leaves combining marks out of the letters of two patterns, which its regex engine cannot say.
const APPROXIMATED: [(&str, &str); 4] = [
    ("tekken", "नमस्ते दुनिया।"),
    ("tekken", "e\u{301} cafe\u{301} n\u{303} a\u{308}\u{323}"),
    ("gpt-4o", "नमस्ते दुनिया।"),
    ("gpt-4o", "e\u{301} cafe\u{301} n\u{303} a\u{308}\u{323}"),
];

#[test]
fn ids_are_those_of_llama_cpp() {
    let golden = golden();
    let mut wrong = Vec::new();
    let mut approximated = Vec::new();
    for case in &golden.cases {
        let metadata = golden.metadata(case);
        let tokenizer = metadata.tokenizer();
        assert_eq!(case.ids.len(), golden.texts.len());
        for (text, ids) in golden.texts.iter().zip(&case.ids) {
            let got = tokenizer.encode(text, Specials::AsText).unwrap();
            if &got == ids {
                continue;
            }
            let place = (case.pre.as_deref().unwrap_or_default(), text.as_str());
            match APPROXIMATED.contains(&place) {
                true => approximated.push(place),
                false => wrong.push(format!("{} {place:?}\n  {got:?}\n  {ids:?}", case.vocabulary)),
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(approximated, APPROXIMATED);
}
