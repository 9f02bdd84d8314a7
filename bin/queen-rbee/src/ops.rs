//! The queen's own operations but `infer`, which the scheduler has.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rbee_scheduler::Event as Heard;
use rbee_service::JobLog;
use rbee_wire::event::{Done, Event};
use rbee_wire::job::OfWorker;
use rbee_wire::key::KeyView;
use rbee_wire::op::Built;
use rbee_wire::view::{HiveView, InfoReply, LoadedView, StatusView, WorkerView};
use rbee_wire::{ErrorBody, ErrorCode, HiveId, JobRequest, ModelRef};

use crate::brain::Brain;
use crate::hives::{Hives, Wake};
use crate::jobs::{Job, Jobs};
use crate::keys::Keys;

/// What operations work with; cheap to clone.
#[derive(Clone)]
pub struct Operations {
    /// The fleet.
    pub brain: Brain,
    /// The hives.
    pub hives: Arc<Hives>,
    /// The jobs.
    pub jobs: Jobs,
    /// The keys.
    pub keys: Keys,
    /// What this queen says of itself, but for its uptime.
    pub info: InfoReply,
}

/// Longest wait for a hive that was just started to be heard of, or for one that was stopped to be gone.
const SETTLE: Duration = Duration::from_secs(10);

/// A worker as an answer to `model_unload`.
fn loaded(worker: &WorkerView) -> LoadedView {
    LoadedView {
        worker_id: worker.worker_id.clone(),
        hive_id: worker.hive_id.clone(),
        model: worker.model.clone(),
        device: worker.device.clone(),
    }
}

impl Operations {
    /// What this queen says of itself now.
    pub fn info(&self) -> InfoReply {
        let uptime_ms = u64::try_from(self.jobs.now().as_millis()).unwrap_or(u64::MAX);
        InfoReply { uptime_ms, ..self.info.clone() }
    }

    /// Carries a job out and ends it.
    pub async fn run(self, job: Arc<Job>) {
        let row = job.request.operation().row();
        let stop = job.next_stop();
        // Who cancelled it before had no hold on this attempt.
        if job.log.is_over() {
            return;
        }
        let outcome = match row.built {
            Built::No => Err(ErrorBody::new(ErrorCode::NotImplemented, format!("`{}` is not built yet", row.name))),
            Built::Yes => tokio::select! {
                outcome = self.carry_out(&job) => outcome,
                // It has ended already.
                () = stop.cancelled() => return,
            },
        };
        match outcome {
            Ok(()) => job.finish(self.jobs.now(), Done::default()),
            Err(error) => job.fail(self.jobs.now(), error),
        }
    }

    async fn carry_out(&self, job: &Job) -> Result<(), ErrorBody> {
        let log = &job.log;
        if let Some(hive) = job.request.hive_id() {
            return self.hives.forward(&self.brain, hive, &job.request, log).await;
        }
        match &job.request {
            JobRequest::Status {} => {
                let fleet = self.brain.fleet().await;
                log.push(&Event::data(&StatusView {
                    queen: self.info(),
                    hives: fleet.hives,
                    workers: fleet.workers,
                    queued: fleet.queued,
                    running: fleet.running,
                }));
            }
            JobRequest::ActiveWorkerList {} => {
                for worker in self.brain.fleet().await.workers {
                    log.push(&Event::data(&worker));
                }
            }
            JobRequest::ActiveWorkerGet(of) => {
                log.push(&Event::data(&self.worker(of).await?));
            }
            JobRequest::ActiveWorkerRetire(of) => self.retire(of, job).await?,
            JobRequest::HiveList {} => {
                for hive in self.brain.fleet().await.hives {
                    log.push(&Event::data(&hive));
                }
            }
            JobRequest::HiveGet(of) => {
                log.push(&Event::data(&self.hive(&of.alias).await?));
            }
            JobRequest::HiveStatus(of) => {
                let info = self.hives.client(&self.brain, &of.alias, Wake::Never).await?.info().await;
                log.push(&Event::data(&info.map_err(|error| error.to_body(ErrorCode::HiveUnreachable))?));
            }
            JobRequest::HiveStart(of) => {
                self.hives.client(&self.brain, &of.alias, Wake::IfNeeded).await?;
                log.push(&Event::data(&self.settled(&of.alias).await?));
            }
            JobRequest::HiveStop(of) => self.stop(&of.alias, job).await?,
            JobRequest::HiveRefreshCapabilities(of) => {
                // A hive looks at its devices with every heartbeat; the next one is the answer.
                self.hives.client(&self.brain, &of.alias, Wake::Never).await?;
                let before = self.hive(&of.alias).await?.age_ms;
                tracing::debug!(before, "waiting for the next heartbeat");
                tokio::time::sleep(Duration::from_millis(1050)).await;
                log.push(&Event::data(&self.settled(&of.alias).await?));
            }
            JobRequest::ModelUnload(of) => self.unload(&of.model, job).await?,
            JobRequest::KeyCreate(new) => {
                let new = new.clone();
                let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                let made = self.with_keys(move |keys| keys.create(new, created)).await?;
                log.push(&Event::data(&made));
            }
            JobRequest::KeyList {} => {
                for key in self.keys.list() {
                    log.push(&Event::data(&key));
                }
            }
            JobRequest::KeyRevoke(of) => {
                let id = of.key_id.clone();
                let revoked = self.with_keys(move |keys| keys.revoke(&id)).await;
                // It is closed even where the file could not be written.
                for job in
                    self.jobs.open().iter().filter(|job| job.key.as_ref().is_some_and(|key| *key.id() == of.key_id))
                {
                    if job.request.operation().can_be_cancelled() {
                        self.cancel(job, "its key was revoked").await;
                    }
                }
                log.push(&Event::data(&revoked?));
            }
            other => {
                let message = format!("`{}` is not built yet", other.operation().name());
                return Err(ErrorBody::new(ErrorCode::NotImplemented, message));
            }
        }
        Ok(())
    }

