//! Chooses one token from a row of logits.
//!
//! Order: logit bias, penalties, end-of-sequence mask and the constraint's (all in `logits.rs`), then the largest logit if
//! the temperature is 0, else temperature, top-k, top-p, min-p and one draw. Equal logits are ordered
//! by id, lowest first. The choice is a function of the row, the parameters, the tokens so far and
//! (seed, choice, position): sums run in f64 in a fixed order, over an exponential that uses plain
//! multiplication and addition, so that no system library has a say in it.

use crate::error::EngineError;
use crate::logits::{self, History, Masks};
use crate::random::uniform;
use crate::request::TokenLogprobs;
use crate::runner::TokenId;

/// How tokens are chosen. The default is a plain draw from the model's distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; else logits are divided by it.
    pub temperature: f32,
    /// Only so many of the most likely tokens; `None` for all.
    pub top_k: Option<u32>,
    /// Only the fewest most likely tokens whose probabilities sum up to this; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the most likely one; 0 for all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 for none.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 for none.
    pub frequency_penalty: f32,
    /// Subtracted if the output has the token; 0 for none.
    pub presence_penalty: f32,
    /// Added to single tokens' logits.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    pub(crate) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Refuses what has no meaning; limits of taste belong to the caller's interface.
    pub(crate) fn validate(&self, vocab: usize) -> Result<(), EngineError> {
        let check = |field, ok: bool, range: &str| {
            if ok { Ok(()) } else { Err(EngineError::invalid(field, format!("must be {range}"))) }
        };
        // Wide enough for any use, and no sum of them leaves f32.
        let moderate = |x: f32| x.abs() <= 1e6;
        check("temperature", self.temperature.is_finite() && self.temperature >= 0.0, "0 or more")?;
        check("top_k", self.top_k != Some(0), "at least 1")?;
        check("top_p", (0.0..=1.0).contains(&self.top_p), "0 to 1")?;
        check("min_p", (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        let penalty = self.repetition_penalty;
        check("repetition_penalty", penalty.is_finite() && penalty > 0.0, "more than 0")?;
        check("frequency_penalty", moderate(self.frequency_penalty), "-1e6 to 1e6")?;
        check("presence_penalty", moderate(self.presence_penalty), "-1e6 to 1e6")?;
        let biased = |(id, bias): &(TokenId, f32)| (*id as usize) < vocab && moderate(*bias);
        check("logit_bias", self.logit_bias.iter().all(biased), "-1e6 to 1e6 for ids in the vocabulary")
    }
}

/// The row has no usable number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadLogits;

/// Which draw of a request this is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw {
    pub(crate) choice: u32,
    /// Position in the output.
    pub(crate) position: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    id: TokenId,
}

/// Working memory, kept between tokens.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    row: Vec<f32>,
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
}

impl Sampler {
    /// Chooses a token from `raw` that `masks` leave.
    pub(crate) fn sample(
        &mut self,
        raw: &[f32],
        sampling: &Sampling,
        history: &History,
        masks: Masks<'_>,
        draw: Draw,
    ) -> Result<TokenId, BadLogits> {
        let finite = |part: &[f32]| part.iter().fold(true, |all, x| all & x.is_finite());
        if !raw.chunks(256).all(finite) {
            return Err(BadLogits);
        }
        let untouched = masks.is_empty() && sampling.logit_bias.is_empty() && !sampling.has_penalties();
        let mut row = std::mem::take(&mut self.row);
        let processed = if untouched {
            raw
        } else {
            row.clear();
            row.extend_from_slice(raw);
            logits::process(&mut row, sampling, history, masks);
            &row
        };
        let chosen = self.choose(processed, sampling, draw);
        self.row = row;
        chosen
    }

    fn choose(&mut self, row: &[f32], sampling: &Sampling, draw: Draw) -> Result<TokenId, BadLogits> {
        let best = greatest(row).ok_or(BadLogits)?;
        if sampling.temperature == 0.0 {
            return Ok(best.id);
        }
        let weight = |logit: f32| exp((logit - best.logit) / sampling.temperature);

        // Without a filter the candidates are the row itself.
        let filtered = sampling.top_k.is_some() || sampling.top_p < 1.0;
        if filtered {
            list(row, &mut self.candidates);
            if let Some(k) = sampling.top_k {
                keep_top(&mut self.candidates, k as usize);
            }
            if sampling.top_p < 1.0 {
                keep_nucleus(&mut self.candidates, f64::from(sampling.top_p), weight);
            }
        }
        let weights = &mut self.weights;
        weights.clear();
        if filtered {
            weights.extend(self.candidates.iter().map(|c| weight(c.logit)));
        } else {
            weights.extend(row.iter().map(|logit| weight(*logit)));
        }
        // The most likely token has weight 1, so the fraction is the weight itself.
        let least = sampling.min_p;
        weights.iter_mut().for_each(|w| *w = if *w < least { 0.0 } else { *w });

        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let target = uniform(sampling.seed, draw.choice, draw.position as u64) * total;
        let mut sum = 0.0;
        let drawn = weights.iter().position(|w| {
            sum += f64::from(*w);
            sum > target
        });
        // The sums are the same ones, so the last of them is above a target below it.
        let drawn = drawn.ok_or(BadLogits)?;
        Ok(if filtered { self.candidates[drawn].id } else { drawn as TokenId })
    }

