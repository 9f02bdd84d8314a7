//! The product of rounded activations and weights that are whole numbers with scales.
//!
//! Within a run of 32 inputs the products are whole numbers and their sum is exact; the runs of a row are added up in ascending
//! order by fused multiply-adds, one chain for each output, as [`crate::matmul`] says. [`crate::quantized`] and
//! [`crate::block_float`] have the forms' layouts.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use crate::ints::{GROUP, Ints, LINE};
use crate::matmul::{Span, To, store};
use crate::packed::Tiles;
use crate::quantized::{HEAD, Q4_0, Q4K, Q5K, Q6K, Q8_0, RUNS, SCALES, Sixes};
use crate::rounded::{RUN, Rounded, Run, Step};
use crate::simd::{Kernel, LANES, Lanes};
use half::f16;

/// Bytes ahead of those that a lone block's product reads which are fetched already.
const AHEAD: usize = 8 << 10;

/// The same of one row's product: of 1 to 24 KiB 6 are the best or near it for long rows of all forms, on one thread and two.
const AHEAD_ALONE: usize = 6 << 10;

/// The same where rows are short ([`Form::SHORT`]). With 576 inputs of Q8_0 one thread of a Zen 4 reads 21 GB/s with weights asked for
/// 6 KiB ahead, 17 to 19 with 1 to 2 KiB, and 32 to 35 with 256 to 576 bytes; in caches it makes no difference. It looks as if the
/// processor then fetched by itself, with more lines on their way than a program's own loads may have.
const AHEAD_SHORT: usize = 512;

/// Rows of a block that meets one tile, where registers are wide.
const TALL: usize = 8;

/// Bytes of rounded rows that are kept near while all weights pass by.
const NEAR: usize = 1 << 20;

/// A run of `R` rows and the same of `T` tiles.
pub(crate) struct Meeting<S, const R: usize, const T: usize> {
    tiles: *const u8,
    /// Bytes from one tile to the next.
    bytes: usize,
    /// Inputs of a row.
    pub(crate) k: usize,
    /// The run's number.
    pub(crate) run: usize,
    /// The first row's steps in this run, and what is known of it.
    steps: *const S,
    about: *const Run,
    stream: Option<Stream>,
}

impl<S, const R: usize, const T: usize> Clone for Meeting<S, R, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S, const R: usize, const T: usize> Copy for Meeting<S, R, T> {}

impl<S, const R: usize, const T: usize> Meeting<S, R, T> {
    /// So many bytes into each tile.
    ///
    /// # Safety
    /// They have so many. So for all of these: what they point to is there.
    #[inline(always)]
    pub(crate) unsafe fn at(self, offset: usize) -> [*const u8; T] {
        // SAFETY: the caller's.
        std::array::from_fn(|t| unsafe { self.tiles.add(t * self.bytes + offset) })
    }

    /// The large blocks of so many bytes that the run is in, so many bytes into each.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    unsafe fn in_blocks(self, bytes: usize, offset: usize) -> [*const u8; T] {
        // SAFETY: the caller's.
        unsafe { self.at(self.run / RUNS * bytes + offset) }
    }

    /// The run's number in its large block.
    #[inline(always)]
    fn of_block(self) -> usize {
        self.run % RUNS
    }

    /// Steps of a row, from so many of the run on.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    pub(crate) unsafe fn x(self, row: usize, first: usize) -> *const S {
        // SAFETY: the caller's.
        unsafe { self.steps.add(row * self.k + first) }
    }

    /// What is known of a row in this run.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    pub(crate) unsafe fn about(self, row: usize) -> Run {
        // SAFETY: the caller's.
        unsafe { *self.about.add(row * (self.k / RUN)) }
    }

    /// Asks for one of the stream's lines, if there are so many.
    #[inline(always)]
    fn ask<L: Lanes>(self, line: usize) {
        if let Some(Stream { from, lines }) = self.stream
            && line < lines
        {
            L::fetch_once(from.wrapping_add(line * LINE));
        }
    }

    /// The same, and what stands before it in the program stays before it: where a compiler puts all loads of a run together a product of
    /// Q8_0 takes a tenth longer, of bf16 as well. Q5_K takes 40 % longer with it, and the others gain nothing.
    #[inline(always)]
    pub(crate) fn ask_in_turn<L: Lanes>(self, line: usize) {
        if self.stream.is_some() {
            self.ask::<L>(line);
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// -1 times what the weights are shifted by, times the sum of a row's inputs.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    unsafe fn less(self, row: usize, shift: i32) -> i32 {
        // SAFETY: the caller's.
        let Run { sums, .. } = unsafe { self.about(row) };
        sums[0].wrapping_add(sums[1]).wrapping_mul(-shift)
    }
}

