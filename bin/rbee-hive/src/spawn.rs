//! `worker_spawn`: an idempotent reservation. There already, started, or refused with the numbers.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rbee_service::random_hex;
use rbee_supervisor::{SpawnSpec, Supervisor, run_bounded};
use rbee_wire::event::{Event, NoteLevel};
use rbee_wire::hive::{Device, DeviceKind, Process, ProcessState};
use rbee_wire::job::WorkerSpawn;
use rbee_wire::view::{SpawnOutcome, SpawnView};
use rbee_wire::worker::{LoadOptions, WorkerCharge};
use rbee_wire::{DeviceId, DeviceSpec, ErrorBody, ErrorCode, HiveId, ModelRef, WorkerId};
use serde_json::json;

use crate::devices::{Devices, meminfo};
use crate::incarnation::Incarnations;

/// Upper bound of what the built-in model needs with the default slots, so that a first start need not measure it.
pub const TINYBEE_NEEDS: u64 = 160 << 20;

/// Context that is proposed where the usual one does not fit.
const SHORT_CONTEXT: u32 = 2048;

/// Longest time to learn what a model needs.
const INSPECT: Duration = Duration::from_secs(10);

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
    /// Requests that one worker generates for at once, unless the spawn says otherwise.
    pub slots: u32,
    /// Lives.
    pub incarnations: Arc<Incarnations>,
    /// Devices.
    pub devices: Arc<Devices>,
    /// Workers.
    pub supervisor: Supervisor,
    /// What each worker was asked for; also makes one reservation at a time.
    pub asked: Mutex<Vec<(WorkerId, WorkerSpawn)>>,
    /// One reservation at a time.
    pub reserving: tokio::sync::Mutex<()>,
}

/// What `llm-worker-rbee inspect` says of a load, in bytes.
#[derive(Clone, Copy, Debug, serde::Deserialize)]
struct Needs {
    /// With KV for every slot's whole context.
    total: u64,
    /// With KV for one.
    least: u64,
    /// Of the total.
    kv: u64,
}

/// What a load may have.
#[derive(Debug, PartialEq)]
struct Granted {
    reserved: u64,
    /// Bytes of KV, where they are fewer than asked for.
    kv: Option<u64>,
}

impl Needs {
    /// What of `free` bytes the load gets: all it asks for, else less KV and a sixteenth left to others, but never less
    /// than it can be used with.
    fn granted(&self, free: u64) -> Option<Granted> {
        if self.total <= free {
            return Some(Granted { reserved: self.total, kv: None });
        }
        let reserved = self.least.max(free - free / 16).min(self.total);
        let kv = self.kv.saturating_sub(self.total - reserved);
        (self.least <= free).then_some(Granted { reserved, kv: Some(kv) })
    }
}

