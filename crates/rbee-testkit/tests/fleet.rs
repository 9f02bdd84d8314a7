//! The scheduler over simulated fleets that crash, fail to load and are cancelled: what must hold does.

use rbee_scheduler::Policy;
use rbee_testkit::fleet_sim::traffic::{poisson, recorded};
use rbee_testkit::fleet_sim::{Setup, run, trial};

/// `cargo xtask sim --seeds N` runs as many more as anybody likes.
const SEEDS: u64 = 200;

#[test]
fn every_job_ends_once_no_slot_or_byte_is_given_twice_and_nobody_waits_for_ever() {
    let broken: Vec<String> =
        (0..SEEDS).filter_map(|seed| trial(seed).err().map(|broken| format!("seed {seed}: {broken}"))).collect();
    assert!(broken.is_empty(), "{} of {SEEDS}:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [3, 14, 15] {
        assert_eq!(trial(seed), trial(seed), "seed {seed}");
    }
    let setup = Setup::mixed(Policy::Fastest);
    let arrivals = poisson(1, 200, 2.0, &setup.models);
    assert_eq!(run(&setup, &arrivals), run(&setup, &arrivals));
}

#[test]
fn recorded_traffic_is_read_and_a_wrong_line_is_named() {
    let line = r#"{"at": 0.5, "model": "/models/chat", "prompt": 12, "answer": 30}"#;
    assert_eq!(recorded(&format!("{line}\n\n{line}\n")).map(|all| all.len()), Ok(2));
    let wrong = recorded(&format!("{line}\n{{\"at\": 1}}"));
    assert!(wrong.as_ref().is_err_and(|error| error.starts_with("line 2: ")), "{wrong:?}");
}
