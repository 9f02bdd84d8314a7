//! `up`, `down`, `queen …` and `hive …`: the daemons themselves.

use std::path::Path;
use std::time::Duration;

use rbee_client::{HiveClient, Hives};
use rbee_wire::hive::Process;
use rbee_wire::job::{OfHost, OnHive as AtHive};
use rbee_wire::view::InfoReply;
use rbee_wire::{HiveId, JobRequest};
use serde_json::{Value, json};

use super::{call, tail, the_one};
use crate::cli::{HiveVerb, OnHive, QueenVerb};
use crate::connect::{self, Reached, Start};
use crate::exit::{Exit, Failure, stdout_failure};
use crate::printer::{Data, Outcome, Shown};
use crate::processes::{self, Running, all_gone};
use crate::render;
use crate::settings::Context;

/// Most bytes of a log that are read for its end.
const LOG_BYTES: u64 = 4 << 20;

/// `rbee up`.
pub(crate) async fn up(context: &Context) -> Result<Outcome, Failure> {
    let queen = connect::reach(context, Start::IfNeeded).await?;
    let job = JobRequest::HiveStart(host(OnHive { hive: HiveId::localhost() }));
    let hive = the_one(crate::follow::call(context, &queen.client, &job).await?);
    let text = format!("queen is up at {} (pid {})\nhive is up\n", queen.client.url(), queen.info.pid);
    Ok(Shown::new(json!({ "queen": queen.info, "hive": hive }), text).into())
}

/// `rbee down`: the queen takes its local hive along; a hive without a queen is stopped by itself.
pub(crate) async fn down(context: &Context) -> Result<Outcome, Failure> {
    let queen = match connect::reach(context, Start::Never).await {
        Ok(queen) => Some(queen),
        Err(failure) if failure.exit == Exit::Unreachable && context.queen.loopback => {
            if connect::local_hive(context).await.is_none() {
                return Err(failure);
            }
            None
        }
        Err(failure) => return Err(failure),
    };
    let hive = if context.queen.loopback { connect::local_hive(context).await } else { None };
    let queen_process = queen.as_ref().and_then(|queen| local(context, "queen", queen.info.pid));
    let hive_process = hive.as_ref().and_then(|(_, info)| local(context, "hive", info.pid));
    let workers = match &hive {
        Some((client, _)) => workers(context, client).await,
        None => Vec::new(),
    };
    if let Some(queen) = &queen {
        connect::asked_to_stop(queen.client.shutdown(Hives::Too).await)?;
        gone(context, queen_process.as_slice(), queen).await?;
    }
    if let (Some((client, _)), Some(process)) = (&hive, &hive_process)
        && process.is_there()
    {
        connect::asked_to_stop(client.shutdown().await)?;
    }
    let all: Vec<Running> = queen_process.into_iter().chain(hive_process).chain(workers).collect();
    all_gone(context, &all).await?;
    let text: String =
        all.iter().map(|process| format!("{} is stopped (pid {})\n", process.name, process.pid)).collect();
    let text = if text.is_empty() { "the queen is stopped\n".into() } else { text };
    Ok(Shown::new(stopped(&all), text).into())
}

/// The worker processes of the local hive, in order to know when they are gone; the hive ends them.
async fn workers(context: &Context, hive: &HiveClient) -> Vec<Running> {
    let listed = JobRequest::WorkerProcessList(AtHive { hive_id: HiveId::localhost() });
    let processes: Vec<Process> = hive.call(&listed).await.unwrap_or_default();
    processes.iter().filter_map(|process| local(context, "worker", process.pid)).collect()
}

fn stopped(all: &[Running]) -> Value {
    let rows = all.iter().map(|process| json!({ "program": process.name, "pid": process.pid }));
    json!({ "stopped": rows.collect::<Vec<_>>() })
}

fn local(context: &Context, name: &str, pid: u32) -> Option<Running> {
    if context.queen.loopback && pid != 0 { Running::of(name, pid) } else { None }
}

