//! How many prompt tokens may join a step of running streams, so that their readers hardly notice.
//!
//! A step of nothing but decoding sequences is the measure; a step with prompt tokens may take up to [`STRETCH`] times as
//! long. What a prompt token adds is learned from the steps themselves. Results do not depend on it: a row's logits are
//! the same however prompts are cut.

use std::time::Duration;

/// How much longer a step may take than one without prompt tokens: below two, with room for what is not foreseen.
const STRETCH: f64 = 1.75;

/// Prompt tokens of a step while nothing is known.
const UNKNOWN: usize = 16;

/// Weight of the newest measurement of a step that only decodes.
const NEWEST: f64 = 0.25;

/// What is left of earlier measurements of prompt tokens with each new one.
const FADE: f64 = 0.9;

/// Steps with prompt tokens after which one goes without, to measure it: streams get longer and slower meanwhile, which
/// would be held against the prompts.
const UNMEASURED: u32 = 12;

/// Seconds, learned from steps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// Of a step that only decodes.
    decode: Option<f64>,
    /// That prompt tokens added, and how many they were: lately, older ones fade. Sums, as single steps are noisy and the
    /// more so the fewer tokens they have.
    added: (f64, f64),
    /// Mixed steps since one that only decoded.
    mixed: u32,
}

impl Pace {
    /// Learns from a step of so many sequences that decode and so many prompt tokens.
    pub(crate) fn learn(&mut self, decoding: usize, prompt: usize, took: Duration) {
        let took = took.as_secs_f64();
        let blend = |old: Option<f64>, new: f64| Some(old.map_or(new, |old| old + NEWEST * (new - old)));
        self.mixed = if decoding > 0 && prompt > 0 { self.mixed + 1 } else { 0 };
        match (decoding, prompt) {
            (0, 0) => {}
            (_, 0) => self.decode = blend(self.decode, took),
            // A few prompt tokens alone cost as much as a step of a few sequences: they say nothing of one token.
            (0, prompt) if prompt < UNKNOWN => {}
            (_, prompt) => {
                let base = self.decode.unwrap_or(0.0);
                self.added = (self.added.0 * FADE + took - base, self.added.1 * FADE + prompt as f64);
            }
        }
    }

    /// Most prompt tokens of a step in which others decode: at least one, but for steps that measure.
    pub(crate) fn most(&self) -> usize {
        if self.mixed >= UNMEASURED {
            return 0;
        }
        let (time, tokens) = self.added;
        match self.decode {
            // Prompt tokens that cost nothing measurable are bounded elsewhere.
            Some(decode) if tokens > 0.0 => ((STRETCH - 1.0) * decode * tokens / time.max(0.0)).max(1.0) as usize,
            _ => UNKNOWN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn prompt_tokens_join_as_far_as_a_step_is_stretched_and_no_further() {
        let mut pace = Pace::default();
        assert_eq!(pace.most(), UNKNOWN);
        // A machine where a decode step takes 20 ms and a prompt token adds 2.
        for _ in 0..20 {
            pace.learn(4, 0, 20 * MS);
            pace.learn(4, 16, (20 + 32) * MS);
        }
        assert_eq!(pace.most(), 7);
        // Longer contexts make decoding slower and leave more room; a slow token leaves less, but never none.
        (0..30).for_each(|_| pace.learn(4, 0, 40 * MS));
        (0..11).for_each(|_| pace.learn(4, 10, (40 + 20) * MS));
        assert!((14..=15).contains(&pace.most()), "{}", pace.most());
        pace.learn(4, 0, 40 * MS);
        (0..11).for_each(|_| pace.learn(4, 10, (40 + 4000) * MS));
        assert_eq!(pace.most(), 1);
    }

    #[test]
    fn steps_without_prompts_are_measured_again_and_again() {
        let mut pace = Pace::default();
        // Streams whose steps get slower, as their texts get longer: no fault of the prompt's.
        let mut measured = 0;
        for i in 0..400 {
            let prompt = pace.most().min(64);
            measured += u32::from(prompt == 0);
            pace.learn(4, prompt, (20 + i / 4) * MS + 2 * MS * prompt as u32);
        }
        assert!((28..=34).contains(&measured), "{measured}");
        assert!(pace.most() >= 20, "{}", pace.most());
    }

    #[test]
    fn steps_that_say_nothing_change_nothing() {
        let mut pace = Pace::default();
        pace.learn(0, 0, MS);
        pace.learn(0, 3, 20 * MS);
        assert_eq!(pace.most(), UNKNOWN);
        pace.learn(2, 0, 10 * MS);
        // Faster than decoding alone, by chance: free, not negative.
        pace.learn(2, 8, 5 * MS);
        assert!(pace.most() > 1 << 20);
    }
}
