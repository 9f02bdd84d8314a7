//! Every path that queen, hive and worker serve. Servers mount from these constants, clients call them, the
//! reference lists them, and the guard before every route takes from them who may use it: a route that is not in
//! its table is for admins alone.

use crate::key::Access::{self, Admin, Inference, Public};

/// One route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// `GET`, `POST`, `DELETE`.
    pub method: &'static str,
    /// The path, `{id}` for a variable part.
    pub path: &'static str,
    /// Who may use it.
    pub access: Access,
    /// What it is for.
    pub about: &'static str,
}

const fn route(method: &'static str, path: &'static str, access: Access, about: &'static str) -> Route {
    Route { method, path, access, about }
}

/// The process is up.
pub const HEALTH: &str = "/health";
/// The process is up, Kubernetes' name.
pub const LIVEZ: &str = "/livez";
/// A request sent now would be taken.
pub const READY: &str = "/ready";
/// A request sent now would be taken, Kubernetes' name.
pub const READYZ: &str = "/readyz";
/// Version, build, uptime.
pub const INFO: &str = "/v1/info";
/// This API as an OpenAPI document.
pub const OPENAPI: &str = "/openapi.json";
/// Counters and histograms for Prometheus.
pub const METRICS: &str = "/metrics";
/// Drain and stop.
pub const SHUTDOWN: &str = "/v1/shutdown";
/// Post or list jobs.
pub const JOBS: &str = "/v1/jobs";
/// One job.
pub const JOB: &str = "/v1/jobs/{id}";
/// One job's stream.
pub const JOB_STREAM: &str = "/v1/jobs/{id}/stream";
/// Answer a chat, in the OpenAI dialect.
pub const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
/// Go on from a text, in the OpenAI dialect.
pub const COMPLETIONS: &str = "/v1/completions";
/// Vectors of texts, in the OpenAI dialect.
pub const EMBEDDINGS: &str = "/v1/embeddings";
/// The models that can be named, in the OpenAI dialect.
pub const MODELS: &str = "/v1/models";
/// One model, in the OpenAI dialect; its name may have slashes.
pub const MODEL: &str = "/v1/models/{*id}";
/// Workers say how they are.
pub const WORKER_HEARTBEAT: &str = "/v1/worker-heartbeat";
/// Hives say how they are.
pub const HIVE_HEARTBEAT: &str = "/v1/hive-heartbeat";
/// The merged view, for dashboards.
pub const HEARTBEATS_STREAM: &str = "/v1/heartbeats/stream";
/// Captured output of a hive's worker.
pub const WORKER_LOGS: &str = "/v1/workers/{id}/logs";
/// A worker's readiness.
pub const WORKER_READY: &str = "/v1/ready";
/// Ask a worker for text.
pub const INFERENCE: &str = "/v1/inference";
/// One inference.
pub const INFERENCE_ONE: &str = "/v1/inference/{id}";
/// One inference's stream.
pub const INFERENCE_STREAM: &str = "/v1/inference/{id}/stream";
/// The events of all inferences that name this channel, on one connection.
pub const CHANNEL: &str = "/v1/channels/{id}";
/// Text to token ids.
pub const TOKENIZE: &str = "/v1/tokenize";
/// Finish and take nothing new.
pub const DRAIN: &str = "/v1/drain";

/// Who may use a method of a path as its table has it; a method that the path does not take is as closed as the most closed
/// that it does.
pub fn access(table: &[Route], method: &str, path: &str) -> Access {
    // Whoever serves GET serves HEAD.
    let method = if method == "HEAD" { "GET" } else { method };
    let rows = table.iter().filter(|row| row.path == path);
    let own = rows.clone().find(|row| row.method == method).map(|row| row.access);
    own.or_else(|| rows.map(|row| row.access).max()).unwrap_or(Admin)
}

