//! Activations rounded to eight bits, for products with weights of few bits.
//!
//! Each run of [`RUN`] inputs of a row has a scale of its own, the largest magnitude over 127; a value is the nearest multiple, ties to
//! even. A row is rounded by itself, alone or among others. llama.cpp rounds to the same steps, with scales in f16 or one for
//! every 256 inputs.

#![expect(unsafe_code, reason = "tasks write disjoint rows of one buffer")]

use crate::ops::{Body, on};
use crate::pool::{Pool, SharedOut};
use crate::simd::Isa;

/// Inputs that share a scale.
pub(crate) const RUN: usize = 32;

/// Values of a task.
const TASK: usize = 1 << 16;

/// Magnitudes below it count as zero: their reciprocal would not be finite.
const TINY: f32 = 1e-30;

/// What the kernels ask of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Run {
    /// What a step is worth; not a number where an input is not finite.
    pub(crate) scale: f32,
    /// The sum of the run's rounded values.
    pub(crate) sum: f32,
    /// For each half of the run the sum of its steps.
    pub(crate) sums: [i32; 2],
}

/// Rows of activations: `[rows, k]` steps and `[rows, k / 32]` runs.
#[derive(Default)]
pub(crate) struct Rounded {
    pub(crate) steps: Vec<i8>,
    pub(crate) runs: Vec<Run>,
}

impl Rounded {
    /// Rounds rows of values, a multiple of 32 each.
    pub(crate) fn fill(&mut self, pool: &mut Pool, isa: Isa, x: &[f32]) {
        // What is in there from earlier products is written before it is read.
        self.steps.resize(x.len(), 0);
        self.runs.resize(x.len() / RUN, Run::default());
        let (steps, runs) = (SharedOut::new(&mut self.steps), SharedOut::new(&mut self.runs));
        pool.run(x.len().div_ceil(TASK), &|task| {
            let range = task * TASK..((task + 1) * TASK).min(x.len());
            // SAFETY: these runs belong to this task alone: a task is whole runs.
            let (steps, runs) = unsafe { (steps.part(range.clone()), runs.part(range.start / RUN..range.end / RUN)) };
            on(isa, Round { x: &x[range], steps, runs });
        });
    }
}

struct Round<'a> {
    x: &'a [f32],
    steps: &'a mut [i8],
    runs: &'a mut [Run],
}

impl Body for Round<'_> {
    #[inline(always)]
    fn run(self) {
        // Adding it rounds to a whole number, ties to even, which then stands in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        let (x, _) = self.x.as_chunks::<RUN>();
        let (steps, _) = self.steps.as_chunks_mut::<RUN>();
        for ((x, steps), run) in x.iter().zip(steps).zip(self.runs) {
            let (mut highs, mut poison) = ([0f32; 16], [0f32; 16]);
            for half in x.as_chunks::<16>().0 {
                for ((high, poison), x) in highs.iter_mut().zip(&mut poison).zip(half) {
                    let x = x.abs();
                    *high = if x > *high { x } else { *high };
                    // Zero, unless it is infinite or not a number.
                    *poison += x * 0.0;
                }
            }
            let mut width = 8;
            while width > 0 {
                for i in 0..width {
                    highs[i] = if highs[i + width] > highs[i] { highs[i + width] } else { highs[i] };
                    poison[i] += poison[i + width];
                }
                width /= 2;
            }
            let high = highs[0];
            let (scale, inverse) = if high > TINY { (high / 127.0, 127.0 / high) } else { (0.0, 0.0) };
            let mut sums = [0i32; 2];
            for ((x, steps), sum) in x.as_chunks::<16>().0.iter().zip(steps.as_chunks_mut::<16>().0).zip(&mut sums) {
                for (x, step) in x.iter().zip(steps) {
                    let bits = (x * inverse + ROUND).to_bits().cast_signed();
                    let whole = bits.wrapping_sub(ROUND.to_bits().cast_signed());
                    *step = whole as i8;
                    *sum = sum.wrapping_add(whole);
                }
            }
            let scale = scale + poison[0];
            let sum = sums[0].wrapping_add(sums[1]) as f32;
            *run = Run { scale, sum: scale * sum, sums };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    fn rounded(isa: Isa, threads: usize, x: &[f32]) -> Rounded {
        let mut out = Rounded::default();
        out.fill(&mut Pool::new(threads), isa, x);
        out
    }

    #[test]
    fn values_are_the_nearest_steps_on_every_isa() {
        let mut x = values(5, 3 * TASK + 64);
        x[40..64].fill(0.0);
        x[64..96].fill(0.0);
        // Ties go to even: of 127 steps, 2.5 and 3.5.
        x[96..128].fill(1.0);
        (x[97], x[98]) = (2.5 / 127.0, -3.5 / 127.0);
        let want = rounded(Isa::Scalar, 1, &x);
        for ((x, steps), run) in x.chunks(RUN).zip(want.steps.chunks(RUN)).zip(&want.runs) {
            for (x, step) in x.iter().zip(steps) {
                assert!((x - f32::from(*step) * run.scale).abs() <= run.scale * 0.500_01, "{x} {step} {}", run.scale);
            }
            let sums = [&steps[..16], &steps[16..]].map(|half| half.iter().map(|step| i32::from(*step)).sum::<i32>());
            assert_eq!(run.sums, sums);
            assert_eq!(run.sum, (sums[0] + sums[1]) as f32 * run.scale);
        }
        assert_eq!((want.runs[2], want.steps[97], want.steps[98]), (Run::default(), 2, -4));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            let got = rounded(isa, 3, &x);
            assert!(got.steps == want.steps && got.runs == want.runs, "{isa:?}");
        }
    }

    #[test]
    fn what_is_no_number_stays_none_in_its_run_alone() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
                let mut x = values(6, 96);
                x[50] = bad;
                let runs = rounded(isa, 1, &x).runs;
                assert!(runs[0].scale.is_finite() && runs[1].scale.is_nan() && runs[2].scale.is_finite());
            }
        }
    }
}
