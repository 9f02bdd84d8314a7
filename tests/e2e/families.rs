//! A folder of every family, from the command line's side: loaded, asked, and the tokens are the reference's.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rbee_testkit::Setup;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Leading greedy tokens that are beyond doubt.
    clear: usize,
}

/// The tokens' names: a letter each, so that any ids can be written as a text, and longer ones for control tokens.
fn names(config: &Value) -> Vec<String> {
    let ends = match &config["eos_token_id"] {
        Value::Array(ids) => ids.clone(),
        id => vec![id.clone()],
    };
    let vocab = u32::try_from(config["vocab_size"].as_u64().unwrap()).unwrap();
    let letter = |id| char::from_u32(0x4e00 + id).expect("small ids are letters");
    let name = |id| if ends.contains(&json!(id)) { format!("<end {id}>") } else { letter(id).to_string() };
    (0..vocab).map(name).collect()
}

fn tokenizer(names: &[String]) -> Value {
    let ids: BTreeMap<&String, usize> = names.iter().zip(0..).collect();
    let control = ids.iter().filter(|(name, _)| name.starts_with('<')).map(|(name, id)| {
        json!({ "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": control.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": [] },
    })
}

#[test]
fn a_folder_of_every_family_answers_with_the_tokens_of_the_reference() {
    let cluster = Setup::real().home();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models");
    let mut families = 0;
    for fixture in fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path()) {
        let name = fixture.file_name().unwrap().to_string_lossy().into_owned();
        let golden: Golden = serde_json::from_slice(&fs::read(fixture.join("golden.json")).unwrap()).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(fixture.join("config.json")).unwrap()).unwrap();
        let folder = cluster.folder().join(&name);
        fs::create_dir(&folder).unwrap();
        for file in fs::read_dir(&fixture).unwrap().map(|entry| entry.unwrap().path()) {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
        let names = names(&config);
        fs::write(folder.join("tokenizer.json"), tokenizer(&names).to_string()).unwrap();
        let model = folder.display().to_string();
        // f32 KV, as the reference has it; the weights' own would round.
        cluster.rbee(&["worker", "spawn", "--model", &model, "--kv-type", "f32", "--slots", "2"]).exits(0);
        for case in golden.cases {
            let prompt: String = case.prompt.iter().map(|id| names[*id as usize].as_str()).collect();
            for prompt in [json!(prompt), json!(case.prompt)] {
                let told = cluster.job(&json!({
                    "operation": "infer", "model": model, "prompt": prompt, "temperature": 0, "max_tokens": case.clear,
                    "ignore_eos": true,
                }));
                let ids: Vec<u32> = told.tokens().iter().map(|token| token.id).collect();
                assert_eq!(told.done().usage.unwrap().prompt_tokens, case.prompt.len() as u64, "{name}");
                assert_eq!(ids, case.greedy[..case.clear], "{name}: {:?}", told.text());
            }
        }
        let worker = cluster
            .status()
            .workers
            .iter()
            .find(|worker| worker.model.to_string() == model)
            .map(|worker| worker.worker_id.to_string());
        cluster.rbee(&["worker", "retire", &worker.unwrap()]).exits(0);
        families += 1;
    }
    assert!(families >= 25, "{families} fixtures");
}
