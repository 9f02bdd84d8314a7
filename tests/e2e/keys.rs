//! Keys: what each opens, what it may have of the queen, and that its secret is nowhere but with its owner.

use std::path::Path;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rbee_testkit::http::{Http, Request, Stream, post};
use rbee_testkit::process::raise_open_files;
use rbee_testkit::{Cluster, Setup, patience, sim, wait_for};
use rbee_wire::key::{Access, KeyView};
use rbee_wire::op::OPERATIONS;
use rbee_wire::view::{JobList, JobState};
use rbee_wire::{ErrorCode, Event, routes};
use serde_json::{Value, json};

use crate::{infer, prompt, with};

const TOKEN: &str = "s3cret-of-the-site";

/// A queen with a token, and a command line that shows it.
fn closed(setup: Setup) -> Setup {
    setup.env("RBEE_TOKEN", TOKEN).env("RBEE_API_KEY", TOKEN)
}

/// Makes a key: its id, and the queen as it sees who has the key.
fn key(cluster: &Cluster, more: &[&str]) -> (String, Http) {
    let made = cluster.rbee(&[&["key", "create", "--name", "a test's", "--json"], more].concat()).exits(0).json();
    let text = |name: &str| made[name].as_str().unwrap_or_else(|| panic!("no {name}: {made}")).to_owned();
    (text("key_id"), bearer(cluster, &text("secret")))
}

fn bearer(cluster: &Cluster, shown: &str) -> Http {
    Http { address: cluster.queen, bearer: Some(shown.to_owned()) }
}

fn job_of(answer: &rbee_testkit::http::Answer) -> String {
    assert_eq!(answer.status(), 202, "{}", answer.text());
    answer.json::<Value>()["job_id"].as_str().unwrap().to_owned()
}

/// Files of a folder that hold a text.
fn holders(folder: &Path, text: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            holders(&path, text, found);
        } else if std::fs::read(&path).is_ok_and(|all| all.windows(text.len()).any(|part| part == text.as_bytes())) {
            found.push(path.display().to_string());
        }
    }
}

#[test]
fn a_key_is_made_used_listed_and_revoked_and_its_secret_is_kept_nowhere() {
    let cluster = closed(Setup::sim("")).warm();
    let made = cluster
        .rbee(&["key", "create", "--name", "the lab's", "--rate", "100"])
        .exits(0)
        .says(&["nothing shows again"]);
    let secret = made.stdout.strip_suffix('\n').unwrap();
    assert!(secret.len() == 48 && secret.starts_with("rbee-"), "{secret}");
    assert!(!made.stderr.contains(secret), "{}", made.stderr);
    let list = || cluster.rbee(&["key", "list", "--json"]).exits(0).stdout;
    let views: Vec<KeyView> = serde_json::from_str(&list()).unwrap();
    assert_eq!((views.len(), views[0].name.as_str(), views[0].limits.rate), (1, "the lab's", Some(100)));
    assert!(!list().contains("digest"), "{}", list());
    let table = cluster.rbee(&["key", "list"]).exits(0).stdout;
    assert!(table.contains(views[0].key_id.as_str()) && table.contains("the lab's"), "{table}");

    let text = prompt("the lab");
    let ask =
        |code| cluster.cmd(&["infer", "-p", &text, "--max-tokens", "3"]).env("RBEE_API_KEY", secret).run().exits(code);
    assert_eq!(ask(0).stdout, sim::text(0, &text, 3));
    assert_eq!(cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3", "--api-key", secret]).exits(0).code, 0);
    cluster.cmd(&["status"]).env("RBEE_API_KEY", secret).run().exits(1).says(&["FORBIDDEN", "hint:"]);
    cluster.rbee(&["down"]).exits(0);
    cluster.rbee(&["up"]).exits(0);
    assert_eq!(ask(0).stdout, sim::text(0, &text, 3), "keys outlive the queen");

    cluster.rbee(&["key", "revoke", views[0].key_id.as_str()]).exits(0);
    ask(1).says(&["UNAUTHORIZED", "hint:"]);
    cluster.rbee(&["key", "revoke", views[0].key_id.as_str()]).exits(3).says(&["KEY_NOT_FOUND", "hint:"]);
    cluster.rbee(&["down"]).exits(0);
    cluster.rbee(&["up"]).exits(0);
    ask(1);
    for hidden in [secret, TOKEN] {
        let mut found = Vec::new();
        holders(cluster.folder(), hidden, &mut found);
        assert_eq!(found, [""; 0], "a secret is kept");
    }
}

#[test]
fn a_damaged_key_file_stops_the_queen() {
    let cluster = closed(Setup::sim("")).home();
    cluster.rbee(&["queen", "start"]).exits(0);
    key(&cluster, &[]);
    cluster.rbee(&["down"]).exits(0);
    let file = cluster.folder().join("data/keys.json");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() - 9]).unwrap();
    let out = cluster.program("queen-rbee", &[]).run();
    assert_ne!(out.code, 0);
    assert!(out.stderr.contains("keys.json") && out.stderr.contains("hint:"), "{}", out.stderr);
    assert_ne!(cluster.rbee(&["queen", "start"]).code, 0);
    assert_eq!(cluster.processes(), []);
    std::fs::write(&file, good).unwrap();
    cluster.rbee(&["queen", "start"]).exits(0);
}

