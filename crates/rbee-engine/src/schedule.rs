//! Which tokens of which sequence the next step computes.

use crate::runner::LogitsWanted;
use crate::sequence::Sequence;

/// A part of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Place among the running sequences.
    pub(crate) sequence: usize,
    /// Tokens to compute.
    pub(crate) count: usize,
    pub(crate) logits: LogitsWanted,
}

/// Fills `plan` with at most `budget` tokens: decoding sequences first, so that a long prompt never
/// stops a running stream, then prompts in order of admission, each in chunks of at most `chunk`.
///
/// A budget below the number of sequences, which only want of memory can cause, goes in single tokens
/// to those that have waited longest.
pub(crate) fn plan(running: &[Sequence], budget: usize, chunk: usize, plan: &mut Vec<Planned>) {
    plan.clear();
    let part = |sequence: usize, most: usize| {
        let pending = running[sequence].pending();
        let count = pending.min(most);
        let logits = if count == pending { LogitsWanted::Last } else { LogitsWanted::None };
        Planned { sequence, count, logits }
    };
    if running.len() > budget {
        plan.extend((0..running.len()).map(|i| part(i, 1)));
        plan.sort_by_key(|planned| running[planned.sequence].last_step);
        plan.truncate(budget);
        return;
    }
    plan.extend((0..running.len()).filter(|i| running[*i].is_decoding()).map(|i| part(i, 1)));
    let mut left = budget - plan.len();
    for i in (0..running.len()).filter(|i| !running[*i].is_decoding()) {
        if left == 0 {
            break;
        }
        let next = part(i, chunk.min(left));
        left -= next.count;
        plan.push(next);
    }
}
