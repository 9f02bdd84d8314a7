//! One function per type of `rbee_wire::view`.

use rbee_wire::KeepAlive;
use rbee_wire::event::{Timings, Usage};
use rbee_wire::hive::Process;
use rbee_wire::key::KeyView;
use rbee_wire::view::{
    BinaryView, HiveView, InfoReply, JobState, JobView, SpawnOutcome, SpawnView, StatusView, WorkerView,
};
use rbee_wire::worker::{LoadProgress, UsedOf};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::table::{Table, age, bytes, cell, date, fields, milliseconds};

/// The values in their type, if all of them are of it.
pub(super) fn typed<T: DeserializeOwned>(values: &[Value]) -> Option<Vec<T>> {
    values.iter().map(|value| serde_json::from_value(value.clone()).ok()).collect()
}

/// A state or another one-word enum as the wire has it.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).map(|value| cell(&value)).unwrap_or_default()
}

fn used(of: UsedOf) -> String {
    format!("{}/{}", of.used, of.total)
}

fn percent(load: &LoadProgress) -> String {
    match load.total {
        0 => load.stage.clone(),
        total => format!("{}:{}%", load.stage, (load.done.min(total) as f64 / total as f64 * 100.0).floor()),
    }
}

fn with_load(state: String, load: Option<&LoadProgress>) -> String {
    match load {
        Some(load) => format!("{state}({})", percent(load)),
        None => state,
    }
}

fn rate(rate: f64) -> String {
    if rate > 0.0 { format!("{rate:.1}tok/s") } else { String::new() }
}

/// Any value: objects as fields, the rest as JSON.
pub fn any(values: &[Value]) -> String {
    let mut texts = Vec::new();
    for value in values {
        texts.push(match value {
            Value::Object(map) => {
                fields(&map.iter().map(|(name, value)| (name.as_str(), cell(value))).collect::<Vec<_>>())
            }
            other => format!("{}\n", cell(other)),
        });
    }
    texts.join("\n")
}

/// Active workers.
pub fn workers(values: &[Value]) -> String {
    match typed::<WorkerView>(values) {
        Some(views) => worker_table(&views),
        None => any(values),
    }
}

fn worker_table(views: &[WorkerView]) -> String {
    let mut table =
        Table::new(&["WORKER", "MODEL", "HIVE", "DEVICE", "STATE", "SLOTS", "QUEUE", "MEMORY", "DECODE", "UNTIL"]);
    for view in views {
        table.row([
            view.worker_id.to_string(),
            view.model.to_string(),
            view.hive_id.to_string(),
            view.device.to_string(),
            with_load(word(&view.state), view.load.as_ref()),
            used(view.slots),
            view.queue.to_string(),
            bytes(view.memory.total),
            rate(view.decode_rate),
            until(view),
        ]);
    }
    table.text()
}

/// How long a worker stays if nobody uses it.
fn until(view: &WorkerView) -> String {
    match (view.unload_ms, view.keep_alive) {
        (Some(left), _) => format!("{} more", age(left)),
        (None, KeepAlive::Forever) => "stays".into(),
        (None, KeepAlive::For(_)) => "in use".into(),
    }
}

/// One active worker.
pub fn worker(value: &Value) -> String {
    let Ok(view) = serde_json::from_value::<WorkerView>(value.clone()) else {
        return any(std::slice::from_ref(value));
    };
    fields(&[
        ("worker", view.worker_id.to_string()),
        ("model", view.model.to_string()),
        ("hive", view.hive_id.to_string()),
        ("device", view.device.to_string()),
        ("state", with_load(word(&view.state), view.load.as_ref())),
        ("slots", used(view.slots)),
        ("queue", view.queue.to_string()),
        ("context", format!("{} tokens", view.context)),
        ("kv blocks", used(view.kv_blocks)),
        ("memory", bytes(view.memory.total)),
        ("  weights", bytes(view.memory.weights)),
        ("  kv", bytes(view.memory.kv)),
        ("prefill", rate(view.prefill_rate)),
        ("decode", rate(view.decode_rate)),
        ("until", until(&view)),
        ("numerics", view.numerics_id.unwrap_or_default()),
        ("url", view.url),
        ("last heard", format!("{} ago", age(view.age_ms))),
        ("version", view.version),
        ("incarnation", view.incarnation.to_string()),
    ])
}