#[test]
fn a_key_sees_its_own_jobs_and_others_are_not_there() {
    let cluster = closed(Setup::sim("--sim-step-us 5000").env("RBEE_JOB_KEPT_MS", 300)).warm();
    let owner = bearer(&cluster, TOKEN);
    let ((id, mine), (_, other), (_, admin)) =
        (key(&cluster, &[]), key(&cluster, &[]), key(&cluster, &["--scope", "admin"]));
    let long = with(infer(&prompt("ownership"), 60_000), json!({ "detach": true }));
    let job = job_of(&mine.post(routes::JOBS, &long));
    let (path, stream) = (format!("/v1/jobs/{job}"), format!("/v1/jobs/{job}/stream"));
    let mut unknown = job.clone();
    unknown.replace_range(unknown.len() - 6.., "ffffff");
    for request in [
        Request::new("GET", &path),
        Request::new("GET", &stream),
        Request::new("DELETE", &path),
        Request::new("GET", &stream).header("Last-Event-ID", "0"),
    ] {
        let error = other.send(request).error();
        assert_eq!(error.code, ErrorCode::JobNotFound);
        // To the letter what an id that never was gets.
        assert_eq!(error.message.replace(&job, &unknown), other.get(&format!("/v1/jobs/{unknown}")).error().message);
    }
    let listed = |caller: &Http| caller.get(routes::JOBS).json::<JobList>().jobs;
    assert_eq!(listed(&other), []);
    assert_eq!(listed(&mine).iter().map(|view| view.job_id.as_str()).collect::<Vec<_>>(), [job.as_str()]);
    for all in [&owner, &admin] {
        let view = listed(all).into_iter().find(|view| view.job_id.as_str() == job).expect("admins see all");
        assert_eq!(view.key_id.map(|key| key.to_string()), Some(id.clone()));
    }
    mine.listen(&stream, None).tokens(2);
    assert_eq!(mine.delete(&path).status(), 200);
    wait_for("the job to expire", patience(Duration::from_millis(1300)), || match mine.get(&path) {
        answer if answer.status() == 200 => Err("it is kept".into()),
        answer if answer.error().code == ErrorCode::JobExpired => Ok(()),
        answer => Err(answer.text()),
    });
    assert_eq!(other.get(&path).error().code, ErrorCode::JobNotFound);
    assert_eq!(admin.get(&path).error().code, ErrorCode::JobExpired);

    // One label, two posters, two jobs.
    let twin = |caller: &Http| job_of(&caller.send(post(routes::JOBS, &long).header("Idempotency-Key", "one")));
    let jobs = [twin(&mine), twin(&mine), twin(&other)];
    assert!(jobs[0] == jobs[1] && jobs[1] != jobs[2], "{jobs:?}");
    for (caller, job) in [(&mine, &jobs[0]), (&other, &jobs[2])] {
        assert_eq!(caller.delete(&format!("/v1/jobs/{job}")).status(), 200);
    }
}

