//! Which tokens of which sequence the next step computes.

use crate::runner::Wanted;
use crate::sequence::Sequence;

/// A part of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Place among the running sequences.
    pub(crate) sequence: usize,
    /// Tokens to compute.
    pub(crate) count: usize,
    pub(crate) wanted: Wanted,
}

impl Planned {
    /// Hidden states that come of it.
    pub(crate) fn states(&self) -> usize {
        match self.wanted {
            Wanted::Hidden => self.count,
            Wanted::Embedding => 1,
            Wanted::Nothing | Wanted::Logits | Wanted::LogitsOfAll => 0,
        }
    }

    /// Rows of logits that come of it.
    pub(crate) fn rows(&self) -> usize {
        self.wanted.rows(self.count)
    }

    /// Its tokens that are guesses.
    pub(crate) fn drafted(&self) -> usize {
        if self.wanted == Wanted::LogitsOfAll { self.count - 1 } else { 0 }
    }
}

/// How many tokens a step may have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// In all.
    pub(crate) budget: usize,
    /// Of one prompt.
    pub(crate) chunk: usize,
    /// Of all prompts, beside sequences that decode.
    pub(crate) beside: usize,
}

/// Fills `plan`: decoding sequences first, so that a long prompt never stops a running stream, then prompts. The prompt
/// that was admitted first has half of what is left, so that it always gets on, and the shortest have the rest, so
/// that nobody waits long behind a long one.
///
/// A budget below the number of sequences, which only want of memory can cause, goes in single tokens
/// to those that have waited longest.
///
/// Where texts are read whole, the one that was admitted first is computed however long it is, and beside it the shortest that
/// find room in the budget.
pub(crate) fn plan(running: &[Sequence], bounds: Bounds, plan: &mut Vec<Planned>) {
    let Bounds { budget, chunk, beside } = bounds;
    plan.clear();
    let part = |sequence: usize, most: usize| {
        let count = running[sequence].pending().min(most);
        Planned { sequence, count, wanted: running[sequence].wanted(count) }
    };
    // One model reads all its texts alike.
    if running.first().is_some_and(Sequence::is_whole) {
        let mut order: Vec<usize> = (0..running.len()).collect();
        order[1..].sort_by_key(|i| running[*i].pending());
        let mut left = budget;
        for (turn, i) in order.into_iter().enumerate() {
            let whole = part(i, usize::MAX);
            if turn > 0 && whole.count > left {
                break;
            }
            left = left.saturating_sub(whole.count);
            plan.push(whole);
        }
        return;
    }
    if running.len() > budget {
        plan.extend((0..running.len()).map(|i| part(i, 1)));
        plan.sort_by_key(|planned| running[planned.sequence].last_step);
        plan.truncate(budget);
        return;
    }
    plan.extend((0..running.len()).filter(|i| running[*i].is_decoding()).map(|i| part(i, 1)));
    let mut left = budget - plan.len();
    if !plan.is_empty() {
        left = left.min(beside);
    }
    let mut prompts: Vec<usize> = (0..running.len()).filter(|i| !running[*i].is_decoding()).collect();
    let Some(&oldest) = prompts.first() else { return };
    // The oldest's share first, then the shortest, then what is left to the oldest.
    let share = if prompts.len() > 1 { left.div_ceil(2) } else { left };
    let mut counts = vec![0; running.len()];
    prompts.sort_by_key(|i| running[*i].pending());
    let turns = [(oldest, share)].into_iter().chain(prompts.iter().map(|i| (*i, usize::MAX)));
    for (i, most) in turns {
        let count = part(i, chunk).count.min(counts[i] + most.min(left));
        left -= count - counts[i];
        counts[i] = count;
    }
    plan.extend(prompts.into_iter().filter(|i| counts[*i] > 0).map(|i| part(i, counts[i])));
}
