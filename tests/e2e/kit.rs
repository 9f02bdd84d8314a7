//! The test kit's own promises: a test that leaves something behind fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::Duration;

use rbee_testkit::{CANARY, Cluster, Setup, patience, process, wait_for};

fn end(cluster: Cluster) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| drop(cluster))).err()?;
    Some(panic.downcast_ref::<String>().cloned().unwrap_or_default())
}

#[test]
fn a_cluster_fails_the_test_that_leaves_a_process() {
    let cluster = Setup::sim("").home();
    let home = cluster.folder().to_owned();
    let mut left = Command::new("sleep").arg("60").env("RBEE_HOME", &home).spawn().unwrap();
    // Right after its start a process has no environment to be known by.
    wait_for("the process to be seen", patience(Duration::from_secs(1)), || {
        if process::of_home(&home).is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    });
    let problem = end(cluster).expect("the cluster fails");
    assert!(problem.contains("left") && problem.contains("sleep"), "{problem}");
    left.wait().unwrap();
    assert_eq!(process::of_home(&home), [], "and ends it all the same");
}

#[test]
fn a_cluster_fails_the_test_whose_prompt_stands_in_a_log() {
    let cluster = Setup::sim("").home();
    std::fs::create_dir(cluster.folder().join("state")).unwrap();
    std::fs::write(cluster.folder().join("state/queen.log"), format!("INFO got {CANARY}\n")).unwrap();
    let problem = end(cluster).expect("the cluster fails");
    assert!(problem.contains("prompt text"), "{problem}");
    assert_eq!(end(Setup::sim("").home()), None);
}
