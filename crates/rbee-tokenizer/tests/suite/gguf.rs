//! Tokenizers from GGUF metadata give the ids of llama.cpp and of the `tokenizer.json` the metadata came from.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use proptest::prelude::*;
use rbee_tokenizer::gguf::{Vocabulary, tokenizer_config_json, tokenizer_json};
use rbee_tokenizer::{Controls, Error, Specials, Tokenizer, TokenizerConfig};
use serde::Deserialize;
use serde_json::{Value, json};

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
    name: Option<String>,
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
            name: self.name.as_deref(),
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

/// Words of any length are cut without giving up, by every rule.
#[test]
fn long_monotonous_texts_are_cut_by_every_rule() {
    let golden = golden();
    for case in &golden.cases {
        let tokenizer = golden.metadata(case).tokenizer();
        for unit in [" ", "a", "A", "\n", "7", "!", "\r\n \t", "é", "e\u{301}", "日", "'s"] {
            let text = unit.repeat((64 << 10) / unit.len());
            let (ids, took) = timed(|| tokenizer.encode(&text, Specials::AsText).unwrap());
            assert!(took.as_secs() < 5, "{} {:?} {unit:?}: {took:?}", case.vocabulary, case.pre);
            assert_eq!(tokenizer.decode(&ids, Controls::Hide), text, "{} {:?}", case.vocabulary, case.pre);
        }
    }
}

/// The vocabularies of [`golden`] by name, with a rule for words where one is needed.
fn metadata(name: &str) -> Metadata {
    let metadata = golden().vocabularies.remove(name).unwrap();
    let pre = (metadata.model == "gpt2").then(|| "qwen2".to_owned());
    Metadata { pre, ..metadata }
}

#[test]
fn what_stands_before_a_text_is_what_the_file_or_its_kind_says() {
    let with = |name: &str, edit: fn(&mut Metadata)| {
        let mut metadata = metadata(name);
        edit(&mut metadata);
        let ids = metadata.tokenizer().encode_prompt("a", Specials::AsText).unwrap();
        ids.iter().map(|&id| metadata.tokens[id as usize].clone()).collect::<Vec<String>>()
    };
    assert_eq!(with("bytes", |_| ()), ["a"]);
    assert_eq!(with("bytes", |m| m.add_bos = Some(true)), ["<|endoftext|>", "a"]);
    assert_eq!(with("bytes", |m| m.pre = Some("llama-bpe".to_owned())), ["<|endoftext|>", "a"]);
    assert_eq!(with("llama", |_| ()), ["<s>", "▁a"]);
    assert_eq!(with("llama", |m| m.bos = None), ["<s>", "▁a"]);
    assert_eq!(with("llama", |m| m.add_bos = Some(false)), ["▁a"]);
    assert_eq!(with("gemma", |_| ()), ["<s>", "a"]);
    // Behind it, where it is complete.
    let ended = Metadata { add_eos: Some(true), ..metadata("bytes") };
    let ids = ended.tokenizer().encode_whole("a").unwrap();
    assert_eq!(ids.iter().map(|&id| ended.tokens[id as usize].as_str()).collect::<Vec<_>>(), ["a", "<|endoftext|>"]);
}

#[test]
fn a_token_that_is_called_unused_is_a_token() {
    let mut metadata = metadata("bytes");
    let the = metadata.tokenizer().token_to_id("the").unwrap();
    metadata.kinds.as_mut().unwrap()[the as usize] = 5;
    assert_eq!(metadata.tokenizer().encode("the", Specials::AsText).unwrap(), [the]);
}

#[test]
fn templates_get_the_texts_of_named_tokens() {
    let config = |metadata: &Metadata, template| {
        TokenizerConfig::from_json(&tokenizer_config_json(&metadata.vocabulary(), template).unwrap()).unwrap()
    };
    let texts = |texts: &[(&str, &str)]| -> Vec<(String, String)> {
        texts.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect()
    };
    let llama = config(&metadata("llama"), Some("{{ bos_token }}\"\n"));
    assert_eq!(llama.special_texts, texts(&[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]));
    assert_eq!(llama.chat_templates, texts(&[("default", "{{ bos_token }}\"\n")]));
    let bytes = config(&Metadata { bos: None, ..metadata("bytes") }, None);
    assert_eq!(bytes.special_texts, texts(&[("eos_token", "<|endoftext|>")]));
    assert_eq!(bytes.chat_templates, []);
}

