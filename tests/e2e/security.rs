//! Who may call, and what a daemon refuses to be.

use std::time::Duration;

use rbee_testkit::http::{Http, Request, post};
use rbee_testkit::{Setup, patience, port, sim, wait_for};
use rbee_wire::ErrorCode;
use rbee_wire::routes::{self, Route};
use serde_json::json;

use crate::{infer, prompt};

#[test]
fn other_sites_and_proxies_get_nothing_from_a_tokenless_daemon() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["up"]).exits(0);
    let job = json!({ "operation": "status" });
    for server in [cluster.queen(), cluster.hive()] {
        let own = format!("http://{}", server.address);
        for (name, value) in [
            ("Host", "evil.example"),
            ("Host", "127.0.0.1.evil.example"),
            ("Host", "10.0.0.1"),
            ("Origin", "http://evil.example"),
            ("Origin", "null"),
            ("Origin", "https://127.0.0.1"),
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-Forwarded-Host", "localhost"),
            ("Forwarded", "for=127.0.0.1"),
            ("X-Real-IP", "127.0.0.1"),
            ("Via", "1.1 proxy"),
        ] {
            for request in [post("/v1/jobs", &job), Request::new("GET", "/v1/info"), Request::new("GET", "/nowhere")] {
                let error = server.send(request.header(name, value)).error();
                assert_eq!(error.code, ErrorCode::ForbiddenOrigin, "{name}: {value}");
            }
        }
        let text = Request::new("POST", "/v1/jobs").header("Content-Type", "text/plain").body(job.to_string());
        assert_eq!(server.send(text.clone().header("Origin", &own)).error().code, ErrorCode::ForbiddenOrigin);
        let good = server.send(Request::new("GET", "/v1/info").header("Origin", &own));
        assert_eq!(good.status(), 200);
        assert_eq!(good.head.header("access-control-allow-origin"), None, "CORS is off");
        // SDKs always send one; while there is no token nobody looks at it.
        assert_eq!(server.send(Request::new("GET", "/v1/info").header("Authorization", "Bearer any")).status(), 200);
    }
    let text = Request::new("POST", "/v1/jobs").header("Content-Type", "application/x-www-form-urlencoded");
    assert_eq!(cluster.queen().send(text.body(job.to_string())).status(), 202, "curl -d needs no header");
}

#[test]
fn a_wide_bind_without_a_token_is_refused() {
    let cluster = Setup::sim("").home();
    for program in ["queen-rbee", "rbee-hive"] {
        for host in ["0.0.0.0", "[::]"] {
            let bind = format!("{host}:{}", port::free().port());
            let out = cluster.program(program, &["--bind", &bind]).run();
            assert_ne!(out.code, 0, "{program} {bind}");
            assert!(out.stderr.contains("token") && out.stderr.contains("hint:"), "{program} {bind}: {}", out.stderr);
        }
    }
    assert_eq!(cluster.processes(), []);
}

fn walk(server: &Http, routes: &[Route], public: &[&str]) {
    for route in routes {
        let path = route.path.replace("{id}", "some-id").replace("{*id}", "some/id");
        let mut wrong = server.clone();
        wrong.bearer = Some("wrong".into());
        for caller in [Http::new(server.address), wrong] {
            let answer = caller.send(Request::new(route.method, &path));
            if public.contains(&route.path) {
                assert_ne!(answer.status(), 401, "{} {path}", route.method);
            } else {
                assert_eq!(answer.status(), 401, "{} {path}: {}", route.method, answer.text());
                assert_eq!(answer.head.header("www-authenticate"), Some("Bearer"));
            }
        }
    }
    assert_eq!(Http::new(server.address).get("/nowhere").status(), 401, "what is there is nobody's business");
}

#[test]
fn with_a_token_every_route_asks_for_it() {
    const PUBLIC: [&str; 4] = [routes::HEALTH, routes::LIVEZ, routes::READY, routes::READYZ];
    let cluster = Setup::sim("").env("RBEE_TOKEN", "s3cret").env("RBEE_API_KEY", "s3cret").warm();
    let mut queen = cluster.queen();
    queen.bearer = Some("s3cret".into());
    let mut hive = cluster.hive();
    hive.bearer = Some("s3cret".into());
    walk(&queen, routes::QUEEN, &PUBLIC);
    walk(&hive, routes::HIVE, &PUBLIC);
    let text = prompt("keys");
    let told = queen.stream_of("/v1/jobs", &infer(&text, 3)).rest().whole();
    sim::check(0, &text, &told.tokens()).unwrap();
    assert_eq!(cluster.rbee(&["infer", "-p", &text, "--max-tokens", "3"]).exits(0).stdout, sim::text(0, &text, 3));
    cluster.cmd(&["status"]).env("RBEE_API_KEY", "wrong").run().exits(1).says(&["UNAUTHORIZED", "hint:"]);
    let logs = cluster.logs();
    assert!(!logs.contains("s3cret"), "a token stands in a log");
    let config = cluster.rbee(&["config"]).exits(0).stdout;
    assert!(!config.contains("s3cret"), "{config}");
}

#[test]
fn every_route_of_a_worker_but_health_asks_for_its_bearer() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let worker = cluster.worker_by_hand(&[]);
    walk(&worker.http, routes::WORKER, &[routes::HEALTH]);
    wait_for("the worker to be ready", patience(Duration::from_secs(1)), || {
        match worker.http.get("/v1/ready").text() {
            text if text.contains("\"ready\":true") => Ok(()),
            text => Err(text),
        }
    });
}
