//! Daemons: one however many start it, nothing of its starter's left in it, and a start that ends in a plain answer.

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Duration;

use rbee_supervisor::daemon::{self, DaemonSpec, Start};
use rbee_wire::{ErrorBody, ErrorCode};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::rig::{LIMIT, block_on, descriptors, numbers, own_program, role_args, runs, signal, until};

/// A folder with daemons, which are killed with it.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Daemons that were ever started here.
    fn pids(&self) -> Vec<u32> {
        numbers(&self.path("pids"))
    }

    fn start(&self, kind: &str, limit: Duration) -> Result<Start, ErrorBody> {
        let spec = DaemonSpec {
            program: own_program(),
            args: role_args(&["daemon", kind, self.0.path().to_str().unwrap()]),
            env: Vec::new(),
            lock: self.path("lock"),
            log: self.path("log"),
            limit,
        };
        daemon::start(&spec, || self.pids().into_iter().any(runs))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for pid in self.pids().into_iter().filter(|&pid| runs(pid)) {
            signal(pid, Signal::KILL);
        }
    }
}

#[test]
fn two_starters_at_once_get_one_daemon() {
    let home = Home::new();
    let together = Barrier::new(4);
    let starts: Vec<Start> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    together.wait();
                    home.start("listens", LIMIT).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let started = Start::Started("http://127.0.0.1:1".into());
    assert_eq!(starts.iter().filter(|&start| *start == started).count(), 1, "{starts:?}");
    assert_eq!(starts.iter().filter(|&start| *start == Start::There).count(), 3, "{starts:?}");
    assert_eq!(home.pids().len(), 1);
    // One that has died is started again, and is no zombie of its starter's.
    let first = home.pids()[0];
    signal(first, Signal::KILL);
    block_on(until("reaped", || !Path::new(&format!("/proc/{first}")).exists()));
    assert_eq!(home.start("listens", LIMIT).unwrap(), started);
}

#[test]
fn a_daemon_keeps_nothing_of_its_starter_open() {
    let home = Home::new();
    // What a shell has redirected for the starter would wait for the daemon's end.
    let left_open = rustix::io::dup(std::fs::File::open("/dev/zero").unwrap()).unwrap();
    home.start("listens", LIMIT).unwrap();
    drop(left_open);
    let pid = home.pids()[0];
    let log = home.path("log").to_str().unwrap().to_owned();
    let expected = [(0, "/dev/null".to_owned()), (1, log.clone()), (2, log)];
    block_on(until("stdio and the log alone", || descriptors(pid) == expected));
    let pid = Pid::from_raw(pid.cast_signed());
    assert_eq!(rustix::process::getsid(pid).ok(), pid, "a session of its own");
}

#[test]
fn a_daemon_that_fails_says_why() {
    let check = |kind: &str, limit: Duration, code: ErrorCode, words: &str| {
        let home = Home::new();
        let error = home.start(kind, limit).unwrap_err();
        let said = format!("{} {}", error.message, error.hint.as_deref().unwrap_or_default());
        assert_eq!(error.code, code, "{said}");
        assert!(said.contains(words), "{said}");
        assert_eq!(home.pids().len(), 1);
        assert!(home.pids().iter().all(|&pid| !Path::new(&format!("/proc/{pid}")).exists()), "{kind}: still there");
    };
    check("refuses", LIMIT, ErrorCode::DeviceUnavailable, "somebody else listens there");
    check("dies", LIMIT, ErrorCode::Internal, "exit status: 3");
    check("dies", LIMIT, ErrorCode::Internal, "no luck today");
    check("hangs", Duration::from_secs(1), ErrorCode::Internal, "did not listen in time");
}

#[test]
fn a_daemon_that_fails_later_writes_into_no_other_file() {
    let home = Home::new();
    home.start("listens and fails later", LIMIT).unwrap();
    block_on(until("it failed", || home.path("failed").exists()));
    assert_eq!(std::fs::read_to_string(home.path("later")).unwrap(), "");
}
