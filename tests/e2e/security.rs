//! What a daemon refuses to be, and what those it serves get. Who may use which route is walked in `routes`.

use rbee_testkit::http::Request;
use rbee_testkit::{Setup, port, sim};
use serde_json::json;

use crate::{infer, prompt};

#[test]
fn a_page_of_the_daemon_itself_and_curl_get_answers() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["up"]).exits(0);
    for server in [cluster.queen(), cluster.hive()] {
        let own = format!("http://{}", server.address);
        let good = server.send(Request::new("GET", "/v1/info").header("Origin", &own));
        assert_eq!(good.status(), 200);
        assert_eq!(good.head.header("access-control-allow-origin"), None, "CORS is off");
    }
    let text = Request::new("POST", "/v1/jobs").header("Content-Type", "application/x-www-form-urlencoded");
    let job = json!({ "operation": "status" });
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

#[test]
fn what_shows_the_token_is_served_and_the_token_is_in_no_log() {
    let cluster = Setup::sim("").env("RBEE_TOKEN", "s3cret").env("RBEE_API_KEY", "s3cret").warm();
    let mut queen = cluster.queen();
    queen.bearer = Some("s3cret".into());
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