/// Tiles that are asked for while others are met: where they begin, bytes from one to the next, and bytes for each run.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) from: *const u8,
    pub(crate) tile: usize,
    pub(crate) run: usize,
}

/// Lines that are asked for while a run is met.
#[derive(Clone, Copy)]
struct Stream {
    from: *const u8,
    lines: usize,
}

/// How weights are asked for while others are met.
#[derive(Clone, Copy)]
enum Fetch {
    /// A lone row's, from here on, a line with each group: a processor asks for few lines at a time, and more at once hold up its loads. So
    /// asked for, the products take 3 to 8 % less than with each run's lines at its beginning.
    Stream { from: *const u8 },
    /// With every so many runs, from one on. Where several blocks of rows meet the same weights, each asks for a share of the next
    /// ones, so that memory is never idle.
    Runs { every: usize, first: usize, ahead: Ahead },
}

/// A form's arithmetic.
pub(crate) trait Form {
    /// What activations are rounded to.
    type Step: Step;
    /// Bytes that a run of a tile takes, its share of the scales included.
    const BYTES: usize;
    /// Rows up to which one tile at a time is faster than two, as measured: its weights come as one stream, two share what is loaded of
    /// the rows.
    const ALONE: usize = 24;
    /// Inputs of a lone row up to which its weights are asked for shortly before they are read, as measured.
    const SHORT: usize = 0;
    /// Rows of a block, up to three, where registers are half as wide and half as many: as measured.
    const NARROW: usize = 3;
    /// Adds the products to `sums`.
    ///
    /// # Safety
    /// What meets is there; the instruction set of `L` is there.
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<Self::Step, R, T>, sums: &mut [[L; T]; R]);
}

/// All rows of some tiles.
pub(crate) struct Columns<'a, F: Form> {
    pub(crate) part: Span,
    pub(crate) rounded: &'a Rounded<F::Step>,
    pub(crate) w: Tiles<'a>,
    /// What is asked for where several blocks of rows meet, if it is not the tiles after them.
    pub(crate) next: Option<Ahead>,
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
                let ahead = if k <= F::SHORT { AHEAD_SHORT } else { AHEAD_ALONE };
                for tile in tiles {
                    self.block::<L, 1, 1>(0, tile, Fetch::Stream { from: self.ahead(tile, ahead).from });
                }
                return;
            }
            let most = if L::WIDE { if m > F::ALONE { 6 } else { TALL } } else { F::NARROW };
            let near = (NEAR / (k * size_of::<F::Step>())).max(most).next_multiple_of(most);
            for first in (0..m).step_by(near) {
                let rows = near.min(m - first);
                let mut tile = tiles.start;
                while tile < tiles.end {
                    let pair = L::WIDE && m > F::ALONE && tile + 1 < tiles.end;
                    let together = if pair { 2 } else { 1 };
                    // Of about the same size, so that no block is left with one row.
                    let blocks = rows.div_ceil(most);
                    for block in 0..blocks {
                        let (row, end) = (first + block * rows / blocks, first + (block + 1) * rows / blocks);
                        let ahead = if blocks == 1 {
                            self.ahead(tile, AHEAD)
                        } else {
                            self.next.unwrap_or_else(|| self.ahead(tile, together * self.w.bytes()))
                        };
                        let fetch = Fetch::Runs { every: blocks, first: block, ahead };
                        self.rows::<L>(row..end, tile, pair, fetch);
                    }
                    tile += together;
                }
            }
        }
    }
}

