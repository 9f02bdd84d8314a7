//! `docs/reference/openapi.json`: the queen's HTTP API, which the queen serves at `/openapi.json`.
//!
//! From the route table, the tables of fields that requests are checked by, and the types that answers are made of; what is here
//! is which belongs to which. A route without an entry ends the generation, and so does an entry without a route.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use rbee_openai::body::{Answer, ChatChoice, EmbeddingList, TextChoice};
use rbee_openai::models::{Model, ModelList};
use rbee_wire::error::ErrorReply;
use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::job::JobAccepted;
use rbee_wire::routes::{self, Route};
use rbee_wire::view::{DaemonReady, InfoReply, JobList, JobView};
use rbee_wire::worker::{HeartbeatReply, WorkerHeartbeat};
use rbee_wire::{Access, ErrorCode, Event};
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::schema_for;
use serde_json::{Map, Value, json};

use crate::gen_openapi_requests::{self as requests, Make, named, of};

/// What a route takes and gives.
struct Entry {
    method: &'static str,
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    parameters: &'static [&'static str],
    takes: Option<Make>,
    gives: Vec<(u16, Content)>,
    refuses: Vec<ErrorCode>,
}

enum Content {
    Json(Make),
    /// Server-sent events, each with this as its data.
    Events(Make),
    /// What Prometheus scrapes.
    Metrics,
}

use Content::{Events, Json, Metrics};

/// Where a body is read.
const BODY: &[ErrorCode] = &[ErrorCode::InvalidRequest, ErrorCode::PayloadTooLarge, ErrorCode::Overloaded];

/// Where a job is posted.
const POST: &[ErrorCode] =
    &[ErrorCode::RateLimitExceeded, ErrorCode::QueueFull, ErrorCode::Draining, ErrorCode::Internal];

/// Where a job is named.
const NAMED: &[ErrorCode] =
    &[ErrorCode::InvalidRequest, ErrorCode::JobNotFound, ErrorCode::JobExpired, ErrorCode::QueenRestarted];

/// What an answer may end with before its first byte is sent.
const ANSWER: &[ErrorCode] = &[
    ErrorCode::InvalidRequest,
    ErrorCode::TemplateError,
    ErrorCode::ContextLengthExceeded,
    ErrorCode::ModelNotFound,
    ErrorCode::HiveUnknown,
    ErrorCode::WorkerNotFound,
    ErrorCode::Cancelled,
    ErrorCode::ModelCorrupt,
    ErrorCode::RequestPoisoned,
    ErrorCode::WorkerLost,
    ErrorCode::WorkerProtocolError,
    ErrorCode::ModelLoading,
    ErrorCode::ModelLoadFailed,
    ErrorCode::NoWorker,
    ErrorCode::AllBusy,
    ErrorCode::QueueTimeout,
    ErrorCode::InsufficientMemory,
    ErrorCode::CrashLoop,
    ErrorCode::HiveUnreachable,
    ErrorCode::HiveExhausted,
    ErrorCode::DeviceUnavailable,
    ErrorCode::Oom,
    ErrorCode::Overloaded,
    ErrorCode::WorkerStalled,
    ErrorCode::LoadTimeout,
    ErrorCode::DeadlineExceeded,
];

fn entry(method: &'static str, path: &'static str, id: &'static str, tag: &'static str) -> Entry {
    Entry { method, path, id, tag, parameters: &[], takes: None, gives: Vec::new(), refuses: Vec::new() }
}

impl Entry {
    fn with(self, parameters: &'static [&'static str]) -> Self {
        Self { parameters, ..self }
    }

    fn takes(self, body: Make) -> Self {
        Self { takes: Some(body), ..self }.refuses(BODY)
    }

    fn gives(mut self, status: u16, content: Content) -> Self {
        self.gives.push((status, content));
        self
    }

    fn refuses(mut self, codes: &[ErrorCode]) -> Self {
        self.refuses.extend_from_slice(codes);
        self
    }
}

