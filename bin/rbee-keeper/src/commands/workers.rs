//! `worker …`: what hives do, asked for through the queen.

use rbee_client::{ClientError, HiveClient};
use rbee_wire::job::{OfBinary, OfProcess, OfWorker, OnHive as AtHive, WorkerSpawn};
use rbee_wire::view::StatusView;
use rbee_wire::worker::LoadOptions;
use rbee_wire::{HiveId, JobRequest, WorkerId};
use serde_json::{Value, json};

use super::infer::model_ref;
use super::{call, tail, the_one};
use crate::cli::{BinaryArgs, BinaryVerb, OnHive, ProcessArgs, ProcessVerb, SpawnArgs, WorkerVerb};
use crate::connect::{self, Start};
use crate::exit::{Exit, Failure};
use crate::printer::{Outcome, Shown};
use crate::render;
use crate::settings::Context;

/// Most bytes of a worker's output that are asked for.
const LOG_BYTES: u64 = 4 << 20;

pub(crate) async fn worker(context: &Context, verb: WorkerVerb) -> Result<Outcome, Failure> {
    match verb {
        WorkerVerb::Spawn(args) => spawn(context, args).await,
        WorkerVerb::List => list(context, Start::Never, JobRequest::ActiveWorkerList {}, render::workers).await,
        WorkerVerb::Get(args) => {
            let job = JobRequest::ActiveWorkerGet(OfWorker { worker_id: args.worker_id });
            one(context, Start::Never, job, render::worker).await
        }
        WorkerVerb::Retire(args) => {
            let text = format!("{} retires\n", args.worker_id);
            let job = JobRequest::ActiveWorkerRetire(OfWorker { worker_id: args.worker_id });
            one(context, Start::Never, job, |_| text.clone()).await
        }
        WorkerVerb::Logs { worker, hive, log } => logs(context, &worker.worker_id, hive, log.tail).await,
        WorkerVerb::Binary(verb) => binary(context, verb).await,
        WorkerVerb::Process(verb) => process(context, verb).await,
    }
}

pub(super) async fn list(
    context: &Context,
    start: Start,
    job: JobRequest,
    text: impl FnOnce(&[Value]) -> String,
) -> Result<Outcome, Failure> {
    let values = call(context, start, &job).await?;
    let text = text(&values);
    Ok(Shown::new(Value::Array(values), text).into())
}

pub(super) async fn one(
    context: &Context,
    start: Start,
    job: JobRequest,
    text: impl FnOnce(&Value) -> String,
) -> Result<Outcome, Failure> {
    let value = the_one(call(context, start, &job).await?);
    let text = text(&value);
    Ok(Shown::new(value, text).into())
}

async fn spawn(context: &Context, args: SpawnArgs) -> Result<Outcome, Failure> {
    let job = JobRequest::WorkerSpawn(WorkerSpawn {
        hive_id: args.on.hive,
        model: model_ref(&args.model, context.user.as_deref())?,
        device: args.device,
        replicas: args.replicas,
        load: LoadOptions {
            ctx: args.ctx,
            slots: args.slots,
            threads: args.threads,
            kv_type: args.kv_type,
            quantize: args.quantize,
        },
        wait: Some(!args.no_wait),
        keep_alive: args.keep_alive,
    });
    let values = call(context, Start::IfNeeded, &job).await?;
    for value in &values {
        if let Some(note) = render::spawn_note(value) {
            context.printer.note(&note);
        }
    }
    let text = render::spawned(&values);
    let json = if values.len() == 1 { the_one(values) } else { Value::Array(values) };
    Ok(Shown::new(json, text).into())
}

async fn binary(context: &Context, verb: BinaryVerb) -> Result<Outcome, Failure> {
    let of = |args: BinaryArgs| OfBinary { hive_id: args.on.hive, worker_type: args.worker_type };
    match verb {
        BinaryVerb::List(on) => {
            list(context, Start::Never, JobRequest::WorkerBinaryList(at(on)), render::binaries).await
        }
        BinaryVerb::Get(args) => {
            one(context, Start::Never, JobRequest::WorkerBinaryGet(of(args)), render::binary).await
        }
        BinaryVerb::Delete(args) => {
            list(context, Start::IfNeeded, JobRequest::WorkerBinaryDelete(of(args)), render::any).await
        }
        BinaryVerb::Download(args) => {
            list(context, Start::IfNeeded, JobRequest::WorkerDownload(of(args)), render::any).await
        }
        BinaryVerb::Build(args) => list(context, Start::IfNeeded, JobRequest::WorkerBuild(of(args)), render::any).await,
    }
}

async fn process(context: &Context, verb: ProcessVerb) -> Result<Outcome, Failure> {
    let of = |args: ProcessArgs| OfProcess { hive_id: args.on.hive, pid: args.pid };
    match verb {
        ProcessVerb::List(on) => {
            list(context, Start::Never, JobRequest::WorkerProcessList(at(on)), render::processes).await
        }
        ProcessVerb::Get(args) => {
            one(context, Start::Never, JobRequest::WorkerProcessGet(of(args)), render::process).await
        }
        ProcessVerb::Delete(args) => {
            let text = format!("process {} is ended\n", args.pid);
            one(context, Start::Never, JobRequest::WorkerProcessDelete(of(args)), |_| text.clone()).await
        }
    }
}

pub(super) fn at(on: OnHive) -> AtHive {
    AtHive { hive_id: on.hive }
}

/// The worker's captured output, from the hive that has it. Without a queen this machine's hive is asked.
async fn logs(context: &Context, worker: &WorkerId, hive: Option<HiveId>, lines: usize) -> Result<Outcome, Failure> {
    let client = match connect::queen(context, Start::Never).await {
        Ok(queen) => {
            let status: StatusView =
                serde_json::from_value(the_one(crate::follow::call(context, &queen, &JobRequest::Status {}).await?))
                    .map_err(|error| ClientError::Protocol {
                        url: context.queen.url.clone(),
                        problem: error.to_string(),
                    })?;
            hive_of(context, &status, worker, hive)?
        }
        Err(failure) if failure.exit == Exit::Unreachable && context.queen.loopback && hive.is_none() => {
            connect::local_hive(context).await.ok_or(failure)?.0
        }
        Err(failure) => return Err(failure),
    };
    let text = tail(&client.worker_logs(worker, LOG_BYTES).await?, lines);
    Ok(Shown::new(json!({ "worker_id": worker, "lines": text.lines().collect::<Vec<_>>() }), text).into())
}

fn hive_of(
    context: &Context,
    status: &StatusView,
    worker: &WorkerId,
    named: Option<HiveId>,
) -> Result<HiveClient, Failure> {
    let active = || status.workers.iter().find(|view| view.worker_id == *worker).map(|view| view.hive_id.clone());
    let process = || {
        let has = |hive: &&rbee_wire::view::HiveView| hive.processes.iter().any(|process| process.worker_id == *worker);
        status.hives.iter().find(has).map(|hive| hive.hive_id.clone())
    };
    let id = named.or_else(active).or_else(process).unwrap_or_else(HiveId::localhost);
    match status.hives.iter().find(|hive| hive.hive_id == id) {
        Some(hive) => Ok(context.hive_client(&hive.url)),
        None => Err(Failure::new(Exit::NothingServes, format!("no hive `{id}` that could have the log of {worker}"))
            .hint("`rbee hive list` shows the hives")),
    }
}
