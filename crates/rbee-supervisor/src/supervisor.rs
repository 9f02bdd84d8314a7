//! Owns the workers of a hive: one task per worker moves its [`state`](crate::state), carries out the actions and starts
//! it again; everybody else holds a [`Supervisor`] and reads copies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rbee_wire::hive::{Process, ProcessExit, ProcessState as WireState};
use rbee_wire::worker::{ControlDown, ControlUp, WorkerCharge};
use rbee_wire::{ErrorBody, ErrorCode, WorkerId};
use rustix::process::Signal;
use tokio::sync::{mpsc, watch};

use crate::control::HiveEnd;
use crate::logs::{Capture, tail_of};
use crate::state::{Action, Next, Observation, ProcessState, Restarts, Timing, observe};
use crate::unix::{Spawn, WorkerProcess, code_and_signal, kill_proven, spawn, start_time};

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(100);

/// Longest wait for the last words of a worker that has ended; what left its group may hold the pipe open.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Records of ended workers that are kept.
const MAX_ENDED: usize = 32;

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// No descriptors, processes or memory are left.
    #[error("this machine has no room for another process")]
    Exhausted(#[source] std::io::Error),
    /// The program cannot be run.
    #[error("cannot run {}", program.display())]
    Program {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl SupervisorError {
    /// The error as the wire has it.
    pub fn to_body(&self) -> ErrorBody {
        let code = match self {
            Self::Exhausted(_) => ErrorCode::HiveExhausted,
            Self::Program { .. } => ErrorCode::Internal,
        };
        let source = std::error::Error::source(self).map(|source| format!(": {source}")).unwrap_or_default();
        ErrorBody::new(code, format!("cannot start a worker: {self}{source}"))
    }
}

/// What a worker is started from, again and again.
#[derive(Clone)]
pub struct SpawnSpec {
    /// The worker's program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// A fresh charge for each life: same worker, new incarnation, nonce and bearer.
    pub charge: Arc<dyn Fn() -> WorkerCharge + Send + Sync>,
    /// Bytes reserved for it on its device.
    pub reserved: u64,
}

enum Order {
    Drain(Duration),
    Kill,
}

struct Entry {
    process: Process,
    changed_at: Instant,
    orders: mpsc::Sender<Order>,
    /// Not to be started again.
    retired: bool,
    log: PathBuf,
}

struct Inner {
    entries: Mutex<BTreeMap<WorkerId, Entry>>,
    version: watch::Sender<u64>,
    logs: PathBuf,
    lives: PathBuf,
    timing: Timing,
    clock: Instant,
}

/// The workers of a hive; cheap to clone.
#[derive(Clone)]
pub struct Supervisor(Arc<Inner>);

impl Supervisor {
    /// A supervisor that keeps logs and its record of children in these folders. Children that a former life left behind
    /// and that are proven to be its own are killed.
    ///
    /// # Errors
    /// When the folders cannot be made.
    pub fn new(logs: &Path, lives: &Path) -> std::io::Result<Self> {
        Self::with_timing(logs, lives, Timing::default())
    }

    /// As [`Supervisor::new`], with other times.
    ///
    /// # Errors
    /// When the folders cannot be made.
    pub fn with_timing(logs: &Path, lives: &Path, timing: Timing) -> std::io::Result<Self> {
        std::fs::create_dir_all(logs)?;
        std::fs::create_dir_all(lives)?;
        for entry in std::fs::read_dir(lives)?.flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            if let Some((pid, started)) = text.trim().split_once(' ')
                && let (Ok(pid), Ok(started)) = (pid.parse(), started.parse())
            {
                kill_proven(pid, started);
            }
            let _ = std::fs::remove_file(entry.path());
        }
        Ok(Self(Arc::new(Inner {
            entries: Mutex::default(),
            version: watch::channel(0).0,
            logs: logs.to_owned(),
            lives: lives.to_owned(),
            timing,
            clock: Instant::now(),
        })))
    }

    /// Starts a worker and watches it from then on. Returns when its process runs.
    ///
    /// # Errors
    /// When the process cannot be made; nothing is left of it then.
    pub async fn spawn(&self, spec: SpawnSpec) -> Result<Process, SupervisorError> {
        let charge = (spec.charge)();
        let id = charge.worker_id.clone();
        let log = self.0.logs.join(format!("{}.log", file_name(&id)));
        let capture = Capture::new(&log);
        let life = start(&spec, &charge, &capture).await?;
        let (orders, ordered) = mpsc::channel(8);
        let process = Process {
            pid: life.process.pid(),
            worker_id: id.clone(),
            incarnation: charge.incarnation.clone(),
            model: charge.model.clone(),
            device: charge.device.clone(),
            state: WireState::Spawning,
            load: None,
            since_ms: 0,
            restarts: 0,
            last_exit: None,
            reserved: spec.reserved,
            url: None,
        };
        let entry = Entry { process: process.clone(), changed_at: Instant::now(), orders, retired: false, log };
        self.entries().insert(id.clone(), entry);
        self.changed();
        tokio::spawn(self.clone().watch(id, spec, capture, life, charge, ordered));
        Ok(process)
    }

    /// Lets a worker finish within the grace and does not start it again. False when there is none.
    pub fn drain(&self, worker: &WorkerId, grace: Duration) -> bool {
        self.order(worker, Order::Drain(grace))
    }

    /// Ends a worker now and does not start it again. False when there is none.
    pub fn kill(&self, worker: &WorkerId) -> bool {
        self.order(worker, Order::Kill)
    }

    fn order(&self, worker: &WorkerId, order: Order) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(worker).filter(|entry| entry.process.state != WireState::Exited) else {
            return false;
        };
        entry.retired = true;
        // Full means that it is being ended already.
        let _ = entry.orders.try_send(order);
        true
    }

    /// All workers, those that ended lately included.
    pub fn list(&self) -> Vec<Process> {
        let entries = self.entries();
        entries
            .values()
            .map(|entry| Process {
                since_ms: u64::try_from(entry.changed_at.elapsed().as_millis()).unwrap_or(u64::MAX),
                ..entry.process.clone()
            })
            .collect()
    }

    /// One worker.
    pub fn get(&self, worker: &WorkerId) -> Option<Process> {
        self.list().into_iter().find(|process| &process.worker_id == worker)
    }

    /// Moves with every change of any worker.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// Waits until this worker has ended for good, or the limit is over; whether it has.
    pub async fn gone(&self, worker: &WorkerId, limit: Duration) -> bool {
        let mut changes = self.changes();
        let ended = || self.get(worker).is_none_or(|process| process.state == WireState::Exited);
        let wait = async {
            while !ended() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }

    /// The last bytes of a worker's output; `None` for one that never was.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub fn log_tail(&self, worker: &WorkerId, max: u64) -> std::io::Result<Option<String>> {
        let log = self.entries().get(worker).map(|entry| entry.log.clone());
        log.map(|log| tail_of(&log, max)).transpose()
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, BTreeMap<WorkerId, Entry>> {
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.0.version.send_modify(|version| *version += 1);
    }

    fn update(&self, worker: &WorkerId, change: impl FnOnce(&mut Process)) {
        if let Some(entry) = self.entries().get_mut(worker) {
            let before = entry.process.state;
            change(&mut entry.process);
            if entry.process.state != before {
                entry.changed_at = Instant::now();
            }
        }
        self.changed();
    }

    fn life_file(&self, worker: &WorkerId) -> PathBuf {
        self.0.lives.join(file_name(worker))
    }

    /// The task of one worker: life after life until it is retired or loops.
    async fn watch(
        self,
        id: WorkerId,
        spec: SpawnSpec,
        capture: Capture,
        mut life: Life,
        mut charge: WorkerCharge,
        mut ordered: mpsc::Receiver<Order>,
    ) {
        let mut restarts = Restarts::new(self.0.timing);
        loop {
            let record = start_time(life.process.pid()).map(|started| format!("{} {started}", life.process.pid()));
            let _ = std::fs::write(self.life_file(&id), record.unwrap_or_default());
            let end = self.live(&id, &charge, &mut life, &mut ordered).await;
            let _ = std::fs::remove_file(self.life_file(&id));
            drop(life);
            capture.drained(LAST_WORDS).await;
            let mut exit = ProcessExit { stderr_tail: capture.tail(), ..end.exit };
            let retired = self.entries().get(&id).is_none_or(|entry| entry.retired);
            // A load that says itself why it failed fails again: nothing is gained by trying.
            let hopeless = !end.served && exit.error.is_some();
            let next = restarts.exited(self.0.clock.elapsed(), end.served_for);
            tracing::info!(worker = %id, reason = exit.reason, code = exit.code, signal = exit.signal, "a worker ended");
            let wait = match next {
                _ if retired || hopeless => None,
                Next::Wait(wait) => Some(wait),
                Next::CrashLoop => {
                    let message = format!("worker {id} ended again and again, and is not started any more");
                    exit.error = Some(ErrorBody::new(ErrorCode::CrashLoop, message));
                    None
                }
            };
            let Some(wait) = wait else {
                self.update(&id, |process| {
                    process.state = WireState::Exited;
                    process.pid = 0;
                    process.last_exit = Some(exit);
                });
                self.forget_old();
                return;
            };
            self.update(&id, |process| {
                process.state = WireState::Backoff;
                process.pid = 0;
                process.url = None;
                process.load = None;
                process.last_exit = Some(exit);
            });
            let mut begin = tokio::time::Instant::now() + wait;
            let started = loop {
                tokio::select! {
                    biased;
                    _ = ordered.recv() => {
                        self.update(&id, |process| process.state = WireState::Exited);
                        return;
                    }
                    () = tokio::time::sleep_until(begin) => {}
                }
                charge = (spec.charge)();
                match start(&spec, &charge, &capture).await {
                    Ok(life) => break life,
                    Err(error) => {
                        tracing::warn!(worker = %id, %error, "a worker could not be started again");
                        begin = tokio::time::Instant::now() + self.0.timing.first_wait;
                    }
                }
            };
            life = started;
            self.update(&id, |process| {
                process.state = WireState::Spawning;
                process.pid = life.process.pid();
                process.incarnation = charge.incarnation.clone();
                process.restarts += 1;
            });
        }
    }

    fn forget_old(&self) {
        let mut entries = self.entries();
        let mut ended: Vec<(Instant, WorkerId)> = entries
            .iter()
            .filter(|(_, entry)| entry.process.state == WireState::Exited)
            .map(|(id, entry)| (entry.changed_at, id.clone()))
            .collect();
        ended.sort_unstable();
        for (_, id) in ended.iter().take(ended.len().saturating_sub(MAX_ENDED)) {
            entries.remove(id);
        }
    }

    /// One life, from spawning to reaped.
    async fn live(
        &self,
        id: &WorkerId,
        charge: &WorkerCharge,
        life: &mut Life,
        ordered: &mut mpsc::Receiver<Order>,
    ) -> End {
        let began = self.0.clock.elapsed();
        let mut state = ProcessState::Spawning { since: began };
        let mut ready_at = None;
        let mut reason = None;
        let mut error = None;
        let mut piped = true;
        let mut tick = tokio::time::interval(TICK);
        let status = loop {
            let seen = tokio::select! {
                biased;
                line = life.pipe.next(), if piped => match line {
                    Ok(Some(line)) => match self.hear(id, charge, line, &mut error) {
                        Some(seen) => seen,
                        None => continue,
                    },
                    ended => {
                        piped = false;
                        if let Err(error) = ended {
                            tracing::warn!(worker = %id, %error, "a worker's control pipe broke");
                        }
                        // A process that is exiting closes its pipe first: give it the time to be reaped with its own code.
                        match tokio::time::timeout(Duration::from_millis(500), life.process.ended()).await {
                            Ok(status) => break status,
                            Err(_) => Observation::PipeEnded,
                        }
                    }
                },
                status = life.process.ended() => {
                    // Words that were said before the end are still in the pipe.
                    while let (true, Ok(Ok(Some(line)))) =
                        (piped, tokio::time::timeout(Duration::from_millis(50), life.pipe.next()).await)
                    {
                        self.hear(id, charge, line, &mut error);
                    }
                    break status;
                }
                Some(order) = ordered.recv() => match order {
                    Order::Drain(grace) => Observation::DrainWanted { grace },
                    Order::Kill => Observation::KillWanted,
                },
                _ = tick.tick() => Observation::Tick,
            };
            let now = self.0.clock.elapsed();
            let is_ready = seen == Observation::Ready;
            let (next, actions) = observe(&self.0.timing, state, seen, now);
            state = next;
            if is_ready && ready_at.is_none() {
                ready_at = Some(now);
            }
            for action in actions {
                match action {
                    Action::SendDrain { grace } => {
                        reason = Some("retired");
                        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
                        if life.pipe.send(&ControlDown::Drain { grace_ms }).await.is_err() {
                            life.process.signal_group(Signal::TERM);
                        }
                    }
                    Action::Terminate => life.process.signal_group(Signal::TERM),
                    Action::Kill(why) => {
                        tracing::warn!(worker = %id, why, "a worker is killed");
                        reason = reason.or(Some(why));
                        life.process.signal_group(Signal::KILL);
                    }
                }
            }
            self.show(id, &state);
        };
        let (code, signal) = status.map(code_and_signal).unwrap_or_default();
        let default = if code == Some(0) { "exited" } else { "failed" };
        let now = self.0.clock.elapsed();
        End {
            exit: ProcessExit {
                code,
                signal,
                reason: reason.unwrap_or(default).into(),
                error: error
                    .or_else(|| (reason == Some("load_timeout")).then(|| load_timeout(self.0.timing.load_timeout))),
                stderr_tail: String::new(),
            },
            served: ready_at.is_some(),
            served_for: ready_at.map_or(Duration::ZERO, |ready_at| now.saturating_sub(ready_at)),
        }
    }

    /// What a line of the pipe means.
    fn hear(
        &self,
        id: &WorkerId,
        charge: &WorkerCharge,
        line: ControlUp,
        error: &mut Option<ErrorBody>,
    ) -> Option<Observation> {
        Some(match line {
            ControlUp::Listening { port, nonce } if nonce == charge.nonce => {
                self.update(id, |process| process.url = Some(format!("http://127.0.0.1:{port}")));
                Observation::Listening
            }
            ControlUp::Listening { .. } => {
                tracing::warn!(worker = %id, "a process that does not know its nonce is not a worker of ours");
                Observation::KillWanted
            }
            ControlUp::Loading { progress } => Observation::Progress(progress),
            ControlUp::Ready { .. } => Observation::Ready,
            ControlUp::Beat { steps, working } => Observation::Beat { steps, working },
            ControlUp::Failed { error: said } => {
                *error = Some(said);
                return None;
            }
        })
    }

    fn show(&self, id: &WorkerId, state: &ProcessState) {
        let (wire, load) = match state {
            ProcessState::Spawning { .. } => (WireState::Spawning, None),
            ProcessState::Loading { progress, .. } => (WireState::Loading, Some(progress.clone())),
            ProcessState::Ready { .. } => (WireState::Ready, None),
            ProcessState::Draining { .. } | ProcessState::Killing => (WireState::Draining, None),
            ProcessState::Exited => return,
        };
        let same =
            self.entries().get(id).is_some_and(|entry| entry.process.state == wire && entry.process.load == load);
        if !same {
            self.update(id, |process| {
                process.state = wire;
                process.load = load;
            });
        }
    }
}

fn load_timeout(limit: Duration) -> ErrorBody {
    ErrorBody::new(ErrorCode::LoadTimeout, format!("the load made no progress for {} s", limit.as_secs()))
}

/// A worker's id as a file name.
fn file_name(id: &WorkerId) -> String {
    id.as_str().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
}

struct Life {
    process: WorkerProcess,
    pipe: HiveEnd,
}

struct End {
    exit: ProcessExit,
    served: bool,
    served_for: Duration,
}

async fn start(spec: &SpawnSpec, charge: &WorkerCharge, capture: &Capture) -> Result<Life, SupervisorError> {
    let failed = |source: std::io::Error| {
        use rustix::io::Errno;
        let full = [Errno::AGAIN, Errno::NOMEM, Errno::NFILE, Errno::MFILE, Errno::NOSPC];
        if Errno::from_io_error(&source).is_some_and(|errno| full.contains(&errno)) {
            SupervisorError::Exhausted(source)
        } else {
            SupervisorError::Program { program: spec.program.clone(), source }
        }
    };
    let (mut pipe, control) = HiveEnd::pair().map_err(failed)?;
    let mut command = std::process::Command::new(&spec.program);
    command.args(&spec.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/");
    let mut process = spawn(Spawn { command, control }).await.map_err(failed)?;
    for output in process.take_output().into_iter().flatten() {
        capture.follow(output);
    }
    // A worker that does not even read its charge is noticed by its silence.
    let _ = pipe.send(&ControlDown::Charge(Box::new(charge.clone()))).await;
    Ok(Life { process, pipe })
}
