//! Processors: what happens to a row of logits before a token is chosen from it, in the order of
//! [`process`]. Their state is a function of the tokens so far, so a resumed sequence rebuilds it by
//! replay.

use std::collections::HashMap;

use crate::runner::TokenId;
use crate::sampling::Sampling;

/// Which tokens a sequence has, for penalties.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// Distinct tokens of prompt and output, with how often the output has them.
    seen: Vec<(TokenId, u32)>,
    place: HashMap<TokenId, usize>,
    tracked: bool,
}

impl History {
    /// Tracks only where `sampling` looks at it.
    pub(crate) fn new(sampling: &Sampling, prompt: &[TokenId]) -> Self {
        let mut history = Self { tracked: sampling.has_penalties(), ..Self::default() };
        if history.tracked {
            for id in prompt {
                history.place(*id);
            }
        }
        history
    }

    /// One more output token.
    pub(crate) fn record(&mut self, id: TokenId) {
        if self.tracked {
            let place = self.place(id);
            self.seen[place].1 += 1;
        }
    }

    fn place(&mut self, id: TokenId) -> usize {
        *self.place.entry(id).or_insert_with(|| {
            self.seen.push((id, 0));
            self.seen.len() - 1
        })
    }
}

/// Logit bias, repetition penalty (over prompt and output, as in transformers'
/// `RepetitionPenaltyLogitsProcessor`), frequency and presence penalties (over the output, as OpenAI
/// documents them), then the masks. Ids are within the row: the request was checked.
pub(crate) fn process(row: &mut [f32], sampling: &Sampling, history: &History, masks: Masks<'_>) {
    for (id, bias) in &sampling.logit_bias {
        row[*id as usize] += bias;
    }
    for (id, count) in &history.seen {
        let logit = &mut row[*id as usize];
        if *logit > 0.0 {
            *logit /= sampling.repetition_penalty;
        } else {
            *logit *= sampling.repetition_penalty;
        }
        if *count > 0 {
            *logit -= sampling.frequency_penalty * *count as f32 + sampling.presence_penalty;
        }
        *logit = logit.clamp(f32::MIN, f32::MAX);
    }
    for id in masks.without {
        row[*id as usize] = f32::NEG_INFINITY;
    }
    if let Some(only) = masks.only {
        let words = only.iter().copied().chain(std::iter::repeat(0));
        for (logits, word) in row.chunks_mut(WORD).zip(words) {
            match word {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                _ => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        *logit = if word >> bit & 1 == 0 { f32::NEG_INFINITY } else { *logit };
                    }
                }
            }
        }
    }
}

/// Ids of one word of a mask.
const WORD: usize = u32::BITS as usize;

/// What may not be chosen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Masks<'a> {
    /// None of these.
    pub(crate) without: &'a [TokenId],
    /// Only tokens with their bit set.
    pub(crate) only: Option<&'a [u32]>,
}

impl Masks<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        self.without.is_empty() && self.only.is_none()
    }

    /// Whether a token of the vocabulary is left.
    pub(crate) fn leave_any(&self, vocab: usize) -> bool {
        let Some(only) = self.only else { return true };
        let words = only.iter().take(vocab.div_ceil(WORD)).enumerate();
        words
            .map(|(i, word)| {
                let inside = vocab - i * WORD;
                let mut word = if inside < WORD { word & !(u32::MAX << inside) } else { *word };
                for id in self.without.iter().filter(|id| **id as usize / WORD == i) {
                    word &= !(1 << (*id as usize % WORD));
                }
                word
            })
            .any(|word| word != 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definitions, written out over the whole vocabulary.
    fn reference(row: &[f32], s: &Sampling, prompt: &[TokenId], output: &[TokenId]) -> Vec<f32> {
        let one = |(id, logit): (usize, &f32)| {
            let id = id as TokenId;
            let mut logit = logit + s.logit_bias.iter().filter(|b| b.0 == id).map(|b| b.1).sum::<f32>();
            if prompt.contains(&id) || output.contains(&id) {
                logit = if logit > 0.0 { logit / s.repetition_penalty } else { logit * s.repetition_penalty };
            }
            let count = output.iter().filter(|t| **t == id).count() as f32;
            logit - s.frequency_penalty * count - if count > 0.0 { s.presence_penalty } else { 0.0 }
        };
        row.iter().enumerate().map(one).collect()
    }

    proptest! {
        #[test]
        fn a_mask_leaves_the_tokens_whose_bit_is_set_and_no_others(
            vocab in 1usize..140,
            only in prop::collection::vec(prop_oneof![Just(0u32), Just(u32::MAX), any::<u32>()], 0..6),
            without in prop::collection::vec(0u32..140, 0..4),
        ) {
            let without: Vec<TokenId> = without.into_iter().filter(|id| (*id as usize) < vocab).collect();
            let masks = Masks { without: &without, only: Some(&only) };
            let mut row = vec![0.5; vocab];
            process(&mut row, &Sampling::default(), &History::default(), masks);
            let allowed = |id: usize| {
                let set = only.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
                set && !without.contains(&(id as TokenId))
            };
            for (id, logit) in row.iter().enumerate() {
                prop_assert_eq!(*logit == 0.5, allowed(id), "{}", id);
            }
            prop_assert_eq!(masks.leave_any(vocab), (0..vocab).any(allowed));
        }

        #[test]
        fn penalties_equal_their_definitions(
            row in prop::collection::vec(-20f32..20.0, 12),
            prompt in prop::collection::vec(0u32..12, 1..8),
            output in prop::collection::vec(0u32..12, 0..30),
            (repetition_penalty, frequency_penalty, presence_penalty) in (0.5f32..2.0, -2f32..2.0, -2f32..2.0),
            bias in prop::collection::btree_map(0u32..12, -100f32..100.0, 0..4),
        ) {
            let sampling = Sampling {
                repetition_penalty, frequency_penalty, presence_penalty,
                logit_bias: bias.into_iter().collect(),
                ..Sampling::default()
            };
            let mut history = History::new(&sampling, &prompt);
            output.iter().for_each(|id| history.record(*id));
            let mut got = row.clone();
            process(&mut got, &sampling, &history, Masks { without: &[3], only: None });
            let mut want = reference(&row, &sampling, &prompt, &output);
            want[3] = f32::NEG_INFINITY;
            for (got, want) in got.iter().zip(&want) {
                prop_assert!(got == want || (got - want).abs() < 1e-3, "{got} {want}");
            }
        }
    }
}
