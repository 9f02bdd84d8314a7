//! `rbee infer` as its users type it.

use std::time::Duration;

use rbee_testkit::{Setup, Signal, patience, sim, wait_for};
use rbee_wire::view::JobState;
use serde_json::Value;

use crate::{infer, prompt, with};

#[test]
fn every_way_to_give_a_prompt_gives_the_same_text() {
    let cluster = Setup::sim("").warm();
    let text = prompt("ways");
    let line = format!("{text}\n");
    let want = sim::text(0, &text, 6);
    let n = ["--max-tokens", "6"];
    let plain: [&[&str]; 7] = [
        &["infer", &text],
        &["infer", "-p", &text],
        &["infer", "--prompt", &text],
        &["infer", "--raw", &text],
        &["infer", "-m", "tinybee", &text],
        &["infer", "--model", "tinybee", "-p", &text, "--hive", "localhost", "--device", "cpu"],
        &["run", "tinybee", &text],
    ];
    for args in plain {
        let out = cluster.rbee(&[args, &n].concat()).exits(0);
        assert_eq!(out.stdout, want, "{args:?}");
    }
    let piped: [&[&str]; 3] = [&["infer"], &["infer", "-"], &["run", "tinybee"]];
    for args in piped {
        let out = cluster.cmd(&[args, &n].concat()).stdin(&line).run().exits(0);
        assert_eq!(out.stdout, want, "{args:?} from a pipe");
    }
    // Raw means raw: the line's end belongs to the prompt.
    let out = cluster.cmd(&[&["infer", "--raw"][..], &n].concat()).stdin(&line).run().exits(0);
    assert_eq!(out.stdout, sim::text(0, &line, 6));
}

#[test]
fn stdout_is_the_text_and_flags_shape_it() {
    let cluster = Setup::sim("").warm();
    let text = prompt("flags");
    let ask = |more: &[&str]| cluster.rbee(&[&["infer", "-p", &text, "--max-tokens", "8"][..], more].concat());
    let want = sim::text(0, &text, 8);

    let quiet = ask(&["-q"]).exits(0);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), (want.as_str(), ""));
    assert_eq!(ask(&["--no-stream"]).exits(0).stdout, want);
    assert_eq!(ask(&["--color", "always"]).exits(0).stdout, want);
    let timed = ask(&["--timings"]).exits(0);
    assert_eq!(timed.stdout, want);
    assert!(timed.stderr.contains("token"), "{}", timed.stderr);

    // The third word is a stop text: it ends the output and is not sent.
    let words: Vec<&str> = want.split_inclusive(' ').collect();
    let stop = sim::text(0, &text, 3).rsplit(' ').next().unwrap().to_owned();
    let stopped = ask(&["--stop", &stop]).exits(0).stdout;
    assert_eq!(stopped.trim_end(), sim::text(0, &text, 2), "{words:?}");

    let lines = ask(&["--json"]).exits(0).json_lines();
    let of = |kind: &str| lines.iter().filter(|line| line["type"] == kind).collect::<Vec<&Value>>();
    let told: String = of("token").iter().map(|line| line["t"].as_str().unwrap()).collect();
    assert_eq!((told, of("started").len(), of("done").len()), (want.clone(), 1, 1));
    assert_eq!(lines.last().unwrap()["type"], "done");
    assert_eq!(of("done")[0]["choices"][0]["finish_reason"], "length");
    assert_eq!(of("done")[0]["usage"]["completion_tokens"], 8);

    let job = ask(&["--detach"]).exits(0).stdout;
    let attached = cluster.rbee(&["job", "attach", job.trim()]).exits(0);
    assert_eq!(attached.stdout, want);
    assert_eq!(cluster.job_view(job.trim()).state, JobState::Done);
}

#[test]
fn usage_errors_exit_2_and_bad_values_are_refused_by_name() {
    let cluster = Setup::sim("").home();
    for args in [&["infer", "-p", "x", "y"][..], &["infer", "--frobnicate"], &["infer"], &["nonsense"], &[]] {
        cluster.rbee(args).exits(2);
    }
    assert_eq!(cluster.processes(), []);
    cluster.rbee(&["queen", "start"]).exits(0);
    for (flag, value, field) in [
        ("--temperature", "9", "temperature"),
        ("--max-tokens", "0", "max_tokens"),
        ("--top-p", "0", "top_p"),
        ("--stop", "", "stop"),
    ] {
        cluster.rbee(&["infer", "-p", "x", flag, value]).exits(1).says(&["INVALID_REQUEST", field]);
    }
    assert!(cluster.answers().is_empty());
}

