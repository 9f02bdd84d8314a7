//! Our own half: the bench programs `cpu` of `rbee-models` and `limits` of `rbee-kernels`, and for serving the whole of rbee.

use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::children::{cases, said};
use super::{Figure, serve};

/// What the machine does at most with so many threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// 10^9 bytes read in a second.
    pub(super) read: f64,
    /// 10^9 operations in a second on bytes, where a product and its sum are two.
    pub(super) int8: Option<f64>,
    /// The same on bf16.
    pub(super) bf16: Option<f64>,
    /// The same on f32.
    pub(super) f32: Option<f64>,
}

/// The built programs.
pub(super) struct Ours {
    cpu: PathBuf,
    limits: PathBuf,
    /// Processor time so far of our processes that are nobody's children.
    pub(super) daemons: Cell<Duration>,
}

impl Ours {
    /// Builds them.
    ///
    /// # Errors
    /// When they cannot be built.
    pub(super) fn build(root: &Path) -> Result<Self> {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        // Of the whole workspace, so that dependencies have the features that they were built with already.
        let output = Command::new(cargo)
            .args(["bench", "--locked", "--workspace", "--bench", "cpu", "--bench", "limits", "--no-run"])
            .arg("--message-format=json-render-diagnostics")
            .current_dir(root)
            .stderr(Stdio::inherit())
            .output()
            .context("cargo")?;
        ensure!(output.status.success(), "the benches cannot be built");
        let artifacts = output.stdout.split(|byte| *byte == b'\n');
        let built: HashMap<String, PathBuf> = artifacts
            .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
            .filter(|line| line["target"]["kind"][0] == "bench")
            .filter_map(|line| Some((line["target"]["name"].as_str()?.to_owned(), line["executable"].as_str()?.into())))
            .collect();
        let program = |name: &str| built.get(name).cloned().with_context(|| format!("cargo built no bench {name}"));
        Ok(Self { cpu: program("cpu")?, limits: program("limits")?, daemons: Cell::default() })
    }

    /// What the machine does now.
    ///
    /// # Errors
    /// When the program fails.
    pub(super) fn limits(&self, threads: usize) -> Result<Limits> {
        let text = said(Command::new(&self.limits).args(["--threads", &threads.to_string()]))?;
        let line: Value = serde_json::from_str(&text).context("the machine's limits")?;
        let read = line["read"].as_f64().context("a bandwidth")?;
        Ok(Limits { read, int8: line["int8"].as_f64(), bf16: line["bf16"].as_f64(), f32: line["f32"].as_f64() })
    }

    /// The figures of a group, in order.
    ///
    /// # Errors
    /// When the program fails.
    pub(super) fn measure(&self, figures: &[Figure], file: &Path, threads: usize) -> Result<Vec<f64>> {
        if let [Figure::Serve { .. }, ..] = figures {
            let (speeds, daemons) = serve::ours(figures, file, threads)?;
            self.daemons.update(|before| before + daemons);
            return Ok(speeds);
        }
        let mut command = Command::new(&self.cpu);
        command.arg(file).args(["--threads", &threads.to_string()]);
        cases(command, figures)
    }
}
