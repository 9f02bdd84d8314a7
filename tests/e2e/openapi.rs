//! The OpenAPI document that the queen serves, held against what its handlers do: each answer that comes back here must stand in
//! it, with its status, its headers and the form of its body.

use std::collections::BTreeSet;
use std::path::Path;

use rbee_openai::fields::Endpoint;
use rbee_testkit::http::{Answer, Http, Request, post};
use rbee_testkit::{Cluster, Setup};
use rbee_wire::key::Access;
use rbee_wire::routes::{self, Route};
use serde_json::{Value, json};

use crate::{infer, prompt, sdk, with};

const TOKEN: &str = "s3cret";

/// The document, and what was said that it must describe.
struct Held<'a> {
    cluster: &'a Cluster,
    document: Value,
    /// A body each, with the pointer of its schema.
    bodies: Vec<Value>,
    /// Operation and status of each answer.
    seen: BTreeSet<(String, u16)>,
}

/// A part of a JSON pointer.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// Where the document has a route.
fn place(route: &Route) -> String {
    format!("/paths/{}/{}", escaped(&route.path.replace("{*", "{")), route.method.to_lowercase())
}

fn route(method: &str, path: &str) -> &'static Route {
    routes::QUEEN.iter().find(|route| (route.method, route.path) == (method, path)).unwrap()
}

impl Held<'_> {
    fn owner(&self) -> Http {
        Http { address: self.cluster.queen, bearer: Some(TOKEN.into()) }
    }

    /// Sends what the route's operation describes and holds the answer against it.
    fn hear(&mut self, server: &Http, route: &Route, request: Request) -> Answer {
        let what = format!("{} {}", route.method, route.path);
        let mut stream = server.open(request);
        let endless = route.path == routes::HEARTBEATS_STREAM;
        while !(endless && stream.bytes().ends_with(b"\n\n")) && stream.read_more().unwrap() {}
        let answer = Answer { head: stream.head(), body: stream.bytes().to_vec() };
        let status = answer.status();
        let told = format!("{}/responses/{status}", place(route));
        let response = self.document.pointer(&told).unwrap_or_else(|| panic!("{what}: {status} {}", answer.text()));
        for name in self.document["components"]["headers"].as_object().unwrap().keys() {
            let documented = response["headers"].get(name).is_some();
            assert!(documented || answer.head.header(name).is_none(), "{what}: {status} has {name}");
        }
        for name in ["x-request-id", "x-rbee-protocol"] {
            assert!(response["headers"].get(name).is_some() && answer.head.header(name).is_some(), "{what}: {name}");
        }
        let kind = answer.head.header("content-type").unwrap_or_default().split(';').next().unwrap();
        assert!(response["content"].get(kind).is_some(), "{what}: {status} as {kind:?}: {}", answer.text());
        let schema = format!("{told}/content/{}/schema", escaped(kind));
        let data: Vec<Value> = match kind {
            "application/json" => vec![answer.json()],
            "text/event-stream" => answer
                .text()
                .lines()
                .filter_map(|line| line.strip_prefix("data: "))
                .filter(|data| *data != "[DONE]")
                .map(|data| serde_json::from_str(data).unwrap())
                .collect(),
            _ => vec![answer.text().into()],
        };
        assert!(!data.is_empty(), "{what}: {status} says nothing");
        self.bodies.extend(data.into_iter().map(|body| json!({ "what": what, "schema": schema, "body": body })));
        self.seen.insert((what, status));
        answer
    }

    /// As [`Self::hear`], with a body that the document has to allow, and the status that the route gives for it.
    #[track_caller]
    fn good(&mut self, route: &Route, request: Request, body: Option<Value>, status: u16) -> Answer {
        if let Some(body) = &body {
            let schema = format!("{}/requestBody/content/application~1json/schema", place(route));
            self.bodies.push(json!({ "what": route.path, "schema": schema, "body": body }));
        }
        let request = match body {
            Some(body) => request.header("Content-Type", "application/json").body(body.to_string()),
            None => request,
        };
        let answer = self.hear(&self.owner(), route, request);
        assert_eq!(answer.status(), status, "{} {}: {}", route.method, route.path, answer.text());
        answer
    }

    #[track_caller]
    fn bad(&mut self, server: &Http, route: &Route, request: Request, status: u16) {
        let answer = self.hear(server, route, request);
        assert_eq!(answer.status(), status, "{} {}: {}", route.method, route.path, answer.text());
    }
}

