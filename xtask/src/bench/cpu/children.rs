//! Programs that are run to their end.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Figure;

/// How often a process is asked for its peak: so much before its end it may grow unseen.
const LOOK: Duration = Duration::from_millis(2);

/// What a process took.
pub(super) struct Taken {
    pub(super) said: String,
    pub(super) wall: Duration,
    /// The most bytes it had in memory at once, the mapped file's among them.
    pub(super) peak: u64,
}

/// What a program says on stdout.
pub(super) fn said(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    checked(command, output)
}

/// The same, and what it took. It is looked at all the while, which a measurement of speed would feel.
pub(super) fn watched(command: &mut Command) -> Result<Taken> {
    let before = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.with_context(|| format!("{command:?}"))?;
    let status = format!("/proc/{}/status", child.id());
    let (ended, end) = channel::<()>();
    let (output, wall, peak) = std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let mut most = 0;
            while end.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                most = peak(Path::new(&status)).unwrap_or(0).max(most);
            }
            most
        });
        let output = child.wait_with_output();
        let wall = before.elapsed();
        drop(ended);
        (output, wall, watch.join().unwrap_or(0))
    });
    let said = checked(command, output.with_context(|| format!("{command:?}"))?)?;
    Ok(Taken { said, wall, peak })
}

fn peak(status: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

fn checked(command: &Command, output: Output) -> Result<String> {
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command:?}"))
}

/// The figures of a group, in order, of a program that takes them as cases and says the tokens and seconds of each.
///
/// # Errors
/// When the program fails.
pub(super) fn cases(mut command: Command, figures: &[Figure]) -> Result<Vec<f64>> {
    command.args(figures.iter().filter_map(case));
    if let [Figure::Load { .. }, Figure::Peak] = figures {
        let taken = watched(&mut command)?;
        let counted: f64 = lines(&taken.said)?.iter().map(|(_, seconds)| seconds).sum();
        return Ok(vec![(taken.wall.as_secs_f64() - counted) * 1e3, taken.peak as f64 / f64::from(1 << 20)]);
    }
    let speeds: Vec<f64> = lines(&said(&mut command)?)?.iter().map(|(tokens, seconds)| tokens / seconds).collect();
    ensure!(speeds.len() == figures.len(), "{} figures of {figures:?}", speeds.len());
    Ok(speeds)
}

/// Its name on the command line.
fn case(figure: &Figure) -> Option<String> {
    match figure {
        Figure::Prefill { tokens } => Some(format!("prefill:{tokens}")),
        Figure::Decode { tokens, context } => Some(format!("decode:{tokens}x{context}")),
        Figure::Batch { tokens, sequences } => Some(format!("batch:{tokens}x{sequences}")),
        Figure::Load { prompt } => Some(format!("load:{prompt}")),
        Figure::Serve { .. } | Figure::Peak => None,
    }
}

/// Tokens and seconds of each case.
fn lines(text: &str) -> Result<Vec<(f64, f64)>> {
    let one = |line: &str| {
        let line: Value = serde_json::from_str(line).context("a case")?;
        Ok((line["tokens"].as_f64().context("tokens")?, line["seconds"].as_f64().context("seconds")?))
    };
    text.lines().map(one).collect()
}