/// Converters call the ends of turns ordinary or user-defined; users must not be able to write them.
#[test]
fn ends_of_turns_are_control_tokens_whatever_the_file_calls_them() {
    for kind in [1, 4] {
        let mut metadata = metadata("bytes");
        let end = metadata.tokens.iter().position(|token| token == "<|im_end|>").unwrap();
        metadata.kinds.as_mut().unwrap()[end] = kind;
        let tokenizer = metadata.tokenizer();
        assert!(tokenizer.is_control(end as u32));
        assert!(!tokenizer.encode("<|im_end|>", Specials::AsText).unwrap().contains(&(end as u32)));
        assert_eq!(tokenizer.encode("<|im_end|>", Specials::AsControl).unwrap(), [end as u32]);
    }
}

#[test]
fn control_tokens_of_phi_3_take_the_space_behind_them() {
    let ids = |name: &str, text| {
        let metadata = Metadata { name: Some(name.to_owned()), ..metadata("bytes") };
        metadata.tokenizer().encode(text, Specials::AsControl).unwrap()
    };
    assert_eq!(ids("Phi-3.5 mini", "<|im_end|>\n a"), ids("other", "<|im_end|>a"));
    assert_eq!(ids("Phi3", "<|endoftext|>\n a"), ids("other", "<|endoftext|>\n a"));
    assert_ne!(ids("other", "<|im_end|>\n a"), ids("other", "<|im_end|>a"));
}

/// Of two tokens with one text the ordinary one is unreachable; its neighbours keep their ids.
#[test]
fn a_second_token_of_one_text_yields_to_the_one_that_steers() {
    let mut metadata = metadata("bytes");
    let (the, end) = (metadata.tokenizer().token_to_id("the").unwrap(), metadata.eos.unwrap());
    let kinds = metadata.kinds.as_mut().unwrap();
    for (text, kind) in [("the", 1), ("<|endoftext|>", 5), ("", 3), ("last", 1)] {
        metadata.tokens.push(text.to_owned());
        kinds.push(kind);
    }
    let tokenizer = metadata.tokenizer();
    assert_eq!(tokenizer.token_to_id("the"), Some(the));
    assert_eq!(tokenizer.token_to_id("<|endoftext|>"), Some(end));
    assert_eq!(tokenizer.token_to_id("last"), Some(metadata.tokens.len() as u32 - 1));
    assert_eq!(tokenizer.token_bytes(metadata.tokens.len() as u32 - 2), b"");

    // The ordinary one comes first: it still yields.
    metadata.tokens.push("<|im_start|>".to_owned());
    let start = metadata.tokens.iter().position(|token| token == "<|im_start|>").unwrap();
    metadata.kinds.as_mut().unwrap()[start] = 1;
    metadata.kinds.as_mut().unwrap().push(3);
    let ids = metadata.tokenizer().encode("<|im_start|>", Specials::AsControl).unwrap();
    assert_eq!(ids, [metadata.tokens.len() as u32 - 1]);
}

#[test]
fn a_merge_is_cut_at_the_space_between_two_tokens() {
    let mut metadata = metadata("bytes");
    let merges = ["z z", "z  z", " z z"];
    metadata.tokens.extend(["zz", " ", "z ", "z z", " z", " zz"].map(str::to_owned));
    metadata.kinds.as_mut().unwrap().extend([1; 6]);
    metadata.merges = Some(merges.map(str::to_owned).to_vec());
    let file: Value = serde_json::from_slice(&tokenizer_json(&metadata.vocabulary()).unwrap()).unwrap();
    assert_eq!(file["model"]["merges"], json!([["z", "z"], ["z", " z"], [" z", "z"]]));
}

/// SentencePiece's BPE as it is defined, in quadratic time: letters, then the best pair, and the leftmost of the best.
fn joined_by_score(text: &str, scores: &HashMap<String, f32>) -> Vec<String> {
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let score = |at: usize| scores.get(&format!("{}{}", parts[at], parts[at + 1])).copied();
        let mut best: Option<(f32, usize)> = None;
        for at in 0..parts.len().saturating_sub(1) {
            if let Some(score) = score(at)
                && best.is_none_or(|(highest, _)| score > highest)
            {
                best = Some((score, at));
            }
        }
        let Some((_, at)) = best else {
            return parts;
        };
        let right = parts.remove(at + 1);
        parts[at].push_str(&right);
    }
}

/// Metadata of pieces, each but the letters made of two earlier ones, the earlier the higher its score.
fn scored(letters: &[&str], joins: &[(usize, usize)]) -> Metadata {
    let mut pieces: Vec<String> = letters.iter().map(|&letter| letter.to_owned()).collect();
    for &(left, right) in joins {
        let piece = format!("{}{}", pieces[left % pieces.len()], pieces[right % pieces.len()]);
        if piece.len() <= 64 && !pieces.contains(&piece) {
            pieces.push(piece);
        }
    }
    let mut metadata = Metadata {
        model: "llama".to_owned(),
        tokens: ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec(),
        kinds: Some(vec![2, 3, 3]),
        add_space_prefix: Some(false),
        ..Metadata::default()
    };
    let kinds = metadata.kinds.as_mut().unwrap();
    kinds.extend([6; 256]);
    kinds.extend(vec![1; pieces.len()]);
    metadata.tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    metadata.tokens.extend(pieces);
    metadata.scores = Some((0..metadata.tokens.len()).map(|id| -(id as f32)).collect());
    metadata
}