impl<F: Form> Columns<'_, F> {
    /// So many bytes after those of a tile.
    ///
    /// # Safety
    /// There is such a tile.
    #[inline(always)]
    unsafe fn ahead(&self, tile: usize, bytes: usize) -> Ahead {
        // SAFETY: the caller's.
        Ahead { from: unsafe { self.w.start(tile) }.wrapping_add(bytes), tile: self.w.bytes(), run: F::BYTES }
    }

    /// A block of rows, and a tile or a pair.
    ///
    /// # Safety
    /// There are such rows and tiles.
    #[inline(always)]
    unsafe fn rows<L: Lanes>(&self, rows: Range<usize>, tile: usize, pair: bool, fetch: Fetch) {
        let row = rows.start;
        // SAFETY: the caller's.
        unsafe {
            match (rows.len(), pair) {
                (6, true) => self.block::<L, 6, 2>(row, tile, fetch),
                (5, true) => self.block::<L, 5, 2>(row, tile, fetch),
                (4, true) => self.block::<L, 4, 2>(row, tile, fetch),
                (3, true) => self.block::<L, 3, 2>(row, tile, fetch),
                (2, true) => self.block::<L, 2, 2>(row, tile, fetch),
                (1, true) => self.block::<L, 1, 2>(row, tile, fetch),
                (8, false) if L::WIDE => self.block::<L, 8, 1>(row, tile, fetch),
                (7, false) if L::WIDE => self.block::<L, 7, 1>(row, tile, fetch),
                (6, false) if L::WIDE => self.block::<L, 6, 1>(row, tile, fetch),
                (5, false) if L::WIDE => self.block::<L, 5, 1>(row, tile, fetch),
                (4, false) if L::WIDE => self.block::<L, 4, 1>(row, tile, fetch),
                (3, false) => self.block::<L, 3, 1>(row, tile, fetch),
                (2, false) => self.block::<L, 2, 1>(row, tile, fetch),
                _ => rows.for_each(|row| self.block::<L, 1, 1>(row, tile, fetch)),
            }
        }
    }

    /// `R` rows of `T` tiles.
    ///
    /// # Safety
    /// There are such rows and tiles.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const T: usize>(&self, row: usize, tile: usize, fetch: Fetch) {
        let Span { n, to: To { k, stride, out, .. }, .. } = self.part;
        let per_row = k / RUN;
        // SAFETY: the caller's. What is stored lies within row and tile; what is fetched ahead need not exist.
        unsafe {
            let (tiles, bytes) = (self.w.start(tile), self.w.bytes());
            let steps = self.rounded.steps.as_ptr().add(row * k);
            let about = self.rounded.runs.as_ptr().add(row * per_row);
            let mut sums = [[L::splat(0.0); T]; R];
            let mut until = if let Fetch::Runs { first, .. } = fetch { first } else { per_row };
            for run in 0..per_row {
                let mut stream = None;
                match fetch {
                    Fetch::Stream { from } => {
                        let from = from.wrapping_add(run * F::BYTES);
                        stream = Some(Stream { from, lines: F::BYTES.div_ceil(LINE) });
                    }
                    Fetch::Runs { every, ahead: Ahead { from, tile, run: per_run }, .. } if run == until => {
                        until += every;
                        for t in 0..T {
                            let from = from.wrapping_add(t * tile + run * per_run);
                            (0..per_run.div_ceil(LINE)).for_each(|line| L::fetch(from.wrapping_add(line * LINE)));
                        }
                    }
                    Fetch::Runs { .. } => {}
                }
                let (steps, about) = (steps.add(run * RUN), about.add(run));
                F::run(Meeting { tiles, bytes, k, run, steps, about, stream }, &mut sums);
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
pub(crate) unsafe fn add<L: Lanes>(sum: L, ints: L::Ints, scale: L, of_row: f32) -> L {
    // SAFETY: the caller's. Plus zero: a product that is rounded once.
    unsafe { ints.floats().fma(scale.fma(L::splat(of_row), L::splat(0.0)), sum) }
}

/// Sums for few groups of all rows and tiles: see [`Ints::few`].
///
/// # Safety
/// The instruction set of `I` is there.
#[inline(always)]
unsafe fn few<I: Ints, const R: usize, const T: usize>(ints: &[[I; T]; R]) -> [[I::Few; T]; R] {
    // SAFETY: the caller's.
    std::array::from_fn(|r| std::array::from_fn(|t| unsafe { ints[r][t].few() }))
}

/// Adds the products of a group's weights and inputs.
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn dot<L: Lanes, const R: usize, const T: usize>(
    meeting: Meeting<i8, R, T>,
    w: [<L::Ints as Ints>::Line; T],
    group: usize,
    few: &mut [[<L::Ints as Ints>::Few; T]; R],
) {
    meeting.ask::<L>(group);
    for (r, few) in few.iter_mut().enumerate() {
        for (few, w) in few.iter_mut().zip(w) {
            // SAFETY: the caller's: a run has so many groups.
            unsafe { *few = L::Ints::dot(*few, w, meeting.x(r, group * GROUP)) };
        }
    }
}

/// Adds what few groups came to.
///
/// # Safety
/// The instruction set of `I` is there.
#[inline(always)]
unsafe fn with<I: Ints, const R: usize, const T: usize>(ints: &mut [[I; T]; R], few: [[I::Few; T]; R]) {
    for (ints, few) in ints.iter_mut().zip(few) {
        for (ints, few) in ints.iter_mut().zip(few) {
            // SAFETY: the caller's.
            unsafe { *ints = ints.with(few) };
        }
    }
}

/// Adds a run's whole numbers to the sums where each output has one scale for it, in tiles that begin with scales.
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn add_scaled<L: Lanes, const R: usize, const T: usize>(
    meeting: Meeting<i8, R, T>,
    ints: [[L::Ints; T]; R],
    sums: &mut [[L; T]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        for (t, at) in meeting.at(meeting.run * SCALES).into_iter().enumerate() {
            let scale = halves::<L>(at);
            for (r, sums) in sums.iter_mut().enumerate() {
                sums[t] = add(sums[t], ints[r][t], scale, meeting.about(r).scale);
            }
        }
    }
}

/// Adds a run's whole numbers to the sums where each output has a scale and a minimum for it: in blocks of Q4_K or Q5_K, that have 16
/// values of each kind at the beginning, and then [`Sixes`].
///
/// # Safety
/// As [`Form::run`].
#[inline(always)]
unsafe fn add_scaled_less<L: Lanes, const R: usize, const T: usize>(
    meeting: Meeting<i8, R, T>,
    bytes: usize,
    ints: [[L::Ints; T]; R],
    sums: &mut [[L; T]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        for (t, block) in meeting.in_blocks(bytes, 0).into_iter().enumerate() {
            let sixes = Sixes::of(meeting.of_block());
            let (scale, min) = L::load_sixes(block.add(sixes.own), block.add(sixes.shared), sixes.shift);
            let scale = scale.fma(halves(block), L::splat(0.0));
            let min = min.fma(halves(block.add(SCALES)), L::splat(0.0));
            for (r, sums) in sums.iter_mut().enumerate() {
                let about = meeting.about(r);
                sums[t] = min.fma(L::splat(about.sum), add(sums[t], ints[r][t], scale, about.scale));
            }
        }
    }
}

impl Form for Q8_0 {
    type Step = i8;
    const BYTES: usize = SCALES + Q8_0::RUN;
    const SHORT: usize = 1024;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i8, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.at(Q8_0::weights(meeting.k, meeting.run));
            let mut ints: [[L::Ints; T]; R] = std::array::from_fn(|r| [L::Ints::begin_wide(meeting.less(r, 128)); T]);
            for group in 0..RUN / GROUP {
                meeting.ask_in_turn::<L>(group);
                let w = at.map(|at| L::Ints::line(at.add(group * LINE)));
                for (r, ints) in ints.iter_mut().enumerate() {
                    for (ints, w) in ints.iter_mut().zip(w) {
                        *ints = ints.dot_wide(w, meeting.x(r, group * GROUP));
                    }
                }
            }
            // A run takes half a line more than its groups.
            meeting.ask::<L>(RUN / GROUP);
            add_scaled(meeting, ints, sums);
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
    meeting: Meeting<i8, R, T>,
    at: [*const u8; T],
    ints: &mut [[L::Ints; T]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = few(ints);
        for pair in 0..RUN / GROUP / 2 {
            let lines = at.map(|at| L::Ints::line(at.add(pair * LINE)));
            dot::<L, R, T>(meeting, lines.map(|line| L::Ints::low(line)), 2 * pair, &mut sums);
            dot::<L, R, T>(meeting, lines.map(|line| L::Ints::high(line)), 2 * pair + 1, &mut sums);
        }
        with(ints, sums);
    }
}

impl Form for Q4_0 {
    type Step = i8;
    const BYTES: usize = SCALES + Q4_0::RUN;
    const SHORT: usize = 1024;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i8, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.at(Q4_0::weights(meeting.k, meeting.run));
            let mut ints: [[L::Ints; T]; R] = std::array::from_fn(|r| [L::Ints::splat(meeting.less(r, 8)); T]);
            four_bits::<L, R, T>(meeting, at, &mut ints);
            add_scaled(meeting, ints, sums);
        }
    }
}