fn entries() -> Vec<Entry> {
    let dialect = |path, id, body: Make| {
        let entry = entry("POST", path, id, "OpenAI").with(&["x-rbee-strict", "traceparent"]).takes(body);
        entry.refuses(POST).refuses(ANSWER)
    };
    vec![
        entry("GET", routes::HEALTH, "health", "Daemon").gives(200, Json(|_| flag("ok"))),
        entry("GET", routes::LIVEZ, "livez", "Daemon").gives(200, Json(|_| flag("ok"))),
        entry("GET", routes::READY, "ready", "Daemon")
            .gives(200, Json(of::<DaemonReady>))
            .refuses(&[ErrorCode::Draining]),
        entry("GET", routes::READYZ, "readyz", "Daemon")
            .gives(200, Json(of::<DaemonReady>))
            .refuses(&[ErrorCode::Draining]),
        entry("GET", routes::INFO, "info", "Daemon").gives(200, Json(of::<InfoReply>)),
        entry("GET", routes::OPENAPI, "openapi", "Daemon").gives(200, Json(|_| json!({ "type": "object" }))),
        entry("GET", routes::METRICS, "metrics", "Daemon").gives(200, Metrics),
        entry("POST", routes::SHUTDOWN, "shutdown", "Daemon")
            .takes(|_| named("ShutdownRequest"))
            .gives(200, Json(|_| flag("draining"))),
        entry("POST", routes::JOBS, "postJob", "Jobs")
            .with(&["idempotency-key", "traceparent"])
            .takes(|_| named("JobRequest"))
            .gives(202, Json(of::<JobAccepted>))
            .gives(200, Events(of::<Event>))
            .refuses(POST)
            .refuses(&[ErrorCode::UnknownOperation, ErrorCode::IdempotencyConflict]),
        entry("GET", routes::JOBS, "listJobs", "Jobs").gives(200, Json(of::<JobList>)),
        entry("GET", routes::JOB, "getJob", "Jobs").with(&["job"]).gives(200, Json(of::<JobView>)).refuses(NAMED),
        entry("DELETE", routes::JOB, "cancelJob", "Jobs")
            .with(&["job"])
            .gives(200, Json(|_| flag("cancelled")))
            .refuses(NAMED)
            .refuses(&[ErrorCode::JobOver]),
        entry("GET", routes::JOB_STREAM, "streamJob", "Jobs")
            .with(&["job", "after", "last-event-id"])
            .gives(200, Events(of::<Event>))
            .refuses(NAMED),
        dialect(routes::CHAT_COMPLETIONS, "createChatCompletion", |_| named("ChatCompletionRequest"))
            .gives(200, Json(of::<Answer<ChatChoice>>))
            .gives(200, Events(chat_event)),
        dialect(routes::COMPLETIONS, "createCompletion", |_| named("CompletionRequest"))
            .gives(200, Json(of::<Answer<TextChoice>>))
            .gives(200, Events(text_event)),
        dialect(routes::EMBEDDINGS, "createEmbedding", |_| named("EmbeddingRequest"))
            .gives(200, Json(of::<EmbeddingList>)),
        entry("GET", routes::MODELS, "listModels", "OpenAI").gives(200, Json(of::<ModelList>)),
        entry("GET", routes::MODEL, "retrieveModel", "OpenAI")
            .with(&["model"])
            .gives(200, Json(of::<Model>))
            .refuses(&[ErrorCode::InvalidRequest, ErrorCode::ModelNotFound]),
        entry("POST", routes::WORKER_HEARTBEAT, "workerHeartbeat", "Fleet")
            .takes(of::<WorkerHeartbeat>)
            .gives(200, Json(of::<HeartbeatReply>))
            .refuses(&[ErrorCode::VersionMismatch]),
        entry("POST", routes::HIVE_HEARTBEAT, "hiveHeartbeat", "Fleet")
            .takes(of::<HiveHeartbeat>)
            .gives(200, Json(of::<HeartbeatReply>))
            .refuses(&[ErrorCode::VersionMismatch]),
        entry("GET", routes::HEARTBEATS_STREAM, "heartbeats", "Fleet").gives(200, Events(of::<Event>)),
    ]
}

/// An object of one field that is true.
fn flag(name: &str) -> Value {
    json!({ "type": "object", "properties": { name: { "const": true } }, "required": [name] })
}

/// A stream that fails ends in an error in place of a chunk.
fn chat_event(generator: &mut SchemaGenerator) -> Value {
    let chunk = of::<rbee_openai::body::Chunk<'static, rbee_openai::body::ChatPiece<'static>>>(generator);
    json!({ "anyOf": [chunk, of::<rbee_openai::error::Reply>(generator)] })
}

fn text_event(generator: &mut SchemaGenerator) -> Value {
    let chunk = of::<rbee_openai::body::Chunk<'static, rbee_openai::body::TextPiece<'static>>>(generator);
    json!({ "anyOf": [chunk, of::<rbee_openai::error::Reply>(generator)] })
}

