//! Activations rounded to whole steps, for products of whole numbers: of eight bits beside weights of few, of fifteen beside those in
//! [`crate::block_float`].
//!
//! Each run of [`RUN`] inputs of a row has a scale of its own, the largest magnitude over the most steps there are; a value is the
//! nearest multiple, ties to even. A row is rounded by itself, alone or among others. llama.cpp rounds to the same eight bits, with
//! scales in f16 or one for every 256 inputs.

#![expect(unsafe_code, reason = "tasks write disjoint rows of one buffer")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ops::{Body, on};
use crate::pool::{Pool, SharedOut};
use crate::simd::Isa;

/// Inputs that share a scale.
pub(crate) const RUN: usize = 32;

/// Values of a task.
const TASK: usize = 1 << 13;

/// Magnitudes below it count as zero: their reciprocal would not be finite.
const TINY: f32 = 1e-30;

/// Whole numbers that values are rounded to.
pub(crate) trait Step: Copy + Default + Send + Sync {
    /// The largest.
    const MOST: f32;
    /// Whether sums are asked for: beside weights that are shifted or have minima.
    const SUMMED: bool;
    /// A whole number that is no larger.
    fn of(whole: i32) -> Self;
}

impl Step for i8 {
    const MOST: f32 = 127.0;
    const SUMMED: bool = true;
    #[inline(always)]
    fn of(whole: i32) -> Self {
        whole as Self
    }
}

impl Step for i16 {
    const MOST: f32 = 16383.0;
    const SUMMED: bool = false;
    #[inline(always)]
    fn of(whole: i32) -> Self {
        whole as Self
    }
}

/// What the kernels ask of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Run {
    /// What a step is worth; not a number where an input is not finite.
    pub(crate) scale: f32,
    /// The sum of the run's rounded values, if that is asked for.
    pub(crate) sum: f32,
    /// For each half of the run the sum of its steps.
    pub(crate) sums: [i32; 2],
}

/// Rows of activations: `[rows, k]` steps and `[rows, k / 32]` runs.
#[derive(Default)]
pub(crate) struct Rounded<S> {
    pub(crate) steps: Vec<S>,
    pub(crate) runs: Vec<Run>,
    /// Whether all scales are between 2^-[`FAR`] and 2^[`FAR`].
    pub(crate) near: bool,
}

/// How far a power of two may be from 1 for the product of two, and its product with a number between 1 and 2, to be one that has all
/// bits of its fraction.
pub(crate) const FAR: u8 = 60;

impl<S: Step> Rounded<S> {
    /// Rounds rows of values, a multiple of 32 each.
    pub(crate) fn fill(&mut self, pool: &mut Pool, isa: Isa, x: &[f32]) {
        // What is in there from earlier products is written before it is read.
        self.steps.resize(x.len(), S::default());
        self.runs.resize(x.len() / RUN, Run::default());
        let (steps, runs) = (SharedOut::new(&mut self.steps), SharedOut::new(&mut self.runs));
        let far = AtomicBool::new(false);
        pool.run(x.len().div_ceil(TASK), &|task| {
            let range = task * TASK..((task + 1) * TASK).min(x.len());
            // SAFETY: these runs belong to this task alone: a task is whole runs.
            let (steps, runs) = unsafe { (steps.part(range.clone()), runs.part(range.start / RUN..range.end / RUN)) };
            let mut near = true;
            on(isa, Round { x: &x[range], steps, runs, near: &mut near });
            if !near {
                far.store(true, Ordering::Relaxed);
            }
        });
        self.near = !far.into_inner();
    }
}

struct Round<'a, S> {
    x: &'a [f32],
    steps: &'a mut [S],
    runs: &'a mut [Run],
    near: &'a mut bool,
}

