//! The job API, spoken raw as curl would.

use std::thread;
use std::time::Duration;

use rbee_testkit::http::{End, Heard, Request, post};
use rbee_testkit::{Setup, patience, sim, wait_for};
use rbee_wire::event::FinishReason;
use rbee_wire::view::JobState;
use rbee_wire::{ErrorCode, Event};
use serde_json::{Value, json};

use crate::{infer, prompt, with};

#[test]
fn a_job_in_two_calls_and_in_one() {
    let cluster = Setup::sim("").warm();
    let text = prompt("calls");
    let job = infer(&text, 7);

    let accepted = cluster.queen().post("/v1/jobs", &job);
    assert_eq!(accepted.status(), 202, "{}", accepted.text());
    let body: Value = accepted.json();
    let url = body["sse_url"].as_str().unwrap();
    assert!(url.starts_with('/'), "{url}");
    let mut two = cluster.queen().listen(url, None);
    let one = cluster.stream(&job);
    for stream in [&two, &one] {
        let head = stream.head();
        assert_eq!(head.status, 200);
        assert_eq!(head.header("content-type"), Some("text/event-stream; charset=utf-8"));
        assert_eq!(head.header("cache-control"), Some("no-cache"));
        assert_eq!(head.header("x-accel-buffering"), Some("no"));
        assert_eq!(head.header("x-rbee-protocol"), Some("1"));
        assert!(head.header("x-request-id").is_some());
        assert_eq!(head.header("content-encoding"), None);
    }
    let mut one = one;
    for told in [two.rest().whole(), one.rest().whole()] {
        sim::check(0, &text, &told.tokens()).unwrap();
        assert_eq!(told.tokens().len(), 7);
        assert_eq!(told.said[0].id, Some(0));
        let started: Vec<_> = told
            .said
            .iter()
            .filter_map(|said| if let Event::Started(s) = &said.event { Some(s) } else { None })
            .collect();
        assert_eq!(started.len(), 1);
        assert_eq!(started[0].prompt_tokens, text.len() as u64);
        assert!(!started[0].why.is_empty(), "every decision carries its reason");
        let done = told.done();
        assert_eq!(done.choices[0].finish_reason, FinishReason::Length);
        let (usage, timings) = (done.usage.unwrap(), done.timings.unwrap());
        assert_eq!((usage.completion_tokens, usage.total_tokens), (7, 7 + text.len() as u64));
        let parts = timings.queue_ms + timings.load_ms + timings.prefill_ms + timings.decode_ms;
        assert!(timings.total_ms >= parts - 1.0 && timings.total_ms < parts + 1000.0, "{timings:?}");
    }
}

