//! Jobs that wait: for a slot, for a load, and not for ever.

use std::time::Duration;

use rbee_testkit::{Cluster, Setup, patience, sim, wait_for};
use rbee_wire::view::JobState;
use rbee_wire::{ErrorCode, Event};
use serde_json::json;

use crate::{infer, prompt, with};

/// One worker with one slot, and a job that keeps it until it is cancelled.
fn full(setup: Setup) -> (Cluster, String) {
    let cluster = setup.env("RBEE_SLOTS", 1).warm();
    let job = cluster.post(&with(infer(&prompt("the one that is there"), 60_000), json!({ "detach": true })));
    wait_for("the slot to be taken", Duration::from_secs(10), || match cluster.job_view(&job) {
        view if view.state == JobState::Running => Ok(()),
        view => Err(format!("{view:?}")),
    });
    (cluster, job)
}

fn free(cluster: &Cluster, job: &str) {
    assert_eq!(cluster.queen().delete(&format!("/v1/jobs/{job}")).status(), 200);
}

#[test]
fn when_all_are_busy_jobs_wait_in_order_and_then_run() {
    let (cluster, holder) = full(Setup::sim("--sim-step-us 5000"));
    let texts = ["first", "second", "third"].map(prompt);
    let mut streams = texts.each_ref().map(|text| {
        let mut stream = cluster.stream(&infer(text, 5));
        let said = stream.until("its place", |event| matches!(event, Event::Queued { .. }));
        (stream, said)
    });
    for (place, (_, said)) in (0..).zip(&streams) {
        let Some(Event::Queued { position, .. }) = said.last().map(|said| &said.event) else { panic!("{said:?}") };
        assert_eq!(*position, place);
    }
    assert_eq!(cluster.status().queued, 3);
    free(&cluster, &holder);
    let mut ended = Vec::new();
    for ((stream, _), text) in streams.iter_mut().zip(&texts) {
        let told = stream.rest();
        assert_eq!(told.tokens().len(), 5, "{told:#?}");
        sim::check(0, text, &told.tokens()).unwrap();
        let timings = told.done().timings.unwrap();
        ended.push(timings.queue_ms);
        assert!(timings.queue_ms > 0.0);
    }
    assert!(ended.is_sorted(), "first come, first served: {ended:?}");
}

#[test]
fn a_full_queue_refuses_at_once_and_makes_no_job() {
    let (cluster, holder) = full(Setup::sim("--sim-step-us 5000").env("RBEE_QUEUE_LIMIT", 2));
    let job = with(infer(&prompt("crowds"), 3), json!({ "detach": true }));
    let waiting = [cluster.post(&job), cluster.post(&job)];
    let known = cluster.answers().len();
    let answer = cluster.queen().post("/v1/jobs", &job);
    let error = answer.error();
    assert_eq!((error.code, error.retryable), (ErrorCode::QueueFull, true));
    assert!(answer.head.header("retry-after").is_some_and(|value| value.parse::<u64>().is_ok()), "{:?}", answer.head);
    cluster.rbee(&["infer", "-p", "x"]).exits(1).says(&["QUEUE_FULL", "hint:"]);
    assert_eq!(cluster.answers().len(), known, "a refusal makes no job");
    free(&cluster, &holder);
    for job in waiting {
        assert_eq!(cluster.queen().listen(&format!("/v1/jobs/{job}/stream"), None).rest().whole().tokens().len(), 3);
    }
}

#[test]
fn a_job_that_waits_too_long_is_never_dispatched() {
    let (cluster, holder) = full(Setup::sim("--sim-step-us 5000").env("RBEE_QUEUE_TIMEOUT_MS", 900));
    let never_ran = |told: &rbee_testkit::http::Told| {
        told.said.iter().all(|said| !matches!(said.event, Event::Started(_) | Event::Token(_)))
    };
    let late = cluster.job(&with(infer(&prompt("deadlines"), 5), json!({ "deadline_ms": 200 }))).whole();
    assert_eq!(late.error().code, ErrorCode::DeadlineExceeded);
    assert!(never_ran(&late), "{late:#?}");
    let out =
        cluster.rbee(&["infer", "-p", "x", "--deadline-ms", "100"]).exits(1).says(&["DEADLINE_EXCEEDED", "hint:"]);
    assert!(out.took < patience(Duration::from_millis(600)), "{:?}", out.took);
    let bored = cluster.job(&infer(&prompt("boredom"), 5)).whole();
    assert_eq!(bored.error().code, ErrorCode::QueueTimeout);
    assert!(bored.error().retryable && never_ran(&bored), "{bored:#?}");
    free(&cluster, &holder);
}