    /// Log-softmax of `raw` at `chosen` and at the `top` greatest. `raw` passed [`Sampler::sample`].
    pub(crate) fn logprobs(&mut self, raw: &[f32], chosen: TokenId, top: usize) -> TokenLogprobs {
        let greatest = greatest(raw).map_or(0.0, |best| best.logit);
        let sum: f64 = raw.iter().map(|x| f64::from(exp(x - greatest))).sum();
        let normaliser = f64::from(greatest) + sum.ln();
        let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
        let mut best = Vec::new();
        if top > 0 {
            list(raw, &mut self.candidates);
            keep_top(&mut self.candidates, top);
            best.extend(self.candidates.iter().map(|c| (c.id, logprob(c.logit))));
        }
        TokenLogprobs { chosen: logprob(raw[chosen as usize]), top: best }
    }
}

/// The greatest logit, the lowest id among equals; `None` if all are masked.
fn greatest(row: &[f32]) -> Option<Candidate> {
    let mut best = Candidate { logit: f32::NEG_INFINITY, id: 0 };
    for (id, logit) in (0..).zip(row) {
        if *logit > best.logit {
            best = Candidate { logit: *logit, id };
        }
    }
    best.logit.is_finite().then_some(best)
}

fn list(row: &[f32], candidates: &mut Vec<Candidate>) {
    candidates.clear();
    candidates.extend((0..).zip(row).map(|(id, logit)| Candidate { logit: *logit, id }));
}

fn by_rank(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Keeps the `k` greatest in order.
fn keep_top(candidates: &mut Vec<Candidate>, k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k, by_rank);
        candidates.truncate(k);
        candidates.sort_unstable_by(by_rank);
    }
}

/// Keeps the fewest greatest, in order, that hold `top_p` of the weight, at least one. Looks for them
/// in pieces, as they are few of many as a rule.
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f64, weight: impl Fn(f32) -> f32) {
    let total: f64 = candidates.iter().map(|c| f64::from(weight(c.logit))).sum();
    let (mut kept, mut sum, mut piece) = (0, 0.0, 64);
    while kept < candidates.len() {
        let rest = &mut candidates[kept..];
        if piece < rest.len() {
            rest.select_nth_unstable_by(piece, by_rank);
        }
        let next = piece.min(rest.len());
        rest[..next].sort_unstable_by(by_rank);
        for candidate in &rest[..next] {
            sum += f64::from(weight(candidate.logit));
            kept += 1;
            if sum >= top_p * total {
                candidates.truncate(kept);
                return;
            }
        }
        piece *= 4;
    }
}

