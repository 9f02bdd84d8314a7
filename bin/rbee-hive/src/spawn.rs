//! `worker_spawn`: an idempotent reservation. There already, started, or refused with the numbers.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rbee_catalog::CancellationToken;
use rbee_service::random_hex;
use rbee_supervisor::{SpawnSpec, Supervisor};
use rbee_wire::event::{Event, NoteLevel};
use rbee_wire::hive::{Device, DeviceKind, Process, ProcessState};
use rbee_wire::job::WorkerSpawn;
use rbee_wire::view::{SpawnOutcome, SpawnView};
use rbee_wire::worker::{LoadOptions, WorkerCharge};
use rbee_wire::{DeviceId, DeviceSpec, ErrorBody, ErrorCode, HiveId, ModelRef, WorkerId};

use crate::devices::Devices;
use crate::incarnation::Incarnations;
use crate::models::Models;
use crate::rooms::{Choice, too_large};

/// What the hive starts workers with.
pub struct Spawner {
    /// This hive.
    pub hive_id: HiveId,
    /// Where workers' heartbeats go.
    pub queen_url: String,
    /// What the queen asks for, where it asks for something.
    pub queen_token: Option<String>,
    /// The CPU worker's program.
    pub worker: PathBuf,
    /// Arguments of every worker.
    pub worker_args: Vec<String>,
    /// A folder by which the workers share this machine's cores.
    pub cores: Option<String>,
    /// Requests that one worker generates for at once, unless the spawn says otherwise.
    pub slots: u32,
    /// Most bytes of this machine's memory that models may have, if there is a limit.
    pub cpu_memory: Option<u64>,
    /// Lives.
    pub incarnations: Arc<Incarnations>,
    /// Devices.
    pub devices: Arc<Devices>,
    /// The models of this machine.
    pub models: Models,
    /// Workers.
    pub supervisor: Supervisor,
    /// What each worker was asked for; also makes one reservation at a time.
    pub asked: Mutex<Vec<(WorkerId, WorkerSpawn)>>,
    /// One reservation at a time.
    pub reserving: tokio::sync::Mutex<()>,
}

fn refuse(code: ErrorCode, message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(code, message)
}

impl Spawner {
    /// Makes sure that a worker serves the model; tells each step to `tell`. Ends when the worker is ready, or has started
    /// where nobody wants to wait.
    ///
    /// # Errors
    /// The refusal, or the worker's own error when it does not come up.
    pub async fn ensure(
        &self,
        spawn: &WorkerSpawn,
        tell: &(dyn Fn(Event) + Sync),
        stop: &CancellationToken,
    ) -> Result<Vec<SpawnView>, ErrorBody> {
        let path = self.locate(&spawn.model, tell, stop).await?;
        let (outcome, processes) = self.reserve(spawn, path.as_deref(), tell).await?;
        let view = |process: &Process| SpawnView {
            outcome,
            worker_id: process.worker_id.clone(),
            hive_id: self.hive_id.clone(),
            model: spawn.model.clone(),
            device: process.device.clone(),
            pid: self.supervisor.get(&process.worker_id).map_or(process.pid, |process| process.pid),
        };
        if outcome == SpawnOutcome::Existing {
            tell(Event::note(NoteLevel::Info, format!("{} is served already", spawn.model)));
        }
        if spawn.wait.unwrap_or(true) {
            for process in &processes {
                self.until_ready(&process.worker_id, outcome, tell).await?;
            }
        }
        Ok(processes.iter().map(view).collect())
    }

