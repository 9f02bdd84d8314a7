//! candle-transformers' half: a program that the command builds below `target/` from the sources beside this, as it is fastest here.
//! What it depends on is none of our workspace's dependencies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Figure;
use super::children::cases;

const SOURCES: [(&str, &str); 2] =
    [("Cargo.toml", include_str!("candle/Cargo.toml.in")), ("src/main.rs", include_str!("candle/main.rs"))];

/// The built program.
pub(super) struct Candle {
    program: PathBuf,
}

impl Candle {
    /// Fetches and builds it.
    ///
    /// # Errors
    /// When it cannot be had.
    pub(super) fn build(root: &Path) -> Result<Self> {
        let folder = root.join("target/candle");
        fs::create_dir_all(folder.join("src")).with_context(|| folder.display().to_string())?;
        for (name, text) in SOURCES {
            let file = folder.join(name);
            // What is as it was is not built again.
            if fs::read_to_string(&file).ok().as_deref() != Some(text) {
                fs::write(&file, text).with_context(|| file.display().to_string())?;
            }
        }
        let (cargo, target) = (std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()), folder.join("target"));
        let status = Command::new(cargo)
            .args(["build", "--release", "--quiet", "--target-dir"])
            .arg(&target)
            .current_dir(&folder)
            // Not all its loops look for what the processor has when they run.
            .env("RUSTFLAGS", "-C target-cpu=native")
            .stdin(Stdio::null())
            .status()
            .context("cargo")?;
        ensure!(status.success(), "without candle there is nothing to compare with");
        Ok(Self { program: target.join("release/candle-cpu") })
    }

    /// Whether it has what this is about: its models take one sequence, and a prompt only at its beginning.
    pub(super) fn has(figure: &Figure) -> bool {
        match figure {
            Figure::Prefill { .. } | Figure::Decode { context: 0, .. } | Figure::Load { .. } | Figure::Peak => true,
            Figure::Decode { .. } | Figure::Batch { .. } | Figure::Serve { .. } => false,
        }
    }

    /// The figures of a group, in order.
    ///
    /// # Errors
    /// When the program fails.
    pub(super) fn measure(&self, figures: &[Figure], file: &Path, threads: usize) -> Result<Vec<f64>> {
        let mut command = Command::new(&self.program);
        command.arg(file).env("RAYON_NUM_THREADS", threads.to_string());
        cases(command, figures)
    }
}