/// The document of these routes.
///
/// # Errors
/// When a route has no entry, or an entry no route.
pub fn document(table: &[Route]) -> Result<Value> {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    let settings = settings.with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut entries = entries();
    let mut paths = Map::new();
    for route in table {
        let fits = |entry: &Entry| (entry.method, entry.path) == (route.method, route.path);
        let place = entries
            .iter()
            .position(fits)
            .with_context(|| format!("{} {} has no entry in xtask/src/gen_openapi.rs", route.method, route.path))?;
        let operation = operation(route, &entries.swap_remove(place), &mut generator)?;
        let path = paths.entry(route.path.replace("{*", "{")).or_insert_with(|| json!({}));
        path[route.method.to_lowercase()] = operation;
    }
    if let Some(Entry { method, path, .. }) = entries.first() {
        bail!("{method} {path} has an entry in xtask/src/gen_openapi.rs and is no route");
    }
    let mut schemas = requests::components(&mut generator)?;
    for (name, schema) in generator.take_definitions(true) {
        if schemas.insert(name.clone(), schema).is_some() {
            bail!("two schemas have the name {name}");
        }
    }
    // Heartbeats are only read here: what has a default may be left out.
    for (name, read) in
        [("WorkerHeartbeat", schema_for!(WorkerHeartbeat)), ("HiveHeartbeat", schema_for!(HiveHeartbeat))]
    {
        let schema = schemas.get_mut(name).with_context(|| format!("no schema is called {name}"))?;
        schema["required"] = read.get("required").cloned().unwrap_or(json!([]));
    }
    schemas.sort_keys();
    Ok(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "rbee",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The queen's HTTP API. Schemas of bodies with server-sent events are those of one event's `data`; the \
                last `data` of a stream that ended well is `[DONE]`. Answers may get more fields; requests of our own API with \
                fields that it does not know are refused, and those of the OpenAI dialect are named in `x-rbee-ignored`.",
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "tags": [
            { "name": "OpenAI", "description": "What OpenAI's SDKs speak." },
            { "name": "Jobs", "description": "The job API: every operation is a job." },
            { "name": "Daemon", "description": "The queen itself." },
            { "name": "Fleet", "description": "Workers and hives say how they are." },
        ],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": parameters(),
            "headers": headers(),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The site's token, or a key with the scope that the operation names; `admin` opens everything. A \
                        queen without a token listens on loopback alone and asks for none.",
                },
            },
        },
    }))
}

fn operation(route: &Route, entry: &Entry, generator: &mut SchemaGenerator) -> Result<Value> {
    let mut operation = json!({ "operationId": entry.id, "tags": [entry.tag], "summary": summary(route.about) });
    let scope = match route.access {
        Access::Public => None,
        Access::Inference => Some("inference"),
        Access::Admin => Some("admin"),
    };
    operation["security"] = scope.map_or(json!([]), |scope| json!([{ "bearer": [scope] }, {}]));
    let parameters = entry.parameters.iter().chain(&["x-request-id"]);
    let parameters: Vec<Value> =
        parameters.map(|name| json!({ "$ref": format!("#/components/parameters/{name}") })).collect();
    operation["parameters"] = parameters.into();
    if let Some(takes) = entry.takes {
        let required = entry.path != routes::SHUTDOWN;
        let content = json!({ "application/json": { "schema": takes(generator) } });
        operation["requestBody"] = json!({ "required": required, "content": content });
    }
    let mut responses = BTreeMap::new();
    for (status, content) in &entry.gives {
        let response = responses.entry(*status).or_insert_with(|| {
            let mut headers = vec!["x-request-id", "x-rbee-protocol"];
            if entry.method == "POST" && entry.tag == "OpenAI" {
                headers.extend(["x-rbee-ignored", "server-timing"]);
            }
            json!({ "description": "", "headers": header_refs(&headers), "content": {} })
        });
        let (kind, schema, about) = match content {
            Json(make) => ("application/json", make(generator), "The answer"),
            Events(make) => ("text/event-stream", make(generator), "Events as they come"),
            Metrics => ("text/plain", json!({ "type": "string" }), "Samples"),
        };
        response["content"][kind] = json!({ "schema": schema });
        let said = response["description"].as_str().unwrap_or_default();
        response["description"] = if said.is_empty() { about.into() } else { format!("{said}; {about}").into() };
    }
    for (status, refusal) in refusals(route, entry, generator) {
        if responses.insert(status, refusal).is_some() {
            bail!("{} {} gives and refuses with {status}", route.method, route.path);
        }
    }
    operation["responses"] = responses.into_iter().map(|(status, value)| (status.to_string(), value)).collect();
    Ok(operation)
}

/// A row's sentence without the links of the page it is made for.
fn summary(about: &str) -> &str {
    about.split("; [").next().unwrap_or(about)
}

