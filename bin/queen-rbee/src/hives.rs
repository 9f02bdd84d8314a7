//! The hives: starting the local one when it is first needed, and calling any of them.

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rbee_client::{ClientError, HiveClient, WorkerClient};
use rbee_scheduler::{Event as Heard, LoadKey};
use rbee_service::{JobLog, port_holder};
use rbee_supervisor::daemon::{self, DaemonSpec, sibling};
use rbee_wire::event::{Event, NoteLevel};
use rbee_wire::job::{ModelPlan, OfProcess, WorkerSpawn};
use rbee_wire::view::PlanView;
use rbee_wire::worker::{LoadOptions, LoadProgress};
use rbee_wire::{DeviceSpec, ErrorBody, ErrorCode, HiveId, JobRequest, KeepAlive, ModelRef, WorkerId};
use serde_json::Value;

use crate::brain::Brain;

/// Longest time until the local hive listens.
const START: Duration = Duration::from_secs(20);

/// How long after a worker is known its hive may still be about to tell of its process: two of the hive's heartbeats.
const HIVE_TELLS: Duration = Duration::from_secs(2);

/// How often that is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Whether a hive may be started for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The operation needs it.
    IfNeeded,
    /// The operation only looks or stops.
    Never,
}

/// Calls hives and starts the local one.
pub struct Hives {
    /// Where the local hive listens.
    pub bind: SocketAddr,
    /// This queen's own address, for the hive's heartbeats.
    pub queen_url: String,
    /// What hives of this home show.
    pub home_proof: String,
    /// The home's `run/`.
    pub run: PathBuf,
    /// The home's `state/`.
    pub state: PathBuf,
    /// The bearer that hives ask for.
    pub token: Option<String>,
    /// One start at a time; holds the local hive's address once it is known.
    pub local: tokio::sync::Mutex<Option<String>>,
}

fn unreachable(hive: &HiveId, what: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(ErrorCode::HiveUnreachable, format!("hive {hive} does not answer: {what}"))
}

impl Hives {
    /// A client of a hive, started if it is the local one and may be.
    ///
    /// # Errors
    /// `HIVE_UNKNOWN`, `HIVE_UNREACHABLE`, or what kept the local one from starting.
    pub async fn client(&self, brain: &Brain, hive: &HiveId, wake: Wake) -> Result<HiveClient, ErrorBody> {
        let known = brain.fleet().await.hives;
        if let Some(view) = known.iter().find(|view| &view.hive_id == hive && view.alive) {
            let client = HiveClient::new(&view.url, self.token.clone());
            // A hive that was killed a moment ago has not missed its lease yet.
            if client.info().await.is_ok() {
                return Ok(client);
            }
        }
        if *hive != HiveId::localhost() {
            if known.iter().any(|view| &view.hive_id == hive) {
                return Err(unreachable(hive, "its lease has ended"));
            }
            let names: Vec<&str> = known.iter().map(|view| view.hive_id.as_str()).collect();
            let message = format!(
                "there is no hive `{hive}`; there is {}",
                if names.is_empty() { "none".into() } else { names.join(", ") }
            );
            return Err(ErrorBody::new(ErrorCode::HiveUnknown, message));
        }
        let mut local = self.local.lock().await;
        let at = local.clone().unwrap_or_else(|| format!("http://{}", self.bind));
        let client = HiveClient::new(&at, self.token.clone());
        match client.info().await {
            Ok(info) if info.home_proof.as_deref() == Some(&self.home_proof) => return Ok(client),
            Err(ClientError::Unreachable { .. }) if wake == Wake::IfNeeded => {}
            Err(error @ ClientError::Unreachable { .. }) => return Err(unreachable(hive, error)),
            other => {
                let who = port_holder(self.bind);
                let what = match other {
                    Ok(info) => format!("it is {} of another home", info.program),
                    Err(error) => error.to_string(),
                };
                let message =
                    format!("{who} has the address of this home's hive, {}, and is not that hive: {what}", self.bind);
                return Err(ErrorBody::new(ErrorCode::HiveUnreachable, message)
                    .with_hint("give the hive another address with RBEE_HIVE_BIND, or hive_bind in config.toml"));
            }
        }
        let url = self.start().await?;
        *local = Some(url.clone());
        Ok(HiveClient::new(&url, self.token.clone()))
    }

    async fn start(&self) -> Result<String, ErrorBody> {
        let program = sibling("rbee-hive").map_err(|error| {
            ErrorBody::new(ErrorCode::Internal, format!("the hive's program is not known: {error}"))
        })?;
        let spec = DaemonSpec {
            program,
            args: vec!["--queen".into(), self.queen_url.clone(), "--bind".into(), self.bind.to_string()],
            env: Vec::new(),
            lock: self.run.join("hive.start"),
            log: self.state.join("hive.out.log"),
            limit: START,
        };
        let bind = self.bind;
        let there = move || bind.port() != 0 && TcpStream::connect_timeout(&bind, Duration::from_secs(1)).is_ok();
        tracing::info!("starting the local hive");
        match tokio::task::spawn_blocking(move || daemon::start(&spec, there)).await {
            Ok(Ok(daemon::Start::Started(url))) => Ok(url),
            Ok(Ok(daemon::Start::There)) => Ok(format!("http://{bind}")),
            Ok(Err(error)) => Err(ErrorBody::new(ErrorCode::HiveUnreachable, error.message)
                .with_hint(error.hint.unwrap_or_else(|| "`rbee hive logs` shows why".into()))),
            Err(error) => Err(ErrorBody::new(ErrorCode::Internal, format!("starting the hive was cut short: {error}"))),
        }
    }

