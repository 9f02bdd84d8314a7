//! The product of rounded activations and weights of few bits.
//!
//! Within a run of 32 inputs the products are whole numbers and their sum is exact; the runs of a row are added up in ascending
//! order by fused multiply-adds, one chain for each output, as [`crate::matmul`] says. [`crate::quantized`] has the forms' layouts.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use crate::ints::{GROUP, Ints, LINE};
use crate::matmul::{Span, To, store};
use crate::packed::Tiles;
use crate::quantized::{HEAD, Q4_0, Q4K, Q5K, Q6K, Q8_0, SCALES};
use crate::rounded::{RUN, Rounded, Run};
use crate::simd::{Kernel, LANES, Lanes};
use half::f16;

/// Bytes ahead of those that a lone row's product reads which are fetched already.
const AHEAD: usize = 8 << 10;

/// Bytes of rounded rows that are kept near while all weights pass by.
const NEAR: usize = 512 << 10;

/// A run of `R` rows and the same of `T` tiles.
#[derive(Clone, Copy)]
pub(crate) struct Meeting<const R: usize, const T: usize> {
    tiles: [*const u8; T],
    /// Inputs of a tile.
    k: usize,
    run: usize,
    /// The rows' steps in this run, and what is known of them.
    x: [*const i8; R],
    runs: [Run; R],
}

impl<const R: usize, const T: usize> Meeting<R, T> {
    /// The large blocks of so many bytes that the run is in, and its number there.
    ///
    /// # Safety
    /// There are such blocks.
    #[inline(always)]
    unsafe fn blocks(&self, bytes: usize) -> ([*const u8; T], usize) {
        // SAFETY: the caller's.
        (self.tiles.map(|tile| unsafe { tile.add(self.run / 8 * bytes) }), self.run % 8)
    }

    /// For each row, -1 times what the weights are shifted by, times the sum of its inputs.
    #[inline(always)]
    fn less(&self, shift: i32) -> [i32; R] {
        self.runs.map(|Run { sums, .. }| sums[0].wrapping_add(sums[1]).wrapping_mul(-shift))
    }
}

/// A form's arithmetic.
pub(crate) trait Form {
    /// Bytes that a run of a tile takes, its share of the scales included.
    const BYTES: usize;
    /// Adds the products to `sums`.
    ///
    /// # Safety
    /// What meets is there; the instruction set of `L` is there.
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<R, T>, sums: &mut [[L; T]; R]);
}

/// All rows of some tiles.
pub(crate) struct Columns<'a, F> {
    pub(crate) part: Span,
    pub(crate) rounded: &'a Rounded,
    pub(crate) w: Tiles<'a>,
    pub(crate) form: std::marker::PhantomData<F>,
}

impl<F: Form> Kernel for Columns<'_, F> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let To { m, k, .. } = self.part.to;
        let tiles = self.part.columns.clone();
        // SAFETY: tiles and rows exist.
        unsafe {
            if m == 1 {
                // One stream of weights at a time.
                tiles.for_each(|tile| self.block::<L, 1, 1>(0, tile));
                return;
            }
            let most = if L::WIDE { 6 } else { 2 };
            let near = (NEAR / k).max(most).next_multiple_of(most);
            for first in (0..m).step_by(near) {
                let rows = near.min(m - first);
                let mut tile = tiles.start;
                while tile < tiles.end {
                    let pair = L::WIDE && tile + 1 < tiles.end;
                    // Of about the same size, so that no block is left with one row.
                    let blocks = rows.div_ceil(most);
                    for block in 0..blocks {
                        let row = first + block * rows / blocks;
                        match ((block + 1) * rows / blocks - block * rows / blocks, pair) {
                            (6, true) => self.block::<L, 6, 2>(row, tile),
                            (5, true) => self.block::<L, 5, 2>(row, tile),
                            (4, true) => self.block::<L, 4, 2>(row, tile),
                            (3, true) => self.block::<L, 3, 2>(row, tile),
                            (2, true) => self.block::<L, 2, 2>(row, tile),
                            (1, true) => self.block::<L, 1, 2>(row, tile),
                            (2, false) => self.block::<L, 2, 1>(row, tile),
                            (some, false) => (row..row + some).for_each(|row| self.block::<L, 1, 1>(row, tile)),
                            _ => unreachable!("blocks have at most {most} rows"),
                        }
                    }
                    tile += if pair { 2 } else { 1 };
                }
            }
        }
    }
}

