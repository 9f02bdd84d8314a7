//! Processes of a home, found by proof: their environment names it. Nothing is ever selected by name alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use rustix::process::Signal;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, kill_process, setrlimit};

/// A live process. The start time tells it from a later one of the same number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it started, in ticks since boot.
    pub start: u64,
    /// Its program, as it was when it started.
    pub path: PathBuf,
    /// File name of its program.
    pub program: String,
    /// Its command line.
    pub argv: String,
}

/// The columns of `/proc/PID/stat` after the program's name: column 3 is the first.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn start_of(pid: u32) -> Option<u64> {
    stat(pid)?.get(19)?.parse().ok()
}

/// Every live process whose environment has this home.
pub fn of_home(home: &Path) -> Vec<Process> {
    let wanted = format!("RBEE_HOME={}", home.display());
    let ours = |pid: u32| {
        // A process that has ended and not been reaped has no environment any more.
        let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
        environ.split(|&b| b == 0).any(|entry| entry == wanted.as_bytes()).then_some(())?;
        let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let program = path.file_name()?.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
        let argv = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).ok()?).replace('\0', " ");
        Some(Process { pid, start: start_of(pid)?, path, program, argv })
    };
    let mut found: Vec<Process> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| ours(entry.file_name().to_str()?.parse().ok()?))
        .collect();
    found.sort_by_key(|process| (process.start, process.pid));
    found
}

impl Process {
    /// Whether this very process still runs.
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|columns| {
            columns.first().is_some_and(|state| state != "Z" && state != "X")
                && columns.get(19).and_then(|start| start.parse().ok()) == Some(self.start)
        })
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            send(self.pid, signal);
        }
    }

    /// User and system time that it has used.
    pub fn cpu(&self) -> Duration {
        cpu(self.pid)
    }

    /// Bytes of it that are in memory.
    pub fn resident(&self) -> u64 {
        let pages = fs::read_to_string(format!("/proc/{}/statm", self.pid))
            .ok()
            .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok());
        pages.unwrap_or(0) * rustix::param::page_size() as u64
    }

    /// Most bytes of it that were in memory at once.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn peak(&self) -> u64 {
        peak(self.pid).expect("the system tells a process's peak")
    }
}

/// Most bytes of a process that were in memory at once; `None` when it has ended.
pub fn peak(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// User and system time that a process has used.
pub fn cpu(pid: u32) -> Duration {
    let ticks = stat(pid)
        .and_then(|columns| Some(columns.get(11)?.parse::<u64>().ok()? + columns.get(12)?.parse::<u64>().ok()?));
    let hertz = rustix::param::clock_ticks_per_second();
    Duration::from_secs_f64(ticks.unwrap_or(0) as f64 / hertz as f64)
}

/// Sends a signal to a process that the caller knows to be its own.
pub fn send(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended in between, which is what most signals here are for.
        let _ = kill_process(pid, signal);
    }
}

/// Lets this process and its children open as many files as they may.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
