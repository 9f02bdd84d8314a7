//! The hive's jobs: its own operations, carried out one task each, told through a log.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rbee_catalog::CancellationToken;
use rbee_service::{JobLog, Shutdown, random_hex};
use rbee_wire::event::{Done, Event};
use rbee_wire::hive::{Process, ProcessState};
use rbee_wire::op::{Built, Target};
use rbee_wire::view::BinaryView;
use rbee_wire::{ErrorBody, ErrorCode, Incarnation, JobId, JobRequest, ModelRef, WorkerId};

use crate::spawn::Spawner;

/// Jobs whose logs are kept.
const MAX_KEPT: usize = 256;

/// Most time that a worker which is to be ended may take for what it has.
const DELETE_GRACE: Duration = Duration::from_secs(30);

/// A job's log under its id.
type Kept = (JobId, Arc<JobLog>);

/// A job that was taken.
pub struct Posted {
    /// Its id.
    pub id: JobId,
    /// What it tells.
    pub log: Arc<JobLog>,
    /// Ends a download that it waits for, unless others wait for that too.
    pub stop: CancellationToken,
}

/// The hive's jobs; cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    /// Starts workers.
    pub spawner: Arc<Spawner>,
    /// This life of the hive.
    pub incarnation: Incarnation,
    /// The hive's end.
    pub shutdown: Shutdown,
    kept: Arc<Mutex<VecDeque<Kept>>>,
}

impl Jobs {
    /// No jobs yet.
    pub fn new(spawner: Arc<Spawner>, incarnation: Incarnation, shutdown: Shutdown) -> Self {
        Self { spawner, incarnation, shutdown, kept: Arc::default() }
    }