impl Form for Q4K {
    type Step = i8;
    const BYTES: usize = Q4K::BLOCK / RUNS;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i8, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.in_blocks(Q4K::BLOCK, Q4K::weights(meeting.of_block()));
            let mut ints = [[L::Ints::splat(0); T]; R];
            four_bits::<L, R, T>(meeting, at, &mut ints);
            add_scaled_less(meeting, Q4K::BLOCK, ints, sums);
        }
    }
}

impl Form for Q5K {
    type Step = i8;
    const BYTES: usize = Q5K::BLOCK / RUNS;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i8, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let at = meeting.in_blocks(Q5K::BLOCK, Q5K::weights(meeting.of_block()));
            // One line has the fifth bits of the run: bit g of a byte is of group g.
            let fifths = at.map(|at| L::Ints::line(at.add(RUN / GROUP / 2 * LINE)));
            let mut ints = [[L::Ints::splat(0); T]; R];
            for half in 0..2 {
                let mut sums = few(&ints);
                for group in half * RUN / GROUP / 2..(half + 1) * RUN / GROUP / 2 {
                    // Filled in a loop: a closure as long as this is not compiled into the kernel.
                    let mut w = fifths;
                    for (w, at) in w.iter_mut().zip(at) {
                        *w = L::Ints::fifth(four_of::<L>(at, group), *w, group);
                    }
                    dot::<L, R, T>(meeting, w, group, &mut sums);
                }
                with(&mut ints, sums);
            }
            add_scaled_less(meeting, Q5K::BLOCK, ints, sums);
        }
    }
}

