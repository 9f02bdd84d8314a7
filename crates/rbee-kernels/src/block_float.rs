//! Weights in block floating point: for every run of 32 inputs of an output whole numbers of sixteen bits and one power of two that
//! they are multiplied with.
//!
//! It is what weights of bf16 are kept in for products: whole numbers are multiplied twice as fast as f32. A bf16 has eight
//! significant bits, so most weights of a run are exact; one that is small beside the run's largest is off by half a step, some
//! 2^-14 of the largest. Activations beside them are rounded to fifteen bits with their sign. A sum over a run is exact in 32 bits: the
//! power is chosen so that the magnitudes of the run's numbers sum up to no more than that allows.
//!
//! With eight significant bits a number of sixteen fits in twelve: a magnitude of eight, a shift to the left by up to seven, and a sign.
//! So a lone row, which waits for memory, reads a quarter less than bf16 has. Where many rows meet, a tile is spread out to sixteen
//! bits once for all of them.
//!
//! A tile is sixteen outputs: the powers of all runs, a byte for each output, and then lines of 64 bytes with a word for two inputs of
//! each. For every four pairs of inputs there is a line of shifts and signs, each pair's in four bits of the words, and two of
//! magnitudes, each pair's in a byte of them.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use std::cell::RefCell;
use std::marker::PhantomData;

use half::bf16;

use crate::ints::{Ints, LINE, SHIFTS};
use crate::matmul::{Span, To};
use crate::packed::{NotFinite, Tiles, WeightType, widen};
use crate::products::{Ahead, Columns, Form, Meeting, add};
use crate::rounded::{FAR, RUN, Rounded};
use crate::simd::{Element, Isa, Kernel, LANES, Lanes, dispatch};

pub(crate) struct BlockFloat;

/// Its numbers spread out to sixteen bits each. `NEAR` powers of two and scales of rows, none of which is farther from 1 than
/// [`FAR`], are multiplied by adding exponents, which leaves multiplication's place to the numbers: 6 % of a product.
struct Spread<const NEAR: bool>;

/// Inputs of a line of numbers of sixteen bits.
const PAIR: usize = 2;

/// Bytes of a run of these.
const SPREAD: usize = RUN / PAIR * LINE;

/// Lines of four pairs.
const FOUR: usize = 3;

/// Bytes of a run's lines.
const LINES: usize = RUN / PAIR / 4 * FOUR * LINE;

/// What a run's magnitudes may sum up to, in steps: 2^31 over the 16383 steps of an activation is 131,080, and rounding adds up to half a step
/// for each of the 32.
const MOST_OF_RUN: f32 = 131_000.0;

/// The most steps of a weight before it is rounded.
const MOST: f32 = 32_766.0;

/// Where a run is in a tile that has so many bytes of each, after their powers.
const fn of_run(k: usize, run: usize, bytes: usize) -> usize {
    (k / RUN * LANES).next_multiple_of(LINE) + run * bytes
}

/// Bytes of a tile of `k` inputs.
pub(crate) const fn tile(k: usize) -> usize {
    of_run(k, k / RUN, LINES)
}

/// A pair's numbers of sixteen bits, from the lines of its four.
///
/// # Safety
/// They stand at `at`; the instruction set of `L` is there.
#[inline(always)]
unsafe fn spread<L: Lanes>(at: *const u8, shifts: <L::Ints as Ints>::Line, pair: usize) -> <L::Ints as Ints>::Line {
    // SAFETY: the caller's.
    unsafe { L::Ints::shifted(L::Ints::line(at.add((1 + pair / 2) * LINE)), shifts, pair) }
}

/// Adds the products of a pair's weights and inputs.
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn dot<L: Lanes, const R: usize, const T: usize>(
    meeting: Meeting<i16, R, T>,
    w: [<L::Ints as Ints>::Line; T],
    pair: usize,
    ints: &mut [[L::Ints; T]; R],
) {
    meeting.ask_in_turn::<L>(pair);
    for (r, ints) in ints.iter_mut().enumerate() {
        for (ints, w) in ints.iter_mut().zip(w) {
            // SAFETY: the caller's: a run has so many pairs.
            unsafe { *ints = ints.dot_pair(w, meeting.x(r, pair * PAIR)) };
        }
    }
}

/// Adds a run's whole numbers to the sums.
///
/// # Safety
/// As [`Form::run`]; scales and powers are as `NEAR` says.
#[inline(always)]
unsafe fn add_powers<L: Lanes, const R: usize, const T: usize, const NEAR: bool>(
    meeting: Meeting<i16, R, T>,
    ints: [[L::Ints; T]; R],
    sums: &mut [[L; T]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        for (t, at) in meeting.at(meeting.run * LANES).into_iter().enumerate() {
            if NEAR {
                let exponents = L::load_exponents(at);
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[t] = ints[r][t].floats().fma(L::scaled(meeting.about(r).scale, exponents), sums[t]);
                }
            } else {
                let power = L::load_powers(at);
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[t] = add(sums[t], ints[r][t], power, meeting.about(r).scale);
                }
            }
        }
    }
}