/// The path of a route with its variable filled in.
fn filled(route: &Route, id: &str) -> String {
    route.path.replace("{id}", id).replace("{*id}", id)
}

/// A heartbeat of nobody, who says good-bye with it, with the least that one has.
fn beat() -> Value {
    json!({
        "protocol": 1, "worker_id": "w-gone", "incarnation": { "counter": 1, "random": "aa" }, "seq": 1,
        "hive_id": "elsewhere", "url": "http://127.0.0.1:9", "bearer": "b", "state": "stopped", "model": "tinybee",
        "device": "cpu", "version": "0", "build": "0",
    })
}

fn hive_beat() -> Value {
    json!({
        "protocol": 1, "hive_id": "elsewhere", "incarnation": { "counter": 1, "random": "aa" }, "seq": 1,
        "url": "http://127.0.0.1:9", "devices": [], "version": "0", "build": "0",
    })
}

#[test]
fn every_answer_of_the_queen_is_as_its_openapi_document_says() {
    let cluster = Setup::sim("--sim-step-us 2000").env("RBEE_TOKEN", TOKEN).env("RBEE_API_KEY", TOKEN).warm();
    let served = Http { address: cluster.queen, bearer: Some(TOKEN.into()) }.get(routes::OPENAPI);
    assert_eq!(served.status(), 200);
    let mut held = Held { cluster: &cluster, document: served.json(), bodies: Vec::new(), seen: BTreeSet::new() };
    let owner = held.owner();

    let described: BTreeSet<String> = held.document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| methods.as_object().unwrap().keys().map(move |method| format!("{method} {path}")))
        .collect();
    let mounted =
        routes::QUEEN.iter().map(|route| format!("{} {}", route.method.to_lowercase(), route.path.replace("{*", "{")));
    assert_eq!(described, mounted.collect());

    // What each is there for.
    let detached = || with(infer(&prompt("documents"), 3), json!({ "detach": true }));
    let job = owner.post(routes::JOBS, &detached()).json::<Value>()["job_id"].clone();
    let job = job.as_str().unwrap().to_owned();
    for route in routes::QUEEN {
        let body = match route.path {
            routes::JOBS if route.method == "POST" => Some(detached()),
            routes::CHAT_COMPLETIONS => Some(crate::openai::body(Endpoint::Chat, json!({}))),
            routes::COMPLETIONS => Some(crate::openai::body(Endpoint::Completions, json!({}))),
            routes::EMBEDDINGS => Some(crate::openai::body(Endpoint::Embeddings, json!({}))),
            routes::WORKER_HEARTBEAT => Some(beat()),
            routes::HIVE_HEARTBEAT => Some(hive_beat()),
            _ => None,
        };
        let id = if route.path == routes::MODEL { "tinybee" } else { &job };
        let request = Request::new(route.method, &filled(route, id));
        match (route.method, route.path) {
            // Comes last.
            (_, routes::SHUTDOWN) => {}
            ("DELETE", routes::JOB) => {
                let long = with(infer(&prompt("long documents"), 60_000), json!({ "detach": true }));
                let running = owner.post(routes::JOBS, &long).json::<Value>()["job_id"].clone();
                let request = Request::new("DELETE", &filled(route, running.as_str().unwrap()));
                held.good(route, request, None, 200);
            }
            ("POST", routes::JOBS) => drop(held.good(route, request, body, 202)),
            _ => drop(held.good(route, request, body, 200)),
        }
    }

    // All that the dialect takes, in all of its forms.
    for endpoint in Endpoint::ALL {
        let route = route("POST", endpoint.path());
        for field in endpoint.fields() {
            let body = crate::openai::body(endpoint, crate::openai::samples(field).0);
            let schema = format!("{}/requestBody/content/application~1json/schema", place(route));
            held.bodies.push(json!({ "what": field.name, "schema": schema, "body": body }));
        }
        let usual = [
            json!({ "user": "x" }),
            json!({ "stream": true, "stream_options": { "include_usage": true } }),
            json!({ "n": 2, "logprobs": if endpoint == Endpoint::Chat { json!(true) } else { json!(2) } }),
            json!({ "logprobs": if endpoint == Endpoint::Chat { json!(true) } else { json!(2) }, "stream": true }),
        ];
        let vectors =
            [json!({ "user": "x" }), json!({ "encoding_format": "base64" }), json!({ "input": [[1, 2], "b"] })];
        let more: &[Value] = if endpoint == Endpoint::Embeddings { &vectors } else { &usual };
        for more in more {
            let request = Request::new("POST", route.path);
            held.good(route, request, Some(crate::openai::body(endpoint, more.clone())), 200);
        }
        let unknown = crate::openai::body(endpoint, json!({ "model": "no-alias", "stream": true }));
        held.bad(&owner, route, post(route.path, &unknown), 404);
        let strict = crate::openai::body(endpoint, json!({ "user": "x" }));
        held.bad(&owner, route, post(route.path, &strict).header("x-rbee-strict", "true"), 400);
        let away = crate::openai::body(endpoint, json!({ "model": "org/not-there" }));
        held.hear(&owner, route, post(route.path, &away));
    }

    // Jobs in all of theirs.
    let jobs = route("POST", routes::JOBS);
    let streamed = |body: &Value| post(routes::JOBS, body).header("Accept", "text/event-stream");
    for body in [
        with(infer(&prompt("events"), 3), json!({ "logprobs": true, "top_logprobs": 2 })),
        json!({ "operation": "infer", "embed": ["a", [1, 2]] }),
        json!({ "operation": "infer", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 2 }),
        json!({ "operation": "infer", "prompt": "x", "model": "no-alias" }),
        json!({ "operation": "model_list" }),
        json!({ "operation": "status" }),
        json!({ "operation": "hive_list" }),
        json!({ "operation": "hive_status" }),
        json!({ "operation": "active_worker_list" }),
        json!({ "operation": "worker_spawn", "model": "tinybee" }),
        json!({ "operation": "worker_process_list" }),
        json!({ "operation": "worker_binary_list" }),
        json!({ "operation": "key_create", "name": "k", "digest": "0f".repeat(32), "max_concurrent": 3 }),
        json!({ "operation": "key_list" }),
    ] {
        let schema = format!("{}/requestBody/content/application~1json/schema", place(jobs));
        held.bodies.push(json!({ "what": "a job", "schema": schema, "body": body }));
        let answer = held.hear(&owner, jobs, streamed(&body));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let name: String =
            body["operation"].as_str().unwrap().split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        let result = format!("/components/schemas/{name}Request/x-data");
        for line in answer.text().lines().filter_map(|line| line.strip_prefix("data: {")) {
            let event: Value = serde_json::from_str(&format!("{{{line}")).unwrap();
            if event["type"] == "data" {
                held.bodies.push(json!({ "what": name, "schema": result, "body": event["value"] }));
            }
        }
    }
    held.bad(&owner, jobs, post(routes::JOBS, &json!({ "operation": "fly" })), 400);
    let once = |words: &str| post(routes::JOBS, &infer(words, 1)).header("Idempotency-Key", "k1");
    held.bad(&owner, jobs, once("a"), 202);
    held.bad(&owner, jobs, once("b"), 409);
    let stream = route("GET", routes::JOB_STREAM);
    let path = filled(stream, &job);
    held.bad(&owner, stream, Request::new("GET", &path).header("Last-Event-ID", "x"), 400);
    held.bad(&owner, stream, Request::new("GET", &format!("{path}?after=x")), 400);
    held.bad(&owner, stream, Request::new("GET", &format!("{path}?after=1")), 200);
    held.bad(
        &owner,
        route("DELETE", routes::JOB),
        Request::new("DELETE", &filled(stream, &job).replace("/stream", "")),
        409,
    );

    // Who may not, and what is no request.
    let made = |more: &[&str]| cluster.rbee(&[&["key", "create", "--name", "k"], more].concat()).exits(0).stdout;
    let key = |secret: &str| Http { address: cluster.queen, bearer: Some(secret.trim().to_owned()) };
    let (user, hasty) = (key(&made(&[])), key(&made(&["--rate", "1"])));
    assert_eq!(hasty.post(routes::JOBS, &detached()).status(), 202);
    for route in routes::QUEEN {
        let id = if route.path == routes::MODEL { "nobody/nothing" } else { "job-1-nothing" };
        let request = || Request::new(route.method, &filled(route, id));
        let foreign = request().header("Origin", "http://evil.example");
        held.bad(&owner, route, foreign, 403);
        if route.access != Access::Public {
            held.bad(&Http::new(cluster.queen), route, request(), 401);
        }
        if route.access == Access::Admin {
            held.bad(&user, route, request(), 403);
        }
        if route.path.contains('{') {
            held.bad(&owner, route, Request::new(route.method, &filled(route, "%ff")), 400);
            let unknown = held.hear(&owner, route, request());
            assert!(matches!(unknown.status(), 404 | 410), "{}: {}", route.path, unknown.text());
        }
        if route.method == "POST" {
            held.bad(&owner, route, request().body("{"), 400);
            held.bad(&owner, route, request().body(vec![b' '; 25 << 20]), 413);
        }
        if let Some(endpoint) = Endpoint::ALL.into_iter().find(|endpoint| endpoint.path() == route.path) {
            held.bad(&hasty, route, post(route.path, &crate::openai::body(endpoint, json!({}))), 429);
        }
    }
    held.bad(&hasty, jobs, post(routes::JOBS, &detached()), 429);
    let newer = |mut beat: Value| {
        beat["protocol"] = json!(2);
        beat
    };
    for (path, beat) in [(routes::WORKER_HEARTBEAT, beat()), (routes::HIVE_HEARTBEAT, hive_beat())] {
        held.bad(&owner, route("POST", path), post(path, &newer(beat)), 426);
    }

    // While a long answer keeps it from stopping it says so.
    let long = with(infer(&prompt("the last"), 60_000), json!({ "detach": true }));
    let last = owner.post(routes::JOBS, &long).json::<Value>()["job_id"].as_str().unwrap().to_owned();
    held.good(route("POST", routes::SHUTDOWN), Request::new("POST", routes::SHUTDOWN), Some(json!({})), 200);
    for path in [routes::READY, routes::READYZ] {
        held.bad(&owner, route("GET", path), Request::new("GET", path), 503);
    }
    held.bad(&owner, jobs, post(routes::JOBS, &detached()), 503);
    for endpoint in Endpoint::ALL {
        let body = crate::openai::body(endpoint, json!({}));
        held.bad(&owner, route("POST", endpoint.path()), post(endpoint.path(), &body), 503);
    }
    assert_eq!(owner.delete(&filled(route("DELETE", routes::JOB), &last)).status(), 200);

    for route in routes::QUEEN {
        let what = format!("{} {}", route.method, route.path);
        let well = held.seen.iter().any(|(seen, status)| *seen == what && *status < 300);
        assert!(well, "{what} never gave what it is there for");
    }
    let told = json!({ "document": held.document, "bodies": held.bodies }).to_string();
    if let Some((program, script)) = sdk::validator() {
        let script = script.display().to_string();
        let said = cluster.any(&program, &[&script]).stdin(&told).run().exits(0).stdout;
        assert_eq!(said.trim(), format!("{} bodies", held.bodies.len()));
    }
}

#[test]
fn the_committed_document_is_the_one_that_is_served() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/openapi.json");
    let same = cluster.queen().get(routes::OPENAPI).text() == std::fs::read_to_string(file).unwrap();
    assert!(same, "the programs were not built since `cargo xtask gen`");
}
