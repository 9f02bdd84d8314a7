//! `bench start`: how long until the first token is on stdout, as a user sees it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use rbee_testkit::{Cluster, Setup};

use super::machine::{self, Busy};
use super::{quantile, sorted};

const ASK: [&str; 3] = ["infer", "--prompt", "Once upon a time"];

pub(super) fn run(times: usize) -> Result<()> {
    let program = launcher();
    // Builds what is stale, in the caller's own environment, so that no build is measured.
    ensure!(Command::new(&program).arg("version").status()?.success(), "{} does not run", program.display());
    let began = Busy::now();
    let clock = std::time::Instant::now();
    let mut cold = Vec::new();
    let mut warm = Vec::new();
    for _ in 0..times {
        let cluster = Setup::real().env("RBEE_LOG", "info").env("PATH", path()).home();
        cold.push(first_token(&cluster, &program)?);
        for _ in 0..3 {
            warm.push(first_token(&cluster, &program)?);
        }
    }
    let foreign = Busy::now().foreign_share(began, Duration::ZERO, clock.elapsed());
    println!(
        "{}; all cores together were busy for {:.0} % of the time, own work included",
        machine::describe(),
        foreign * 100.0
    );
    println!();
    println!("| first token on stdout | median ms | best | worst | runs |");
    println!("|---|---|---|---|---|");
    for (name, values) in [("cold: nothing runs", cold), ("warm: a worker serves", warm)] {
        let values = sorted(values);
        let (median, best) = (quantile(&values, 0.5), quantile(&values, 0.0));
        println!("| {name} | {median:.0} | {best:.0} | {:.0} | {} |", quantile(&values, 1.0), values.len());
    }
    Ok(())
}

/// `./rbee` of this repository, which is what a user types; the program itself where there is no launcher.
fn launcher() -> PathBuf {
    let launcher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rbee");
    launcher.canonicalize().unwrap_or_else(|_| rbee_testkit::bins::built().join("rbee"))
}

/// The launcher looks for cargo where a user has it.
fn path() -> String {
    std::env::var("PATH").unwrap_or_default()
}

fn first_token(cluster: &Cluster, program: &Path) -> Result<f64> {
    let mut answer = cluster.any(program, &ASK).start();
    answer.hear("text", |text| !text.is_empty());
    let took = answer.elapsed();
    let out = answer.finish(Duration::from_secs(60));
    ensure!(out.code == 0, "exit code {}: {}", out.code, out.stderr);
    Ok(took.as_secs_f64() * 1000.0)
}
