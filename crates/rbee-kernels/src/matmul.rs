//! Matrix product with weights that are packed once: `out[m, n] = x[m, k] · w[n, k]ᵀ`, all sums in f32.
//!
//! Every output element is one chain of fused multiply-adds over k in ascending order, whatever the number of
//! rows, threads or lanes. So a row's bits are the same alone and among others, and the same on AVX-512,
//! AVX2+FMA and the scalar path: a fused multiply-add rounds once, everywhere. Lanes are output columns. Beside weights that
//! are whole numbers a row is rounded first ([`crate::rounded`]), and the chain is one over runs of inputs ([`crate::products`]).

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use crate::block_float;
use crate::packed::{Kept, PANEL, Packed, Segment, VECTORS};
use crate::pool::{Pool, SharedOut};
use crate::products::{self, Form};
use crate::quantized::{Q4_0, Q4K, Q5K, Q6K, Q8_0, Quantization};
use crate::rounded::Rounded;
use crate::simd::{Element, Isa, Kernel, LANES, Lanes, dispatch};

/// Multiply-adds below which a product is left to the calling thread: about 10 microseconds of one core.
const SMALL: usize = 1 << 18;

/// Multiply-adds of a task: about a microsecond of one core that waits for memory.
const TASK: usize = 1 << 16;

thread_local! {
    /// Kept between products: rows in steps of eight bits and of fifteen.
    static ROUNDED: RefCell<(Rounded<i8>, Rounded<i16>)> = RefCell::default();
}

/// `out[m, n] = x[m, k] · wᵀ`, columns shared out over the pool's threads.
///
/// # Panics
/// When the lengths do not fit the shapes, or this machine does not have `isa`.
pub fn matmul(pool: &mut Pool, isa: Isa, x: &[f32], w: &Packed, out: &mut [f32]) {
    let (n, k) = (w.n, w.k);
    let m = x.len() / k;
    assert!(x.len() == m * k && out.len() == m * n, "matmul of {} by {n} x {k} into {}", x.len(), out.len());
    assert!(isa.is_here(), "this machine has no {isa:?}");
    let out = SharedOut::new(out);
    let mut first = 0;
    ROUNDED.with_borrow_mut(|(rows, fine)| {
        if w.segments.iter().any(|segment| matches!(segment.kept, Kept::Quantized(_))) {
            rows.fill(pool, isa, x);
        }
        if w.segments.iter().any(|segment| segment.kept == Kept::BlockFloat) {
            fine.fill(pool, isa, x);
        }
        for w in &w.segments {
            let to = To { m, k, stride: n, out: out.start().wrapping_add(first) };
            first += w.n;
            match w.kept {
                Kept::F32 => plain::<f32>(pool, isa, x, w, to),
                Kept::F16 => plain::<f16>(pool, isa, x, w, to),
                Kept::Bf16 => plain::<bf16>(pool, isa, x, w, to),
                Kept::BlockFloat => {
                    let tiles = w.tiles();
                    // SAFETY: as in `rounded`.
                    each(pool, w.n, to, LANES, 2, &|part| unsafe { block_float::product(isa, part, fine, tiles) });
                }
                Kept::Quantized(form) => match form {
                    Quantization::Q8_0 => rounded::<Q8_0>(pool, isa, rows, w, to),
                    Quantization::Q4_0 => rounded::<Q4_0>(pool, isa, rows, w, to),
                    Quantization::Q4K => rounded::<Q4K>(pool, isa, rows, w, to),
                    Quantization::Q5K => rounded::<Q5K>(pool, isa, rows, w, to),
                    Quantization::Q6K => rounded::<Q6K>(pool, isa, rows, w, to),
                },
            }
        }
    });
}

/// Where a segment's product goes.
#[derive(Clone, Copy)]
pub(crate) struct To {
    pub(crate) m: usize,
    pub(crate) k: usize,
    /// From one row's outputs to the next's.
    pub(crate) stride: usize,
    /// The segment's first output of the first row. Nobody else touches the segment's columns.
    pub(crate) out: *mut f32,
}

// SAFETY: tasks write disjoint columns.
unsafe impl Send for To {}
// SAFETY: as above.
unsafe impl Sync for To {}