impl Form for BlockFloat {
    type Step = i16;
    const BYTES: usize = LANES + LINES;
    const SHORT: usize = 2048;
    const ALONE: usize = usize::MAX;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i16, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.at(of_run(meeting.k, meeting.run, LINES));
            let mut ints = [[L::Ints::splat(0); T]; R];
            for four in 0..RUN / PAIR / 4 {
                let at = at.map(|at| at.add(four * FOUR * LINE));
                let shifts = at.map(|at| L::Ints::line(at));
                for pair in 0..4 {
                    // Filled in a loop: a closure as long as this is not compiled into the kernel.
                    let mut w = shifts;
                    for (w, at) in w.iter_mut().zip(at) {
                        *w = spread::<L>(at, *w, pair);
                    }
                    dot::<L, R, T>(meeting, w, 4 * four + pair, &mut ints);
                }
            }
            add_powers::<L, R, T, false>(meeting, ints, sums);
        }
    }
}

impl<const NEAR: bool> Form for Spread<NEAR> {
    type Step = i16;
    const BYTES: usize = LANES + SPREAD;
    const ALONE: usize = 0;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i16, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.at(of_run(meeting.k, meeting.run, SPREAD));
            let mut ints = [[L::Ints::splat(0); T]; R];
            for pair in 0..RUN / PAIR {
                let w = at.map(|at| L::Ints::line(at.add(pair * LINE)));
                dot::<L, R, T>(meeting, w, pair, &mut ints);
            }
            add_powers::<L, R, T, NEAR>(meeting, ints, sums);
        }
    }
}

/// The most rows that meet weights as they are kept, where registers are wide and where not: more meet tiles that are spread out
/// first, once for all of them.
const FEW: (usize, usize) = (16, 6);

/// Tiles that are spread out together.
const TOGETHER: usize = 2;

/// What tiles are spread out to begins with a line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read as bytes")] [u8; LINE]);

thread_local! {
    /// Kept between products.
    static ROOM: RefCell<Vec<Line>> = RefCell::default();
}

/// All rows of some tiles.
///
/// # Safety
/// Rows, tiles and outputs are there, and `isa` is.
pub(crate) unsafe fn product(isa: Isa, part: Span, rounded: &Rounded<i16>, w: Tiles<'_>) {
    // SAFETY: the caller's.
    ROOM.with_borrow_mut(|room| unsafe { dispatch(isa, Product { part, rounded, w, room }) });
}

struct Product<'a> {
    part: Span,
    rounded: &'a Rounded<i16>,
    w: Tiles<'a>,
    room: &'a mut Vec<Line>,
}

impl Kernel for Product<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { part, rounded, w, room } = self;
        if part.to.m <= if L::WIDE { FEW.0 } else { FEW.1 } {
            // SAFETY: the caller's.
            return unsafe { Columns::<BlockFloat> { part, rounded, w, next: None, form: PhantomData }.run::<L>() };
        }
        let Span { to, n, columns } = part;
        let bytes = of_run(to.k, to.k / RUN, SPREAD);
        let lines = TOGETHER * bytes / LINE;
        if room.len() < lines {
            room.resize(lines, Line([0; LINE]));
        }
        let room: *mut u8 = room.as_mut_ptr().cast();
        for first in columns.clone().step_by(TOGETHER) {
            let tiles = TOGETHER.min(columns.end - first);
            // SAFETY: the tiles are there, and room for them; rows and outputs are the caller's.
            unsafe {
                for i in 0..tiles {
                    spread_tile::<L>(w.start(first + i), to.k, room.add(i * bytes));
                }
                let spread = std::slice::from_raw_parts(room, tiles * bytes);
                let powers = spread.chunks(bytes).flat_map(|tile| &tile[..to.k / RUN * LANES]);
                let near = rounded.near && powers.fold(true, |near, power| near & (power.abs_diff(127) <= FAR));
                let out = to.out.wrapping_add(first * LANES);
                let part = Span { to: To { out, ..to }, n: n - first * LANES, columns: 0..tiles };
                let from = w.start(first).wrapping_add(TOGETHER * w.bytes());
                let next = Some(Ahead { from, tile: w.bytes(), run: <BlockFloat as Form>::BYTES });
                let w = Tiles::new(spread, bytes);
                if near {
                    Columns::<Spread<true>> { part, rounded, w, next, form: PhantomData }.run::<L>();
                } else {
                    Columns::<Spread<false>> { part, rounded, w, next, form: PhantomData }.run::<L>();
                }
            }
        }
    }
}

