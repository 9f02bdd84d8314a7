//! Weights in block floating point: for every run of 32 inputs of an output whole numbers of sixteen bits and one power of two that
//! they are multiplied with.
//!
//! It is what weights of bf16 are kept in for products: whole numbers are multiplied twice as fast as f32. A bf16 has eight
//! significant bits, so most weights of a run are exact; one that is small beside the run's largest is off by half a step, some
//! 2^-14 of the largest. Activations beside them are rounded to fifteen bits with their sign. A sum over a run is exact in 32 bits: the
//! power is chosen so that the magnitudes of the run's numbers sum up to no more than that allows.
//!
//! A tile is sixteen outputs: the powers of all runs, a byte for each output, and then lines of 64 bytes with two inputs of each.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use half::bf16;

use crate::ints::{Ints, LINE};
use crate::packed::{NotFinite, WeightType, widen};
use crate::products::{Form, Meeting, add};
use crate::rounded::RUN;
use crate::simd::{Element, Isa, Kernel, LANES, Lanes, dispatch};

pub(crate) struct BlockFloat;

/// Inputs of a line.
const PAIR: usize = 2;

/// Bytes of a run's lines.
const LINES: usize = RUN / PAIR * LINE;

/// What a run's magnitudes may sum up to, in steps: 2^31 over the 16383 steps of an activation is 131,080, and rounding adds up to half a step
/// for each of the 32.
const MOST_OF_RUN: f32 = 131_000.0;

/// The most steps of a weight before it is rounded.
const MOST: f32 = 32_766.0;

/// Where the lines of a run are in a tile.
const fn lines(k: usize, run: usize) -> usize {
    (k / RUN * LANES).next_multiple_of(LINE) + run * LINES
}

/// Bytes of a tile of `k` inputs.
pub(crate) const fn tile(k: usize) -> usize {
    lines(k, k / RUN)
}

impl Form for BlockFloat {
    type Step = i16;
    const BYTES: usize = LANES + LINES;
    const ALONE: usize = 16;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i16, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.at(lines(meeting.k, meeting.run));
            let mut ints = [[L::Ints::splat(0); T]; R];
            for pair in 0..RUN / PAIR {
                let w = at.map(|at| L::Ints::line(at.add(pair * LINE)));
                for (r, ints) in ints.iter_mut().enumerate() {
                    for (ints, w) in ints.iter_mut().zip(w) {
                        *ints = ints.dot_pair(w, meeting.x(r, pair * PAIR));
                    }
                }
            }
            for (t, at) in meeting.at(meeting.run * LANES).into_iter().enumerate() {
                let power = L::load_powers(at);
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[t] = add(sums[t], ints[r][t], power, meeting.about(r).scale);
                }
            }
        }
    }
}

/// A power of two, as an f32 without its bits of fraction has it.
#[inline(always)]
fn power(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

/// The power of two that a run's weights are multiples of, and its reciprocal; `None` where one is infinite or not a number.
#[inline(always)]
fn step(run: &[f32; RUN]) -> Option<(u8, f32)> {
    // Magnitudes have the order of their bits.
    let (mut highs, mut sums) = ([0u32; 8], [0f32; 8]);
    for weights in run.as_chunks::<8>().0 {
        for ((high, sum), weight) in highs.iter_mut().zip(&mut sums).zip(weights) {
            let weight = weight.abs();
            *high = (*high).max(weight.to_bits());
            // Each on its own: the largest ones' sum is no f32.
            *sum += weight * (1.0 / MOST_OF_RUN);
        }
    }
    let high = f32::from_bits(highs.into_iter().fold(0, u32::max));
    if !high.is_finite() {
        return None;
    }
    let least = sums.into_iter().sum::<f32>().max(high * (1.0 / MOST));
    // The next power of two above it; weights that would ask for one below an f32's smallest are rounded to that one's multiples.
    let byte = ((least.to_bits() >> 23) + 1) as u8;
    Some((byte, power(254 - byte)))
}

/// Packs the rows of one tile into `out`, which is zeroed, on an instruction set that is there.
///
/// # Errors
/// When a weight is infinite or not a number.
pub(crate) fn pack(isa: Isa, rows: &[(WeightType, &[u8])], k: usize, out: &mut [u8]) -> Result<(), NotFinite> {
    let mut sound = true;
    if rows.iter().all(|(kind, _)| *kind == WeightType::Bf16) {
        let rows: Vec<_> = rows.iter().map(|(_, bytes)| bytes.as_chunks().0).collect();
        let value = |bytes| bf16::from_le_bytes(bytes).widen();
        // SAFETY: the instruction set was checked before, and the kernel asks for nothing else.
        unsafe { dispatch(isa, Pack { rows: &rows, value, k, out, sound: &mut sound }) };
    } else {
        let rows = rows.iter().map(|(kind, bytes)| widen(*kind, bytes)).collect::<Result<Vec<_>, _>>()?;
        let rows: Vec<_> = rows.iter().map(Vec::as_slice).collect();
        // SAFETY: as above.
        unsafe { dispatch(isa, Pack { rows: &rows, value: |value: f32| value, k, out, sound: &mut sound }) };
    }
    if sound { Ok(()) } else { Err(NotFinite) }
}

/// Packs run by run: the rows' weights of a run are few lines of memory, and so is what they become.
struct Pack<'a, T, F> {
    rows: &'a [&'a [T]],
    value: F,
    k: usize,
    out: &'a mut [u8],
    sound: &'a mut bool,
}

