//! Models that come when they are named and leave when nobody needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rbee_testkit::{Cluster, Setup, patience};
use rbee_wire::ErrorCode;
use rbee_wire::event::Event;
use rbee_wire::hive::ProcessState;
use rbee_wire::view::WorkerView;
use serde_json::{Value, json};

use crate::{infer, prompt, with};

/// Room for one simulated model and not for two.
const ROOM_FOR_ONE: u64 = 200 << 20;

fn ask(cluster: &Cluster, model: &str, about: &str, fields: Value) {
    let job = with(infer(&prompt(about), 3), json!({ "model": model }));
    cluster.job(&with(job, fields)).done();
}

fn gone(cluster: &Cluster, model: &str) {
    cluster.workers_when(&format!("{model} to be unloaded"), patience(Duration::from_secs(3)), |workers| {
        workers.iter().all(|worker| worker.model.to_string() != model)
    });
}

fn only(cluster: &Cluster) -> WorkerView {
    let workers = cluster.status().workers;
    assert_eq!(workers.len(), 1, "{workers:?}");
    workers.into_iter().next().unwrap()
}

#[test]
fn fifty_that_name_a_model_wait_for_one_load_and_see_how_far_it_is() {
    let cluster = Setup::sim("--sim-load-ms 1500").env("RBEE_SLOTS", 64).warm();
    let told: Vec<_> = std::thread::scope(|scope| {
        let ask = |n: usize| {
            let cluster = &cluster;
            scope.spawn(move || cluster.job(&with(infer(&prompt(&n.to_string()), 3), json!({ "model": "org/many" }))))
        };
        let threads: Vec<_> = (0..50).map(ask).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for told in &told {
        told.done();
        let of_load =
            |said: &&rbee_testkit::http::Said| matches!(&said.event, Event::Progress { stage, .. } if stage == "load");
        assert!(told.said.iter().filter(of_load).count() > 0, "nobody told it of the load: {:?}", told.said);
    }
    let workers = cluster.status().workers;
    assert_eq!(workers.iter().filter(|worker| worker.model.to_string() == "org/many").count(), 1, "{workers:?}");
}

#[test]
fn a_model_stays_as_long_as_was_asked_for_and_then_its_process_is_gone() {
    let cluster = Setup::sim("").env("RBEE_KEEP_ALIVE", "2s").home();
    cluster.rbee(&["up"]).exits(0);
    ask(&cluster, "org/a", "the default", json!({}));
    let worker = only(&cluster);
    assert!(worker.unload_ms.is_some_and(|left| left <= 2000), "{worker:?}");
    let used = Instant::now();
    gone(&cluster, "org/a");
    assert!(used.elapsed() > Duration::from_secs(1), "it left after {:?}", used.elapsed());

    ask(&cluster, "org/b", "zero", json!({ "keep_alive": 0 }));
    gone(&cluster, "org/b");

    ask(&cluster, "org/c", "for ever", json!({ "keep_alive": -1 }));
    std::thread::sleep(Duration::from_secs(4));
    let worker = only(&cluster);
    assert_eq!((worker.model.to_string().as_str(), worker.unload_ms), ("org/c", None));
    // Who uses it next may say otherwise.
    ask(&cluster, "org/c", "not for ever", json!({ "keep_alive": "100ms" }));
    gone(&cluster, "org/c");
    // Its goodbye comes a moment before its end.
    cluster.left_running("llm-worker-rbee", 0, patience(Duration::from_secs(1)));
}

#[test]
fn what_was_spawned_by_hand_stays_and_keeps_others_out_until_it_is_unloaded() {
    let cluster = Setup::sim("").env("RBEE_CPU_MEMORY_BYTES", ROOM_FOR_ONE).env("RBEE_KEEP_ALIVE", "1s").home();
    cluster.rbee(&["worker", "spawn", "--model", "org/mine"]).exits(0);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(only(&cluster).model.to_string(), "org/mine");
    let refused = cluster.job(&with(infer(&prompt("no room"), 3), json!({ "model": "org/other" })));
    let error = refused.error();
    assert_eq!(error.code, ErrorCode::InsufficientMemory, "{error:?}");
    assert!(error.message.contains("org/mine has 160 MiB and stays"), "{error:?}");
    assert_eq!(error.details.as_ref().unwrap()["needed"], 160 << 20, "{error:?}");
    cluster.rbee(&["infer", "-m", "org/other", "-p", "x"]).exits(1);
    let text = cluster.rbee(&["stop", "org/mine"]).exits(0).stdout;
    assert_eq!(text, "org/mine is unloaded from cpu of localhost\n");
    cluster.rbee(&["infer", "-m", "org/other", "-p", "x", "--max-tokens", "2"]).exits(0);
    cluster.rbee(&["stop", "org/mine"]).exits(3);
}

#[test]
fn the_model_that_was_used_longest_ago_leaves_for_another() {
    let cluster = Setup::sim("").env("RBEE_CPU_MEMORY_BYTES", 400u64 << 20).env("RBEE_RESIDENCY_MS", 500).home();
    cluster.rbee(&["up"]).exits(0);
    ask(&cluster, "org/old", "one", json!({}));
    std::thread::sleep(Duration::from_secs(2));
    ask(&cluster, "org/new", "two", json!({}));
    std::thread::sleep(Duration::from_millis(600));
    let job = cluster.post(&with(infer(&prompt("three"), 3), json!({ "model": "org/third" })));
    cluster.queen().listen(&format!("/v1/jobs/{job}/stream"), None).rest();
    let models: BTreeSet<String> = cluster.status().workers.iter().map(|worker| worker.model.to_string()).collect();
    assert_eq!(models, BTreeSet::from(["org/new".into(), "org/third".into()]));
    let why = cluster.rbee(&["explain", &job]).exits(0).stdout;
    assert!(why.contains("org/old") && why.contains("org/third"), "{why}");
}

#[test]
fn two_models_that_do_not_fit_together_take_turns_without_thrashing_and_nobody_waits_long() {
    let residency = Duration::from_secs(2);
    let cluster = Setup::sim("--sim-load-ms 700 --sim-step-us 20000")
        .env("RBEE_CPU_MEMORY_BYTES", ROOM_FOR_ONE)
        .env("RBEE_RESIDENCY_MS", residency.as_millis())
        .home();
    cluster.rbee(&["up"]).exits(0);
    let (over, began) = (AtomicBool::new(false), Instant::now());
    let mut spans: BTreeMap<u32, (Instant, Instant)> = BTreeMap::new();
    let waits: Vec<Duration> = std::thread::scope(|scope| {
        let client = |model: &'static str| {
            let (cluster, over) = (&cluster, &over);
            scope.spawn(move || {
                let mut waits = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    ask(cluster, model, model, json!({}));
                    waits.push(asked.elapsed());
                }
                waits
            })
        };
        let clients: Vec<_> = ["org/a", "org/b", "org/a", "org/b"].map(client).into();
        while began.elapsed() < Duration::from_secs(20) {
            for hive in cluster.status().hives {
                for process in hive.processes.iter().filter(|process| process.state == ProcessState::Ready) {
                    let now = Instant::now();
                    spans.entry(process.pid).or_insert((now, now)).1 = now;
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        over.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert!(spans.len() >= 3, "they took turns: {}", spans.len());
    // Looked at every 50 ms and told by heartbeats: what is seen of a stay is a little less than the stay.
    let seen = Duration::from_millis(400);
    let mut stays: Vec<Duration> = spans.values().map(|(from, to)| *to - *from).collect();
    // The last may still be going on.
    stays.pop();
    assert!(stays.iter().all(|stay| *stay + seen >= residency), "{stays:?}");
    let longest = waits.iter().max().unwrap();
    assert!(*longest < patience(Duration::from_secs(8)), "{longest:?} of {}", waits.len());
}

#[test]
fn a_load_that_is_asked_for_by_its_verb_is_one_that_stays_as_long_as_it_says() {
    let cluster = Setup::real().home();
    let loaded = cluster.rbee(&["model", "load", "tinybee", "--keep-alive", "-1", "--json"]).exits(0).json();
    let worker = only(&cluster);
    assert_eq!(loaded["worker_id"], worker.worker_id.to_string());
    assert_eq!(worker.unload_ms, None);
    assert_eq!(
        cluster.rbee(&["model", "load", "tinybee", "--keep-alive", "1h"]).exits(0).stdout.trim(),
        worker.worker_id.to_string(),
        "it is there"
    );
    assert!(only(&cluster).unload_ms.is_some_and(|left| left > 3_500_000));
    let plan = cluster.rbee(&["plan", "tinybee", "--ctx", "1024", "--json"]).exits(0).json();
    let (room, needs) = (&plan["rooms"][0], &plan["rooms"][0]["needs"]);
    assert_eq!((room["device"].as_str(), needs["context"].as_u64()), (Some("cpu"), Some(1024)));
    // Four layers of two heads of 48 dimensions, key and value, in f32.
    let number = |value: &Value| value.as_u64().unwrap();
    assert_eq!(number(&needs["kv_per_token"]) * 1024 * 8, number(&needs["kv"]), "{needs}");
    assert_eq!(room["held"][0]["worker_id"], worker.worker_id.to_string());
    let table = cluster.rbee(&["plan", "tinybee"]).exits(0).stdout;
    assert!(table.contains("WEIGHTS") && table.contains("yes"), "{table}");
    assert_eq!(
        cluster.rbee(&["model", "unload", "tinybee"]).exits(0).stdout,
        "tinybee is unloaded from cpu of localhost\n"
    );
    gone(&cluster, "tinybee");
}

#[test]
fn the_memory_of_a_model_that_left_is_free_again() {
    let cluster = Setup::real().env("RBEE_CPU_MEMORY_BYTES", 1u64 << 30).home();
    cluster.rbee(&["up"]).exits(0);
    let free = || {
        let plan = cluster.rbee(&["plan", "tinybee", "--json"]).exits(0).json();
        plan["rooms"][0]["free"].as_u64().unwrap()
    };
    let before = free();
    cluster.rbee(&["infer", "-p", "Once", "--max-tokens", "2", "--keep-alive", "1s", "-q"]).exits(0);
    assert_eq!(before - free(), 160 << 20);
    gone(&cluster, "tinybee");
    assert_eq!(free(), before);
}