/// Hives.
pub fn hives(values: &[Value]) -> String {
    match typed::<HiveView>(values) {
        Some(views) => hive_table(&views),
        None => any(values),
    }
}

fn hive_table(views: &[HiveView]) -> String {
    let mut table = Table::new(&["HIVE", "STATE", "URL", "DEVICES", "WORKERS", "SILENT", "VERSION"]);
    for view in views {
        let devices: Vec<_> = view.devices.iter().map(|device| device.id.to_string()).collect();
        table.row([
            view.hive_id.to_string(),
            if view.alive { "alive" } else { "silent" }.into(),
            view.url.clone(),
            devices.join(","),
            view.processes.iter().filter(|process| process.pid != 0).count().to_string(),
            age(view.age_ms),
            view.version.clone(),
        ]);
    }
    table.text()
}

/// One hive with its devices and processes.
pub fn hive(value: &Value) -> String {
    let Ok(view) = serde_json::from_value::<HiveView>(value.clone()) else {
        return any(std::slice::from_ref(value));
    };
    let mut text = fields(&[
        ("hive", view.hive_id.to_string()),
        ("state", if view.alive { "alive" } else { "silent" }.into()),
        ("url", view.url.clone()),
        ("last heard", format!("{} ago", age(view.age_ms))),
        ("version", view.version.clone()),
        ("incarnation", view.incarnation.to_string()),
    ]);
    let mut devices = Table::new(&["DEVICE", "KIND", "FREE", "TOTAL", "NAME"]);
    for device in view.devices {
        devices.row([
            device.id.to_string(),
            word(&device.kind),
            bytes(device.memory_free),
            bytes(device.memory_total),
            match device.unavailable {
                Some(why) => format!("{} (no worker can use it: {why})", device.name),
                None => device.name,
            },
        ]);
    }
    text.push('\n');
    text.push_str(&devices.text());
    if !view.processes.is_empty() {
        text.push('\n');
        text.push_str(&process_table(&view.processes));
    }
    text
}

/// Worker processes.
pub fn processes(values: &[Value]) -> String {
    match typed::<Process>(values) {
        Some(views) => process_table(&views),
        None => any(values),
    }
}

fn last_exit(process: &Process) -> String {
    let Some(exit) = &process.last_exit else { return String::new() };
    match (exit.code, exit.signal) {
        (_, Some(signal)) => format!("{} (signal {signal})", exit.reason),
        (Some(code), None) => format!("{} (exit {code})", exit.reason),
        (None, None) => exit.reason.clone(),
    }
}

fn process_table(views: &[Process]) -> String {
    let mut table =
        Table::new(&["PID", "WORKER", "MODEL", "DEVICE", "STATE", "SINCE", "RESERVED", "RESTARTS", "LAST EXIT"]);
    for view in views {
        table.row([
            if view.pid == 0 { String::new() } else { view.pid.to_string() },
            view.worker_id.to_string(),
            view.model.to_string(),
            view.device.to_string(),
            with_load(word(&view.state), view.load.as_ref()),
            age(view.since_ms),
            bytes(view.reserved),
            view.restarts.to_string(),
            last_exit(view),
        ]);
    }
    table.text()
}