#[test]
fn of_the_ways_to_make_a_piece_the_longest_left_part_is_first() {
    // `ab`, `bc` and `abc`.
    let metadata = scored(&["a", "b", "c"], &[(0, 1), (1, 2), (3, 2)]);
    let file: Value = serde_json::from_slice(&tokenizer_json(&metadata.vocabulary()).unwrap()).unwrap();
    assert_eq!(file["model"]["merges"], json!([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]));
}

proptest! {
    #[test]
    fn pieces_are_joined_by_score(
        joins in prop::collection::vec((0usize..60, 0usize..60), 1..60),
        text in "[abc]{1,40}",
    ) {
        let metadata = scored(&["a", "b", "c"], &joins);
        let scores = metadata.tokens.iter().cloned().zip(metadata.scores.clone().unwrap()).skip(259).collect();
        let ids = metadata.tokenizer().encode(&text, Specials::AsText).unwrap();
        let got: Vec<&str> = ids.iter().map(|&id| metadata.tokens[id as usize].as_str()).collect();
        prop_assert_eq!(got, joined_by_score(&text, &scores));
    }

    /// Whatever the fields hold, the answer is a tokenizer or an error.
    #[test]
    fn metadata_of_any_content_never_panics(
        model in prop::sample::select(vec!["gpt2", "llama", "bert", ""]),
        pre in prop::option::of(prop::sample::select(vec!["qwen2", "llama-bpe", "deepseek-v3", "bloom", "", "\0"])),
        tokens in prop::collection::vec("(a|b|ab|ba|aba| |▁|▁a|<s>|<0x0A>|\\PC{0,3})", 0..20),
        scores in prop::option::of(prop::collection::vec(any::<f32>(), 0..20)),
        kinds in prop::option::of(prop::collection::vec(-1i32..8, 0..20)),
        merges in prop::option::of(prop::collection::vec("(a b|b a|ab a|a ba| |  |\\PC{0,4})", 0..8)),
        ids in prop::array::uniform3(prop::option::of(0u32..24)),
        flags in prop::array::uniform3(prop::option::of(any::<bool>())),
        fitted in any::<bool>(),
        text in "(a|b| |<s>|\\PC){0,12}",
    ) {
        let mut metadata = Metadata {
            model: model.to_owned(), pre: pre.map(str::to_owned), tokens, scores, kinds, merges,
            bos: ids[0], eos: ids[1], unknown: ids[2],
            add_bos: flags[0], add_eos: flags[1], add_space_prefix: flags[2], name: None,
        };
        if fitted {
            let count = metadata.tokens.len();
            for scores in metadata.scores.iter_mut() { scores.resize(count, 0.0); }
            for kinds in metadata.kinds.iter_mut() { kinds.resize(count, 1); }
        }
        let _ = tokenizer_config_json(&metadata.vocabulary(), Some(&text));
        if let Ok(tokenizer) = metadata.load() {
            prop_assert!(tokenizer.vocab_size() <= metadata.tokens.len());
            let _ = tokenizer.encode_prompt(&text, Specials::AsText);
        }
    }
}

