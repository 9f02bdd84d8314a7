//! Which of the workers that could take a job gets it.

use std::time::Duration;

use crate::registry::Worker;

/// Which worker gets a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The first in order of registration that has a free slot.
    #[default]
    FirstAvailable,
}

impl Policy {
    /// Chooses among workers that can take the job now, given in order of registration, and says why.
    pub fn choose<'a>(self, able: &[&'a Worker], now: Duration) -> Option<(&'a Worker, String)> {
        match self {
            Self::FirstAvailable => able.first().map(|worker| {
                let slots = worker.slots();
                let why = format!(
                    "first-available: {} on {} is the first of {} with a free slot ({} of {} used), heard of {} ms ago",
                    worker.beat.worker_id,
                    worker.beat.device,
                    able.len(),
                    slots.used,
                    slots.total,
                    now.saturating_sub(worker.heard).as_millis(),
                );
                (*worker, why)
            }),
        }
    }
}