#[test]
fn listeners_come_and_go_and_all_read_the_same_bytes() {
    let cluster = Setup::sim("--sim-step-us 3000").warm();
    let text = prompt("listeners");
    let job = cluster.post(&infer(&text, 60));
    let path = format!("/v1/jobs/{job}/stream");
    let live: Vec<_> = thread::scope(|scope| {
        let listen = || scope.spawn(|| cluster.queen().listen(&path, None).rest().whole());
        let threads: Vec<_> = (0..4).map(|_| listen()).collect();
        // One that leaves in the middle changes nothing.
        let mut leaving = cluster.queen().listen(&path, None);
        leaving.tokens(3);
        leaving.close();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let replay = cluster.queen().listen(&path, None).rest().whole();
    sim::check(0, &text, &replay.tokens()).unwrap();
    assert_eq!(replay.tokens().len(), 60);
    for told in &live {
        assert_eq!(told.said, replay.said, "byte for byte the same events");
    }
    // After any event: exactly what follows it.
    for (at, said) in
        replay.said.iter().enumerate().step_by(7).chain([(replay.said.len() - 1, replay.said.last().unwrap())])
    {
        let rest = cluster.queen().listen(&path, said.id).rest();
        assert_eq!(rest.end, End::Done);
        assert_eq!(rest.said, replay.said[at + 1..], "after {:?}", said.id);
    }
    assert_eq!(cluster.rbee(&["job", "attach", &job]).exits(0).stdout, replay.text());
}

#[test]
fn a_cancelled_job_ends_in_one_done_and_frees_its_slot() {
    let cluster = Setup::sim("--sim-step-us 10000").warm();
    let text = prompt("second thoughts");
    let job = cluster.post(&infer(&text, 10_000));
    let path = format!("/v1/jobs/{job}");
    let mut stream = cluster.queen().listen(&format!("{path}/stream"), None);
    let mut said = stream.tokens(5);
    assert_eq!(cluster.queen().delete(&path).status(), 200);
    let told = stream.rest();
    said.extend(told.said.clone());
    assert_eq!(told.done().choices[0].finish_reason, FinishReason::Cancelled);
    assert_eq!(told.end, End::Done);
    let tokens: Vec<_> =
        said.iter().filter_map(|said| if let Event::Token(t) = &said.event { Some(t.clone()) } else { None }).collect();
    sim::check(0, &text, &tokens).unwrap();
    assert_eq!(cluster.job_view(&job).state, JobState::Cancelled);
    let again = cluster.queen().delete(&path).error();
    assert_eq!(again.code, ErrorCode::JobOver);
    cluster.workers_when("a free slot", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
}

#[test]
fn clients_that_leave_at_any_moment_free_their_slots() {
    let cluster = Setup::sim("--sim-step-us 2000").env("RBEE_SLOTS", 64).warm();
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let job = infer(&prompt("leaving"), 60_000);
    thread::scope(|scope| {
        for i in 0..60u64 {
            let (cluster, job) = (&cluster, &job);
            // A third leaves before any byte, the others after a few tokens.
            let tokens = (seed.wrapping_mul(31) + i * 7919) % 9;
            scope.spawn(move || match tokens {
                0..3 => {
                    drop(cluster.queen().send_and_leave(post("/v1/jobs", job).header("Accept", "text/event-stream")))
                }
                count => {
                    let mut stream = cluster.stream(job);
                    stream.tokens(count as usize);
                    stream.close();
                }
            });
        }
    });
    wait_for("every job to be over", patience(Duration::from_millis(500)), || {
        let status = cluster.status();
        match (status.running, status.queued, status.workers[0].slots.used) {
            (0, 0, 0) => Ok(()),
            seen => Err(format!("running, queued, slots used: {seen:?}")),
        }
    });
}

#[test]
fn a_listener_that_does_not_read_slows_nobody_and_misses_nothing() {
    let cluster = Setup::sim("").warm();
    let text = prompt("naps");
    let job = cluster.post(&infer(&text, 20_000));
    let path = format!("/v1/jobs/{job}/stream");
    let mut asleep = cluster.queen().listen(&path, None);
    let awake = cluster.queen().listen(&path, None).rest().whole();
    assert_eq!(awake.tokens().len(), 20_000, "{:?}", awake.said.last());
    sim::check(0, &text, &awake.tokens()).unwrap();
    assert_eq!(asleep.rest().whole().said, awake.said);
}

fn state_when(cluster: &rbee_testkit::Cluster, job: &str, state: JobState, limit: Duration) {
    wait_for(&format!("{job} to be {state:?}"), limit, || match cluster.job_view(job) {
        view if view.state == state => Ok(()),
        view => Err(format!("{view:?}")),
    });
}

#[test]
fn a_job_without_listeners_is_cancelled_after_its_grace_unless_detached() {
    let grace = Duration::from_millis(400);
    let cluster = Setup::sim("--sim-step-us 10000").env("RBEE_JOB_GRACE_MS", grace.as_millis()).warm();
    let endless = infer(&prompt("nobody"), 60_000);
    let (alone, left) = (cluster.post(&endless), cluster.post(&endless));
    let detached = cluster.post(&with(endless.clone(), json!({ "detach": true })));
    let mut listener = cluster.queen().listen(&format!("/v1/jobs/{left}/stream"), None);
    state_when(&cluster, &alone, JobState::Cancelled, patience(grace));
    assert_eq!(cluster.job_view(&left).state, JobState::Running, "somebody listens");
    listener.tokens(2);
    listener.close();
    state_when(&cluster, &left, JobState::Cancelled, patience(grace));
    assert_eq!(cluster.job_view(&detached).state, JobState::Running, "detached");
    cluster.queen().delete(&format!("/v1/jobs/{detached}"));

    // A one-call stream has no grace: its job ends with its connection.
    let mut one = cluster.stream(&endless);
    one.tokens(2);
    let job = cluster.answers().remove(0).job_id.to_string();
    one.close();
    state_when(&cluster, &job, JobState::Cancelled, patience(Duration::from_millis(500)));
    cluster.workers_when("free slots", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
}

#[test]
fn an_idempotency_key_gives_one_job() {
    let cluster = Setup::sim("").warm();
    let job = infer(&prompt("twins"), 3);
    let send = |body: &Value| cluster.queen().send(post("/v1/jobs", body).header("Idempotency-Key", "the key"));
    let ids: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..50).map(|_| scope.spawn(|| send(&job).json::<Value>()["job_id"].to_string())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| id == &ids[0]), "{ids:?}");
    assert_eq!(cluster.answers().len(), 1);
    assert_eq!(send(&infer("another", 3)).error().code, ErrorCode::IdempotencyConflict);
}

#[test]
fn job_ids_that_lead_nowhere_say_why() {
    let cluster = Setup::sim("").env("RBEE_JOB_KEPT_MS", 200).warm();
    let told = cluster.job(&infer(&prompt("ids"), 2)).whole();
    let job = told
        .said
        .iter()
        .find_map(|said| if let Event::Started(s) = &said.event { Some(s.job_id.to_string()) } else { None })
        .unwrap();
    let code = |job: &str, tail: &str| cluster.queen().get(&format!("/v1/jobs/{job}{tail}")).error().code;
    wait_for("the job to expire", patience(Duration::from_millis(1200)), || {
        match cluster.queen().get(&format!("/v1/jobs/{job}")) {
            answer if answer.status() == 200 => Err("it is kept".into()),
            answer => Ok(answer.error()),
        }
    });
    let mut unknown = job.clone();
    unknown.replace_range(unknown.len() - 4.., if unknown.ends_with("0000") { "1111" } else { "0000" });
    let mut foreign = job.clone();
    foreign.replace_range(4..8, if foreign[4..].starts_with("0000") { "1111" } else { "0000" });
    for tail in ["", "/stream"] {
        assert_eq!(code(&job, tail), ErrorCode::JobExpired);
        assert_eq!(code(&foreign, tail), ErrorCode::QueenRestarted);
        assert_eq!(code("nonsense", tail), ErrorCode::JobNotFound);
        assert_eq!(code("..%2f..", tail), ErrorCode::JobNotFound);
    }
    // Random bits decide: an id of this life that was never given, or was and is forgotten.
    assert!(matches!(code(&unknown, ""), ErrorCode::JobNotFound | ErrorCode::JobExpired));
    cluster.rbee(&["job", "get", &foreign]).exits(4).says(&["hint:"]);
    cluster.rbee(&["job", "get", "nonsense"]).exits(3).says(&["hint:"]);
}

#[test]
fn what_is_not_built_says_so_by_name() {
    let cluster = Setup::sim("").warm();
    for row in rbee_wire::op::OPERATIONS.iter().filter(|row| row.built == rbee_wire::op::Built::No) {
        let mut job = json!({ "operation": row.name });
        for field in row.fields.iter().filter(|field| field.need == rbee_wire::fields::Need::Required) {
            job[field.name] = json!("tinybee");
        }
        let told = cluster.job(&job);
        let error = told.refusal.clone().unwrap_or_else(|| told.error());
        assert_eq!(error.code, ErrorCode::NotImplemented, "{}: {error}", row.name);
        assert!(error.message.contains(row.name), "{}: {error}", row.name);
    }
}

#[test]
fn unknown_paths_and_methods_are_json_errors() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["up"]).exits(0);
    for server in [cluster.queen(), cluster.hive()] {
        assert_eq!(server.get("/").error().code, ErrorCode::NotFound);
        assert_eq!(server.get("/v1/nothing").error().code, ErrorCode::NotFound);
        assert_eq!(server.send(Request::new("DELETE", "/health")).error().code, ErrorCode::MethodNotAllowed);
        for path in ["/health", "/livez", "/ready", "/readyz", "/v1/info"] {
            assert_eq!(server.get(path).status(), 200, "{path}");
        }
    }
}

#[test]
fn the_merged_view_of_the_fleet_streams() {
    let cluster = Setup::sim("").warm();
    let mut stream = cluster.queen().listen("/v1/heartbeats/stream", None);
    assert_eq!(stream.status(), 200);
    wait_for("the worker in the view", Duration::from_secs(5), || {
        // It is not a job's stream: its events are not those of a job.
        match stream.read_more() {
            Ok(true) if String::from_utf8_lossy(stream.bytes()).contains("worker_id") => Ok(()),
            other => Err(format!("{other:?} {}", String::from_utf8_lossy(stream.bytes()))),
        }
    });
    stream.close();
    assert!(matches!(cluster.stream(&json!({ "operation": "status" })).hear(), Heard::Event(_)));
}
