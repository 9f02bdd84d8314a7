//! The OpenAI dialect as bytes: what becomes of every field of its tables, the form of errors wherever they arise, keep-alives,
//! and clients that leave.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rbee_openai::fields::{Endpoint, Fate, Field};
use rbee_testkit::http::{Answer, Request, post};
use rbee_testkit::{Cluster, Setup, patience, sim};
use rbee_wire::fields::Kind;
use rbee_wire::op::INFER_FIELDS;
use rbee_wire::routes;
use serde_json::{Value, json};

use crate::prompt;

pub(crate) fn body(endpoint: Endpoint, fields: Value) -> Value {
    let text = prompt("dialects");
    let mut body = match endpoint {
        Endpoint::Chat => json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 3 }),
        Endpoint::Completions => json!({ "prompt": text, "max_tokens": 3 }),
        Endpoint::Embeddings => json!({ "input": text }),
    };
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn ask(cluster: &Cluster, endpoint: Endpoint, fields: Value) -> Answer {
    cluster.queen().send(post(endpoint.path(), &body(endpoint, fields)))
}

/// The dialect's error, in its form to the letter.
fn error(answer: &Answer, status: u16) -> Value {
    assert_eq!(answer.status(), status, "{}", answer.text());
    let json: Value = answer.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
    let mut keys: Vec<&String> = error.keys().collect();
    keys.sort();
    assert_eq!(keys, ["code", "message", "param", "type"], "{json}");
    assert!(error["message"].is_string() && error["type"].is_string() && error["code"].is_string(), "{json}");
    assert!(answer.head.header("x-request-id").is_some());
    json["error"].clone()
}

/// A value that the field takes, beside what it needs, and one that it does not.
pub(crate) fn samples(field: &Field) -> (Value, Value) {
    let kind = |name: &str| INFER_FIELDS.iter().find(|row| row.name == name).unwrap().kind;
    let with = |value: Value| json!({ field.name: value });
    match (field.fate, field.name) {
        (_, "min_tokens") => (with(json!(1)), with(json!(-1))),
        (_, "top_logprobs") => (json!({ "logprobs": true, "top_logprobs": 2 }), with(json!(2))),
        (_, "chat_template_kwargs") => (with(json!({})), with(json!([]))),
        (_, "model") => (with(json!("tinybee")), with(json!(5))),
        (_, "messages") => (with(json!([{ "role": "user", "content": "hi" }])), with(json!([]))),
        (_, "prompt") => (with(json!([104, 105])), with(json!([-1]))),
        (_, "input") => (with(json!(["a", "b"])), with(json!([]))),
        (_, "encoding_format") => (with(json!("base64")), with(json!("int8"))),
        (Fate::Refused("always"), "dimensions") => (with(Value::Null), with(json!(64))),
        (_, "seed") => (with(json!(-5)), with(json!("x"))),
        (_, "logprobs") if field.fate != Fate::Job("logprobs") => (with(json!(1)), with(json!(30))),
        (_, "stream_options") => (with(json!({ "include_usage": true })), with(json!({ "include_usage": 1 }))),
        (_, "stream") => (with(json!(false)), with(json!(1))),
        (_, "max_tokens") => (with(json!(4)), with(json!(0))),
        (_, "response_format") => (with(json!({ "type": "text" })), with(json!({ "type": "xml" }))),
        (_, "tools" | "functions") => (with(json!([])), with(json!([{ "name": "f" }]))),
        (_, "tool_choice" | "function_call") => (with(json!("none")), with(json!("required"))),
        (_, "modalities") => (with(json!(["text"])), with(json!(["audio"]))),
        (_, "best_of") => (with(json!(1)), with(json!(3))),
        (_, "echo") => (with(json!(false)), with(json!(true))),
        (_, "suffix") => (with(json!("")), with(json!("x"))),
        (Fate::Refused("always"), _) => (with(Value::Null), with(json!({}))),
        (Fate::Ignored, _) => (with(json!("x")), Value::Null),
        (Fate::Job(name), _) => match kind(name) {
            Kind::Int(min, _) => (with(json!(min.max(2))), with(json!(-1))),
            Kind::Float(..) => (with(json!(0.5)), with(json!(99))),
            Kind::Bool => (with(json!(true)), with(json!(1))),
            Kind::Texts(_) => (with(json!(["x"])), with(json!([1]))),
            Kind::Bias => (with(json!({ "7": 1.5 })), with(json!({ "7": 101 }))),
            other => panic!("{}: no sample of {other:?}", field.name),
        },
        (fate, name) => panic!("{name}: no sample of {fate:?}"),
    }
}