/// Waits until the queen is gone: its process where it is local, its answer where it is not.
async fn gone(context: &Context, process: &[Running], queen: &Reached) -> Result<(), Failure> {
    if !process.is_empty() {
        return all_gone(context, process).await;
    }
    let limit = tokio::time::Instant::now() + processes::limit(context);
    while queen.client.info().await.is_ok() {
        if tokio::time::Instant::now() >= limit {
            return Err(Failure::new(Exit::Failed, format!("the queen at {} still answers", queen.client.url())));
        }
        context.printer.progress("waiting for the queen's jobs to end");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// `rbee queen …`.
pub(crate) async fn queen(context: &Context, verb: QueenVerb) -> Result<Outcome, Failure> {
    match verb {
        QueenVerb::Start => {
            let queen = connect::reach(context, Start::IfNeeded).await?;
            let how = if queen.started { "is started" } else { "was running already" };
            let text = format!("queen {how} at {} (pid {})\n", queen.client.url(), queen.info.pid);
            Ok(Shown::new(json!({ "started": queen.started, "queen": queen.info }), text).into())
        }
        QueenVerb::Stop => {
            let queen = connect::reach(context, Start::Never).await?;
            let process: Vec<Running> = local(context, "queen", queen.info.pid).into_iter().collect();
            connect::asked_to_stop(queen.client.shutdown(Hives::Stay).await)?;
            gone(context, &process, &queen).await?;
            let text = format!("queen is stopped (pid {})\n", queen.info.pid);
            Ok(Shown::new(json!({ "stopped": [{ "program": "queen", "pid": queen.info.pid }] }), text).into())
        }
        QueenVerb::Status => {
            let queen = connect::reach(context, Start::Never).await?;
            let (ready, why) = match queen.client.ready().await {
                Ok(reply) => (reply.ready, reply.reason.unwrap_or_default()),
                Err(error) => match error.refusal() {
                    Some(body) => (false, body.message.clone()),
                    None => return Err(error.into()),
                },
            };
            let text = render::fields(&[
                ("queen", if ready { "ready" } else { "not ready" }.into()),
                ("why", why.clone()),
                ("url", queen.client.url().into()),
                ("pid", queen.info.pid.to_string()),
                ("uptime", render::age(queen.info.uptime_ms)),
                ("version", queen.info.version.clone()),
            ]);
            let json = json!({ "ready": ready, "reason": why, "url": queen.client.url(), "queen": queen.info });
            Ok(Shown::new(json, text).into())
        }
        QueenVerb::Info => {
            let queen = connect::reach(context, Start::Never).await?;
            Ok(Shown::new(json!(queen.info), render::info(queen.client.url(), &queen.info)).into())
        }
        QueenVerb::Logs { log, follow } => {
            if !context.queen.loopback {
                return Err(Failure::usage(format!(
                    "the queen at {} keeps its log on its own machine",
                    context.queen.url
                ))
                .hint("run `rbee queen logs` there"));
            }
            logs(context, &context.log_file("queen"), log.tail, follow).await
        }
    }
}

/// `rbee hive …`.
pub(crate) async fn hive(context: &Context, verb: HiveVerb) -> Result<Outcome, Failure> {
    let one = |job: JobRequest, start: Start, text: fn(&Value) -> String| async move {
        let value = the_one(call(context, start, &job).await?);
        let text = text(&value);
        Ok(Outcome::from(Shown::new(value, text)))
    };
    let generic: fn(&Value) -> String = |value| match value {
        Value::Null => "done\n".into(),
        value => render::any(std::slice::from_ref(value)),
    };
    match verb {
        HiveVerb::Start(on) => {
            let value = the_one(call(context, Start::IfNeeded, &JobRequest::HiveStart(host(on.clone()))).await?);
            Ok(Shown::new(value, format!("hive {} is up\n", on.hive)).into())
        }
        HiveVerb::Stop(on) => stop_hive(context, on).await,
        HiveVerb::Status(on) => {
            let value = the_one(call(context, Start::Never, &JobRequest::HiveStatus(host(on.clone()))).await?);
            let text = hive_status(on.hive.as_str(), &value);
            Ok(Shown::new(value, text).into())
        }
        HiveVerb::List => {
            let values = call(context, Start::Never, &JobRequest::HiveList {}).await?;
            let text = render::hives(&values);
            Ok(Shown::new(Value::Array(values), text).into())
        }
        HiveVerb::Get(on) => one(JobRequest::HiveGet(host(on)), Start::Never, render::hive).await,
        HiveVerb::Install(on) => one(JobRequest::HiveInstall(host(on)), Start::IfNeeded, generic).await,
        HiveVerb::Uninstall(on) => one(JobRequest::HiveUninstall(host(on)), Start::IfNeeded, generic).await,
        HiveVerb::RefreshCapabilities(on) => {
            let job = JobRequest::HiveRefreshCapabilities(host(on));
            one(job, Start::IfNeeded, |value| if value.is_null() { "done\n".into() } else { render::hive(value) }).await
        }
        HiveVerb::SshTest(on) => one(JobRequest::SshTest(host(on)), Start::IfNeeded, generic).await,
        HiveVerb::ImportSsh { ssh_config_path } => {
            one(JobRequest::HiveImportSsh { ssh_config_path }, Start::IfNeeded, generic).await
        }
        HiveVerb::Logs { on, log, follow } => {
            if on.hive != HiveId::localhost() {
                return Err(Failure::usage(format!("hive `{}` keeps its log on its own machine", on.hive))
                    .hint("run `rbee hive logs` there"));
            }
            logs(context, &context.log_file("hive"), log.tail, follow).await
        }
    }
}

/// A hive answers with its view or with what it says of itself.
fn hive_status(hive: &str, value: &Value) -> String {
    match serde_json::from_value::<InfoReply>(value.clone()) {
        Ok(info) => {
            let url = value.get("url").and_then(Value::as_str).unwrap_or_default();
            format!("hive {hive} answers\n\n{}", render::info(url, &info))
        }
        Err(_) if value.is_object() => render::hive(value),
        Err(_) => format!("hive {hive} answers\n"),
    }
}

fn host(on: OnHive) -> OfHost {
    OfHost { alias: on.hive }
}

/// Through the queen where one answers, else at this machine's hive itself.
async fn stop_hive(context: &Context, on: OnHive) -> Result<Outcome, Failure> {
    let is_local = on.hive == HiveId::localhost() && context.queen.loopback;
    let hive = if is_local { connect::local_hive(context).await } else { None };
    let process = hive.as_ref().and_then(|(_, info)| Running::of("hive", info.pid));
    let value = match (call(context, Start::Never, &JobRequest::HiveStop(host(on.clone()))).await, &hive) {
        (Ok(values), _) => the_one(values),
        (Err(failure), Some((client, _))) if failure.exit == Exit::Unreachable => {
            connect::asked_to_stop(client.shutdown().await)?;
            json!({ "stopped": [{ "program": "hive", "pid": process.as_ref().map(|process| process.pid) }] })
        }
        (Err(failure), _) => return Err(failure),
    };
    all_gone(context, process.as_slice()).await?;
    Ok(Shown::new(value, format!("hive {} is stopped\n", on.hive)).into())
}

/// The end of a log file, and what is added to it where wanted.
async fn logs(context: &Context, path: &Path, lines: usize, follow: bool) -> Result<Outcome, Failure> {
    use std::io::{Read, Seek, SeekFrom, Write};
    let missing = |error: std::io::Error| {
        Failure::new(Exit::Failed, format!("cannot read the log {}: {error}", path.display()))
            .hint("it is written once the daemon was started by `rbee`")
    };
    let mut file = std::fs::File::open(path).map_err(missing)?;
    let length = file.metadata().map_err(missing)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES))).map_err(missing)?;
    let mut bytes = Vec::new();
    (&file).take(LOG_BYTES).read_to_end(&mut bytes).map_err(missing)?;
    let text = tail(&String::from_utf8_lossy(&bytes), lines);
    let shown = Shown::new(json!({ "path": path, "lines": text.lines().collect::<Vec<_>>() }), text);
    if !follow {
        return Ok(shown.into());
    }
    if context.printer.data == Data::Json {
        return Err(Failure::usage("a log that goes on is no JSON document: leave out --json or --follow"));
    }
    context.printer.show(&shown)?;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut more = Vec::new();
        (&file).take(LOG_BYTES).read_to_end(&mut more).map_err(missing)?;
        if more.is_empty() {
            // After a rotation the path names another, shorter file.
            let at = file.stream_position().map_err(missing)?;
            if std::fs::metadata(path).is_ok_and(|now| now.len() < at) {
                file = std::fs::File::open(path).map_err(missing)?;
            }
            continue;
        }
        let mut out = std::io::stdout().lock();
        out.write_all(&more).and_then(|()| out.flush()).map_err(stdout_failure)?;
    }
}
