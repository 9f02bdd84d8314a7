//! `bench load`: how long until a GGUF file serves and what it takes, beside llama.cpp with the same file.
//!
//! llama.cpp comes as the prebuilt program of the npm package `node-llama-cpp`, fetched into `target/`. It maps a file and
//! reads weights when it first needs them, so that only the first token says what a load was worth; both are printed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rbee_testkit::process::{Process, of_home};
use rbee_testkit::{Cluster, Setup, patience, wait_for};
use serde_json::Value;

use super::machine::{self, Busy};
use super::random_gguf::{self, Mixture, SHAPE_1B};
use super::{quantile, sorted};
use crate::sdk;

/// Positions that both make room for.
const CONTEXT: usize = 2048;

/// What one load took.
struct Load {
    /// Until it serves, in milliseconds.
    ready: f64,
    /// Until it has answered with one token.
    token: f64,
    /// Most bytes in memory at once, the mapped file's among them.
    peak: u64,
}

pub(super) fn run(root: &Path, rounds: usize) -> Result<()> {
    let Some(node) = sdk::llama_cpp(root)? else { bail!("without llama.cpp there is nothing to compare with") };
    let script = root.join("xtask/src/bench/load.mjs");
    let folder = root.join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let cluster = Setup::real().home();
    cluster.rbee(&["up"]).exits(0);
    println!("{}; context {CONTEXT}, {rounds} rounds, medians\n", machine::describe());
    println!("| file | MiB | | ready ms | first token ms | peak MiB |");
    println!("|---|---|---|---|---|---|");
    let began = (Busy::now(), Instant::now());
    for mixture in [Mixture::Q8_0, Mixture::Q4_K_M] {
        let file = folder.join(format!("llama-1.1b-{}.gguf", mixture.name()));
        random_gguf::write(&file, &SHAPE_1B, mixture)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // The first of each brings the file into the page cache.
        for round in 0..=rounds {
            let (mine, other) = (rbee(&cluster, &file)?, llama_cpp(&node, &script, &file)?);
            if round > 0 {
                ours.push(mine);
                theirs.push(other);
            }
        }
        let size = file.metadata()?.len();
        for (name, loads) in [("rbee", &ours), ("llama.cpp", &theirs)] {
            let median = |value: &dyn Fn(&Load) -> f64| quantile(&sorted(loads.iter().map(value)), 0.5);
            let (ready, token) = (median(&|load| load.ready), median(&|load| load.token));
            let peak = median(&|load| load.peak as f64) / f64::from(1 << 20);
            println!("| {} | {} | {name} | {ready:.0} | {token:.0} | {peak:.0} |", mixture.name(), size >> 20);
        }
        std::fs::remove_file(&file)?;
    }
    let stolen = Busy::now().stolen_share(began.0, began.1.elapsed());
    println!("\nStolen by others: {:.0} % of {:.0} s", stolen * 100.0, began.1.elapsed().as_secs_f64());
    Ok(())
}

fn worker(cluster: &Cluster) -> Option<Process> {
    of_home(cluster.folder()).into_iter().find(|process| process.program == "llm-worker-rbee")
}

fn rbee(cluster: &Cluster, file: &Path) -> Result<Load> {
    let (model, context) = (file.display().to_string(), CONTEXT.to_string());
    let clock = Instant::now();
    // As many answers at once as the other has room for.
    cluster.rbee(&["worker", "spawn", "--model", &model, "--ctx", &context, "--slots", "1"]).exits(0);
    let ready = clock.elapsed();
    cluster.rbee(&["infer", "-m", &model, "-p", "a", "--max-tokens", "1", "--ignore-eos", "-q"]).exits(0);
    let token = clock.elapsed();
    let process = worker(cluster).context("a worker that has just answered runs")?;
    let peak = process.peak();
    cluster.rbee(&["stop", &model]).exits(0);
    wait_for("the worker ends", patience(Duration::from_secs(5)), || {
        if process.is_alive() { Err("it runs".to_owned()) } else { Ok(()) }
    });
    Ok(Load { ready: ready.as_secs_f64() * 1e3, token: token.as_secs_f64() * 1e3, peak })
}

fn llama_cpp(node: &PathBuf, script: &Path, file: &Path) -> Result<Load> {
    let clock = Instant::now();
    // Its packages are looked for from the script on; so the script is read from where they are.
    let program = std::fs::read_to_string(script)?;
    let output = Command::new("node")
        .args(["--input-type=module", "-e", &program, "--"])
        .arg(file)
        .arg(CONTEXT.to_string())
        .current_dir(node)
        .stdin(Stdio::null())
        .output()
        .context("node")?;
    ensure!(output.status.success(), "llama.cpp: {}", String::from_utf8_lossy(&output.stderr));
    let ended = clock.elapsed().as_secs_f64() * 1e3;
    let said: Value = serde_json::from_slice(&output.stdout).context("what llama.cpp took")?;
    let number = |key: &str| said[key].as_f64().with_context(|| format!("no `{key}` in {said}"));
    // The program measures from its own start on; what the process took before is the rest of the whole.
    let before = ended - number("whole")?;
    let peak = number("peak_kib")? as u64 * 1024;
    Ok(Load { ready: before + number("ready")?, token: before + number("token")?, peak })
}
