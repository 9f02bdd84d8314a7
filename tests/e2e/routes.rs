//! Every route of every daemon, from the tables that they are mounted from: who may use it, and who may not.
//!
//! A route that is added to a table is walked from then on. One that is mounted under a path of the table without being in
//! it shows in the methods that the path takes; one under a path of its own is for admins alone, whatever it is.

use std::time::Duration;

use rbee_testkit::http::{Answer, Http, Request};
use rbee_testkit::{Setup, patience, wait_for};
use rbee_wire::error::ErrorReply;
use rbee_wire::key::Access;
use rbee_wire::routes::{self, Route};
use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::Value;

const TOKEN: &str = "s3cret";

fn request(route: &Route) -> Request {
    Request::new(route.method, &path(route))
}

fn path(route: &Route) -> String {
    route.path.replace("{id}", "some-id").replace("{*id}", "some/id")
}

/// The code of a refusal, in our own form or in that of the OpenAI dialect.
fn refused(answer: &Answer, what: &str) -> String {
    let code = match serde_json::from_slice::<ErrorReply>(&answer.body) {
        Ok(ErrorReply { error: ErrorBody { code, request_id, .. } }) => {
            assert!(request_id.is_some(), "{what}: {}", answer.text());
            code.name().to_owned()
        }
        Err(_) => answer.json::<Value>()["error"]["code"].as_str().unwrap_or_default().to_uppercase(),
    };
    assert!(
        answer.head.header("x-request-id").is_some() && answer.head.header("x-rbee-protocol") == Some("1"),
        "{what}"
    );
    code
}

#[track_caller]
fn is_forbidden_origin(server: &Http, request: Request, what: &str) {
    let answer = server.send(request);
    assert_eq!((answer.status(), refused(&answer, what).as_str()), (403, "FORBIDDEN_ORIGIN"), "{what}");
}

/// What no page of another site and no proxy may do, on any route.
fn no_strangers(server: &Http, table: &[Route]) {
    let own = format!("http://{}", server.address);
    for route in table {
        let what = format!("{} {}", route.method, route.path);
        for (name, value) in [
            ("Host", "evil.example"),
            ("Host", "127.0.0.1.evil.example:7833"),
            ("Origin", "http://evil.example"),
            ("Origin", "null"),
            ("Forwarded", "for=127.0.0.1"),
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-Forwarded-Host", "localhost"),
            ("X-Forwarded-Proto", "http"),
            ("X-Real-IP", "127.0.0.1"),
            ("Via", "1.1 proxy"),
        ] {
            is_forbidden_origin(server, request(route).header(name, value), &format!("{what} with {name}: {value}"));
        }
        if route.method == "POST" {
            for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
                let simple = request(route).header("Origin", &own).header("Content-Type", kind).body("{}");
                is_forbidden_origin(server, simple, &format!("{what} of a page as {kind:?}"));
            }
            is_forbidden_origin(server, request(route).header("Origin", &own).body("{}"), &what);
        }
    }
}

/// What a wrong credential opens: the public routes.
fn no_credential(server: &Http, table: &[Route]) {
    for route in table {
        let right = format!("Bearer {}", server.bearer.as_deref().unwrap_or_default());
        let ours = server.bearer.as_deref().unwrap_or_default();
        for shown in [
            vec![],
            vec!["Bearer wrong".to_owned()],
            vec!["Bearer".into()],
            vec![String::new()],
            vec![right.clone(), "Bearer wrong".into()],
            vec![right.clone(), right.clone()],
            vec![format!("Basic {ours}")],
            vec![ours.to_owned()],
            vec![format!("Bearer {ours}x")],
            vec![format!("Bearer {}", &ours[1..])],
        ] {
            let what = format!("{} {} with {shown:?}", route.method, route.path);
            let request = shown.iter().fold(request(route), |request, value| request.header("Authorization", value));
            let answer = Http::new(server.address).send(request);
            if route.access == Access::Public {
                assert_eq!(answer.status(), 200, "{what}");
            } else {
                assert_eq!(answer.status(), 401, "{what}: {}", answer.text());
                assert!(matches!(&*refused(&answer, &what), "UNAUTHORIZED" | "INVALID_API_KEY"), "{what}");
                assert_eq!(answer.head.header("www-authenticate"), Some("Bearer"), "{what}");
            }
        }
    }
    assert_eq!(Http::new(server.address).get("/nowhere").status(), 401, "what is there is nobody's business");
}

