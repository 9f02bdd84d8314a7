//! Whether it pays to compute more rows than there are sequences.
//!
//! A step that computes a draft beside a sequence's token gives more than one token where the draft is right, and takes longer.
//! How long steps of so many rows take is measured; how likely each drafted token is to come is known; so the
//! number of tokens that gives the most tokens a second can be looked for. Tokens do not depend on it.

use std::time::Duration;

/// Whether tokens are guessed, so that one step can give several of a sequence. The tokens are the same either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Never.
    Off,
    /// Where it gives more tokens a second, by the times of steps that the engine is told.
    #[default]
    Measured,
    /// Whenever there is a guess, whatever it costs: for tests and measurements.
    Always,
}

impl std::str::FromStr for Speculation {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "off" => Ok(Self::Off),
            "measured" => Ok(Self::Measured),
            "always" => Ok(Self::Always),
            _ => Err("must be off, measured or always"),
        }
    }
}

/// Most rows of a step with drafts. With more sequences than that, each row costs about as much as a step gives.
pub(crate) const MOST_ROWS: usize = 64;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.25;

/// A measurement counts as at most so many times the average so far: a step that the machine had no time for is not
/// held against its rows for long.
const OUTLIER: f64 = 2.0;

/// Steps after which a measurement is forgotten: texts get longer and machines busy, and what did not pay may.
const FORGOTTEN: u64 = 256;

/// A token less likely than this is not worth a thought.
const LEAST_ODDS: f32 = 0.05;

/// Of so many steps with drafts one has another number of them, to know what that costs.
const PROBE: u64 = 32;

/// How much better drafts must be than none: measurements are noisy.
const MARGIN: f64 = 1.02;

/// How long steps of so many rows take.
#[derive(Clone, Debug)]
pub(crate) struct Costs {
    /// By the number of rows: seconds, and when that was measured last.
    times: [Option<(f64, u64)>; MOST_ROWS + 1],
    /// Steps measured.
    clock: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Self { times: [None; MOST_ROWS + 1], clock: 0 }
    }
}

impl Costs {
    /// Learns from a step of so many rows and no prompt tokens.
    pub(crate) fn learn(&mut self, rows: usize, took: Duration) {
        self.clock += 1;
        let (known, took) = (self.known(rows), took.as_secs_f64());
        if let Some(time) = self.times.get_mut(rows) {
            let average = known.map_or(took, |known| known + NEWEST * (took.min(OUTLIER * known) - known));
            *time = Some((average, self.clock));
        }
    }

    /// How many drafted tokens are best computed beside so many sequences, of tokens with these odds, likeliest first. One that
    /// was never tried is taken to be free, more than were ever tried to cost no more, and both are known after a step each.
    pub(crate) fn best(&self, sequences: usize, odds: impl Iterator<Item = f32>) -> usize {
        // Without drafts first, to have something to compare to.
        let Some(plain) = self.known(sequences).filter(|time| *time > 0.0) else { return 0 };
        let mut tokens = sequences as f64;
        let (mut best, mut best_rate) = (0, tokens / plain * MARGIN);
        let mut most = 0;
        for (count, odds) in (1..).zip(odds.take_while(|odds| *odds >= LEAST_ODDS)) {
            most = count;
            tokens += f64::from(odds);
            let rows = sequences + count;
            let time = if count == 1 { self.known(rows).unwrap_or(plain) } else { self.time(rows, plain) };
            let rate = tokens / time;
            if rate > best_rate {
                (best, best_rate) = (count, rate);
            }
        }
        if best > 0 && self.clock.is_multiple_of(PROBE) {
            let probe = (self.clock / PROBE) as usize % (best + 1);
            return most.min(1 + probe);
        }
        best
    }

    fn known(&self, rows: usize) -> Option<f64> {
        let (time, when) = (*self.times.get(rows)?)?;
        (self.clock - when < FORGOTTEN).then_some(time)
    }

    /// Of so many rows: on the line between those that are known.
    fn time(&self, rows: usize, plain: f64) -> f64 {
        let known = |rows: usize| self.known(rows).map(|time| (rows as f64, time));
        let below = (0..=rows).rev().find_map(known).unwrap_or((0.0, plain));
        let above = (rows..=MOST_ROWS).find_map(known).unwrap_or((f64::INFINITY, below.1));
        if above.0 == below.0 {
            below.1
        } else {
            below.1 + (above.1 - below.1) * (rows as f64 - below.0) / (above.0 - below.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// What is chosen at last of eight tokens that are right so often, and how many steps had drafts, where steps take `cost` by
    /// their rows.
    fn settled(right: f32, sequences: usize, steps: usize, cost: impl Fn(usize) -> u32) -> (usize, usize) {
        let mut costs = Costs::default();
        let odds = || (1..=8).map(move |i| right.powi(i));
        let (mut last, mut drafting) = (0, 0);
        for _ in 0..steps {
            last = costs.best(sequences, odds());
            drafting += usize::from(last > 0);
            costs.learn(sequences + last, MS * cost(sequences + last));
        }
        (last, drafting)
    }

    #[test]
    fn drafts_are_as_long_as_pays() {
        assert_eq!(settled(0.95, 1, 100, |_| 100).0, 8, "rows are free");
        assert_eq!(settled(0.95, 1, 100, |rows| 100 * rows as u32).0, 0, "a row costs as much as a step");
        let (some, _) = settled(0.6, 1, 100, |rows| 80 + 20 * rows as u32);
        assert!((1..=4).contains(&some), "{some}");
        assert_eq!(settled(0.95, 1, 100, |rows| if rows <= 4 { 100 } else { 400 }).0, 3, "up to where rows are free");
        assert_eq!(settled(0.02, 1, 100, |_| 100), (0, 0), "never right");
        assert_eq!(settled(0.9, 1, 1, |_| 100).0, 0, "nothing is known");
    }

    #[test]
    fn what_does_not_pay_is_tried_again_now_and_then() {
        let (last, drafting) = settled(0.9, 8, 2000, |rows| 100 * rows as u32);
        assert_eq!(last, 0);
        assert!((8..=30).contains(&drafting), "{drafting}");
        // A step that the machine had no time for.
        let mut costs = Costs::default();
        costs.learn(1, 100 * MS);
        costs.learn(9, 120 * MS);
        costs.learn(9, 9000 * MS);
        assert_eq!(costs.best(1, (1..=8).map(|i| 0.95f32.powi(i))), 8);
    }

    #[test]
    fn more_rows_than_are_known_are_never_asked_about() {
        let mut costs = Costs::default();
        costs.learn(MOST_ROWS + 1, MS);
        assert_eq!(costs.best(MOST_ROWS + 1, [0.9].into_iter()), 0);
    }
}