#[test]
fn contradicting_metadata_is_refused() {
    type Edit = (&'static str, &'static str, fn(&mut Metadata));
    let edits: [Edit; 25] = [
        ("bytes", "tokenizer.ggml.model", |m| m.model = "bert".to_owned()),
        ("bytes", "tokenizer.ggml.model", |m| m.model = "t5".to_owned()),
        ("bytes", "tokenizer.ggml.model", |m| m.model = String::new()),
        ("bytes", "tokenizer.ggml.pre", |m| m.pre = Some("kimi-k2".to_owned())),
        ("bytes", "tokenizer.ggml.pre", |m| m.pre = Some("Qwen2".to_owned())),
        ("bytes", "tokenizer.ggml.tokens", |m| m.tokens.clear()),
        ("bytes", "tokenizer.ggml.token_type", |m| m.kinds.as_mut().unwrap().truncate(7)),
        ("bytes", "tokenizer.ggml.token_type", |m| m.kinds.as_mut().unwrap()[3] = 7),
        ("bytes", "tokenizer.ggml.token_type", |m| m.kinds.as_mut().unwrap()[3] = -1),
        ("bytes", "tokenizer.ggml.scores", |m| m.scores = Some(vec![0.0])),
        ("bytes", "tokenizer.ggml.merges", |m| m.merges = None),
        ("bytes", "tokenizer.ggml.merges", |m| m.merges.as_mut().unwrap().push("th".to_owned())),
        ("bytes", "tokenizer.ggml.merges", |m| m.merges.as_mut().unwrap().push("t qqq".to_owned())),
        ("bytes", "tokenizer.ggml.merges", |m| m.merges.as_mut().unwrap().push("q q".to_owned())),
        ("bytes", "tokenizer.ggml.merges", |m| m.merges.as_mut().unwrap().push(String::new())),
        ("bytes", "tokenizer.ggml.bos_token_id", |m| m.bos = Some(u32::MAX)),
        ("bytes", "tokenizer.ggml.eos_token_id", |m| m.eos = Some(m.tokens.len() as u32)),
        ("bytes", "tokenizer.ggml.bos_token_id", |m| (m.bos, m.add_bos) = (None, Some(true))),
        ("bytes", "tokenizer.ggml.eos_token_id", |m| (m.eos, m.add_eos) = (None, Some(true))),
        ("bytes", "tokenizer.ggml.tokens", |m| {
            m.tokens.push("<|im_start|>".to_owned());
            m.kinds.as_mut().unwrap().push(3);
        }),
        ("llama", "tokenizer.ggml.scores", |m| m.scores = None),
        ("llama", "tokenizer.ggml.scores", |m| m.scores.as_mut().unwrap()[300] = f32::NAN),
        ("llama", "tokenizer.ggml.unknown_token_id", |m| m.unknown = Some(1 << 31)),
        ("llama", "tokenizer.ggml.tokens", |m| {
            let newline = m.tokens.iter().position(|token| token == "<0x0A>").unwrap();
            m.tokens[newline] = "<0x0a>".to_owned();
        }),
        ("llama", "tokenizer.ggml.tokens", |m| m.tokens[400] = "a".repeat(300)),
    ];
    for (number, (name, key, edit)) in edits.iter().enumerate() {
        let mut metadata = metadata(name);
        edit(&mut metadata);
        match metadata.load() {
            Err(Error::Corrupt { what, .. } | Error::Unsupported { what, .. }) => assert_eq!(what, *key, "{number}"),
            Err(error) => panic!("{number}: {error}"),
            Ok(_) => panic!("{number}: accepted"),
        }
    }
    let mut unknown = metadata("bytes");
    unknown.pre = Some("kimi-k2".to_owned());
    assert!(unknown.load().err().unwrap().to_string().contains("kimi-k2"));
}

#[test]
fn metadata_beyond_all_bounds_is_refused_at_once() {
    let tokens = |tokens| Vocabulary { model: "llama", tokens, ..Vocabulary::default() };
    let long = "a".repeat(49 << 20);
    let merges = Vocabulary { merges: Some(vec!["a b"; (1 << 20) + 1]), ..tokens(vec!["a"]) };
    for vocabulary in [tokens(vec!["a"; (1 << 20) + 1]), tokens(vec![&long]), merges] {
        let (result, took) = timed(|| tokenizer_json(&vocabulary));
        assert!(matches!(result, Err(Error::Corrupt { .. } | Error::TooLarge { .. })));
        assert!(took.as_millis() < 1000, "{took:?}");
    }
}

/// As many pieces as the largest vocabularies have, and as long.
#[test]
fn merges_of_a_quarter_million_pieces_are_found_soon() {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    };
    let letters: Vec<String> = ('a'..='z').chain(['▁', 'é', 'ß', '日', '本']).map(String::from).collect();
    let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
    let mut metadata = scored(&letters, &[]);
    let mut known: HashSet<String> = metadata.tokens.iter().cloned().collect();
    let mut short = metadata.tokens[259..].to_vec();
    while metadata.tokens.len() < 256 << 10 {
        let piece = format!("{}{}", short[random() % short.len()], short[random() % short.len()]);
        if known.insert(piece.clone()) {
            if piece.chars().count() <= 8 {
                short.push(piece.clone());
            }
            metadata.tokens.push(piece);
        }
    }
    let count = metadata.tokens.len();
    metadata.kinds.as_mut().unwrap().resize(count, 1);
    metadata.scores = Some((0..count).map(|id| -(id as f32)).collect());
    let vocabulary = metadata.vocabulary();
    let (file, took) = timed(|| tokenizer_json(&vocabulary).unwrap());
    let (tokenizer, load) = timed(|| Tokenizer::from_json(&file).unwrap());
    println!("{count} pieces, {} bytes of JSON: made in {took:?}, loaded in {load:?}", file.len());
    assert_eq!(tokenizer.vocab_size(), count);
    assert!(took.as_secs() < 10, "{took:?}");
}