/// e^x for x <= 0 to within 2 ulp, and 0 below -87: 2^k times the Taylor series of the rest, of at most
/// ln(2)/2. Without branches or calls, so that loops over it become SIMD.
fn exp(x: f32) -> f32 {
    /// ln(2) in two parts; the first times any k is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// Added to a small number it rounds it to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const INVERSE_FACTORIAL: [f32; 8] =
        [1.0, 1.0, 1.0 / 2.0, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];
    let bounded = x.max(-87.0);
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let rest = bounded - k * LN2[0] - k * LN2[1];
    let mut series = INVERSE_FACTORIAL[7];
    for term in INVERSE_FACTORIAL[..7].iter().rev() {
        series = series * rest + term;
    }
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pick(row: &[f32], sampling: &Sampling, position: usize) -> Result<TokenId, BadLogits> {
        let history = History::new(sampling, &[]);
        Sampler::default().sample(row, sampling, &history, Masks::default(), Draw { choice: 0, position })
    }

    /// The survivors of top-k, top-p and min-p with their probabilities, by a full sort.
    fn reference(row: &[f32], s: &Sampling) -> Vec<(TokenId, f64)> {
        let scaled: Vec<f64> = row.iter().map(|x| f64::from(*x) / f64::from(s.temperature)).collect();
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| scaled[*b].total_cmp(&scaled[*a]).then(a.cmp(b)));
        order.truncate(s.top_k.map_or(row.len(), |k| k as usize));
        let softmax = |ids: &[usize]| {
            let sum: f64 = ids.iter().map(|i| (scaled[*i] - scaled[order[0]]).exp()).sum();
            ids.iter().map(|i| (scaled[*i] - scaled[order[0]]).exp() / sum).collect::<Vec<_>>()
        };
        let mut sum = 0.0;
        let all = softmax(&order);
        let keep = all
            .iter()
            .take_while(|p| {
                let more = sum < f64::from(s.top_p);
                sum += **p;
                more
            })
            .count();
        let mut kept = order[..keep.max(1)].to_vec();
        let floor = all[0] * f64::from(s.min_p);
        kept = kept.iter().zip(&all).filter(|(_, p)| **p >= floor).map(|(i, _)| *i).collect();
        kept.iter().map(|i| *i as TokenId).zip(softmax(&kept)).collect()
    }

    #[test]
    fn exponential_is_accurate() {
        for i in 0..200_000 {
            let x = -(i as f32) * 0.000_434;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 2.5e-7 * want, "{x}: {got} {want}");
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn greedy_takes_the_greatest_and_the_lowest_id_among_equals() {
        assert_eq!(pick(&[0.0, 3.0, -1.0, 3.0], &Sampling::greedy(), 0), Ok(1));
        assert_eq!(pick(&[-5.0, -5.0], &Sampling::greedy(), 0), Ok(0));
    }

    #[test]
    fn top_k_breaks_ties_by_the_lowest_id() {
        let sampling = Sampling { top_k: Some(2), ..Sampling::default() };
        let drawn: std::collections::BTreeSet<_> =
            (0..100).map(|i| pick(&[1.0, 2.0, 1.0, 1.0], &sampling, i).unwrap()).collect();
        assert_eq!(drawn, [0, 1].into());
    }

    #[test]
    fn rows_that_are_not_numbers_are_errors() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for sampling in [Sampling::greedy(), Sampling { top_k: Some(1), ..Sampling::default() }] {
                assert_eq!(pick(&[0.0, bad, 1.0], &sampling, 0), Err(BadLogits));
            }
        }
        let all_masked = Sampler::default().sample(
            &[1.0],
            &Sampling::default(),
            &History::default(),
            Masks { without: &[0], only: None },
            Draw { choice: 0, position: 0 },
        );
        assert_eq!(all_masked, Err(BadLogits));
    }

    #[test]
    fn extreme_temperatures_and_logits_stay_in_range() {
        let row = [f32::MAX, f32::MIN, 0.0];
        for temperature in [f32::MIN_POSITIVE, 1e-5, 1.0, f32::MAX] {
            assert!(pick(&row, &Sampling { temperature, top_p: 0.5, ..Sampling::default() }, 3).is_ok());
        }
    }

    #[test]
    fn logprobs_are_the_log_softmax_of_the_raw_row() {
        let row = [1.0, 3.0, 2.0, 3.0];
        let sum: f64 = row.iter().map(|x: &f32| f64::from(*x).exp()).sum();
        let want = |x: f64| (x - sum.ln()) as f32;
        let got = Sampler::default().logprobs(&row, 2, 3);
        assert!((got.chosen - want(2.0)).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert!((got.top[0].1 - want(3.0)).abs() < 1e-6);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Every filter on, singly and together: the draws have the reference's distribution.
        #[test]
        fn draws_follow_the_filtered_distribution(
            row in prop::collection::vec(-4f32..4.0, 2..300),
            temperature in 0.3f32..2.0,
            top_k in prop::option::of(1u32..320),
            top_p in prop_oneof![Just(1.0f32), 0.05f32..0.99],
            min_p in prop_oneof![Just(0.0f32), 0.01f32..0.5],
            seed in any::<u64>(),
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            let want = reference(&row, &sampling);
            let n = 2_000;
            let mut sampler = Sampler::default();
            let mut counts = vec![0usize; row.len()];
            for position in 0..n {
                let id = sampler.sample(&row, &sampling, &History::default(), Masks::default(), Draw { choice: 1, position }).unwrap();
                counts[id as usize] += 1;
            }
            prop_assert_eq!(want.iter().map(|w| counts[w.0 as usize]).sum::<usize>(), n, "a filtered token was drawn");
            for (id, p) in want {
                let sigma = (p * (1.0 - p) / n as f64).sqrt();
                let seen = counts[id as usize] as f64 / n as f64;
                prop_assert!((seen - p).abs() <= 6.0 * sigma + 2e-3, "{id}: {seen} {p}");
            }
        }
    }
}
