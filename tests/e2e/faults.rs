//! Processes that die and freeze. Where a time is promised, a test allows five times it.

use std::time::{Duration, Instant};

use rbee_testkit::http::{End, Stream};
use rbee_testkit::{Cluster, Setup, Signal, patience, sim, wait_for};
use rbee_wire::event::Token;
use rbee_wire::view::WorkerView;
use rbee_wire::{ErrorCode, Event};
use serde_json::json;

use crate::{infer, prompt, with};

/// Tokens of a stream that has begun.
fn begin(cluster: &Cluster, text: &str) -> (Stream, Vec<Token>) {
    let mut stream = cluster.stream(&infer(text, 60_000));
    let said = stream.tokens(3);
    let tokens = said.iter().filter_map(|said| if let Event::Token(t) = &said.event { Some(t.clone()) } else { None });
    (stream, tokens.collect())
}

fn idle(workers: &[WorkerView]) -> bool {
    workers.len() == 1 && workers[0].slots.used == 0
}

#[test]
fn a_killed_queen_is_an_error_to_everybody_and_its_successor_knows_the_fleet() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let worker = cluster.the("llm-worker-rbee");
    let text = prompt("queens");
    let mut answer = cluster.cmd(&["infer", "-p", &text]).start();
    answer.hear("text", |text| !text.is_empty());
    let (mut raw, tokens) = begin(&cluster, &text);
    let detached = cluster.post(&with(infer(&text, 60_000), json!({ "detach": true })));
    wait_for("three jobs to run", Duration::from_secs(10), || match cluster.status().running {
        3 => Ok(()),
        n => Err(format!("{n} run")),
    });

    cluster.the("queen-rbee").signal(Signal::KILL);
    let out = answer.finish(Duration::from_secs(10)).exits(4).says(&["error:", "hint:"]);
    assert!(sim::text(0, &text, 2000).starts_with(&out.stdout), "what came is the text's beginning");
    let told = raw.rest();
    assert_eq!(told.end, End::Broken, "a stream whose queen died is never closed in order: {:?}", told.said);
    sim::check(0, &text, &[tokens, told.tokens()].concat()).unwrap();

    cluster.rbee(&["queen", "start"]).exits(0);
    let up = Instant::now();
    let seen = cluster.workers_when("the fleet", patience(Duration::from_secs(1)), |workers| workers.len() == 1);
    assert_eq!(cluster.the("llm-worker-rbee"), worker, "the same worker, {:?} after the start: {seen:?}", up.elapsed());
    cluster.workers_when("the lost jobs to be stopped", patience(Duration::from_secs(1)), idle);
    let gone = cluster.queen().get(&format!("/v1/jobs/{detached}")).error();
    assert_eq!(gone.code, ErrorCode::QueenRestarted);
    assert_eq!(cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3"]).exits(0).stdout, sim::text(0, &text, 3));
}

#[test]
fn a_worker_killed_in_the_middle_is_told_at_once_and_comes_back() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let worker = cluster.the("llm-worker-rbee");
    let life = cluster.serving(1)[0].incarnation.clone();
    let text = prompt("losses");
    let mut answer = cluster.cmd(&["infer", "-p", &text]).start();
    answer.hear("text", |text| !text.is_empty());
    let (mut stream, tokens) = begin(&cluster, &text);

    worker.signal(Signal::KILL);
    let killed = Instant::now();
    let told = stream.rest();
    let took = killed.elapsed();
    assert_eq!(told.end, End::Done, "the job's stream ends in order, with an error in it");
    let error = told.error();
    assert_eq!(error.code, ErrorCode::WorkerLost, "{error}");
    assert!(error.retryable && error.hint.is_some(), "{error:?}");
    assert!(took < patience(Duration::from_secs(1)), "{took:?}");
    sim::check(0, &text, &[tokens, told.tokens()].concat()).unwrap();
    answer.finish(Duration::from_secs(10)).exits(1).says(&["WORKER_LOST", "hint:"]);

    let limit = patience(Duration::from_secs(3));
    let back = cluster.workers_when("another worker", limit, |workers| {
        workers.len() == 1 && workers[0].incarnation != life && rbee_testkit::cluster::serves(&workers[0])
    });
    assert_ne!(cluster.the("llm-worker-rbee").pid, worker.pid);
    assert_eq!(back[0].slots.used, 0);
    let processes = cluster.rbee(&["worker", "process", "list", "--json"]).exits(0).json();
    let exit = &processes[0]["last_exit"];
    assert_eq!(exit["signal"], 9, "{processes}");
    assert_eq!(cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3"]).exits(0).stdout, sim::text(0, &text, 3));
}