impl<S: Step> Body for Round<'_, S> {
    #[inline(always)]
    fn run(self) {
        // Adding it rounds to a whole number, ties to even, which then stands in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        const MAGNITUDE: u32 = 0x7fff_ffff;
        const NEAR: Range<u32> = (127 - FAR as u32) << 23..(127 + FAR as u32) << 23;
        let (x, _) = self.x.as_chunks::<RUN>();
        let (steps, _) = self.steps.as_chunks_mut::<RUN>();
        for ((x, steps), run) in x.iter().zip(steps).zip(self.runs) {
            // Magnitudes are in the order of their bits, with what is no number above all others.
            let high = x.iter().fold(0, |high, x| (x.to_bits() & MAGNITUDE).max(high));
            let high = f32::from_bits(high);
            let (scale, inverse) = if high > TINY { (high / S::MOST, S::MOST / high) } else { (1.0, 0.0) };
            let mut sums = [0i32; 2];
            for ((x, steps), sum) in x.as_chunks::<16>().0.iter().zip(steps.as_chunks_mut::<16>().0).zip(&mut sums) {
                let mut whole = [0i32; 16];
                for (whole, x) in whole.iter_mut().zip(x) {
                    let bits = (x * inverse + ROUND).to_bits().cast_signed();
                    *whole = bits.wrapping_sub(ROUND.to_bits().cast_signed());
                }
                for (step, whole) in steps.iter_mut().zip(whole) {
                    *step = S::of(whole);
                }
                if S::SUMMED {
                    // Folded in halves, as vectors are: in order, all of the rounding takes twice as long.
                    for half in [8, 4, 2, 1] {
                        let (low, high) = whole.split_at_mut(half);
                        low.iter_mut().zip(high).for_each(|(low, high)| *low = low.wrapping_add(*high));
                    }
                    *sum = whole[0];
                }
            }
            let scale = if high < f32::INFINITY { scale } else { f32::NAN };
            *self.near &= NEAR.contains(&scale.to_bits());
            let sum = sums[0].wrapping_add(sums[1]) as f32;
            *run = Run { scale, sum: scale * sum, sums };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    fn rounded<S: Step>(isa: Isa, threads: usize, x: &[f32]) -> Rounded<S> {
        let mut out = Rounded::default();
        out.fill(&mut Pool::new(threads), isa, x);
        out
    }

    /// `most` is how far from a value its step may be, in steps: half of one, and what arithmetic in f32 adds.
    fn check<S: Step + Into<f32> + PartialEq + std::fmt::Debug>(most: f32) {
        let mut x = values(5, 3 * TASK + 64);
        x[40..64].fill(0.0);
        x[64..96].fill(0.0);
        let want = rounded::<S>(Isa::Scalar, 1, &x);
        for ((x, steps), run) in x.chunks(RUN).zip(want.steps.chunks(RUN)).zip(&want.runs) {
            for (x, step) in x.iter().zip(steps) {
                let off = (x - (*step).into() * run.scale).abs();
                assert!(off <= run.scale * most, "{x} {step:?} {}", run.scale);
            }
            let sums = [&steps[..16], &steps[16..]].map(|half| half.iter().map(|step| (*step).into()).sum::<f32>());
            if S::SUMMED {
                assert_eq!(run.sums.map(|sum| sum as f32), sums);
                assert_eq!(run.sum, (sums[0] + sums[1]) * run.scale);
            }
        }
        assert_eq!(want.runs[2], Run { scale: 1.0, ..Run::default() });
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            let got = rounded::<S>(isa, 3, &x);
            assert!(got.steps == want.steps && got.runs == want.runs, "{isa:?}");
        }
    }

    #[test]
    fn values_are_the_nearest_steps_on_every_isa() {
        check::<i8>(0.500_01);
        check::<i16>(0.503);
    }

    #[test]
    fn ties_go_to_even() {
        // Of 127 steps, 2.5 and 3.5.
        let mut x = [1.0; RUN];
        (x[1], x[2]) = (2.5 / 127.0, -3.5 / 127.0);
        assert_eq!(rounded::<i8>(Isa::Scalar, 1, &x).steps[1..3], [2, -4]);
    }

    #[test]
    fn what_is_no_number_stays_none_in_its_run_alone() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
                let mut x = values(6, 96);
                x[50] = bad;
                let runs = rounded::<i8>(isa, 1, &x).runs;
                assert!(runs[0].scale.is_finite() && runs[1].scale.is_nan() && runs[2].scale.is_finite());
            }
        }
    }
}
