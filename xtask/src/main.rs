//! Repository chores; each is a subcommand of `cargo xtask`.

mod bench;
mod cuda;
mod fuzz;
mod gen_api;
mod gen_docs;
mod gen_models;
mod gen_openapi;
mod gen_openapi_requests;
mod sdk;
mod sim;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: cargo xtask COMMAND

  test           build the programs, then run every test
  ci             fmt, clippy, tidy, gen --check, test, fuzz, cuda check
  tidy           the rules of the repository that no compiler checks
  gen [--check]  write the generated reference and schemas, or say which are stale
  fuzz [SECONDS] [TARGET]
                 run every fuzz target, or one, for 5 seconds unless given
  up [WORKERS]   a fleet of simulated workers in a home of its own, until Ctrl-C
  bench NAME     measure: relay, start, api, fleet, engine, cpu, download, load
  sim            the policies against each other, in virtual time
  sim --seeds N  look for a seed that breaks what the scheduler must hold
  cuda toolkit   bring NVIDIA's compiler into target/cuda
  cuda check     compile and lint what runs on GPUs, run its tests
  cuda build     the worker for GPUs, where a hive built here finds it
  cuda pack      one archive that tests and measures them on a machine with a GPU
  cuda gpu-check the same on this machine
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["test"] => test(),
        ["ci"] => ci(),
        ["tidy"] => tidy::run(&root()),
        ["gen"] => gen_docs::run(&root(), gen_docs::Mode::Write),
        ["gen", "--check"] => gen_docs::run(&root(), gen_docs::Mode::Check),
        ["fuzz"] => fuzz::run(&root(), fuzz::CI_SECONDS, None),
        ["fuzz", seconds] => fuzz::run(&root(), seconds, None),
        ["fuzz", seconds, target] => fuzz::run(&root(), seconds, Some(target)),
        ["up"] => up("2"),
        ["up", workers] => up(workers),
        ["cuda", "toolkit"] => cuda::toolkit(&root()).map(|home| println!("{}", home.display())),
        ["cuda", "check"] => cuda::check(&root()),
        ["cuda", "build"] => cuda::build(&root()).map(drop),
        ["cuda", "pack"] => cuda::pack(&root()).map(drop),
        ["cuda", "gpu-check"] => cuda::gpu_check(&root()),
        ["bench", ..] => bench::run(&args[1..]),
        ["sim", ..] => sim::main(&root(), &args[1..]),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

fn cargo(args: &[&str]) -> Result<()> {
    let shown = format!("cargo {}", args.join(" "));
    eprintln!("+ {shown}");
    let began = Instant::now();
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let status = Command::new(cargo).args(args).current_dir(root()).status().with_context(|| shown.clone())?;
    eprintln!("  {:.0} s", began.elapsed().as_secs_f64());
    if !status.success() {
        bail!("{shown} failed");
    }
    Ok(())
}

/// Everything that a change must pass, driven with the real SDKs where their registries can be reached. The programs are
/// built first and by the same command as `./rbee` uses, so nothing is built twice.
fn test() -> Result<()> {
    cargo(&["build", "--release", "--locked", "--workspace", "--bins"])?;
    sdk::install(&root())?;
    cargo(&["test", "--release", "--locked", "--workspace", "--no-fail-fast"])
}

fn ci() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    tidy::run(&root())?;
    gen_docs::run(&root(), gen_docs::Mode::Check)?;
    test()?;
    fuzz::run(&root(), fuzz::CI_SECONDS, None)?;
    cargo(&["clippy", "--release", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    cuda::check_if_possible(&root())
}

/// A fleet to try things on: nothing of it touches the user's own.
fn up(workers: &str) -> Result<()> {
    let workers: u32 = workers.parse().context("the number of workers")?;
    let cluster = rbee_testkit::Setup::sim("--sim-step-us 20000").warm();
    if workers > 1 {
        let replicas = workers.to_string();
        cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--device", "cpu", "--replicas", &replicas]);
    }
    println!("{}", cluster.logs().lines().last().unwrap_or_default());
    println!("a fleet runs in {}; Ctrl-C ends it", cluster.folder().display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(tokio::signal::ctrl_c()).context("waiting for Ctrl-C")
}
