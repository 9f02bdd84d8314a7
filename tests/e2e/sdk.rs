//! What programs see that use the real openai packages, as `cargo xtask test` installs them. Without them it is said and nothing
//! is tested.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rbee_testkit::{Cluster, Cmd, Setup, Signal, patience, wait_for};

/// One installed package.
struct Sdk {
    name: &'static str,
    program: PathBuf,
    script: PathBuf,
    folder: PathBuf,
}

fn sdks() -> Vec<Sdk> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = root.join("../target/sdk");
    let all = [("py3", "bin/python", "suite.py"), ("py1", "bin/python", "suite.py"), ("node", "node", "suite.mjs")];
    let installed = all.into_iter().filter_map(|(name, program, script)| {
        let folder = cache.join(name);
        if !folder.join("made").is_file() {
            // Past the capture of a passing test's output.
            let _ = writeln!(std::io::stderr(), "skipped: the openai package `{name}` is not in target/sdk");
            return None;
        }
        let program = if name == "node" { PathBuf::from(program) } else { folder.join(program) };
        Some(Sdk { name, program, script: root.join("sdk").join(script), folder })
    });
    installed.collect()
}

/// What holds bodies against an OpenAPI document, where the Python packages for it are installed.
pub(crate) fn validator() -> Option<(PathBuf, PathBuf)> {
    let sdk = sdks().into_iter().find(|sdk| sdk.name == "py3")?;
    Some((sdk.program, sdk.script.with_file_name("openapi.py")))
}

impl Sdk {
    fn cmd<'a>(&self, cluster: &Cluster, cases: &[&str]) -> Cmd<'a> {
        let (script, base) = (self.script.display().to_string(), format!("http://{}", cluster.queen));
        let args: Vec<&str> = [&[script.as_str(), base.as_str()], cases].concat();
        cluster.any(&self.program, &args).env("RBEE_SDK_NODE", self.folder.display())
    }

    fn is_python(&self) -> bool {
        self.name != "node"
    }
}

#[test]
fn everything_the_sdks_offer_is_answered_or_refused_by_name() {
    let cluster = Setup::real().warm();
    for sdk in sdks() {
        let cases: &[&str] = if sdk.is_python() {
            &[
                "chat",
                "stream",
                "choices",
                "parameters",
                "logprobs",
                "completions",
                "embeddings",
                "forms",
                "errors",
                "ignored",
                "models",
            ]
        } else {
            &["chat", "stream", "completions", "embeddings", "forms", "errors", "ignored", "models"]
        };
        let said = sdk.cmd(&cluster, cases).run().exits(0).stdout;
        assert_eq!(said.lines().count(), cases.len(), "{}: {said}", sdk.name);
        if sdk.name == "py3" {
            sdk.cmd(&cluster, &["metrics"]).run().exits(0);
        }
    }
}

#[test]
fn tools_are_called_and_reasoning_is_told_apart_as_the_sdks_have_it() {
    let cluster = Setup::real().home();
    let model = crate::tools::model_that_calls(&cluster);
    cluster.rbee(&["worker", "spawn", "--model", &model]).exits(0);
    for sdk in sdks() {
        sdk.cmd(&cluster, &[&format!("tools={model}")]).run().exits(0);
    }
}

#[test]
fn a_model_that_loads_for_twenty_seconds_is_waited_for_without_an_exception() {
    let cluster = Setup::sim("--sim-load-ms 20000").home();
    cluster.rbee(&["up"]).exits(0);
    let began = Instant::now();
    let mut waiting = Vec::new();
    for sdk in sdks() {
        let cases: &[&str] = if sdk.is_python() { &["waits", "waits_whole"] } else { &["waits"] };
        waiting.extend(cases.iter().map(|case| (sdk.name, sdk.cmd(&cluster, &[case]).start())));
    }
    for (name, running) in waiting {
        let out = running.finish(Duration::from_secs(100));
        assert_eq!(out.code, 0, "{name}: {}", out.stderr);
        assert!(began.elapsed() > Duration::from_secs(20), "{name} did not wait for the model");
    }
}

#[test]
fn a_worker_that_dies_in_the_middle_of_an_answer_raises() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    for sdk in sdks() {
        let cases: &[&str] = if sdk.is_python() { &["dies", "dies_whole"] } else { &["dies"] };
        for case in cases {
            cluster.serving(1);
            let running = sdk.cmd(&cluster, &[case]).start();
            wait_for("the answer to be on its way", Duration::from_secs(20), || {
                match cluster.jobs().iter().any(|job| job.tokens > 3 && job.error.is_none() && job.usage.is_none()) {
                    true => Ok(()),
                    false => Err("no job has tokens".into()),
                }
            });
            cluster.the("llm-worker-rbee").signal(Signal::KILL);
            running.finish(Duration::from_secs(20)).exits(0);
        }
    }
}

#[test]
fn an_sdk_that_goes_away_leaves_nothing_running() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    for sdk in sdks() {
        sdk.cmd(&cluster, &["leaves"]).run().exits(0);
        cluster.workers_when("its slots to be free", patience(Duration::from_millis(500)), |workers| {
            workers.iter().all(|worker| worker.slots.used == 0)
        });
    }
}
