//! How workers end, and what is said of it.

use std::time::{Duration, Instant};

use rbee_supervisor::state::Timing;
use rbee_wire::ErrorCode;
use rbee_wire::hive::{ProcessExit, ProcessState};
use rustix::process::Signal;

use crate::rig::{Rig, hurried, role, shell, signal};

#[tokio::test]
async fn five_exits_in_a_row_are_a_crash_loop() {
    let rig = Rig::new();
    let worker = rig.start(shell("echo a life; echo what went wrong >&2; exit 3")).await.worker_id;
    let exit = rig.exit(&worker).await;
    assert_eq!(exit.error.as_ref().unwrap().code, ErrorCode::CrashLoop);
    assert_eq!((exit.code, exit.signal, exit.reason.as_str()), (Some(3), None, "failed"));
    assert_eq!(rig.log(&worker).matches("a life").count(), 5);
    assert!(exit.stderr_tail.contains("what went wrong"));
    let process = rig.supervisor.get(&worker).unwrap();
    assert_eq!((process.pid, process.restarts, process.incarnation.counter), (0, 4, 4));
    assert!(!rig.supervisor.kill(&worker), "there is nothing to end any more");
}

#[tokio::test]
async fn a_worker_in_backoff_is_retired_without_another_life() {
    let rig = Rig::with(Timing { first_wait: Duration::from_secs(3600), longest_wait: Duration::MAX, ..hurried() });
    let worker = rig.start(shell("echo a life; exit 3")).await.worker_id;
    rig.until(&worker, "in backoff", |process| process.state == ProcessState::Backoff).await;
    assert!(rig.supervisor.drain(&worker, Duration::ZERO));
    assert_eq!(rig.exit(&worker).await.code, Some(3));
    assert_eq!(rig.log(&worker).matches("a life").count(), 1);
}

/// Asks a worker of shell to finish at once, when it has said that it is set up; how it ended, and after how long.
async fn ended(script: &str) -> (ProcessExit, Duration) {
    let rig = Rig::new();
    let worker = rig.start(shell(script)).await.worker_id;
    rig.until_logged(&worker, "set up").await;
    let asked = Instant::now();
    assert!(rig.supervisor.drain(&worker, Duration::ZERO));
    let exit = rig.exit(&worker).await;
    (exit, asked.elapsed())
}

#[tokio::test]
async fn a_worker_that_ignores_sigterm_is_killed_after_the_grace() {
    let (exit, took) = ended("trap '' TERM; echo set up; while :; do sleep 0.01; done").await;
    assert_eq!((exit.code, exit.signal, exit.reason.as_str()), (None, Some(9), "retired"));
    assert!(took >= hurried().grace, "killed after {took:?}");
}

#[tokio::test]
async fn a_worker_that_heeds_sigterm_is_left_to_finish() {
    let (exit, _) = ended("trap 'echo last words; exit 7' TERM; echo set up; while :; do sleep 0.01; done").await;
    assert_eq!((exit.code, exit.signal, exit.reason.as_str()), (Some(7), None, "retired"));
    assert!(exit.stderr_tail.contains("last words\n"), "{}", exit.stderr_tail);
}

#[tokio::test]
async fn a_stopped_worker_is_noticed_killed_and_started_again() {
    let rig = Rig::with(Timing { silence: Duration::from_millis(800), ..hurried() });
    let worker = rig.start(role(&["worker"])).await.worker_id;
    let first = rig.until_ready(&worker).await;
    signal(first.pid, Signal::STOP);
    let second = rig.until(&worker, "started again", |process| process.restarts == 1).await;
    let exit = second.last_exit.unwrap();
    assert_eq!((exit.signal, exit.reason.as_str()), (Some(9), "stalled"));
    let second = rig.until_ready(&worker).await;
    assert_ne!(second.pid, first.pid);
    rig.supervisor.kill(&worker);
    assert_eq!(rig.exit(&worker).await.reason, "killed");
}

#[tokio::test]
async fn a_load_that_says_why_it_failed_is_not_tried_again() {
    let rig = Rig::new();
    let error = r#"{"type":"failed","error":{"code":"MODEL_CORRUPT","message":"half a file","retryable":false}}"#;
    let worker = rig.start(role(&["say", error, "and exit"])).await.worker_id;
    let exit = rig.exit(&worker).await;
    assert_eq!(exit.error.unwrap().code, ErrorCode::ModelCorrupt);
    assert_eq!(rig.supervisor.get(&worker).unwrap().restarts, 0);
}

#[tokio::test]
async fn a_process_that_does_not_know_its_nonce_is_killed() {
    let rig = Rig::new();
    let line = r#"{"type":"listening","port":1,"nonce":"guessed"}"#;
    let worker = rig.start(role(&["say", line, "and stay"])).await.worker_id;
    let process = rig.until(&worker, "killed", |process| process.last_exit.is_some()).await;
    let exit = process.last_exit.unwrap();
    assert_eq!((exit.signal, exit.reason.as_str(), process.url), (Some(9), "killed", None));
    rig.supervisor.kill(&worker);
    assert!(rig.supervisor.gone(&worker, crate::rig::LIMIT).await);
}
