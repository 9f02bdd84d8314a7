//! The end-to-end suite: real processes in private homes and on private ports.
//!
//! Most tests let workers simulate: their tokens are a hash of the prompt, so that each one can be checked, and
//! their pace can be chosen. The model itself has its say in `tinybee`, `start` and `broken_models`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod bad_input;
mod broken_models;
mod budget;
mod chat;
mod cores;
mod embeddings;
mod families;
mod faults;
mod forms;
mod gguf;
mod hostile_gguf;
mod infer;
mod jobs;
mod keys;
mod kit;
mod loading;
mod metrics;
mod on_demand;
mod openai;
mod openapi;
mod queue;
mod routes;
mod sdk;
mod security;
mod start;
mod store;
mod tinybee;
mod tools;
mod verbs;
mod wire;

use rbee_testkit::CANARY;
use serde_json::{Value, json};

/// A prompt that must show up in no log.
fn prompt(about: &str) -> String {
    format!("{CANARY} tells of {about}")
}

/// A job for a simulated worker.
fn infer(prompt: &str, max_tokens: u64) -> Value {
    json!({ "operation": "infer", "prompt": prompt, "max_tokens": max_tokens })
}

/// A job with further fields.
fn with(mut job: Value, fields: Value) -> Value {
    let (Value::Object(job_fields), Value::Object(fields)) = (&mut job, fields) else { panic!("jobs are objects") };
    job_fields.extend(fields);
    job
}
