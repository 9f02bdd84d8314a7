//! The worker: one loaded model behind HTTP.
//!
//! The server is up before the model is loaded; heartbeats and the control pipe run on threads of their own; the
//! engine computes on one more. Start reading at [`run`].
//!
//! Invariants
//! - `Ready` is said only after a warm-up step has run through the whole engine.
//! - The end of the control pipe ends the process, whatever it is doing.
//! - An engine that fails ends the process with its error told up the pipe.

pub mod args;

mod backend;
mod channels;
mod charge;
mod cores;
mod embeddings;
mod forms;
mod heartbeat;
mod http;
mod inference;
mod memory;
mod status;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use rbee_engine::Ended;
use rbee_service::{Clock, ServeLimits, Shutdown, serve};
use rbee_supervisor::build_id;
use rbee_supervisor::control::WorkerEnd;
use rbee_wire::worker::{ControlDown, ControlUp, WorkerCharge};
use rbee_wire::{ErrorBody, ErrorCode};
use tokio::net::TcpListener;

use crate::args::{Cli, Command};
use crate::status::{Phase, Status};

/// Longest time that what runs may take to finish once the worker is told to stop by a signal.
const DRAIN: Duration = Duration::from_secs(30);

/// The worker's process: arguments in, exit code out.
pub fn program() -> ExitCode {
    let cli = Cli::parse();
    let inspects = cli.command.is_some();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if inspects {
                // The hive reads it from there.
                println!("{}", serde_json::to_string(&error).expect("wire types serialize to JSON"));
            }
            eprintln!("error: {error}");
            if let Some(hint) = &error.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(error.code.exit_code())
        }
    }
}

/// Carries out the command line; returns when the worker has ended in order.
///
/// # Errors
/// Why it did not start or had to end.
pub fn run(cli: Cli) -> Result<(), ErrorBody> {
    if let Some(Command::Inspect { model, sizes }) = &cli.command {
        let needs = backend::inspect(cli.backend, model, &sizes.clone().into())?;
        println!("{}", serde_json::to_string(&needs).expect("plain numbers serialize"));
        return Ok(());
    }
    let end = WorkerEnd::take_inherited().map_err(internal)?;
    rbee_service::logging::init(&cli.log, None).map_err(internal)?;
    let (charge, bind, end) = match end {
        Some(mut end) => {
            let charge = end.charge().map_err(internal)?;
            (charge, SocketAddr::from(([127, 0, 0, 1], 0)), Some(end))
        }
        None => (charge::by_hand(&cli), cli.bind, None),
    };
    if !bind.ip().is_loopback() && end.is_none() {
        tracing::info!("listening beyond loopback; every route but /health asks for the bearer");
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(internal)?;
    let outcome = runtime.block_on(serve_model(&cli, charge, bind, end));
    runtime.shutdown_background();
    outcome
}

fn internal(error: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(ErrorCode::Internal, format!("the worker could not start: {error}"))
}

async fn serve_model(
    cli: &Cli,
    charge: WorkerCharge,
    bind: SocketAddr,
    end: Option<WorkerEnd>,
) -> Result<(), ErrorBody> {
    let shutdown = Shutdown::on_signals().map_err(internal)?;
    let listener = TcpListener::bind(bind).await.map_err(internal)?;
    let address = listener.local_addr().map_err(internal)?;
    let build = build_id(std::path::Path::new("/proc/self/exe")).unwrap_or_default();
    let status = Status::new(charge, format!("http://{address}"), build);
    let router = http::router(status.clone(), Clock::default());
    let server = tokio::spawn(serve(listener, router, ServeLimits::default(), shutdown.now()));

    let end = end.map(Arc::new);
    let tell = |line: ControlUp| {
        if let Some(end) = &end {
            end.send(&line);
        }
    };
    tell(ControlUp::Listening { port: address.port(), nonce: status.charge().nonce.clone() });
    if end.is_none() {
        println!("listening on {}", status.url());
        println!("bearer {}", status.charge().bearer);
    }
    if let Some(end) = &end {
        let status = status.clone();
        // The end of the pipe ends the process: the hive is gone, and nobody would ever stop this worker.
        end.listen(
            move |line| match line {
                ControlDown::Drain { grace_ms } => {
                    tracing::info!(grace_ms, "the hive asks to drain");
                    status.drain();
                }
                ControlDown::Charge(_) => tracing::warn!("a second charge is not listened to"),
            },
            || std::process::exit(0),
        );
    }
    let beats = start_heartbeats(&status, end.clone())?;

    let loading = {
        let (cli, status, end) = (cli.clone(), status.clone(), end.clone());
        tokio::task::spawn_blocking(move || {
            backend::load(&cli, status.charge(), &|progress| {
                status.set(Phase::Loading(progress.clone()));
                if let Some(end) = &end {
                    end.send(&ControlUp::Loading { progress });
                }
            })
        })
    };
    let loaded = tokio::select! {
        loaded = loading => loaded.unwrap_or_else(|_| Err(ErrorBody::new(ErrorCode::ModelLoadFailed, "the load panicked"))),
        () = shutdown.begun() => Err(ErrorBody::new(ErrorCode::Draining, "the worker was stopped while it loaded")),
    };
    let outcome = match loaded {
        Ok(loaded) => {
            let loaded = Arc::new(loaded);
            let memory = status::measured(loaded.facts.memory);
            status.set(Phase::Serving(Arc::clone(&loaded)));
            tracing::info!(model = %status.model(), weights = memory.weights, kv = memory.kv, "ready");
            tell(ControlUp::Ready { memory });
            until_end(&status, &loaded, &shutdown).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        tracing::error!(code = %error.code, error = error.message, "the worker ends");
        tell(ControlUp::Failed { error: error.clone() });
    }
    status.set(Phase::Stopped);
    shutdown.end_now();
    let _ = tokio::time::timeout(Duration::from_secs(3), server).await;
    // The last heartbeat deregisters; a queen that does not answer must not hold the exit up.
    let _ = tokio::task::spawn_blocking(move || beats.join()).await;
    outcome
}

fn start_heartbeats(status: &Status, end: Option<Arc<WorkerEnd>>) -> Result<std::thread::JoinHandle<()>, ErrorBody> {
    let status = status.clone();
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || {
            let up = |steps, working| {
                if let Some(end) = &end {
                    end.send(&ControlUp::Beat { steps, working });
                }
            };
            if let Err(error) = heartbeat::run(&status, &up) {
                tracing::error!(%error, "no heartbeats: the worker ends");
                std::process::exit(1);
            }
        })
        .map_err(internal)
}

/// Waits for the end: of a drain, of the engine, or of the patience with either.
async fn until_end(status: &Status, loaded: &backend::Loaded, shutdown: &Shutdown) -> Result<(), ErrorBody> {
    let ended = tokio::select! {
        ended = loaded.engine.ended() => ended,
        () = shutdown.begun() => {
            status.drain();
            tokio::select! {
                ended = loaded.engine.ended() => ended,
                () = tokio::time::sleep(DRAIN) => Ended::ShutDown,
                () = shutdown.now().cancelled_owned() => Ended::ShutDown,
            }
        }
    };
    match ended {
        Ended::Drained | Ended::ShutDown => Ok(()),
        Ended::Dead(error) => Err(inference::engine_error(&error)),
    }
}