/// A response for each status that the route's refusals have.
fn refusals(route: &Route, entry: &Entry, generator: &mut SchemaGenerator) -> BTreeMap<u16, Value> {
    let mut codes = vec![ErrorCode::ForbiddenOrigin];
    if route.access != Access::Public {
        codes.extend([ErrorCode::Unauthorized, ErrorCode::Forbidden]);
    }
    codes.extend_from_slice(&entry.refuses);
    let mut by_status = BTreeMap::<u16, Vec<ErrorCode>>::new();
    for code in codes {
        let known = by_status.entry(code.status()).or_default();
        if !known.contains(&code) {
            known.push(code);
        }
    }
    let dialect = entry.tag == "OpenAI";
    let schema = if dialect { of::<rbee_openai::error::Reply>(generator) } else { of::<ErrorReply>(generator) };
    let response = |(status, codes): (u16, Vec<ErrorCode>)| {
        let names: Vec<String> = codes.iter().map(|code| format!("`{}`", said(*code, dialect))).collect();
        let mut headers = vec!["x-request-id", "x-rbee-protocol"];
        if codes.iter().any(|code| code.retryable()) {
            headers.push("retry-after");
        }
        if dialect && codes.iter().any(|code| !code.retryable()) && (status >= 500 || matches!(status, 408 | 409 | 429))
        {
            headers.push("x-should-retry");
        }
        if status == 401 {
            headers.push("www-authenticate");
        }
        let content = json!({ "application/json": { "schema": schema.clone() } });
        let response = json!({ "description": names.join(", "), "headers": header_refs(&headers), "content": content });
        (status, response)
    };
    by_status.into_iter().map(response).collect()
}

/// A code as the route's errors have it.
fn said(code: ErrorCode, dialect: bool) -> String {
    if !dialect {
        return code.name().to_owned();
    }
    let reply = rbee_openai::error::Reply::from(&rbee_wire::ErrorBody::new(code, ""));
    reply.error.code.unwrap_or_default()
}

fn header_refs(names: &[&str]) -> Value {
    names.iter().map(|name| ((*name).to_owned(), json!({ "$ref": format!("#/components/headers/{name}") }))).collect()
}

fn headers() -> Value {
    let header = |about: &str, schema: Value| json!({ "description": about, "schema": schema });
    let text = || json!({ "type": "string" });
    json!({
        "x-request-id": header("The request's own id, or one that was made for it.", text()),
        "x-rbee-protocol": header("The version of the protocol.", json!({ "const": rbee_wire::PROTOCOL.to_string() })),
        "retry-after": header("Seconds after which a retry may help, where they are known.", json!({ "type": "integer" })),
        "x-should-retry": header("There where a retry cannot help.", json!({ "const": "false" })),
        "x-rbee-ignored": header("Fields of the request that changed nothing.", text()),
        "server-timing": header("Where the time went until the headers, in milliseconds.", text()),
        "www-authenticate": header("How to show a credential.", json!({ "const": "Bearer" })),
    })
}

fn parameters() -> Value {
    let parameter = |place: &str, name: &str, about: &str, schema: Value| json!({ "name": name, "in": place, "required": place == "path", "description": about, "schema": schema });
    let text = || json!({ "type": "string" });
    let offset = || json!({ "type": "integer", "minimum": 0 });
    json!({
        "job": parameter("path", "id", "The job.", text()),
        "model": parameter("path", "id", "The model; its name may have slashes, written as they are.", text()),
        "after": parameter("query", "after", "The `id` of the last event that is known.", offset()),
        "last-event-id": parameter("header", "Last-Event-ID", "The same; it wins.", offset()),
        "idempotency-key": parameter("header", "Idempotency-Key", "A repeated post with it is answered with the same job.", text()),
        "traceparent": parameter("header", "traceparent", "The W3C trace that the request belongs to.", text()),
        "x-request-id": parameter("header", "x-request-id", "A label for logs.", text()),
        "x-rbee-strict": parameter("header", "x-rbee-strict", "`true` refuses fields that change nothing.", text()),
    })
}

/// The file.
///
/// # Errors
/// As [`document`].
pub fn file() -> Result<String> {
    Ok(serde_json::to_string_pretty(&document(routes::QUEEN)?).context("the document is JSON")? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_that_is_not_described_ends_the_generation_and_so_does_a_description_without_a_route() {
        document(routes::QUEEN).unwrap();
        let new = Route { method: "GET", path: "/v1/new", access: Access::Admin, about: "nobody described it" };
        let error = document(&[routes::QUEEN, &[new]].concat()).unwrap_err().to_string();
        assert!(error.contains("GET /v1/new has no entry"), "{error}");
        let error = document(&routes::QUEEN[1..]).unwrap_err().to_string();
        assert!(error.contains("GET /health") && error.contains("is no route"), "{error}");
    }
}