/// One worker process, with the end of what it said before it ended.
pub fn process(value: &Value) -> String {
    let Ok(view) = serde_json::from_value::<Process>(value.clone()) else {
        return any(std::slice::from_ref(value));
    };
    let exit = last_exit(&view);
    let last = view.last_exit.as_ref();
    let mut text = fields(&[
        ("pid", if view.pid == 0 { String::new() } else { view.pid.to_string() }),
        ("worker", view.worker_id.to_string()),
        ("model", view.model.to_string()),
        ("device", view.device.to_string()),
        ("state", with_load(word(&view.state), view.load.as_ref())),
        ("since", age(view.since_ms)),
        ("reserved", bytes(view.reserved)),
        ("restarts", view.restarts.to_string()),
        ("url", view.url.clone().unwrap_or_default()),
        ("last exit", exit),
        ("error", last.and_then(|exit| exit.error.as_ref()).map(ToString::to_string).unwrap_or_default()),
        ("incarnation", view.incarnation.to_string()),
    ]);
    if let Some(words) = last.map(|exit| exit.stderr_tail.trim_end()).filter(|words| !words.is_empty()) {
        text.push('\n');
        text.push_str(&crate::printer::printable(words));
        text.push('\n');
    }
    text
}

/// Worker programs.
pub fn binaries(values: &[Value]) -> String {
    let Some(views) = typed::<BinaryView>(values) else { return any(values) };
    let mut table = Table::new(&["TYPE", "DEVICES", "SIZE", "VERSION", "PATH"]);
    for view in views {
        table.row([view.worker_type, view.devices.join(","), bytes(view.size), view.version, view.path]);
    }
    table.text()
}

/// One worker program.
pub fn binary(value: &Value) -> String {
    let Ok(view) = serde_json::from_value::<BinaryView>(value.clone()) else {
        return any(std::slice::from_ref(value));
    };
    fields(&[
        ("type", view.worker_type),
        ("devices", view.devices.join(",")),
        ("size", bytes(view.size)),
        ("version", view.version),
        ("path", view.path),
    ])
}

/// What a spawn did: the worker's id, one a line.
pub fn spawned(values: &[Value]) -> String {
    match typed::<SpawnView>(values) {
        Some(views) => views.iter().map(|view| format!("{}\n", view.worker_id)).collect(),
        None => any(values),
    }
}

/// Whether a spawn found the worker there.
pub fn spawn_note(value: &Value) -> Option<String> {
    let view: SpawnView = serde_json::from_value(value.clone()).ok()?;
    let what = match view.outcome {
        SpawnOutcome::Existing => "serves already",
        SpawnOutcome::Started => "was started",
    };
    Some(format!("{} {what}: {} on {} of {}", view.worker_id, view.model, view.device, view.hive_id))
}

fn over(state: JobState) -> bool {
    matches!(state, JobState::Done | JobState::Cancelled | JobState::Failed)
}

/// Jobs.
pub fn jobs(views: &[JobView]) -> String {
    let mut table = Table::new(&["JOB", "OPERATION", "STATE", "MODEL", "WORKER", "AGE", "TOKENS"]);
    for view in views {
        table.row([
            view.job_id.to_string(),
            view.operation.name().into(),
            match &view.error {
                Some(error) => format!("{}({})", word(&view.state), error.code),
                None => word(&view.state),
            },
            view.model.as_ref().map(ToString::to_string).unwrap_or_default(),
            view.worker_id.as_ref().map(ToString::to_string).unwrap_or_default(),
            age(view.age_ms),
            view.tokens.to_string(),
        ]);
    }
    table.text()
}

