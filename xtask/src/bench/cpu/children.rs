//! Programs that are run to their end.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

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