/// The queen's routes.
pub const QUEEN: &[Route] = &[
    route("GET", HEALTH, Public, "the process is up"),
    route("GET", LIVEZ, Public, "the process is up"),
    route("GET", READY, Public, "a request sent now would be taken"),
    route("GET", READYZ, Public, "a request sent now would be taken"),
    route("GET", INFO, Inference, "version, build, uptime"),
    route("GET", OPENAPI, Inference, "this API as an OpenAPI 3.1 document"),
    route("GET", METRICS, Admin, "counters and histograms for Prometheus, under vLLM's names where they mean the same"),
    route("POST", SHUTDOWN, Admin, "drain and stop"),
    route("POST", JOBS, Inference, "post a job; with `Accept: text/event-stream` its stream is the answer"),
    route("GET", JOBS, Inference, "the jobs that are kept; a key sees its own"),
    route("GET", JOB, Inference, "one job with its decisions"),
    route("DELETE", JOB, Inference, "cancel a job"),
    route("GET", JOB_STREAM, Inference, "a job's events, from the beginning or after `Last-Event-ID`"),
    route("POST", CHAT_COMPLETIONS, Inference, "answer a chat, as OpenAI's API does; [fields](../api.md)"),
    route("POST", COMPLETIONS, Inference, "go on from a text, as OpenAI's API does"),
    route("POST", EMBEDDINGS, Inference, "vectors of texts, as OpenAI's API gives them"),
    route("GET", MODELS, Inference, "the models that can be named, as OpenAI's API lists them"),
    route("GET", MODEL, Inference, "one of them; its name may have slashes"),
    route("POST", WORKER_HEARTBEAT, Admin, "a worker says how it is"),
    route("POST", HIVE_HEARTBEAT, Admin, "a hive says how it is"),
    route("GET", HEARTBEATS_STREAM, Admin, "the merged view of the fleet, for dashboards"),
];

/// A hive's routes.
pub const HIVE: &[Route] = &[
    route("GET", HEALTH, Public, "the process is up"),
    route("GET", LIVEZ, Public, "the process is up"),
    route("GET", READY, Public, "a request sent now would be taken"),
    route("GET", READYZ, Public, "a request sent now would be taken"),
    route("GET", INFO, Admin, "version, build, uptime"),
    route("GET", METRICS, Admin, "the hive's workers for Prometheus"),
    route("POST", SHUTDOWN, Admin, "drain and stop"),
    route("POST", JOBS, Admin, "post one of the hive's operations"),
    route("GET", JOB, Admin, "one job"),
    route("GET", JOB_STREAM, Admin, "a job's events"),
    route("GET", WORKER_LOGS, Admin, "captured output of one worker; `?tail=BYTES`"),
];

/// A worker's routes.
pub const WORKER: &[Route] = &[
    route("GET", HEALTH, Public, "the process is up"),
    route("GET", WORKER_READY, Admin, "whether the model is loaded, and how far the load is"),
    route("GET", INFO, Admin, "version, build, uptime"),
    route("GET", METRICS, Admin, "the engine's counters for Prometheus"),
    route("POST", INFERENCE, Admin, "generate; with `Accept: text/event-stream` the stream is the answer"),
    route("GET", INFERENCE_STREAM, Admin, "the stream of a posted inference, once"),
    route("DELETE", INFERENCE_ONE, Admin, "cancel an inference"),
    route("GET", CHANNEL, Admin, "the events of all inferences posted with this channel, a line `STREAM JSON` each"),
    route("POST", TOKENIZE, Admin, "token ids of a text"),
    route("POST", DRAIN, Admin, "finish and take nothing new"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_table_has_is_for_admins() {
        assert_eq!(access(QUEEN, "GET", HEALTH), Public);
        assert_eq!(access(QUEEN, "HEAD", HEALTH), Public);
        assert_eq!(access(QUEEN, "DELETE", HEALTH), Public);
        assert_eq!(access(QUEEN, "PUT", JOBS), Inference);
        assert_eq!(access(QUEEN, "POST", SHUTDOWN), Admin);
        assert_eq!(access(QUEEN, "GET", SHUTDOWN), Admin);
        assert_eq!(access(QUEEN, "GET", "/v1/new"), Admin);
        for table in [HIVE, WORKER] {
            assert!(table.iter().all(|row| row.access != Inference), "keys are the queen's");
        }
    }
}