    /// Finds the workers that are wanted, or starts those that are missing; one reservation at a time.
    async fn reserve(
        &self,
        spawn: &WorkerSpawn,
        path: Option<&str>,
        tell: &(dyn Fn(Event) + Sync),
    ) -> Result<(SpawnOutcome, Vec<Process>), ErrorBody> {
        let _one = self.reserving.lock().await;
        let named = match spawn.device {
            DeviceSpec::Auto => None,
            DeviceSpec::Cpu | DeviceSpec::Cuda(_) => Some(self.device(spawn.device)?.id),
        };
        let mut all = self.there(spawn, named.as_ref());
        let wanted = spawn.replicas.unwrap_or(1) as usize;
        if all.len() >= wanted {
            return Ok((SpawnOutcome::Existing, all));
        }
        while all.len() < wanted {
            let rooms = self.rooms(&spawn.model, path, spawn.device, &spawn.load).await?;
            let Some(Choice { device, needs, free, granted }) = self.choose(&rooms, tell) else {
                return Err(too_large(&rooms));
            };
            let id = &device.id;
            if let Some(kv) = granted.kv {
                let mib = |bytes: u64| bytes >> 20;
                let text = format!(
                    "KV has {} MiB rather than {} MiB: {id} has {} MiB free; texts that outgrow it wait for each other",
                    mib(kv),
                    mib(needs.kv),
                    mib(free)
                );
                tell(Event::note(NoteLevel::Warn, text));
            }
            let spec = SpawnSpec {
                program: self.program(&device),
                args: self.worker_args.clone(),
                charge: Arc::new(self.charge(spawn, path, &device, granted.kv)),
                reserved: granted.reserved,
            };
            let process = self.supervisor.spawn(spec).await.map_err(|error| error.to_body())?;
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            asked.retain(|(worker, _)| {
                self.supervisor.get(worker).is_some_and(|process| process.state != ProcessState::Exited)
            });
            asked.push((process.worker_id.clone(), spawn.clone()));
            drop(asked);
            all.push(process);
        }
        Ok((SpawnOutcome::Started, all))
    }

    /// The worker's program for a device.
    pub(crate) fn program(&self, device: &Device) -> PathBuf {
        match (device.kind, self.devices.cuda_worker()) {
            (DeviceKind::Cuda, Some(program)) => program.to_owned(),
            _ => self.worker.clone(),
        }
    }