#[test]
fn every_field_of_the_tables_becomes_what_they_say() {
    let cluster = Setup::sim("").warm();
    for endpoint in Endpoint::ALL {
        for field in endpoint.fields() {
            let (good, bad) = samples(field);
            // Its own name beside `max_tokens` would be two numbers for one thing.
            let good = if field.name == "max_completion_tokens" { json!({ field.name: 3 }) } else { good };
            let answer = ask(&cluster, endpoint, good);
            assert_eq!(answer.status(), 200, "{endpoint:?} {}: {}", field.name, answer.text());
            let ignored = answer.head.header("x-rbee-ignored");
            if field.fate == Fate::Ignored {
                assert_eq!(ignored, Some(field.name));
                continue;
            }
            assert_eq!(ignored, None, "{}", field.name);
            let refused = error(&ask(&cluster, endpoint, bad), 400);
            assert_eq!(
                refused["param"].as_str().map(|name| name.split('.').next()),
                Some(Some(field.name)),
                "{refused}"
            );
            assert!(refused["message"].as_str().unwrap().contains(&format!("`{}", field.name)), "{refused}");
        }
    }
}

#[test]
fn what_another_part_of_the_queen_refuses_is_said_in_the_dialect_too() {
    let cluster = Setup::sim("").env("RBEE_TOKEN", "s3cret").env("RBEE_API_KEY", "s3cret").warm();
    let open = cluster.queen();
    let mut queen = cluster.queen();
    queen.bearer = Some("s3cret".into());
    let chat = body(Endpoint::Chat, json!({}));
    let refused = error(&open.send(post(routes::CHAT_COMPLETIONS, &chat)), 401);
    assert_eq!((&refused["code"], &refused["type"]), (&json!("invalid_api_key"), &json!("invalid_request_error")));
    for path in [routes::MODELS, "/v1/models/tinybee", "/v1/embeddings"] {
        error(&open.get(path), 401);
    }
    let foreign = post(routes::CHAT_COMPLETIONS, &chat).header("Origin", "http://evil.example");
    assert_eq!(error(&queen.send(foreign), 403)["code"], "forbidden_origin");
    assert_eq!(error(&queen.get("/v1/chat/nothing"), 404)["code"], "not_found");
    assert_eq!(error(&queen.get(routes::CHAT_COMPLETIONS), 405)["code"], "method_not_allowed");
    for broken in [
        "{",
        "[]",
        "{\"messages\": 1, \"messages\": 2}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}",
    ] {
        error(&queen.send(Request::new("POST", routes::CHAT_COMPLETIONS).body(broken)), 400);
    }
    let large = Request::new("POST", routes::COMPLETIONS).body(vec![b' '; 25 << 20]);
    assert_eq!(error(&queen.send(large), 413)["code"], "payload_too_large");
    // Our own routes keep their own form.
    assert_eq!(queen.get("/v1/nothing").error().code.name(), "NOT_FOUND");
}

#[test]
fn a_refusal_that_a_retry_cannot_help_says_so_and_one_that_it_can_says_when() {
    let cluster = Setup::sim("--sim-step-us 20000").env("RBEE_SLOTS", 1).env("RBEE_QUEUE_LIMIT", 1).warm();
    let fails = Setup::sim("--sim-load-fails").home();
    fails.rbee(&["up"]).exits(0);
    let answer = ask(&fails, Endpoint::Chat, json!({}));
    assert_eq!(error(&answer, 503)["code"], "model_load_failed");
    assert_eq!(answer.head.header("x-should-retry"), Some("false"));

    let long = || body(Endpoint::Chat, json!({ "max_tokens": 60_000, "stream": true }));
    let mut running = cluster.queen().open(post(routes::CHAT_COMPLETIONS, &long()));
    running.read_more().unwrap();
    let waiting = cluster.queen().open(post(routes::CHAT_COMPLETIONS, &long()));
    let refused = loop {
        // The second may not be in line yet.
        let answer = ask(&cluster, Endpoint::Chat, json!({ "max_tokens": 1 }));
        if answer.status() == 429 {
            break answer;
        }
        assert_eq!(answer.status(), 200, "{}", answer.text());
    };
    let said = error(&refused, 429);
    assert_eq!((&said["type"], &said["code"]), (&json!("rate_limit_error"), &json!("queue_full")));
    assert!(refused.head.header("retry-after").is_some_and(|seconds| seconds.parse::<u64>().unwrap() >= 1));
    assert_eq!(refused.head.header("x-should-retry"), None);
    drop((running, waiting));
}

/// The data lines of a stream.
fn data(bytes: &[u8]) -> Vec<Value> {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("data: ").map(str::to_owned));
    lines.map(|line| serde_json::from_str(&line).unwrap_or(Value::String(line))).collect()
}

