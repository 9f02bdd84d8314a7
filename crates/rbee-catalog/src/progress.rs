//! How far a transfer is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::part::Gauge;

/// What a transfer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for other models' transfers.
    #[default]
    Waiting,
    /// Asking the hub for the commit and its files.
    Listing,
    /// Checking what an earlier transfer left.
    Checking,
    /// Another process fetches the same file.
    Elsewhere,
    /// Bytes come.
    Downloading,
    /// All files are here.
    Done,
}

/// How far a transfer is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// What it does.
    pub stage: Stage,
    /// Bytes of the model that are here.
    pub done: u64,
    /// Bytes of the model; 0 until they are known.
    pub total: u64,
    /// Bytes per second over the last few seconds.
    pub bytes_per_s: u64,
    /// Time that is left at this rate.
    pub eta: Option<Duration>,
    /// The file under way.
    pub file: Option<String>,
}

/// What a transfer keeps up to date; [`Meter::read`] makes a [`Progress`] of it.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    total: AtomicU64,
    /// Bytes of the files that are complete.
    before: AtomicU64,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    stage: Stage,
    file: Option<String>,
    gauge: Arc<Gauge>,
    /// When the rate was read last, what was done then, and the rate.
    rate: Option<(Instant, u64, f64)>,
}

impl Meter {
    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stage(&self, stage: Stage) {
        self.now().stage = stage;
    }

    pub(crate) fn total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// Begins a file, whose bytes this gauge counts.
    pub(crate) fn file(&self, path: &str, gauge: Arc<Gauge>) {
        let mut now = self.now();
        now.file = Some(path.to_owned());
        now.gauge = gauge;
    }

    /// The file under way is complete.
    pub(crate) fn finished(&self, bytes: u64) {
        let mut now = self.now();
        now.gauge = Arc::default();
        self.before.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How far it is at `at`, which never goes back from one call to the next.
    pub(crate) fn read(&self, at: Instant) -> Progress {
        let mut now = self.now();
        let total = self.total.load(Ordering::Relaxed);
        let done = self.before.load(Ordering::Relaxed) + now.gauge.done.load(Ordering::Relaxed);
        let rate = match (now.stage, now.rate) {
            (Stage::Downloading, Some((then, before, rate))) => {
                let passed = at.duration_since(then).as_secs_f64();
                if passed < 0.1 {
                    rate
                } else {
                    // The weight of the past halves every two seconds.
                    let past = 0.5f64.powf(passed / 2.0);
                    let rate = rate * past + (done.saturating_sub(before) as f64 / passed) * (1.0 - past);
                    now.rate = Some((at, done, rate));
                    rate
                }
            }
            _ => {
                now.rate = Some((at, done, 0.0));
                0.0
            }
        };
        let left = total.saturating_sub(done) as f64;
        Progress {
            stage: now.stage,
            done,
            total,
            bytes_per_s: rate as u64,
            eta: (rate >= 1.0 && total > 0).then(|| Duration::from_secs_f64((left / rate).min(1e8))),
            file: now.file.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_follow_the_bytes() {
        let meter = Meter::default();
        let gauge = Arc::new(Gauge::default());
        meter.total(10_000);
        meter.file("a", Arc::clone(&gauge));
        let start = Instant::now();
        meter.read(start);
        meter.stage(Stage::Downloading);
        for second in 1..=20u64 {
            gauge.done.store(second * 100, Ordering::Relaxed);
            meter.read(start + Duration::from_secs(second));
        }
        let progress = meter.read(start + Duration::from_secs(20));
        assert!((90..=100).contains(&progress.bytes_per_s), "{progress:?}");
        assert!((80..=90).contains(&progress.eta.unwrap().as_secs()), "{progress:?}");
        meter.finished(5_000);
        assert_eq!(meter.read(start + Duration::from_secs(21)).done, 5_000);
    }
}
