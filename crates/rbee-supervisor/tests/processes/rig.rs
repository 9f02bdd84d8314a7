//! A supervisor in a folder of its own, what it starts, and looks at processes from outside.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rbee_supervisor::state::Timing;
use rbee_supervisor::{SpawnSpec, Supervisor};
use rbee_wire::hive::{Process, ProcessExit, ProcessState};
use rbee_wire::worker::{LoadOptions, WorkerCharge};
use rbee_wire::{DeviceId, HiveId, Incarnation, ModelRef, WorkerId};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(10);

/// A process that plays a role and that no test has ended ends by itself.
pub const LONGEST_LIFE: Duration = Duration::from_secs(30);

/// Product times, but no test waits for seconds: restarts follow at once and SIGKILL follows SIGTERM soon.
pub fn hurried() -> Timing {
    Timing {
        grace: Duration::from_millis(300),
        first_wait: Duration::from_millis(1),
        longest_wait: Duration::from_millis(5),
        ..Timing::default()
    }
}

pub struct Rig {
    pub folder: TempDir,
    pub supervisor: Supervisor,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(hurried())
    }

    pub fn with(timing: Timing) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (logs, lives) = (folder.path().join("logs"), folder.path().join("lives"));
        let supervisor = Supervisor::with_timing(&logs, &lives, timing).unwrap();
        Self { folder, supervisor }
    }

    pub async fn start(&self, spec: SpawnSpec) -> Process {
        self.supervisor.spawn(spec).await.unwrap()
    }

    /// Waits until the worker is as wanted.
    pub async fn until(&self, worker: &WorkerId, what: &str, wanted: impl Fn(&Process) -> bool) -> Process {
        let mut changes = self.supervisor.changes();
        let wait = async {
            loop {
                let process = self.supervisor.get(worker).unwrap();
                if wanted(&process) {
                    return process;
                }
                changes.changed().await.unwrap();
            }
        };
        let found = tokio::time::timeout(LIMIT, wait).await.ok();
        assert!(found.is_some(), "not {what}: {:?}\n{}", self.supervisor.get(worker), self.log(worker));
        found.unwrap()
    }

    pub async fn until_ready(&self, worker: &WorkerId) -> Process {
        self.until(worker, "ready", |process| process.state == ProcessState::Ready).await
    }

    /// Waits until the worker is not started any more, and says how it ended last.
    pub async fn exit(&self, worker: &WorkerId) -> ProcessExit {
        let process = self.until(worker, "gone", |process| process.state == ProcessState::Exited).await;
        process.last_exit.unwrap()
    }

    pub async fn until_logged(&self, worker: &WorkerId, words: &str) -> String {
        until_some(words, || Some(self.log(worker)).filter(|log| log.contains(words))).await
    }

    pub fn log(&self, worker: &WorkerId) -> String {
        self.supervisor.log_tail(worker, 64 << 10).unwrap().unwrap_or_default()
    }
}

fn spec(program: PathBuf, args: Vec<String>) -> SpawnSpec {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let worker_id = WorkerId::new(format!("worker-{}", NEXT.fetch_add(1, Ordering::Relaxed))).unwrap();
    let lives = AtomicU32::new(0);
    let charge = move || {
        let life = lives.fetch_add(1, Ordering::Relaxed);
        WorkerCharge {
            nonce: format!("nonce-{life}"),
            worker_id: worker_id.clone(),
            incarnation: Incarnation { counter: u64::from(life), random: "life".into() },
            hive_id: HiveId::new("hive").unwrap(),
            bearer: "bearer".into(),
            queen_url: "http://127.0.0.1:1".into(),
            queen_token: None,
            model: ModelRef::Tinybee,
            device: DeviceId::new("cpu").unwrap(),
            device_uuid: None,
            path: None,
            cores: None,
            keep_alive: rbee_wire::KeepAlive::Forever,
            load: LoadOptions::default(),
            kv_bytes: None,
        }
    };
    SpawnSpec { program, args, charge: Arc::new(charge), reserved: 0 }
}

/// A worker that is a few lines of shell.
pub fn shell(script: &str) -> SpawnSpec {
    spec("/bin/sh".into(), vec!["-c".into(), script.into()])
}

/// A worker that plays a role.
pub fn role(words: &[&str]) -> SpawnSpec {
    spec(own_program(), role_args(words))
}

pub fn own_program() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// The arguments that make this program play a role instead of running its tests.
pub fn role_args(words: &[&str]) -> Vec<String> {
    let play = ["--exact", "roles::play", "--nocapture", "--test-threads=1", "--"];
    play.iter().chain(words).map(|&word| word.to_owned()).collect()
}

/// Plays a role in a process of its own, to its good end.
pub fn alone(words: &[&str]) {
    let Output { status, stdout, stderr } =
        std::process::Command::new(own_program()).args(role_args(words)).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success() && stdout.contains("1 passed"), "{words:?}: {status}\n{stdout}\n{stderr}");
}

/// What a role does asynchronously.
pub fn block_on(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
}

pub async fn until(what: &str, mut wanted: impl FnMut() -> bool) {
    until_some(what, || wanted().then_some(())).await;
}

pub async fn until_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < LIMIT, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// State letter and parent of a process; `None` when there is none.
pub fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Whether it runs: one that nobody has reaped yet does not.
pub fn runs(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// Processes whose parent is this one, zombies included.
pub fn own_children() -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| stat(pid).is_some_and(|(_, parent)| parent == std::process::id())).collect()
}

/// Open descriptors of a process and what they are.
pub fn descriptors(pid: u32) -> Vec<(i32, String)> {
    let mut all: Vec<(i32, String)> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let what = std::fs::read_link(&path).ok()?;
            Some((path.file_name()?.to_str()?.parse().ok()?, what.to_string_lossy().into_owned()))
        })
        .collect();
    all.sort_unstable();
    all
}

pub fn signal(pid: u32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Numbers that a process has written into a file, one a line.
pub fn numbers(path: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}