/// Bytes that a process has for itself alone; 0 when there is none.
fn anonymous(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    meminfo(&text, "RssAnon:")
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
    ) -> Result<Vec<SpawnView>, ErrorBody> {
        self.check_model(&spawn.model)?;
        let (outcome, processes) = self.reserve(spawn, tell).await?;
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
        tell: &(dyn Fn(Event) + Sync),
    ) -> Result<(SpawnOutcome, Vec<Process>), ErrorBody> {
        let _one = self.reserving.lock().await;
        let named = match spawn.device {
            DeviceSpec::Auto => None,
            DeviceSpec::Cpu | DeviceSpec::Cuda(_) => Some(self.device(spawn.device)?),
        };
        let mut all = self.there(spawn, named.as_ref().map(|device| &device.id));
        let wanted = spawn.replicas.unwrap_or(1) as usize;
        if all.len() >= wanted {
            return Ok((SpawnOutcome::Existing, all));
        }
        while all.len() < wanted {
            let device = match &named {
                Some(device) => device.clone(),
                None => self.choose(spawn, tell).await?,
            };
            let needs = self.needed(&device, &spawn.model, &spawn.load).await?;
            let free = self.free(&device);
            let Some(granted) = needs.granted(free) else {
                return Err(self.too_large(spawn, &device, needs.least, free).await);
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
                charge: Arc::new(self.charge(spawn, &device, granted.kv)),
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

    /// The device for a load that may go anywhere: a GPU that it fits in, the one with most memory free, else the CPU. The
    /// built-in model is small enough for the CPU, which has it ready sooner than a GPU's driver starts; and who says how many
    /// threads compute means the CPU.
    async fn choose(&self, spawn: &WorkerSpawn, tell: &(dyn Fn(Event) + Sync)) -> Result<Device, ErrorBody> {
        let cpu = self.devices.cpu();
        if self.simulates() || spawn.model == ModelRef::Tinybee || spawn.load.threads.is_some() {
            return Ok(cpu);
        }
        let usable = |device: &Device| device.kind == DeviceKind::Cuda && device.unavailable.is_none();
        let mut gpus: Vec<Device> = self.devices.list().into_iter().filter(usable).collect();
        gpus.sort_by_key(|gpu| std::cmp::Reverse(self.free(gpu)));
        for gpu in gpus {
            let reason = match self.needed(&gpu, &spawn.model, &spawn.load).await {
                Ok(needs) if needs.granted(self.free(&gpu)).is_some() => return Ok(gpu),
                Ok(needs) => {
                    format!("it has {} MiB free and the load needs {} MiB", self.free(&gpu) >> 20, needs.least >> 20)
                }
                Err(error) => error.message,
            };
            tell(Event::note(NoteLevel::Info, format!("not on {}: {reason}", gpu.id)));
        }
        Ok(cpu)
    }

    /// The worker's program for a device.
    fn program(&self, device: &Device) -> PathBuf {
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
        device: &Device,
        kv_bytes: Option<u64>,
    ) -> impl Fn() -> WorkerCharge + Send + Sync + use<> {
        let worker_id = WorkerId::new(format!("worker-{}", random_hex(4))).expect("hexadecimal digits make an id");
        let (hive_id, queen_url) = (self.hive_id.clone(), self.queen_url.clone());
        let queen_token = self.queen_token.clone();
        let incarnations = Arc::clone(&self.incarnations);
        let (spawn, device, slots) = (spawn.clone(), device.clone(), self.slots);
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
            load: LoadOptions { slots: Some(spawn.load.slots.unwrap_or(slots)), ..spawn.load.clone() },
            kv_bytes,
        }
    }

    /// The device that is named, if workers can use it.
    fn device(&self, wanted: DeviceSpec) -> Result<Device, ErrorBody> {
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

    fn check_model(&self, model: &ModelRef) -> Result<(), ErrorBody> {
        if self.simulates() {
            return Ok(());
        }
        let known = "`tinybee` is built in; a folder of safetensors files is named by its absolute path";
        match model {
            ModelRef::Tinybee => Ok(()),
            ModelRef::Path(path) if path.ends_with(".gguf") => {
                Err(refuse(ErrorCode::NotImplemented, format!("{path}: GGUF files are not read by this build"))
                    .with_hint(known))
            }
            ModelRef::Path(path) if std::path::Path::new(path).is_dir() => Ok(()),
            ModelRef::Path(path) => {
                Err(refuse(ErrorCode::ModelNotFound, format!("there is no model folder at {path}")).with_hint(known))
            }
            ModelRef::Hub { .. } | ModelRef::Alias(_) => {
                let message = format!("{model} is not on this machine, and this build does not fetch models");
                Err(refuse(ErrorCode::ModelNotFound, message).with_hint(known))
            }
        }
    }

    fn simulates(&self) -> bool {
        self.worker_args.iter().any(|arg| arg == "sim" || arg == "--backend=sim")
    }

    /// Bytes that the load needs, from the model's own header, read by a worker.
    async fn needed(&self, device: &Device, model: &ModelRef, load: &LoadOptions) -> Result<Needs, ErrorBody> {
        let LoadOptions { ctx, slots, kv_type, quantize, .. } = load;
        let slots = slots.unwrap_or(self.slots);
        let plain =
            device.kind == DeviceKind::Cpu && ctx.is_none() && slots <= 8 && kv_type.is_none() && quantize.is_none();
        if self.simulates() || (*model == ModelRef::Tinybee && plain) {
            return Ok(Needs { total: TINYBEE_NEEDS, least: TINYBEE_NEEDS, kv: 0 });
        }
        let mut command = std::process::Command::new(self.program(device));
        command.arg("inspect").arg(model.to_string());
        command.arg("--slots").arg(slots.to_string());
        for (name, value) in
            [("--ctx", &ctx.map(|ctx| ctx.to_string())), ("--kv-type", kv_type), ("--quantize", quantize)]
        {
            if let Some(value) = value {
                command.arg(name).arg(value);
            }
        }
        let run = tokio::task::spawn_blocking(move || run_bounded(&mut command, INSPECT, 64 << 10)).await;
        let failed =
            |what: String| refuse(ErrorCode::ModelLoadFailed, format!("cannot learn what {model} needs: {what}"));
        let (code, bytes) = match run {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(error) => return Err(failed(error.to_string())),
        };
        if code != Some(0) {
            return Err(
                serde_json::from_slice::<ErrorBody>(&bytes).unwrap_or_else(|_| failed(format!("exit code {code:?}")))
            );
        }
        serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))
    }

    /// Free memory less what is reserved and not yet in use: a worker on the CPU takes its KV page by page as texts come, one on
    /// a GPU has taken everything when it is ready.
    fn free(&self, device: &Device) -> u64 {
        let found = self.devices.list().into_iter().find(|found| found.id == device.id);
        let measured = found.map_or(0, |found| found.memory_free);
        let alive = self
            .supervisor
            .list()
            .into_iter()
            .filter(|process| process.device == device.id && process.state != ProcessState::Exited);
        let not_taken = |process: Process| match device.kind {
            DeviceKind::Cpu => process.reserved.saturating_sub(anonymous(process.pid)),
            DeviceKind::Cuda => match process.state {
                ProcessState::Ready | ProcessState::Draining => 0,
                _ => process.reserved,
            },
        };
        measured.saturating_sub(alive.map(not_taken).sum())
    }

    /// The refusal of a load that needs more than is free, with what of it would fit.
    async fn too_large(&self, spawn: &WorkerSpawn, device: &Device, needed: u64, free: u64) -> ErrorBody {
        let ways = |ctx: Option<u32>, quantize: Option<&str>| LoadOptions {
            ctx: ctx.or(spawn.load.ctx),
            quantize: quantize.map(str::to_owned).or_else(|| spawn.load.quantize.clone()),
            ..spawn.load.clone()
        };
        let short = Some(spawn.load.ctx.unwrap_or(SHORT_CONTEXT).min(SHORT_CONTEXT));
        let mut fitting = Vec::new();
        for load in [ways(None, Some("q8_0")), ways(None, Some("q4_k")), ways(short, Some("q4_k")), ways(short, None)] {
            // What cannot be inspected is not proposed.
            if load != spawn.load
                && let Ok(needed) = self.needed(device, &spawn.model, &load).await
                && let Some(Granted { reserved: needed, .. }) = needed.granted(free)
            {
                fitting.push((load, needed));
            }
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let message =
            format!("{} has {} MiB free and the load needs at least {} MiB", device.id, free >> 20, mib(needed));
        let hint = match fitting.first() {
            Some((load, needed)) => {
                let quantize = load.quantize.as_ref().map(|form| format!("--quantize {form}"));
                let ctx = load.ctx.filter(|_| load.ctx != spawn.load.ctx).map(|ctx| format!("--ctx {ctx}"));
                let flags: Vec<String> = quantize.into_iter().chain(ctx).collect();
                format!("with {} it needs {} MiB, which fits", flags.join(" "), mib(*needed))
            }
            None => "free memory, or take a smaller model; with fewer bits and a short context it does not fit either"
                .into(),
        };
        let fitting = fitting.iter().map(|(load, needed)| json!({ "load": load, "needed": needed }));
        let fitting: Vec<_> = fitting.collect();
        refuse(ErrorCode::InsufficientMemory, message)
            .with_hint(hint)
            .with_details(json!({ "needed": needed, "free": free, "would_fit": fitting }))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_gets_all_it_asks_for_or_less_kv_or_nothing() {
        let needs = Needs { total: 1000, least: 300, kv: 800 };
        let granted = |reserved, kv| Some(Granted { reserved, kv });
        assert_eq!(needs.granted(1000), granted(1000, None));
        assert_eq!(needs.granted(999), granted(937, Some(737)));
        assert_eq!(needs.granted(310), granted(300, Some(100)));
        assert_eq!(needs.granted(299), None);
        // Weights and working memory are the same 200 bytes each time.
        for free in 300..1100 {
            let got = needs.granted(free).unwrap();
            assert!(got.reserved <= free && got.reserved == 200 + got.kv.unwrap_or(800), "{free}: {got:?}");
        }
    }

    #[test]
    fn memory_of_a_process_is_its_own() {
        let own = std::hint::black_box(vec![1u8; 32 << 20]);
        assert!(anonymous(std::process::id()) >= own.len() as u64);
        assert_eq!(anonymous(u32::MAX), 0);
    }
}
