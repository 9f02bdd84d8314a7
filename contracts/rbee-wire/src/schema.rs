//! JSON schemas of what crosses the wire, as committed under `schema/`.

use schemars::{Schema, schema_for};

/// File name (without `.json`) and schema of every message.
pub fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("job_request", schema_for!(crate::job::JobRequest)),
        ("job_accepted", schema_for!(crate::job::JobAccepted)),
        ("event", schema_for!(crate::event::Event)),
        ("error", schema_for!(crate::error::ErrorReply)),
        ("worker_heartbeat", schema_for!(crate::worker::WorkerHeartbeat)),
        ("hive_heartbeat", schema_for!(crate::hive::HiveHeartbeat)),
        ("heartbeat_reply", schema_for!(crate::worker::HeartbeatReply)),
        ("inference_request", schema_for!(crate::worker::InferenceRequest)),
        ("control_down", schema_for!(crate::worker::ControlDown)),
        ("control_up", schema_for!(crate::worker::ControlUp)),
        ("job_view", schema_for!(crate::view::JobView)),
        ("status_view", schema_for!(crate::view::StatusView)),
        ("key_view", schema_for!(crate::key::KeyView)),
        ("spawn_view", schema_for!(crate::view::SpawnView)),
        ("info", schema_for!(crate::view::InfoReply)),
    ]
}