/// Some columns of a segment for all rows, in units of panels or tiles.
pub(crate) struct Span {
    pub(crate) to: To,
    /// Outputs of the segment.
    pub(crate) n: usize,
    pub(crate) columns: Range<usize>,
}

/// Hands out the columns of a segment of `n` outputs in units of so many, of which some stay together.
fn each(pool: &mut Pool, n: usize, to: To, unit: usize, together: usize, run: &(dyn Fn(Span) + Sync)) {
    let units = n.div_ceil(unit);
    // Waking a thread costs more than a small product.
    if to.m * n * to.k < SMALL {
        return run(Span { to, n, columns: 0..units });
    }
    let work = together * unit * to.m * to.k;
    pool.share(units.div_ceil(together), (TASK / work).max(1), &|some| {
        run(Span { to, n, columns: some.start * together..units.min(some.end * together) });
    });
}

fn plain<T: Element>(pool: &mut Pool, isa: Isa, x: &[f32], w: &Segment, to: To) {
    let data = w.data.values::<T>();
    each(pool, w.n, to, PANEL, 1, &|part| {
        // SAFETY: tasks have disjoint panels, hence disjoint columns of the output, which outlives the call; the lengths and the
        // instruction set were checked before, and a packed matrix has whole panels.
        unsafe { dispatch(isa, Columns { part, x, w: data }) }
    });
}

fn rounded<F: Form + Sync>(pool: &mut Pool, isa: Isa, x: &Rounded<F::Step>, w: &Segment, to: To) {
    let tiles = w.tiles();
    // Tiles are met in pairs.
    each(pool, w.n, to, LANES, 2, &|part| {
        // SAFETY: as above, of tiles.
        unsafe { dispatch(isa, products::Columns::<F> { part, rounded: x, w: tiles, next: None, form: PhantomData }) }
    });
}

/// All rows of some panels.
struct Columns<'a, T> {
    part: Span,
    x: &'a [f32],
    w: &'a [T],
}

impl<T: Element> Kernel for Columns<'_, T> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for panel in self.part.columns.clone() {
            let mut row = 0;
            while row < self.part.to.m {
                // SAFETY: the rows are within `x`, the panel within `w`.
                row += unsafe {
                    match self.part.to.m - row {
                        6.. if L::WIDE => self.block::<L, 6, VECTORS>(row, panel),
                        4.. if L::WIDE => self.block::<L, 4, VECTORS>(row, panel),
                        3.. if L::WIDE => self.block::<L, 3, VECTORS>(row, panel),
                        2.. if L::WIDE => self.block::<L, 2, VECTORS>(row, panel),
                        4.. => self.block::<L, 4, 1>(row, panel),
                        2.. => self.block::<L, 2, 2>(row, panel),
                        _ => self.block::<L, 1, VECTORS>(row, panel),
                    }
                };
            }
        }
    }
}

impl<T: Element> Columns<'_, T> {
    /// `R` rows of one panel, `V` vectors at a time. Returns `R`.
    ///
    /// # Safety
    /// `R` rows from `row` and the panel exist, and `V` divides the panel's vectors.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const V: usize>(&self, row: usize, panel: usize) -> usize {
        let Span { n, to: To { k, stride, out, .. }, .. } = self.part;
        // SAFETY: the caller's. What is stored lies within row and panel.
        unsafe {
            let x = self.x.as_ptr().add(row * k);
            let rows: [*const f32; R] = std::array::from_fn(|r| x.add(r * k));
            for first in (0..VECTORS).step_by(V) {
                let at = self.w.as_ptr().add(panel * k * PANEL + first * LANES);
                let mut sums = [[L::splat(0.0); V]; R];
                for i in 0..k {
                    let weights: [L; V] = std::array::from_fn(|v| L::load(at.add(i * PANEL + v * LANES)));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let value = L::splat(*rows[r].add(i));
                        for (sum, weight) in sums.iter_mut().zip(weights) {
                            *sum = value.fma(weight, *sum);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        let column = panel * PANEL + (first + v) * LANES;
                        let out = out.wrapping_add((row + r) * stride + column);
                        store(*sum, out, n.saturating_sub(column));
                    }
                }
            }
        }
        R
    }
}

