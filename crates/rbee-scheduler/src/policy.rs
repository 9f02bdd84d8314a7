//! Which of the workers that could take a job gets it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::registry::Worker;

/// Which worker gets a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The first in order of registration that has a free slot.
    #[default]
    FirstAvailable,
    /// The one with the smallest part of its slots taken.
    LeastLoaded,
    /// The one that will have answered soonest, as far as its rates tell; waiting for a fast one may be sooner than a slow one
    /// that is free. A model that nobody serves is loaded where load and answer took the fewest seconds before.
    Fastest,
}

impl Policy {
    /// Every policy by its name.
    pub const ALL: &[(&str, Self)] =
        &[("first-available", Self::FirstAvailable), ("least-loaded", Self::LeastLoaded), ("fastest", Self::Fastest)];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, policy)| *policy == self).map_or("", |(name, _)| name)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Why a text is no policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPolicy;

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, policy)| *policy).ok_or(UnknownPolicy)
    }
}

/// How much work a job is, as far as that is known before it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Tokens of the prompt, guessed from its length.
    pub prompt: u64,
    /// Tokens of the answer: as many as it may have, or as answers usually have.
    pub answer: u64,
}

impl Work {
    /// Seconds that it takes alone, at so many tokens a second.
    pub(crate) fn seconds(self, prefill: f64, decode: f64) -> f64 {
        self.prompt as f64 / prefill + self.answer as f64 / decode
    }
}

impl Default for Work {
    fn default() -> Self {
        Self { prompt: 100, answer: 200 }
    }
}

/// What is to be done with a job.
#[derive(Clone, Debug)]
pub enum Choice<'a> {
    /// This worker gets it now.
    Now(&'a Worker, String),
    /// It waits: one that is busy will have answered sooner than any that is free.
    Wait,
}

/// Rates of a worker that has not been measured yet: what a small model on a CPU has, so that it is tried.
const UNKNOWN: (f64, f64) = (500.0, 50.0);

/// Seconds until a worker would have answered. A slot that comes free takes half an answer's time, for each job before.
///
/// The rate of decode is what one sequence gets; with more of them in a batch each gets less, by half at a full one.
pub fn seconds(worker: &Worker, work: Work) -> f64 {
    let or = |rate: f64, unknown: f64| if rate > 0.0 { rate } else { unknown };
    let (prefill, decode) = (or(worker.beat.prefill_rate, UNKNOWN.0), or(worker.beat.decode_rate, UNKNOWN.1));
    let slots = worker.slots();
    let total = slots.total.max(1) as f64;
    let share = 1.0 + (slots.used as f64 / total).min(1.0);
    let own = work.seconds(prefill, decode / share);
    let before = (slots.used as f64 + worker.beat.queue as f64 + 1.0 - total).max(0.0);
    own + before * own / 2.0 / total.max(1.0)
}

impl Policy {
    /// Chooses among workers that can take the job now, given in order of registration, and says why. `busy` could take it later.
    pub fn choose<'a>(self, able: &[&'a Worker], busy: &[&'a Worker], work: Work, now: Duration) -> Option<Choice<'a>> {
        let first = *able.first()?;
        let told = |worker: &'a Worker, what: String| {
            let slots = worker.slots();
            let why = format!(
                "{self}: {} on {} {what} ({} of {} used), heard of {} ms ago",
                worker.beat.worker_id,
                worker.beat.device,
                slots.used,
                slots.total,
                now.saturating_sub(worker.heard).as_millis(),
            );
            Choice::Now(worker, why)
        };
        Some(match self {
            Self::FirstAvailable => told(first, format!("is the first of {} with a free slot", able.len())),
            Self::LeastLoaded => {
                let load = |worker: &Worker| {
                    let slots = worker.slots();
                    (slots.used + worker.beat.queue) as f64 / slots.total.max(1) as f64
                };
                // Of equals the first.
                let least = able.iter().skip(1).fold(
                    first,
                    |best, worker| {
                        if load(worker) < load(best) { worker } else { best }
                    },
                );
                told(least, format!("has the smallest part of its slots taken of {}", able.len()))
            }
            Self::Fastest => {
                let (best, soonest) = able.iter().skip(1).fold((first, seconds(first, work)), |best, worker| {
                    let seconds = seconds(worker, work);
                    if seconds < best.1 { (*worker, seconds) } else { best }
                });
                // A guess must be clearly better before a job waits for it.
                let worth = |worker: &&&Worker| seconds(worker, work) * 1.25 < soonest;
                if busy.iter().any(|worker| worth(&worker)) {
                    return Some(Choice::Wait);
                }
                told(best, format!("will have answered in about {soonest:.1} s, the soonest of {}", able.len()))
            }
        })
    }
}