    /// Takes a job and begins it.
    ///
    /// # Errors
    /// `DRAINING` once the hive ends, `INVALID_REQUEST` for operations that are the queen's.
    pub fn post(&self, request: JobRequest) -> Result<Posted, ErrorBody> {
        if self.shutdown.is_begun() {
            return Err(ErrorBody::new(ErrorCode::Draining, "this hive is about to stop"));
        }
        let row = request.operation().row();
        if row.target != Target::Hive {
            let message = format!("`{}` is an operation of the queen", row.name);
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message).with_hint("post it to the queen"));
        }
        let id = JobId::of(&self.incarnation, &random_hex(16));
        let log = Arc::new(JobLog::default());
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.pop_front();
        }
        kept.push_back((id.clone(), Arc::clone(&log)));
        drop(kept);
        let (jobs, told, stop) = (self.clone(), Arc::clone(&log), CancellationToken::new());
        let stopped = stop.clone();
        tokio::spawn(async move {
            let end = match row.built {
                Built::No => {
                    let message = format!("`{}` is not built yet", row.name);
                    Err(ErrorBody::new(ErrorCode::NotImplemented, message))
                }
                Built::Yes => jobs.run(request, &told, &stopped).await,
            };
            told.push(&match end {
                Ok(()) => Event::Done(Done::default()),
                Err(error) => Event::Error(error),
            });
        });
        Ok(Posted { id, log, stop })
    }

    /// The log of a job.
    ///
    /// # Errors
    /// `QUEEN_RESTARTED` is never said here: a hive's jobs end with it, and are `JOB_NOT_FOUND` afterwards.
    pub fn log(&self, id: &str) -> Result<Arc<JobLog>, ErrorBody> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().find(|(job, _)| job.as_str() == id).map(|(_, log)| Arc::clone(log));
        let shown: String = id.chars().take(64).collect();
        found.ok_or_else(|| {
            ErrorBody::new(ErrorCode::JobNotFound, format!("no job `{}` is kept here", shown.escape_debug()))
        })
    }

    async fn run(&self, request: JobRequest, log: &JobLog, stop: &CancellationToken) -> Result<(), ErrorBody> {
        let (supervisor, models) = (&self.spawner.supervisor, &self.spawner.models);
        let tell = |event: Event| {
            log.push(&event);
        };
        match request {
            JobRequest::WorkerSpawn(spawn) => {
                let views = self.spawner.ensure(&spawn, &tell, stop).await?;
                for view in views {
                    log.push(&Event::data(&view));
                }
            }
            JobRequest::ModelPlan(plan) => {
                log.push(&Event::data(&self.spawner.plan(&plan, &tell, stop).await?));
            }
            JobRequest::ModelDownload(of) => {
                if !matches!(of.model, ModelRef::Hub { .. }) {
                    let message = format!("{} is not a model of the hub", of.model);
                    return Err(ErrorBody::new(ErrorCode::ModelNotFound, message)
                        .with_hint("models of the hub are named org/name; `rbee model import` takes a folder"));
                }
                let local = models.bring(&of.model, &tell, stop).await?;
                log.push(&Event::data(&models.answer(&local)));
            }
            JobRequest::ModelList(_) => {
                for model in models.list().await? {
                    log.push(&Event::data(&model));
                }
            }
            JobRequest::ModelGet(of) => {
                log.push(&Event::data(&models.get(&of.id).await?));
            }
            JobRequest::ModelDelete(of) => {
                log.push(&Event::data(&models.delete(&of.id).await?));
            }
            JobRequest::ModelImport(import) => {
                log.push(&Event::data(&models.import(&import).await?));
            }
            JobRequest::WorkerProcessList(_) => {
                for process in supervisor.list() {
                    log.push(&Event::data(&process));
                }
            }
            JobRequest::WorkerProcessGet(of) => {
                log.push(&Event::data(&self.process(of.pid)?));
            }
            JobRequest::WorkerProcessDelete(of) => {
                let process = self.process(of.pid)?;
                self.end_worker(&process.worker_id, log).await;
                log.push(&Event::data(&supervisor.get(&process.worker_id).unwrap_or(process)));
            }
            JobRequest::WorkerBinaryList(_) => {
                log.push(&Event::data(&self.binary()?));
            }
            JobRequest::WorkerBinaryGet(of) => {
                let binary = self.binary()?;
                if of.worker_type != binary.worker_type {
                    let message = format!(
                        "this hive has no `{}` worker; it has `{}`",
                        of.worker_type.escape_debug(),
                        binary.worker_type
                    );
                    return Err(ErrorBody::new(ErrorCode::WorkerNotFound, message)
                        .with_hint("`rbee worker binary list` shows what there is"));
                }
                log.push(&Event::data(&binary));
            }
            other => {
                let message = format!("`{}` is not built yet", other.operation().name());
                return Err(ErrorBody::new(ErrorCode::NotImplemented, message));
            }
        }
        Ok(())
    }

    /// Lets a worker finish, then waits until it is gone.
    async fn end_worker(&self, worker: &WorkerId, log: &JobLog) {
        let supervisor = &self.spawner.supervisor;
        supervisor.drain(worker, DELETE_GRACE);
        let detail = Some(worker.to_string());
        log.push(&Event::Progress {
            stage: "drain".into(),
            done: 0,
            total: 1,
            unit: "workers".into(),
            eta_ms: None,
            detail,
        });
        supervisor.gone(worker, DELETE_GRACE + Duration::from_secs(8)).await;
    }

    /// The hive's own child of this pid: the pid is a key into the hive's table and nothing else.
    fn process(&self, pid: u32) -> Result<Process, ErrorBody> {
        let own = self
            .spawner
            .supervisor
            .list()
            .into_iter()
            .find(|process| process.pid == pid && process.state != ProcessState::Exited);
        own.ok_or_else(|| {
            ErrorBody::new(ErrorCode::ProcessNotFound, format!("no worker of this hive has the pid {pid}"))
        })
    }

    fn binary(&self) -> Result<BinaryView, ErrorBody> {
        let path = &self.spawner.worker;
        let meta = std::fs::metadata(path).map_err(|error| {
            ErrorBody::new(
                ErrorCode::WorkerNotFound,
                format!("the worker's program is not at {}: {error}", path.display()),
            )
            .with_hint("build it again, or run `rbee doctor`")
        })?;
        Ok(BinaryView {
            worker_type: "cpu".into(),
            path: path.display().to_string(),
            size: meta.len(),
            version: format!("{} ({})", env!("CARGO_PKG_VERSION"), rbee_supervisor::build_id(path).unwrap_or_default()),
            devices: vec!["cpu".into()],
        })
    }

    /// Lets all workers finish, at most for so long, then ends them.
    pub async fn end_all(&self, grace: Duration) {
        let supervisor = &self.spawner.supervisor;
        let workers: Vec<WorkerId> = supervisor.list().into_iter().map(|process| process.worker_id).collect();
        for worker in &workers {
            supervisor.drain(worker, grace);
        }
        for worker in &workers {
            if !supervisor.gone(worker, grace + Duration::from_secs(1)).await {
                supervisor.kill(worker);
                supervisor.gone(worker, Duration::from_secs(7)).await;
            }
        }
    }
}