/// One job.
pub fn job(view: &JobView) -> String {
    let mut text = fields(&[
        ("job", view.job_id.to_string()),
        ("operation", view.operation.name().into()),
        ("key", view.key_id.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("state", word(&view.state)),
        ("model", view.model.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("worker", view.worker_id.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("age", age(view.age_ms)),
        ("tokens", view.tokens.to_string()),
        ("events", view.events.to_string()),
        ("listeners", view.listeners.to_string()),
        ("error", view.error.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("hint", view.error.as_ref().and_then(|error| error.hint.clone()).unwrap_or_default()),
    ]);
    if view.timings.is_some() || view.usage.is_some() {
        text.push('\n');
        text.push_str(&timings(view.usage.as_ref(), view.timings.as_ref()));
    }
    text
}

/// Keys. The name stands last: it may have spaces.
pub fn keys(values: &[Value]) -> String {
    let Some(views) = typed::<KeyView>(values) else { return any(values) };
    let mut table = Table::new(&["KEY", "SCOPES", "JOBS", "AT-ONCE", "A-MINUTE", "CREATED", "NAME"]);
    let limit = |limit: Option<u32>| limit.map(|most| most.to_string()).unwrap_or_default();
    for view in views {
        let scopes: Vec<String> = view.scopes.iter().map(word).collect();
        table.row([
            view.key_id.to_string(),
            scopes.join(","),
            view.running.to_string(),
            limit(view.limits.max_concurrent),
            limit(view.limits.rate),
            date(view.created),
            view.name,
        ]);
    }
    table.text()
}

/// The decisions on a job's way.
pub fn explain(view: &JobView) -> String {
    let mut text = job(view);
    let mut table = Table::new(&["AT", "WHAT", "WHY"]);
    for decision in &view.trail {
        table.row([format!("{}ms", decision.at_ms), decision.what.clone(), decision.why.clone()]);
    }
    text.push('\n');
    text.push_str(&table.text());
    text
}

/// Where the time went.
pub fn timings(usage: Option<&Usage>, timings: Option<&Timings>) -> String {
    let mut rows = Vec::new();
    if let Some(usage) = usage {
        rows.push(("prompt", format!("{} tokens, {} of them cached", usage.prompt_tokens, usage.cached_tokens)));
        rows.push(("output", format!("{} tokens", usage.completion_tokens)));
    }
    if let Some(timings) = timings {
        rows.push(("queue", milliseconds(timings.queue_ms)));
        rows.push(("load", milliseconds(timings.load_ms)));
        rows.push(("prefill", milliseconds(timings.prefill_ms)));
        if timings.network_ms > 0.0 {
            rows.push(("of it network", milliseconds(timings.network_ms)));
        }
        rows.push(("decode", milliseconds(timings.decode_ms)));
        rows.push(("total", milliseconds(timings.total_ms)));
        rows.push(("speed", format!("{:.1} tokens/s", timings.tokens_per_s)));
    }
    fields(&rows)
}

/// What a daemon says of itself.
pub fn info(url: &str, view: &InfoReply) -> String {
    fields(&[
        ("program", view.program.clone()),
        ("url", url.to_owned()),
        ("version", view.version.clone()),
        ("build", view.build.clone()),
        ("protocol", view.protocol.to_string()),
        ("pid", view.pid.to_string()),
        ("uptime", age(view.uptime_ms)),
        ("features", view.features.join(",")),
        ("incarnation", view.incarnation.to_string()),
    ])
}

/// The whole picture: queen, hives, workers by model, and the jobs that wait or run.
pub fn status(url: &str, view: &StatusView, all_jobs: &[JobView]) -> String {
    let mut models: Vec<String> = view.workers.iter().map(|worker| worker.model.to_string()).collect();
    models.sort();
    models.dedup();
    let mut text = fields(&[
        (
            "queen",
            format!("{url} (version {}, pid {}, up {})", view.queen.version, view.queen.pid, age(view.queen.uptime_ms)),
        ),
        ("models", if models.is_empty() { "none loaded".into() } else { models.join(", ") }),
        ("jobs", format!("{} waiting, {} running", view.queued, view.running)),
    ]);
    text.push('\n');
    text.push_str(&hive_table(&view.hives));
    text.push('\n');
    text.push_str(&worker_table(&view.workers));
    // The question for the status is a job too, and says nothing.
    let live = all_jobs.iter().filter(|job| !over(job.state) && job.operation != rbee_wire::Operation::Status);
    let live: Vec<JobView> = live.cloned().collect();
    if !live.is_empty() {
        text.push('\n');
        text.push_str(&jobs(&live));
    }
    text
}
