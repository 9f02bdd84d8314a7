//! llama.cpp's half: its own benches and server, built for this machine from the source that a package of PyPI carries.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::children::{said, watched};
use super::{BATCH_PROMPT, CONTEXT, Figure, serve};
use crate::sdk::{once, run};

/// The package and its version.
pub(super) const PACKAGE: &str = "llama-cpp-python==0.3.36";

/// What builds it.
const TOOLS: [&str; 2] = ["cmake==4.4.5", "ninja==1.13.2"];

const PROGRAMS: [&str; 3] = ["llama-bench", "llama-batched-bench", "llama-server"];

/// As it is fastest here: everything that this processor has, and nothing that asks for the network.
const FLAGS: [&str; 11] = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-GNinja",
];

/// The built programs.
pub(super) struct LlamaCpp {
    bench: PathBuf,
    batched: PathBuf,
    server: PathBuf,
}

impl LlamaCpp {
    /// Fetches and builds it below `target/`, once.
    ///
    /// # Errors
    /// When it cannot be had; the reason is said.
    pub(super) fn install(root: &Path) -> Result<Self> {
        let folder = root.join("target/llama.cpp");
        // What was built otherwise is built again.
        let how = [&[PACKAGE], &TOOLS[..], &PROGRAMS, &FLAGS].concat();
        once(&folder, &how, || {
            eprintln!("building llama.cpp, which takes some minutes");
            make(&folder)
        })?;
        if !folder.is_dir() {
            bail!("without llama.cpp there is nothing to compare with");
        }
        Self::of(&folder.join("build"))
    }

    /// Of a folder that it was built in.
    ///
    /// # Errors
    /// When a program is not there.
    pub(super) fn of(folder: &Path) -> Result<Self> {
        let programs = PROGRAMS.map(|name| folder.join("bin").join(name));
        for program in &programs {
            ensure!(program.is_file(), "{} has not been built", program.display());
        }
        let [bench, batched, server] = programs;
        Ok(Self { bench, batched, server })
    }

    /// The figures of a group, in order.
    ///
    /// # Errors
    /// When a program fails, or does not say what was asked.
    pub(super) fn measure(&self, figures: &[Figure], file: &Path, threads: usize) -> Result<Vec<f64>> {
        match figures {
            [Figure::Load { prompt }, Figure::Peak] => {
                let context = CONTEXT.to_string();
                let taken = watched(self.batched(file, threads, &context, *prompt, 1).args(["-npl", "1"]))?;
                let counted = batches(&taken.said)?.first().and_then(|line| line["t"].as_f64()).context("its time")?;
                Ok(vec![(taken.wall.as_secs_f64() - counted) * 1e3, taken.peak as f64 / f64::from(1 << 20)])
            }
            [Figure::Batch { tokens, .. }, ..] => {
                let counts: Vec<u64> = figures.iter().filter_map(sequences).collect();
                let most = counts.iter().copied().max().unwrap_or(1);
                let context = (most * (BATCH_PROMPT + tokens)).max(CONTEXT).to_string();
                let mut command = self.batched(file, threads, &context, BATCH_PROMPT, *tokens);
                let lines = batches(&said(command.args(["-npl", &join(&counts)]))?)?;
                let speed = |count: &u64| {
                    let line = lines.iter().find(|line| line["pl"].as_u64() == Some(*count));
                    line.and_then(|line| line["speed_tg"].as_f64()).with_context(|| format!("no batch of {count}"))
                };
                counts.iter().map(speed).collect()
            }
            [Figure::Serve { .. }, ..] => serve::theirs(&self.server, figures, file, threads),
            _ => self.alone(figures, file, threads),
        }
    }

    /// What it does with one sequence.
    fn alone(&self, figures: &[Figure], file: &Path, threads: usize) -> Result<Vec<f64>> {
        let asked: Vec<[u64; 3]> = figures.iter().filter_map(test).collect();
        let each = |at: usize| {
            let mut values: Vec<u64> = asked.iter().map(|test| test[at]).collect();
            values.dedup();
            join(&values)
        };
        let mut command = Command::new(&self.bench);
        command.arg("-m").arg(file).args(["-t", &threads.to_string(), "-o", "json", "-r", "1", "-fa", "1"]);
        command.args(["-p", &each(0), "-n", &each(1), "-d", &each(2)]);
        let tests: Vec<Value> = serde_json::from_str(&said(&mut command)?).context("llama-bench's answer")?;
        let speed = |asked: &[u64; 3]| {
            let is = |test: &&Value| ["n_prompt", "n_gen", "n_depth"].map(|key| test[key].as_u64()) == asked.map(Some);
            let speed = tests.iter().find(is).and_then(|test| test["avg_ts"].as_f64());
            speed.with_context(|| format!("llama-bench did not measure {asked:?}"))
        };
        asked.iter().map(speed).collect()
    }

    fn batched(&self, file: &Path, threads: usize, context: &str, prompt: u64, tokens: u64) -> Command {
        let (threads, prompt, tokens) = (threads.to_string(), prompt.to_string(), tokens.to_string());
        let mut command = Command::new(&self.batched);
        command.arg("-m").arg(file).args(["-c", context, "-b", "2048", "-ub", "512", "-fa", "on"]);
        command.args(["-t", &threads, "-tb", &threads, "-npp", &prompt, "-ntg", &tokens, "--output-format", "jsonl"]);
        command
    }
}

/// Prompt, generated tokens and depth of llama-bench's test.
fn test(figure: &Figure) -> Option<[u64; 3]> {
    match figure {
        Figure::Prefill { tokens } => Some([*tokens, 0, 0]),
        Figure::Decode { tokens, context } => Some([0, *tokens, *context]),
        Figure::Batch { .. } | Figure::Serve { .. } | Figure::Load { .. } | Figure::Peak => None,
    }
}

fn sequences(figure: &Figure) -> Option<u64> {
    if let Figure::Batch { sequences, .. } = figure { Some(*sequences) } else { None }
}

fn join(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

/// The lines of llama-batched-bench, among others that it prints.
fn batches(text: &str) -> Result<Vec<Value>> {
    let lines = text.lines().filter(|line| line.starts_with("{\"n_kv_max\""));
    lines.map(|line| serde_json::from_str(line).context("llama-batched-bench's answer")).collect()
}

fn make(folder: &Path) -> Result<(), String> {
    let (source, tools, build) = (folder.join("source"), folder.join("tools"), folder.join("build"));
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", PACKAGE, "-d"];
    run(Command::new("python3").args(pip).arg(folder))?;
    let archive = PACKAGE.replace('-', "_").replace("==", "-") + ".tar.gz";
    std::fs::create_dir(&source).map_err(|error| error.to_string())?;
    run(Command::new("tar").arg("-xzf").arg(folder.join(archive)).args(["--strip-components=1", "-C"]).arg(&source))?;
    run(Command::new("python3").args(["-m", "venv"]).arg(&tools))?;
    let bin = tools.join("bin");
    run(Command::new(bin.join("python")).args(["-m", "pip", "install", "--quiet"]).args(TOOLS))?;
    let ninja = bin.join("ninja");
    run(Command::new(bin.join("cmake"))
        .arg("-S")
        .arg(source.join("vendor/llama.cpp"))
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_MAKE_PROGRAM={}", ninja.display()))
        .args(FLAGS))?;
    run(Command::new(ninja).arg("-C").arg(&build).args(PROGRAMS))
}
