//! Workers of one machine that share its cores.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use rbee_testkit::{Cluster, Setup, patience, wait_for};
use serde_json::json;

use crate::{infer, prompt};

/// What the worker is asked to compute with.
const THREADS: usize = 4;

fn folder(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("run/cores")
}

/// The worker's compute threads, of which its engine's own is one.
fn threads(cluster: &Cluster) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", cluster.the("llm-worker-rbee").pid)).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    1 + names.filter(|name| name.starts_with("compute-")).count()
}

/// The text of a greedy answer.
fn answer(cluster: &Cluster) -> String {
    let mut job = infer(&prompt("cores"), 40);
    job["temperature"] = json!(0.0);
    let told = cluster.job(&job);
    told.done();
    told.text()
}

#[test]
fn a_worker_leaves_cores_to_others_that_compute_and_its_answer_stays_the_same() {
    let cluster = Setup::real().home();
    let threads_asked = THREADS.to_string();
    cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--threads", &threads_asked]).exits(0);
    let alone = answer(&cluster);
    assert_eq!(threads(&cluster), THREADS);
    let rested = || fs::read_dir(folder(&cluster)).unwrap().count();
    wait_for("it to say that it rests", patience(Duration::from_secs(1)), || match rested() {
        0 => Ok(()),
        left => Err(format!("{left} files")),
    });

    // As many others as there are cores.
    let others: Vec<PathBuf> = (0..std::thread::available_parallelism().unwrap().get())
        .map(|i| folder(&cluster).join(format!("{THREADS}-{i:016x}")))
        .collect();
    let held: Vec<File> = others.iter().map(|path| File::create_new(path).unwrap()).collect();
    held.iter().for_each(|file| file.lock().unwrap());
    assert_eq!(answer(&cluster), alone);
    assert_eq!(threads(&cluster), 1);

    // They die and leave their files.
    drop(held);
    assert_eq!(answer(&cluster), alone);
    assert_eq!(threads(&cluster), THREADS);
    assert!(others.iter().all(|path| !path.exists()));
}
