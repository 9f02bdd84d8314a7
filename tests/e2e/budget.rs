//! Where a request's time went, which trace it belongs to, and when it is told to come back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rbee_testkit::http::{Answer, post};
use rbee_testkit::{Setup, patience, wait_for};
use rbee_wire::routes;
use serde_json::{Value, json};

use crate::{infer, prompt};

fn chat(more: Value) -> Value {
    crate::with(json!({ "messages": [{ "role": "user", "content": prompt("budgets") }], "max_tokens": 20 }), more)
}

/// The parts of `Server-Timing`, in milliseconds.
fn budget(header: Option<&str>) -> BTreeMap<String, f64> {
    let part = |part: &str| {
        let (name, ms) = part.split_once(";dur=").unwrap();
        (name.trim().to_owned(), ms.parse().unwrap())
    };
    header.expect("there is a Server-Timing").split(',').map(part).collect()
}

#[test]
fn an_answer_says_where_its_time_went() {
    // 20 steps of 10 ms, and 1 ms for each of some 30 tokens of the prompt.
    let cluster = Setup::sim("--sim-step-us 10000 --sim-prefill-us 1000").warm();
    let header = |answer: &Answer| budget(answer.head.header("server-timing"));
    let whole = header(&cluster.queen().send(post(routes::CHAT_COMPLETIONS, &chat(json!({})))));
    assert_eq!(whole.keys().collect::<Vec<_>>(), ["decode", "load", "network", "prefill", "queue", "total"]);
    assert!(whole["decode"] >= 150.0 && whole["prefill"] >= 20.0, "{whole:?}");
    assert!(whole["network"] > 0.0 && whole["network"] <= whole["prefill"], "{whole:?}");
    let parts: f64 = ["queue", "load", "prefill", "decode"].iter().map(|part| whole[*part]).sum();
    assert!(parts <= whole["total"] + 0.01 && parts > whole["total"] * 0.5, "{whole:?}");
    // A stream's headers come with the first token: what is known by then.
    let streamed = header(&cluster.queen().send(post(routes::CHAT_COMPLETIONS, &chat(json!({ "stream": true })))));
    assert!(streamed["prefill"] >= 20.0 && streamed["decode"] < whole["decode"], "{streamed:?}");
    let embedded = cluster.queen().send(post(routes::EMBEDDINGS, &json!({ "input": prompt("budgets") })));
    assert!(header(&embedded)["total"] > 10.0);

    let timings = cluster.job(&infer(&prompt("budgets"), 20)).done().timings.unwrap();
    assert!(timings.network_ms > 0.0 && timings.network_ms <= timings.prefill_ms, "{timings:?}");
    let said = cluster.rbee(&["infer", "--timings", "--max-tokens", "5", &prompt("budgets")]).exits(0).stderr;
    for row in ["queue", "load", "prefill", "network", "decode", "total"] {
        assert!(said.contains(row), "{row}: {said}");
    }
}

#[test]
fn a_trace_goes_from_its_caller_to_the_worker_and_a_broken_one_nowhere() {
    let cluster = Setup::sim("").warm();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let asked = |value: &str| post(routes::CHAT_COMPLETIONS, &chat(json!({}))).header("traceparent", value);
    assert_eq!(cluster.queen().send(asked(&format!("00-{trace}-00f067aa0ba902b7-01"))).status(), 200);
    assert_eq!(cluster.queen().send(asked("00-ffffffffffffffffffffffffffffffff-0000000000000000-01")).status(), 200);
    let worker = cluster.status().workers[0].worker_id.to_string();
    wait_for("the worker to have told of it", patience(Duration::from_secs(1)), || {
        let said = cluster.rbee(&["worker", "logs", &worker]).stdout;
        if said.contains(trace) { Ok(()) } else { Err(said) }
    });
    let queen = cluster.rbee(&["queen", "logs"]).exits(0).stdout;
    assert!(queen.contains(trace) && !queen.contains("ffffffffffffffffffffffffffffffff"), "{queen}");
}

#[test]
fn a_whole_answer_that_is_minutes_away_is_refused_with_the_time_to_come_back() {
    let cluster = Setup::sim("--sim-load-ms 1200000").home();
    cluster.rbee(&["up"]).exits(0);
    let began = Instant::now();
    let refused = cluster.queen().send(post(routes::CHAT_COMPLETIONS, &chat(json!({}))));
    assert!(began.elapsed() < Duration::from_secs(60), "after {:?}", began.elapsed());
    assert_eq!(refused.status(), 503, "{}", refused.text());
    let error: Value = refused.json();
    assert_eq!(error["error"]["code"], "model_loading");
    let seconds: u64 = refused.head.header("retry-after").unwrap().parse().unwrap();
    assert!((301..3000).contains(&seconds), "{seconds}");
    assert_eq!(refused.head.header("x-should-retry"), None);
    // A stream waits, with headers and comments.
    let mut stream = cluster.queen().open(post(routes::CHAT_COMPLETIONS, &chat(json!({ "stream": true }))));
    assert!(stream.read_more().is_ok());
}
