//! The engine over a model of a real shape, and the products alone: bench programs of `rbee-models` and `rbee-kernels`, as candle is
//! kept out of here.

use std::process::Command;

use anyhow::{Context, Result, bail};

use super::machine::{Busy, describe};

/// Builds and runs the bench program of a name; arguments are its own.
///
/// # Errors
/// When it cannot be built or does not end well.
pub(super) fn run(name: &str, args: &[String]) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    // Of the whole workspace, so that dependencies have the features that they were built with already.
    let build = ["bench", "--locked", "--workspace", "--bench", name];
    let built = Command::new(&cargo).args(build).arg("--no-run").status().context("cargo")?;
    if !built.success() {
        bail!("the bench cannot be built");
    }
    println!("{}", describe());
    let before = (Busy::now(), std::time::Instant::now());
    let mut run = Command::new(&cargo);
    let ended = run.args(build).arg("--quiet").arg("--").args(args).status().context("cargo")?;
    let (wall, stolen) = (before.1.elapsed(), Busy::now().stolen_share(before.0, before.1.elapsed()));
    println!("\nStolen by others: {:.0} % of {:.0} s", stolen * 100.0, wall.as_secs_f64());
    if ended.success() { Ok(()) } else { bail!("the bench ended with {ended}") }
}