impl Form for Q6K {
    type Step = i8;
    const BYTES: usize = Q6K::BLOCK / RUNS;
    const SHORT: usize = 3072;
    // Two tiles ask for more registers than there are, and three rows where there are fewer.
    const ALONE: usize = usize::MAX;
    const NARROW: usize = 2;

    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const T: usize>(meeting: Meeting<i8, R, T>, sums: &mut [[L; T]; R]) {
        // SAFETY: the caller's.
        unsafe {
            let (blocks, run) = (meeting.in_blocks(Q6K::BLOCK, 0), meeting.of_block());
            let at = meeting.in_blocks(Q6K::BLOCK, Q6K::weights(run));
            // Each half of the run has a scale, and a line with the upper two bits of its four groups.
            for half in 0..2 {
                let at = at.map(|at| at.add(Q6K::half(half)));
                let uppers = at.map(|at| L::Ints::line(at));
                let mut ints = [[L::Ints::splat(0); T]; R];
                for (r, ints) in ints.iter_mut().enumerate() {
                    *ints = [L::Ints::splat(meeting.about(r).sums[half].wrapping_mul(-32)); T];
                }
                for pair in 0..RUN / GROUP / 4 {
                    let mut sums = few(&ints);
                    for group in 2 * pair..2 * pair + 2 {
                        let mut w = uppers;
                        for (w, at) in w.iter_mut().zip(at) {
                            *w = L::Ints::sixth(four_of::<L>(at.add(LINE), group), *w, group);
                        }
                        dot::<L, R, T>(meeting, w, 4 * half + group, &mut sums);
                    }
                    with(&mut ints, sums);
                }
                for (t, block) in blocks.iter().enumerate() {
                    let bits = block.add(HEAD + run * SCALES + half * LANES).cast::<i8>();
                    let scale = L::load_i8(bits).fma(halves(*block), L::splat(0.0));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        sums[t] = add(sums[t], ints[r][t], scale, meeting.about(r).scale);
                    }
                }
            }
        }
    }
}