#[test]
fn the_same_seed_gives_the_same_text_alone_and_under_load() {
    let cluster = Setup::sim("--sim-spread --sim-step-us 2000").warm();
    let text = prompt("dice");
    let ask = |seed: &str| {
        let args =
            ["infer", "-p", &text, "--seed", seed, "--temperature", "1.3", "--top-p", "0.9", "--max-tokens", "40"];
        cluster.rbee(&args).exits(0).stdout
    };
    let (alone, other) = (ask("7"), ask("8"));
    assert_ne!(alone, other, "the seed matters");
    let long = with(infer(&prompt("noise"), 5000), serde_json::json!({ "detach": true }));
    let jobs: Vec<String> = (0..6).map(|_| cluster.post(&long)).collect();
    wait_for("load", Duration::from_secs(10), || match cluster.status().running {
        6 => Ok(()),
        n => Err(format!("{n} jobs run")),
    });
    assert_eq!(ask("7"), alone, "under load");
    assert_eq!(cluster.status().running, 6, "the load lasted");
    for job in jobs {
        cluster.queen().delete(&format!("/v1/jobs/{job}"));
    }
}

#[test]
fn an_unknown_model_exits_3_and_names_what_there_is() {
    let cluster = Setup::real().warm();
    let missing = cluster.folder().join("no-such-model").display().to_string();
    for model in ["nobody/nothing", "no-alias", missing.as_str()] {
        let out = cluster.rbee(&["infer", "-m", model, "-p", "x"]).exits(3);
        assert!(out.stderr.contains("MODEL_NOT_FOUND") && out.stderr.contains("hint:"), "{model}: {}", out.stderr);
        assert!(out.stderr.contains("tinybee"), "{model}: what there is: {}", out.stderr);
        assert_eq!(out.stdout, "");
        let json = cluster.rbee(&["infer", "-m", model, "-p", "x", "--json"]).exits(3);
        assert!(json.stdout.contains("MODEL_NOT_FOUND"), "{}", json.stdout);
    }
    assert_eq!(cluster.serving(1)[0].model.to_string(), "tinybee");
}

#[test]
fn no_load_refuses_where_nothing_serves() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["infer", "-p", "x", "--no-load"]).exits(3).says(&["NO_WORKER", "hint:"]);
    assert_eq!(cluster.running("llm-worker-rbee"), []);
    cluster.rbee(&["infer", "-p", "x", "--worker-id", "worker-none"]).exits(3);
    cluster.rbee(&["infer", "-p", "x", "--hive", "elsewhere"]).exits(3);
    assert_eq!(cluster.running("llm-worker-rbee"), []);
}

#[test]
fn ctrl_c_cancels_the_job_and_leaves_the_daemons_up() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let before = cluster.processes();
    let text = prompt("interruptions");
    let mut answer = cluster.cmd(&["infer", "-p", &text]).start();
    let heard = answer.hear("text", |text| text.split(' ').count() > 3);
    assert!(sim::text(0, &text, 1000).starts_with(&heard));
    answer.signal(Signal::INT);
    answer.finish(Duration::from_secs(10)).exits(130);
    let job = cluster.answers().remove(0);
    assert_eq!(job.state, JobState::Cancelled);
    cluster.workers_when("a free slot", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
    assert_eq!(cluster.processes(), before);
}

#[test]
fn stdout_closed_early_is_success_and_ends_the_job() {
    let cluster = Setup::sim("--sim-step-us 5000").warm();
    let mut answer = cluster.cmd(&["infer", "-p", &prompt("pipes")]).start();
    answer.hear("text", |text| !text.is_empty());
    answer.close_stdout();
    let out = answer.finish(Duration::from_secs(10)).exits(0);
    assert!(!out.stderr.contains("error"), "{}", out.stderr);
    cluster.workers_when("a free slot", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
    assert_eq!(cluster.answers()[0].state, JobState::Cancelled);
}

#[test]
fn a_job_cancelled_by_somebody_else_exits_1() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let mut answer = cluster.cmd(&["infer", "-p", &prompt("others")]).start();
    answer.hear("text", |text| !text.is_empty());
    let job = cluster.answers().remove(0).job_id;
    cluster.rbee(&["job", "cancel", job.as_str()]).exits(0);
    answer.finish(Duration::from_secs(10)).exits(1).says(&["cancelled"]);
}