impl<F: Form> Columns<'_, F> {
    /// `R` rows of `T` tiles.
    ///
    /// # Safety
    /// There are such rows and tiles.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const T: usize>(&self, row: usize, tile: usize) {
        let Span { n, to: To { k, stride, out, .. }, .. } = self.part;
        let per_row = k / RUN;
        // SAFETY: the caller's. What is stored lies within row and tile; what is fetched ahead need not exist.
        unsafe {
            let tiles: [*const u8; T] = std::array::from_fn(|t| self.w.start(tile + t));
            let steps = self.rounded.steps.as_ptr().add(row * k);
            let runs = self.rounded.runs.as_ptr().add(row * per_row);
            let mut sums = [[L::splat(0.0); T]; R];
            for run in 0..per_row {
                if row == 0 {
                    for tile in tiles {
                        let ahead = tile.wrapping_add(run * F::BYTES + AHEAD);
                        (0..F::BYTES.div_ceil(LINE)).for_each(|line| L::fetch(ahead.wrapping_add(line * LINE)));
                    }
                }
                let x: [*const i8; R] = std::array::from_fn(|r| steps.add(r * k + run * RUN));
                let of_rows: [Run; R] = std::array::from_fn(|r| *runs.add(r * per_row + run));
                F::run(Meeting { tiles, k, run, x, runs: of_rows }, &mut sums);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (t, sum) in sums.iter().enumerate() {
                    let column = (tile + t) * LANES;
                    store(*sum, out.wrapping_add((row + r) * stride + column), n - column);
                }
            }
        }
    }
}

/// Sixteen f16 as they are.
///
/// # Safety
/// `at` points to them; the instruction set of `L` is there.
#[inline(always)]
unsafe fn halves<L: Lanes>(at: *const u8) -> L {
    // SAFETY: the caller's.
    unsafe { L::load(at.cast::<f16>()) }
}

/// Adds whole numbers times `scale` times each row's own scale.
///
/// # Safety
/// The instruction set of `L` is there.
#[inline(always)]
unsafe fn add<L: Lanes>(sum: L, ints: L::Ints, scale: L, of_row: f32) -> L {
    // SAFETY: the caller's. Plus zero: a product that is rounded once.
    unsafe { ints.floats().fma(scale.fma(L::splat(of_row), L::splat(0.0)), sum) }
}

/// Adds the products of a group's weights and inputs, of which `x` points to the run's.
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn dot<I: Ints, const R: usize, const T: usize>(
    ints: &mut [[I; T]; R],
    w: [I::Line; T],
    x: [*const i8; R],
    group: usize,
) {
    for (r, ints) in ints.iter_mut().enumerate() {
        for (ints, w) in ints.iter_mut().zip(w) {
            // SAFETY: the caller's: a run has so many groups.
            unsafe { *ints = ints.dot(w, x[r].add(group * GROUP)) };
        }
    }
}

/// Adds a run's whole numbers to the sums where each output has one scale for it, in tiles that begin with scales.
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn add_scaled<L: Lanes, const R: usize, const T: usize>(
    tiles: [*const u8; T],
    run: usize,
    ints: [[L::Ints; T]; R],
    runs: [Run; R],
    sums: &mut [[L; T]; R],
) {
    for (t, tile) in tiles.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let scale = halves::<L>(tile.add(run * SCALES));
            for (r, sums) in sums.iter_mut().enumerate() {
                sums[t] = add(sums[t], ints[r][t], scale, runs[r].scale);
            }
        }
    }
}

/// Adds a run's whole numbers to the sums where each output has a scale and a minimum for it: in blocks of Q4_K or Q5_K, that have 16
/// values of each kind at the beginning, and then 16 of each for every run.
///
/// # Safety
/// As [`Form::run`]; `run` is the run's number in the block.
#[inline(always)]
unsafe fn add_scaled_less<L: Lanes, const R: usize, const T: usize>(
    blocks: [*const u8; T],
    run: usize,
    ints: [[L::Ints; T]; R],
    runs: [Run; R],
    sums: &mut [[L; T]; R],
) {
    for (t, block) in blocks.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let bits = block.add(HEAD + run * SCALES);
            let scale = L::load_u8(bits).fma(halves(*block), L::splat(0.0));
            let min = L::load_u8(bits.add(LANES)).fma(halves(block.add(SCALES)), L::splat(0.0));
            for (r, sums) in sums.iter_mut().enumerate() {
                sums[t] = min.fma(L::splat(runs[r].sum), add(sums[t], ints[r][t], scale, runs[r].scale));
            }
        }
    }
}

impl Form for Q8_0 {
    const BYTES: usize = SCALES + Q8_0::RUN;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let Meeting { tiles, k, run, x, runs } = meeting;
            let at = tiles.map(|tile| tile.add(Q8_0::weights(k, run)));
            let less = meeting.less(128);
            let mut ints: [[L::Ints; T]; R] = std::array::from_fn(|r| [L::Ints::begin_wide(less[r]); T]);
            for group in 0..RUN / GROUP {
                let w = at.map(|at| L::Ints::line(at.add(group * LINE)));
                for (r, ints) in ints.iter_mut().enumerate() {
                    for (ints, w) in ints.iter_mut().zip(w) {
                        *ints = ints.dot_wide(w, x[r].add(group * GROUP));
                    }
                }
            }
            add_scaled(tiles, run, ints, runs, sums);
        }
    }
}

