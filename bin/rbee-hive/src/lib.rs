//! The hive: devices and workers of one machine.
//!
//! The hive alone decides what its devices can take: a load is a reservation, made one at a time in [`spawn`]. Its
//! workers are in the hands of `rbee-supervisor`. Start reading at [`run`].

pub mod args;

mod devices;
mod heartbeat;
mod http;
mod incarnation;
mod jobs;
mod models;
mod rooms;
mod spawn;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rbee_config::{Home, Overrides, Settings};
use rbee_service::logging::{self, LogFile};
use rbee_service::{Clock, Guard, ServeLimits, Shutdown, bind, serve};
use rbee_supervisor::{Supervisor, build_id, daemon};
use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::{ErrorBody, ErrorCode, routes};

use crate::args::Cli;
use crate::devices::Devices;
use crate::http::Api;
use crate::incarnation::Incarnations;
use crate::jobs::Jobs;
use crate::models::Models;
use crate::spawn::Spawner;

/// Bytes of one log file.
const MAX_LOG: u64 = 8 << 20;

fn failed(what: &str, error: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(ErrorCode::Internal, format!("rbee-hive cannot start: {what}: {error}"))
}

/// Runs the hive until it is told to stop.
///
/// # Errors
/// What keeps it from starting.
pub fn run(cli: Cli) -> Result<(), ErrorBody> {
    let env = |name: &str| std::env::var(name).ok();
    let home = Home::from_env(&env).map_err(|error| failed("its folders", error))?;
    home.create().map_err(|error| failed("its folders", error))?;
    let mut flags = Overrides::default();
    flags.set("hive_bind", cli.bind);
    flags.set("queen_url", cli.queen.as_ref());
    flags.set("log", cli.log.as_ref());
    let settings = Settings::load(&home, &flags, &env).map_err(|error| failed("its settings", error))?;
    let log = LogFile::open(&home.state.join("hive.log"), MAX_LOG).map_err(|error| failed("its log", error))?;
    logging::init(&settings.log.value, Some(log)).map_err(|error| failed("its log", error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failed("its threads", error))?;
    let outcome = runtime.block_on(serve_hive(&cli, &home, settings));
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// The worker's program for GPUs: beside this one, or where `cargo xtask cuda build` leaves it in a tree that this one was built in.
fn cuda_worker() -> Option<PathBuf> {
    let beside = daemon::sibling("llm-worker-rbee-cuda").ok()?;
    let built = daemon::sibling("../cuda/llm-worker-rbee-cuda").ok()?;
    Some(if beside.is_file() { beside } else { built })
}

async fn serve_hive(cli: &Cli, home: &Home, settings: Settings) -> Result<(), ErrorBody> {
    let address = settings.hive_bind.value;
    let token = settings.token.value.clone();
    if !address.ip().is_loopback() && token.is_none() {
        let message = format!("rbee-hive does not listen on {address} without a token");
        return Err(
            ErrorBody::new(ErrorCode::InvalidRequest, message).with_hint("set RBEE_TOKEN, or listen on 127.0.0.1")
        );
    }
    let lock = daemon::try_lock(&home.run.join("hive.lock")).map_err(|error| failed("its lock", error))?;
    let _lock = lock.map_err(|holder| {
        let message = format!("a hive of this home runs already: {holder}");
        ErrorBody::new(ErrorCode::Internal, message)
            .with_hint("`rbee hive stop` ends it; another RBEE_HOME lives beside it")
    })?;
    let listener = bind(address, "rbee-hive", "free that port, or give another with --bind or RBEE_HIVE_BIND").await?;
    let address = listener.local_addr().map_err(|error| failed("its address", error))?;
    let shutdown = Shutdown::on_signals().map_err(|error| failed("its signals", error))?;
    let incarnations = Arc::new(Incarnations::open(&home.state.join("hive.lives")));
    let incarnation = incarnations.next();
    let supervisor = Supervisor::new(&home.state.join("workers"), &home.run.join("workers"))
        .map_err(|error| failed("its folders", error))?;
    let worker = daemon::sibling("llm-worker-rbee").map_err(|error| failed("its worker's program", error))?;
    let mut options = rbee_catalog::Options::from_env(&|name| std::env::var(name).ok())
        .map_err(|error| failed("the store of models", error))?;
    options.disk_budget = Some(settings.disk_budget_bytes.value).filter(|bytes| *bytes > 0);
    options.trusted_origins = settings
        .hub_mirrors
        .value
        .iter()
        .map(|origin| rbee_catalog::Url::parse(origin))
        .collect::<Result<_, _>>()
        .map_err(|error| failed("its setting hub_mirrors", error))?;
    let models = Models::new(rbee_catalog::Store::new(options), cli.hive_id.clone(), supervisor.clone());
    tokio::spawn(models.clone().keep_known());
    let devices = Arc::new(Devices::discover(cuda_worker()));
    let build = build_id(std::path::Path::new("/proc/self/exe")).unwrap_or_default();
    let spawner = Arc::new(Spawner {
        hive_id: cli.hive_id.clone(),
        queen_url: settings.queen_url.value.clone(),
        queen_token: token.clone(),
        worker,
        worker_args: cli.worker_args.split_whitespace().map(str::to_owned).collect(),
        cores: home.run.join("cores").to_str().map(str::to_owned),
        slots: settings.slots.value,
        cpu_memory: Some(settings.cpu_memory_bytes.value).filter(|bytes| *bytes > 0),
        incarnations,
        devices: Arc::clone(&devices),
        models: models.clone(),
        supervisor: supervisor.clone(),
        asked: Mutex::default(),
        reserving: tokio::sync::Mutex::default(),
    });
    let jobs = Jobs::new(spawner, incarnation.clone(), shutdown.clone());
    let api = Api {
        jobs: jobs.clone(),
        clock: Clock::default(),
        home_proof: home.proof().map_err(|error| failed("its nonce", error))?,
        build: build.clone(),
    };
    let server = tokio::spawn(serve(
        listener,
        http::router(api, Guard::of(token.as_deref(), routes::HIVE)),
        ServeLimits { connections: 1024, ..ServeLimits::default() },
        shutdown.now(),
    ));
    let url = format!("http://{address}");
    let beat = HiveHeartbeat {
        protocol: rbee_wire::PROTOCOL,
        hive_id: cli.hive_id.clone(),
        incarnation,
        seq: 0,
        url: url.clone(),
        devices: Vec::new(),
        models: Vec::new(),
        downloads: Vec::new(),
        processes: Vec::new(),
        version: env!("CARGO_PKG_VERSION").into(),
        build,
    };
    heartbeat::start(beat, settings.queen_url.value.clone(), token, devices, models, supervisor)
        .map_err(|error| failed("its heartbeat", error))?;
    tracing::info!(%url, "listening");
    daemon::announce_ready(&url);

    shutdown.begun().await;
    tracing::info!("draining");
    tokio::select! {
        () = jobs.end_all(Duration::from_millis(settings.drain_ms.value)) => {}
        () = shutdown.now().cancelled_owned() => {}
    }
    shutdown.end_now();
    let _ = server.await;
    tracing::info!("stopped");
    Ok(())
}
