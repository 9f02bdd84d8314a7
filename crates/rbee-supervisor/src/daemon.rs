//! Daemons: detached, one starter at a time, and ready when the starter returns.
//!
//! The child inherits one end of a pipe (`RBEE_READY_FD`) and writes one line when it listens, or the error that kept it
//! from listening. The pipe's end without a line means that it died.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rbee_wire::{ErrorBody, ErrorCode};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::logs::tail_of;
use crate::unix::{adopt, detach, end_group};

const READY_FD: &str = "RBEE_READY_FD";

/// Longest line of the readiness pipe.
const MAX_LINE: u64 = 64 << 10;

/// Longest time from a daemon's word that it failed to its exit.
const LAST_STEPS: Duration = Duration::from_secs(2);

/// What is to be started.
#[derive(Clone, Debug)]
pub struct DaemonSpec {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Environment variables beside the starter's own.
    pub env: Vec<(String, String)>,
    /// The file whose lock makes starters wait for each other.
    pub lock: PathBuf,
    /// Where its stdout and stderr go.
    pub log: PathBuf,
    /// Longest time until it listens.
    pub limit: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Url(String),
    Error(Box<ErrorBody>),
}

/// What came of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// It was started and listens at this address.
    Started(String),
    /// `there` said that somebody else had started it meanwhile.
    There,
}

/// Starts a daemon unless `there` says, under the lock, that it runs. Blocks until it listens.
///
/// # Errors
/// The daemon's own error, or what kept it from being started.
pub fn start(spec: &DaemonSpec, there: impl FnOnce() -> bool) -> Result<Start, ErrorBody> {
    let name = spec.program.file_name().map_or_else(|| "daemon".into(), |name| name.to_string_lossy().into_owned());
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        ErrorBody::new(ErrorCode::Internal, format!("cannot start {name}: {what}: {error}"))
            .with_hint("`rbee doctor` checks what a start needs")
    };
    let _lock = lock(&spec.lock, spec.limit).map_err(|error| failed("its start lock", &error))?;
    if there() {
        return Ok(Start::There);
    }
    let (reader, writer) = io::pipe().map_err(|error| failed("no pipe", &error))?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&spec.log)
        .map_err(|error| failed(&spec.log.display().to_string(), &error))?;
    let both = log.try_clone().map_err(|error| failed("its log", &error))?;
    let writer = OwnedFd::from(writer);
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        .envs(spec.env.iter().map(|(key, value)| (key, value)))
        .env(READY_FD, writer.as_raw_fd().to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(both);
    detach(&mut command, writer.as_raw_fd());
    let mut child = command.spawn().map_err(|error| failed(&spec.program.display().to_string(), &error))?;
    drop(writer);

    let (answer, answered) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(reader).take(MAX_LINE).read_line(&mut line);
        let _ = answer.send(line);
    });
    let line = match answered.recv_timeout(spec.limit) {
        Ok(line) => line,
        Err(_) => {
            end_group(&mut child, Duration::ZERO);
            return Err(failed("it did not listen in time", &format!("{} s", spec.limit.as_secs())));
        }
    };
    match serde_json::from_str::<Line>(&line) {
        Ok(Line::Url(url)) => {
            // It outlives us; until then a thread reaps it, so that it is never a zombie of ours.
            std::thread::spawn(move || drop(child.wait()));
            Ok(Start::Started(url))
        }
        Ok(Line::Error(error)) => {
            end_group(&mut child, LAST_STEPS);
            Err(*error)
        }
        Err(_) => {
            let status = end_group(&mut child, LAST_STEPS).map_or_else(String::new, |status| status.to_string());
            let tail = tail_of(&spec.log, 2048).unwrap_or_default();
            Err(failed("it ended before it listened", &status)
                .with_hint(format!("the end of {}:\n{tail}", spec.log.display())))
        }
    }
}

/// Tells the starter, if there is one, that this daemon listens.
pub fn announce_ready(url: &str) {
    announce(&Line::Url(url.into()));
}

/// Tells the starter, if there is one, why this daemon does not.
pub fn announce_failure(error: &ErrorBody) {
    announce(&Line::Error(Box::new(error.clone())));
}

/// How a daemon's `main` ends: an error is told to the starter and on stderr, and decides the exit code.
pub fn exit_code(outcome: Result<(), ErrorBody>) -> std::process::ExitCode {
    let Err(error) = outcome else { return std::process::ExitCode::SUCCESS };
    announce_failure(&error);
    eprintln!("error: {error}");
    if let Some(hint) = &error.hint {
        eprintln!("hint: {hint}");
    }
    std::process::ExitCode::from(error.code.exit_code())
}

fn announce(line: &Line) {
    // Once said, the descriptor is closed and its number may be another's.
    static SAID: AtomicBool = AtomicBool::new(false);
    if SAID.swap(true, Ordering::Relaxed) {
        return;
    }
    let Some(fd) = std::env::var(READY_FD).ok().and_then(|text| text.parse().ok()) else { return };
    let Ok(fd) = adopt(fd) else { return };
    let Ok(mut bytes) = serde_json::to_vec(line) else { return };
    bytes.push(b'\n');
    let _ = File::from(fd).write_all(&bytes);
}

/// A lock that is held while it lives, and let go by the system when its holder dies.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its lock")] File);

fn lock(path: &Path, limit: Duration) -> io::Result<Lock> {
    let began = Instant::now();
    loop {
        match try_lock(path)? {
            Ok(lock) => return Ok(lock),
            Err(holder) if began.elapsed() > limit => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{holder} holds {}", path.display())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Takes the lock of this file and writes the own pid into it, or says who holds it.
///
/// # Errors
/// When the file cannot be opened.
pub fn try_lock(path: &Path) -> io::Result<Result<Lock, String>> {
    let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            file.set_len(0)?;
            file.write_all(std::process::id().to_string().as_bytes())?;
            Ok(Ok(Lock(file)))
        }
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            (&file).take(16).read_to_string(&mut pid)?;
            Ok(Err(format!("process {}", pid.trim().escape_debug())))
        }
        Err(error) => Err(error.into()),
    }
}

/// What tells one build of a program from another: length and time of its file.
///
/// # Errors
/// When the file is not there.
pub fn build_id(path: &Path) -> io::Result<String> {
    let meta = std::fs::metadata(path)?;
    Ok(format!("{}-{}", meta.len(), meta.mtime() * 1_000_000_000 + meta.mtime_nsec()))
}

/// A program that lies beside this one.
///
/// # Errors
/// When this one's own path is not known.
pub fn sibling(name: &str) -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().ok_or_else(|| io::Error::other("this program lies nowhere"))?;
    // A test program lies one folder below the programs it tests.
    Ok(folder.join(name))
}