/// The low four bits of a group's weights, of which lines of two groups stand at `at`.
///
/// # Safety
/// They do; the instruction set of `L` is there.
#[inline(always)]
unsafe fn four_of<L: Lanes>(at: *const u8, group: usize) -> <L::Ints as Ints>::Line {
    // SAFETY: the caller's.
    unsafe {
        let line = L::Ints::line(at.add(group / 2 * LINE));
        if group.is_multiple_of(2) { L::Ints::low(line) } else { L::Ints::high(line) }
    }
}

/// Adds the products of a run's weights of four bits, which stand at `at` in lines of two groups.
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn four_bits<L: Lanes, const R: usize, const T: usize>(
    at: [*const u8; T],
    x: [*const i8; R],
    ints: &mut [[L::Ints; T]; R],
) {
    for pair in 0..RUN / GROUP / 2 {
        // SAFETY: the caller's.
        unsafe {
            let lines = at.map(|at| L::Ints::line(at.add(pair * LINE)));
            dot(ints, lines.map(|line| L::Ints::low(line)), x, 2 * pair);
            dot(ints, lines.map(|line| L::Ints::high(line)), x, 2 * pair + 1);
        }
    }
}

impl Form for Q4_0 {
    const BYTES: usize = SCALES + Q4_0::RUN;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let Meeting { tiles, k, run, x, runs } = meeting;
            let less = meeting.less(8);
            let mut ints: [[L::Ints; T]; R] = std::array::from_fn(|r| [L::Ints::splat(less[r]); T]);
            four_bits::<L, R, T>(tiles.map(|tile| tile.add(Q4_0::weights(k, run))), x, &mut ints);
            add_scaled(tiles, run, ints, runs, sums);
        }
    }
}

impl Form for Q4K {
    const BYTES: usize = Q4K::BLOCK / 8;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let (blocks, run) = meeting.blocks(Q4K::BLOCK);
            let Meeting { x, runs, .. } = meeting;
            let mut ints = [[L::Ints::splat(0); T]; R];
            four_bits::<L, R, T>(blocks.map(|block| block.add(Q4K::weights(run))), x, &mut ints);
            add_scaled_less(blocks, run, ints, runs, sums);
        }
    }
}

impl Form for Q5K {
    const BYTES: usize = Q5K::BLOCK / 8;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let (blocks, run) = meeting.blocks(Q5K::BLOCK);
            let Meeting { x, runs, .. } = meeting;
            let at = blocks.map(|block| block.add(Q5K::weights(run)));
            // One line has the fifth bits of the run: bit g of a byte is of group g.
            let fifths = at.map(|at| L::Ints::line(at.add(RUN / GROUP / 2 * LINE)));
            let mut ints = [[L::Ints::splat(0); T]; R];
            for group in 0..RUN / GROUP {
                // Filled in a loop: a closure as long as this is not compiled into the kernel.
                let mut w = fifths;
                for (w, at) in w.iter_mut().zip(at) {
                    *w = L::Ints::fifth(four_of::<L>(at, group), *w, group);
                }
                dot(&mut ints, w, x, group);
            }
            add_scaled_less(blocks, run, ints, runs, sums);
        }
    }
}

impl Form for Q6K {
    const BYTES: usize = Q6K::BLOCK / 8;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let (blocks, run) = meeting.blocks(Q6K::BLOCK);
            let Meeting { x, runs, .. } = meeting;
            let at = blocks.map(|block| block.add(Q6K::weights(run)));
            // Each half of the run has a scale, and a line with the upper two bits of its four groups.
            for half in 0..2 {
                let uppers = at.map(|at| L::Ints::line(at.add((RUN / GROUP / 2 + half) * LINE)));
                let begin = |r: usize| L::Ints::splat(runs[r].sums[half].wrapping_mul(-32));
                let mut ints: [[L::Ints; T]; R] = std::array::from_fn(|r| [begin(r); T]);
                for group in 0..RUN / GROUP / 2 {
                    let mut w = uppers;
                    for (w, at) in w.iter_mut().zip(at) {
                        *w = L::Ints::sixth(four_of::<L>(at, 4 * half + group), *w, group);
                    }
                    dot(&mut ints, w, x, 4 * half + group);
                }
                for (t, block) in blocks.iter().enumerate() {
                    let bits = block.add(HEAD + run * SCALES + half * LANES).cast::<i8>();
                    let scale = L::load_i8(bits).fma(halves(*block), L::splat(0.0));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        sums[t] = add(sums[t], ints[r][t], scale, runs[r].scale);
                    }
                }
            }
        }
    }
}