#[test]
fn a_prompt_of_token_ids_is_answered_as_its_text_is_and_foreign_ids_are_refused_by_name() {
    let cluster = Setup::sim("").warm();
    let text = prompt("ids");
    // What the simulated model makes of a text.
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    let complete = |prompt: Value| ask(&cluster, Endpoint::Completions, json!({ "prompt": prompt }));
    let texts = |answer: &Answer| -> Vec<String> {
        let json: Value = answer.json();
        json["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let one = complete(json!(ids));
    assert_eq!(one.status(), 200, "{}", one.text());
    assert_eq!(texts(&one), [sim::text(0, &text, 3)]);
    assert_eq!(one.json::<Value>()["usage"]["prompt_tokens"], ids.len());
    let both = complete(json!([ids, ids[1..], text]));
    assert_eq!(texts(&both), [sim::text(0, &text, 3), sim::text(0, &text[1..], 3), sim::text(0, &text, 3)]);
    for foreign in [json!([104, u32::MAX]), json!([[104], [u32::MAX]])] {
        for (endpoint, fields, name) in [
            (Endpoint::Completions, json!({ "prompt": foreign }), "prompt"),
            (Endpoint::Completions, json!({ "prompt": foreign, "stream": true }), "prompt"),
            (Endpoint::Embeddings, json!({ "input": foreign }), "input"),
            (Endpoint::Chat, json!({ "logit_bias": { "4000000": 1 } }), "logit_bias"),
        ] {
            // Of several prompts one may be on its way when another is refused: then the stream ends in the error.
            if fields["stream"] == true && foreign[0].is_array() {
                continue;
            }
            let refused = error(&ask(&cluster, endpoint, fields), 400);
            let message = refused["message"].as_str().unwrap();
            assert_eq!(refused["param"], name, "{foreign}: {refused}");
            assert!(message.contains("vocabulary") && message.contains(&format!("`{name}`")), "{refused}");
        }
    }
}

#[test]
fn headers_come_after_ten_seconds_and_silence_is_filled_with_single_lines() {
    // A prefill of about 24 s.
    let cluster = Setup::sim("--sim-prefill-us 1500000").warm();
    let asked = json!({ "model": "tinybee", "prompt": "sixteen letters!", "max_tokens": 2, "stream": true });
    let began = Instant::now();
    let mut stream = cluster.queen().open(post(routes::COMPLETIONS, &asked));
    let took = began.elapsed();
    assert_eq!(stream.status(), 200);
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(20), "{took:?}");
    while stream.read_more().unwrap() {}
    let bytes = stream.bytes().to_vec();
    let text = String::from_utf8(bytes.clone()).unwrap();
    assert!(text.starts_with(": keep-alive\n") && !text.contains("keep-alive\n\n"), "{text}");
    assert!(!text.contains("id:") && !text.contains("event:"), "{text}");
    let data = data(&bytes);
    assert_eq!(data.last(), Some(&json!("[DONE]")));
    let said: String = data.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(said, sim::text(0, "sixteen letters!", 2));
}

#[test]
fn an_answer_that_somebody_cancels_ends_in_an_error_and_not_in_an_end() {
    let cluster = Setup::sim("--sim-step-us 10000").warm();
    for streams in [true, false] {
        let asked = body(Endpoint::Chat, json!({ "max_tokens": 60_000, "stream": streams }));
        let client = cluster.queen();
        let waiting = std::thread::spawn(move || {
            let mut stream = client.open(post(routes::CHAT_COMPLETIONS, &asked));
            while stream.read_more().unwrap() {}
            (stream.status(), stream.bytes().to_vec())
        });
        let jobs = rbee_testkit::wait_for("a job to have tokens", Duration::from_secs(10), || {
            let jobs = cluster.jobs();
            let running = jobs.into_iter().find(|job| job.tokens > 3 && job.usage.is_none());
            running.ok_or_else(|| "none".to_owned())
        });
        assert_eq!(cluster.queen().delete(&format!("/v1/jobs/{}", jobs.job_id)).status(), 200);
        let (status, bytes) = waiting.join().unwrap();
        let last = if streams {
            assert_eq!(status, 200);
            data(&bytes).pop().unwrap()
        } else {
            assert_eq!(status, 409);
            serde_json::from_slice(&bytes).unwrap()
        };
        assert_eq!(last["error"]["code"], "cancelled", "{last}");
    }
}

#[test]
fn a_thousand_clients_that_leave_at_any_moment_free_their_slots() {
    let cluster = Setup::sim("--sim-step-us 2000").env("RBEE_SLOTS", 16).env("RBEE_QUEUE_LIMIT", 64).warm();
    let leave = |seed: u64| {
        let mut state = seed;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..50 {
            let endpoint = if random(2) == 0 { Endpoint::Chat } else { Endpoint::Completions };
            let streams = random(2) == 0;
            let asked = body(endpoint, json!({ "max_tokens": 60_000, "stream": streams, "n": 1 + random(3) }));
            let mut socket = TcpStream::connect(cluster.queen).unwrap();
            socket.write_all(&post(endpoint.path(), &asked).bytes(cluster.queen)).unwrap();
            if streams && random(2) == 0 {
                // Whatever has come within the pause.
                socket.set_read_timeout(Some(Duration::from_millis(1 + random(40)))).unwrap();
                let _ = socket.read(&mut [0; 4096]);
            } else {
                std::thread::sleep(Duration::from_millis(random(40)));
            }
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..20 {
            scope.spawn(move || leave(seed));
        }
    });
    cluster.workers_when("all slots to be free", patience(Duration::from_millis(500)), |workers| {
        workers.iter().all(|worker| worker.slots.used == 0 && worker.queue == 0)
    });
    assert_eq!((cluster.status().running, cluster.status().queued), (0, 0));
    assert_eq!(ask(&cluster, Endpoint::Chat, json!({})).status(), 200);
}
