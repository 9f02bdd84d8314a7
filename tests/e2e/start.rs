//! Starting, finding and stopping daemons.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use rbee_testkit::{Cluster, Setup, bins, patience, port, sim, wait_for};

use crate::prompt;

fn pids(cluster: &Cluster) -> Vec<u32> {
    cluster.processes().iter().map(|process| process.pid).collect()
}

#[test]
fn a_cold_home_answers_with_the_built_in_model_and_then_stays_warm() {
    let cluster = Setup::real().home();
    let ask = ["infer", "--prompt", "Once upon a time", "--raw", "--temperature", "0", "--max-tokens", "12"];
    let cold = cluster.rbee(&ask).exits(0).says(&["`rbee down`"]);
    assert!(cold.stdout.starts_with(", there was"), "{}", cold.stdout);
    assert_eq!(cold.stderr.matches("rbee down").count(), 1, "the daemons are named once: {}", cold.stderr);
    let started = pids(&cluster);
    assert_eq!(started.len(), 3, "{:?}", cluster.processes());

    let warm = cluster.rbee(&ask).exits(0);
    assert_eq!(warm.stdout, cold.stdout);
    assert!(!warm.stderr.contains("rbee down"), "nothing was started: {}", warm.stderr);
    assert_eq!(pids(&cluster), started, "the warm answer comes from the same processes");
}

#[test]
fn two_command_lines_on_a_cold_home_start_one_set_of_daemons() {
    let cluster = Setup::sim("--sim-load-ms 300").home();
    let prompts = [prompt("one"), prompt("two")];
    let running = prompts.each_ref().map(|text| cluster.cmd(&["infer", "-p", text, "--max-tokens", "9"]).start());
    for (running, text) in running.into_iter().zip(&prompts) {
        assert_eq!(running.finish(Duration::from_secs(60)).exits(0).stdout, sim::text(0, text, 9));
    }
    for program in ["queen-rbee", "rbee-hive", "llm-worker-rbee"] {
        cluster.the(program);
    }
}

#[test]
fn two_homes_live_side_by_side() {
    let (one, two) = (Setup::sim("--sim-seed 1").home(), Setup::sim("--sim-seed 2").home());
    let text = prompt("homes");
    let ask = ["infer", "-p", &text, "--max-tokens", "5"];
    thread::scope(|scope| {
        let other = scope.spawn(|| two.rbee(&ask).exits(0));
        assert_eq!(one.rbee(&ask).exits(0).stdout, sim::text(1, &text, 5));
        assert_eq!(other.join().unwrap().stdout, sim::text(2, &text, 5));
    });
    let before = pids(&two);
    one.rbee(&["down"]).exits(0);
    assert_eq!(one.processes(), []);
    assert_eq!(pids(&two), before, "stopping one home leaves the other alone");
    assert_eq!(two.rbee(&ask).exits(0).stdout, sim::text(2, &text, 5));
}

#[test]
fn the_queen_of_another_home_is_not_used() {
    let (one, two) = (Setup::sim("").home(), Setup::sim("").home());
    one.rbee(&["queen", "start"]).exits(0);
    let foreign = format!("http://{}", one.queen);
    let text = prompt("strangers");
    let out = two.cmd(&["infer", "-p", &text]).env("RBEE_QUEEN_URL", &foreign).run();
    assert_ne!(out.code, 0, "{}", out.stderr);
    assert!(out.stderr.contains(&one.queen.to_string()), "{}", out.stderr);
    assert!(out.stderr.contains("hint:"), "{}", out.stderr);
    assert_eq!(two.processes(), []);
    assert!(one.answers().is_empty(), "the prompt went to a stranger");
}

#[test]
fn nothing_is_started_by_reading_stopping_or_with_no_start() {
    let cluster = Setup::sim("").home();
    for verb in [
        &["infer", "-p", "x", "--no-start"][..],
        &["status"],
        &["ps"],
        &["worker", "list"],
        &["worker", "process", "list"],
        &["job", "list"],
        &["hive", "list"],
        &["hive", "status"],
        &["queen", "status"],
        &["queen", "info"],
        &["queen", "stop"],
        &["hive", "stop"],
        &["down"],
    ] {
        let out = cluster.rbee(verb);
        assert_eq!(out.code, 4, "{verb:?}: {}{}", out.stdout, out.stderr);
        assert!(out.stderr.contains("hint:"), "{verb:?}: {}", out.stderr);
        assert_eq!(cluster.processes(), [], "{verb:?}");
    }
}

/// Answers every connection as a server that is not rbee would.
fn answer_as_a_stranger(listener: std::net::TcpListener) {
    thread::spawn(move || {
        for socket in listener.incoming() {
            let Ok(mut socket) = socket else { return };
            let mut buffer = [0; 2048];
            let _ = socket.read(&mut buffer);
            let _ = socket.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\nConnection: close\r\n\r\nnope\n");
        }
    });
}