impl<T: Copy, F: Fn(T) -> f32> Kernel for Pack<'_, T, F> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // Adding it rounds to a whole number, ties to even, which then stands in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        let mut whole = [[[0u16; PAIR]; RUN / PAIR]; LANES];
        for run in 0..self.k / RUN {
            for (column, (row, whole)) in self.rows.iter().zip(&mut whole).enumerate() {
                let mut weights = [0f32; RUN];
                for (weight, from) in weights.iter_mut().zip(&row[run * RUN..][..RUN]) {
                    *weight = (self.value)(*from);
                }
                let Some((byte, inverse)) = step(&weights) else {
                    *self.sound = false;
                    return;
                };
                self.out[run * LANES + column] = byte;
                for (whole, weight) in whole.as_flattened_mut().iter_mut().zip(weights) {
                    *whole = (weight * inverse + ROUND).to_bits() as u16;
                }
            }
            let lines = self.out[lines(self.k, run)..][..LINES].as_chunks_mut::<LINE>().0;
            for (pair, line) in lines.iter_mut().enumerate() {
                *line = bytemuck::cast::<[[u16; PAIR]; LANES], _>(std::array::from_fn(|column| whole[column][pair]));
            }
        }
    }
}

/// The weights of one output of a tile as f32.
pub(crate) fn read(tile: &[u8], column: usize, out: &mut [f32]) {
    let k = out.len();
    for (run, out) in out.as_chunks_mut::<RUN>().0.iter_mut().enumerate() {
        let power = power(tile[run * LANES + column]);
        for (i, out) in out.iter_mut().enumerate() {
            let at = lines(k, run) + i / PAIR * LINE + column * size_of::<u32>() + i % PAIR * size_of::<i16>();
            *out = f32::from(i16::from_ne_bytes([tile[at], tile[at + 1]])) * power;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::{Kept, Packed, Part};
    use crate::pool::Pool;
    use crate::rounded::Step;
    use crate::testing::{self, bytes, check_products, values};

    /// Packed, by every instruction set alike.
    fn packed(kind: WeightType, weights: &[f32], k: usize) -> Packed {
        let part = Part { kept: Kept::BlockFloat, kind, bytes: &bytes(kind, weights) };
        let on = |isa| Packed::new(&mut Pool::new(3), isa, &[part], k).unwrap();
        let packed = on(Isa::Scalar);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            assert_eq!(on(isa).segments[0].data.values::<u8>(), packed.segments[0].data.values::<u8>(), "{isa:?}");
        }
        assert_eq!(packed.held(), Kept::bytes(&[(Kept::BlockFloat, (weights.len() / k) as u64)], k as u64));
        packed
    }

    fn rows(packed: &Packed) -> Vec<f32> {
        let mut rows = vec![0.0; packed.n() * packed.k()];
        rows.chunks_mut(packed.k()).enumerate().for_each(|(i, row)| packed.row(i, row));
        rows
    }

    #[test]
    fn weights_are_exact_but_for_those_that_are_small_beside_the_largest_of_their_run() {
        for scale in [1e-20, 1e-3, 1.0, 1e20, 1e37] {
            let k = 96;
            let weights: Vec<f32> =
                values(7, 40 * k).iter().map(|w| bf16::from_f32(w * w * w * scale).to_f32()).collect();
            let kept = rows(&packed(WeightType::Bf16, &weights, k));
            for (run, kept) in weights.chunks(RUN).zip(kept.chunks(RUN)) {
                let high = run.iter().fold(0f32, |high, w| high.max(w.abs()));
                for (weight, kept) in run.iter().zip(kept) {
                    assert!((weight - kept).abs() <= high * 2f32.powi(-13), "{weight} {kept} beside {high}");
                    assert!(weight == kept || weight.abs() < high * 2f32.powi(-3), "{weight} {kept} beside {high}");
                }
            }
        }
        // Smaller than an f32 has steps for.
        let tiny = [f32::MIN_POSITIVE, -f32::MIN_POSITIVE / 2.0, 0.0, 1e-45].repeat(8);
        let kept = rows(&packed(WeightType::F32, &tiny, RUN));
        assert!(tiny.iter().zip(kept).all(|(weight, kept)| (weight - kept).abs() <= f32::MIN_POSITIVE));
    }

    #[test]
    fn products_are_those_of_the_rounded_row_with_the_weights_that_are_kept() {
        for (m, n, k) in [(1, 1, 32), (2, 64, 512), (3, 70, 256), (7, 129, 768), (13, 200, 96), (64, 40, 2048)] {
            let packed = packed(WeightType::Bf16, &values(n as u32, n * k), k);
            check_products::<i16>(&values(m as u32, m * k), &packed, &rows(&packed));
        }
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        // All weights and activations at their most, and one that leaves the power where it is.
        for (high, rest) in [(1.0, 1.0), (1.0, 0.121), (32_766.0, 3_168.0), (-1.0, -1.0)] {
            let mut weights = vec![rest; 5 * RUN];
            weights.iter_mut().step_by(RUN).for_each(|weight| *weight = high);
            let packed = packed(WeightType::F32, &weights, RUN);
            for x in [1.0, -1.0, 1e-3] {
                check_products::<i16>(&[x; RUN], &packed, &rows(&packed));
            }
            let steps = |run: &[f32]| {
                run.iter().map(|w| w.abs() / power(step(run.as_array().unwrap()).unwrap().0)).sum::<f32>()
            };
            assert!(weights.chunks(RUN).all(|run| steps(run) + 16.0 <= 2f32.powi(31) / i16::MOST));
        }
    }

    #[test]
    fn weights_that_are_no_numbers_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = values(3, RUN * 5);
            values[70] = bad;
            for kind in [WeightType::F32, WeightType::Bf16] {
                let part = Part { kept: Kept::BlockFloat, kind, bytes: &bytes(kind, &values) };
                assert_eq!(testing::packed(&[part], RUN).err(), Some(NotFinite));
            }
        }
    }
}