/// Spreads out the numbers of a tile.
///
/// # Safety
/// The tile is there, and at `out` room for it; the instruction set of `L` is there.
#[inline(always)]
unsafe fn spread_tile<L: Lanes>(tile: *const u8, k: usize, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        out.copy_from_nonoverlapping(tile, k / RUN * LANES);
        let (mut at, mut out) = (tile.add(of_run(k, 0, LINES)), out.add(of_run(k, 0, SPREAD)));
        for _ in 0..k / PAIR / 4 {
            let shifts = L::Ints::line(at);
            for pair in 0..4 {
                L::Ints::put(spread::<L>(at, shifts, pair), out.add(pair * LINE));
            }
            (at, out) = (at.add(FOUR * LINE), out.add(4 * LINE));
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
    if high == 0.0 {
        return Some((127, 1.0));
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
        unsafe {
            dispatch(isa, Pack { rows: &rows, value: |value| bf16::from_f32(value).widen(), k, out, sound: &mut sound })
        };
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
        for run in 0..self.k / RUN {
            for (column, row) in self.rows.iter().enumerate() {
                let mut weights = [0f32; RUN];
                for (weight, from) in weights.iter_mut().zip(&row[run * RUN..][..RUN]) {
                    *weight = (self.value)(*from);
                }
                let Some((byte, inverse)) = step(&weights) else {
                    *self.sound = false;
                    return;
                };
                self.out[run * LANES + column] = byte;
                let (mut magnitudes, mut shifts) = ([0u16; RUN], [0u16; RUN]);
                for ((weight, magnitude), shift) in weights.iter().zip(&mut magnitudes).zip(&mut shifts) {
                    let whole = (weight.abs() * inverse + ROUND).to_bits() & 0xffff;
                    // How many bits it has beyond eight: a float's exponent counts them.
                    let by = ((whole as f32).to_bits() >> 23).saturating_sub(127 + 7);
                    *magnitude = (whole >> by) as u16;
                    *shift = (by | weight.to_bits() >> 31 << 3) as u16;
                }
                let lines = &mut self.out[of_run(self.k, run, LINES)..][..LINES];
                let mut put = |line: usize, word: u32| {
                    lines[line * LINE + column * 4..][..4].copy_from_slice(&word.to_ne_bytes());
                };
                // Two words of sixteen bits at once, whose bits do not meet.
                let (magnitudes, shifts): ([u32; RUN / PAIR], [u32; RUN / PAIR]) =
                    (bytemuck::cast(magnitudes), bytemuck::cast(shifts));
                for (four, (m, s)) in magnitudes.as_chunks::<4>().0.iter().zip(shifts.as_chunks::<4>().0).enumerate() {
                    put(four * FOUR, s[0] | s[1] << 4 | s[2] << 8 | s[3] << 12);
                    put(four * FOUR + 1, m[0] | m[1] << 8);
                    put(four * FOUR + 2, m[2] | m[3] << 8);
                }
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
            let pair = i / PAIR % 4;
            let at = of_run(k, run, LINES) + i / PAIR / 4 * FOUR * LINE + (column * PAIR + i % PAIR) * 2;
            let shift = u16::from_ne_bytes([tile[at], tile[at + 1]]) >> (4 * pair) & 15;
            let magnitude = i16::from(tile[at + (1 + pair / 2) * LINE + pair % 2]);
            *out = f32::from(magnitude * SHIFTS[usize::from(shift)]) * power;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul;
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
    fn products_with_powers_far_from_one_and_with_zeros_are_those_too() {
        let (m, n, k) = (FEW.0 + 3, 70, 96);
        for (of_weights, of_rows) in [(1e-28, 1e-3), (1e-3, 1e-28), (1e-20, 1e25), (1e25, 1e-20), (1.0, 1.0)] {
            let (mut weights, mut x) = (values(1, n * k), values(2, m * k));
            // Far are the last tile and the third row alone; nothing is in the first output and the second row.
            weights[64 * k..].iter_mut().for_each(|w| *w *= of_weights);
            x[2 * k..3 * k].iter_mut().for_each(|x| *x *= of_rows);
            weights[..k].fill(0.0);
            x[k..2 * k].fill(0.0);
            let packed = packed(WeightType::F32, &weights, k);
            check_products::<i16>(&x, &packed, &rows(&packed));
        }
    }

    #[test]
    fn a_row_that_is_no_number_is_none_among_many_and_alone() {
        let (m, n, k, bad) = (FEW.0 + 3, 40, 96, 7);
        let packed = packed(WeightType::Bf16, &values(1, n * k), k);
        let mut x = values(2, m * k);
        x[bad * k + 50] = f32::INFINITY;
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            let (mut all, mut one) = (vec![0.0; m * n], vec![0.0; n]);
            matmul(&mut Pool::new(2), isa, &x, &packed, &mut all);
            for (i, all) in all.chunks(n).enumerate() {
                matmul(&mut Pool::new(1), isa, &x[i * k..][..k], &packed, &mut one);
                let no_numbers = [all, &one].map(|row| row.iter().all(|out| out.is_nan()));
                assert!(no_numbers == [i == bad; 2] && (i == bad || all == one), "{isa:?} {i}");
            }
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
