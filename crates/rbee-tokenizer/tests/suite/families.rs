//! Templates in the manner of each model family, byte for byte as transformers renders them
//! (`tests/fixtures/make_chat.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rbee_tokenizer::{ChatTemplate, Error, GenerationPrompt, Render, TokenizerConfig};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Golden {
    now: i64,
    specials: BTreeMap<String, String>,
    cases: Vec<Case>,
    results: BTreeMap<String, Vec<Expected>>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    settings: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expected {
    Text(String),
    /// By the template itself, with these words.
    Refused(String),
    /// Whatever Python ends with.
    Fails(#[expect(dead_code, reason = "the name of Python's exception is for the reader")] String),
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat")
}

fn render(golden: &Golden, source: &str, case: &Case) -> Result<String, Error> {
    let special_texts = golden.specials.clone().into_iter().collect();
    let config = TokenizerConfig { special_texts, chat_templates: Vec::new() };
    let mut settings = case.settings.clone();
    let generation_prompt = match settings.remove("add_generation_prompt") {
        Some(Value::Bool(false)) => GenerationPrompt::Omit,
        _ => GenerationPrompt::Add,
    };
    ChatTemplate::load(&config, Some(source.as_bytes()))?.expect("there is a template").render(&Render {
        messages: &case.messages,
        tools: case.tools.as_deref().unwrap_or_default(),
        settings: &settings,
        generation_prompt,
        now: golden.now,
    })
}

#[test]
fn templates_of_every_family_render_as_in_transformers() {
    let golden: Golden = serde_json::from_slice(&fs::read(folder().join("golden.json")).unwrap()).unwrap();
    assert!(golden.results.len() >= 12);
    let mut wrong = Vec::new();
    for (family, results) in &golden.results {
        let source = fs::read_to_string(folder().join(family).with_extension("jinja")).unwrap();
        assert_eq!(results.len(), golden.cases.len());
        for (case, expected) in golden.cases.iter().zip(results) {
            let got = render(&golden, &source, case);
            let same = match (&got, expected) {
                (Ok(got), Expected::Text(want)) => got == want,
                (Err(Error::TemplateRefused(got)), Expected::Refused(want)) => got == want,
                (Err(Error::Template(_)), Expected::Fails(_)) => true,
                _ => false,
            };
            if !same {
                wrong.push(format!("{family}, {}:\n  {got:?}\n  {expected:?}", case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