#[test]
fn a_taken_port_says_by_whom_and_what_to_do() {
    let holder = std::process::id().to_string();

    // The queen's, by a server of another kind and by one that never answers.
    for talks in [true, false] {
        let cluster = Setup::sim("").home();
        let listener = port::hold(cluster.queen);
        let _kept = if talks {
            answer_as_a_stranger(listener);
            None
        } else {
            Some(listener)
        };
        let out = cluster.rbee(&["infer", "-p", "x"]).exits(4);
        assert!(out.stderr.contains(&holder), "by whom: {}", out.stderr);
        assert!(out.stderr.contains(&cluster.queen.to_string()), "{}", out.stderr);
        assert!(out.stderr.contains("hint:") && out.stderr.contains("--queen"), "what to do: {}", out.stderr);
        assert_eq!(cluster.processes(), []);
    }

    // The hive's.
    let cluster = Setup::sim("").home();
    answer_as_a_stranger(port::hold(cluster.hive));
    let out = cluster.rbee(&["infer", "-p", "x"]);
    assert!(matches!(out.code, 1 | 4), "{}: {}", out.code, out.stderr);
    assert!(out.stderr.contains(&holder), "by whom: {}", out.stderr);
    assert!(out.stderr.contains("RBEE_HIVE_BIND"), "what to do: {}", out.stderr);
}

#[test]
fn daemons_of_an_older_build_are_replaced_or_named() {
    let mut cluster = Setup::sim("").home();
    let new = cluster.bins.clone();
    cluster.bins = bins::another_build(&cluster.folder().join("older"));
    cluster.rbee(&["up"]).exits(0);
    let old = cluster.the("queen-rbee");
    assert!(old.path.starts_with(cluster.folder()), "{old:?}");

    cluster.bins = new;
    let text = prompt("builds");
    let out = cluster.rbee(&["infer", "-p", &text, "--max-tokens", "4"]).exits(0);
    assert_eq!(out.stdout, sim::text(0, &text, 4));
    let now = cluster.the("queen-rbee");
    assert!(now.path.starts_with(&cluster.bins) || out.stderr.contains("build"), "{now:?}: {}", out.stderr);
    if now.path.starts_with(&cluster.bins) {
        assert!(!old.is_alive());
        let hive = cluster.the("rbee-hive");
        assert!(hive.path.starts_with(&cluster.bins) || out.stderr.contains("hive"), "{hive:?}: {}", out.stderr);
    }
}

#[test]
fn down_returns_when_every_process_is_gone() {
    let cluster = Setup::sim("--sim-step-us 1000").warm();
    assert_eq!(cluster.processes().len(), 3);
    cluster.rbee(&["down"]).exits(0);
    assert_eq!(cluster.processes(), []);
    cluster.rbee(&["down"]).exits(4).says(&["hint:"]);
}

#[test]
fn down_lets_a_running_answer_finish() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let text = prompt("endings");
    let mut answer = cluster.cmd(&["infer", "-p", &text, "--max-tokens", "40"]).start();
    answer.hear("text", |text| !text.is_empty());
    cluster.rbee(&["down"]).exits(0);
    assert_eq!(cluster.processes(), []);
    assert_eq!(answer.finish(Duration::from_secs(10)).exits(0).stdout, sim::text(0, &text, 40));
}

#[test]
fn a_second_queen_of_a_home_says_who_is_there() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let queen = cluster.the("queen-rbee");
    let second = cluster.program("queen-rbee", &["--bind", &port::free().to_string()]).run();
    assert_ne!(second.code, 0, "{}", second.stderr);
    assert!(second.stderr.contains(&queen.pid.to_string()), "{}", second.stderr);
    assert!(second.took < patience(Duration::from_secs(1)), "{:?}", second.took);
    assert_eq!(cluster.the("queen-rbee"), queen);
}

#[test]
fn stopping_the_queen_leaves_the_hive_and_starting_it_again_finds_everything() {
    let cluster = Setup::sim("").warm();
    let (hive, worker) = (cluster.the("rbee-hive"), cluster.the("llm-worker-rbee"));
    cluster.rbee(&["queen", "stop"]).exits(0);
    assert_eq!(cluster.running("queen-rbee"), []);
    cluster.rbee(&["queen", "start"]).exits(0);
    cluster.serving(1);
    assert_eq!((cluster.the("rbee-hive"), cluster.the("llm-worker-rbee")), (hive.clone(), worker));
    // Without a queen the hive is reached itself.
    cluster.rbee(&["queen", "stop"]).exits(0);
    cluster.rbee(&["hive", "stop"]).exits(0);
    assert_eq!(cluster.processes(), []);
    wait_for("the hive's port", Duration::from_secs(1), || match std::net::TcpListener::bind(cluster.hive) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    });
}