/// Writes the lanes of which there are columns: all of them, if there are `room` or more.
///
/// # Safety
/// There is such room; the instruction set of `L` is there.
#[inline(always)]
pub(crate) unsafe fn store<L: Lanes>(sum: L, out: *mut f32, room: usize) {
    // SAFETY: the caller's.
    unsafe {
        if room >= LANES {
            sum.store(out);
        } else {
            let mut last = [0f32; LANES];
            sum.store(last.as_mut_ptr());
            std::ptr::copy_nonoverlapping(last.as_ptr(), out, room);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::packed::{Part, WeightType};
    use crate::testing::{self, bytes, values};

    const KINDS: [WeightType; 3] = [WeightType::F32, WeightType::F16, WeightType::Bf16];

    #[test]
    fn a_row_has_the_same_bits_alone_among_others_on_any_isa_and_any_threads() {
        for (m, n, k) in [(1, 1, 1), (1, 64, 32), (2, 70, 33), (5, 100, 17), (6, 48, 64), (13, 129, 96), (40, 500, 192)]
        {
            let x = values(m as u32, m * k);
            for kind in KINDS {
                let packed = testing::packed(&[Part::own(kind, &bytes(kind, &values(n as u32, n * k)))], k).unwrap();
                let mut want = vec![0.0; m * n];
                matmul(&mut Pool::new(1), Isa::Scalar, &x, &packed, &mut want);
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
                    for threads in [1, 3] {
                        let mut pool = Pool::new(threads);
                        let mut got = vec![0.0; m * n];
                        matmul(&mut pool, isa, &x, &packed, &mut got);
                        assert_eq!(got, want, "{isa:?} {m}x{n}x{k}");
                        for row in 0..m {
                            let mut alone = vec![0.0; n];
                            matmul(&mut pool, isa, &x[row * k..][..k], &packed, &mut alone);
                            assert_eq!(alone, want[row * n..][..n], "{isa:?} {m}x{n}x{k} row {row}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn columns_are_handed_out_once_and_tiles_in_pairs() {
        let (k, out) = (SMALL / 64, std::ptr::null_mut());
        for n in [1, 16, 17, 48, 256, 500, 5632] {
            for (threads, m) in [(1, 1), (2, 1), (3, 7), (16, 1)] {
                let spans = Mutex::new(Vec::new());
                each(&mut Pool::new(threads), n, To { m, k, stride: n, out }, LANES, 2, &|span| {
                    spans.lock().unwrap().push((span.columns.start, span.columns.end));
                });
                let mut spans = spans.into_inner().unwrap();
                spans.sort_unstable();
                assert!(spans.iter().all(|(start, end)| start < end && start.is_multiple_of(2)), "{spans:?}");
                assert!(spans.windows(2).all(|pair| pair[0].1 == pair[1].0), "{spans:?}");
                assert_eq!((spans[0].0, spans[spans.len() - 1].1), (0, n.div_ceil(LANES)));
            }
        }
    }

    #[test]
    fn sums_are_a_chain_of_fused_multiply_adds_and_agree_with_double_precision() {
        let (m, n, k) = (3, 70, 500);
        let (x, w) = (values(1, m * k), values(2, n * k));
        let packed = testing::packed(&[Part::own(WeightType::F32, &bytes(WeightType::F32, &w))], k).unwrap();
        let mut got = vec![0.0; m * n];
        matmul(&mut Pool::new(2), Isa::detect(), &x, &packed, &mut got);
        for row in 0..m {
            for column in 0..n {
                let pairs = || (0..k).map(|i| (x[row * k + i], w[column * k + i]));
                let chain = pairs().fold(0f32, |sum, (x, w)| x.mul_add(w, sum));
                let exact: f64 = pairs().map(|(x, w)| f64::from(x) * f64::from(w)).sum();
                let got = got[row * n + column];
                assert_eq!(got.to_bits(), chain.to_bits());
                assert!((f64::from(got) - exact).abs() < 1e-4);
            }
        }
    }
}