    /// Workers that serve what is asked for, or will, on a device or on any.
    fn there(&self, spawn: &WorkerSpawn, device: Option<&DeviceId>) -> Vec<Process> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |worker: &WorkerId| asked.iter().any(|(id, other)| id == worker && spawn.load.met_by(&other.load));
        let alive = |state| !matches!(state, ProcessState::Exited | ProcessState::Draining);
        let list = self.supervisor.list().into_iter();
        list.filter(|process| process.model == spawn.model && alive(process.state))
            .filter(|process| device.is_none_or(|device| &process.device == device))
            .filter(|process| fits(&process.worker_id))
            .collect()
    }

    /// The charge of each life of a worker.
    fn charge(
        &self,
        spawn: &WorkerSpawn,
        path: Option<&str>,
        device: &Device,
        kv_bytes: Option<u64>,
    ) -> impl Fn() -> WorkerCharge + Send + Sync + use<> {
        let worker_id = WorkerId::new(format!("worker-{}", random_hex(4))).expect("hexadecimal digits make an id");
        let (hive_id, queen_url) = (self.hive_id.clone(), self.queen_url.clone());
        let queen_token = self.queen_token.clone();
        let incarnations = Arc::clone(&self.incarnations);
        let (spawn, path, device, slots) = (spawn.clone(), path.map(str::to_owned), device.clone(), self.slots);
        let cores = (device.kind == DeviceKind::Cpu).then(|| self.cores.clone()).flatten();
        move || WorkerCharge {
            nonce: random_hex(16),
            worker_id: worker_id.clone(),
            incarnation: incarnations.next(),
            hive_id: hive_id.clone(),
            bearer: random_hex(32),
            queen_url: queen_url.clone(),
            queen_token: queen_token.clone(),
            model: spawn.model.clone(),
            device: device.id.clone(),
            device_uuid: device.uuid.clone(),
            path: path.clone(),
            cores: cores.clone(),
            keep_alive: spawn.keep_alive.unwrap_or_default(),
            load: LoadOptions { slots: Some(spawn.load.slots.unwrap_or(slots)), ..spawn.load.clone() },
            kv_bytes,
        }
    }

    /// The device that is named, if workers can use it.
    pub(crate) fn device(&self, wanted: DeviceSpec) -> Result<Device, ErrorBody> {
        let id = wanted.to_string();
        let devices = self.devices.list();
        let there = devices.iter().map(|device| device.id.to_string()).collect::<Vec<_>>().join(", ");
        let Some(device) = devices.into_iter().find(|device| device.id.as_str() == id) else {
            let message = format!("hive {} has no device {id}; it has {there}", self.hive_id);
            return Err(refuse(ErrorCode::DeviceUnavailable, message).with_hint("use --device cpu"));
        };
        match device.unavailable {
            Some(reason) => {
                let hint = match device.kind {
                    DeviceKind::Cuda => "use --device cpu, which is never chosen in a GPU's place unasked",
                    DeviceKind::Cpu => "see the reason",
                };
                Err(refuse(ErrorCode::DeviceUnavailable, format!("device {id} cannot be used: {reason}"))
                    .with_hint(hint))
            }
            None => Ok(device),
        }
    }

    /// Where a model's files lie, where its name does not say that: fetched, if need be.
    ///
    /// # Errors
    /// When they are not here and cannot be fetched.
    pub(crate) async fn locate(
        &self,
        model: &ModelRef,
        tell: &(dyn Fn(Event) + Sync),
        stop: &CancellationToken,
    ) -> Result<Option<String>, ErrorBody> {
        if self.simulates() {
            return Ok(None);
        }
        match model {
            ModelRef::Tinybee => Ok(None),
            // What kind of file it is, the worker says, who opens it.
            ModelRef::Path(path) if Path::new(path).exists() => Ok(None),
            ModelRef::Path(path) => {
                Err(refuse(ErrorCode::ModelNotFound, format!("there is neither a model folder nor a file at {path}"))
                    .with_hint("`tinybee` is built in; a folder or a .gguf file is named by its absolute path"))
            }
            ModelRef::Alias(name) => {
                Err(refuse(ErrorCode::ModelNotFound, format!("`{name}` is neither a model nor an alias")))
            }
            ModelRef::Hub { .. } => Ok(Some(self.models.bring(model, tell, stop).await?.path.display().to_string())),
        }
    }

    /// As [`Spawner::locate`], without a download.
    ///
    /// # Errors
    /// Also when it would have to be fetched.
    pub(crate) async fn stored(&self, model: &ModelRef) -> Result<Option<String>, ErrorBody> {
        let hub = matches!(model, ModelRef::Hub { .. }) && !self.simulates();
        if hub && self.models.local(model).await?.is_none() {
            return Err(refuse(ErrorCode::ModelNotFound, format!("{model} is not in the store"))
                .with_hint("`rbee model download REF` fetches it"));
        }
        self.locate(model, &|_| (), &CancellationToken::new()).await
    }

    pub(crate) fn simulates(&self) -> bool {
        self.worker_args.iter().any(|arg| arg == "sim" || arg == "--backend=sim")
    }

    /// Follows a worker until it serves.
    async fn until_ready(
        &self,
        worker: &WorkerId,
        outcome: SpawnOutcome,
        tell: &(dyn Fn(Event) + Sync),
    ) -> Result<(), ErrorBody> {
        let mut changes = self.supervisor.changes();
        let mut told = None;
        loop {
            changes.mark_unchanged();
            let gone = || refuse(ErrorCode::ModelLoadFailed, format!("worker {worker} is gone"));
            let process = self.supervisor.get(worker).ok_or_else(gone)?;
            match process.state {
                ProcessState::Ready => return Ok(()),
                // One that served before and is about to be started again is waited for; its supervisor gives up in time.
                ProcessState::Backoff if outcome == SpawnOutcome::Existing => {}
                ProcessState::Exited | ProcessState::Backoff | ProcessState::Draining => {
                    let exit = process.last_exit.clone();
                    let error = exit.as_ref().and_then(|exit| exit.error.clone());
                    return Err(error.unwrap_or_else(|| {
                        let (reason, tail) =
                            exit.map_or((String::new(), String::new()), |exit| (exit.reason, exit.stderr_tail));
                        let last = tail.lines().last().unwrap_or_default().to_owned();
                        refuse(
                            ErrorCode::ModelLoadFailed,
                            format!("worker {worker} ended while it loaded ({reason}): {last}"),
                        )
                        .with_hint(format!("`rbee worker logs {worker}` has its output"))
                    }));
                }
                ProcessState::Spawning | ProcessState::Loading => {
                    if let Some(load) = process.load.filter(|load| told.as_ref() != Some(load)) {
                        tell(Event::Progress {
                            stage: load.stage.clone(),
                            done: load.done,
                            total: load.total,
                            unit: load.unit.clone(),
                            eta_ms: None,
                            detail: Some(worker.to_string()),
                        });
                        told = Some(load);
                    }
                }
            }
            if changes.changed().await.is_err() {
                return Err(gone());
            }
        }
    }
}
