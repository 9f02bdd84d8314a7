//! Embeddings through queen and worker: the very vectors, in order, and no work left behind.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rbee_testkit::http::post;
use rbee_testkit::hub::{Hub, HubRepo};
use rbee_testkit::sim::embedding;
use rbee_testkit::{Cluster, Setup, patience};
use rbee_wire::event::Event;
use rbee_wire::view::Embedding;
use serde_json::{Value, json};

use crate::prompt;

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn every_text_gets_its_own_vector_in_order() {
    let cluster = Setup::sim("").warm();
    let texts: Vec<String> = (0..200).map(|i| format!("{} {i}", prompt("vectors"))).collect();
    let answer = cluster.queen().send(post("/v1/embeddings", &json!({ "input": texts })));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let json: Value = answer.json();
    let data = json["data"].as_array().unwrap();
    assert_eq!(data.len(), texts.len());
    for (i, (item, text)) in data.iter().zip(&texts).enumerate() {
        assert_eq!(item["index"], i);
        assert_eq!(numbers(&item["embedding"]), embedding(text), "{i}");
    }
    assert_eq!(json["usage"]["prompt_tokens"], texts.iter().map(String::len).sum::<usize>());
    // A job of our own has them as events, and generates nothing.
    let told = cluster.job(&json!({ "operation": "infer", "embed": [texts[0], [104, 105]] }));
    let vectors: Vec<Embedding> = told
        .said
        .iter()
        .filter_map(|said| if let Event::Data { value } = &said.event { Some(value.clone()) } else { None })
        .map(|value| serde_json::from_value(value).unwrap())
        .collect();
    assert_eq!(vectors.iter().map(|vector| vector.index).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(told.done().usage.unwrap().completion_tokens, 0);
    assert!(told.tokens().is_empty());
}

/// An encoder of the fixtures.
fn encoder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/encoders").join(name)
}

fn golden(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap()
}

/// Asserts that these texts of the fixture get the vectors of the reference.
fn embeds(cluster: &Cluster, model: &str, golden: &Value) {
    let cases = golden["cases"].as_array().unwrap();
    let length = if golden["normalised"] == true { "one" } else { "own" };
    let pooling = golden["pooling"].as_str().unwrap();
    // An empty text is no input.
    let cases: Vec<&Value> = cases.iter().filter(|case| case["text"] != "").collect();
    let texts: Vec<&Value> = cases.iter().map(|case| &case["text"]).collect();
    let ids: Vec<&Value> = cases.iter().map(|case| &case["ids"]).collect();
    for input in [json!(texts), json!(ids)] {
        let answer = cluster.queen().send(post("/v1/embeddings", &json!({ "model": model, "input": input })));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let json: Value = answer.json();
        assert_eq!(json["data"].as_array().unwrap().len(), cases.len());
        for (item, case) in json["data"].as_array().unwrap().iter().zip(&cases) {
            let (got, want) = (numbers(&item["embedding"]), numbers(&case[length][pooling]));
            assert_eq!(got.len(), want.len());
            let error = got.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
            assert!(error <= 1e-5, "{}: {error}", case["text"]);
        }
        let tokens: usize = ids.iter().map(|ids| ids.as_array().unwrap().len()).sum();
        assert_eq!(json["usage"]["prompt_tokens"], tokens);
    }
}

#[test]
fn an_embedding_model_makes_its_vectors_and_refuses_all_else_by_name() {
    let cluster = Setup::real().home();
    let folder = encoder("bert").canonicalize().unwrap();
    let model = folder.display().to_string();
    cluster.rbee(&["worker", "spawn", "--model", &model]).exits(0);
    embeds(&cluster, &model, &golden(&folder));
    // Longer than the folder's `max_seq_length`: refused with its length, never cut.
    let long = "a bee flies home ".repeat(40);
    let answer = cluster.queen().send(post("/v1/embeddings", &json!({ "model": model, "input": ["a bee", long] })));
    let said = answer.text();
    assert_eq!(answer.status(), 400, "{said}");
    assert!(said.contains("context_length_exceeded") && said.contains("context of 48"), "{said}");
    let by_name = format!("{model} is an embedding model");
    let refused = cluster.rbee(&["infer", "-m", &model, "-p", "Once upon a time"]).exits(1);
    assert!(refused.stderr.contains(&by_name) && refused.stderr.contains("/v1/embeddings"), "{}", refused.stderr);
    assert_eq!(refused.stdout, "");
    let messages = json!([{ "role": "user", "content": "hi" }]);
    for (path, body) in [
        ("/v1/chat/completions", json!({ "model": model, "messages": messages })),
        ("/v1/completions", json!({ "model": model, "prompt": "hi" })),
        ("/v1/completions", json!({ "model": model, "prompt": [1, 2] })),
    ] {
        let answer = cluster.queen().send(post(path, &body));
        let said = answer.text();
        assert_eq!(answer.status(), 400, "{path}: {said}");
        assert!(said.contains(&by_name) && said.contains("invalid_request"), "{path}: {said}");
    }
    // It serves on.
    embeds(&cluster, &model, &golden(&folder));
}

#[test]
fn an_embedding_model_is_fetched_with_what_its_folder_declares() {
    let (hub, folder) = (Hub::start(), encoder("xlm-roberta"));
    let read = |name: &str| fs::read(folder.join(name)).unwrap();
    let small = [
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let repo = small.iter().fold(HubRepo::new(), |repo, name| repo.file(name, read(name)));
    hub.put("org/encoder", "main", repo.lfs("model.safetensors", read("model.safetensors")));
    // The reference is in f32, and these weights are in bf16.
    let exact = Setup::real().env("RBEE_EXACT", 1);
    let cluster = exact.env("HF_ENDPOINT", &hub.url).env("RBEE_HUB_MIRRORS", &hub.cdn).home();
    cluster.rbee(&["worker", "spawn", "--model", "org/encoder"]).exits(0);
    // It declares `cls`, which is not what a folder without modules gets.
    embeds(&cluster, "org/encoder", &golden(&folder));
}

#[test]
fn a_client_that_leaves_its_texts_frees_the_slot() {
    let cluster = Setup::sim("--sim-step-us 50000").warm();
    let texts = vec![prompt("leaving"); 2000];
    let body = json!({ "input": texts }).to_string();
    let mut client = TcpStream::connect(cluster.queen).unwrap();
    let head = format!("POST /v1/embeddings HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n", cluster.queen, body.len());
    client.write_all(format!("{head}Content-Type: application/json\r\n\r\n{body}").as_bytes()).unwrap();
    cluster.workers_when("the texts to be under way", Duration::from_secs(20), |workers| {
        workers.iter().any(|worker| worker.slots.used > 0)
    });
    drop(client);
    cluster.workers_when("its slots to be free", patience(Duration::from_millis(500)), |workers| {
        workers.iter().all(|worker| worker.slots.used == 0)
    });
    let told = cluster.job(&json!({ "operation": "infer", "embed": ["x"] }));
    assert_eq!(told.done().choices.len(), 1);
}
