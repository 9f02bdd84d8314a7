//! The real openai packages and the model hub's, fetched into a cache below `target/`, for the suite that drives the built programs with them
//! (`tests/e2e/sdk.rs`, `crates/rbee-catalog/tests/it/python.rs`).

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// Name of the folder, and exact versions on PyPI. Prometheus' own package has a parser of what it scrapes; the last two check an
/// OpenAPI document and bodies against it. The hub's own package shares its cache with ours (`rbee-catalog/tests`).
const PYTHON: [(&str, &[&str]); 3] = [
    ("py3", &["openai==3.54.0", "prometheus-client==0.22.1", "openapi-spec-validator==0.9.0", "jsonschema==4.26.0"]),
    ("py1", &["openai==1.109.1"]),
    ("hub", &["huggingface_hub==2.4.0"]),
];

/// The same on npm.
const NODE: (&str, &[&str]) = ("node", &["openai@6.49.0"]);

/// Fetches what is not there yet. What cannot be had is said, and its tests are skipped.
///
/// # Errors
/// When the cache cannot be written.
pub fn install(root: &Path) -> Result<()> {
    let cache = root.join("target/sdk");
    for (name, packages) in PYTHON {
        let folder = cache.join(name);
        once(&folder, packages, || {
            let python = folder.join("bin/python");
            run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
            run(Command::new(python).args(["-m", "pip", "install", "--quiet"]).args(packages))
        })?;
    }
    let (name, packages) = NODE;
    let folder = cache.join(name);
    once(&folder, packages, || {
        let flags = ["install", "--silent", "--no-fund", "--no-audit", "--ignore-scripts", "--omit=optional"];
        run(Command::new("npm").args(flags).args(packages).current_dir(&folder))
    })
}

/// Makes a folder by `make`, unless it was made for these packages before. Where that fails, it is said and there is no folder.
///
/// # Errors
/// When the cache cannot be written.
pub(crate) fn once(folder: &Path, packages: &[&str], make: impl FnOnce() -> Result<(), String>) -> Result<()> {
    let (made, packages) = (folder.join("made"), packages.join(" "));
    if std::fs::read_to_string(&made).is_ok_and(|before| before == packages) {
        return Ok(());
    }
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    match make() {
        Ok(()) => {
            eprintln!("sdk: {packages} in {}", folder.display());
            std::fs::write(made, packages).context("cannot write into the cache")
        }
        Err(why) => {
            let _ = std::fs::remove_dir_all(folder);
            eprintln!("sdk: SKIPPED: {packages} cannot be had, and what needs it does nothing: {why}");
            Ok(())
        }
    }
}

/// Runs a program to its end.
///
/// # Errors
/// Its last words, when it does not end well.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stderr, output.stdout].map(|said| String::from_utf8_lossy(&said).trim_end().to_owned());
    let last = said.iter().find_map(|said| said.lines().last());
    Err(format!("{shown}: {}", last.unwrap_or("it says nothing")))
}
