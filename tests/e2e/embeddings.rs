//! Embeddings through queen and worker: the very vectors, in order, and no work left behind.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use rbee_testkit::http::post;
use rbee_testkit::sim::embedding;
use rbee_testkit::{Setup, patience};
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