#[test]
fn a_worker_lost_before_the_first_token_is_replaced_unseen() {
    let cluster = Setup::sim("--sim-prefill-us 20000").home();
    cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--replicas", "2"]).exits(0);
    cluster.serving(2);
    let text = prompt("patience while reading a prompt");
    let mut stream = cluster.stream(&infer(&text, 5));
    let first = stream.until("the dispatch", |event| matches!(event, Event::Started(_)));
    let Some(Event::Started(started)) = first.last().map(|said| said.event.clone()) else { panic!("{first:?}") };
    let processes = cluster.rbee(&["worker", "process", "list", "--json"]).exits(0).json();
    let pid =
        processes.as_array().unwrap().iter().find(|p| p["worker_id"] == started.worker_id.as_str()).unwrap()["pid"]
            .clone();
    let victim = cluster.running("llm-worker-rbee").into_iter().find(|process| pid == process.pid).unwrap();
    victim.signal(Signal::KILL);
    let told = stream.rest();
    assert_eq!(told.end, End::Done);
    told.done();
    assert_eq!(told.tokens().len(), 5, "one whole answer: {told:#?}");
    sim::check(0, &text, &told.tokens()).unwrap();
}

#[test]
fn a_frozen_worker_is_named_and_replaced() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let worker = cluster.the("llm-worker-rbee");
    let text = prompt("ice");
    let (mut stream, tokens) = begin(&cluster, &text);
    worker.signal(Signal::STOP);
    let stopped = Instant::now();
    let told = stream.rest();
    let took = stopped.elapsed();
    let error = told.error();
    assert_eq!(error.code, ErrorCode::WorkerStalled, "{error}");
    assert!(took < patience(Duration::from_secs(2)), "{took:?}");
    sim::check(0, &text, &[tokens, told.tokens()].concat()).unwrap();
    wait_for("the frozen worker's end", patience(Duration::from_secs(6)), || {
        if worker.is_alive() { Err(format!("{worker:?} is there")) } else { Ok(()) }
    });
    cluster.serving(1);
    assert_eq!(cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3"]).exits(0).stdout, sim::text(0, &text, 3));
}

#[test]
fn a_killed_hive_leaves_no_orphan() {
    let cluster = Setup::sim("--sim-step-us 20000").home();
    cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--replicas", "3"]).exits(0);
    cluster.serving(3);
    let workers = cluster.running("llm-worker-rbee");
    assert_eq!(workers.len(), 3);
    let text = prompt("orphans");
    let (mut stream, tokens) = begin(&cluster, &text);

    cluster.the("rbee-hive").signal(Signal::KILL);
    cluster.left_running("llm-worker-rbee", 0, patience(Duration::from_secs(2)));
    let told = stream.rest();
    assert_eq!(told.error().code, ErrorCode::WorkerLost);
    sim::check(0, &text, &[tokens, told.tokens()].concat()).unwrap();
    cluster.workers_when("the queen to know", patience(Duration::from_secs(2)), <[_]>::is_empty);
    // Asked again, the queen starts a hive again.
    assert_eq!(cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3"]).exits(0).stdout, sim::text(0, &text, 3));
    cluster.the("rbee-hive");
}

#[test]
fn a_load_that_fails_is_told_with_its_reason_and_not_repeated_for_ever() {
    let cluster = Setup::sim("--sim-load-fails").home();
    let out = cluster.rbee(&["infer", "-p", "x"]).exits(1);
    assert!(out.stderr.contains("MODEL_LOAD_FAILED") || out.stderr.contains("CRASH_LOOP"), "{}", out.stderr);
    assert!(out.stderr.contains("told to fail"), "the worker's own reason: {}", out.stderr);
    let spawn = cluster.rbee(&["worker", "spawn", "--model", "tinybee"]).exits(1);
    assert!(spawn.stderr.contains("hint:"), "{}", spawn.stderr);
    cluster.left_running("llm-worker-rbee", 0, Duration::from_secs(10));
}

#[test]
fn only_the_hives_own_children_can_be_ended_through_it() {
    let cluster = Setup::sim("").warm();
    let mut stranger = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    for pid in [stranger.id(), 1, std::process::id(), u32::MAX, cluster.the("queen-rbee").pid] {
        let told = cluster.job(&json!({ "operation": "worker_process_delete", "pid": pid }));
        assert_eq!(told.error().code, ErrorCode::ProcessNotFound, "{pid}");
    }
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert_eq!(cluster.processes().len(), 3);
}

#[test]
fn a_worker_started_by_hand_serves_and_deregisters() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let worker = cluster.worker_by_hand(&["--sim-seed", "5", "--slots", "2"]);
    let seen = cluster.serving(1);
    assert_eq!(seen[0].slots.total, 2);
    let text = prompt("hands");
    let out = cluster.rbee(&["infer", "-p", &text, "--max-tokens", "4", "--no-load"]).exits(0);
    assert_eq!(out.stdout, sim::text(5, &text, 4));
    assert_eq!(cluster.running("rbee-hive"), [], "nobody needed a hive");
    worker.stop();
    cluster.workers_when("the worker to deregister", patience(Duration::from_secs(1)), <[_]>::is_empty);
}