/// Each path takes the methods that its table has, and no more.
fn all_mounted(server: &Http, table: &[Route]) {
    for route in table {
        let answer = server.send(Request::new("PATCH", &path(route)));
        assert_eq!(answer.status(), 405, "{}: {}", route.path, answer.text());
        let mut takes: Vec<&str> = answer.head.header("allow").unwrap_or_default().split(',').collect();
        takes.retain(|method| *method != "HEAD");
        takes.sort_unstable();
        let mut want: Vec<&str> = table.iter().filter(|row| row.path == route.path).map(|row| row.method).collect();
        want.sort_unstable();
        assert_eq!(takes, want, "{}", route.path);
    }
    assert_eq!(server.get("/nowhere").error().code, ErrorCode::NotFound);
}

#[test]
fn no_route_of_an_open_daemon_answers_a_stranger() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["up"]).exits(0);
    let known = cluster.jobs();
    for (server, table) in [(cluster.queen(), routes::QUEEN), (cluster.hive(), routes::HIVE)] {
        no_strangers(&server, table);
        all_mounted(&server, table);
    }
    // SDKs always send one; while there is no token nobody looks at it.
    let sdk = Http { bearer: Some("sk-any".into()), ..cluster.queen() };
    assert_eq!(sdk.get(routes::INFO).status(), 200);
    assert_eq!(cluster.jobs().len(), known.len());
}

#[test]
fn with_a_token_a_route_opens_to_whom_its_table_says() {
    let cluster = Setup::sim("").env("RBEE_TOKEN", TOKEN).env("RBEE_API_KEY", TOKEN).warm();
    let made =
        |scope| cluster.rbee(&["key", "create", "--name", "k", "--scope", scope]).exits(0).stdout.trim().to_owned();
    let (inference, admin) = (made("inference"), made("admin"));
    for (address, table) in [(cluster.queen, routes::QUEEN), (cluster.hive, routes::HIVE)] {
        let owner = Http { address, bearer: Some(TOKEN.into()) };
        no_credential(&owner, table);
        all_mounted(&owner, table);
        for route in table {
            let what = format!("{} {}", route.method, route.path);
            let status = |bearer: &str| {
                let caller = Http { address, bearer: Some(bearer.to_owned()) };
                caller.open(request(route)).status()
            };
            let want = match (route.access, address == cluster.queen) {
                (Access::Public, _) => vec![200],
                // Keys are the queen's.
                (_, false) => vec![401],
                (Access::Admin, true) => vec![403],
                // Past the guard: nothing of that name is there, or the empty body is no request.
                (Access::Inference, true) => vec![200, 400, 404],
            };
            assert!(want.contains(&status(&inference)), "{what} with a key for inference: {}", status(&inference));
            // That would be its end.
            if address == cluster.queen && route.path != routes::SHUTDOWN {
                assert!(![401, 403].contains(&status(&admin)), "{what} with a key for all: {}", status(&admin));
            }
        }
    }
    let known = Http { address: cluster.queen, bearer: Some(inference) };
    assert_eq!(known.get("/nowhere").error().code, ErrorCode::NotFound);
    // Neither another spelling nor another method is another route.
    for path in
        ["/METRICS", "/metrics/", "//metrics", "/%6detrics", "/v1/jobs/../../metrics", "/metrics?x", "/metrics#x"]
    {
        let status = known.send(Request::new("GET", path)).status();
        assert!(matches!(status, 400 | 403 | 404), "{path}: {status}");
    }
    for method in ["HEAD", "POST", "OPTIONS", "TRACE", "FOO"] {
        let status = known.open(Request::new(method, routes::METRICS)).status();
        assert_eq!(status, 403, "{method}");
    }
}

#[test]
fn every_route_of_a_worker_but_health_asks_for_its_bearer() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let worker = cluster.worker_by_hand(&[]);
    no_credential(&worker.http, routes::WORKER);
    all_mounted(&worker.http, routes::WORKER);
    wait_for("the worker to be ready", patience(Duration::from_secs(1)), || {
        match worker.http.get("/v1/ready").text() {
            text if text.contains("\"ready\":true") => Ok(()),
            text => Err(text),
        }
    });
}