    /// Runs what changes the keys, which waits for the disk.
    async fn with_keys(
        &self,
        change: impl FnOnce(&Keys) -> Result<KeyView, ErrorBody> + Send + 'static,
    ) -> Result<KeyView, ErrorBody> {
        let keys = self.keys.clone();
        tokio::task::spawn_blocking(move || change(&keys)).await.unwrap_or_else(|error| {
            Err(ErrorBody::new(ErrorCode::Internal, format!("the change was cut short: {error}")))
        })
    }

    /// Cancels an answer.
    pub async fn cancel(&self, job: &Job, why: &str) {
        self.brain.tell(Heard::Cancel { job: job.id.clone() }).await;
        job.decide(self.jobs.now(), "cancel", why);
        job.finish_cancelled(self.jobs.now());
    }

    async fn worker(&self, of: &OfWorker) -> Result<WorkerView, ErrorBody> {
        let workers = self.brain.fleet().await.workers;
        let names: Vec<String> = workers.iter().map(|worker| worker.worker_id.to_string()).collect();
        workers.into_iter().find(|worker| worker.worker_id == of.worker_id).ok_or_else(|| {
            let there = if names.is_empty() { "none".into() } else { names.join(", ") };
            ErrorBody::new(
                ErrorCode::WorkerNotFound,
                format!("there is no active worker `{}`; there is {there}", of.worker_id),
            )
        })
    }

    async fn hive(&self, alias: &HiveId) -> Result<HiveView, ErrorBody> {
        let hives = self.brain.fleet().await.hives;
        hives.into_iter().find(|hive| &hive.hive_id == alias).ok_or_else(|| {
            let error = ErrorBody::new(ErrorCode::HiveUnknown, format!("no hive `{alias}` has been heard of"));
            if *alias == HiveId::localhost() { error.with_hint("start it with `rbee hive start`") } else { error }
        })
    }

    /// Waits until a hive has been heard of and lives.
    async fn settled(&self, alias: &HiveId) -> Result<HiveView, ErrorBody> {
        let deadline = tokio::time::Instant::now() + SETTLE;
        loop {
            match self.hive(alias).await {
                Ok(hive) if hive.alive => return Ok(hive),
                other if tokio::time::Instant::now() >= deadline => {
                    return other.and_then(|_| {
                        let message = format!("hive {alias} was started and its heartbeat does not come");
                        Err(ErrorBody::new(ErrorCode::HiveUnreachable, message).with_hint("`rbee hive logs` shows why"))
                    });
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn stop(&self, alias: &HiveId, job: &Job) -> Result<(), ErrorBody> {
        let client = self.hives.client(&self.brain, alias, Wake::Never).await?;
        let failed = |error: rbee_client::ClientError| error.to_body(ErrorCode::HiveUnreachable);
        let info = client.info().await.map_err(failed)?;
        client.shutdown().await.map_err(failed)?;
        let mut told = false;
        // Its drain has a bound of its own; it is gone when it answers no more.
        while client.info().await.is_ok_and(|now| now.pid == info.pid) {
            if !told {
                told = true;
                job.log.push(&Event::Progress {
                    stage: "drain".into(),
                    done: 0,
                    total: 0,
                    unit: "workers".into(),
                    eta_ms: None,
                    detail: Some(alias.to_string()),
                });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        job.log.push(&Event::data(&info));
        Ok(())
    }

    /// Lets a worker finish, then ends it.
    async fn retire(&self, of: &OfWorker, job: &Job) -> Result<(), ErrorBody> {
        // An unknown one is refused with those there are.
        self.worker(of).await?;
        self.hives.retire(&self.brain, &of.worker_id, &job.log).await
    }

    /// Ends the workers of a model, those of every hive at once.
    async fn unload(&self, model: &ModelRef, job: &Job) -> Result<(), ErrorBody> {
        let workers: Vec<WorkerView> =
            self.brain.fleet().await.workers.into_iter().filter(|worker| &worker.model == model).collect();
        if workers.is_empty() {
            return Err(ErrorBody::new(ErrorCode::ModelNotFound, format!("no worker serves {model}")));
        }
        let scratch = JobLog::default();
        let ended = workers.iter().map(|worker| self.hives.retire(&self.brain, &worker.worker_id, &scratch));
        for (worker, ended) in workers.iter().zip(futures::future::join_all(ended).await) {
            ended?;
            job.log.push(&Event::data(&loaded(worker)));
        }
        Ok(())
    }
}
