//! The machine a bench runs on, and what else it did meanwhile.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Time that all processors together were busy, and that others took from this machine.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Busy {
    work: Duration,
    stolen: Duration,
}

impl Busy {
    /// As counted since the machine's start.
    pub(super) fn now() -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let columns: Vec<u64> = text
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .map(|column| column.parse().unwrap_or(0))
            .collect();
        // user nice system idle iowait irq softirq steal
        let ticks = |at: &[usize]| {
            let sum: u64 = at.iter().filter_map(|&i| columns.get(i)).sum();
            Duration::from_millis(sum * 10)
        };
        Self { work: ticks(&[0, 1, 2, 5, 6]), stolen: ticks(&[7]) }
    }

    /// The share of all processors' time since `before` that others took from this machine.
    pub(super) fn stolen_share(self, before: Self, wall: Duration) -> f64 {
        (self.stolen - before.stolen).as_secs_f64() / (wall.as_secs_f64() * cores() as f64)
    }

    /// The share of all processors that others had since `before`, of which `ours` was our own processes' work.
    pub(super) fn foreign_share(self, before: Self, ours: Duration, wall: Duration) -> f64 {
        let work = (self.work - before.work).saturating_sub(ours) + (self.stolen - before.stolen);
        work.as_secs_f64() / (wall.as_secs_f64() * cores() as f64)
    }
}

/// Processors that this process may use.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// One line for the table's caption.
pub(super) fn describe() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    format!("{}, {} cores", model.unwrap_or("unknown processor").trim(), cores())
}

/// Time that this process's children have been on a processor, of those that have ended.
pub(super) fn children_cpu() -> Duration {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may have spaces: state, ..., utime, stime, cutime, cstime.
    let columns = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = columns.skip(13).take(2).filter_map(|column| column.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

/// Time that the calling thread has been on a processor.
pub(super) fn thread_cpu() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds = text.split_whitespace().next().context("an empty schedstat")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}
