//! The verbs: what each prints for people and for programs, and what it exits with.

use std::time::Duration;

use rbee_testkit::{Cluster, Setup};
use serde_json::{Value, json};

use crate::{infer, prompt, with};

/// Runs a verb both ways: text that has these words, and one JSON document.
#[track_caller]
fn both(cluster: &Cluster, verb: &[&str], words: &[&str]) -> Value {
    let text = cluster.rbee(verb).exits(0).stdout;
    for word in words {
        assert!(text.contains(word), "{verb:?} has no {word:?}:\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "colour without a terminal: {text:?}");
    cluster.rbee(&[verb, &["--json"]].concat()).exits(0).json()
}

#[test]
fn verbs_that_look() {
    let cluster = Setup::sim("").warm();
    let text = prompt("looks");
    cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3"]).exits(0);
    let worker = cluster.serving(1).remove(0);
    let id = worker.worker_id.as_str();
    let job = cluster.answers().into_iter().find(|job| job.tokens == 3).unwrap().job_id.to_string();
    let pid = cluster.the("llm-worker-rbee").pid.to_string();
    let queen = cluster.queen.to_string();

    for verb in ["status", "ps"] {
        let status = both(&cluster, &[verb], &[&queen, "localhost", id, "tinybee", "cpu"]);
        assert_eq!(status["workers"][0]["worker_id"], id);
        assert_eq!(status["hives"][0]["hive_id"], "localhost");
        assert!(status["queen"]["build"].is_string());
    }
    assert_eq!(both(&cluster, &["worker", "list"], &[id, "tinybee"])[0]["worker_id"], id);
    assert_eq!(both(&cluster, &["worker", "get", id], &[id, "tinybee"])["worker_id"], id);
    let processes = both(&cluster, &["worker", "process", "list"], &[&pid, id]);
    assert_eq!(processes[0]["pid"].to_string(), pid);
    assert_eq!(both(&cluster, &["worker", "process", "get", &pid], &[&pid, id])["worker_id"], id);
    let binaries = both(&cluster, &["worker", "binary", "list"], &["cpu"]);
    assert!(binaries.as_array().is_some_and(|list| !list.is_empty()), "{binaries}");
    assert_eq!(both(&cluster, &["worker", "binary", "get", "cpu"], &["cpu"])["worker_type"], "cpu");
    assert!(both(&cluster, &["worker", "logs", id], &[])["lines"].is_array());
    let hives = both(&cluster, &["hive", "list"], &["localhost"]);
    assert_eq!(hives[0]["hive_id"], "localhost");
    let hive = both(&cluster, &["hive", "get"], &["localhost", "cpu"]);
    assert_eq!(hive["devices"][0]["id"], "cpu");
    both(&cluster, &["hive", "get", "--host", "localhost"], &["cpu"]);
    both(&cluster, &["hive", "status"], &["localhost"]);
    both(&cluster, &["hive", "refresh-capabilities"], &["cpu"]);
    both(&cluster, &["hive", "logs"], &[]);
    assert_eq!(both(&cluster, &["queen", "status"], &[&queen])["ready"], true);
    assert_eq!(both(&cluster, &["queen", "info"], &["queen-rbee"])["program"], "queen-rbee");
    both(&cluster, &["queen", "logs"], &[]);
    assert_eq!(cluster.rbee(&["queen", "logs", "--tail", "1"]).exits(0).stdout.lines().count(), 1);
    let jobs = both(&cluster, &["job", "list"], &[&job, "infer"]);
    assert!(jobs.as_array().is_some_and(|list| list.iter().any(|view| view["job_id"] == job)), "{jobs}");
    assert_eq!(both(&cluster, &["job", "get", &job], &[&job, "done"])["state"], "done");
    let trail = both(&cluster, &["explain", &job], &["accepted", "dispatch", id]);
    assert!(trail["trail"].as_array().is_some_and(|list| list.len() >= 3), "{trail}");
    let attached = cluster.rbee(&["job", "attach", &job, "--json"]).exits(0).json_lines();
    assert_eq!(attached.last().unwrap()["type"], "done");
}

#[test]
fn verbs_that_need_no_daemon() {
    let cluster = Setup::sim("").env("RBEE_SLOTS", 3).home();
    let config = both(&cluster, &["config"], &["queue_limit", "256", "default", "slots", "environment"]);
    assert!(config.to_string().contains("\"slots\""), "{config}");
    let version = both(&cluster, &["version"], &["rbee"]);
    assert!(version["version"].is_string() && version["protocol"] == 1, "{version}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(cluster.rbee(&["completions", shell]).exits(0).stdout.contains("infer"), "{shell}");
    }
    for args in [&["--help"][..], &["infer", "--help"], &["worker", "spawn", "--help"], &["--version"]] {
        assert!(!cluster.rbee(args).exits(0).stdout.is_empty(), "{args:?}");
    }
    let doctor = cluster.rbee(&["doctor"]);
    assert!(doctor.stdout.contains(&cluster.folder().display().to_string()), "{}{}", doctor.stdout, doctor.stderr);
    cluster.cmd(&["doctor", "--json"]).run().json();
    assert_eq!(cluster.processes(), []);

    std::fs::write(cluster.folder().join("config/config.toml"), "queue_limt = 1\n").unwrap_or_else(|_| {
        std::fs::create_dir_all(cluster.folder().join("config")).unwrap();
        std::fs::write(cluster.folder().join("config/config.toml"), "queue_limt = 1\n").unwrap();
    });
    cluster.rbee(&["config"]).exits(2).says(&["queue_limt", "queue_limit"]);
    cluster.rbee(&["infer", "-p", "x"]).exits(2).says(&["queue_limt"]);
}

#[test]
fn verbs_that_act() {
    let cluster = Setup::sim("--sim-step-us 5000").home();
    both(&cluster, &["queen", "start"], &[]);
    let queen = cluster.the("queen-rbee");
    both(&cluster, &["hive", "start"], &[]);
    cluster.the("rbee-hive");
    cluster.rbee(&["up"]).exits(0);
    assert_eq!(cluster.the("queen-rbee"), queen, "starting what runs is success");

    let spawned = cluster.rbee(&["worker", "spawn", "--model", "tinybee"]).exits(0).stdout;
    let id = cluster.serving(1)[0].worker_id.to_string();
    assert!(spawned.contains(&id), "{spawned}");
    let job = cluster.post(&with(infer(&prompt("acts"), 60_000), json!({ "detach": true })));
    cluster.rbee(&["job", "cancel", &job]).exits(0);
    cluster.rbee(&["job", "cancel", &job]).exits(1).says(&["JOB_OVER"]);
    cluster.rbee(&["job", "attach", &job]).exits(1).says(&["cancelled"]);

    let pid = cluster.the("llm-worker-rbee").pid.to_string();
    cluster.rbee(&["worker", "process", "delete", &pid]).exits(0);
    cluster.left_running("llm-worker-rbee", 0, Duration::from_secs(10));
    cluster.rbee(&["worker", "process", "delete", &pid]).exits(3).says(&["PROCESS_NOT_FOUND", "hint:"]);
    cluster.rbee(&["worker", "get", &id]).exits(3).says(&["WORKER_NOT_FOUND", "hint:"]);
    cluster.rbee(&["worker", "retire", "worker-none"]).exits(3).says(&["WORKER_NOT_FOUND"]);
    cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--hive", "elsewhere"]).exits(3).says(&["HIVE_UNKNOWN"]);
    cluster
        .rbee(&["worker", "spawn", "--model", "tinybee", "--device", "cuda:7"])
        .exits(3)
        .says(&["DEVICE_UNAVAILABLE"]);
    cluster.rbee(&["worker", "binary", "get", "abacus"]).exits(3);
    cluster.rbee(&["worker", "binary", "build", "cpu"]).exits(1).says(&["NOT_IMPLEMENTED"]);

    cluster.rbee(&["hive", "stop"]).exits(0);
    assert_eq!(cluster.running("rbee-hive"), []);
    cluster.rbee(&["hive", "start"]).exits(0);
    cluster.the("rbee-hive");
    cluster.rbee(&["down"]).exits(0);
    assert_eq!(cluster.processes(), []);
}

#[test]
fn errors_are_json_where_json_was_asked_for() {
    let cluster = Setup::sim("").home();
    let out = cluster.rbee(&["status", "--json"]).exits(4);
    assert!(out.json()["error"]["message"].is_string(), "{}", out.stdout);
    cluster.rbee(&["queen", "start"]).exits(0);
    let out = cluster.rbee(&["worker", "get", "worker-none", "--json"]).exits(3);
    assert_eq!(out.json()["error"]["code"], "WORKER_NOT_FOUND");
}

#[test]
fn status_watches() {
    let cluster = Setup::sim("").warm();
    let mut watch = cluster.cmd(&["status", "--watch"]).start();
    watch.hear("two pictures", |text| text.matches("localhost").count() >= 2 && text.matches("\n\n").count() >= 1);
    watch.signal(rbee_testkit::Signal::INT);
    watch.finish(Duration::from_secs(5)).exits(130);
}