#[test]
fn a_scope_opens_the_operations_that_the_table_says_and_no_others() {
    let cluster = closed(Setup::sim("")).warm();
    let ((_, mine), (_, admin)) = (key(&cluster, &[]), key(&cluster, &["--scope", "admin", "--scope", "inference"]));
    for row in OPERATIONS {
        // What is refused by scope is refused whatever else is right about it.
        let mut job = json!({ "operation": row.name });
        for field in row.fields.iter().filter(|field| field.need == rbee_wire::fields::Need::Required) {
            job[field.name] = match field.kind {
                rbee_wire::fields::Kind::Int(..) => json!(4_000_000),
                rbee_wire::fields::Kind::Hex(digits) => json!("a".repeat(digits)),
                _ => json!("nothing-of-this-name"),
            };
        }
        let answer = mine.post(routes::JOBS, &job);
        if row.access == Access::Admin {
            assert_eq!(answer.error().code, ErrorCode::Forbidden, "{}", row.name);
        } else {
            assert_ne!(answer.status(), 403, "{}", row.name);
        }
    }
    let listed = mine.get(routes::JOBS).json::<JobList>().jobs;
    assert_eq!(listed, [], "a refusal makes no job");
    assert!(admin.stream_of(routes::JOBS, &json!({ "operation": "status" })).rest().done().choices.is_empty());
    // A path may be any file of the machine.
    let path = json!({ "operation": "infer", "prompt": prompt("paths"), "model": "/etc", "max_tokens": 2 });
    let error = mine.stream_of(routes::JOBS, &path).rest().error();
    assert_eq!(error.code, ErrorCode::NoWorker);
    assert!(error.hint.unwrap().contains("model_dirs"));
    assert_eq!(cluster.running("llm-worker-rbee").len(), 1, "nothing was loaded");
    assert_eq!(admin.stream_of(routes::JOBS, &path).rest().tokens().len(), 2);
    assert_eq!(mine.stream_of(routes::JOBS, &path).rest().tokens().len(), 2, "what serves may be named");
    let secret = admin.bearer.unwrap();
    cluster.rbee(&["worker", "list", "--api-key", &secret]).exits(0);
    cluster.rbee(&["key", "list", "--api-key", &secret]).exits(0);
}