#[test]
fn a_deadline_ends_a_running_job_too() {
    let cluster = Setup::sim("--sim-step-us 5000").warm();
    let text = prompt("bells");
    let told = cluster.job(&with(infer(&text, 60_000), json!({ "deadline_ms": 400 }))).whole();
    assert_eq!(told.error().code, ErrorCode::DeadlineExceeded);
    assert!(!told.tokens().is_empty());
    sim::check(0, &text, &told.tokens()).unwrap();
    cluster.workers_when("a free slot", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
}

#[test]
fn who_leaves_the_queue_is_never_dispatched() {
    let (cluster, holder) = full(Setup::sim("--sim-step-us 5000"));
    let mut gone = cluster.stream(&infer(&prompt("leavers"), 5));
    gone.until("its place", |event| matches!(event, Event::Queued { .. }));
    let left = cluster.answers().remove(0).job_id.to_string();
    gone.close();
    let cancelled = cluster.post(&infer(&prompt("cancelled"), 5));
    free(&cluster, &cancelled);
    let told = cluster.queen().listen(&format!("/v1/jobs/{cancelled}/stream"), None).rest().whole();
    assert!(told.done().cancelled());
    wait_for("both to be over", patience(Duration::from_millis(500)), || match cluster.status().queued {
        0 => Ok(()),
        n => Err(format!("{n} wait")),
    });
    free(&cluster, &holder);
    let next = cluster.job(&infer(&prompt("stayers"), 2)).whole();
    assert_eq!(next.tokens().len(), 2);
    for job in [left, cancelled] {
        let view = cluster.job_view(&job);
        assert_eq!((view.state, view.worker_id, view.tokens), (JobState::Cancelled, None, 0));
    }
}

#[test]
fn a_job_waits_for_the_load_it_caused_and_says_how_far_it_is() {
    let cluster = Setup::sim("--sim-load-ms 700").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let text = prompt("loads");
    let other = cluster.post(&infer(&text, 3));
    let told = cluster.job(&infer(&text, 3)).whole();
    sim::check(0, &text, &told.tokens()).unwrap();
    let stages: Vec<&str> = told
        .said
        .iter()
        .filter_map(|said| if let Event::Progress { stage, .. } = &said.event { Some(stage.as_str()) } else { None })
        .collect();
    assert!(stages.contains(&"load"), "{stages:?}");
    let timings = told.done().timings.unwrap();
    assert!(timings.load_ms >= 500.0, "{timings:?}");
    let twin = cluster.queen().listen(&format!("/v1/jobs/{other}/stream"), None).rest().whole();
    assert_eq!(twin.tokens(), told.tokens());
    cluster.the("llm-worker-rbee");
    let trail = cluster.rbee(&["explain", &other]).exits(0).stdout;
    assert!(trail.contains("load") && trail.contains("dispatch"), "{trail}");
}

#[test]
fn a_spawn_of_what_is_there_is_success_and_replicas_are_more() {
    let cluster = Setup::sim("").home();
    let spawn = |more: &[&str]| {
        let args =
            [&["worker", "spawn", "--model", "tinybee", "--device", "cpu", "--hive", "localhost", "--json"], more];
        cluster.rbee(&args.concat()).exits(0).json()
    };
    let first = spawn(&[]);
    assert_eq!(first["outcome"], "started", "{first}");
    let again = spawn(&[]);
    assert_eq!((&again["outcome"], &again["worker_id"]), (&json!("existing"), &first["worker_id"]));
    spawn(&["--replicas", "2"]);
    assert_eq!(cluster.serving(2).len(), 2);
    let id = first["worker_id"].as_str().unwrap();
    cluster.rbee(&["worker", "retire", id]).exits(0);
    let left = cluster.workers_when("one to be left", Duration::from_secs(10), |workers| workers.len() == 1);
    assert_ne!(left[0].worker_id.as_str(), id);
    cluster.left_running("llm-worker-rbee", 1, Duration::from_secs(10));
}