    /// What a load needs, and what the devices of its hive have.
    ///
    /// # Errors
    /// When the model cannot be used there, or the hive does not answer.
    pub async fn plan(&self, brain: &Brain, load: &LoadKey) -> Result<PlanView, ErrorBody> {
        let hive_id = load.hive.clone().unwrap_or_else(HiveId::localhost);
        let client = self.client(brain, &hive_id, Wake::IfNeeded).await?;
        let plan = ModelPlan {
            hive_id: hive_id.clone(),
            model: load.model.clone(),
            device: load.device,
            fetch: true,
            load: LoadOptions::default(),
        };
        let mut answer = None;
        self.follow(brain, &client, &JobRequest::ModelPlan(plan), &load.model, |value| answer = Some(value)).await?;
        let wrong =
            |what: &str| ErrorBody::new(ErrorCode::Internal, format!("hive {hive_id} answered a plan with {what}"));
        serde_json::from_value(answer.ok_or_else(|| wrong("nothing"))?).map_err(|error| wrong(&error.to_string()))
    }

    /// Loads a model on a hive; each step of the load goes to the scheduler.
    ///
    /// # Errors
    /// The hive's refusal or the load's own error.
    pub async fn load(
        &self,
        brain: &Brain,
        hive: &HiveId,
        model: ModelRef,
        device: DeviceSpec,
        keep_alive: KeepAlive,
    ) -> Result<(), ErrorBody> {
        let client = self.client(brain, hive, Wake::IfNeeded).await?;
        let spawn = WorkerSpawn {
            hive_id: hive.clone(),
            model: model.clone(),
            device,
            replicas: None,
            load: LoadOptions::default(),
            wait: Some(true),
            keep_alive: Some(keep_alive),
        };
        self.follow(brain, &client, &JobRequest::WorkerSpawn(spawn), &model, drop).await
    }

    /// Follows a hive's job for a load to its end: its steps go to the scheduler, its results to `take`.
    async fn follow(
        &self,
        brain: &Brain,
        client: &HiveClient,
        job: &JobRequest,
        model: &ModelRef,
        mut take: impl FnMut(Value),
    ) -> Result<(), ErrorBody> {
        let failed = |error: ClientError| error.to_body(ErrorCode::HiveUnreachable);
        let mut events = client.run_job(job).await.map_err(failed)?;
        while let Some(event) = events.next().await {
            match event.map_err(failed)?.event {
                Event::Progress { stage, done, total, unit, .. } => {
                    let progress = LoadProgress { stage, done, total, unit };
                    brain.tell(Heard::LoadProgress { model: model.clone(), progress }).await;
                }
                Event::Data { value } => take(value),
                Event::Error(error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets a worker finish, through its hive, or by itself when no hive has it; what the hive says goes to `log`.
    ///
    /// # Errors
    /// `WORKER_NOT_FOUND`, or that it or its hive does not answer.
    pub async fn retire(&self, brain: &Brain, worker: &WorkerId, log: &JobLog) -> Result<(), ErrorBody> {
        let gone = || ErrorBody::new(ErrorCode::WorkerNotFound, format!("worker {worker} went away"));
        let seen = Instant::now();
        let (view, process) = loop {
            let fleet = brain.fleet().await;
            let view = fleet.workers.into_iter().find(|view| &view.worker_id == worker).ok_or_else(gone)?;
            let Some(hive) = fleet.hives.into_iter().find(|hive| hive.hive_id == view.hive_id) else {
                break (view, None);
            };
            let process = hive.processes.into_iter().find(|process| &process.worker_id == worker && process.pid != 0);
            // A new worker's heartbeat may come before the one in which its hive tells of it.
            if process.is_some() || seen.elapsed() > HIVE_TELLS {
                break (view, process);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        match process {
            Some(process) => {
                let delete =
                    JobRequest::WorkerProcessDelete(OfProcess { hive_id: view.hive_id.clone(), pid: process.pid });
                self.forward(brain, &view.hive_id, &delete, log).await
            }
            None => {
                let bearer = brain.bearer(worker).await.ok_or_else(gone)?;
                let client = WorkerClient::new(&view.url, bearer);
                client.drain().await.map_err(|error| error.to_body(ErrorCode::WorkerLost))?;
                log.push(&Event::note(
                    NoteLevel::Info,
                    "no hive has this worker; it was asked itself to finish and exit",
                ));
                log.push(&Event::data(&view));
                Ok(())
            }
        }
    }

    /// Passes one of a hive's operations on and its events back into the job's log, the end left out.
    ///
    /// # Errors
    /// What the hive said, or that it does not answer.
    pub async fn forward(&self, brain: &Brain, hive: &HiveId, job: &JobRequest, log: &JobLog) -> Result<(), ErrorBody> {
        let wakes = matches!(
            job,
            JobRequest::WorkerSpawn(_)
                | JobRequest::ModelPlan(_)
                | JobRequest::ModelDownload(_)
                | JobRequest::ModelImport(_)
        );
        let wake = if wakes { Wake::IfNeeded } else { Wake::Never };
        let client = self.client(brain, hive, wake).await?;
        let failed = |error: ClientError| error.to_body(ErrorCode::HiveUnreachable);
        let mut events = client.run_job(job).await.map_err(failed)?;
        while let Some(event) = events.next().await {
            let event = event.map_err(failed)?;
            match event.event {
                Event::Error(error) => return Err(error),
                Event::Done(_) => {}
                _ => {
                    log.push_json(&event.json, false);
                }
            }
        }
        Ok(())
    }
}