#[test]
fn revoking_closes_the_door_at_once() {
    let cluster = closed(Setup::sim("--sim-step-us 10000")).warm();
    let (id, mine) = key(&cluster, &[]);
    let (admin_id, admin) = key(&cluster, &["--scope", "admin"]);
    let text = prompt("doors");
    let mut others = bearer(&cluster, TOKEN).stream_of(routes::JOBS, &infer(&text, 60_000));
    others.tokens(1);
    let mut native = mine.stream_of(routes::JOBS, &infer(&text, 60_000));
    native.tokens(2);
    let detached = job_of(&mine.post(routes::JOBS, &with(infer(&text, 60_000), json!({ "detach": true }))));
    let asked = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 60_000, "stream": true });
    let mut chat = mine.open(post(routes::CHAT_COMPLETIONS, &asked));
    let mut watched = admin.listen(&format!("/v1/jobs/{detached}/stream"), None);
    watched.tokens(1);
    let mut fleet = admin.open(Request::new("GET", routes::HEARTBEATS_STREAM));
    assert_eq!(fleet.status(), 200);

    cluster.rbee(&["key", "revoke", &admin_id]).exits(0);
    assert_ne!(watched.rest().end, rbee_testkit::http::End::Done, "it broke off");
    wait_for("the fleet's stream to end", patience(Duration::from_secs(1)), || match fleet.read_more() {
        Ok(false) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    cluster.rbee(&["key", "revoke", &id]).exits(0);
    let told = native.rest();
    assert!(told.end == rbee_testkit::http::End::Done && told.done().cancelled(), "{told:#?}");
    while chat.read_more().unwrap() {}
    let last = String::from_utf8_lossy(chat.bytes()).into_owned();
    assert!(last.contains("\"cancelled\"") && !last.contains("[DONE]"), "{last}");
    for path in [routes::JOBS, routes::MODELS, routes::INFO] {
        assert_eq!(mine.get(path).status(), 401, "{path}");
    }
    let owner = bearer(&cluster, TOKEN);
    assert_eq!(
        owner.get(&format!("/v1/jobs/{detached}")).json::<rbee_wire::view::JobView>().state,
        JobState::Cancelled
    );
    others.tokens(3);
    others.close();
    wait_for("all slots to be free", patience(Duration::from_millis(500)), || {
        let told = owner.stream_of(routes::JOBS, &json!({ "operation": "status" })).rest();
        let status = told.data::<rbee_wire::view::StatusView>().pop().unwrap();
        match (status.running, status.queued, status.workers[0].slots.used) {
            (0, 0, 0) => Ok(()),
            seen => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn a_rate_refuses_with_the_time_to_wait_in_every_dialect() {
    let cluster = closed(Setup::sim("")).warm();
    let ((id, mine), (_, other)) = (key(&cluster, &["--rate", "3"]), key(&cluster, &[]));
    let job = with(infer(&prompt("rates"), 2), json!({ "detach": true }));
    let chat = json!({ "messages": [{ "role": "user", "content": prompt("rates") }], "max_tokens": 2 });
    let labelled = || mine.send(post(routes::JOBS, &job).header("Idempotency-Key", "again"));
    let first = job_of(&labelled());
    assert_eq!(mine.send(post(routes::CHAT_COMPLETIONS, &chat)).status(), 200);
    // What is malformed is no post, and the same post again is none either.
    assert_eq!(mine.post(routes::JOBS, &json!({ "operation": "infer" })).status(), 400);
    assert_eq!(job_of(&labelled()), first);
    job_of(&mine.post(routes::JOBS, &job));
    let known = mine.get(routes::JOBS).json::<JobList>().jobs.len();
    assert_eq!(known, 3);
    let refused = mine.post(routes::JOBS, &job);
    let error = refused.error();
    assert_eq!((error.code, error.retryable), (ErrorCode::RateLimitExceeded, true));
    assert_eq!(error.details.unwrap()["limit"], "rate");
    let wait = |answer: &rbee_testkit::http::Answer| answer.head.header("retry-after").unwrap().parse::<u64>().unwrap();
    assert!((1..=20).contains(&wait(&refused)), "{}", wait(&refused));
    for path in [routes::CHAT_COMPLETIONS, routes::COMPLETIONS] {
        let body = if path == routes::COMPLETIONS { json!({ "prompt": prompt("rates") }) } else { chat.clone() };
        let refused = mine.send(post(path, &body));
        assert_eq!(refused.status(), 429, "{}", refused.text());
        let said = &refused.json::<Value>()["error"];
        assert_eq!((&said["code"], &said["type"]), (&json!("rate_limit_exceeded"), &json!("rate_limit_error")));
        assert!((1..=20).contains(&wait(&refused)));
        assert_eq!(refused.head.header("x-should-retry"), None);
    }
    assert_eq!(mine.get(routes::JOBS).json::<JobList>().jobs.len(), known, "a refusal makes no job");
    job_of(&other.post(routes::JOBS, &job));
    let secret = mine.bearer.clone().unwrap();
    let refused = cluster.cmd(&["infer", "-p", "x"]).env("RBEE_API_KEY", &secret).run();
    refused.exits(1).says(&["RATE_LIMIT_EXCEEDED", "try again in"]);
    cluster.rbee(&["key", "revoke", &id]).exits(0);
}

#[test]
fn keys_do_not_find_each_others_cached_prompts() {
    let cluster = closed(Setup::sim("")).warm();
    let ((_, one), (_, two), owner) = (key(&cluster, &[]), key(&cluster, &[]), bearer(&cluster, TOKEN));
    let job = infer(&prompt(&"a long and secret tale ".repeat(10)), 2);
    let cached = |caller: &Http| caller.stream_of(routes::JOBS, &job).rest().done().usage.unwrap().cached_tokens;
    assert_eq!(cached(&one), 0);
    let found = cached(&one);
    assert!(found > 100, "its own are found: {found}");
    assert_eq!(cached(&two), 0, "another's are not");
    assert_eq!(cached(&owner), 0, "nor are they by who has no key");
    assert_eq!([cached(&two), cached(&owner)], [found, found]);
}

#[test]
fn on_an_open_machine_a_known_key_is_itself_and_an_unknown_one_is_nobody() {
    let cluster = Setup::sim("").warm();
    let (id, mine) = key(&cluster, &["--max-concurrent", "1"]);
    let long = with(infer(&prompt("open machines"), 60_000), json!({ "detach": true }));
    let job = job_of(&mine.post(routes::JOBS, &long));
    assert_eq!(cluster.job_view(&job).key_id.map(|key| key.to_string()), Some(id));
    let error = mine.post(routes::JOBS, &long).error();
    assert_eq!(
        (error.code, error.details.unwrap()["limit"].clone()),
        (ErrorCode::RateLimitExceeded, json!("max_concurrent"))
    );
    assert_eq!(mine.post(routes::JOBS, &json!({ "operation": "status" })).error().code, ErrorCode::Forbidden);
    let sdk = bearer(&cluster, "sk-anything");
    assert_eq!(sdk.post(routes::JOBS, &json!({ "operation": "status" })).status(), 202);
    assert_eq!(mine.delete(&format!("/v1/jobs/{job}")).status(), 200);
    // Whoever hears of the end finds the place free.
    for _ in 0..20 {
        assert_eq!(mine.stream_of(routes::JOBS, &infer(&prompt("places"), 1)).rest().whole().tokens().len(), 1);
    }
}

/// Opens a stream, and tells how long its first token took; none if it was refused for a limit.
fn first_token(caller: &Http, job: &Value) -> Option<(Duration, Stream)> {
    let began = Instant::now();
    let mut stream = caller.stream_of(routes::JOBS, job);
    if stream.status() == 429 {
        let refusal = stream.rest().refusal.unwrap();
        assert_eq!(refusal.code, ErrorCode::RateLimitExceeded);
        return None;
    }
    stream.until("a token", |event| matches!(event, Event::Token(_)));
    Some((began.elapsed(), stream))
}

#[test]
fn a_limit_holds_exactly_under_500_streams_and_another_key_does_not_notice() {
    raise_open_files();
    let cluster = closed(Setup::sim("--sim-step-us 20000").env("RBEE_SLOTS", 20)).warm();
    let ((_, greedy), (_, modest)) = (key(&cluster, &["--max-concurrent", "12"]), key(&cluster, &[]));
    let long = infer(&prompt("crowds"), 60_000);
    let at_once = Barrier::new(505);
    let (open, waits) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let refused = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..500 {
            scope.spawn(|| {
                at_once.wait();
                match first_token(&greedy, &long) {
                    Some((_, stream)) => open.lock().unwrap().push(stream),
                    None => drop(refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed)),
                }
            });
        }
        for _ in 0..5 {
            scope.spawn(|| {
                at_once.wait();
                let (wait, stream) = first_token(&modest, &long).expect("never refused");
                waits.lock().unwrap().push((wait, stream));
            });
        }
    });
    let (open, waits) = (open.into_inner().unwrap(), waits.into_inner().unwrap());
    assert_eq!((open.len(), refused.into_inner(), waits.len()), (12, 488, 5));
    let longest = waits.iter().map(|(wait, _)| *wait).max().unwrap();
    assert!(longest < patience(Duration::from_secs(1)), "{longest:?}");
    let views: Vec<KeyView> = serde_json::from_str(&cluster.rbee(&["key", "list", "--json"]).exits(0).stdout).unwrap();
    assert_eq!(views.iter().map(|view| view.running).collect::<Vec<_>>(), [12, 5]);
    drop((open, waits));
    wait_for("the places to be free again", patience(Duration::from_millis(500)), || {
        let out = cluster.rbee(&["key", "list", "--json"]).exits(0).stdout;
        let views: Vec<KeyView> = serde_json::from_str(&out).unwrap();
        if views.iter().all(|view| view.running == 0) { Ok(()) } else { Err(out) }
    });
    let again: Vec<_> = (0..12).map(|_| first_token(&greedy, &long).expect("a free place")).collect();
    assert!(first_token(&greedy, &long).is_none());
    drop(again);
}

#[test]
fn who_posts_500_jobs_delays_their_own_and_leaves_another_key_room_in_the_line() {
    raise_open_files();
    let setup = Setup::sim("--sim-step-us 5000").env("RBEE_SLOTS", 8).env("RBEE_QUEUE_LIMIT", 400);
    let cluster = closed(setup).warm();
    let ((_, greedy), (_, modest)) = (key(&cluster, &[]), key(&cluster, &[]));
    // Half a second each on 8 slots, and more than the line holds.
    let job = |about: &str| infer(&prompt(about), 100);
    let streams: Vec<Stream> = thread::scope(|scope| {
        let threads: Vec<_> = (0..500).map(|_| scope.spawn(|| greedy.stream_of(routes::JOBS, &job("greed")))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (refused, streams): (Vec<Stream>, Vec<Stream>) = streams.into_iter().partition(|stream| stream.status() == 429);
    // Its share and what runs; some were over before the last came.
    assert!(streams.len() >= 208 && refused.len() >= 100, "{} taken, {} refused", streams.len(), refused.len());
    for mut stream in refused {
        let error = stream.rest().refusal.unwrap();
        assert_eq!((error.code, error.retryable), (ErrorCode::QueueFull, true));
        assert!(error.retry_after_ms.is_some_and(|wait| wait >= 1000) && error.message.contains("share"), "{error}");
    }
    let waits: Vec<Duration> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..5).map(|_| scope.spawn(|| first_token(&modest, &job("modesty")).expect("never refused").0)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let longest = waits.iter().max().unwrap();
    assert!(*longest < patience(Duration::from_secs(1)), "{waits:?}");
    drop(streams);
    wait_for("all to be over", Duration::from_secs(10), || {
        match greedy.get(routes::JOBS).json::<JobList>().jobs.iter().filter(|job| job.usage.is_none()).count() {
            0 => Ok(()),
            left => Err(format!("{left} left")),
        }
    });
}
