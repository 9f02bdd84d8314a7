//! The real openai packages, fetched into a cache below `target/`, for the suite that drives the built programs with them
//! (`tests/e2e/sdk.rs`).

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// Name of the folder, and the package's exact version on PyPI.
const PYTHON: [(&str, &str); 2] = [("py3", "openai==3.54.0"), ("py1", "openai==1.109.1")];

/// The same on npm.
const NODE: (&str, &str) = ("node", "openai@6.49.0");

/// Fetches what is not there yet. What cannot be had is said, and its tests are skipped.
///
/// # Errors
/// When the cache cannot be written.
pub fn install(root: &Path) -> Result<()> {
    let cache = root.join("target/sdk");
    for (name, package) in PYTHON {
        let folder = cache.join(name);
        once(&folder, package, || {
            let python = folder.join("bin/python");
            run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
            run(Command::new(python).args(["-m", "pip", "install", "--quiet", package]))
        })?;
    }
    let (name, package) = NODE;
    let folder = cache.join(name);
    once(&folder, package, || {
        let flags = ["install", "--silent", "--no-fund", "--no-audit", "--ignore-scripts", package];
        run(Command::new("npm").args(flags).current_dir(&folder))
    })
}

/// Makes a folder by `make`, unless it was made for this package before.
fn once(folder: &Path, package: &str, make: impl FnOnce() -> Result<(), String>) -> Result<()> {
    let made = folder.join("made");
    if std::fs::read_to_string(&made).is_ok_and(|before| before == package) {
        return Ok(());
    }
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    match make() {
        Ok(()) => {
            eprintln!("sdk: {package} is in {}", folder.display());
            std::fs::write(made, package).context("cannot write into the cache")
        }
        Err(why) => {
            let _ = std::fs::remove_dir_all(folder);
            eprintln!("sdk: SKIPPED: {package} cannot be had, and the tests that need it do nothing: {why}");
            Ok(())
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{shown}: {}", said.lines().last().unwrap_or("it says nothing")))
}
